// A guest without a guest: shared memory, and virtqueues in it as a driver keeps them.
//
// Both outlive a connection, as they do in a VM whose back-end is restarted. For hostile tests
// every ring field can be written directly.
//
// Thread rule: one thread at a time.
//
//     auto ram = GuestRam::create(16 * kMiB);
//     DriverQueue queue(**ram, 128, /*event_index=*/true, /*indirect=*/true);
//     queue.add(buffers);
//     queue.kick_if_wanted();
//     if (queue.wait(std::chrono::seconds(10))) { auto used = queue.take_used(); }
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "frontend/vhost/protocol.h"

namespace stellarium::vhost {

/// A memory file that both sides map.
class GuestRam {
  public:
    /// Where the file begins in guest addresses, and in the addresses that name rings.
    static constexpr uint64_t kGuestBase = 0x1'0000'0000;
    static constexpr uint64_t kUserBase = 0x7'0000'0000;

    static Result<std::unique_ptr<GuestRam>> create(uint64_t size_bytes, bool huge_pages = false);
    ~GuestRam();
    GuestRam(const GuestRam&) = delete;
    GuestRam& operator=(const GuestRam&) = delete;

    int fd() const { return fd_.get(); }
    uint64_t size_bytes() const { return size_bytes_; }
    std::byte* data() const { return data_; }
    /// Takes memory for good; stops the program when there is none left.
    std::byte* allocate(uint64_t size_bytes, uint64_t alignment = 16);
    uint64_t guest_address(const void* at) const { return kGuestBase + offset(at); }
    uint64_t user_address(const void* at) const { return kUserBase + offset(at); }
    RegionDescription description() const;

  private:
    GuestRam() = default;
    uint64_t offset(const void* at) const {
        return static_cast<uint64_t>(static_cast<const std::byte*>(at) - data_);
    }
    UniqueFd fd_;
    std::byte* data_ = nullptr;
    uint64_t size_bytes_ = 0;
    uint64_t allocated_ = 0;
};

/// A piece of guest memory in a request.
struct Buffer {
    uint64_t guest_address = 0;
    uint32_t length_bytes = 0;
    bool writable = false;
};

class DriverQueue {
  public:
    DriverQueue(GuestRam& ram, uint16_t size, bool event_index, bool indirect);

    /// Makes a chain available, as an indirect table when that was asked for and there is more than
    /// one buffer. Its head, or nothing when the ring has no room.
    std::optional<uint16_t> add(std::span<const Buffer> buffers);
    /// Signals the kick descriptor unless the device said that it is looking anyway.
    void kick_if_wanted();
    void kick();
    /// The next completion, if there is one. The chain's descriptors are free afterwards.
    std::optional<UsedElement> take_used();
    /// Waits on the call descriptor until a completion can be taken; false after the timeout.
    bool wait(std::chrono::milliseconds timeout);
    /// Waits without looking at the call descriptor.
    bool spin(std::chrono::milliseconds timeout);

    uint16_t size() const { return size_; }
    size_t outstanding() const { return outstanding_; }
    /// Used index as far as it was taken: what a front-end gives as base after a lost connection.
    uint16_t used_taken() const { return used_taken_; }
    int kick_fd() const { return kick_.get(); }
    int call_fd() const { return call_.get(); }
    int error_fd() const { return error_.get(); }
    uint64_t calls();  ///< Reads and clears the count of calls.
    VringAddress addresses(uint32_t index) const;

    // ---- The raw rings -------------------------------------------------------------------------
    Descriptor& descriptor(uint16_t i) { return descriptors_[i]; }
    void write_available(uint16_t slot, uint16_t head);
    void set_available_index(uint16_t index);
    uint16_t available_index() const;
    uint16_t used_index() const;
    void set_available_flags(uint16_t flags);
    void set_used_event(uint16_t event);
    uint16_t available_event() const;

  private:
    std::atomic_ref<uint16_t> available_field(size_t offset) const;
    std::atomic_ref<uint16_t> used_field(size_t offset) const;

    GuestRam& ram_;
    uint16_t size_;
    bool event_index_;
    bool indirect_;
    Descriptor* descriptors_;
    std::byte* available_;
    std::byte* used_;
    std::byte* tables_ = nullptr;  ///< One indirect table for each head.
    std::vector<uint16_t> free_;
    std::vector<std::vector<uint16_t>> chains_;  ///< By head: descriptors to free.
    uint16_t available_index_ = 0;
    uint16_t kicked_index_ = 0;
    uint16_t used_taken_ = 0;
    size_t outstanding_ = 0;
    UniqueFd kick_;
    UniqueFd call_;
    UniqueFd error_;
};

}  // namespace stellarium::vhost
