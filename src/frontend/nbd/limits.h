// Every bound of the NBD frontend, and how the bounds relate.
//
// Nothing here grows with what a client asks for beyond these numbers.
//
// Thread rule: constants.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace stellarium::nbd {

/// Clients at once; further ones wait in the backlog until one leaves.
inline constexpr unsigned kMaxClients = 512;
inline constexpr int kListenBacklog = 128;

/// What is advertised as block sizes.
inline constexpr uint32_t kMinBlockBytes = 512;
inline constexpr uint32_t kPreferredBlockBytes = 4096;
inline constexpr uint32_t kMaxTransferBytes = 32U << 20;  ///< Of one READ or WRITE.

/// Reads and writes are done in pieces of this size, so no request needs more memory than that. It
/// also stays in a processor's cache between the copy from the page cache and that to the socket.
inline constexpr uint32_t kPieceBytes = 256U << 10;
static_assert(kMaxTransferBytes % kPieceBytes == 0 && kPieceBytes % kPreferredBlockBytes == 0);
/// A read that must not be fragmented (DF) may be this long. proto.md asks for 64 KiB.
inline constexpr uint32_t kMaxUnfragmentedBytes = kPieceBytes;
/// Before a piece's data: room for the header of its reply, and the data stay aligned.
inline constexpr uint32_t kHeaderRoomBytes = 64;
/// Requests and small payloads as they come from a client.
inline constexpr uint32_t kInputBytes = 64U << 10;
static_assert(kInputBytes < kPieceBytes);

/// Requests of one client that are not answered yet, the answer's way to the client included.
inline constexpr uint32_t kMaxClientRequests = 128;
/// Pieces of one client on their way: at least so much for each client, whatever others do; more,
/// up to kMaxClientBytes, while all clients together take less than kSharedBytes beyond that.
inline constexpr uint64_t kReservedBytes = 512U << 10;
inline constexpr uint64_t kMaxClientBytes = uint64_t{4} << 20;
inline constexpr uint64_t kSharedBytes = uint64_t{64} << 20;
static_assert(kReservedBytes >= kPieceBytes + kHeaderRoomBytes && kReservedBytes < kMaxClientBytes);
/// Buffers of pieces kept for the next ones, by each thread that serves clients.
inline constexpr size_t kRecycledPieces = 16;
inline constexpr unsigned kMaxThreads = 8;

/// Work of one client before the other clients of its thread get their turn.
inline constexpr uint32_t kTurnRequests = 64;
inline constexpr uint64_t kTurnBytes = uint64_t{1} << 20;
/// A longer TRIM or WRITE_ZEROES leaves the thread.
inline constexpr uint64_t kInlineRangeBytes = uint64_t{2} << 20;
/// What CACHE reads before others get the thread.
inline constexpr uint64_t kCacheStepBytes = uint64_t{4} << 20;
/// Extents in one answer to BLOCK_STATUS.
inline constexpr size_t kMaxStatusExtents = 512;

// Handshake.
inline constexpr uint32_t kMaxOptionBytes = 16U << 10;  ///< Longer ones are skipped and refused.
inline constexpr size_t kMaxExportNameBytes = 4096;     ///< proto.md.
/// Nothing is as long; the client is not one.
inline constexpr uint32_t kMaxSkippedOptionBytes = 1U << 20;
inline constexpr size_t kListPage = 1000;  ///< Names of a list that are held at once.
static_assert(kMaxOptionBytes <= kInputBytes && kMaxExportNameBytes < kMaxOptionBytes);
inline constexpr size_t kMaxMessageBytes = 1024;  ///< Of the text beside an error.

/// For the next option.
inline constexpr std::chrono::milliseconds kHandshakeTimeout{30'000};
/// For the next byte that a client takes of an answer, or sends of the data it announced.
inline constexpr std::chrono::milliseconds kStallTimeout{60'000};
/// For clients to take their answers when the server stops.
inline constexpr std::chrono::milliseconds kDrainTimeout{5'000};

/// Threads for reads that are not in memory, and how many of them one export may take.
inline constexpr unsigned kReadingThreads = 8;
inline constexpr unsigned kReadingThreadsPerExport = 6;

/// What all clients together take: input, pieces, and what is kept for later.
constexpr uint64_t memory_of_clients(uint64_t clients) {
    return clients * (kInputBytes + kReservedBytes) + kSharedBytes +
           uint64_t{kMaxThreads} * kRecycledPieces * (kPieceBytes + kHeaderRoomBytes) +
           uint64_t{kReadingThreads} * kPieceBytes;
}

}  // namespace stellarium::nbd
