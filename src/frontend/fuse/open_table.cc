#include "frontend/fuse/open_table.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

namespace stellarium::fuse {
namespace {

constexpr uint64_t kMagic = 0x3145'4c42'4154'4f53;  // "SOTABLE1", read as bytes.
constexpr uint32_t kVersion = 1;
constexpr uint32_t kFree = 0;
constexpr uint32_t kOpen = 1;
constexpr size_t kHeaderBytes = 8192;
constexpr size_t kInitBytes = 4096;

}  // namespace

// Native integers: both processes run on this machine, and the file does not outlive it.
struct OpenTable::Header {
    uint64_t magic;
    uint32_t version;
    uint32_t slots;
    std::atomic<uint32_t> init_bytes;  ///< 0: not saved. Written after `init`.
    uint32_t padding;
    std::byte init[kInitBytes];
};

struct OpenTable::Slot {
    std::atomic<uint32_t> state;  ///< Written last.
    std::atomic<uint32_t> generation;
    std::atomic<uint64_t> unique;
    std::atomic<uint64_t> node;
    std::atomic<uint32_t> flags;
    uint32_t padding;
};

namespace {

constexpr unsigned kSlotBits = 16;
static_assert(kMaxOpenFiles == 1U << kSlotBits);
static_assert(std::atomic<uint32_t>::is_always_lock_free &&
              std::atomic<uint64_t>::is_always_lock_free);
constexpr size_t kSlotBytes = 32;
constexpr size_t kTableBytes = kHeaderBytes + size_t{kMaxOpenFiles} * kSlotBytes;

uint64_t handle_of(uint32_t slot, uint32_t generation) {
    return uint64_t{generation} << kSlotBits | slot;
}

}  // namespace

Result<UniqueFd> OpenTable::create() {
    UniqueFd memory(memfd_create("stellarium-open-files", MFD_CLOEXEC));
    if (!memory || ftruncate(memory.get(), kTableBytes) != 0) {
        return std::unexpected(Error::from_errno(errno, "make the table of open files"));
    }
    void* const mapped =
        mmap(nullptr, kHeaderBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
    if (mapped == MAP_FAILED) {
        return std::unexpected(Error::from_errno(errno, "map the table of open files"));
    }
    auto* const header = static_cast<Header*>(mapped);
    header->magic = kMagic;
    header->version = kVersion;
    header->slots = kMaxOpenFiles;
    munmap(mapped, kHeaderBytes);
    return memory;
}

Result<std::unique_ptr<OpenTable>> OpenTable::map(UniqueFd memory) {
    static_assert(sizeof(Header) <= kHeaderBytes && sizeof(Slot) == kSlotBytes);
    struct stat status{};
    if (fstat(memory.get(), &status) != 0) {
        return std::unexpected(Error::from_errno(errno, "look at the table of open files"));
    }
    if (std::cmp_not_equal(status.st_size, kTableBytes)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("the holder's table of open files has {} bytes, and {} are "
                                "expected: it is of another version",
                                status.st_size, kTableBytes));
    }
    void* const mapped =
        mmap(nullptr, kTableBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
    if (mapped == MAP_FAILED) {
        return std::unexpected(Error::from_errno(errno, "map the table of open files"));
    }
    std::unique_ptr<OpenTable> table(new OpenTable(std::move(memory), mapped));
    const Header& header = *table->header_;
    if (header.magic != kMagic || header.version != kVersion || header.slots != kMaxOpenFiles ||
        header.init_bytes.load() > kInitBytes) {
        return fail(
            ErrorCode::kProtocol,
            fmt::format("the holder's table of open files is of version {}, and this "
                        "program knows {}: close the files, unmount the directory and start "
                        "the daemon again",
                        header.version, kVersion));
    }
    return table;
}

OpenTable::OpenTable(UniqueFd memory, void* mapped)
    : memory_(std::move(memory)),
      header_(static_cast<Header*>(mapped)),
      // Slots of 32 bytes from a page border on.
      slots_(reinterpret_cast<Slot*>(static_cast<std::byte*>(mapped) + kHeaderBytes)) {
    for (uint32_t i = kMaxOpenFiles; i-- > 0;) {
        if (slots_[i].state.load(std::memory_order_acquire) == kOpen) {
            left_.emplace(slots_[i].unique.load(), handle_of(i, slots_[i].generation.load()));
        } else {
            free_.push_back(i);
        }
    }
}

OpenTable::~OpenTable() {
    munmap(header_, kTableBytes);
}

Bytes OpenTable::init_request() const {
    return Bytes(header_->init).first(header_->init_bytes.load(std::memory_order_acquire));
}

Result<void> OpenTable::save_init(Bytes request) {
    if (request.size() > kInitBytes) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("the kernel's INIT request has {} bytes", request.size()));
    }
    std::memcpy(header_->init, request.data(), request.size());
    header_->init_bytes.store(static_cast<uint32_t>(request.size()), std::memory_order_release);
    return {};
}

OpenTable::Slot* OpenTable::slot_of(uint64_t handle) const {
    Slot* const slot = slots_ + handle % kMaxOpenFiles;
    return slot->state.load(std::memory_order_acquire) == kOpen &&
                   slot->generation.load() == handle >> kSlotBits
               ? slot
               : nullptr;
}

std::vector<OpenFile> OpenTable::files() const {
    const std::lock_guard lock(mutex_);
    std::vector<OpenFile> files;
    for (uint32_t i = 0; i < kMaxOpenFiles && files.size() < kMaxOpenFiles - free_.size(); ++i) {
        const Slot& slot = slots_[i];
        if (slot.state.load(std::memory_order_acquire) == kOpen) {
            files.push_back({.unique = slot.unique.load(),
                             .node = slot.node.load(),
                             .flags = slot.flags.load(),
                             .handle = handle_of(i, slot.generation.load())});
        }
    }
    return files;
}

size_t OpenTable::count() const {
    const std::lock_guard lock(mutex_);
    return kMaxOpenFiles - free_.size();
}

Result<uint64_t> OpenTable::add(const OpenFile& file) {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("{} files are open, and no more can be", kMaxOpenFiles));
    }
    const uint32_t index = free_.back();
    free_.pop_back();
    Slot& slot = slots_[index];
    // Never 0, so that no handle is.
    const uint32_t generation = std::max<uint32_t>(slot.generation.load() + 1, 1);
    slot.generation.store(generation);
    slot.unique.store(file.unique);
    slot.node.store(file.node);
    slot.flags.store(file.flags);
    slot.state.store(kOpen, std::memory_order_release);
    return handle_of(index, generation);
}

std::optional<OpenFile> OpenTable::find_left(uint64_t unique) const {
    std::optional<uint64_t> handle;
    {
        const std::lock_guard lock(mutex_);
        if (const auto found = left_.find(unique); found != left_.end()) {
            handle = found->second;
        }
    }
    return handle ? find(*handle) : std::nullopt;
}

std::optional<OpenFile> OpenTable::find(uint64_t handle) const {
    const Slot* const slot = slot_of(handle);
    if (slot == nullptr) {
        return std::nullopt;
    }
    return OpenFile{.unique = slot->unique.load(),
                    .node = slot->node.load(),
                    .flags = slot->flags.load(),
                    .handle = handle};
}

bool OpenTable::remove(uint64_t handle) {
    const std::lock_guard lock(mutex_);
    Slot* const slot = slot_of(handle);
    if (slot == nullptr) {
        return false;
    }
    left_.erase(slot->unique.load());
    slot->state.store(kFree, std::memory_order_release);
    free_.push_back(static_cast<uint32_t>(handle % kMaxOpenFiles));
    return true;
}

}  // namespace stellarium::fuse
