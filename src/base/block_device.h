// What a guest frontend (vhost-user-blk, FUSE, NBD) serves: one disk, in bytes.
//
// A frontend knows nothing else of the engine, and the engine nothing of guest protocols. Memory
// given to a call is borrowed until the call returns (or, for flush_async, is not used at all).
//
// Thread rule: every function may be called from any thread, also at the same time. Requests that
// overlap in range and time take effect in some order, each 512-byte sector whole.
// Durability: read, write, discard and write_zeroes promise what a disk with a volatile write cache
// promises: visible at once, and kept across the death of this process, but durable against power
// loss only after a flush that began after they returned.
//
//     if (auto r = device.read(0, into, ReadMode::kNoWait);
//         !r && r.error().code() == ErrorCode::kWouldBlock) { /* again with kMayBlock on a worker
//         */ }
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include <sys/uio.h>

#include "base/error.h"
#include "base/io_mode.h"

namespace stellarium {

class BlockDevice {
  public:
    virtual ~BlockDevice() = default;

    /// Current size; a multiple of 512. Grows or shrinks only through the engine's resize.
    virtual uint64_t size_bytes() const = 0;
    virtual bool read_only() const = 0;
    /// Stable text of at most 20 bytes for VIRTIO_BLK_T_GET_ID; may be empty.
    virtual std::string serial() const = 0;

    /// Offsets and total lengths are multiples of 512 and lie within the device, else
    /// kInvalidArgument. Fills all of `into`. Unwritten ranges read as zeros.
    virtual Result<void> read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode) = 0;
    virtual Result<void> write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode) = 0;
    /// The range reads as zeros afterwards and takes no space.
    virtual Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) = 0;
    /// The range reads as zeros afterwards. The same as discard for this engine: zeros are holes.
    virtual Result<void> write_zeroes(uint64_t offset_bytes, uint64_t length_bytes,
                                      IoMode mode) = 0;

    /// Calls `done` exactly once, from any thread, possibly before returning, when everything
    /// completed before this call is durable, or with the error that prevented it. `done` must not
    /// block. Never blocks itself.
    virtual void flush_async(std::function<void(Result<void>)> done) = 0;

    /// Calls `listener` from any thread after the size has changed. One listener; an empty function
    /// removes it, and after that call returns the old one is not running and never runs again.
    virtual void set_resize_listener(std::function<void(uint64_t new_size_bytes)> listener) = 0;
};

}  // namespace stellarium
