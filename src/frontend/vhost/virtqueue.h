// A split virtqueue as the device sees it: taking chains, giving them back, telling the driver.
//
// The rings live in guest memory. Every index and descriptor is copied once and checked before it
// is used; what fails a check is a kProtocol error, after which the guest must be disconnected.
//
// In-flight tracking (when a region is given): a head is marked before it is processed and cleared
// after the used index that covers it is visible, in the order of the protocol's section "Inflight
// I/O tracking". Wherever this process is killed, a later start() on the same region and rings
// either finds the chain's completion published or hands the chain out again, oldest first.
//
// Thread rule: one thread at a time. Addresses stay valid while the mappings do; the owner keeps
// the GuestMemory that resolve() was given.
//
//     Chain chain;
//     while (*queue.pop(memory, chain)) { ...; queue.push(chain.head, written_bytes); }
//     if (queue.publish()) { /* signal the call descriptor */ }
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <sys/uio.h>

#include "base/error.h"
#include "frontend/vhost/guest_memory.h"
#include "frontend/vhost/protocol.h"

namespace stellarium::vhost {

/// One request of the driver: the readable parts come first, then the writable ones.
struct Chain {
    uint16_t head = 0;
    std::vector<iovec> readable;
    std::vector<iovec> writable;
};

/// The part of an in-flight region that belongs to one queue.
struct InflightQueue {
    std::shared_ptr<SharedMapping> mapping;
    InflightHeader* header = nullptr;
    InflightState* states = nullptr;
    uint16_t queue_size = 0;
};

class Virtqueue {
  public:
    // ---- Set-up, in any order, before start() --------------------------------------------------

    /// Power of two, at most kMaxQueueSize.
    Result<void> set_size(uint32_t size);
    void set_base(uint16_t available_index) { base_ = available_index; }
    /// Front-end (user) addresses of the three rings. Checked for alignment here, for being mapped
    /// by resolve().
    Result<void> set_addresses(const VringAddress& address);
    void set_features(bool indirect, bool event_index) {
        indirect_ = indirect;
        event_index_ = event_index;
    }
    void set_inflight(InflightQueue inflight) { inflight_ = std::move(inflight); }

    /// Looks the rings up in `memory`; again after each change of the memory. False when a ring is
    /// not (or no longer) mapped.
    bool resolve(const GuestMemory& memory);
    bool resolved() const { return available_ != nullptr; }
    uint16_t size() const { return size_; }

    // ---- Running ------------------------------------------------------------------------------

    /// Begins at the base, or where the in-flight region says. Needs a size and resolved rings.
    Result<void> start();
    bool started() const { return started_; }
    /// Returns the index to continue from. Nothing popped may be outstanding.
    uint16_t stop();

    /// Takes the next chain: one that was in flight before a crash, else one newly made available.
    /// False when there is none. kProtocol when the guest broke the rules.
    Result<bool> pop(const GuestMemory& memory, Chain& chain);
    /// Some that were in flight before a crash have not been popped yet.
    bool has_recovered() const { return !resubmit_.empty(); }
    /// Chains that pop() would give, as far as the guest is to be believed.
    size_t waiting() const;
    /// Records a completion; the driver sees it after publish().
    void push(uint16_t head, uint32_t written_bytes);
    /// Makes pushed completions visible. True when the driver wants to be called.
    bool publish();
    bool has_unpublished() const { return !staged_.empty(); }

    /// Asks the driver not to kick while we are looking anyway.
    void disable_notifications();
    /// Asks for kicks again; true when something arrived in between and must be popped first.
    bool enable_notifications();

  private:
    Result<void> recover_inflight();
    Result<void> walk(const GuestMemory& memory, uint16_t head, Chain& chain);
    Result<void> walk_indirect(const GuestMemory& memory, const Descriptor& indirect, Chain& chain);
    Result<void> append(const GuestMemory& memory, const Descriptor& descriptor, Chain& chain);
    uint16_t available_index() const;
    uint16_t used_index_in_ring() const;

    uint16_t size_ = 0;
    uint16_t base_ = 0;
    bool indirect_ = false;
    bool event_index_ = false;
    bool started_ = false;
    bool notify_valid_ = false;  ///< False until the first publish: then the driver is told.
    uint16_t last_available_ = 0;
    uint16_t used_ = 0;             ///< Next used index to publish.
    std::vector<uint16_t> staged_;  ///< Heads in the used ring that its index does not cover yet.
    uint64_t counter_ = 0;

    uint64_t descriptor_address_ = 0;
    uint64_t available_address_ = 0;
    uint64_t used_address_ = 0;
    bool addresses_set_ = false;
    uint8_t* descriptors_ = nullptr;
    uint8_t* available_ = nullptr;
    uint8_t* used_ring_ = nullptr;

    InflightQueue inflight_;
    std::vector<uint16_t> resubmit_;  ///< Heads to hand out again, the next one last.
    std::vector<bool> outstanding_;   ///< By head: popped and not pushed.
    std::vector<Descriptor> table_;   ///< Copy of the indirect table being walked.
};

}  // namespace stellarium::vhost
