// The store's files, as the daemon shows them below its directory (docs/guides/files.md): where
// that is, and reading and writing them whole.
//
//     STELLARIUM_ASSIGN(const std::string directory, find_files("/srv/pool"));
//     STELLARIUM_ASSIGN(UniqueFd file, open_file(directory + "/volumes/vm-ram", O_RDWR));
//
// Thread rule: any thread.
// Errors: kUnavailable when nothing is mounted, those of the system, naming the file.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"

namespace stellarium::vm {

/// The directory on which the store in `store_directory` is mounted. `mount_info` is the text of
/// /proc/self/mountinfo. kUnavailable saying how to mount it.
Result<std::string> find_files(const std::string& store_directory, const std::string& mount_info);
/// The same of this system.
Result<std::string> find_files(const std::string& store_directory);

/// Opens a file whose name may be younger than what the kernel knows of its folder.
Result<UniqueFd> open_file(const std::string& path, int flags);
Result<uint64_t> size_of_file(int fd, const std::string& path);

Result<void> read_at(int fd, const std::string& path, uint64_t offset_bytes, MutableBytes into);
Result<void> write_at(int fd, const std::string& path, uint64_t offset_bytes, Bytes from);

/// Where reading stopped, of a file with damaged content.
struct Unreadable {
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
};
/// Reads all data of `fd` (as far as lseek() on `map_fd`, the same content, tells data from holes),
/// so that all of it is checked and in the page cache. Returns the bytes read; an I/O error sets
/// `bad` and is kCorrupt. `cancelled` is asked between reads.
Result<uint64_t> read_all_data(int fd, int map_fd, const std::string& path, Unreadable& bad,
                               const std::function<bool()>& cancelled);

}  // namespace stellarium::vm
