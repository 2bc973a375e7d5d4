// Every bound of the daemon itself, and what it needs of the system. Those of the parts are in
// frontend/vhost/limits.h, frontend/nbd/limits.h and nova/limits.h; docs/internals/limits.md adds
// all of them up.
//
// Thread rule: constants and pure functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "base/units.h"
#include "frontend/nbd/limits.h"

namespace stellarium::daemon {

// The control socket.
inline constexpr unsigned kHttpWorkers = 4;         ///< Requests done at once.
inline constexpr unsigned kMaxStreams = 16;         ///< Imports and exports at once.
inline constexpr unsigned kMaxStreamsPerUser = 12;  ///< Of these, of one user.
inline constexpr unsigned kMaxConnections = 256;    ///< Of each unix socket.
inline constexpr unsigned kMaxTcpConnections = 32;  ///< Of each TCP port.
inline constexpr uint32_t kMaxHeaderBytes = 16U << 10;
/// Bodies of requests and answers held at once, over all connections: a sixteenth of --memory
/// within these. One alone may be longer.
inline constexpr size_t kMinHeldBytes = size_t{2} << 20;
inline constexpr size_t kMaxHeldBytes = size_t{64} << 20;
constexpr size_t held_bytes_of(uint64_t memory_bytes) {
    const uint64_t share = memory_bytes / 16;
    return share < kMinHeldBytes ? kMinHeldBytes : share > kMaxHeldBytes ? kMaxHeldBytes : share;
}
/// One long body, what is parsed of it, and what the operation makes of that.
inline constexpr uint64_t kLongRequestBytes = 64 * kMiB;
inline constexpr uint64_t kConnectionBytes = 128 * kKiB;
/// A frame, and the piece that is being read or written.
inline constexpr uint64_t kStreamBytes = 4 * kMiB;
/// What an import has gathered, is hashing and appending: 2 MiB pieces, two for each hashing thread
/// and eight more.
constexpr uint64_t import_bytes(uint64_t hash_threads) {
    return (2 * hash_threads + 8) * 2 * kMiB;
}
/// Two groups of guests' writes on their way into the log, and their map records.
inline constexpr uint64_t kCommitMemoryBytes = 48 * kMiB;
/// The program itself, its threads' stacks, and what malloc() keeps for later.
inline constexpr uint64_t kProgramBytes = 64 * kMiB;
/// What the heap takes besides --memory, the index, and guests' requests on their way
/// (docs/internals/limits.md), whatever clients do.
uint64_t memory_besides(uint64_t memory_bytes, uint64_t hash_threads);
static_assert(kMaxStreamsPerUser < kMaxStreams);

// What --memory may be.
inline constexpr uint64_t kMinMemoryBytes = 16 * kMiB;
inline constexpr uint64_t kMaxMemoryBytes = 1 * kTiB;
inline constexpr uint64_t kDefaultMemoryBytes = 320 * kMiB;

/// How much to take of `wanted` where nobody chose it, and the runtime directory, in which four
/// fifths of it are allocated at once, has `room_bytes`. Not less than kMinMemoryBytes.
uint64_t memory_that_fits(uint64_t wanted_bytes, uint64_t room_bytes);

/// Descriptors: a listening socket. What a guest takes is counted when it connects: two sockets,
/// and a kick, a call and an error descriptor for each queue that it uses.
inline constexpr uint64_t kDescriptorsOfAttachment = 1;
/// Log, locks, superblock, index, arena, segments being written, sockets and event loops.
inline constexpr uint64_t kFixedDescriptors = 192;

/// What NBD takes where it is served: a connection for each client, and the socket and the event
/// loops (three each).
inline constexpr uint64_t kNbdDescriptors = nbd::kMaxClients + 1 + uint64_t{nbd::kMaxThreads} * 3;
/// What the daemon takes without any attachment: segments open for reading, connections, and what
/// each thread that serves guests receives with a message.
uint64_t descriptors_without_attachments(uint64_t data_threads);

/// Mappings that are neither footers nor guests' memory: the index, threads' stacks, libraries, and
/// large allocations.
inline constexpr uint64_t kOtherMappings = 8192;
/// What the daemon has mapped at most.
uint64_t mappings_needed();

/// Raises the soft limit of descriptors to the hard one, and returns it. kLimitExceeded, with what
/// to do, when that or the system's limit of mappings (`max_map_count`, as read from /proc; 0:
/// unknown) is less than the daemon needs with so many threads that serve guests.
Result<uint64_t> check_process_limits(uint64_t max_map_count, uint64_t data_threads);
/// What the system allows; 0: it does not say.
uint64_t read_max_map_count();

}  // namespace stellarium::daemon
