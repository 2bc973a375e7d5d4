// One request of a guest's block driver: decoding it, and doing it.
//
// A request is decoded once from copies of its header and ranges; its data segments are host ranges
// in guest memory, which `memory` keeps mapped.
//
// Thread rule: a Request belongs to one thread at a time: the data thread, or a thread of the
// blocking pool while the request is with it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/block_device.h"
#include "base/error.h"
#include "frontend/vhost/guest_memory.h"
#include "frontend/vhost/protocol.h"
#include "frontend/vhost/virtqueue.h"

namespace stellarium::vhost {

class Session;

enum class RequestKind : uint8_t {
    kRead,
    kWrite,
    kFlush,
    kDiscard,
    kWriteZeroes,
    kGetId,
    kUnknown,
};
inline constexpr size_t kRequestKinds = 7;

struct ByteRange {
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
};

struct Request {
    std::shared_ptr<Session> session;  ///< Touched only by the session's data thread.
    std::shared_ptr<const GuestMemory> memory;
    uint16_t queue = 0;
    uint16_t head = 0;
    RequestKind kind = RequestKind::kUnknown;
    uint8_t status = kBlkStatusOk;
    bool abandoned = false;          ///< Given up before it was begun: has no status.
    bool flushed = false;            ///< The device's flush was asked for after the data.
    uint64_t offset_bytes = 0;       ///< Reads and writes.
    uint64_t length_bytes = 0;       ///< All data, or all ranges.
    std::vector<iovec> data;         ///< Reads: to fill. Writes: to take from. GET_ID: to fill.
    std::vector<ByteRange> ranges;   ///< Discards and write-zeroes.
    uint8_t* status_byte = nullptr;  ///< In guest memory.
    uint64_t started_ns = 0;

    /// Forgets the request but keeps its memory for the next one.
    void reset();
    /// What the used ring reports: bytes written to the guest's buffers.
    uint32_t written_bytes() const;
};

/// What decoding needs to know of the device.
struct DiskView {
    uint64_t size_bytes = 0;
    bool read_only = false;
};

/// Decodes `chain`, whose vectors it may take. A request that the device can only refuse comes back
/// with its status set; kProtocol means that the chain has no place for a header and a status, and
/// the guest must be disconnected.
Result<void> decode(Chain& chain, const DiskView& disk, Request& request);

/// Does a read, write, discard or write-zeroes. kWouldBlock only for kNoWait; it may then be done
/// again from the start.
/// A discard or write-zeroes of several ranges stops between two of them with kCancelled when
/// `stop` becomes true.
Result<void> perform(BlockDevice& device, const Request& request, IoMode mode,
                     const std::atomic<bool>* stop = nullptr);

/// Writes the answer to GET_ID: up to 20 bytes, filled up with zeros.
void fill_serial(const std::string& serial, const Request& request);

}  // namespace stellarium::vhost
