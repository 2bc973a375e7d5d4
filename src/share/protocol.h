// The messages with which a client of a daemon borrows ranges of images, over a unix stream socket.
//
//   client   BorrowRequest name             one at a time, answered in order
//   daemon   BorrowAnswer message WirePiece* ('F' with at most kFilesPerMessage descriptors)*
//
// All integers are little-endian. Descriptors are those of segments, opened read-only, with a
// shared lock that lasts until their last copy and mapping are gone; and of a sealed memory file. A
// client that hangs up gives back what it has not unmapped only when it unmaps it, or ends.
//
// Thread rule: values and functions of one socket, which one thread uses at a time.
// Errors: kProtocol for what does not fit, kUnavailable when the other side hangs up.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"
#include "share/plan.h"

namespace stellarium::share {

inline constexpr uint32_t kBorrowMagic = 0x574f5242;  // "BROW"
inline constexpr uint16_t kBorrowVersion = 1;
inline constexpr size_t kMaxSourceBytes = 512;
inline constexpr size_t kMaxAnswerText = 4096;

enum class BorrowKind : uint16_t {
    kBorrow = 1,
    kGiveBack = 2,  ///< The daemon forgets the lease; the locks end with the client's mappings.
};

struct BorrowRequest {
    U32Le magic;
    U16Le version;
    U16Le kind;
    U64Le offset_bytes;
    U64Le length_bytes;
    U64Le lease;  ///< To give back.
    U32Le max_mappings;
    U16Le source_bytes;
    std::array<uint8_t, 2> reserved;
};
static_assert(sizeof(BorrowRequest) == 40);

struct BorrowAnswer {
    U32Le magic;
    U16Le version;
    U16Le code;  ///< 0: done; else 1 and the ErrorCode.
    U64Le lease;
    U64Le length_bytes;
    U64Le gathered_bytes;
    U32Le piece_count;
    U32Le file_count;
    U32Le message_bytes;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(BorrowAnswer) == 48);

struct WirePiece {
    U64Le offset_bytes;
    U64Le length_bytes;
    U64Le file_offset_bytes;
    U32Le file;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(WirePiece) == 32);

/// All of it, however many turns it takes.
Result<void> send_all(int socket, Bytes bytes);
Result<void> receive_all(int socket, MutableBytes into);
/// The number of them is known to both sides.
Result<void> send_files(int socket, std::span<const UniqueFd> files);
Result<std::vector<UniqueFd>> receive_files(int socket, size_t count);

/// How long send and receive wait for the other side; 0: for ever.
Result<void> set_timeouts(int socket, int receive_seconds, int send_seconds);

}  // namespace stellarium::share
