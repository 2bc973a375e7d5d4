#include "nebula/index.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <thread>

#include <fmt/format.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace stellarium::nebula {
namespace {

// --- Slots and buckets.

constexpr int kShardBits = 12;
constexpr int kRememberedBits = 24;
constexpr size_t kSlotBytes = 8;
constexpr size_t kSlotsPerBucket = 8;
constexpr size_t kBucketBytes = kSlotBytes * kSlotsPerBucket;
static_assert(kIndexShards == 1U << kShardBits);
static_assert(kRememberedBits + PageAddress::kBits == 64);

/// Far more than a store of 2^40 pages can fill. Products of a bucket count and r fit 64 bits.
constexpr uint32_t kMaxBuckets = uint32_t{1} << 26;
/// A table below this share of full slots does not grow for a pair without room: it is not the
/// table that is too small, but one of its places that is sought by too many. The cuckoo search
/// fails above 0.95 otherwise, even in tables of a few buckets.
constexpr double kMinGrowthLoad = 0.6;
/// A table below this share of full slots is made smaller when pairs are erased.
constexpr double kShrinkLoad = 0.4;
constexpr double kLoadAfterShrinking = 0.8;

/// r and address of a slot; 0 is an empty slot, because no address is 0.
using Slot = uint64_t;

Slot make_slot(uint32_t r, PageAddress address) {
    assert(address.value() != 0 && address.value() < PageAddress::kReserved);
    return uint64_t{r} << PageAddress::kBits | address.value();
}
uint32_t remembered(Slot slot) {
    return static_cast<uint32_t>(slot >> PageAddress::kBits);
}
uint64_t address_value(Slot slot) {
    return slot & ((uint64_t{1} << PageAddress::kBits) - 1);
}

/// Slots are little-endian in memory too, so that a mapped checkpoint is used as it is.
Slot load_slot(const std::byte* from) {
    uint64_t value = 0;
    std::memcpy(&value, from, kSlotBytes);
    if constexpr (std::endian::native == std::endian::big) {
        value = std::byteswap(value);
    }
    return value;
}
void store_slot(std::byte* into, Slot slot) {
    if constexpr (std::endian::native == std::endian::big) {
        slot = std::byteswap(slot);
    }
    std::memcpy(into, &slot, kSlotBytes);
}

struct Place {
    uint32_t shard;
    uint32_t r;
};
Place place_of(const ChunkId& id) {
    // ChunkId::prefix(), inline: this is called for every probe.
    const uint64_t prefix = load<U64Le>(std::as_bytes(std::span(id.bytes)));
    return {static_cast<uint32_t>(prefix >> (64 - kShardBits)),
            static_cast<uint32_t>(prefix >> (64 - kShardBits - kRememberedBits)) &
                ((1U << kRememberedBits) - 1)};
}

/// The two buckets of r in a table of `buckets`; different ones when there are two or more.
struct BucketPair {
    uint32_t first;
    uint32_t second;
};
BucketPair buckets_of(uint32_t r, uint32_t buckets) {
    const auto first = static_cast<uint32_t>((uint64_t{r} * buckets) >> kRememberedBits);
    if (buckets == 1) {
        return {0, 0};
    }
    // A bijection of the 24-bit numbers: xor-shift and odd multiplication, each invertible.
    constexpr uint32_t kMask = (1U << kRememberedBits) - 1;
    uint32_t mixed = r ^ r >> 13;
    mixed = (mixed * 0x9E3779B1U) & kMask;
    mixed ^= mixed >> 11;
    mixed = (mixed * 0x85EBCA6BU) & kMask;
    mixed ^= mixed >> 13;
    const auto distance =
        1 + static_cast<uint32_t>((uint64_t{mixed} * (buckets - 1)) >> kRememberedBits);
    const uint32_t second = first + distance;
    return {first, second < buckets ? second : second - buckets};
}

uint32_t other_bucket(Slot slot, uint32_t bucket, uint32_t buckets) {
    const BucketPair pair = buckets_of(remembered(slot), buckets);
    return pair.first == bucket ? pair.second : pair.first;
}

// Comparing the eight slots of a bucket is the inner loop of everything here. In a mask, bit 2i
// stands for slot i, and the odd bits are zero. SSE2 is part of x86-64; elsewhere a plain loop does
// the same.

using SlotMask = uint32_t;

constexpr SlotMask slot_bit(size_t i) {
    return SlotMask{1} << (2 * i);
}
/// The first slot of a mask that is not zero.
size_t first_slot(SlotMask mask) {
    return static_cast<size_t>(std::countr_zero(mask)) / 2;
}

#if defined(__SSE2__)

/// The mask of four pairs of slots, of which the even 32-bit lanes are all ones or all zeros.
SlotMask mask_of(__m128i first, __m128i second, __m128i third, __m128i fourth) {
    const __m128i low = _mm_packs_epi32(first, second);
    const __m128i high = _mm_packs_epi32(third, fourth);
    const int bytes = _mm_movemask_epi8(_mm_packs_epi16(low, high));
    return static_cast<SlotMask>(bytes) & 0x5555U;
}
__m128i load_pair(const std::byte* bucket, size_t i) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(bucket) + i);
}

/// The slots that remember r; empty ones remember 0.
SlotMask match_mask(const std::byte* bucket, uint32_t r) {
    const __m128i wanted = _mm_set1_epi32(static_cast<int>(r));
    const auto pair = [&](size_t i) {
        return _mm_cmpeq_epi32(_mm_srli_epi64(load_pair(bucket, i), PageAddress::kBits), wanted);
    };
    return mask_of(pair(0), pair(1), pair(2), pair(3));
}

SlotMask empty_mask(const std::byte* bucket) {
    const auto pair = [&](size_t i) {
        const __m128i zero = _mm_cmpeq_epi32(load_pair(bucket, i), _mm_setzero_si128());
        return _mm_and_si128(zero, _mm_shuffle_epi32(zero, _MM_SHUFFLE(2, 3, 0, 1)));
    };
    return mask_of(pair(0), pair(1), pair(2), pair(3));
}

#else

SlotMask match_mask(const std::byte* bucket, uint32_t r) {
    SlotMask mask = 0;
    for (size_t i = 0; i < kSlotsPerBucket; ++i) {
        mask |= remembered(load_slot(bucket + i * kSlotBytes)) == r ? slot_bit(i) : 0;
    }
    return mask;
}

SlotMask empty_mask(const std::byte* bucket) {
    SlotMask mask = 0;
    for (size_t i = 0; i < kSlotsPerBucket; ++i) {
        mask |= load_slot(bucket + i * kSlotBytes) == 0 ? slot_bit(i) : 0;
    }
    return mask;
}

#endif

struct FreeBuckets {
    void operator()(std::byte* buckets) const {
        ::operator delete(buckets, std::align_val_t{kBucketBytes});
    }
};
/// Buckets on the heap, each one cache line.
using BucketArray = std::unique_ptr<std::byte[], FreeBuckets>;

BucketArray make_buckets(uint32_t buckets) {
    const size_t size = size_t{buckets} * kBucketBytes;
    BucketArray array(
        static_cast<std::byte*>(::operator new(size, std::align_val_t{kBucketBytes})));
    std::memset(array.get(), 0, size);
    return array;
}

/// A table being changed: the caller owns it or holds its shard's lock.
struct Table {
    std::byte* slots;
    uint32_t buckets;

    std::byte* bucket(uint32_t number) const { return slots + size_t{number} * kBucketBytes; }
    Slot get(uint32_t number, size_t i) const { return load_slot(bucket(number) + i * kSlotBytes); }
    void put(uint32_t number, size_t i, Slot slot) const {
        store_slot(bucket(number) + i * kSlotBytes, slot);
    }
};

/// Makes room for a slot whose buckets are both full by moving others to their second buckets: a
/// breadth-first search for the nearest empty slot. Returns the bucket that has one more full slot
/// now, or nullopt, and nothing is changed, when the search came to its bound. The bound trades
/// memory for time; measured while growing to 5 million chunks: 6 visited buckets 8.80 bytes a
/// chunk and 295 ns an insert, 10 buckets 8.74 and 308, 16 buckets 8.70 and 465, 32 buckets 8.68
/// and 460.
std::optional<uint32_t> place_by_moving(const Table& table, Slot slot, BucketPair pair) {
    struct Step {
        uint32_t bucket;
        int16_t parent;       // Index of the step whose bucket holds the slot to be moved here.
        uint8_t parent_slot;  // Which of its slots.
    };
    constexpr size_t kMaxSteps = 10;
    if (table.buckets == 1) {
        return std::nullopt;
    }
    std::array<Step, kMaxSteps> steps;
    steps[0] = {pair.first, -1, 0};
    steps[1] = {pair.second, -1, 0};
    size_t count = 2;
    const auto parent_of = [&](const Step& step) -> const Step& {
        return steps[static_cast<size_t>(step.parent)];
    };
    for (size_t at = 0; at < count; ++at) {
        const uint32_t from = steps[at].bucket;
        for (uint8_t i = 0; i < kSlotsPerBucket; ++i) {
            const Slot moved = table.get(from, i);
            const uint32_t to = other_bucket(moved, from, table.buckets);
            const SlotMask empty = empty_mask(table.bucket(to));
            if (empty == 0) {
                // A bucket may not be on its own path, or it would be asked to give a slot twice.
                bool on_path = steps[at].bucket == to;
                for (const Step* step = &steps[at]; step->parent >= 0;) {
                    step = &parent_of(*step);
                    on_path |= step->bucket == to;
                }
                if (!on_path && count < kMaxSteps) {
                    steps[count++] = {to, static_cast<int16_t>(at), i};
                }
                continue;
            }
            // Back along the path: each slot moves into the hole behind it and leaves one.
            table.put(to, first_slot(empty), moved);
            size_t hole = i;
            const Step* step = &steps[at];
            for (; step->parent >= 0; step = &parent_of(*step)) {
                table.put(step->bucket, hole,
                          table.get(parent_of(*step).bucket, step->parent_slot));
                hole = step->parent_slot;
            }
            table.put(step->bucket, hole, slot);
            return to;
        }
    }
    return std::nullopt;
}

/// Puts a slot into the emptier of its buckets, or makes room. False when there is none.
bool place(const Table& table, Slot slot) {
    const BucketPair pair = buckets_of(remembered(slot), table.buckets);
    const SlotMask first = empty_mask(table.bucket(pair.first));
    const SlotMask second = empty_mask(table.bucket(pair.second));
    if ((first | second) == 0) {
        return place_by_moving(table, slot, pair).has_value();
    }
    const bool in_first = std::popcount(first) >= std::popcount(second);
    table.put(in_first ? pair.first : pair.second, first_slot(in_first ? first : second), slot);
    return true;
}

/// A reader-writer lock of four bytes. Sections are short, and two threads seldom meet in one of
/// 4096 shards, so waiting first spins, then sleeps (for a shard being read from disk). A waiting
/// writer holds off new readers.
class ShardLock {
  public:
    void lock() {
        for (uint32_t before = state_.fetch_or(kWriter, std::memory_order_acquire);
             (before & kWriter) != 0;
             before = state_.fetch_or(kWriter, std::memory_order_acquire)) {
            wait_for_writer();
        }
        // The readers inside are on their way out; none of them sleeps with the lock held.
        for (int spins = 0; (state_.load(std::memory_order_acquire) & ~kWriter) != 0;) {
            relax(spins);
        }
    }
    void unlock() {
        state_.fetch_and(~kWriter, std::memory_order_release);
        state_.notify_all();
    }
    void lock_shared() {
        while ((state_.fetch_add(1, std::memory_order_acquire) & kWriter) != 0) {
            state_.fetch_sub(1, std::memory_order_relaxed);
            wait_for_writer();
        }
    }
    void unlock_shared() { state_.fetch_sub(1, std::memory_order_release); }

  private:
    static constexpr uint32_t kWriter = uint32_t{1} << 31;
    static constexpr int kMaxSpins = 64;

    static void relax(int& spins) {
        if (++spins < kMaxSpins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            std::this_thread::yield();
        }
    }
    void wait_for_writer() {
        for (int spins = 0;;) {
            const uint32_t now = state_.load(std::memory_order_relaxed);
            if ((now & kWriter) == 0) {
                return;
            }
            if (spins < kMaxSpins) {
                relax(spins);
            } else {
                state_.wait(now, std::memory_order_relaxed);
            }
        }
    }

    std::atomic<uint32_t> state_{0};
};

enum class ShardState : uint8_t {
    kHeap,        ///< Table on the heap (or none yet).
    kMapped,      ///< Checked, used in place in the checkpoint's mapping.
    kUnverified,  ///< In the mapping, not checked yet.
    kDamaged,     ///< Failed its check; every use is an error until it is cleared.
};

}  // namespace

struct alignas(64) ChunkIndex::Shard {
    mutable ShardLock lock;
    // Changed under the lock. Prefetching reads `slots` and `buckets` without it: a stale value
    // fetches a useless line, no more.
    std::atomic<uint32_t> buckets{0};
    std::atomic<const std::byte*> slots{nullptr};
    std::atomic<uint32_t> entries{0};
    ShardState state = ShardState::kHeap;
    BucketArray owned;                            ///< `slots` in state kHeap; else null.
    std::unique_ptr<std::vector<Slot>> overflow;  ///< Null when empty.

    Table table() const {
        assert(state == ShardState::kHeap);
        return {owned.get(), buckets.load(std::memory_order_relaxed)};
    }
    void use(BucketArray array, uint32_t count) {
        owned = std::move(array);
        slots.store(owned.get(), std::memory_order_relaxed);
        buckets.store(count, std::memory_order_relaxed);
        state = ShardState::kHeap;
    }
    void make_writable() {
        if (state == ShardState::kMapped) {
            const uint32_t count = buckets.load(std::memory_order_relaxed);
            BucketArray copy = make_buckets(count);
            std::memcpy(copy.get(), slots.load(std::memory_order_relaxed),
                        size_t{count} * kBucketBytes);
            use(std::move(copy), count);
        }
    }

    bool usable() const { return state <= ShardState::kMapped; }

    template <typename Visit>
    void for_each_match(uint32_t r, Visit&& visit) const {
        const uint32_t count = buckets.load(std::memory_order_relaxed);
        if (count == 0) {
            return;
        }
        const BucketPair pair = buckets_of(r, count);
        const std::byte* base = slots.load(std::memory_order_relaxed);
        const std::byte* first = base + size_t{pair.first} * kBucketBytes;
        const std::byte* second = base + size_t{pair.second} * kBucketBytes;
        SlotMask mask = match_mask(first, r);
        if (pair.second != pair.first) {
            mask |= match_mask(second, r) << (2 * kSlotsPerBucket);
        }
        for (; mask != 0; mask &= mask - 1) {
            const size_t i = first_slot(mask);
            const std::byte* at = i < kSlotsPerBucket ? first + i * kSlotBytes
                                                      : second + (i - kSlotsPerBucket) * kSlotBytes;
            if (const Slot slot = load_slot(at); slot != 0) {
                visit(slot, at);
            }
        }
        if (overflow) {
            for (const Slot& slot : *overflow) {
                if (remembered(slot) == r) {
                    visit(slot, nullptr);
                }
            }
        }
    }

    void prefetch(uint32_t r) const {
        const uint32_t count = buckets.load(std::memory_order_relaxed);
        if (count != 0) {
            const BucketPair pair = buckets_of(r, count);
            const std::byte* base = slots.load(std::memory_order_relaxed);
            __builtin_prefetch(base + size_t{pair.first} * kBucketBytes);
            __builtin_prefetch(base + size_t{pair.second} * kBucketBytes);
        }
    }

    bool contains(Slot wanted) const {
        bool found = false;
        for_each_match(remembered(wanted),
                       [&](Slot slot, const std::byte*) { found |= slot == wanted; });
        return found;
    }

    /// Moves everything to a table of `wanted` buckets, or some more where that takes all. What
    /// finds no room in a table with room to spare goes to the overflow.
    void rehash(uint32_t wanted) {
        const size_t old_slots = buckets.load(std::memory_order_relaxed) * kSlotsPerBucket;
        for (uint32_t count = wanted;; ++count) {
            BucketArray array = make_buckets(count);
            const Table to{array.get(), count};
            std::vector<Slot> left_over;
            // A bucket of the new table is filled from its front, so its fill says where to put;
            // that spares reading the buckets, most of the cost of growing.
            std::vector<uint8_t> fill(count);
            const auto move = [&](Slot slot) {
                if (slot == 0) {
                    return;
                }
                const BucketPair pair = buckets_of(remembered(slot), count);
                const uint32_t target =
                    fill[pair.first] <= fill[pair.second] ? pair.first : pair.second;
                if (fill[target] < kSlotsPerBucket) {
                    to.put(target, fill[target]++, slot);
                } else if (const auto filled = place_by_moving(to, slot, pair)) {
                    ++fill[*filled];
                } else {
                    left_over.push_back(slot);
                }
            };
            for (size_t i = 0; i < old_slots; ++i) {
                move(load_slot(owned.get() + i * kSlotBytes));
            }
            if (overflow) {
                std::ranges::for_each(*overflow, move);
            }
            if (left_over.empty()) {
                overflow.reset();
            } else if (too_small(count)) {
                continue;
            } else {
                overflow = std::make_unique<std::vector<Slot>>(std::move(left_over));
            }
            use(std::move(array), count);
            return;
        }
    }

    /// True when a table of `count` buckets that has no place for a slot should grow.
    bool too_small(uint32_t count) const {
        return count < kMaxBuckets &&
               entries.load(std::memory_order_relaxed) >= kMinGrowthLoad * kSlotsPerBucket * count;
    }

    bool insert(Slot slot) {
        if (contains(slot)) {
            return false;
        }
        make_writable();
        for (;;) {
            const uint32_t count = buckets.load(std::memory_order_relaxed);
            if (count > 0 && place(table(), slot)) {
                break;
            }
            if (!too_small(count)) {
                if (!overflow) {
                    overflow = std::make_unique<std::vector<Slot>>();
                }
                overflow->push_back(slot);
                break;
            }
            rehash(count + std::max(count / 8, 1U));
        }
        entries.fetch_add(1, std::memory_order_relaxed);
        return true;
    }

    bool erase(Slot wanted) {
        if (!contains(wanted)) {
            return false;
        }
        make_writable();
        std::byte* where = nullptr;
        for_each_match(remembered(wanted), [&](Slot slot, const std::byte* at) {
            if (slot == wanted && at != nullptr) {
                where = owned.get() + (at - owned.get());
            }
        });
        if (where != nullptr) {
            store_slot(where, 0);
        } else {
            std::erase(*overflow, wanted);
            if (overflow->empty()) {
                overflow.reset();
            }
        }
        entries.fetch_sub(1, std::memory_order_relaxed);
        return true;
    }

    void shrink_if_sparse() {
        const uint32_t count = buckets.load(std::memory_order_relaxed);
        const double full = entries.load(std::memory_order_relaxed);
        if (state == ShardState::kHeap && count > 1 &&
            full < kShrinkLoad * count * kSlotsPerBucket) {
            rehash(1 + static_cast<uint32_t>(full / kSlotsPerBucket / kLoadAfterShrinking));
        }
    }
};

namespace {

/// What a shard takes in a checkpoint: buckets and overflow slots, filled up with zeros to whole
/// cache lines.
uint64_t stored_bytes(const IndexShardRow& row) {
    const uint64_t used = row.buckets * kBucketBytes + row.overflow_slots * kSlotBytes;
    return (used + kBucketBytes - 1) / kBucketBytes * kBucketBytes;
}

}  // namespace

/// An opened checkpoint.
struct ChunkIndex::Mapping {
    std::unique_ptr<io::MappedBytes> mapped;
    std::string path;

    IndexShardRow row(uint32_t shard) const {
        return load<IndexShardRow>(mapped->bytes().subspan(
            sizeof(IndexCheckpointHeader) + shard * sizeof(IndexShardRow), sizeof(IndexShardRow)));
    }
    Bytes shard_bytes(const IndexShardRow& row) const {
        return mapped->bytes().subspan(row.offset_bytes, stored_bytes(row));
    }
};

namespace {

constexpr size_t kTableBytes = kIndexShards * sizeof(IndexShardRow);
constexpr size_t kDataOffset = sizeof(IndexCheckpointHeader) + kTableBytes;
static_assert(kDataOffset % kPageBytes == 0 && sizeof(IndexCheckpointHeader) == kPageBytes);

std::unexpected<Error> damaged(const std::string& path, uint64_t offset, std::string_view reason) {
    return fail(ErrorCode::kCorrupt, fmt::format("{}: index checkpoint damaged at offset {}: {}; "
                                                 "rebuild the index from the segments",
                                                 path, offset, reason));
}

}  // namespace

ChunkIndex::ChunkIndex() : shards_(std::make_unique<Shard[]>(kIndexShards)) {
    static_assert(sizeof(Shard) == 64, "one cache line, fetched as one");
}
ChunkIndex::~ChunkIndex() = default;

uint32_t ChunkIndex::shard_of(const ChunkId& id) {
    return place_of(id).shard;
}

// --- Changing and probing. Each takes the shard's lock, and when it finds the shard unchecked,
// --- lets go, has it checked, and begins again.

Result<bool> ChunkIndex::insert(const ChunkId& id, PageAddress address) {
    const Place where = place_of(id);
    Shard& shard = shards_[where.shard];
    for (;;) {
        {
            const std::unique_lock guard(shard.lock);
            if (shard.usable()) {
                return shard.insert(make_slot(where.r, address));
            }
        }
        STELLARIUM_TRY(verify_shard(where.shard));
    }
}

Result<void> ChunkIndex::insert_many(std::span<const Entry> entries) {
    constexpr size_t kAhead = 16;
    const auto prefetch = [&](size_t i) {
        if (i < entries.size()) {
            const Place where = place_of(entries[i].id);
            shards_[where.shard].prefetch(where.r);
        }
    };
    for (size_t i = 0; i < std::min(kAhead, entries.size()); ++i) {
        prefetch(i);
    }
    for (size_t i = 0; i < entries.size(); ++i) {
        prefetch(i + kAhead);
        STELLARIUM_TRY(insert(entries[i].id, entries[i].address));
    }
    return {};
}

Result<bool> ChunkIndex::erase(const ChunkId& id, PageAddress address) {
    const Place where = place_of(id);
    Shard& shard = shards_[where.shard];
    for (;;) {
        {
            const std::unique_lock guard(shard.lock);
            if (shard.usable()) {
                const bool erased = shard.erase(make_slot(where.r, address));
                if (erased) {
                    shard.shrink_if_sparse();
                }
                return erased;
            }
        }
        STELLARIUM_TRY(verify_shard(where.shard));
    }
}

Result<bool> ChunkIndex::replace(const ChunkId& id, PageAddress from, PageAddress to) {
    const Place where = place_of(id);
    Shard& shard = shards_[where.shard];
    for (;;) {
        {
            const std::unique_lock guard(shard.lock);
            if (shard.usable()) {
                if (from == to) {
                    return shard.contains(make_slot(where.r, from));
                }
                // Readers are kept out by the lock, so they never see the time in between.
                if (!shard.erase(make_slot(where.r, from))) {
                    return false;
                }
                shard.insert(make_slot(where.r, to));
                return true;
            }
        }
        STELLARIUM_TRY(verify_shard(where.shard));
    }
}

Result<void> ChunkIndex::candidates(const ChunkId& id, std::vector<PageAddress>& out) const {
    const Place where = place_of(id);
    const Shard& shard = shards_[where.shard];
    for (;;) {
        {
            const std::shared_lock guard(shard.lock);
            if (shard.usable()) {
                shard.for_each_match(where.r, [&](Slot slot, const std::byte*) {
                    out.emplace_back(address_value(slot));
                });
                return {};
            }
        }
        STELLARIUM_TRY(verify_shard(where.shard));
    }
}

Result<void> ChunkIndex::find_many(std::span<const ChunkId> ids, std::vector<Match>& out) const {
    // The buckets of a probe are fetched kAhead probes before they are compared: about as many
    // lines as a processor keeps under way. The shards' heads stay in its second-level cache.
    constexpr size_t kAhead = 24;
    std::array<Place, kAhead> ring;
    const auto fetch = [&](size_t i) {
        const Place where = place_of(ids[i]);
        ring[i % kAhead] = where;
        shards_[where.shard].prefetch(where.r);
    };
    for (size_t i = 0; i < std::min(kAhead, ids.size()); ++i) {
        fetch(i);
    }
    for (size_t i = 0; i < ids.size();) {
        const Place where = ring[i % kAhead];
        const Shard& shard = shards_[where.shard];
        {
            const std::shared_lock guard(shard.lock);
            if (shard.usable()) {
                shard.for_each_match(where.r, [&](Slot slot, const std::byte*) {
                    out.push_back({i, PageAddress(address_value(slot))});
                });
                if (i + kAhead < ids.size()) {
                    fetch(i + kAhead);
                }
                ++i;
                continue;
            }
        }
        STELLARIUM_TRY(verify_shard(where.shard));
    }
    return {};
}

// --- All of it.

Result<void> ChunkIndex::for_each(const std::function<void(PageAddress)>& visit) const {
    std::vector<std::byte> copy;
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        uint32_t buckets = 0;
        uint32_t entries = 0;
        uint32_t overflow_slots = 0;
        STELLARIUM_TRY(copy_shard(number, copy, buckets, entries, overflow_slots));
        for (size_t at = 0; at < copy.size(); at += kSlotBytes) {
            if (const Slot slot = load_slot(copy.data() + at); slot != 0) {
                visit(PageAddress(address_value(slot)));
            }
        }
    }
    return {};
}

Result<uint64_t> ChunkIndex::erase_if(const std::function<bool(PageAddress)>& dead) {
    uint64_t erased = 0;
    std::vector<Slot> doomed;
    for (uint32_t number = 0; number < kIndexShards;) {
        Shard& shard = shards_[number];
        {
            const std::unique_lock guard(shard.lock);
            if (shard.usable()) {
                doomed.clear();
                const auto judge = [&](Slot slot) {
                    if (slot != 0 && dead(PageAddress(address_value(slot)))) {
                        doomed.push_back(slot);
                    }
                };
                const std::byte* slots = shard.slots.load(std::memory_order_relaxed);
                const size_t count =
                    shard.buckets.load(std::memory_order_relaxed) * kSlotsPerBucket;
                for (size_t i = 0; i < count; ++i) {
                    judge(load_slot(slots + i * kSlotBytes));
                }
                if (shard.overflow) {
                    std::ranges::for_each(*shard.overflow, judge);
                }
                for (const Slot slot : doomed) {
                    erased += shard.erase(slot) ? 1 : 0;
                }
                shard.shrink_if_sparse();
                ++number;
                continue;
            }
        }
        STELLARIUM_TRY(verify_shard(number));
    }
    return erased;
}

uint64_t ChunkIndex::size() const {
    uint64_t total = 0;
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        total += shards_[number].entries.load(std::memory_order_relaxed);
    }
    return total;
}

uint64_t ChunkIndex::memory_bytes() const {
    uint64_t total = sizeof(ChunkIndex) + kIndexShards * sizeof(Shard);
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        const Shard& shard = shards_[number];
        const std::shared_lock guard(shard.lock);
        if (shard.owned) {
            total += shard.buckets.load(std::memory_order_relaxed) * kBucketBytes;
        }
        if (shard.overflow) {
            total += sizeof(std::vector<Slot>) + shard.overflow->capacity() * kSlotBytes;
        }
    }
    return total;
}

uint64_t ChunkIndex::mapped_bytes() const {
    uint64_t total = 0;
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        const Shard& shard = shards_[number];
        const std::shared_lock guard(shard.lock);
        if (shard.state != ShardState::kHeap) {
            total += shard.buckets.load(std::memory_order_relaxed) * kBucketBytes;
        }
    }
    return total;
}

// --- Checkpoints.

/// A shard's buckets and overflow slots as they are written to a checkpoint.
Result<void> ChunkIndex::copy_shard(uint32_t number, std::vector<std::byte>& out, uint32_t& buckets,
                                    uint32_t& entries, uint32_t& overflow_slots) const {
    const Shard& shard = shards_[number];
    for (;;) {
        {
            const std::shared_lock guard(shard.lock);
            if (shard.usable()) {
                buckets = shard.buckets.load(std::memory_order_relaxed);
                entries = shard.entries.load(std::memory_order_relaxed);
                overflow_slots = shard.overflow ? static_cast<uint32_t>(shard.overflow->size()) : 0;
                const size_t table_bytes = size_t{buckets} * kBucketBytes;
                out.resize(table_bytes + overflow_slots * kSlotBytes);
                if (table_bytes > 0) {
                    std::memcpy(out.data(), shard.slots.load(std::memory_order_relaxed),
                                table_bytes);
                }
                for (size_t i = 0; i < overflow_slots; ++i) {
                    store_slot(out.data() + table_bytes + i * kSlotBytes, (*shard.overflow)[i]);
                }
                return {};
            }
        }
        STELLARIUM_TRY(verify_shard(number));
    }
}

Result<void> ChunkIndex::write_checkpoint(io::File& file, const CheckpointInfo& info) const {
    constexpr size_t kWriteBytes = size_t{1} << 20;
    STELLARIUM_TRY(file.truncate(0));
    std::vector<IndexShardRow> table(kIndexShards);
    std::vector<std::byte> pending;
    uint64_t pending_offset = kDataOffset;
    uint64_t total_entries = 0;
    const auto write_pending = [&]() -> Result<void> {
        STELLARIUM_TRY(io::write_all(file, pending, pending_offset));
        pending_offset += pending.size();
        pending.clear();
        return {};
    };
    std::vector<std::byte> shard;
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        uint32_t buckets = 0;
        uint32_t entries = 0;
        uint32_t overflow_slots = 0;
        STELLARIUM_TRY(copy_shard(number, shard, buckets, entries, overflow_slots));
        IndexShardRow& row = table[number];
        row.offset_bytes = pending_offset + pending.size();
        row.buckets = buckets;
        row.overflow_slots = overflow_slots;
        row.entries = entries;
        shard.resize(stored_bytes(row));
        row.checksum = checksum64(shard, number);
        total_entries += entries;
        pending.insert(pending.end(), shard.begin(), shard.end());
        if (pending.size() >= kWriteBytes) {
            STELLARIUM_TRY(write_pending());
        }
    }
    STELLARIUM_TRY(write_pending());

    const Bytes table_bytes = std::as_bytes(std::span(table));
    IndexCheckpointHeader header;
    header.magic = IndexCheckpointHeader::kMagic;
    header.read_version = IndexCheckpointHeader::kVersion;
    header.write_version = IndexCheckpointHeader::kVersion;
    header.store_uuid = info.store_uuid;
    header.sequence = info.sequence;
    header.entries = total_entries;
    header.file_bytes = pending_offset;
    header.shards = kIndexShards;
    header.bucket_bytes = static_cast<uint32_t>(kBucketBytes);
    header.table_checksum = checksum64(table_bytes);
    header.checksum = checksum64(bytes_of(header).first(offsetof(IndexCheckpointHeader, checksum)));
    STELLARIUM_TRY(io::write_all(file, table_bytes, sizeof(header)));
    STELLARIUM_TRY(io::write_all(file, bytes_of(header), 0));
    return file.datasync();
}

Result<ChunkIndex::Opened> ChunkIndex::open_checkpoint(io::File& file,
                                                       const std::array<uint8_t, 16>& store_uuid) {
    const std::string& path = file.path();
    STELLARIUM_ASSIGN(const uint64_t file_bytes, file.size_bytes());
    if (file_bytes < kDataOffset) {
        return damaged(path, file_bytes, "the file ends before its data");
    }
    auto mapping = std::make_unique<Mapping>();
    mapping->path = path;
    STELLARIUM_ASSIGN(mapping->mapped, file.map(0, file_bytes));
    const Bytes bytes = mapping->mapped->bytes();
    STELLARIUM_TRY(mapping->mapped->fetch(0, kDataOffset));
    const auto header = load<IndexCheckpointHeader>(bytes.first(sizeof(IndexCheckpointHeader)));
    if (header.magic != IndexCheckpointHeader::kMagic) {
        return damaged(path, 0, "this is no index checkpoint");
    }
    // The checksum goes before the version, so that damage is not taken for the future.
    if (header.checksum != checksum64(bytes.first(offsetof(IndexCheckpointHeader, checksum)))) {
        return damaged(path, 0, "the header fails its checksum");
    }
    if (header.read_version > IndexCheckpointHeader::kVersion || header.features_refuse != 0) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{}: index checkpoint of format version {} with features {:#x}; "
                                "this program reads version {}",
                                path, header.read_version.get(), header.features_refuse.get(),
                                IndexCheckpointHeader::kVersion));
    }
    if (header.read_version == 0 || header.shards != kIndexShards ||
        header.bucket_bytes != kBucketBytes ||
        !all_zero(std::as_bytes(std::span(header.reserved)))) {
        return damaged(path, 0, "the header has impossible fields");
    }
    if (header.store_uuid != store_uuid) {
        return damaged(path, offsetof(IndexCheckpointHeader, store_uuid),
                       "it belongs to another store");
    }
    if (header.file_bytes != file_bytes) {
        return damaged(path, file_bytes,
                       fmt::format("the file should be {} bytes long", header.file_bytes.get()));
    }
    if (header.table_checksum !=
        checksum64(bytes.subspan(sizeof(IndexCheckpointHeader), kTableBytes))) {
        return damaged(path, sizeof(IndexCheckpointHeader), "the shard table fails its checksum");
    }

    auto index = std::make_unique<ChunkIndex>();
    uint64_t expected_offset = kDataOffset;
    uint64_t entries = 0;
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        const IndexShardRow row = mapping->row(number);
        const uint64_t row_offset = sizeof(IndexCheckpointHeader) + number * sizeof(IndexShardRow);
        const uint64_t shard_bytes = stored_bytes(row);
        if (row.offset_bytes != expected_offset || row.buckets > kMaxBuckets || row.reserved != 0 ||
            row.entries > shard_bytes / kSlotBytes || (row.buckets == 0 && shard_bytes != 0)) {
            return damaged(path, row_offset, fmt::format("impossible row of shard {}", number));
        }
        if (shard_bytes > file_bytes - expected_offset) {
            return damaged(path, row_offset, fmt::format("shard {} ends after the file", number));
        }
        expected_offset += shard_bytes;
        entries += row.entries;
        Shard& shard = index->shards_[number];
        if (row.buckets != 0) {
            shard.buckets = row.buckets;
            shard.slots = bytes.data() + row.offset_bytes;
            shard.entries = row.entries;
            shard.state = ShardState::kUnverified;
        }
    }
    if (expected_offset != file_bytes || entries != header.entries) {
        return damaged(path, sizeof(IndexCheckpointHeader),
                       "header and shard table contradict each other");
    }
    index->mapping_ = std::move(mapping);
    return Opened{std::move(index), {header.store_uuid, header.sequence}};
}

/// Checks a shard of the mapping: its checksum, and that every slot is where a probe looks for it,
/// so that a file written by a faulty program is refused as well.
Result<void> ChunkIndex::verify_shard(uint32_t number) const {
    Shard& shard = shards_[number];
    const std::unique_lock guard(shard.lock);
    if (shard.usable()) {
        return {};
    }
    const IndexShardRow row = mapping_->row(number);
    const auto complain = [&](std::string_view reason) {
        return damaged(mapping_->path, row.offset_bytes,
                       fmt::format("shard {} {}", number, reason));
    };
    if (shard.state == ShardState::kDamaged) {
        return complain("failed its check");
    }
    const Bytes bytes = mapping_->shard_bytes(row);
    shard.state = ShardState::kDamaged;
    if (const auto fetched = mapping_->mapped->fetch(row.offset_bytes, bytes.size()); !fetched) {
        return complain("cannot be read: " + fetched.error().message());
    }
    if (checksum64(bytes, number) != row.checksum) {
        return complain("fails its checksum");
    }
    const size_t in_table = row.buckets * kSlotsPerBucket;
    uint32_t entries = 0;
    std::vector<Slot> overflow;
    for (size_t i = 0; i < bytes.size() / kSlotBytes; ++i) {
        const Slot slot = load_slot(bytes.data() + i * kSlotBytes);
        if (slot == 0) {
            continue;
        }
        const uint64_t address = address_value(slot);
        const BucketPair pair = buckets_of(remembered(slot), row.buckets);
        if (address == 0 || address == PageAddress::kReserved ||
            (i < in_table && i / kSlotsPerBucket != pair.first &&
             i / kSlotsPerBucket != pair.second)) {
            return complain(fmt::format("has an impossible slot {}", i));
        }
        ++entries;
        if (i >= in_table) {
            overflow.push_back(slot);
        }
    }
    if (entries != row.entries) {
        return complain("has another number of entries than its row says");
    }
    if (!overflow.empty()) {
        shard.overflow = std::make_unique<std::vector<Slot>>(std::move(overflow));
    }
    shard.state = ShardState::kMapped;
    return {};
}

Result<void> ChunkIndex::verify() const {
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        STELLARIUM_TRY(verify_shard(number));
    }
    return {};
}

std::vector<uint32_t> ChunkIndex::clear_damaged() {
    std::vector<uint32_t> cleared;
    for (uint32_t number = 0; number < kIndexShards; ++number) {
        Shard& shard = shards_[number];
        const std::unique_lock guard(shard.lock);
        if (shard.state == ShardState::kDamaged) {
            shard.use(nullptr, 0);
            shard.entries = 0;
            cleared.push_back(number);
        }
    }
    return cleared;
}

}  // namespace stellarium::nebula
