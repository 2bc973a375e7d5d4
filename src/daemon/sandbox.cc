#include "daemon/sandbox.h"

#include <array>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <span>

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/landlock.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace stellarium::daemon {
namespace {

/// What the mode makes of something that is not there.
Result<Confinement> lacking(SandboxMode mode, const std::string& what) {
    if (mode == SandboxMode::kOff || mode == SandboxMode::kAuto) {
        return Confinement{.in_force = false, .detail = "off: " + what};
    }
    return fail(ErrorCode::kUnsupported,
                fmt::format("--sandbox={}: {}; start with --sandbox=auto to go on without it",
                            name_of(mode), what));
}

// --- Landlock --------------------------------------------------------------------------------
// Newer than the headers of Debian 12; the numbers are the kernel's interface and do not change.

constexpr uint64_t kTruncate = uint64_t{1} << 14;     // ABI 3
constexpr uint64_t kDeviceIoctl = uint64_t{1} << 15;  // ABI 5
constexpr uint64_t kBindTcp = uint64_t{1} << 0;       // ABI 4
constexpr uint64_t kConnectTcp = uint64_t{1} << 1;
constexpr uint64_t kScopeAbstractSocket = uint64_t{1} << 0;  // ABI 6
constexpr uint64_t kScopeSignal = uint64_t{1} << 1;
constexpr int kRuleNetPort = 2;
constexpr int kNewestAbi = 6;  ///< What comes later is not asked for.

struct RulesetAttributes {
    uint64_t files = 0;
    uint64_t net = 0;
    uint64_t scoped = 0;
};
static_assert(sizeof(RulesetAttributes) == 24);

struct NetPortAttributes {
    uint64_t allowed = 0;
    uint64_t port = 0;
};

/// 0 where the kernel has none, or it is not among the security modules that were chosen at boot.
int landlock_abi() {
    const long abi =
        syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION);
    return abi < 0 ? 0 : static_cast<int>(abi);
}

RulesetAttributes attributes_of(int abi) {
    RulesetAttributes attributes;
    attributes.files = (LANDLOCK_ACCESS_FS_MAKE_SYM << 1) - 1;  // All of ABI 1.
    if (abi >= 2) {
        attributes.files |= LANDLOCK_ACCESS_FS_REFER;
    }
    if (abi >= 3) {
        attributes.files |= kTruncate;
    }
    if (abi >= 4) {
        attributes.net = kBindTcp | kConnectTcp;
    }
    if (abi >= 5) {
        attributes.files |= kDeviceIoctl;
    }
    if (abi >= 6) {
        attributes.scoped = kScopeSignal;
        // The socket of systemd, which hears that the daemon is ready, may be an abstract one.
        const char* const notify = std::getenv("NOTIFY_SOCKET");  // NOLINT(concurrency-mt-unsafe)
        if (notify == nullptr || *notify != '@') {
            attributes.scoped |= kScopeAbstractSocket;
        }
    }
    return attributes;
}

class Descriptor {
  public:
    explicit Descriptor(long descriptor) : descriptor_(static_cast<int>(descriptor)) {}
    ~Descriptor() {
        if (descriptor_ >= 0) {
            close(descriptor_);
        }
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return descriptor_; }
    void keep_open() { descriptor_ = -1; }

  private:
    int descriptor_;
};

class Ruleset {
  public:
    explicit Ruleset(int abi)
        : handled_(attributes_of(abi)),
          descriptor_(syscall(SYS_landlock_create_ruleset, &handled_, sizeof handled_, 0)) {}

    bool made() const { return descriptor_.get() >= 0; }

    Result<void> allow_below(const std::string& path, uint64_t access) {
        Descriptor folder(open(path.c_str(), O_PATH | O_CLOEXEC));
        if (folder.get() < 0) {
            return std::unexpected(Error::from_errno(errno, "open for the sandbox " + path));
        }
        landlock_path_beneath_attr rule{};
        rule.allowed_access = access & handled_.files;
        rule.parent_fd = folder.get();
        STELLARIUM_TRY(add(LANDLOCK_RULE_PATH_BENEATH, &rule, path));
        if (path.starts_with("/proc/") || path.starts_with("/sys/")) {
            // A rule is one of the inode's, and these file systems make a new one when nobody has
            // the file.
            folder.keep_open();
        }
        return {};
    }

    Result<void> allow_bind(uint16_t port) {
        if (handled_.net == 0) {
            return {};
        }
        const NetPortAttributes rule{.allowed = kBindTcp, .port = port};
        return add(kRuleNetPort, &rule, fmt::format("TCP port {}", port));
    }

    Result<void> enforce() {
        if (syscall(SYS_landlock_restrict_self, descriptor_.get(), 0) != 0) {
            return std::unexpected(Error::from_errno(errno, "landlock_restrict_self"));
        }
        return {};
    }

  private:
    Result<void> add(int kind, const void* rule, const std::string& what) {
        if (syscall(SYS_landlock_add_rule, descriptor_.get(), kind, rule, 0) != 0) {
            return std::unexpected(Error::from_errno(errno, "landlock_add_rule for " + what));
        }
        return {};
    }

    RulesetAttributes handled_;
    Descriptor descriptor_;
};

constexpr uint64_t kStoreAccess =
    LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_READ_DIR |
    LANDLOCK_ACCESS_FS_REMOVE_FILE | LANDLOCK_ACCESS_FS_REMOVE_DIR | LANDLOCK_ACCESS_FS_MAKE_REG |
    LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_REFER | kTruncate;

/// What is read beside the store's own files: which boot this is (whether an arena is of it), what
/// this machine has and allows, how many processors there are (malloc), and how we are doing.
constexpr std::array kReadable = {"/proc/sys/kernel/random/boot_id",
                                  "/proc/sys/vm/max_map_count",
                                  "/proc/meminfo",
                                  "/proc/stat",
                                  "/proc/self",
                                  "/sys/devices/system/cpu/online"};

bool lies_in(const std::string& path, const std::string& folder) {
    return path.size() > folder.size() && path.starts_with(folder) && path[folder.size()] == '/';
}

// --- seccomp ---------------------------------------------------------------------------------

/// Calls that are allowed whatever their arguments are. A name that this libseccomp does not know,
/// or this architecture does not have, is left out. New system calls of a newer C library: see
/// kAbsent.
constexpr std::array kAllowed = {
    // Files, below the folders that Landlock leaves, and descriptors.
    "access", "chmod", "chown", "close", "dup", "faccessat", "faccessat2", "fadvise64", "fallocate",
    "fchmod", "fchmodat", "fchown", "fchownat", "fcntl", "fdatasync", "flock", "fstat", "fstatfs",
    "fsync", "ftruncate", "getcwd", "getdents64", "lchown", "lseek", "lstat", "mkdir", "mkdirat",
    "newfstatat", "open", "openat", "pread64", "preadv", "preadv2", "pwrite64", "pwritev",
    "pwritev2", "read", "readlink", "readlinkat", "readv", "rename", "renameat", "renameat2",
    "rmdir", "stat", "statfs", "statx", "sync_file_range", "umask", "unlink", "unlinkat", "write",
    "writev",
    // Memory.
    "brk", "madvise", "membarrier", "memfd_create", "mincore", "mlock", "mlock2", "mremap", "msync",
    "munlock", "munmap",
    // Waiting and time.
    "clock_getres", "clock_gettime", "clock_nanosleep", "epoll_create1", "epoll_ctl", "epoll_pwait",
    "epoll_pwait2", "epoll_wait", "eventfd2", "gettimeofday", "nanosleep", "poll", "ppoll",
    "pselect6", "select", "timerfd_create", "timerfd_gettime", "timerfd_settime",
    // Sockets that exist; which ones can be made is below.
    "accept", "accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen",
    "recvfrom", "recvmmsg", "recvmsg", "sendmmsg", "sendmsg", "sendto", "setsockopt", "shutdown",
    // Threads and signals.
    "exit", "exit_group", "futex", "futex_waitv", "get_robust_list", "gettid", "restart_syscall",
    "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigreturn", "rt_sigsuspend",
    "rt_sigtimedwait", "sched_getaffinity", "sched_yield", "set_robust_list", "set_tid_address",
    "sigaltstack",
    // About this process and machine.
    "getcpu", "getegid", "geteuid", "getgid", "getgroups", "getpgrp", "getpid", "getppid",
    "getrandom", "getrlimit", "getrusage", "getuid", "sysinfo", "times", "uname"};

/// A C library takes ENOSYS for "use the older call", and EPERM for a failure. clone3 hides its
/// flags behind a pointer, where no filter sees them.
constexpr std::array kAbsent = {"clone3", "openat2", "close_range", "mseal", "map_shadow_stack"};

struct ReleaseFilter {
    void operator()(void* filter) const { seccomp_release(filter); }
};
using Filter = std::unique_ptr<void, ReleaseFilter>;

/// 0, or a negative errno as libseccomp gives it. Calls that are not known here are no error.
int add_rule(const Filter& filter, uint32_t action, const char* name,
             std::span<const scmp_arg_cmp> conditions = {}) {
    const int number = seccomp_syscall_resolve_name(name);
    if (number == __NR_SCMP_ERROR) {
        return 0;
    }
    const int added = seccomp_rule_add_array(
        filter.get(), action, number, static_cast<unsigned>(conditions.size()), conditions.data());
    // -EDOM: not on this architecture.
    return added == -EDOM ? 0 : added;
}

/// Calls that are allowed with some arguments only.
int add_conditional_rules(const Filter& filter) {
    struct Rule {
        const char* call;
        std::array<scmp_arg_cmp, 1> condition;
    };
    const auto self = static_cast<scmp_datum_t>(getpid());
    const std::array rules = {
        // New sockets are local ones: those of guests, and the one to systemd.
        Rule{"socket", {SCMP_A0(SCMP_CMP_EQ, AF_UNIX)}},
        // Threads, no processes.
        Rule{"clone", {SCMP_A0(SCMP_CMP_MASKED_EQ, CLONE_THREAD, CLONE_THREAD)}},
        // No memory becomes executable.
        Rule{"mmap", {SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0)}},
        Rule{"mprotect", {SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0)}},
        // Signals to our own threads.
        Rule{"tgkill", {SCMP_A0(SCMP_CMP_EQ, self)}},
        Rule{"prctl", {SCMP_A0(SCMP_CMP_EQ, PR_SET_NAME)}},
        // Limits are read; ours are set at the start.
        Rule{"prlimit64", {SCMP_A2(SCMP_CMP_EQ, 0)}},
        Rule{"ioctl", {SCMP_A1(SCMP_CMP_EQ, FIONBIO)}},
        Rule{"ioctl", {SCMP_A1(SCMP_CMP_EQ, FIONREAD)}},
        Rule{"ioctl", {SCMP_A1(SCMP_CMP_EQ, TCGETS)}},
    };
    for (const Rule& rule : rules) {
        if (const int failed = add_rule(filter, SCMP_ACT_ALLOW, rule.call, rule.condition);
            failed != 0) {
            return failed;
        }
    }
    return 0;
}

int build(const Filter& filter) {
    for (const char* const name : kAllowed) {
        if (const int failed = add_rule(filter, SCMP_ACT_ALLOW, name); failed != 0) {
            return failed;
        }
    }
    for (const char* const name : kAbsent) {
        if (const int failed = add_rule(filter, SCMP_ACT_ERRNO(ENOSYS), name); failed != 0) {
            return failed;
        }
    }
    if (const int failed = add_conditional_rules(filter); failed != 0) {
        return failed;
    }
    // All threads; and the audit log names what is refused. Where the kernel cannot log, it does
    // not.
    static_cast<void>(seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_LOG, 1));
    return seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_TSYNC, 1);
}

}  // namespace

std::optional<SandboxMode> sandbox_mode_from(std::string_view name) {
    for (const SandboxMode mode :
         {SandboxMode::kOff, SandboxMode::kAuto, SandboxMode::kRequire, SandboxMode::kStrict}) {
        if (name == name_of(mode)) {
            return mode;
        }
    }
    return std::nullopt;
}

std::string_view name_of(SandboxMode mode) {
    switch (mode) {
        case SandboxMode::kOff:
            return "off";
        case SandboxMode::kAuto:
            return "auto";
        case SandboxMode::kRequire:
            return "require";
        case SandboxMode::kStrict:
            return "strict";
    }
    return "off";
}

Result<Confinement> confine_files(SandboxMode mode, const ReachableFiles& reachable) {
    if (mode == SandboxMode::kOff) {
        return lacking(mode, "asked for");
    }
    if (kInstrumented) {
        return lacking(mode, "this is a build with a sanitizer");
    }
    const int abi = landlock_abi();
    if (abi == 0) {
        return lacking(mode, "this kernel has no Landlock (Linux 5.13, lsm=landlock)");
    }
    Ruleset ruleset(abi);
    if (!ruleset.made()) {
        return lacking(mode, fmt::format("landlock_create_ruleset: {}",
                                         Error::from_errno(errno, "").message()));
    }
    STELLARIUM_TRY(ruleset.allow_below(reachable.store, kStoreAccess));
    STELLARIUM_TRY(
        ruleset.allow_below(reachable.runtime, kStoreAccess | LANDLOCK_ACCESS_FS_MAKE_SOCK));
    for (const std::string& socket : {reachable.socket, reachable.nbd_socket}) {
        if (!socket.empty() && !lies_in(socket, reachable.runtime)) {
            STELLARIUM_TRY(
                ruleset.allow_below(std::filesystem::path(socket).parent_path().string(),
                                    LANDLOCK_ACCESS_FS_REMOVE_FILE | LANDLOCK_ACCESS_FS_MAKE_SOCK));
        }
    }
    for (const char* const path : kReadable) {
        if (access(path, R_OK) == 0) {
            const uint64_t rights = std::filesystem::is_directory(path)
                                        ? LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR
                                        : LANDLOCK_ACCESS_FS_READ_FILE;
            STELLARIUM_TRY(ruleset.allow_below(path, rights));
        }
    }
    if (reachable.tcp_port) {
        STELLARIUM_TRY(ruleset.allow_bind(*reachable.tcp_port));
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
        return std::unexpected(Error::from_errno(errno, "set no_new_privs"));
    }
    STELLARIUM_TRY(ruleset.enforce());
    return Confinement{.in_force = true,
                       .detail = abi >= kNewestAbi
                                     ? fmt::format("landlock {}", abi)
                                     : fmt::format("landlock {} of {}", abi, kNewestAbi)};
}

Result<Confinement> confine_calls(SandboxMode mode) {
    if (mode == SandboxMode::kOff) {
        return lacking(mode, "asked for");
    }
    if (kInstrumented) {
        return lacking(mode, "this is a build with a sanitizer");
    }
    const bool strict = mode == SandboxMode::kStrict;
    const Filter filter(seccomp_init(strict ? SCMP_ACT_KILL_PROCESS : SCMP_ACT_ERRNO(EPERM)));
    if (!filter) {
        return lacking(mode, "libseccomp cannot make a filter for this architecture");
    }
    int failed = build(filter);
    if (failed == 0) {
        failed = seccomp_load(filter.get());
    }
    if (failed != 0) {
        return lacking(mode, fmt::format("this kernel does not take the seccomp filter: {}",
                                         Error::from_errno(-failed, "").message()));
    }
    return Confinement{.in_force = true, .detail = strict ? "seccomp, strict" : "seccomp"};
}

}  // namespace stellarium::daemon
