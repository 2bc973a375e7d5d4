// Where things are: the default store, a store's runtime directory, the daemon's control socket.
//
//   store            --store, else $STELLARIUM_STORE, else /var/lib/stellarium for root and
//                    $XDG_DATA_HOME/stellarium or ~/.local/share/stellarium for others
//   runtime base     $STELLARIUM_RUNTIME_DIR, else /run/stellarium for root, else
//                    $XDG_RUNTIME_DIR/stellarium, else /run/user/UID/stellarium where that is, else
//                    /tmp/stellarium-UID
//   runtime          base + "/" + 16 hexadecimal digits of the BLAKE3 of the store's real path
//   control socket   runtime + "/control.sock"
//
// A running daemon also writes down where it is, in the store itself (daemon.json), so that clients
// find it whatever it was told on its command line. The record of a daemon that died stays until
// the next one; a client that finds nobody there opens the store itself.
//
// Thread rule: reads the environment; call before threads change it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

#include "base/error.h"
#include "io/io.h"

namespace stellarium::control {

/// A path of a unix socket has room for this many bytes.
inline constexpr size_t kMaxSocketPathBytes = 107;

/// kInvalidArgument when neither STELLARIUM_STORE nor HOME says where.
Result<std::string> default_store_directory();

/// The path without symbolic links, or made absolute when (part of) it does not exist.
std::string real_path(const std::string& path);

/// The path made absolute, without "." and "..", with the symbolic links that are in it.
std::string absolute_path(const std::string& path);

std::string default_runtime_directory(const std::string& store_directory);

/// mkdir -p with mode 0700.
Result<void> make_directories(const std::string& path);

/// Makes the directory and its parents where they are missing: mode 0700, or 0710 for `group`. What
/// is there already is never changed. kPermissionDenied when it belongs to somebody else, others
/// may write to it, `group` cannot enter it, or somebody other than root and us could have put it
/// there (an owner or a writable directory on the way, a symbolic link of somebody else): they
/// could put their own sockets in place of ours. kInvalidArgument for directories of the system.
/// With `owner`, for whom root makes it, that user takes the place of us; directories on the way
/// get mode 0711 and stay root's, and below what is that user's already nothing is made: call
/// again, as that user.
Result<void> make_private_directory(const std::string& path,
                                    std::optional<gid_t> group = std::nullopt,
                                    std::optional<uid_t> owner = std::nullopt);
/// The same without making anything: whether it could be made.
Result<void> check_private_directory(const std::string& path,
                                     std::optional<gid_t> group = std::nullopt,
                                     std::optional<uid_t> owner = std::nullopt);

struct DaemonRecord {
    int64_t pid = 0;
    std::string socket;
    std::string runtime_directory;
};
inline constexpr const char* kDaemonRecordName = "daemon.json";

/// nullopt when there is none, or none that can be understood.
std::optional<DaemonRecord> read_daemon_record(io::FileSystem& files,
                                               const std::string& store_directory);
Result<void> write_daemon_record(io::FileSystem& files, const std::string& store_directory,
                                 const DaemonRecord& record);
Result<void> remove_daemon_record(io::FileSystem& files, const std::string& store_directory);

/// Where a daemon of this store may have, or have had, its runtime directory; as below.
std::vector<std::string> runtime_directory_candidates(io::FileSystem& files,
                                                      const std::string& store_directory);
/// Where a daemon of this store may listen, the likeliest first, without repeats.
std::vector<std::string> control_socket_candidates(io::FileSystem& files,
                                                   const std::string& store_directory);

}  // namespace stellarium::control
