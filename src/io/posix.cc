#include "io/posix.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "io/failure.h"

namespace stellarium::io {
namespace {

// fallocate and writes take signed offsets; a larger value turns negative and the kernel says
// EINVAL, which is the answer that it deserves.
off_t to_off(uint64_t bytes) {
    return static_cast<off_t>(bytes);
}

std::unexpected<Error> failed_at(int errno_value, std::string_view operation, std::string_view path,
                                 uint64_t offset_bytes) {
    return std::unexpected(Error::from_errno(
        errno_value, fmt::format("{} {} at offset {}", operation, path, offset_bytes)));
}

/// Repeats a system call that returns -1 and EINTR.
template <typename Call>
auto retry_interrupted(Call&& call) {
    while (true) {
        const auto result = call();
        if (result != -1 || errno != EINTR) {
            return result;
        }
    }
}

/// Owns a descriptor. close() is called once: on Linux the descriptor is gone even when close
/// reports EINTR or EIO, and no durability hangs on it (datasync is what promises that).
class Descriptor {
  public:
    explicit Descriptor(int value) : value_(value) {}
    Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
    Descriptor& operator=(Descriptor&&) = delete;
    ~Descriptor() {
        if (value_ >= 0) {
            [[maybe_unused]] const int result = ::close(value_);
            assert(result == 0 || errno != EBADF);
        }
    }
    int get() const { return value_; }
    bool valid() const { return value_ >= 0; }

  private:
    int value_;
};

/// A range of mapped memory, unmapped when destroyed.
class Mapping {
  public:
    Mapping(void* data, size_t size) : data_(data), size_(size) {}
    Mapping(Mapping&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Mapping& operator=(Mapping&&) = delete;
    ~Mapping() {
        if (data_ != nullptr) {
            [[maybe_unused]] const int result = ::munmap(data_, size_);
            assert(result == 0);
        }
    }
    MutableBytes bytes() const { return {static_cast<std::byte*>(data_), size_}; }

  private:
    void* data_;
    size_t size_;
};

class PosixMappedBytes final : public MappedBytes {
  public:
    PosixMappedBytes(Mapping mapping, std::string path)
        : mapping_(std::move(mapping)), path_(std::move(path)) {}
    Bytes bytes() const override { return mapping_.bytes(); }
    Result<void> fetch(uint64_t offset_bytes, uint64_t length_bytes) const override {
        return fetch_mapped(bytes().subspan(offset_bytes, length_bytes), path_);
    }

  private:
    Mapping mapping_;
    std::string path_;
};

/// 0, or the system's error; EAGAIN when another open file holds a lock.
int lock_whole_file(int descriptor, short type = F_WRLCK) {
    struct flock whole_file{};
    whole_file.l_type = type;
    whole_file.l_whence = SEEK_SET;
    if (retry_interrupted([&] { return ::fcntl(descriptor, F_OFD_SETLK, &whole_file); }) == 0) {
        return 0;
    }
    return errno == EACCES ? EAGAIN : errno;
}

constexpr int kDontCache = 0x80;  // RWF_DONTCACHE, Linux 6.14, include/uapi/linux/fs.h.

class PosixFile final : public File {
  public:
    PosixFile(Descriptor descriptor, std::string path)
        : descriptor_(std::move(descriptor)), path_(std::move(path)) {}

    const std::string& path() const override { return path_; }

    Result<size_t> pread(MutableBytes into, uint64_t offset_bytes) override {
        const ssize_t got =
            ::pread(descriptor_.get(), into.data(), into.size(), to_off(offset_bytes));
        if (got < 0) {
            return failed_at(errno, "read", path_, offset_bytes);
        }
        return static_cast<size_t>(got);
    }

    Result<size_t> preadv(std::span<const iovec> into, uint64_t offset_bytes,
                          IoMode mode) override {
        const int count = static_cast<int>(std::min<size_t>(into.size(), IOV_MAX));
        const auto read = [&](int flags) {
            return ::preadv2(descriptor_.get(), into.data(), count, to_off(offset_bytes), flags);
        };
        const bool once = mode == IoMode::kMayBlockOnce && streams_.load(std::memory_order_relaxed);
        ssize_t got = read(once ? kDontCache : mode == IoMode::kNoWait ? RWF_NOWAIT : 0);
        if (got < 0 && once && errno == EOPNOTSUPP) {
            streams_.store(false, std::memory_order_relaxed);  // This kernel or file system cannot.
            got = read(0);
        }
        if (got < 0) {
            // A file system that cannot promise not to wait is asked again by a thread that may.
            const int error = errno == EOPNOTSUPP && mode == IoMode::kNoWait ? EAGAIN : errno;
            return failed_at(error, "read", path_, offset_bytes);
        }
        return static_cast<size_t>(got);
    }

    Result<size_t> pwrite(Bytes from, uint64_t offset_bytes) override {
        STELLARIUM_TRY(check_not_poisoned("write"));
        const ssize_t put =
            ::pwrite(descriptor_.get(), from.data(), from.size(), to_off(offset_bytes));
        if (put < 0) {
            return failed_at(errno, "write", path_, offset_bytes);
        }
        return static_cast<size_t>(put);
    }

    Result<size_t> pwritev(std::span<const iovec> from, uint64_t offset_bytes,
                           Caching caching) override {
        STELLARIUM_TRY(check_not_poisoned("write"));
        const int count = static_cast<int>(std::min<size_t>(from.size(), IOV_MAX));
        const auto write = [&](int flags) {
            return ::pwritev2(descriptor_.get(), from.data(), count, to_off(offset_bytes), flags);
        };
        bool streams = caching == Caching::kStream && streams_.load(std::memory_order_relaxed);
        ssize_t put = write(streams ? kDontCache : 0);
        if (put < 0 && streams && errno == EOPNOTSUPP) {
            streams = false;  // This kernel or file system cannot.
            streams_.store(false, std::memory_order_relaxed);
            put = write(0);
        }
        if (put < 0) {
            return failed_at(errno, "write", path_, offset_bytes);
        }
        if (caching == Caching::kStream && !streams) {
            // It stays in memory, but is on its way. With this one flag the call collects no errors
            // of writing: datasync still sees them.
            static_cast<void>(::sync_file_range(descriptor_.get(), to_off(offset_bytes), put,
                                                SYNC_FILE_RANGE_WRITE));
        }
        return static_cast<size_t>(put);
    }

    Result<void> datasync() override {
        STELLARIUM_TRY(check_not_poisoned("sync"));
        if (retry_interrupted([&] { return ::fdatasync(descriptor_.get()); }) != 0) {
            const int error = errno;
            poisoned_.store(true);
            // Whatever the number was, the promise is broken: callers decide by one code.
            return fail(ErrorCode::kIo,
                        Error::from_errno(error, fmt::format("sync {}", path_)).message() +
                            "; written data may be lost, so this file takes no more writes");
        }
        // Another thread's sync may have failed while this one ran, and taken the error with it.
        return check_not_poisoned("sync");
    }

    Result<uint64_t> size_bytes() override {
        struct stat status{};
        if (::fstat(descriptor_.get(), &status) != 0) {
            return failed(errno, "stat", path_);
        }
        if (S_ISBLK(status.st_mode)) {
            const off_t end = ::lseek(descriptor_.get(), 0, SEEK_END);
            if (end < 0) {
                return failed(errno, "seek to the end of", path_);
            }
            return static_cast<uint64_t>(end);
        }
        return static_cast<uint64_t>(status.st_size);
    }

    Result<void> truncate(uint64_t size_bytes) override {
        STELLARIUM_TRY(check_not_poisoned("truncate"));
        if (retry_interrupted([&] { return ::ftruncate(descriptor_.get(), to_off(size_bytes)); }) !=
            0) {
            return failed(errno, fmt::format("set the size to {} of", size_bytes), path_);
        }
        return {};
    }

    Result<void> punch_hole(uint64_t offset_bytes, uint64_t length_bytes) override {
        return change_allocation("punch a hole in", FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                 offset_bytes, length_bytes);
    }

    Result<void> allocate(uint64_t offset_bytes, uint64_t length_bytes) override {
        return change_allocation("allocate", FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes);
    }

    Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(uint64_t offset_bytes) override {
        using Extent = std::optional<std::pair<uint64_t, uint64_t>>;
        const off_t data = ::lseek(descriptor_.get(), to_off(offset_bytes), SEEK_DATA);
        if (data < 0 && errno == ENXIO) {
            return Extent();
        }
        const off_t hole = data < 0 ? -1 : ::lseek(descriptor_.get(), data, SEEK_HOLE);
        if (data < 0 || hole < 0) {
            const int error = errno;
            if (data >= 0 && error == ENXIO) {
                return Extent();  // Truncated by somebody between the two calls.
            }
            if (error != EINVAL && error != EOPNOTSUPP && error != ENOSYS) {
                return failed_at(error, "seek to data in", path_, offset_bytes);
            }
            // No hole tracking here: everything is data.
            STELLARIUM_ASSIGN(const uint64_t size, size_bytes());
            if (offset_bytes >= size) {
                return Extent();
            }
            return Extent(std::pair(offset_bytes, size - offset_bytes));
        }
        return Extent(std::pair(static_cast<uint64_t>(data), static_cast<uint64_t>(hole - data)));
    }

    // The two hints: their failure changes nothing that anybody was promised.
    void drop_cache(uint64_t offset_bytes, uint64_t length_bytes) override {
        static_cast<void>(::posix_fadvise(descriptor_.get(), to_off(offset_bytes),
                                          to_off(length_bytes), POSIX_FADV_DONTNEED));
    }
    void read_ahead(uint64_t offset_bytes, uint64_t length_bytes) override {
        static_cast<void>(::posix_fadvise(descriptor_.get(), to_off(offset_bytes),
                                          to_off(length_bytes), POSIX_FADV_WILLNEED));
    }

    Result<std::unique_ptr<MappedBytes>> map(uint64_t offset_bytes,
                                             uint64_t length_bytes) override {
        STELLARIUM_ASSIGN(Mapping mapping, map_range(PROT_READ, offset_bytes, length_bytes));
        if (length_bytes <= kMaxFetchedBytes) {
            STELLARIUM_TRY(fetch_mapped(mapping.bytes(), path_));
        }
        return std::make_unique<PosixMappedBytes>(std::move(mapping), path_);
    }

    Result<MutableBytes> map_shared(uint64_t offset_bytes, uint64_t length_bytes) override {
        STELLARIUM_TRY(check_not_poisoned("map"));
        STELLARIUM_ASSIGN(Mapping mapping,
                          map_range(PROT_READ | PROT_WRITE, offset_bytes, length_bytes));
        const MutableBytes bytes = mapping.bytes();
        const std::lock_guard guard(mappings_mutex_);
        shared_mappings_.push_back(std::move(mapping));
        return bytes;
    }

    Result<FileIdentity> identity() override {
        struct stat status{};
        if (::fstat(descriptor_.get(), &status) != 0) {
            return failed(errno, "stat", path_);
        }
        return FileIdentity{.device = status.st_dev, .inode = status.st_ino};
    }

    Result<void> lock() override { return lock_as(F_WRLCK); }
    Result<void> lock_shared() override { return lock_as(F_RDLCK); }

    int descriptor() const override { return descriptor_.get(); }

  private:
    Result<void> lock_as(short type) {
        const int error = lock_whole_file(descriptor_.get(), type);
        if (error == EAGAIN) {
            return fail(ErrorCode::kBusy, fmt::format("{} is in use", path_));
        }
        return error == 0 ? Result<void>() : failed(error, "lock", path_);
    }

    Result<void> check_not_poisoned(std::string_view operation) const {
        if (poisoned_.load()) {
            return fail(ErrorCode::kIo,
                        fmt::format("{} {}: refused because an earlier sync of this file failed "
                                    "and written data may be lost",
                                    operation, path_));
        }
        return {};
    }

    Result<void> change_allocation(std::string_view operation, int mode, uint64_t offset_bytes,
                                   uint64_t length_bytes) {
        STELLARIUM_TRY(check_not_poisoned(operation));
        if (length_bytes == 0) {
            return {};
        }
        if (retry_interrupted([&] {
                return ::fallocate(descriptor_.get(), mode, to_off(offset_bytes),
                                   to_off(length_bytes));
            }) != 0) {
            return failed_at(errno, operation, path_, offset_bytes);
        }
        return {};
    }

    Result<Mapping> map_range(int protection, uint64_t offset_bytes, uint64_t length_bytes) {
        if (length_bytes == 0) {
            return Mapping(nullptr, 0);
        }
        STELLARIUM_ASSIGN(const uint64_t size, size_bytes());
        if (offset_bytes > size || length_bytes > size - offset_bytes) {
            // Memory past the end of a file can be mapped but not touched (SIGBUS).
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("map {}: {} bytes at offset {} reach past the end at {}", path_,
                                    length_bytes, offset_bytes, size));
        }
        void* data = ::mmap(nullptr, length_bytes, protection, MAP_SHARED, descriptor_.get(),
                            to_off(offset_bytes));
        if (data == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr)
            return failed_at(errno, "map", path_, offset_bytes);
        }
        return Mapping(data, length_bytes);
    }

    const Descriptor descriptor_;
    const std::string path_;
    std::atomic<bool> poisoned_{false};
    std::atomic<bool> streams_{true};  ///< RWF_DONTCACHE has not been refused.
    std::mutex mappings_mutex_;
    std::vector<Mapping> shared_mappings_;
};

Result<std::unique_ptr<File>> make_file(Descriptor descriptor, std::string path) {
    struct stat status{};
    if (::fstat(descriptor.get(), &status) != 0) {
        return failed(errno, "stat", path);
    }
    if (S_ISDIR(status.st_mode)) {
        return failed(EISDIR, "open", path);
    }
    if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("open {}: neither a regular file nor a block device", path));
    }
    return std::make_unique<PosixFile>(std::move(descriptor), std::move(path));
}

class PosixFileLock final : public FileLock {
  public:
    explicit PosixFileLock(Descriptor descriptor) : descriptor_(std::move(descriptor)) {}
    ~PosixFileLock() override {
        // An empty file never names a process that has let go. A failure leaves a stale pid that is
        // only ever read while somebody else holds the lock and is about to replace it.
        static_cast<void>(::ftruncate(descriptor_.get(), 0) == 0);
    }
    PosixFileLock(const PosixFileLock&) = delete;
    PosixFileLock& operator=(const PosixFileLock&) = delete;

  private:
    Descriptor descriptor_;
};

/// "held by process 1234", or by whom we cannot say.
std::string holder_of(int descriptor) {
    std::array<char, 24> text{};
    const ssize_t got = ::pread(descriptor, text.data(), text.size(), 0);
    std::string_view digits(text.data(), got > 0 ? static_cast<size_t>(got) : 0);
    digits = digits.substr(0, digits.find_first_not_of("0123456789"));
    if (digits.empty()) {
        return "held by another process";
    }
    return fmt::format("held by process {}", digits);
}

struct KnownFileSystem {
    uint32_t magic;
    FileSystemKind kind;
    std::string_view name;
};

// Numbers from statfs(2) and the kernel's uapi/linux/magic.h. FUSE may be anything behind it.
constexpr auto kKnownFileSystems = std::to_array<KnownFileSystem>({
    {0x0000EF53, FileSystemKind::kLocal, "ext4"},
    {0x58465342, FileSystemKind::kLocal, "xfs"},
    {0x9123683E, FileSystemKind::kLocal, "btrfs"},
    {0x2FC12FC1, FileSystemKind::kLocal, "zfs"},
    {0xF2F52010, FileSystemKind::kLocal, "f2fs"},
    {0xCA451A4E, FileSystemKind::kLocal, "bcachefs"},
    {0x52654973, FileSystemKind::kLocal, "reiserfs"},
    {0x3153464A, FileSystemKind::kLocal, "jfs"},
    {0x00004D44, FileSystemKind::kLocal, "vfat"},
    {0x2011BAB0, FileSystemKind::kLocal, "exfat"},
    {0x7366746E, FileSystemKind::kLocal, "ntfs3"},
    {0xE0F5E1E2, FileSystemKind::kLocal, "erofs"},
    {0x73717368, FileSystemKind::kLocal, "squashfs"},
    {0x01021994, FileSystemKind::kMemory, "tmpfs"},
    {0x858458F6, FileSystemKind::kMemory, "ramfs"},
    {0x958458F6, FileSystemKind::kMemory, "hugetlbfs"},
    {0x00006969, FileSystemKind::kNetwork, "nfs"},
    {0xFF534D42, FileSystemKind::kNetwork, "cifs"},
    {0xFE534D42, FileSystemKind::kNetwork, "smb2"},
    {0x0000517B, FileSystemKind::kNetwork, "smb"},
    {0x00C36400, FileSystemKind::kNetwork, "ceph"},
    {0x01021997, FileSystemKind::kNetwork, "9p"},
    {0x5346414F, FileSystemKind::kNetwork, "afs"},
    {0x01161970, FileSystemKind::kNetwork, "gfs2"},
    {0x7461636F, FileSystemKind::kNetwork, "ocfs2"},
    {0x0BD00BD0, FileSystemKind::kNetwork, "lustre"},
    {0x47504653, FileSystemKind::kNetwork, "gpfs"},
    {0x794C7630, FileSystemKind::kOverlay, "overlayfs"},
    {0x0000F15F, FileSystemKind::kOverlay, "ecryptfs"},
    {0x65735546, FileSystemKind::kUnknown, "fuse"},
});

int open_flags(OpenMode mode) {
    switch (mode) {
        case OpenMode::kReadOnly:
            return O_RDONLY;
        case OpenMode::kReadWrite:
            return O_RDWR;
        case OpenMode::kCreateNew:
            return O_RDWR | O_CREAT | O_EXCL;
        case OpenMode::kCreate:
            return O_RDWR | O_CREAT;
    }
    std::abort();
}

Descriptor open_descriptor(const std::string& path, int flags) {
    constexpr mode_t kFileMode = 0600;
    return Descriptor(
        retry_interrupted([&] { return ::open(path.c_str(), flags | O_CLOEXEC, kFileMode); }));
}

}  // namespace

FileSystemType file_system_type_of_magic(uint32_t magic) {
    const auto* known = std::ranges::find(kKnownFileSystems, magic, &KnownFileSystem::magic);
    if (known == kKnownFileSystems.end()) {
        return {FileSystemKind::kUnknown, fmt::format("{:#x}", magic)};
    }
    return {known->kind, std::string(known->name)};
}

Result<void> fetch_mapped(Bytes mapped, std::string_view path) {
    if (mapped.empty()) {
        return {};
    }
    // Mappings begin at a page; the range may not. The system call takes no const, and does not
    // write.
    const size_t before =
        reinterpret_cast<uintptr_t>(mapped.data()) % static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    auto* const start = const_cast<std::byte*>(mapped.data()) - before;
    const int fetched = retry_interrupted(
        [&] { return ::madvise(start, mapped.size() + before, MADV_POPULATE_READ); });
    if (fetched != 0 && (errno == EFAULT || errno == EHWPOISON)) {
        return fail(ErrorCode::kIo,
                    fmt::format("map {}: not all of {} mapped bytes can be read: check the disk "
                                "and the kernel log",
                                path, mapped.size()));
    }
    // Anything else says that the system does not do this, or not now: reading on demand will.
    return {};
}

Result<std::unique_ptr<File>> adopt_descriptor(int descriptor, std::string name) {
    return make_file(Descriptor(descriptor), std::move(name));
}

Result<std::unique_ptr<File>> PosixFileSystem::open(const std::string& path, OpenMode mode) {
    // A FIFO would make open() wait for its other end; without waiting it is refused below.
    Descriptor descriptor = open_descriptor(path, open_flags(mode) | O_NONBLOCK | O_NOCTTY);
    if (!descriptor.valid()) {
        return failed(errno, "open", path);
    }
    // Left on, the flag would make io_uring answer "would block" for regular files.
    if (::fcntl(descriptor.get(), F_SETFL, 0) != 0) {
        return failed(errno, "open", path);
    }
    return make_file(std::move(descriptor), path);
}

Result<void> PosixFileSystem::make_directory(const std::string& path) {
    constexpr mode_t kDirectoryMode = 0700;
    if (::mkdir(path.c_str(), kDirectoryMode) != 0) {
        return failed(errno, "create directory", path);
    }
    return {};
}

Result<void> PosixFileSystem::rename(const std::string& from, const std::string& to) {
    if (::rename(from.c_str(), to.c_str()) != 0) {
        return failed(errno, fmt::format("rename {} to", from), to);
    }
    return {};
}

Result<void> PosixFileSystem::remove(const std::string& path) {
    if (::unlink(path.c_str()) == 0 || (errno == EISDIR && ::rmdir(path.c_str()) == 0)) {
        return {};
    }
    return failed(errno, "remove", path);
}

Result<std::vector<DirectoryEntry>> PosixFileSystem::list(const std::string& directory) {
    const std::unique_ptr<DIR, int (*)(DIR*)> stream(::opendir(directory.c_str()), &::closedir);
    if (!stream) {
        return failed(errno, "list", directory);
    }
    std::vector<DirectoryEntry> entries;
    while (true) {
        errno = 0;
        // readdir is safe here: this stream belongs to this call alone.
        const dirent* entry = ::readdir(stream.get());  // NOLINT(concurrency-mt-unsafe)
        if (entry == nullptr) {
            if (errno != 0) {
                return failed(errno, "list", directory);
            }
            break;
        }
        const std::string_view name(&entry->d_name[0]);
        if (name == "." || name == "..") {
            continue;
        }
        bool is_directory = entry->d_type == DT_DIR;
        if (entry->d_type == DT_UNKNOWN) {
            struct stat status{};
            if (::fstatat(::dirfd(stream.get()), &entry->d_name[0], &status, AT_SYMLINK_NOFOLLOW) !=
                0) {
                if (errno == ENOENT) {
                    continue;  // Removed since it was read.
                }
                return failed(errno, "stat", fmt::format("{}/{}", directory, name));
            }
            is_directory = S_ISDIR(status.st_mode);
        }
        entries.push_back({std::string(name), is_directory});
    }
    std::ranges::sort(entries, {}, &DirectoryEntry::name);
    return entries;
}

Result<bool> PosixFileSystem::exists(const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0) {
        return true;
    }
    if (errno == ENOENT || errno == ENOTDIR) {
        return false;
    }
    return failed(errno, "stat", path);
}

Result<void> PosixFileSystem::sync_directory(const std::string& directory) {
    const Descriptor descriptor = open_descriptor(directory, O_RDONLY | O_DIRECTORY);
    if (!descriptor.valid()) {
        return failed(errno, "open directory", directory);
    }
    if (retry_interrupted([&] { return ::fsync(descriptor.get()); }) != 0) {
        return failed(errno, "sync directory", directory);
    }
    return {};
}

Result<FileSystemSpace> PosixFileSystem::space(const std::string& path) {
    struct statvfs status{};
    if (retry_interrupted([&] { return ::statvfs(path.c_str(), &status); }) != 0) {
        return failed(errno, "ask for the free space of", path);
    }
    return FileSystemSpace{.total_bytes = uint64_t{status.f_blocks} * status.f_frsize,
                           .free_bytes = uint64_t{status.f_bavail} * status.f_frsize};
}

Result<FileSystemType> PosixFileSystem::type(const std::string& path) {
    struct statfs status{};
    if (retry_interrupted([&] { return ::statfs(path.c_str(), &status); }) != 0) {
        return failed(errno, "ask for the file system type of", path);
    }
    return file_system_type_of_magic(static_cast<uint32_t>(status.f_type));
}

Result<std::unique_ptr<FileLock>> PosixFileSystem::lock(const std::string& path) {
    Descriptor descriptor = open_descriptor(path, O_RDWR | O_CREAT);
    if (!descriptor.valid()) {
        return failed(errno, "open lock file", path);
    }
    if (const int error = lock_whole_file(descriptor.get()); error == EAGAIN) {
        return fail(ErrorCode::kBusy, fmt::format("{} is {}", path, holder_of(descriptor.get())));
    } else if (error != 0) {
        return failed(error, "lock", path);
    }
    const std::string pid = fmt::format("{}\n", ::getpid());
    // Over the last holder's, whose place a full disk has. Where there is none the lock holds all
    // the same, and names nobody.
    const ssize_t written =
        retry_interrupted([&] { return ::pwrite(descriptor.get(), pid.data(), pid.size(), 0); });
    if (retry_interrupted(
            [&] { return ::ftruncate(descriptor.get(), std::max<ssize_t>(written, 0)); }) != 0) {
        return failed(errno, "write the process id into", path);
    }
    return std::make_unique<PosixFileLock>(std::move(descriptor));
}

std::chrono::nanoseconds PosixClock::monotonic() {
    return std::chrono::steady_clock::now().time_since_epoch();
}

std::chrono::nanoseconds PosixClock::wall() {
    return std::chrono::system_clock::now().time_since_epoch();
}

void PosixRandom::fill(MutableBytes into) {
    while (!into.empty()) {
        const ssize_t got =
            retry_interrupted([&] { return ::getrandom(into.data(), into.size(), 0); });
        if (got <= 0) {
            std::perror("stellarium: getrandom");
            std::abort();
        }
        into = into.subspan(static_cast<size_t>(got));
    }
}

Env real_env() {
    static PosixFileSystem files;
    static PosixClock clock;
    static PosixRandom random;
    return {.files = &files, .clock = &clock, .random = &random};
}

}  // namespace stellarium::io
