#include "daemon/sandbox.h"

#include <array>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

namespace stellarium::daemon {
namespace {

/// Ends the process that confined itself, naming the line, unless `condition` holds.
#define CONFINED_EXPECT(condition)                                                             \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            ::dprintf(STDERR_FILENO, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, \
                      errno);                                                                  \
            ::_exit(1);                                                                        \
        }                                                                                      \
    } while (false)

/// Runs `body` in a process of its own, for a sandbox cannot be left; how it ended, as waitpid
/// says.
int status_of(const std::function<void()>& body) {
    const pid_t child = ::fork();
    if (child == 0) {
        body();
        ::_exit(0);
    }
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    return status;
}

template <typename Call>
bool fails_with(int error, Call call) {
    errno = 0;
    const auto result = call();
    return result == -1 && errno == error;
}

class SandboxTest : public testing::Test {
  protected:
    void SetUp() override {
        std::string pattern = "/tmp/stl-box-XXXXXX";
        ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
        base_ = pattern;
        for (const char* const folder : {"/store", "/run", "/elsewhere"}) {
            ASSERT_EQ(::mkdir((base_ + folder).c_str(), 0700), 0);
        }
        std::ofstream(base_ + "/store/segment") << "content";
        std::ofstream(base_ + "/elsewhere/secret") << "secret";
        if (!kInstrumented) {
            const int status = status_of([&] {
                const auto files = confine_files(SandboxMode::kAuto, reachable());
                CONFINED_EXPECT(files.has_value());
                ::_exit(files->detail.starts_with("off") ? 2 : 0);
            });
            if (status != 0) {
                GTEST_SKIP() << "this kernel has no Landlock";
            }
        }
    }
    void TearDown() override { std::filesystem::remove_all(base_); }

    ReachableFiles reachable() const {
        return {.store = base_ + "/store",
                .runtime = base_ + "/run",
                .socket = {},
                .nbd_socket = {},
                .tcp_port = {}};
    }
    void confine(SandboxMode mode) const {
        CONFINED_EXPECT(confine_files(mode, reachable()).has_value());
        CONFINED_EXPECT(confine_calls(mode).has_value());
    }
    int bind_socket(const std::string& path) const {
        const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        path.copy(address.sun_path, sizeof address.sun_path - 1);
        return ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address);
    }

    std::string base_;
};

TEST(SandboxMode, NamesAreTakenBothWays) {
    for (const SandboxMode mode :
         {SandboxMode::kOff, SandboxMode::kAuto, SandboxMode::kRequire, SandboxMode::kStrict}) {
        EXPECT_EQ(sandbox_mode_from(name_of(mode)), mode);
    }
    EXPECT_EQ(sandbox_mode_from("on"), std::nullopt);
}

TEST_F(SandboxTest, WhatIsOffIsSaidAndWhatIsRequiredIsNotLeftOut) {
    const auto off = confine_files(SandboxMode::kOff, reachable());
    ASSERT_TRUE(off);
    EXPECT_FALSE(off->in_force);
    EXPECT_EQ(off->detail, "off: asked for");
    EXPECT_EQ(confine_calls(SandboxMode::kOff)->detail, "off: asked for");
    EXPECT_EQ(::access((base_ + "/elsewhere/secret").c_str(), R_OK), 0);
    if (kInstrumented) {
        EXPECT_EQ(confine_calls(SandboxMode::kAuto)->detail,
                  "off: this is a build with a sanitizer");
        EXPECT_EQ(confine_files(SandboxMode::kStrict, reachable()).error().code(),
                  ErrorCode::kUnsupported);
        EXPECT_EQ(confine_calls(SandboxMode::kRequire).error().code(), ErrorCode::kUnsupported);
    }
}

TEST_F(SandboxTest, OnlyTheStoresFilesAreWithinReach) {
    if (kInstrumented) {
        return;  // Not confined: the test above.
    }
    const int status = status_of([&] {
        const int before = ::open((base_ + "/elsewhere/secret").c_str(), O_RDONLY);
        CONFINED_EXPECT(before >= 0);
        CONFINED_EXPECT(confine_files(SandboxMode::kRequire, reachable()).has_value());
        const auto open_for = [&](const std::string& path, int flags) {
            return ::open((base_ + path).c_str(), flags, 0600);
        };
        // Elsewhere: not read, not written, not made, not through a link or a detour, not listed.
        CONFINED_EXPECT(
            fails_with(EACCES, [&] { return open_for("/elsewhere/secret", O_RDONLY); }));
        CONFINED_EXPECT(
            fails_with(EACCES, [&] { return open_for("/elsewhere/secret", O_WRONLY); }));
        CONFINED_EXPECT(
            fails_with(EACCES, [&] { return open_for("/elsewhere/new", O_WRONLY | O_CREAT); }));
        CONFINED_EXPECT(
            fails_with(EACCES, [&] { return open_for("/store/../elsewhere/secret", O_RDONLY); }));
        CONFINED_EXPECT(fails_with(EACCES, [] { return ::open("/etc/passwd", O_RDONLY); }));
        CONFINED_EXPECT(fails_with(EACCES, [&] { return open_for("/elsewhere", O_RDONLY); }));
        CONFINED_EXPECT(
            fails_with(EACCES, [&] { return ::unlink((base_ + "/elsewhere/secret").c_str()); }));
        CONFINED_EXPECT(fails_with(EXDEV,
                                   [&] {
                                       return ::rename((base_ + "/store/segment").c_str(),
                                                       (base_ + "/elsewhere/segment").c_str());
                                   }) ||
                        errno == EACCES);
        // No link, device or socket in the store; nothing is started from it.
        CONFINED_EXPECT(fails_with(
            EACCES, [&] { return ::symlink("/etc/passwd", (base_ + "/store/link").c_str()); }));
        CONFINED_EXPECT(
            fails_with(EACCES, [&] { return this->bind_socket(base_ + "/store/socket"); }));
        // What it works with: files and folders of the store, sockets of the runtime directory.
        const int segment = open_for("/store/segment", O_RDWR);
        CONFINED_EXPECT(segment >= 0 && ::ftruncate(segment, 3) == 0);
        CONFINED_EXPECT(open_for("/store/new", O_RDWR | O_CREAT) >= 0);
        CONFINED_EXPECT(
            ::rename((base_ + "/store/new").c_str(), (base_ + "/store/named").c_str()) == 0);
        CONFINED_EXPECT(::unlink((base_ + "/store/named").c_str()) == 0);
        CONFINED_EXPECT(::mkdir((base_ + "/store/folder").c_str(), 0700) == 0);
        CONFINED_EXPECT(open_for("/store", O_RDONLY | O_DIRECTORY) >= 0);
        CONFINED_EXPECT(this->bind_socket(base_ + "/run/socket") == 0);
        CONFINED_EXPECT(open_for("/run/arena", O_RDWR | O_CREAT) >= 0);
        CONFINED_EXPECT(::open("/proc/sys/kernel/random/boot_id", O_RDONLY) >= 0);
        // Itself, and what it has open no further than before.
        CONFINED_EXPECT(::open("/proc/self/status", O_RDONLY) >= 0);
        const std::string again = "/proc/self/fd/" + std::to_string(before);
        CONFINED_EXPECT(fails_with(EACCES, [&] { return ::open(again.c_str(), O_RDONLY); }));
        CONFINED_EXPECT(fails_with(EACCES, [] { return ::open("/proc/1/status", O_RDONLY); }));
        // What was open, or is handed over, stays usable.
        char letter = 0;
        CONFINED_EXPECT(::read(before, &letter, 1) == 1 && letter == 's');
        // A thread that is made later is confined, too.
        std::thread([&] {
            CONFINED_EXPECT(fails_with(EACCES, [] { return ::open("/etc/passwd", O_RDONLY); }));
        }).join();
    });
    EXPECT_EQ(status, 0);
}

TEST_F(SandboxTest, ASocketElsewhereCanBeRemovedAndNothingElseDoneThere) {
    if (kInstrumented) {
        return;
    }
    const int status = status_of([&] {
        ReachableFiles files = reachable();
        files.socket = base_ + "/elsewhere/control.sock";
        CONFINED_EXPECT(confine_files(SandboxMode::kRequire, files).has_value());
        CONFINED_EXPECT(this->bind_socket(files.socket) == 0);
        CONFINED_EXPECT(::unlink(files.socket.c_str()) == 0);
        CONFINED_EXPECT(fails_with(
            EACCES, [&] { return ::open((base_ + "/elsewhere/secret").c_str(), O_RDONLY); }));
        CONFINED_EXPECT(fails_with(EACCES, [&] {
            return ::open((base_ + "/elsewhere/new").c_str(), O_WRONLY | O_CREAT, 0600);
        }));
    });
    EXPECT_EQ(status, 0);
}

TEST_F(SandboxTest, OnlyTheNamedPortIsBound) {
    if (kInstrumented) {
        return;
    }
    const auto bind_port = [](uint16_t port) {
        const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        address.sin_port = htons(port);
        return ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address);
    };
    const int status = status_of([&] {
        ReachableFiles files = reachable();
        files.tcp_port = 0;
        CONFINED_EXPECT(confine_files(SandboxMode::kRequire, files).has_value());
        CONFINED_EXPECT(bind_port(0) == 0);
        // Landlock knows of ports from its version 4 on; the flag asks for the version.
        if (::syscall(SYS_landlock_create_ruleset, nullptr, 0, 1) >= 4) {
            CONFINED_EXPECT(fails_with(EACCES, [&] { return bind_port(9); }));
        }
    });
    EXPECT_EQ(status, 0);
}

TEST_F(SandboxTest, NoProgramNetworkOrOtherProcessIsWithinReach) {
    if (kInstrumented) {
        return;
    }
    const int status = status_of([&] {
        // Threads that are there already are confined with the others.
        std::atomic<int> stage = 0;
        std::thread earlier([&] {
            stage.wait(0);
            CONFINED_EXPECT(fails_with(EPERM, [] { return ::socket(AF_INET, SOCK_STREAM, 0); }));
        });
        this->confine(SandboxMode::kRequire);
        stage = 1;
        stage.notify_all();
        earlier.join();

        std::array<char*, 1> none = {nullptr};
        CONFINED_EXPECT(
            fails_with(EPERM, [&] { return ::execve("/bin/true", none.data(), none.data()); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::fork(); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::socket(AF_INET, SOCK_STREAM, 0); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::socket(AF_INET6, SOCK_DGRAM, 0); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::socket(AF_NETLINK, SOCK_RAW, 0); }));
        CONFINED_EXPECT(fails_with(
            EPERM, [] { return ::ptrace(PTRACE_ATTACH, ::getppid(), nullptr, nullptr); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::kill(::getppid(), SIGTERM); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::unshare(CLONE_NEWUSER); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::mount("a", "/", "tmpfs", 0, nullptr); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::setuid(0); }));
        CONFINED_EXPECT(fails_with(EPERM, [] { return ::syscall(SYS_bpf, 0, nullptr, 0); }));
        CONFINED_EXPECT(
            fails_with(EPERM, [] { return ::syscall(SYS_io_uring_setup, 1, nullptr); }));
        CONFINED_EXPECT(fails_with(
            EPERM, [] { return ::syscall(SYS_process_vm_readv, ::getppid(), 0, 0, 0, 0, 0); }));
        errno = 0;
        CONFINED_EXPECT(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED &&
                        errno == EPERM);

        // And it works: threads, events, memory that is shared, descriptors that are passed.
        std::thread([] {}).join();
        CONFINED_EXPECT(::eventfd(0, EFD_CLOEXEC) >= 0);
        const int memory = ::memfd_create("guest", MFD_CLOEXEC);
        CONFINED_EXPECT(memory >= 0 && ::ftruncate(memory, 4096) == 0);
        CONFINED_EXPECT(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0) !=
                        MAP_FAILED);
        CONFINED_EXPECT(this->bind_socket(base_ + "/run/socket") == 0);
    });
    EXPECT_EQ(status, 0);
}

TEST_F(SandboxTest, StrictEndsTheProcessAtTheFirstForbiddenCall) {
    if (kInstrumented) {
        return;
    }
    const int status = status_of([&] {
        this->confine(SandboxMode::kStrict);
        ::socket(AF_INET, SOCK_STREAM, 0);
    });
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS) << status;
}

}  // namespace
}  // namespace stellarium::daemon
