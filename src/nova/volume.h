// The running side of a volume: its dirty pages, and the guest's reads and writes.
//
// A write goes into the dirty arena and is complete. The committer (committer.h) later cuts the
// dirty set at one moment, appends it to the log, publishes the new state and only then forgets the
// dirty pages. A read asks the dirty map first and the state second. Hence a read that runs beside
// a commit finds a page either dirty or in the new state, never in an older one.
//
// The dirty map is sharded by leaf; a shard maps page numbers to arena slots, and leaves to the one
// slot that says which of their pages are zeros. So what is dirty costs memory in proportion to the
// slots it holds, however large the ranges that guests discard; and a volume that nobody has
// written to has no map. A slot's data never changes once it
// is published: rewriting a page takes a fresh slot. Writes of less than a page
// copy the rest of the page from its present version, which may have to be read from disk; the page
// is marked busy meanwhile. Whoever replaces a busy page says so in the mark, and the writer starts
// again from the new version; so nobody waits for anybody's disk, except two partial writes of one
// page for each other.
//
// Thread rule: read, write, discard from any thread at the same time. cut() and settle() only with
// the entity's commit_mutex held.
// Durability: base/block_device.h.
// Errors: kInvalidArgument for requests out of range; kWouldBlock with kNoWait; while the volume's
// write-back fails (kNoSpace), writes that need room fail with that error.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <vector>

#include <absl/container/flat_hash_map.h>
#include <absl/container/flat_hash_set.h>

#include "base/block_device.h"
#include "base/error.h"
#include "nebula/store.h"
#include "nova/arena.h"
#include "nova/catalog.h"
#include "nova/iovecs.h"
#include "nova/leaf_bits.h"
#include "nova/tree.h"

namespace stellarium::nova {

class Volume;

/// What a volume needs from whoever writes its dirty pages back.
class Writeback {
  public:
    virtual ~Writeback() = default;
    /// The volume has become dirty. Called once until taken_off_list().
    virtual void note_dirty(const std::shared_ptr<Volume>& volume) = 0;
    /// The arena is more than half full. Cheap; called often.
    virtual void note_pressure() = 0;
    /// A writer of this volume waits for room. Either starts to write back and returns, or (without
    /// background threads) has written back when it returns.
    virtual Result<void> make_room(const std::shared_ptr<Volume>& volume) = 0;
    /// Appends a hole over whole leaves, which is too large for the arena, and drops what is dirty
    /// in it.
    virtual Result<void> discard_leaves(Volume& volume, uint64_t first_page, uint64_t pages) = 0;
};

/// Told what guests read of a volume.
/// Thread rule: on_read() from any thread, also at the same time, and also once more while whoever
/// ends the observation does so. It must not block.
class ReadObserver {
  public:
    virtual ~ReadObserver() = default;
    /// A device was asked for this range, which need not lie within the volume; twice where it had
    /// to wait for the disk.
    virtual void on_read(uint64_t offset_bytes, uint64_t length_bytes) = 0;
};

/// A dirty page, or consecutive ones of a leaf that are zeros, as they were at a cut.
struct DirtyRun {
    uint64_t page = 0;
    Slot slot = kNoSlot;
    uint16_t pages = 1;
    bool zero = false;  ///< The slot holds no data: the pages are zeros.
};

class Volume : public std::enable_shared_from_this<Volume> {
  public:
    Volume(nebula::Store& store, NodeCache& cache, Arena& arena, Writeback& writeback,
           EntityPtr entity);
    /// Slots of pages that are still dirty stay valid in the arena, for the next process.
    ~Volume();
    Volume(const Volume&) = delete;
    Volume& operator=(const Volume&) = delete;

    const EntityPtr& entity() const { return entity_; }
    /// Of an image: its length rounded up to sectors.
    uint64_t size_bytes() const;

    Result<void> read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode);
    Result<void> write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode);
    Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode);

    bool dirty() const { return dirty_entries_.load(std::memory_order_acquire) != 0; }
    uint64_t dirty_bytes() const { return held_slots_.load() * kPageBytes; }

    // --- For the committer -----------------------------------------------------------------------

    /// All pages that are dirty at one moment, ascending, no two of them twice. Their slots stay as
    /// they are until settle().
    std::vector<DirtyRun> cut();
    /// Ends the use of some runs of a cut; a leaf's runs all at once. `committed`: the published
    /// state has them, so those that were not written again are clean now.
    void settle(std::span<const DirtyRun> runs, bool committed);
    /// Forgets everything dirty in a range, as a discard of it does.
    void drop(uint64_t first_page, uint64_t pages);

    /// The last batch that may hold something of this volume. What an earlier object of the volume
    /// appended need not be durable yet, so at first that is the newest batch of all.
    uint64_t last_sequence() const { return last_sequence_.load(std::memory_order_acquire); }
    void set_last_sequence(uint64_t sequence) {
        last_sequence_.store(sequence, std::memory_order_release);
    }
    /// Whoever keeps the list that note_dirty() makes takes the volume off it: from now on a write
    /// calls note_dirty() again. One that is to be written back is taken off before its cut().
    void taken_off_list() { noted_dirty_.exchange(false); }
    /// A volume that was clean was taken off, but it is dirty now and has not called note_dirty():
    /// it must be put back.
    bool put_back_on_list() { return dirty() && !noted_dirty_.exchange(true); }
    /// A write-back failed: writers that wait for room get the error.
    void fail_writers(const Error& error);

    // --- For the pool ----------------------------------------------------------------------------

    /// Takes over a slot that the last process left. In sequence order, before any other call.
    void adopt(const Arena::Found& found);

    // --- For devices -----------------------------------------------------------------------------

    /// nullptr ends it. Any thread.
    void set_observer(std::shared_ptr<ReadObserver> observer);
    std::shared_ptr<ReadObserver> observer() const;
    /// Before each read of a guest; next to nothing while nobody observes.
    void tell_observer(uint64_t offset_bytes, std::span<const iovec> into) const {
        if (observed_.load(std::memory_order_relaxed)) [[unlikely]] {
            tell_observer_now(offset_bytes, into);
        }
    }

  private:
    static constexpr size_t kShards = 16;
    /// What find() says of a page that is dirty zeros.
    static constexpr Slot kZeros = kNoSlot - 1;
    static_assert(kMaxDirtyBudgetBytes / kPageBytes < kZeros);

    /// A page whose rest is being read for a partial write.
    struct Busy {
        uint64_t page = 0;
        bool superseded = false;  ///< Somebody replaced the page since.
    };
    /// The dirty zeros of a leaf.
    struct ZeroLeaf {
        Slot slot = kNoSlot;
        LeafBits bits{};  ///< The same as in the slot.
    };
    /// A page is in `pages`, or its bit is set in `zeros`, or it is clean.
    struct alignas(64) Shard {
        mutable std::shared_mutex mutex;
        absl::flat_hash_map<uint64_t, Slot> pages;
        absl::flat_hash_map<uint64_t, ZeroLeaf> zeros;  ///< By leaf; no entry without a page.
        absl::flat_hash_set<Slot> in_flight;            ///< Part of the present cut.
        std::vector<Busy> busy;
    };
    struct DirtyMap {
        std::array<Shard, kShards> shards;
        std::condition_variable_any busy_done;  ///< A page of any shard is busy no more.
    };
    struct PartialPage;
    class BusyPages;

    /// The map, made by the first call.
    DirtyMap& dirty_map();
    /// The shards of the map as far as there is one: what is dirty, or busy, is in one of these.
    std::span<Shard> shards() const;
    Shard& shard_of(uint64_t page) { return dirty_map().shards[page / kPagesPerLeaf % kShards]; }

    void tell_observer_now(uint64_t offset_bytes, std::span<const iovec> into) const;

    template <typename Attempt>
    Result<void> with_present_state(Attempt attempt);
    Result<void> check_range(uint64_t offset_bytes, uint64_t length_bytes) const;
    uint64_t max_piece_bytes() const;
    Result<void> reserve(uint32_t count, std::vector<Slot>& out, IoMode mode);
    void give_back(std::span<const Slot> slots);
    Result<void> write_piece(uint64_t offset_bytes, uint64_t length_bytes, IovecCursor* from,
                             IoMode mode);
    Result<void> load_page(uint64_t page, MutableBytes into, IoMode mode);
    Result<void> commit_partial(PartialPage& partial, IoMode mode);
    Result<void> discard_pages(uint64_t first_page, uint64_t end_page, IoMode mode);

    // With the shard's mutex held exclusively.
    void map_page(Shard& shard, uint64_t page, Slot slot, uint64_t checksum,
                  std::vector<Slot>& released);
    /// Leaf `leaf` has these pages of zeros more, which the published `slot` says as well.
    void map_zeros(Shard& shard, uint64_t leaf, Slot slot, const LeafBits& bits,
                   std::vector<Slot>& released);
    /// The pages in [first_page, end_page), of one leaf, are not dirty zeros any more.
    void unmap_zeros(Shard& shard, uint64_t first_page, uint64_t end_page,
                     std::vector<Slot>& released);
    void drop_slot(Shard& shard, Slot slot, std::vector<Slot>& released);
    /// Its slot, or kZeros, or kNoSlot when it is clean. Held shared is enough.
    static Slot find(const Shard& shard, uint64_t page);
    static void supersede(Shard& shard, uint64_t first_page, uint64_t end_page);

    void became_dirty();

    nebula::Store& store_;
    NodeCache& cache_;
    Arena& arena_;
    Writeback& writeback_;
    const EntityPtr entity_;

    std::atomic<DirtyMap*> dirty_map_{nullptr};  ///< Owned; once set it stays.
    std::atomic<uint64_t> dirty_entries_{0};     ///< Of `pages` and `zeros` of all shards.
    std::atomic<uint64_t> held_slots_{0};
    std::atomic<bool> noted_dirty_{false};  ///< On the list of note_dirty().
    std::atomic<uint64_t> last_sequence_;

    std::atomic<bool> observed_{false};
    mutable std::mutex observer_mutex_;
    std::shared_ptr<ReadObserver> observer_;  ///< Guarded by observer_mutex_.

    std::mutex failure_mutex_;
    std::optional<Error> failure_;       ///< Of the last write-back. Guarded by failure_mutex_.
    std::atomic<uint64_t> failures_{0};  ///< How many there were.
};

}  // namespace stellarium::nova
