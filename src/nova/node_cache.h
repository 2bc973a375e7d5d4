// The table behind NodeCache, and reading of tree nodes through it; private to the tree's
// implementation.
//
// Two kinds of entries share one budget. A node entry holds a decoded node by (id, level). A path
// entry says which leaf node lies under (root id, leaf number), so that the leaf of a warm read is
// found by two look-ups and not by walking five inner nodes. A path entry names the leaf and does
// not hold it: what the budget counts is what the table keeps alive.
//
// Thread rule: everything may be called from any thread.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <variant>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "nova/codec.h"
#include "nova/tree.h"

namespace stellarium::nova {

using LeafPtr = std::shared_ptr<const DecodedLeaf>;
using InnerPtr = std::shared_ptr<const TreeChildren>;

struct NodeCache::Impl {
    /// What an entry is found by: the id of a node and its level, or the id of a root and a leaf
    /// number.
    struct Key {
        Hash256 id;
        uint64_t tag = 0;

        static Key of_node(const Hash256& id, uint32_t level) { return {id, ~uint64_t{level}}; }
        static Key of_path(const Hash256& root, uint64_t leaf) { return {root, leaf}; }
        uint64_t hash() const;
        friend bool operator==(const Key&, const Key&) = default;
    };
    using Value = std::variant<NodeRef, LeafPtr, InnerPtr>;

    struct Entry {
        Entry* chain = nullptr;  ///< Next in the same bucket.
        Entry* newer = nullptr;
        Entry* older = nullptr;
        uint64_t key_hash = 0;
        uint64_t charge_bytes = 0;
        Key key;
        Value value;
    };

    /// A hash table with chains and a list by time of last use.
    class Shard {
      public:
        Shard();
        ~Shard();
        Shard(const Shard&) = delete;
        Shard& operator=(const Shard&) = delete;
        /// The entry's value, as `T`, moved to the front; nullopt when it is not there.
        template <typename T>
        std::optional<T> find(const Key& key, uint64_t key_hash);
        /// Adds the entry unless one with its key is there; evicts what no longer fits. An entry
        /// that does not fit at all is dropped.
        void insert(std::unique_ptr<Entry> entry, uint64_t budget_bytes);
        void erase(const Key& key, uint64_t key_hash);
        void clear();
        uint64_t memory_bytes() const;
        void count_node_read();
        void add_stats(Stats& stats) const;

      private:
        Entry** slot_of(const Key& key, uint64_t key_hash);
        void unlink(Entry& entry);
        void push_newest(Entry& entry);
        void grow();

        mutable std::mutex mutex_;
        std::vector<Entry*> buckets_;  ///< A power of two.
        Entry* newest_ = nullptr;
        Entry* oldest_ = nullptr;
        uint64_t entries_ = 0;
        uint64_t memory_bytes_ = 0;
        Stats stats_;
    };

    static constexpr size_t kMaxShards = 16;
    /// A shard has room for dozens of the largest leaves.
    static constexpr uint64_t kMinShardBytes = uint64_t{1} << 20;
    static constexpr uint64_t kMinBudgetBytes = uint64_t{64} << 10;

    explicit Impl(uint64_t budget_bytes);
    Shard& shard_of(uint64_t key_hash) { return *shards[(key_hash >> 56) % shards.size()]; }

    template <typename T>
    std::optional<T> find(const Key& key) {
        const uint64_t key_hash = key.hash();
        return shard_of(key_hash).find<T>(key, key_hash);
    }
    /// `value_bytes`: what the value keeps alive beyond the entry itself.
    void insert(const Key& key, Value value, uint64_t value_bytes);

    std::vector<std::unique_ptr<Shard>> shards;
    uint64_t shard_budget_bytes = 0;

    /// Addresses never come to mean something else, so an entry is right for ever, or leads to an
    /// address that is stale in turn. Bounded: forgotten when there are too many.
    static constexpr size_t kMaxMoved = size_t{1} << 16;
    std::atomic<bool> any_moved = false;
    mutable std::shared_mutex moved_mutex;
    absl::flat_hash_map<uint64_t, uint64_t> moved;  ///< Guarded by moved_mutex.
};

/// Tree nodes by name: from the cache, else from the store. Belongs to one call; borrows both.
class TreeReader {
  public:
    TreeReader(nebula::Store& store, NodeCache& cache, IoMode mode = IoMode::kMayBlock)
        : store_(store), cache_(*cache.impl_), mode_(mode) {}

    /// Children of an inner node; none for the empty node. Never null.
    Result<InnerPtr> inner(const NodeRef& ref, uint32_t level);
    /// A leaf, resolved; an empty one for the empty node. Never null.
    Result<LeafPtr> leaf(const NodeRef& ref);
    /// The name of the leaf node under `root`.
    Result<NodeRef> leaf_ref(const NodeRef& root, uint64_t leaf_number);

    /// Puts nodes that were just appended into the cache.
    void remember_inner(const Hash256& id, uint32_t level, TreeChildren children);
    void remember_leaf(const Hash256& id, const Extents& extents);

    nebula::Store& store() { return store_; }

  private:
    nebula::Store& store_;
    NodeCache::Impl& cache_;
    IoMode mode_;
};

/// Child `index`; the empty node when it is not there.
inline NodeRef child_of(const TreeChildren& node, uint32_t index) {
    if ((node.present >> index & 1) == 0) {
        return {};
    }
    const uint64_t before = node.present & ((uint64_t{1} << index) - 1);
    return node.children[static_cast<size_t>(std::popcount(before))];
}

}  // namespace stellarium::nova
