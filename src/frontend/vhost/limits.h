// Every bound of the vhost-user-blk frontend, and how the bounds relate.
//
// Nothing here grows with what a guest asks for beyond these numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stellarium::vhost {

inline constexpr size_t kMaxQueues = 64;
inline constexpr size_t kMaxQueueSize = 1024;

/// What the configuration space advertises: 126 data segments and two for header and status fill
/// the 128 descriptors that QEMU gives a queue by default.
inline constexpr uint32_t kSegMax = 126;
inline constexpr uint32_t kSizeMaxBytes = 1 << 20;
/// What is accepted: descriptors in a chain, an indirect table included.
inline constexpr size_t kMaxChainDescriptors = 1024;
/// Host ranges in a chain: more than descriptors, where one spans memory regions. Not above
/// IOV_MAX.
inline constexpr size_t kMaxChainSegments = 1024;
/// A longer data transfer is answered with an I/O error.
inline constexpr uint64_t kMaxRequestBytes = uint64_t{128} << 20;
static_assert(uint64_t{kSegMax} * kSizeMaxBytes <= kMaxRequestBytes);
static_assert(kSegMax + 2 <= kMaxChainDescriptors && kMaxQueueSize <= kMaxChainDescriptors);

/// Transfers above this leave the data thread, so that one guest's huge request does not delay the
/// other guests of that thread.
inline constexpr uint64_t kInlineBytes = 1 << 20;
/// So do discards and write-zeroes of more than one range, or of a longer one.
inline constexpr uint64_t kInlineRangeBytes = 2 << 20;
/// What a device may do in one turn of its data thread, over all of its rings: bytes of its
/// requests, each counted as kMinRequestCost at least. The last one may go beyond.
inline constexpr uint64_t kTurnBudgetBytes = 4 << 20;
inline constexpr uint64_t kMinRequestCost = 32 << 10;
static_assert(kInlineBytes <= kTurnBudgetBytes && kInlineRangeBytes <= kTurnBudgetBytes);

inline constexpr uint32_t kMaxDiscardSegments = 64;
/// Sectors in one discard or write-zeroes segment: 2 GiB minus a page, a multiple of every block
/// size.
inline constexpr uint32_t kMaxDiscardSectors = (uint32_t{1} << 22) - 8;

/// Requests of one device that may be away from its data thread (waiting for the disk, for buffer
/// space, for a flush). The rings are not read further until some have come back.
inline constexpr size_t kMaxAsyncRequests = 256;
/// Requests taken from one ring before the other rings of the device get their turn.
inline constexpr size_t kQueueBudget = 64;
/// Completions gathered before the used index is published.
inline constexpr size_t kPublishEvery = 16;
static_assert(kPublishEvery <= kQueueBudget);

/// Requests kept for reuse by each data thread, and the largest segment list that is kept.
inline constexpr size_t kRecycledRequests = 64;
inline constexpr size_t kRecycledSegments = 256;

/// Largest payload of a control message; the largest defined one has 8 memory regions (264 bytes)
/// or a configuration space (268 bytes).
inline constexpr size_t kMaxPayloadBytes = 4096;
inline constexpr size_t kMaxFdsPerMessage = 8;
/// Control messages handled in one turn of a socket.
inline constexpr size_t kMessageBudget = 16;
inline constexpr size_t kMaxConfigBytes = 256;
static_assert(kMaxConfigBytes + 12 <= kMaxPayloadBytes);

/// Pieces of guests' memory mapped at once, over all guests, with their in-flight regions: a
/// process has 65,530 mappings in all, and footers of segments take some.
inline constexpr size_t kMaxGuestMappings = 16'384;
inline constexpr size_t kMaxMemoryTableRegions = 8;
inline constexpr size_t kMaxMemorySlots = 256;
inline constexpr uint64_t kMaxGuestMemoryBytes = uint64_t{4} << 40;

/// How often rings without a kick descriptor are looked at.
inline constexpr int kPollIntervalMs = 1;

/// A timer that is further away than this is looked at again then.
inline constexpr int kMaxTimerMs = 60'000;

/// How long a listening socket rests when the process has no descriptor left for a connection.
inline constexpr int kAcceptRetryMs = 1000;
inline constexpr int kListenBacklog = 8;

/// A data thread that has been in one write to a guest's descriptor for this long is interrupted,
/// at the latest after twice the time.
inline constexpr int kWatchdogMs = 500;

inline constexpr size_t kSerialBytes = 20;  // VIRTIO_BLK_ID_BYTES

}  // namespace stellarium::vhost
