// A store's images, volumes and snapshots as files below a directory, through FUSE.
//
// The directory is mounted, and kept mounted, by a holder process (holder.h). A daemon adopts it:
// it attaches what is open, takes over the connection with the kernel, and has requests repeated
// that an earlier daemon had taken and not answered (Linux 6.9; a reason to say so where it
// cannot). docs/internals/files-over-restarts.md has the whole story.
//
//     STELLARIUM_ASSIGN(auto mount, Mount::adopt(pool, std::move(holder), options));
//     ...                                    // other frontends attach what they have to
//     STELLARIUM_TRY(mount->serve());
//     mount->stop();                         // unmounted, or files wait for the next daemon
//
// Thread rule: any thread, except serve() and stop().
// Durability: fsync(2) and the closing of the last file make durable what was written; see
// base/block_device.h.
// Errors: kBusy: the directory shows another store; kProtocol: holder and daemon do not fit.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <sys/types.h>

#include "base/error.h"
#include "frontend/fuse/holder_protocol.h"
#include "frontend/fuse/tree.h"
#include "nova/pool.h"

namespace stellarium::fuse {

enum class LogLevel : uint8_t { kInfo, kWarning, kError };

struct MountOptions {
    std::optional<gid_t> group;  ///< May read and write as the daemon's user may.
    std::function<void(LogLevel level, const std::string& message)> log;
    /// See FilesOptions.
    std::function<void(const std::string& source)> attached{};
    BootSource boots{};
};

enum class FileRequest : uint8_t { kOpen, kRead, kWrite, kFlush, kDiscard, kOther };
inline constexpr size_t kFileRequestKinds = 6;
/// "open", "read", "write", "flush", "discard", "other".
std::string_view file_request_name(FileRequest kind);

/// Of one kind, since the daemon took the directory.
struct FileRequestTotals {
    uint64_t requests = 0;
    uint64_t bytes = 0;   ///< Read or written.
    uint64_t errors = 0;  ///< Failed; a name that is not there is no failure.
};

struct MountStatus {
    std::string directory;
    int64_t holder_pid = 0;
    uint64_t open_files = 0;
    bool connected = false;  ///< false: it has been unmounted.
    bool resends = false;    ///< The kernel repeats what a dead daemon has not answered.
    bool adopted = false;    ///< The connection is that of an earlier daemon.
    uint64_t repeated = 0;   ///< Requests that the kernel repeated for us.
    uint64_t in_flight = 0;  ///< Requests taken and not yet answered.
    uint64_t kept = 0;       ///< Of these, those that wait for room without a thread.
    std::array<FileRequestTotals, kFileRequestKinds> totals{};
};

class Mount {
  public:
    /// Attaches what is open. Nothing is answered yet.
    static Result<std::unique_ptr<Mount>> adopt(nova::Pool& pool, HolderClient holder,
                                                MountOptions options);
    ~Mount();
    Mount(const Mount&) = delete;
    Mount& operator=(const Mount&) = delete;

    Result<void> serve();
    /// Files that were closed are not attached any more afterwards, as far as one can wait for it:
    /// close(2) returns before we hear of it. At most about a second.
    void settle();
    /// kBusy: files are open, or the directory is used otherwise. stop() is still to be called.
    Result<void> unmount();
    /// Unmounts, or leaves open files to the next daemon; flushes. Once.
    void stop();

    MountStatus status() const;
    /// What is open, as "volumes/vm-1"; at most so many.
    std::vector<std::string> open_names(size_t at_most) const;

    struct Impl;  ///< Private to mount.cc.

  private:
    explicit Mount(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace stellarium::fuse
