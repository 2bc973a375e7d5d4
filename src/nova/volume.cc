#include "nova/volume.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include <fmt/format.h>

#include "base/hash.h"
#include "nova/limits.h"
#include "nova/reader.h"

namespace stellarium::nova {
Volume::Volume(nebula::Store& store, NodeCache& cache, Arena& arena, Writeback& writeback,
               EntityPtr entity)
    : store_(store),
      cache_(cache),
      arena_(arena),
      writeback_(writeback),
      entity_(std::move(entity)),
      last_sequence_(store.sequence()) {}

Volume::~Volume() {
    delete dirty_map_.load();
}

uint64_t Volume::size_bytes() const {
    return round_up_to_sectors(entity_->size_bytes());
}

Result<void> Volume::check_range(uint64_t offset_bytes, uint64_t length_bytes) const {
    const uint64_t size = size_bytes();
    if (offset_bytes % kSectorBytes != 0 || length_bytes % kSectorBytes != 0 ||
        offset_bytes > size || length_bytes > size - offset_bytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("request of {} bytes at offset {} is not made of whole sectors "
                                "within the {} bytes of the volume",
                                length_bytes, offset_bytes, size));
    }
    return {};
}

// --- Reading -------------------------------------------------------------------------------------

/// Calls `attempt` with the present state, and again with a newer one when the state was replaced
/// meanwhile and what it named was not there any more: a garbage collection has freed it.
template <typename Attempt>
Result<void> Volume::with_present_state(Attempt attempt) {
    for (int tries = 0;; ++tries) {
        const VolumeState state = entity_->state();
        Result<void> done = attempt(state);
        if (done || tries == kMaxStaleReads) {
            return done;
        }
        const ErrorCode code = done.error().code();
        if (code != ErrorCode::kStale && code != ErrorCode::kNotFound &&
            code != ErrorCode::kCorrupt) {
            return done;
        }
        const VolumeState now = entity_->state();
        if (now.root == state.root && now.delta.same_version(state.delta)) {
            return done;
        }
    }
}

Result<void> Volume::read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode) {
    const uint64_t length_bytes = total_bytes(into);
    STELLARIUM_TRY(check_range(offset_bytes, length_bytes));
    if (length_bytes == 0) {
        return {};
    }
    const uint64_t end_bytes = offset_bytes + length_bytes;
    if (!dirty()) {
        return with_present_state([&](const VolumeState& state) {
            IovecCursor cursor(into);
            return read_state(store_, cache_, state, offset_bytes, cursor, length_bytes, mode);
        });
    }

    // What is dirty is copied first; the state is asked for after that.
    std::vector<std::pair<uint64_t, uint64_t>> clean;  // Offset and end of what is left.
    IovecCursor cursor(into);
    for (uint64_t position = offset_bytes; position < end_bytes;) {
        const uint64_t leaf_end = (position / kLeafBytes + 1) * kLeafBytes;
        const uint64_t stop = std::min(end_bytes, leaf_end);
        const Shard& shard = shard_of(position / kPageBytes);
        const std::shared_lock lock(shard.mutex);
        while (position < stop) {
            const uint64_t page = position / kPageBytes;
            const uint64_t page_stop = std::min(stop, (page + 1) * kPageBytes);
            const Slot slot = find(shard, page);
            if (slot == kNoSlot) {
                if (!clean.empty() && clean.back().second == position) {
                    clean.back().second = page_stop;
                } else {
                    clean.emplace_back(position, page_stop);
                }
            } else {
                cursor.move_to(position - offset_bytes);
                if (slot == kZeros) {
                    cursor.fill_zero(page_stop - position);
                } else {
                    cursor.copy_from(std::as_const(arena_).data(slot).subspan(
                        position % kPageBytes, page_stop - position));
                }
            }
            position = page_stop;
        }
    }
    if (clean.empty()) {
        return {};
    }
    return with_present_state([&](const VolumeState& state) -> Result<void> {
        IovecCursor rest(into);
        for (const auto& [start, stop] : clean) {
            rest.move_to(start - offset_bytes);
            STELLARIUM_TRY(read_state(store_, cache_, state, start, rest, stop - start, mode));
        }
        return {};
    });
}

/// The present content of one page.
Result<void> Volume::load_page(uint64_t page, MutableBytes into, IoMode mode) {
    {
        const Shard& shard = shard_of(page);
        const std::shared_lock lock(shard.mutex);
        const Slot slot = find(shard, page);
        if (slot == kZeros) {
            std::memset(into.data(), 0, into.size());
            return {};
        }
        if (slot != kNoSlot) {
            std::memcpy(into.data(), std::as_const(arena_).data(slot).data(), into.size());
            return {};
        }
    }
    const iovec whole = to_iovec(into);
    return with_present_state([&](const VolumeState& state) {
        IovecCursor cursor(std::span(&whole, 1));
        return read_state(store_, cache_, state, page * kPageBytes, cursor, kPageBytes, mode);
    });
}

// --- The dirty map -------------------------------------------------------------------------------

Volume::DirtyMap& Volume::dirty_map() {
    if (DirtyMap* const map = dirty_map_.load(std::memory_order_acquire)) {
        return *map;
    }
    auto made = std::make_unique<DirtyMap>();
    DirtyMap* present = nullptr;
    if (dirty_map_.compare_exchange_strong(present, made.get(), std::memory_order_acq_rel)) {
        return *made.release();
    }
    return *present;
}

std::span<Volume::Shard> Volume::shards() const {
    DirtyMap* const map = dirty_map_.load(std::memory_order_acquire);
    return map == nullptr ? std::span<Shard>() : std::span<Shard>(map->shards);
}

void Volume::supersede(Shard& shard, uint64_t first_page, uint64_t end_page) {
    for (Busy& busy : shard.busy) {
        if (busy.page >= first_page && busy.page < end_page) {
            busy.superseded = true;
        }
    }
}

Slot Volume::find(const Shard& shard, uint64_t page) {
    if (const auto it = shard.pages.find(page); it != shard.pages.end()) {
        return it->second;
    }
    if (const auto it = shard.zeros.find(page / kPagesPerLeaf);
        it != shard.zeros.end() && has_bit(it->second.bits, page % kPagesPerLeaf)) {
        return kZeros;
    }
    return kNoSlot;
}

void Volume::drop_slot(Shard& shard, Slot slot, std::vector<Slot>& released) {
    arena_.retire(slot);
    if (!shard.in_flight.contains(slot)) {
        released.push_back(slot);
    }
}

void Volume::map_page(Shard& shard, uint64_t page, Slot slot, uint64_t checksum,
                      std::vector<Slot>& released) {
    // The new version is valid before the old one goes: a process that dies in between leaves both,
    // and the higher sequence number wins.
    arena_.publish_page(slot, entity_->id, page, checksum);
    const auto [it, is_new] = shard.pages.try_emplace(page, slot);
    if (is_new) {
        dirty_entries_.fetch_add(1, std::memory_order_release);
        unmap_zeros(shard, page, page + 1, released);
    } else {
        drop_slot(shard, it->second, released);
        it->second = slot;
    }
}

void Volume::map_zeros(Shard& shard, uint64_t leaf, Slot slot, const LeafBits& bits,
                       std::vector<Slot>& released) {
    const auto [zeros, is_new] = shard.zeros.try_emplace(leaf, ZeroLeaf{slot, bits});
    if (is_new) {
        dirty_entries_.fetch_add(1, std::memory_order_release);
    } else {
        drop_slot(shard, zeros->second.slot, released);
        zeros->second = ZeroLeaf{slot, bits};
    }
    if (shard.pages.empty()) {
        return;
    }
    for (uint64_t i = 0; i < kPagesPerLeaf; ++i) {
        if (!has_bit(bits, i)) {
            continue;
        }
        const auto it = shard.pages.find(leaf * kPagesPerLeaf + i);
        if (it != shard.pages.end()) {
            drop_slot(shard, it->second, released);
            shard.pages.erase(it);
            dirty_entries_.fetch_sub(1, std::memory_order_release);
        }
    }
}

void Volume::unmap_zeros(Shard& shard, uint64_t first_page, uint64_t end_page,
                         std::vector<Slot>& released) {
    const auto it = shard.zeros.find(first_page / kPagesPerLeaf);
    if (it == shard.zeros.end()) {
        return;
    }
    ZeroLeaf& zeros = it->second;
    const LeafBits before = zeros.bits;
    for (uint64_t page = first_page; page < end_page; ++page) {
        clear_bit(zeros.bits, page % kPagesPerLeaf);
    }
    if (zeros.bits == LeafBits{}) {
        drop_slot(shard, zeros.slot, released);
        shard.zeros.erase(it);
        dirty_entries_.fetch_sub(1, std::memory_order_release);
        return;
    }
    for (uint64_t page = first_page; page < end_page; ++page) {
        if (has_bit(before, page % kPagesPerLeaf)) {
            arena_.uncover(zeros.slot, static_cast<uint32_t>(page % kPagesPerLeaf));
        }
    }
}

void Volume::give_back(std::span<const Slot> slots) {
    if (!slots.empty()) {
        held_slots_.fetch_sub(slots.size());
        arena_.release(slots);
    }
}

void Volume::became_dirty() {
    if (!noted_dirty_.exchange(true)) {
        writeback_.note_dirty(shared_from_this());
    }
    if (arena_.free_slots() < arena_.slot_count() / 2) {
        writeback_.note_pressure();
    }
}

std::vector<DirtyRun> Volume::cut() {
    std::vector<DirtyRun> runs;
    if (!dirty()) {
        return runs;
    }
    // All shards at once, so that the cut is one moment: a write that began after another had
    // completed is in it only if the other one is.
    for (Shard& shard : shards()) {
        shard.mutex.lock();
    }
    runs.reserve(dirty_entries_.load(std::memory_order_relaxed));
    for (Shard& shard : shards()) {
        assert(shard.in_flight.empty());
        for (const auto& [page, slot] : shard.pages) {
            runs.push_back({.page = page, .slot = slot});
            shard.in_flight.insert(slot);
        }
        for (const auto& [leaf, zeros] : shard.zeros) {
            const uint64_t leaf_page = leaf * kPagesPerLeaf;
            for (uint64_t i = 0; i < kPagesPerLeaf; ++i) {
                if (!has_bit(zeros.bits, i)) {
                    continue;
                }
                const uint64_t first = i;
                while (i < kPagesPerLeaf && has_bit(zeros.bits, i)) {
                    ++i;
                }
                runs.push_back({.page = leaf_page + first,
                                .slot = zeros.slot,
                                .pages = static_cast<uint16_t>(i - first),
                                .zero = true});
            }
            shard.in_flight.insert(zeros.slot);
        }
    }
    for (Shard& shard : shards()) {
        shard.mutex.unlock();
    }
    std::sort(runs.begin(), runs.end(),
              [](const DirtyRun& a, const DirtyRun& b) { return a.page < b.page; });
    return runs;
}

void Volume::settle(std::span<const DirtyRun> runs, bool committed) {
    std::vector<Slot> released;
    for (size_t i = 0; i < runs.size();) {
        const uint64_t leaf = runs[i].page / kPagesPerLeaf;
        const size_t first = i;
        Shard& shard = shard_of(runs[i].page);
        const std::lock_guard lock(shard.mutex);
        for (; i < runs.size() && runs[i].page / kPagesPerLeaf == leaf; ++i) {
            const DirtyRun& run = runs[i];
            if (!committed) {
                continue;
            }
            if (run.zero) {
                const auto zeros = shard.zeros.find(leaf);
                if (zeros != shard.zeros.end() && zeros->second.slot == run.slot) {
                    unmap_zeros(shard, run.page, run.page + run.pages, released);
                }
                continue;
            }
            const auto it = shard.pages.find(run.page);
            if (it != shard.pages.end() && it->second == run.slot) {
                shard.pages.erase(it);
                dirty_entries_.fetch_sub(1, std::memory_order_release);
                drop_slot(shard, run.slot, released);
            }
        }
        // Slots that nothing maps any more were only kept for the cut.
        for (const DirtyRun& run : runs.subspan(first, i - first)) {
            if (shard.in_flight.erase(run.slot) == 0) {
                continue;
            }
            bool mapped = false;
            if (run.zero) {
                const auto zeros = shard.zeros.find(leaf);
                mapped = zeros != shard.zeros.end() && zeros->second.slot == run.slot;
            } else {
                const auto it = shard.pages.find(run.page);
                mapped = it != shard.pages.end() && it->second == run.slot;
            }
            if (!mapped) {
                released.push_back(run.slot);
            }
        }
    }
    give_back(released);
    if (!committed) {
        became_dirty();
    }
}

void Volume::drop(uint64_t first_page, uint64_t pages) {
    const uint64_t end_page = first_page + pages;
    std::vector<Slot> released;
    for (Shard& shard : shards()) {
        const std::lock_guard lock(shard.mutex);
        supersede(shard, first_page, end_page);
        for (auto it = shard.pages.begin(); it != shard.pages.end();) {
            const auto [page, slot] = *it;
            if (page < first_page || page >= end_page) {
                ++it;
                continue;
            }
            shard.pages.erase(it++);
            dirty_entries_.fetch_sub(1, std::memory_order_release);
            drop_slot(shard, slot, released);
        }
        std::vector<uint64_t> leaves;
        for (const auto& [leaf, zeros] : shard.zeros) {
            if (leaf * kPagesPerLeaf < end_page && (leaf + 1) * kPagesPerLeaf > first_page) {
                leaves.push_back(leaf);
            }
        }
        for (const uint64_t leaf : leaves) {
            unmap_zeros(shard, std::max(first_page, leaf * kPagesPerLeaf),
                        std::min(end_page, (leaf + 1) * kPagesPerLeaf), released);
        }
    }
    give_back(released);
}

void Volume::fail_writers(const Error& error) {
    {
        const std::lock_guard lock(failure_mutex_);
        failure_ = error;
    }
    failures_.fetch_add(1);
    arena_.wake();
}

void Volume::adopt(const Arena::Found& found) {
    std::vector<Slot> released;
    Shard& shard = shard_of(found.page);
    {
        const std::lock_guard lock(shard.mutex);
        held_slots_.fetch_add(1);
        const uint64_t end_page = entity_->state().pages();
        if (found.kind == format::ArenaSlotKind::kPage) {
            if (found.page >= end_page) {
                drop_slot(shard, found.slot, released);
            } else if (const auto [it, is_new] = shard.pages.try_emplace(found.page, found.slot);
                       is_new) {
                dirty_entries_.fetch_add(1);
                unmap_zeros(shard, found.page, found.page + 1, released);
            } else {
                drop_slot(shard, it->second, released);
                it->second = found.slot;
            }
        } else {
            const uint64_t leaf = found.page / kPagesPerLeaf;
            LeafBits bits{};
            for (uint32_t i = 0; i < kPagesPerLeaf; ++i) {
                if (!arena_.covers(found.slot, i)) {
                    continue;
                }
                if (found.page + i < end_page) {
                    set_bit(bits, i);
                } else {
                    // The volume was shrunk; it may be grown again.
                    arena_.uncover(found.slot, i);
                }
            }
            // What an earlier slot of zeros still covers is zeros, and this one says so from now
            // on. An earlier version may have left several for a leaf.
            const auto before = shard.zeros.find(leaf);
            if (before != shard.zeros.end()) {
                for (size_t word = 0; word < bits.size(); ++word) {
                    bits[word] |= before->second.bits[word];
                }
                arena_.cover(found.slot, bits);
            }
            if (bits == LeafBits{}) {
                drop_slot(shard, found.slot, released);
            } else {
                map_zeros(shard, leaf, found.slot, bits, released);
            }
        }
    }
    give_back(released);
    if (dirty()) {
        became_dirty();
    }
}

// --- Writing -------------------------------------------------------------------------------------

uint64_t Volume::max_piece_bytes() const {
    return std::min(kMaxWritePieceBytes, uint64_t{arena_.slot_count() / 4} * kPageBytes);
}

Result<void> Volume::reserve(uint32_t count, std::vector<Slot>& out, IoMode mode) {
    if (arena_.reserve(held_slots_.load(), count, out)) {
        held_slots_.fetch_add(count);
        return {};
    }
    if (mode == IoMode::kNoWait) {
        writeback_.note_pressure();
        return fail(ErrorCode::kWouldBlock, "the buffer for writes is full");
    }
    const uint64_t failures = failures_.load();
    STELLARIUM_TRY(writeback_.make_room(shared_from_this()));
    const bool got = arena_.reserve_waiting([this] { return held_slots_.load(); }, count, out,
                                            [&] { return failures_.load() != failures; });
    if (!got) {
        const std::lock_guard lock(failure_mutex_);
        return std::unexpected(
            failure_->with_context("the buffer for writes is full and cannot be written back"));
    }
    held_slots_.fetch_add(count);
    return {};
}

/// One page of a write that covers it in part.
struct Volume::PartialPage {
    uint64_t page = 0;
    Slot slot = kNoSlot;
    uint64_t offset_in_page = 0;
    std::vector<std::byte> bytes;  ///< What is written.
};

/// Keeps up to two pages marked busy, in ascending order, so that nobody waits in a circle.
class Volume::BusyPages {
  public:
    explicit BusyPages(Volume& volume) : volume_(volume) {}
    ~BusyPages() {
        for (const uint64_t page : pages_) {
            Shard& shard = volume_.shard_of(page);
            const std::lock_guard lock(shard.mutex);
            std::erase_if(shard.busy, [page](const Busy& busy) { return busy.page == page; });
            volume_.dirty_map().busy_done.notify_all();
        }
    }
    BusyPages(const BusyPages&) = delete;
    BusyPages& operator=(const BusyPages&) = delete;

    Result<void> mark(uint64_t page, IoMode mode) {
        Shard& shard = volume_.shard_of(page);
        std::unique_lock lock(shard.mutex);
        const auto is_busy = [&] {
            return std::any_of(shard.busy.begin(), shard.busy.end(),
                               [page](const Busy& busy) { return busy.page == page; });
        };
        if (mode == IoMode::kNoWait && is_busy()) {
            return fail(ErrorCode::kWouldBlock, "another write of this page is in progress");
        }
        volume_.dirty_map().busy_done.wait(lock, [&] { return !is_busy(); });
        shard.busy.push_back({.page = page, .superseded = false});
        pages_.push_back(page);
        return {};
    }

  private:
    Volume& volume_;
    std::vector<uint64_t> pages_;
};

/// Publishes a partial page over its present version. Its page is marked busy, and its slot holds
/// the version that load_page() gave, overlaid with what is written.
Result<void> Volume::commit_partial(PartialPage& partial, IoMode mode) {
    const MutableBytes data = arena_.data(partial.slot);
    const auto lay_over = [&] {
        std::memcpy(data.data() + partial.offset_in_page, partial.bytes.data(),
                    partial.bytes.size());
    };
    uint64_t checksum = checksum64(data);
    Shard& shard = shard_of(partial.page);
    while (true) {
        {
            std::vector<Slot> released;
            std::unique_lock lock(shard.mutex);
            const auto busy = std::find_if(shard.busy.begin(), shard.busy.end(),
                                           [&](const Busy& b) { return b.page == partial.page; });
            assert(busy != shard.busy.end());
            const Slot present = find(shard, partial.page);
            if (!busy->superseded || present != kNoSlot) {
                if (busy->superseded) {
                    if (present == kZeros) {
                        std::memset(data.data(), 0, data.size());
                    } else {
                        std::memcpy(data.data(), std::as_const(arena_).data(present).data(),
                                    data.size());
                    }
                    lay_over();
                    checksum = checksum64(data);
                }
                map_page(shard, partial.page, partial.slot, checksum, released);
                lock.unlock();
                give_back(released);
                return {};
            }
            // It was replaced and the replacement is in the state already, or it was dropped.
            busy->superseded = false;
        }
        STELLARIUM_TRY(load_page(partial.page, data, mode));
        lay_over();
        checksum = checksum64(data);
    }
}

/// `from` nullptr writes zeros. All or nothing, but for a failure to read what a partial page
/// shares with its old version.
Result<void> Volume::write_piece(uint64_t offset_bytes, uint64_t length_bytes, IovecCursor* from,
                                 IoMode mode) {
    const uint64_t end_bytes = offset_bytes + length_bytes;
    const uint64_t first_page = offset_bytes / kPageBytes;
    const uint64_t end_page = (end_bytes + kPageBytes - 1) / kPageBytes;

    std::vector<Slot> slots;
    STELLARIUM_TRY(reserve(static_cast<uint32_t>(end_page - first_page), slots, mode));
    std::vector<Slot> unused = slots;  // What an error gives back.
    const auto abandon = [&](Error error) -> std::unexpected<Error> {
        give_back(unused);
        return std::unexpected(std::move(error));
    };

    BusyPages busy(*this);
    std::vector<PartialPage> partials;
    std::vector<uint64_t> checksums(slots.size());
    for (uint64_t page = first_page; page < end_page; ++page) {
        const Slot slot = slots[page - first_page];
        const uint64_t start = std::max(offset_bytes, page * kPageBytes);
        const uint64_t stop = std::min(end_bytes, (page + 1) * kPageBytes);
        if (stop - start == kPageBytes) {
            const MutableBytes data = arena_.data(slot);
            if (from != nullptr) {
                from->copy_to(data);
            } else {
                std::memset(data.data(), 0, data.size());
            }
            checksums[page - first_page] = checksum64(data);
            continue;
        }
        PartialPage partial{.page = page,
                            .slot = slot,
                            .offset_in_page = start % kPageBytes,
                            .bytes = std::vector<std::byte>(stop - start)};
        if (from != nullptr) {
            from->copy_to(partial.bytes);
        }
        partials.push_back(std::move(partial));
    }
    for (const PartialPage& partial : partials) {
        if (auto marked = busy.mark(partial.page, mode); !marked) {
            return abandon(std::move(marked).error());
        }
    }
    for (PartialPage& partial : partials) {
        const MutableBytes data = arena_.data(partial.slot);
        if (auto loaded = load_page(partial.page, data, mode); !loaded) {
            return abandon(std::move(loaded).error());
        }
        std::memcpy(data.data() + partial.offset_in_page, partial.bytes.data(),
                    partial.bytes.size());
    }

    // From here on everything is in memory.
    for (PartialPage& partial : partials) {
        // Behind the first one kWouldBlock would be a lie: something has happened.
        const IoMode partial_mode = &partial == partials.data() ? mode : IoMode::kMayBlock;
        if (auto done = commit_partial(partial, partial_mode); !done) {
            became_dirty();
            return abandon(std::move(done).error());
        }
        std::erase(unused, partial.slot);
    }
    std::vector<Slot> released;
    for (uint64_t page = first_page; page < end_page;) {
        const uint64_t stop = std::min(end_page, (page / kPagesPerLeaf + 1) * kPagesPerLeaf);
        Shard& shard = shard_of(page);
        const std::lock_guard lock(shard.mutex);
        for (; page < stop; ++page) {
            const bool is_partial = std::any_of(partials.begin(), partials.end(),
                                                [&](const auto& p) { return p.page == page; });
            if (!is_partial) {
                supersede(shard, page, page + 1);
                map_page(shard, page, slots[page - first_page], checksums[page - first_page],
                         released);
            }
        }
    }
    give_back(released);
    became_dirty();
    return {};
}

Result<void> Volume::write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode) {
    const uint64_t length_bytes = total_bytes(from);
    STELLARIUM_TRY(check_range(offset_bytes, length_bytes));
    const uint64_t piece_bytes = max_piece_bytes();
    const auto end_of_piece = [&](uint64_t position) {
        // Pieces end at page borders, so that only the ends of the request are partial pages.
        return std::min(offset_bytes + length_bytes,
                        (position + piece_bytes) / kPageBytes * kPageBytes);
    };
    if (mode == IoMode::kNoWait && end_of_piece(offset_bytes) < offset_bytes + length_bytes) {
        return fail(ErrorCode::kWouldBlock, "the write is too large to be buffered at once");
    }
    IovecCursor cursor(from);
    for (uint64_t done = 0; done < length_bytes;) {
        const uint64_t position = offset_bytes + done;
        const uint64_t piece_end = end_of_piece(position);
        STELLARIUM_TRY(write_piece(position, piece_end - position, &cursor, mode));
        done = piece_end - offset_bytes;
    }
    return {};
}

// --- Discarding ----------------------------------------------------------------------------------

Result<void> Volume::discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) {
    STELLARIUM_TRY(check_range(offset_bytes, length_bytes));
    if (length_bytes == 0) {
        return {};
    }
    const uint64_t end_bytes = offset_bytes + length_bytes;
    const uint64_t first_page = (offset_bytes + kPageBytes - 1) / kPageBytes;
    // Behind the end of the volume is nothing: its last page is whole even if it is short.
    const uint64_t end_page = end_bytes == size_bytes() ? (end_bytes + kPageBytes - 1) / kPageBytes
                                                        : end_bytes / kPageBytes;
    if (first_page >= end_page) {
        // Within one page, or the end of one and the front of the next.
        return write_piece(offset_bytes, length_bytes, nullptr, mode);
    }
    const uint64_t leaves = (end_page - 1) / kPagesPerLeaf - first_page / kPagesPerLeaf + 1;
    if (mode == IoMode::kNoWait && leaves > kMaxBufferedDiscardLeaves) {
        return fail(ErrorCode::kWouldBlock, "the discard is too large to be buffered");
    }
    const uint64_t head_bytes = first_page * kPageBytes - offset_bytes;
    if (mode == IoMode::kNoWait && (head_bytes != 0 || end_bytes > end_page * kPageBytes)) {
        return fail(ErrorCode::kWouldBlock, "the discard takes several steps");
    }
    if (head_bytes != 0) {
        STELLARIUM_TRY(write_piece(offset_bytes, head_bytes, nullptr, mode));
    }
    if (end_bytes > end_page * kPageBytes) {
        STELLARIUM_TRY(
            write_piece(end_page * kPageBytes, end_bytes - end_page * kPageBytes, nullptr, mode));
    }
    if (leaves <= kMaxBufferedDiscardLeaves) {
        return discard_pages(first_page, end_page, mode);
    }
    const uint64_t middle = (first_page + kPagesPerLeaf - 1) / kPagesPerLeaf * kPagesPerLeaf;
    const uint64_t middle_end = end_page / kPagesPerLeaf * kPagesPerLeaf;
    STELLARIUM_TRY(discard_pages(first_page, middle, mode));
    STELLARIUM_TRY(discard_pages(middle_end, end_page, mode));
    return writeback_.discard_leaves(*this, middle, middle_end - middle);
}

/// Takes one slot for each leaf touched.
Result<void> Volume::discard_pages(uint64_t first_page, uint64_t end_page, IoMode mode) {
    if (first_page >= end_page) {
        return {};
    }
    std::vector<Slot> slots;
    const uint64_t leaves = (end_page - 1) / kPagesPerLeaf - first_page / kPagesPerLeaf + 1;
    STELLARIUM_TRY(reserve(static_cast<uint32_t>(leaves), slots, mode));
    std::vector<Slot> released;
    size_t next_slot = 0;
    for (uint64_t page = first_page; page < end_page;) {
        const uint64_t leaf_page = page / kPagesPerLeaf * kPagesPerLeaf;
        const uint64_t stop = std::min(end_page, leaf_page + kPagesPerLeaf);
        const Slot slot = slots[next_slot++];
        Shard& shard = shard_of(page);
        const std::lock_guard lock(shard.mutex);
        supersede(shard, page, stop);
        LeafBits bits{};
        const auto before = shard.zeros.find(page / kPagesPerLeaf);
        if (before != shard.zeros.end()) {
            bits = before->second.bits;
        }
        for (; page < stop; ++page) {
            set_bit(bits, page % kPagesPerLeaf);
        }
        arena_.publish_zeros(slot, entity_->id, leaf_page, bits);
        map_zeros(shard, leaf_page / kPagesPerLeaf, slot, bits, released);
    }
    give_back(released);
    became_dirty();
    return {};
}

// --- Observation ---------------------------------------------------------------------------------

void Volume::set_observer(std::shared_ptr<ReadObserver> observer) {
    const std::lock_guard lock(observer_mutex_);
    std::swap(observer_, observer);
    observed_.store(observer_ != nullptr, std::memory_order_relaxed);
}

std::shared_ptr<ReadObserver> Volume::observer() const {
    const std::lock_guard lock(observer_mutex_);
    return observer_;
}

void Volume::tell_observer_now(uint64_t offset_bytes, std::span<const iovec> into) const {
    const std::shared_ptr<ReadObserver> observer = this->observer();
    if (observer) {
        observer->on_read(offset_bytes, total_bytes(into));
    }
}

}  // namespace stellarium::nova
