#include "frontend/vhost/guest_memory.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>

#include <fmt/core.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

// ---- The fault guard ----------------------------------------------------------------------------

/// One guarded mapping. `begin` is zero while the slot is free; it is stored last when the slot is
/// taken and first when it is given back, so that the handler never sees a mixture.
struct FaultGuardSlot {
    std::atomic<uintptr_t> begin{0};
    std::atomic<uintptr_t> end{0};
    std::atomic<bool> lost{false};
};

namespace {

/// Slots are never freed: the handler may walk them at any moment, without a lock.
struct SlotChunk {
    std::array<FaultGuardSlot, 256> slots;
    std::atomic<SlotChunk*> next{nullptr};
};

SlotChunk g_first_chunk;
std::mutex g_slots_mutex;
struct sigaction g_previous_action;
std::atomic<size_t> g_mappings{0};

std::vector<FaultGuardSlot*>& free_slots() {
    static auto* list = new std::vector<FaultGuardSlot*>();  // Outlives every static mapping.
    return *list;
}

FaultGuardSlot* take_slot(uintptr_t begin, uintptr_t end) {
    std::lock_guard lock(g_slots_mutex);
    static SlotChunk* last_chunk = nullptr;
    std::vector<FaultGuardSlot*>& free_list = free_slots();
    if (free_list.empty()) {
        SlotChunk* chunk = &g_first_chunk;
        if (last_chunk != nullptr) {
            chunk = new SlotChunk();
            last_chunk->next.store(chunk, std::memory_order_release);
        }
        last_chunk = chunk;
        for (FaultGuardSlot& slot : chunk->slots) {
            free_list.push_back(&slot);
        }
    }
    FaultGuardSlot* slot = free_list.back();
    free_list.pop_back();
    slot->lost.store(false);
    slot->end.store(end);
    slot->begin.store(begin);
    return slot;
}

void give_back_slot(FaultGuardSlot* slot) {
    std::lock_guard lock(g_slots_mutex);
    slot->begin.store(0);
    free_slots().push_back(slot);
}

/// Async-signal-safe: atomics and one mmap system call.
bool replace_faulted_mapping(uintptr_t address) {
    for (SlotChunk* chunk = &g_first_chunk; chunk != nullptr;
         chunk = chunk->next.load(std::memory_order_acquire)) {
        for (FaultGuardSlot& slot : chunk->slots) {
            uintptr_t begin = slot.begin.load();
            if (begin == 0 || address < begin) {
                continue;
            }
            uintptr_t end = slot.end.load();
            if (address >= end || slot.begin.load() != begin) {
                continue;
            }
            slot.lost.store(true);
            // The system call itself: nothing that wraps mmap() may do its own work in a handler.
            // Threads that are using the range meanwhile are what this is for.
            return ::syscall(SYS_mmap, begin, end - begin, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != -1;
        }
    }
    return false;
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
    int saved_errno = errno;
    if (replace_faulted_mapping(reinterpret_cast<uintptr_t>(info->si_addr))) {
        errno = saved_errno;
        return;
    }
    if ((g_previous_action.sa_flags & SA_SIGINFO) != 0 &&
        g_previous_action.sa_sigaction != nullptr) {
        g_previous_action.sa_sigaction(signal, info, context);
    } else if (g_previous_action.sa_handler != SIG_DFL && g_previous_action.sa_handler != SIG_IGN) {
        g_previous_action.sa_handler(signal);
    } else {
        // Not ours: returning runs the faulting instruction again, which then ends the process.
        struct sigaction action = {};
        action.sa_handler = SIG_DFL;
        ::sigaction(SIGBUS, &action, nullptr);
    }
    errno = saved_errno;
}

bool waits_for_others(const struct statfs& fs) {
    // Not all of these have a name in <linux/magic.h>.
    constexpr std::array<uint32_t, 6> kRemote = {FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC,
                                                 SMB_SUPER_MAGIC,  CIFS_SUPER_MAGIC,
                                                 V9FS_MAGIC,       CEPH_SUPER_MAGIC};
    return std::ranges::find(kRemote, static_cast<uint32_t>(fs.f_type)) != kRemote.end();
}

bool overlaps(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size) {
    return a < b + b_size && b < a + a_size;
}

}  // namespace

void install_fault_guard() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        ::sigemptyset(&action.sa_mask);
        ::sigaction(SIGBUS, &action, &g_previous_action);
    });
}

// ---- SharedMapping ------------------------------------------------------------------------------

Result<std::shared_ptr<SharedMapping>> SharedMapping::map(int fd, uint64_t offset_bytes,
                                                          uint64_t size_bytes) {
    struct stat st = {};
    struct statfs fs = {};
    if (::fstat(fd, &st) != 0 || ::fstatfs(fd, &fs) != 0) {
        return std::unexpected(Error::from_errno(errno, "fstat of shared memory"));
    }
    if (!S_ISREG(st.st_mode)) {
        return fail(ErrorCode::kProtocol, "shared memory is not a regular file");
    }
    if (waits_for_others(fs)) {
        return fail(ErrorCode::kUnsupported,
                    "shared memory on FUSE or a network file system could stall the server; use a "
                    "memfd, tmpfs or huge pages");
    }
    uint64_t file_bytes = static_cast<uint64_t>(st.st_size);
    if (size_bytes == 0 || size_bytes > kMaxGuestMemoryBytes || offset_bytes > file_bytes ||
        size_bytes > file_bytes - offset_bytes) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("shared memory of {} bytes at offset {} does not lie within its "
                                "file of {} bytes",
                                size_bytes, offset_bytes, file_bytes));
    }
    // A huge page file maps only at multiples of its page size, and unmaps only by whole pages.
    uint64_t align = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    if (static_cast<uint64_t>(fs.f_type) == HUGETLBFS_MAGIC) {
        align = static_cast<uint64_t>(fs.f_bsize);
    }
    uint64_t lead = offset_bytes % align;
    uint64_t map_bytes = (lead + size_bytes + align - 1) / align * align;
    if (g_mappings.fetch_add(1) >= kMaxGuestMappings) {
        g_mappings.fetch_sub(1);
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("{} pieces of guests' memory are mapped already, and more are not "
                                "taken",
                                kMaxGuestMappings));
    }
    void* base = ::mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                        static_cast<off_t>(offset_bytes - lead));
    if (base == MAP_FAILED) {
        g_mappings.fetch_sub(1);
        return std::unexpected(
            Error::from_errno(errno, fmt::format("mmap of {} bytes of shared memory", map_bytes)));
    }
    // A core dump of the server does not carry the guests' memory; failing to say so is harmless.
    (void)::madvise(base, map_bytes, MADV_DONTDUMP);
    std::shared_ptr<SharedMapping> mapping(new SharedMapping());
    mapping->map_base_ = base;
    mapping->map_bytes_ = map_bytes;
    mapping->data_ = static_cast<uint8_t*>(base) + lead;
    mapping->size_bytes_ = size_bytes;
    uintptr_t begin = reinterpret_cast<uintptr_t>(base);
    mapping->guard_ = take_slot(begin, begin + map_bytes);
    return mapping;
}

SharedMapping::~SharedMapping() {
    if (guard_ != nullptr) {
        give_back_slot(guard_);
        ::munmap(map_base_, map_bytes_);
        g_mappings.fetch_sub(1);
    }
}

bool SharedMapping::lost() const {
    return guard_->lost.load(std::memory_order_relaxed);
}

// ---- GuestMemory --------------------------------------------------------------------------------

Result<std::shared_ptr<const GuestMemory>> GuestMemory::with(MemoryRegion region) const {
    if (regions_.size() >= kMaxMemorySlots) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("more than {} memory regions", kMaxMemorySlots));
    }
    uint64_t size = region.size_bytes;
    if (size == 0 || region.guest_address + size < size || region.user_address + size < size) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("memory region at guest address {:#x} of {} bytes is empty or "
                                "wraps around",
                                region.guest_address, size));
    }
    uint64_t total = size;
    for (const MemoryRegion& other : regions_) {
        if (overlaps(region.guest_address, size, other.guest_address, other.size_bytes) ||
            overlaps(region.user_address, size, other.user_address, other.size_bytes)) {
            return fail(
                ErrorCode::kProtocol,
                fmt::format("memory region at guest address {:#x} overlaps the one at {:#x}",
                            region.guest_address, other.guest_address));
        }
        total += other.size_bytes;
    }
    if (total > kMaxGuestMemoryBytes) {
        return fail(ErrorCode::kLimitExceeded, fmt::format("{} bytes of guest memory", total));
    }
    auto result = std::make_shared<GuestMemory>(*this);
    auto place = std::ranges::upper_bound(result->regions_, region.guest_address, {},
                                          &MemoryRegion::guest_address);
    result->regions_.insert(place, std::move(region));
    return result;
}

Result<std::shared_ptr<const GuestMemory>> GuestMemory::without(uint64_t guest_address,
                                                                uint64_t size_bytes,
                                                                uint64_t user_address) const {
    auto result = std::make_shared<GuestMemory>(*this);
    size_t erased = std::erase_if(result->regions_, [&](const MemoryRegion& region) {
        return region.guest_address == guest_address && region.size_bytes == size_bytes &&
               region.user_address == user_address;
    });
    if (erased == 0) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("no memory region at guest address {:#x} of {} bytes to remove",
                                guest_address, size_bytes));
    }
    return result;
}

const MemoryRegion* GuestMemory::find(uint64_t guest_address) const {
    auto after =
        std::ranges::upper_bound(regions_, guest_address, {}, &MemoryRegion::guest_address);
    if (after == regions_.begin()) {
        return nullptr;
    }
    const MemoryRegion& region = *std::prev(after);
    return guest_address - region.guest_address < region.size_bytes ? &region : nullptr;
}

bool GuestMemory::translate(uint64_t guest_address, uint64_t length_bytes,
                            std::vector<iovec>& out) const {
    while (length_bytes > 0) {
        const MemoryRegion* region = find(guest_address);
        if (region == nullptr) {
            return false;
        }
        uint64_t offset = guest_address - region->guest_address;
        uint64_t part = std::min(length_bytes, region->size_bytes - offset);
        uint8_t* host = region->mapping->data() + offset;
        if (!out.empty() &&
            static_cast<uint8_t*>(out.back().iov_base) + out.back().iov_len == host) {
            out.back().iov_len += part;
        } else {
            out.push_back(iovec{host, part});
        }
        guest_address += part;
        length_bytes -= part;
    }
    return true;
}

bool GuestMemory::copy_from(uint64_t guest_address, MutableBytes into) const {
    while (!into.empty()) {
        const MemoryRegion* region = find(guest_address);
        if (region == nullptr) {
            return false;
        }
        uint64_t offset = guest_address - region->guest_address;
        uint64_t part = std::min<uint64_t>(into.size(), region->size_bytes - offset);
        std::memcpy(into.data(), region->mapping->data() + offset, part);
        guest_address += part;
        into = into.subspan(part);
    }
    return true;
}

uint8_t* GuestMemory::find_user(uint64_t user_address, uint64_t length_bytes) const {
    for (const MemoryRegion& region : regions_) {
        uint64_t offset = user_address - region.user_address;
        if (user_address >= region.user_address && offset < region.size_bytes &&
            length_bytes <= region.size_bytes - offset) {
            return region.mapping->data() + offset;
        }
    }
    return nullptr;
}

bool GuestMemory::lost() const {
    return std::ranges::any_of(regions_,
                               [](const MemoryRegion& region) { return region.mapping->lost(); });
}

}  // namespace stellarium::vhost
