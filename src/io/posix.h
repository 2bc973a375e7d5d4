// The seam on Linux: files by system calls, the system's clocks and random source.
//
// Components take an io::Env and never name these types; only composition code (cli, daemon) and
// tests do. Files are opened close-on-exec, created with mode 0600; directories with mode 0700.
//
// Interruptions: pread, preadv, pwrite and pwritev surface EINTR as kInterrupted (io.h's loops
// retry); every other call retries by itself.
// Durability: datasync is fdatasync. When it fails, the kernel may already have dropped the dirty
// pages and will report success next time; so the File is poisoned, and pwrite, pwritev, truncate,
// punch_hole, allocate and datasync on it fail with kIo from then on.
// Locks: an open-file-description lock. It belongs to the lock object, not to the process, so a
// second lock() in the same process is refused too; the kernel drops it when the process dies. The
// holder's pid is the file's text.
//
//     io::Env env = io::real_env();
//     auto file = env.files->open("/var/lib/stellarium/segments/00000001", io::OpenMode::kCreate);
//
// Thread rule: as io.h.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "io/io.h"

namespace stellarium::io {

/// Wraps a descriptor that somebody else opened (a client that sent it over a socket): takes
/// ownership and closes it with the File. `name` is what messages call it.
/// Errors: kInvalidArgument for anything but a regular file or block device; the descriptor is
/// closed then too.
Result<std::unique_ptr<File>> adopt_descriptor(int descriptor, std::string name);

/// Has mapped bytes of the file `path` read now, so that what cannot be read is an error (kIo) and
/// not the end of the process at the first access (SIGBUS). File::map() calls it for up to
/// kMaxFetchedBytes; of larger mappings MappedBytes::fetch() does for a range. Does nothing before
/// Linux 5.14.
Result<void> fetch_mapped(Bytes mapped, std::string_view path);
inline constexpr uint64_t kMaxFetchedBytes = uint64_t{16} << 20;

class PosixFileSystem final : public FileSystem {
  public:
    Result<std::unique_ptr<File>> open(const std::string& path, OpenMode mode) override;
    Result<void> make_directory(const std::string& path) override;
    Result<void> rename(const std::string& from, const std::string& to) override;
    /// A file or an empty directory.
    Result<void> remove(const std::string& path) override;
    /// Sorted by name.
    Result<std::vector<DirectoryEntry>> list(const std::string& directory) override;
    Result<bool> exists(const std::string& path) override;
    Result<void> sync_directory(const std::string& directory) override;
    Result<FileSystemSpace> space(const std::string& path) override;
    Result<FileSystemType> type(const std::string& path) override;
    Result<std::unique_ptr<FileLock>> lock(const std::string& path) override;
};

class PosixClock final : public Clock {
  public:
    std::chrono::nanoseconds monotonic() override;
    std::chrono::nanoseconds wall() override;
};

/// The kernel's random source. Fails never: stops the process when the kernel has none.
class PosixRandom final : public Random {
  public:
    void fill(MutableBytes into) override;
};

/// What a statfs(2) magic number means; unknown ones are kUnknown, named "0x1234".
FileSystemType file_system_type_of_magic(uint32_t magic);

}  // namespace stellarium::io
