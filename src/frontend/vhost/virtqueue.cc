// The layout of the rings (VIRTIO 1.2, section 2.7):
//
//   descriptor table   16 bytes each: address, length, flags, next
//   available ring     flags, idx, ring[size], used_event      (written by the driver)
//   used ring          flags, idx, (id, length)[size], avail_event   (written by the device)
#include "frontend/vhost/virtqueue.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstring>

#include <fmt/core.h>

#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

namespace {

constexpr size_t kRingIndexOffset = 2;
constexpr size_t kRingEntriesOffset = 4;

constexpr uint64_t available_ring_bytes(uint64_t size) {
    return 6 + 2 * size;
}
constexpr uint64_t used_ring_bytes(uint64_t size) {
    return 6 + 8 * size;
}

/// A 16-bit field in memory that another process writes to; `at` is 2-aligned (checked when the
/// ring address was set).
std::atomic_ref<uint16_t> field16(uint8_t* at) {
    return std::atomic_ref<uint16_t>(*reinterpret_cast<uint16_t*>(at));
}

/// The driver wants a call when its event index lies in the range just published.
bool crosses(uint16_t event, uint16_t now, uint16_t before) {
    return static_cast<uint16_t>(now - event - 1) < static_cast<uint16_t>(now - before);
}

}  // namespace

Result<void> Virtqueue::set_size(uint32_t size) {
    if (started_) {
        return fail(ErrorCode::kProtocol, "size of a running ring changed");
    }
    if (size == 0 || size > kMaxQueueSize || (size & (size - 1)) != 0) {
        return fail(ErrorCode::kProtocol, fmt::format("ring size {} is not a power of two up to {}",
                                                      size, kMaxQueueSize));
    }
    size_ = static_cast<uint16_t>(size);
    available_ = nullptr;
    return {};
}

Result<void> Virtqueue::set_addresses(const VringAddress& address) {
    if (address.descriptor % 16 != 0 || address.available % 2 != 0 || address.used % 4 != 0) {
        return fail(
            ErrorCode::kProtocol,
            fmt::format("misaligned ring addresses {:#x}, {:#x}, {:#x}", address.descriptor.get(),
                        address.available.get(), address.used.get()));
    }
    descriptor_address_ = address.descriptor;
    available_address_ = address.available;
    used_address_ = address.used;
    addresses_set_ = true;
    return {};
}

bool Virtqueue::resolve(const GuestMemory& memory) {
    available_ = nullptr;
    if (!addresses_set_ || size_ == 0) {
        return false;
    }
    uint8_t* descriptors = memory.find_user(descriptor_address_, size_ * sizeof(Descriptor));
    uint8_t* available = memory.find_user(available_address_, available_ring_bytes(size_));
    uint8_t* used = memory.find_user(used_address_, used_ring_bytes(size_));
    auto aligned = [](const uint8_t* at, uintptr_t to) {
        return reinterpret_cast<uintptr_t>(at) % to == 0;
    };
    // The host address differs from the user address by what the front-end chose as mmap offset, so
    // its alignment is checked on its own.
    if (descriptors == nullptr || available == nullptr || used == nullptr ||
        !aligned(available, 2) || !aligned(used, 4)) {
        return false;
    }
    descriptors_ = descriptors;
    available_ = available;
    used_ring_ = used;
    return true;
}

uint16_t Virtqueue::available_index() const {
    return field16(available_ + kRingIndexOffset).load(std::memory_order_acquire);
}

uint16_t Virtqueue::used_index_in_ring() const {
    return field16(used_ring_ + kRingIndexOffset).load(std::memory_order_acquire);
}

Result<void> Virtqueue::start() {
    assert(size_ != 0 && resolved() && !started_);
    outstanding_.assign(size_, false);
    resubmit_.clear();
    staged_.clear();
    notify_valid_ = false;
    used_ = used_index_in_ring();
    last_available_ = base_;
    if (inflight_.header != nullptr) {
        STELLARIUM_TRY(recover_inflight());
    }
    started_ = true;
    return {};
}

Result<void> Virtqueue::recover_inflight() {
    InflightHeader& header = *inflight_.header;
    if (inflight_.queue_size < size_) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("in-flight region for rings of {} does not fit a ring of {}",
                                inflight_.queue_size, size_));
    }
    std::atomic_ref<uint16_t> version(header.version);
    std::atomic_ref<uint16_t> recorded_used(header.used_index);
    if (version.load() == 0) {
        // A region that was never used.
        header.features = 0;
        header.descriptors = size_;
        header.last_batch_head = 0;
        recorded_used.store(used_);
        version.store(kInflightVersion);
        counter_ = 0;
        return {};
    }
    if (version.load() != kInflightVersion) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("in-flight region of version {}", header.version));
    }
    // The used index moved on, but the marks of that last batch were not all cleared.
    auto batch = static_cast<uint16_t>(used_ - recorded_used.load());
    if (batch > size_) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("in-flight region says used index {}, the ring says {}",
                                header.used_index, used_));
    }
    uint16_t head = header.last_batch_head;
    for (; batch > 0; --batch) {
        if (head >= size_) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("in-flight region lists descriptor {} of {}", head, size_));
        }
        inflight_.states[head].in_flight = 0;
        head = inflight_.states[head].next;
    }
    recorded_used.store(used_);

    // Counters may change under us: sort a copy.
    std::vector<std::pair<uint64_t, uint16_t>> found;
    for (uint16_t i = 0; i < size_; ++i) {
        if (inflight_.states[i].in_flight != 0) {
            found.emplace_back(inflight_.states[i].counter, i);
        }
    }
    std::ranges::sort(found, std::greater<>());
    for (const auto& [counter, index] : found) {
        resubmit_.push_back(index);
    }
    counter_ = found.empty() ? 0 : found.front().first + 1;
    last_available_ = static_cast<uint16_t>(used_ + found.size());
    return {};
}

uint16_t Virtqueue::stop() {
    if (!started_) {
        return base_;
    }
    started_ = false;
    base_ = last_available_;
    return last_available_;
}

size_t Virtqueue::waiting() const {
    const auto available = static_cast<uint16_t>(available_index() - last_available_);
    return resubmit_.size() + std::min(available, size_);
}

Result<bool> Virtqueue::pop(const GuestMemory& memory, Chain& chain) {
    chain.readable.clear();
    chain.writable.clear();
    uint16_t head = 0;
    if (!resubmit_.empty()) {
        head = resubmit_.back();
        resubmit_.pop_back();
    } else {
        auto waiting = static_cast<uint16_t>(available_index() - last_available_);
        if (waiting == 0) {
            return false;
        }
        if (waiting > size_) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("available index {} is {} ahead in a ring of {}",
                                    available_index(), waiting, size_));
        }
        size_t slot = last_available_ % size_;
        head = field16(available_ + kRingEntriesOffset + 2 * slot).load(std::memory_order_relaxed);
        if (head >= size_) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("available ring names descriptor {} of {}", head, size_));
        }
        if (outstanding_[head]) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("descriptor {} made available while in flight", head));
        }
        ++last_available_;
        if (inflight_.header != nullptr) {
            InflightState& state = inflight_.states[head];
            state.counter = counter_++;
            std::atomic_ref<uint8_t>(state.in_flight).store(1, std::memory_order_release);
        }
    }
    chain.head = head;
    outstanding_[head] = true;
    STELLARIUM_TRY(walk(memory, head, chain));
    return true;
}

Result<void> Virtqueue::walk(const GuestMemory& memory, uint16_t head, Chain& chain) {
    Descriptor descriptor;
    uint16_t index = head;
    // A chain is no longer than its ring, so a loop ends at the bound.
    for (size_t visited = 0;; ++visited) {
        if (visited == size_) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("descriptor chain from {} is longer than its ring", head));
        }
        std::memcpy(&descriptor, descriptors_ + index * sizeof(descriptor), sizeof(descriptor));
        if ((descriptor.flags & kDescriptorIndirect) != 0) {
            return walk_indirect(memory, descriptor, chain);
        }
        STELLARIUM_TRY(append(memory, descriptor, chain));
        if ((descriptor.flags & kDescriptorNext) == 0) {
            return {};
        }
        if (descriptor.next >= size_) {
            return fail(ErrorCode::kProtocol, fmt::format("descriptor {} continues at {} of {}",
                                                          index, descriptor.next, size_));
        }
        index = descriptor.next;
    }
}

Result<void> Virtqueue::walk_indirect(const GuestMemory& memory, const Descriptor& indirect,
                                      Chain& chain) {
    // The write flag of such a descriptor means nothing (VIRTIO 1.2, 2.7.5.3.2).
    if (!indirect_ || (indirect.flags & kDescriptorNext) != 0) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("indirect descriptor with flags {:#x}{}", indirect.flags,
                                indirect_ ? "" : ", which was not negotiated"));
    }
    size_t entries = indirect.length / sizeof(Descriptor);
    if (entries == 0 || entries > kMaxChainDescriptors ||
        indirect.length % sizeof(Descriptor) != 0) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("indirect table of {} bytes", indirect.length));
    }
    table_.resize(entries);
    if (!memory.copy_from(indirect.address, std::as_writable_bytes(std::span(table_)))) {
        return fail(
            ErrorCode::kProtocol,
            fmt::format("indirect table at {:#x} is outside guest memory", indirect.address));
    }
    size_t next = 0;
    for (size_t seen = 0;; ++seen) {
        if (seen >= entries || next >= entries) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("indirect chain leaves or loops in its table of {}", entries));
        }
        const Descriptor& descriptor = table_[next];
        if ((descriptor.flags & kDescriptorIndirect) != 0) {
            return fail(ErrorCode::kProtocol, "indirect descriptor within an indirect table");
        }
        STELLARIUM_TRY(append(memory, descriptor, chain));
        if ((descriptor.flags & kDescriptorNext) == 0) {
            return {};
        }
        next = descriptor.next;
    }
}

Result<void> Virtqueue::append(const GuestMemory& memory, const Descriptor& descriptor,
                               Chain& chain) {
    bool writable = (descriptor.flags & kDescriptorWrite) != 0;
    if (!writable && !chain.writable.empty()) {
        return fail(ErrorCode::kProtocol, "readable descriptor after a writable one");
    }
    if (descriptor.length == 0) {
        return fail(ErrorCode::kProtocol, "descriptor of zero length");
    }
    if (!memory.translate(descriptor.address, descriptor.length,
                          writable ? chain.writable : chain.readable)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("descriptor at {:#x} of {} bytes is outside guest memory",
                                descriptor.address, descriptor.length));
    }
    // Descriptors that span many small regions are the way to make this grow.
    if (chain.readable.size() + chain.writable.size() > kMaxChainSegments) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("descriptor chain of more than {} segments", kMaxChainSegments));
    }
    return {};
}

void Virtqueue::push(uint16_t head, uint32_t written_bytes) {
    outstanding_[head] = false;
    if (inflight_.header != nullptr) {
        inflight_.states[head].next = inflight_.header->last_batch_head;
        std::atomic_ref<uint16_t>(inflight_.header->last_batch_head)
            .store(head, std::memory_order_release);
    }
    UsedElement element{head, written_bytes};
    size_t slot = static_cast<uint16_t>(used_ + staged_.size()) % size_;
    std::memcpy(used_ring_ + kRingEntriesOffset + slot * sizeof(element), &element,
                sizeof(element));
    staged_.push_back(head);
}

bool Virtqueue::publish() {
    if (staged_.empty()) {
        return false;
    }
    uint16_t before = used_;
    used_ = static_cast<uint16_t>(used_ + staged_.size());
    // Sequentially consistent, as is the load of the driver's wish below: the driver stores its
    // wish and then reads the index, we do it the other way round, and one must see the other.
    field16(used_ring_ + kRingIndexOffset).store(used_, std::memory_order_seq_cst);
    if (inflight_.header != nullptr) {
        // From our own list, not from the links in the region, which the guest may spoil.
        for (uint16_t head : staged_) {
            std::atomic_ref<uint8_t>(inflight_.states[head].in_flight)
                .store(0, std::memory_order_release);
        }
        std::atomic_ref<uint16_t>(inflight_.header->used_index)
            .store(used_, std::memory_order_release);
    }
    staged_.clear();
    if (!event_index_) {
        return (field16(available_).load(std::memory_order_seq_cst) & kAvailNoInterrupt) == 0;
    }
    bool first = !notify_valid_;
    notify_valid_ = true;
    uint16_t event = field16(available_ + kRingEntriesOffset + 2 * size_t{size_})
                         .load(std::memory_order_seq_cst);
    return first || crosses(event, used_, before);
}

void Virtqueue::disable_notifications() {
    // With event indices, an old index in the ring is enough to keep the driver quiet.
    if (!event_index_) {
        field16(used_ring_).store(kUsedNoNotify, std::memory_order_relaxed);
    }
}

bool Virtqueue::enable_notifications() {
    // Our wish must be visible before the index is read again, or a kick could be lost: both are
    // sequentially consistent.
    if (event_index_) {
        field16(used_ring_ + kRingEntriesOffset + sizeof(UsedElement) * size_)
            .store(last_available_, std::memory_order_seq_cst);
    } else {
        field16(used_ring_).store(0, std::memory_order_seq_cst);
    }
    return !resubmit_.empty() ||
           field16(available_ + kRingIndexOffset).load(std::memory_order_seq_cst) !=
               last_available_;
}

}  // namespace stellarium::vhost
