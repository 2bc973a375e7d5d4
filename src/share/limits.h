// Every bound of what is mapped out of the store.
//
// Thread rule: constants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stellarium::share {

/// Mappings of the kernel's that one range may take, if nobody says otherwise. A process has 65,530
/// by default, and needs some for itself.
inline constexpr size_t kDefaultMappings = 4096;
/// Hole, memory file, hole; and some more so that splitting pays.
inline constexpr size_t kLeastMappings = 16;
inline constexpr size_t kMostMappings = 32768;
/// Segments of one range, and so descriptors that are sent: 32 GiB of an image that was imported in
/// one go.
inline constexpr size_t kMaxFiles = 512;

/// Clients of a daemon that borrow at once, each with a thread of its own.
inline constexpr size_t kMaxBorrowers = 64;
/// Ranges that one of them has at once.
inline constexpr size_t kMaxLeases = 1024;
/// Descriptors of all leases of a daemon, which keeps one copy of each to lend it again.
inline constexpr uint64_t kMaxLentFiles = 512;
/// What a daemon takes for it: those, a connection of each client, and what accepts them.
inline constexpr uint64_t kLenderDescriptors = kMaxLentFiles + kMaxBorrowers + 3;
/// What is gathered in memory files by a daemon, over all leases.
inline constexpr uint64_t kMaxGatheredBytes = uint64_t{1} << 30;
/// Descriptors in one message of the kernel's (SCM_MAX_FD is 253).
inline constexpr size_t kFilesPerMessage = 128;
/// How long a client may take to read or write a message that has begun.
inline constexpr int kMessageTimeoutSeconds = 30;

}  // namespace stellarium::share
