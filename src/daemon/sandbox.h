// What the daemon's process may still do once it serves: Landlock says which files, seccomp which
// system calls. Whoever takes the process over through a guest's ring or a request finds no shell,
// no network, and no file but the store's.
//
//     STELLARIUM_ASSIGN(Confinement files, confine_files(mode, {.store = ..., .runtime = ...}));
//     ...                                        // threads, recovery, sockets
//     STELLARIUM_ASSIGN(Confinement calls, confine_calls(mode));
//     log.info("sandbox", {{"files", files.detail}, {"calls", calls.detail}});
//
// confine_files() holds for the calling thread and for those it makes later, so it comes before any
// of them; what is open already stays usable, and so is every descriptor that is received later
// (guests' memory). confine_calls() holds for all threads at once. Neither can be taken back, and
// both set no_new_privs.
//
// A forbidden open fails with EACCES, a forbidden call with EPERM, and the kernel's audit log names
// it. With kStrict a forbidden call ends the process with SIGSYS instead.
//
// A build with a sanitizer is not confined: the sanitizers' runtimes make calls of their own.
//
// Errors: kUnsupported where the mode demands what this kernel or build lacks; else those of the
// system. With kAuto what is lacking is said in `detail`, and is no error.
// Thread rule: as above; once each.
// Sources: Documentation/userspace-api/landlock.rst, seccomp(2), libseccomp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace stellarium::daemon {

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define STELLARIUM_BUILT_WITH_SANITIZER 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || \
    defined(STELLARIUM_BUILT_WITH_SANITIZER)
inline constexpr bool kInstrumented = true;
#else
inline constexpr bool kInstrumented = false;
#endif

enum class SandboxMode : uint8_t {
    kOff,
    kAuto,     ///< As much as the kernel can do.
    kRequire,  ///< Both, or no start.
    kStrict,   ///< Both, and a forbidden call ends the process.
};
std::optional<SandboxMode> sandbox_mode_from(std::string_view name);
std::string_view name_of(SandboxMode mode);

struct ReachableFiles {
    std::string store;    ///< Files and folders of it may be read, written, made and removed.
    std::string runtime;  ///< And sockets.
    /// Socket file in another folder: what lies in that folder may be removed, for the file goes
    /// when the daemon stops. "" for none.
    std::string socket;
    std::string nbd_socket;            ///< The same for another one.
    std::optional<uint16_t> tcp_port;  ///< May be bound; 0 for any.
};

struct Confinement {
    bool in_force = false;  ///< Maybe less of it on an older kernel: "landlock 2 of 6".
    std::string detail;     ///< What is in force, or why it is not; for the log.
};

Result<Confinement> confine_files(SandboxMode mode, const ReachableFiles& reachable);
Result<Confinement> confine_calls(SandboxMode mode);

}  // namespace stellarium::daemon
