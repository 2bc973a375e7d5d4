// What only the real system has: processes, descriptors, file modes, failing devices.
#include "io/posix.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/test_support.h"

namespace stellarium::io {
namespace {

const auto kPage = static_cast<size_t>(::sysconf(_SC_PAGESIZE));

class PosixTest : public testing::Test {
  protected:
    PosixTest() {
        std::string name = (std::filesystem::temp_directory_path() / "stellarium-io-XXXXXX");
        if (::mkdtemp(name.data()) == nullptr) {
            std::perror("mkdtemp");
            std::abort();
        }
        root_ = name;
    }
    ~PosixTest() override { std::filesystem::remove_all(root_); }

    std::string path(std::string_view name) const { return fmt::format("{}/{}", root_, name); }

    std::string root_;
    PosixFileSystem files_;
};

TEST_F(PosixTest, FilesAndDirectoriesArePrivateAndCloseOnExec) {
    const auto file = files_.open(path("a"), OpenMode::kCreate).value();
    STELLARIUM_ASSERT_OK(files_.make_directory(path("d")));
    struct stat status{};
    ASSERT_EQ(::stat(path("a").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777U, 0600U);
    ASSERT_EQ(::stat(path("d").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777U, 0700U);
    EXPECT_NE(::fcntl(file->descriptor(), F_GETFD) & FD_CLOEXEC, 0);
    // io_uring would answer "would block" for a non-blocking regular file.
    EXPECT_EQ(::fcntl(file->descriptor(), F_GETFL) & O_NONBLOCK, 0);
}

TEST_F(PosixTest, FailedSyncPoisonsTheFile) {
    const auto file = files_.open(path("a"), OpenMode::kCreate).value();
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100, 1), 0));
    // A descriptor that cannot sync takes the place of the file's for one call.
    const int good = ::fcntl(file->descriptor(), F_DUPFD_CLOEXEC, 0);
    ASSERT_GE(good, 0);
    const int bad = ::open(path("a").c_str(), O_PATH | O_CLOEXEC);
    ASSERT_GE(bad, 0);
    ASSERT_EQ(::dup3(bad, file->descriptor(), O_CLOEXEC), file->descriptor());
    const auto sync = file->datasync();
    ASSERT_EQ(::dup3(good, file->descriptor(), O_CLOEXEC), file->descriptor());
    EXPECT_EQ(::close(good), 0);
    EXPECT_EQ(::close(bad), 0);

    STELLARIUM_EXPECT_FAILS(sync, ErrorCode::kIo);
    EXPECT_NE(sync.error().message().find(path("a")), std::string::npos);
    STELLARIUM_EXPECT_FAILS(file->datasync(), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->pwrite(filled(1, 1), 0), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->pwritev({}, 0, Caching::kKeep), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->truncate(0), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->punch_hole(0, 1), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->allocate(0, 1), ErrorCode::kIo);
    EXPECT_EQ(contents(*file), pattern(100, 1)) << "reading goes on";
}

TEST_F(PosixTest, AdoptsRegularFilesOnly) {
    const int regular = ::open(path("a").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_GE(regular, 0);
    auto file = adopt_descriptor(regular, "client's file");
    STELLARIUM_ASSERT_OK(file);
    EXPECT_EQ((*file)->path(), "client's file");
    STELLARIUM_EXPECT_OK(write_all(**file, pattern(100, 1), 0));
    file->reset();
    EXPECT_EQ(::fcntl(regular, F_GETFD), -1) << "closed with the File";

    std::array<int, 2> pipe{};
    ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
    STELLARIUM_EXPECT_FAILS(adopt_descriptor(pipe[0], "a pipe"), ErrorCode::kInvalidArgument);
    EXPECT_EQ(::fcntl(pipe[0], F_GETFD), -1) << "closed when refused";
    EXPECT_EQ(::close(pipe[1]), 0);
}

TEST_F(PosixTest, OpeningAFifoFailsInsteadOfWaiting) {
    ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
    STELLARIUM_EXPECT_FAILS(files_.open(path("fifo"), OpenMode::kReadOnly),
                            ErrorCode::kInvalidArgument);
}

TEST_F(PosixTest, LockOfAnotherProcessNamesItAndDiesWithIt) {
    std::array<int, 2> ready{};
    ASSERT_EQ(::pipe2(ready.data(), O_CLOEXEC), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
        const auto lock = files_.lock(path("lock"));
        const char result = lock ? 'y' : 'n';
        if (::write(ready[1], &result, 1) == 1) {
            while (true) {
                ::pause();
            }
        }
        ::_exit(1);
    }
    ASSERT_EQ(::close(ready[1]), 0);
    char locked = 0;
    ASSERT_EQ(::read(ready[0], &locked, 1), 1);
    EXPECT_EQ(locked, 'y');
    const auto refused = files_.lock(path("lock"));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    ASSERT_EQ(::close(ready[0]), 0);

    STELLARIUM_EXPECT_FAILS(refused, ErrorCode::kBusy);
    EXPECT_EQ(refused.error().message(),
              fmt::format("{} is held by process {}", path("lock"), child));
    STELLARIUM_EXPECT_OK(files_.lock(path("lock")));
}

TEST_F(PosixTest, KnowsFileSystemsByTheirMagic) {
    struct Case {
        uint32_t magic;
        FileSystemKind kind;
        std::string_view name;
    };
    for (const Case& known : {Case{0xEF53, FileSystemKind::kLocal, "ext4"},
                              Case{0x58465342, FileSystemKind::kLocal, "xfs"},
                              Case{0x9123683E, FileSystemKind::kLocal, "btrfs"},
                              Case{0x2FC12FC1, FileSystemKind::kLocal, "zfs"},
                              Case{0x01021994, FileSystemKind::kMemory, "tmpfs"},
                              Case{0x6969, FileSystemKind::kNetwork, "nfs"},
                              Case{0xFF534D42, FileSystemKind::kNetwork, "cifs"},
                              Case{0x794C7630, FileSystemKind::kOverlay, "overlayfs"},
                              Case{0x65735546, FileSystemKind::kUnknown, "fuse"},
                              Case{0x1234, FileSystemKind::kUnknown, "0x1234"}}) {
        const FileSystemType type = file_system_type_of_magic(known.magic);
        EXPECT_EQ(type.kind, known.kind) << known.name;
        EXPECT_EQ(type.name, known.name);
    }
}

TEST_F(PosixTest, SharedMemoryDirectoryIsAMemoryFileSystem) {
    if (!std::filesystem::exists("/dev/shm")) {
        GTEST_SKIP() << "no /dev/shm here";
    }
    const auto type = files_.type("/dev/shm");
    STELLARIUM_ASSERT_OK(type);
    EXPECT_EQ(type->kind, FileSystemKind::kMemory) << type->name;
}

TEST_F(PosixTest, MappedBytesThatCannotBeReadAreAnError) {
    const auto file = files_.open(path("a"), OpenMode::kCreate).value();
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(4 * kPage, 1), 0));
    const auto map = file->map(0, 4 * kPage).value();
    STELLARIUM_EXPECT_OK(fetch_mapped(map->bytes(), file->path()));
    // As a sector that cannot be read: an access to the last page would be a SIGBUS.
    STELLARIUM_ASSERT_OK(file->truncate(3 * kPage));
    const auto fetched = fetch_mapped(map->bytes(), file->path());
    if (::madvise(nullptr, 0, MADV_POPULATE_READ) != 0) {
        STELLARIUM_EXPECT_OK(fetched);  // Before Linux 5.14.
        return;
    }
    STELLARIUM_EXPECT_FAILS(fetched, ErrorCode::kIo);
    EXPECT_NE(fetched.error().message().find(path("a")), std::string::npos);
    STELLARIUM_EXPECT_OK(fetch_mapped(map->bytes().first(3 * kPage), file->path()));
}

TEST_F(PosixTest, StreamedWritesLeaveThePageCache) {
    constexpr size_t kBytes = 1 << 20;
    const auto file = files_.open(path("a"), OpenMode::kCreate).value();
    std::vector<std::byte> bytes = pattern(kBytes, 1);
    const iovec all{.iov_base = bytes.data(), .iov_len = bytes.size()};
    constexpr int kDontCache = 0x80;  // Linux 6.14, and then it is up to the file system.
    if (::pwritev2(file->descriptor(), &all, 1, 0, kDontCache) < 0) {
        ASSERT_EQ(errno, EOPNOTSUPP);
        // They stay there then, and are written all the same.
        STELLARIUM_ASSERT_OK(write_all(*file, {all}, kBytes, Caching::kStream));
        std::vector<std::byte> read(kBytes);
        STELLARIUM_ASSERT_OK(read_exact(*file, read, kBytes));
        EXPECT_EQ(read, bytes);
        return;
    }
    STELLARIUM_ASSERT_OK(write_all(*file, {all}, kBytes, Caching::kStream));
    STELLARIUM_ASSERT_OK(write_all(*file, {all}, 2 * kBytes, Caching::kKeep));
    STELLARIUM_ASSERT_OK(file->datasync());
    const auto map = file->map(0, 3 * kBytes);  // Reads all of it.
    STELLARIUM_ASSERT_OK(map);
    EXPECT_EQ(std::memcmp((*map)->bytes().data() + kBytes, bytes.data(), kBytes), 0);
    STELLARIUM_ASSERT_OK(write_all(*file, {all}, 3 * kBytes, Caching::kStream));
    STELLARIUM_ASSERT_OK(file->datasync());
    const auto resident = [&](size_t offset) {
        void* const mapped = ::mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, file->descriptor(),
                                    static_cast<off_t>(offset));
        std::vector<unsigned char> pages(kBytes / kPage);
        EXPECT_EQ(::mincore(mapped, kBytes, pages.data()), 0);
        ::munmap(mapped, kBytes);
        return std::ranges::count_if(pages, [](unsigned char page) { return (page & 1U) != 0; });
    };
    EXPECT_GT(resident(2 * kBytes), 0);
    // The kernel drops them when they are written, a moment after the sync has seen that.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (resident(3 * kBytes) > 0 && std::chrono::steady_clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(resident(3 * kBytes), 0);
}

TEST_F(PosixTest, MappedMemoryOutlivesTheFileOnlyForReadMaps) {
    auto file = files_.open(path("a"), OpenMode::kCreate).value();
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(8'192, 1), 0));
    const auto map = file->map(0, 8'192).value();
    file.reset();
    EXPECT_EQ(std::vector<std::byte>(map->bytes().begin(), map->bytes().end()), pattern(8'192, 1));
}

}  // namespace
}  // namespace stellarium::io
