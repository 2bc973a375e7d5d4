// Images, volumes and snapshots as files below a directory: what a daemon says and does about it.
//
// The daemon never opens a path that a client names. The client mounts the directory, through a
// holder process that it starts (frontend/fuse/holder.h) and that listens in the daemon's runtime
// directory; there the daemon takes the connection with the kernel from it.
//
// Thread rule: FilesHost from any thread; the rest are values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <sys/types.h>

#include "base/error.h"
#include "control/json.h"

namespace stellarium::control {

struct FilesRequests {
    std::string kind;  ///< "open", "read", "write", "flush", "discard" or "other".
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t errors = 0;
};

struct FilesStatus {
    bool mounted = false;
    // Whom a holder must serve, and where, so that this daemon takes the directory from it:
    std::string holder_socket;
    uid_t uid = 0;
    gid_t gid = 0;
    // Only when it is mounted:
    std::string directory;
    int64_t holder_pid = 0;
    uint64_t open_files = 0;
    std::vector<std::string> open;  ///< The first of them: "volumes/vm-1".
    bool repeats_requests =
        false;             ///< The kernel repeats what a daemon that died had not answered.
    bool adopted = false;  ///< Taken over from an earlier daemon.
    uint64_t repeated_requests = 0;
    uint64_t in_flight = 0;
    uint64_t kept = 0;  ///< Of these, those that wait for room without a thread.
    std::vector<FilesRequests> requests;
};
Json to_json(const FilesStatus& status);

class FilesHost {
  public:
    virtual ~FilesHost() = default;
    virtual FilesStatus files() const = 0;
    /// Takes the directory that a holder has mounted for us. kAlreadyExists: another one is
    /// mounted; kUnavailable: there is no holder; kBusy: it has another directory, or shows another
    /// store.
    virtual Result<FilesStatus> take_directory(std::string_view directory) = 0;
    /// kNotFound: none is mounted; kBusy, with the names: files are open.
    virtual Result<void> unmount() = 0;
};

}  // namespace stellarium::control
