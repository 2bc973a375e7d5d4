#include "nova/arena.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <new>

#include <fmt/format.h>

#include "base/hash.h"
#include "base/units.h"

namespace stellarium::nova {
namespace {

using format::ArenaHeader;
using format::ArenaSlot;
using format::ArenaSlotKind;

constexpr size_t kBitmapWords = nebula::kLeafPages / 64;
constexpr size_t kChecksumOffset = offsetof(ArenaSlot, checksum);

uint64_t header_bytes(uint32_t slot_count) {
    const uint64_t bytes = uint64_t{slot_count} * sizeof(ArenaSlot);
    return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

uint64_t file_bytes(uint32_t slot_count) {
    return kPageBytes + header_bytes(slot_count) + uint64_t{slot_count} * kPageBytes;
}

uint32_t slots_of_budget(uint64_t budget_bytes) {
    return static_cast<uint32_t>(
        std::clamp(budget_bytes, kMinDirtyBudgetBytes, kMaxDirtyBudgetBytes) / kPageBytes);
}

uint64_t slot_checksum(const ArenaSlot& slot) {
    const uint64_t sum = checksum64(bytes_of(slot).first(kChecksumOffset));
    return sum == 0 ? 1 : sum;  // Zero means free.
}

/// A 64-bit word of the mapped memory; all of them are aligned.
std::atomic_ref<uint64_t> word_at(std::byte* place) {
    assert(reinterpret_cast<uintptr_t>(place) % alignof(uint64_t) == 0);
    return std::atomic_ref<uint64_t>(*std::launder(reinterpret_cast<uint64_t*>(place)));
}

uint64_t to_little_endian(uint64_t value) {
    const U64Le packed(value);
    uint64_t word = 0;
    std::memcpy(&word, &packed, sizeof word);
    return word;
}

/// Stores into memory that the file system has no room for would kill the process.
Result<void> allocate_all(io::File& file, uint64_t bytes) {
    auto allocated = file.allocate(0, bytes);
    if (!allocated && allocated.error().code() == ErrorCode::kNoSpace) {
        return fail(ErrorCode::kNoSpace,
                    fmt::format("the buffer for guest writes takes {} in the runtime directory, "
                                "which has no room for it: make room there, choose another "
                                "directory (--runtime-dir) or a smaller buffer (--memory): {}",
                                format_size(bytes), allocated.error().message()));
    }
    return allocated;
}

}  // namespace

Result<Identity> boot_identity(io::FileSystem& files) {
    Identity identity{};
    auto file = files.open("/proc/sys/kernel/random/boot_id", io::OpenMode::kReadOnly);
    if (!file) {
        if (file.error().code() == ErrorCode::kNotFound) {
            return identity;
        }
        return std::unexpected(std::move(file).error());
    }
    std::array<std::byte, 64> text{};
    STELLARIUM_ASSIGN(const size_t got, io::read_up_to(**file, text, 0));
    if (got > 0) {
        const Hash256 digest = hash(Bytes(text).first(got));
        std::copy_n(digest.bytes.begin(), identity.size(), identity.begin());
    }
    return identity;
}

Arena::~Arena() = default;

void Arena::lay_out(MutableBytes memory, uint32_t slot_count) {
    memory_ = memory;
    slot_count_ = slot_count;
    data_offset_ = kPageBytes + header_bytes(slot_count);
    free_.reserve(slot_count);
}

std::unique_ptr<Arena> Arena::make_private(uint64_t budget_bytes) {
    std::unique_ptr<Arena> arena(new Arena());
    const uint32_t slot_count = slots_of_budget(budget_bytes);
    const uint64_t bytes = file_bytes(slot_count);
    // calloc gives untouched zero pages: memory is taken as slots are used.
    auto* memory = static_cast<std::byte*>(std::calloc(1, bytes));
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    arena->private_memory_ = {memory, &std::free};
    arena->lay_out(MutableBytes(memory, bytes), slot_count);
    for (uint32_t i = slot_count; i > 0; --i) {
        arena->free_.push_back(i - 1);
    }
    arena->free_count_ = slot_count;
    return arena;
}

Result<std::unique_ptr<Arena>> Arena::make_file(const io::Env& env, const std::string& path,
                                                uint64_t budget_bytes, const ArenaOwner& owner,
                                                const Identity& identity,
                                                const Identity& previous) {
    const uint32_t slot_count = slots_of_budget(budget_bytes);
    STELLARIUM_ASSIGN(const Identity boot, boot_identity(*env.files));
    const std::string fresh = path + ".new";
    // What is at `path` is not needed, and its room may be.
    for (const std::string& old : {fresh, path}) {
        STELLARIUM_ASSIGN(const bool there, env.files->exists(old));
        if (there) {
            STELLARIUM_TRY(env.files->remove(old));
        }
    }
    STELLARIUM_ASSIGN(auto file, env.files->open(fresh, io::OpenMode::kCreateNew));
    STELLARIUM_TRY(file->lock());
    STELLARIUM_TRY(file->truncate(file_bytes(slot_count)));
    if (auto allocated = allocate_all(*file, file_bytes(slot_count)); !allocated) {
        [[maybe_unused]] const auto best_effort = env.files->remove(fresh);
        return std::unexpected(std::move(allocated).error());
    }
    STELLARIUM_ASSIGN(const MutableBytes memory, file->map_shared(0, file_bytes(slot_count)));

    ArenaHeader header{};
    header.magic = format::kArenaMagic;
    header.version = format::kArenaVersion;
    header.slot_count = slot_count;
    header.store = owner.store;
    header.arena = identity;
    header.previous = previous;
    header.boot = boot;
    header.device = owner.superblock.device;
    header.inode = owner.superblock.inode;
    header.checksum = checksum64(bytes_of(header).first(offsetof(ArenaHeader, checksum)));
    std::memcpy(memory.data(), &header, sizeof header);
    STELLARIUM_TRY(env.files->rename(fresh, path));

    std::unique_ptr<Arena> arena(new Arena());
    arena->files_ = env.files;
    arena->path_ = path;
    arena->identity_ = identity;
    arena->file_ = std::move(file);
    arena->lay_out(memory, slot_count);
    for (uint32_t i = slot_count; i > 0; --i) {
        arena->free_.push_back(i - 1);
    }
    arena->free_count_ = slot_count;
    return arena;
}

Result<std::unique_ptr<Arena>> Arena::open_file(const io::Env& env, const std::string& path,
                                                const ArenaOwner& owner, const Identity& named,
                                                std::string& why) {
    STELLARIUM_ASSIGN(const bool there, env.files->exists(path));
    if (!there) {
        why = fmt::format("{} is gone, as after a restart of the host", path);
        return nullptr;
    }
    STELLARIUM_ASSIGN(auto file, env.files->open(path, io::OpenMode::kReadWrite));
    STELLARIUM_ASSIGN(const uint64_t size_bytes, file->size_bytes());
    if (size_bytes < kPageBytes) {
        why = fmt::format("{} is too short to be an arena", path);
        return nullptr;
    }
    ArenaHeader header{};
    std::array<std::byte, sizeof header> raw{};
    STELLARIUM_TRY(io::read_exact(*file, raw, 0));
    header = load<ArenaHeader>(raw);
    if (header.magic != format::kArenaMagic ||
        header.checksum != checksum64(Bytes(raw).first(offsetof(ArenaHeader, checksum)))) {
        why = fmt::format("{} is not an arena", path);
        return nullptr;
    }
    if (header.version != format::kArenaVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{} has arena format {}, and this version knows {}: stop the pool "
                                "cleanly with the version that wrote it",
                                path, header.version.get(), format::kArenaVersion));
    }
    if (header.store != owner.store || (header.arena != named && header.previous != named)) {
        why = fmt::format("{} belongs to another store or another run", path);
        return nullptr;
    }
    if (header.device != owner.superblock.device || header.inode != owner.superblock.inode) {
        why = fmt::format(
            "{} belongs to another copy of this store, and stays as it is for that one", path);
        return nullptr;
    }
    STELLARIUM_ASSIGN(const Identity boot, boot_identity(*env.files));
    if (header.boot != boot || boot == Identity{}) {
        // Not on a memory file system: the host may have kept any part of it.
        why = boot == Identity{}
                  ? fmt::format(
                        "nothing tells whether {} is of this boot of the host: the system "
                        "has no boot id",
                        path)
                  : fmt::format("{} was left by an earlier boot of the host", path);
        return nullptr;
    }
    const uint32_t slot_count = header.slot_count;
    if (slot_count == 0 || size_bytes != file_bytes(slot_count)) {
        why = fmt::format("{} has {} bytes, which does not fit its {} slots", path, size_bytes,
                          slot_count);
        return nullptr;
    }
    STELLARIUM_TRY(file->lock());
    STELLARIUM_TRY(allocate_all(*file, size_bytes));
    STELLARIUM_ASSIGN(const MutableBytes memory, file->map_shared(0, size_bytes));
    std::unique_ptr<Arena> arena(new Arena());
    arena->files_ = env.files;
    arena->path_ = path;
    arena->identity_ = header.arena;
    arena->file_ = std::move(file);
    arena->lay_out(memory, slot_count);
    return arena;
}

std::vector<Arena::Found> Arena::adopt() {
    std::vector<Found> found;
    const std::lock_guard lock(mutex_);
    for (Slot slot = slot_count_; slot-- > 0;) {
        ArenaSlot entry;
        std::memcpy(&entry, header(slot), sizeof entry);
        const uint32_t kind = entry.kind;
        const bool valid = entry.checksum != 0 && entry.checksum == slot_checksum(entry) &&
                           ((kind == static_cast<uint32_t>(ArenaSlotKind::kPage) &&
                             entry.data_checksum == checksum64(data(slot))) ||
                            (kind == static_cast<uint32_t>(ArenaSlotKind::kZeros) &&
                             entry.page % nebula::kLeafPages == 0)) &&
                           entry.page < kMaxPages;
        if (!valid) {
            // Free, or torn by the death of the process and so never acknowledged.
            std::memset(header(slot), 0, sizeof entry);
            free_.push_back(slot);
            continue;
        }
        found.push_back({.slot = slot,
                         .kind = static_cast<ArenaSlotKind>(kind),
                         .volume = entry.volume,
                         .page = entry.page,
                         .sequence = entry.sequence});
    }
    free_count_ = free_.size();
    std::sort(found.begin(), found.end(),
              [](const Found& a, const Found& b) { return a.sequence < b.sequence; });
    next_sequence_ = found.empty() ? 1 : found.back().sequence + 1;
    return found;
}

Result<void> Arena::remove_file() {
    if (path_.empty()) {
        return {};
    }
    return files_->remove(path_);
}

// --- Slots ---------------------------------------------------------------------------------------

bool Arena::may_take(uint64_t held, uint32_t count) const {
    const uint64_t free = free_.size();
    return count <= free && (held == 0 || held + count <= free);
}

void Arena::take(uint32_t count, std::vector<Slot>& out) {
    out.insert(out.end(), free_.end() - count, free_.end());
    free_.resize(free_.size() - count);
    free_count_.store(free_.size(), std::memory_order_relaxed);
}

bool Arena::reserve(uint64_t held, uint32_t count, std::vector<Slot>& out) {
    const std::lock_guard lock(mutex_);
    if (!may_take(held, count)) {
        return false;
    }
    take(count, out);
    return true;
}

bool Arena::reserve_waiting(const std::function<uint64_t()>& held, uint32_t count,
                            std::vector<Slot>& out, const std::function<bool()>& give_up) {
    std::unique_lock lock(mutex_);
    while (!may_take(held(), count)) {
        if (give_up()) {
            return false;
        }
        ++waiting_;
        released_.wait(lock);
        --waiting_;
    }
    take(count, out);
    return true;
}

void Arena::wake() {
    const std::lock_guard lock(mutex_);
    released_.notify_all();
}

void Arena::release(std::span<const Slot> slots) {
    if (slots.empty()) {
        return;
    }
    const std::lock_guard lock(mutex_);
    free_.insert(free_.end(), slots.begin(), slots.end());
    assert(free_.size() <= slot_count_);
    free_count_.store(free_.size(), std::memory_order_relaxed);
    if (waiting_ > 0) {
        released_.notify_all();
    }
}

void Arena::publish(Slot slot, ArenaSlot entry) {
    entry.sequence = next_sequence_.fetch_add(1, std::memory_order_relaxed);
    std::byte* place = header(slot);
    std::memcpy(place, &entry, kChecksumOffset);
    // Everything before must be in memory when the checksum is: the process may die anywhere.
    word_at(place + kChecksumOffset)
        .store(to_little_endian(slot_checksum(entry)), std::memory_order_release);
}

void Arena::publish_page(Slot slot, uint64_t volume, uint64_t page, uint64_t data_checksum) {
    ArenaSlot entry{};
    entry.volume = volume;
    entry.page = page;
    entry.data_checksum = data_checksum;
    entry.kind = static_cast<uint32_t>(ArenaSlotKind::kPage);
    publish(slot, entry);
}

void Arena::publish_zeros(Slot slot, uint64_t volume, uint64_t leaf_page,
                          std::span<const uint64_t> bits) {
    assert(bits.size() == kBitmapWords && leaf_page % nebula::kLeafPages == 0);
    std::byte* map = data(slot).data();
    for (size_t i = 0; i < bits.size(); ++i) {
        word_at(map + i * sizeof(uint64_t))
            .store(to_little_endian(bits[i]), std::memory_order_relaxed);
    }
    ArenaSlot entry{};
    entry.volume = volume;
    entry.page = leaf_page;
    entry.kind = static_cast<uint32_t>(ArenaSlotKind::kZeros);
    publish(slot, entry);
}

void Arena::cover(Slot slot, std::span<const uint64_t> bits) {
    assert(bits.size() == kBitmapWords);
    std::byte* map = data(slot).data();
    for (size_t i = 0; i < bits.size(); ++i) {
        word_at(map + i * sizeof(uint64_t))
            .fetch_or(to_little_endian(bits[i]), std::memory_order_release);
    }
}

void Arena::uncover(Slot slot, uint32_t page_in_leaf) {
    assert(page_in_leaf < nebula::kLeafPages);
    word_at(data(slot).data() + page_in_leaf / 64 * sizeof(uint64_t))
        .fetch_and(~to_little_endian(uint64_t{1} << (page_in_leaf % 64)),
                   std::memory_order_release);
}

bool Arena::covers(Slot slot, uint32_t page_in_leaf) const {
    assert(page_in_leaf < nebula::kLeafPages);
    const auto word =
        load<U64Le>(data(slot).subspan(page_in_leaf / 64 * sizeof(uint64_t), sizeof(uint64_t)));
    return (word >> (page_in_leaf % 64) & 1) != 0;
}

void Arena::retire(Slot slot) {
    word_at(header(slot) + kChecksumOffset).store(0, std::memory_order_release);
}

}  // namespace stellarium::nova
