#include "frontend/vhost_client/driver_queue.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <thread>

#include <fmt/core.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

namespace stellarium::vhost {

namespace {

constexpr size_t kIndexOffset = 2;
constexpr size_t kEntriesOffset = 4;
/// Entries in the indirect table of each head; longer chains are made of plain descriptors.
constexpr size_t kTableEntries = 130;

std::atomic_ref<uint16_t> field16(std::byte* at) {
    return std::atomic_ref<uint16_t>(*reinterpret_cast<uint16_t*>(at));
}

void add_event(const UniqueFd& fd) {
    uint64_t one = 1;
    [[maybe_unused]] ssize_t n = ::write(fd.get(), &one, sizeof(one));
}

}  // namespace

// ---- GuestRam -----------------------------------------------------------------------------------

Result<std::unique_ptr<GuestRam>> GuestRam::create(uint64_t size_bytes, bool huge_pages) {
    std::unique_ptr<GuestRam> ram(new GuestRam());
    unsigned flags = MFD_CLOEXEC | (huge_pages ? unsigned{MFD_HUGETLB} : 0U);
    ram->fd_ = UniqueFd(::memfd_create("guest-ram", flags));
    if (!ram->fd_ || ::ftruncate(ram->fd_.get(), static_cast<off_t>(size_bytes)) != 0) {
        return std::unexpected(Error::from_errno(errno, "memfd for guest memory"));
    }
    void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ram->fd_.get(), 0);
    if (data == MAP_FAILED) {
        return std::unexpected(Error::from_errno(errno, "mmap of guest memory"));
    }
    ram->data_ = static_cast<std::byte*>(data);
    ram->size_bytes_ = size_bytes;
    return ram;
}

GuestRam::~GuestRam() {
    if (data_ != nullptr) {
        ::munmap(data_, size_bytes_);
    }
}

std::byte* GuestRam::allocate(uint64_t size_bytes, uint64_t alignment) {
    uint64_t at = (allocated_ + alignment - 1) / alignment * alignment;
    if (at + size_bytes > size_bytes_) {
        fmt::print(stderr, "guest memory of {} bytes is used up\n", size_bytes_);
        std::abort();
    }
    allocated_ = at + size_bytes;
    return data_ + at;
}

RegionDescription GuestRam::description() const {
    return RegionDescription{kGuestBase, size_bytes_, kUserBase, 0};
}

// ---- DriverQueue --------------------------------------------------------------------------------

DriverQueue::DriverQueue(GuestRam& ram, uint16_t size, bool event_index, bool indirect)
    : ram_(ram),
      size_(size),
      event_index_(event_index),
      indirect_(indirect),
      descriptors_(reinterpret_cast<Descriptor*>(ram.allocate(size * sizeof(Descriptor), 16))),
      available_(ram.allocate(6 + 2 * size, 64)),
      used_(ram.allocate(6 + sizeof(UsedElement) * size, 64)),
      chains_(size),
      kick_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      call_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      error_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (indirect) {
        tables_ = ram.allocate(size * kTableEntries * sizeof(Descriptor), 64);
    }
    for (uint16_t i = size; i > 0; --i) {
        free_.push_back(static_cast<uint16_t>(i - 1));
    }
}

std::atomic_ref<uint16_t> DriverQueue::available_field(size_t offset) const {
    return field16(available_ + offset);
}
std::atomic_ref<uint16_t> DriverQueue::used_field(size_t offset) const {
    return field16(used_ + offset);
}

std::optional<uint16_t> DriverQueue::add(std::span<const Buffer> buffers) {
    assert(!buffers.empty());
    bool indirect = indirect_ && buffers.size() > 1 && buffers.size() <= kTableEntries;
    if (free_.size() < (indirect ? 1 : buffers.size())) {
        return std::nullopt;
    }
    uint16_t head = free_.back();
    auto fill = [&](Descriptor* table, auto index_of) {
        for (size_t i = 0; i < buffers.size(); ++i) {
            bool last = i + 1 == buffers.size();
            Descriptor entry{};
            entry.address = buffers[i].guest_address;
            entry.length = buffers[i].length_bytes;
            entry.flags = static_cast<uint16_t>((buffers[i].writable ? kDescriptorWrite : 0) |
                                                (last ? 0 : kDescriptorNext));
            entry.next = last ? uint16_t{0} : index_of(i + 1);
            table[index_of(i)] = entry;
        }
    };
    if (indirect) {
        auto* table = reinterpret_cast<Descriptor*>(tables_) + head * kTableEntries;
        fill(table, [](size_t i) { return static_cast<uint16_t>(i); });
        descriptors_[head] = Descriptor{ram_.guest_address(table),
                                        static_cast<uint32_t>(buffers.size() * sizeof(Descriptor)),
                                        kDescriptorIndirect, 0};
        chains_[head].assign(1, head);
        free_.pop_back();
    } else {
        chains_[head].assign(free_.end() - static_cast<ptrdiff_t>(buffers.size()), free_.end());
        std::ranges::reverse(chains_[head]);  // The head, the last of the free ones, comes first.
        free_.resize(free_.size() - buffers.size());
        fill(descriptors_, [&](size_t i) { return chains_[head][i]; });
    }
    write_available(available_index_ % size_, head);
    set_available_index(static_cast<uint16_t>(available_index_ + 1));
    ++outstanding_;
    return head;
}

void DriverQueue::kick() {
    kicked_index_ = available_index_;
    add_event(kick_);
}

void DriverQueue::kick_if_wanted() {
    uint16_t before = kicked_index_;
    kicked_index_ = available_index_;
    bool wanted = false;
    if (event_index_) {
        uint16_t event = available_event();
        wanted = static_cast<uint16_t>(available_index_ - event - 1) <
                 static_cast<uint16_t>(available_index_ - before);
    } else {
        wanted = (used_field(0).load(std::memory_order_seq_cst) & kUsedNoNotify) == 0;
    }
    if (wanted) {
        add_event(kick_);
    }
}

std::optional<UsedElement> DriverQueue::take_used() {
    if (used_index() == used_taken_) {
        return std::nullopt;
    }
    UsedElement element;
    std::memcpy(&element, used_ + kEntriesOffset + used_taken_ % size_ * sizeof(element),
                sizeof(element));
    ++used_taken_;
    if (element.id < size_ && !chains_[element.id].empty()) {
        std::vector<uint16_t>& chain = chains_[element.id];
        // Back in the order in which they were taken, the head last.
        free_.insert(free_.end(), chain.rbegin(), chain.rend());
        chain.clear();
        --outstanding_;
    }
    return element;
}

bool DriverQueue::wait(std::chrono::milliseconds timeout) {
    auto deadline = std::chrono::steady_clock::now() + timeout;
    while (true) {
        set_used_event(used_taken_);  // A call for the very next completion.
        if (used_index() != used_taken_) {
            return true;
        }
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
            deadline - std::chrono::steady_clock::now());
        if (left.count() <= 0) {
            return false;
        }
        pollfd waiting{call_.get(), POLLIN, 0};
        ::poll(&waiting, 1, static_cast<int>(left.count()));
        calls();
    }
}

bool DriverQueue::spin(std::chrono::milliseconds timeout) {
    auto deadline = std::chrono::steady_clock::now() + timeout;
    while (used_index() == used_taken_) {
        if (std::chrono::steady_clock::now() > deadline) {
            return false;
        }
        std::this_thread::yield();
    }
    return true;
}

uint64_t DriverQueue::calls() {
    uint64_t count = 0;
    return ::read(call_.get(), &count, sizeof(count)) == sizeof(count) ? count : 0;
}

VringAddress DriverQueue::addresses(uint32_t index) const {
    VringAddress address;
    address.index = index;
    address.descriptor = ram_.user_address(descriptors_);
    address.available = ram_.user_address(available_);
    address.used = ram_.user_address(used_);
    return address;
}

void DriverQueue::write_available(uint16_t slot, uint16_t head) {
    available_field(kEntriesOffset + 2 * size_t{slot}).store(head, std::memory_order_relaxed);
}
void DriverQueue::set_available_index(uint16_t index) {
    available_index_ = index;
    available_field(kIndexOffset).store(index, std::memory_order_seq_cst);
}
uint16_t DriverQueue::available_index() const {
    return available_index_;
}
uint16_t DriverQueue::used_index() const {
    return used_field(kIndexOffset).load(std::memory_order_seq_cst);
}
void DriverQueue::set_available_flags(uint16_t flags) {
    available_field(0).store(flags, std::memory_order_seq_cst);
}
void DriverQueue::set_used_event(uint16_t event) {
    available_field(kEntriesOffset + 2 * size_t{size_}).store(event, std::memory_order_seq_cst);
}
uint16_t DriverQueue::available_event() const {
    return used_field(kEntriesOffset + sizeof(UsedElement) * size_).load(std::memory_order_seq_cst);
}

}  // namespace stellarium::vhost
