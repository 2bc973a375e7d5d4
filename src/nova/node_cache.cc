#include "nova/node_cache.h"

#include <algorithm>
#include <bit>
#include <cassert>

#include "nova/delta_node.h"
#include "nova/node_io.h"

namespace stellarium::nova {

namespace {

const LeafPtr& empty_leaf() {
    static const LeafPtr kLeaf = std::make_shared<const DecodedLeaf>();
    return kLeaf;
}

const InnerPtr& empty_inner() {
    static const InnerPtr kInner = std::make_shared<const TreeChildren>();
    return kInner;
}

/// What std::make_shared allocates beside the object: two counts and a table pointer.
constexpr uint64_t kSharedBytes = 16;

uint64_t charge_of(const DecodedLeaf& leaf) {
    return kSharedBytes + sizeof(DecodedLeaf) + leaf.extents.capacity() * sizeof(Extent);
}

uint64_t charge_of(const TreeChildren& inner) {
    return kSharedBytes + sizeof(TreeChildren) + inner.children.capacity() * sizeof(NodeRef);
}

std::unexpected<Error> not_cached() {
    return fail(ErrorCode::kWouldBlock, "node not cached");
}

}  // namespace

uint64_t NodeCache::Impl::Key::hash() const {
    // Ids are uniform already; leaf numbers are not, and a root is the same for many of them.
    uint64_t mixed = id.prefix() ^ (tag * 0x9e3779b97f4a7c15U);
    mixed ^= mixed >> 32;
    mixed *= 0xd6e8feb86659fd93U;
    return mixed ^ mixed >> 32;
}

NodeCache::Impl::Shard::Shard() : buckets_(64), memory_bytes_(64 * sizeof(Entry*)) {}

NodeCache::Impl::Shard::~Shard() {
    clear();
}

NodeCache::Impl::Entry** NodeCache::Impl::Shard::slot_of(const Key& key, uint64_t key_hash) {
    Entry** slot = &buckets_[key_hash & (buckets_.size() - 1)];
    while (*slot != nullptr && ((*slot)->key_hash != key_hash || (*slot)->key != key)) {
        slot = &(*slot)->chain;
    }
    return slot;
}

void NodeCache::Impl::Shard::unlink(Entry& entry) {
    (entry.newer != nullptr ? entry.newer->older : newest_) = entry.older;
    (entry.older != nullptr ? entry.older->newer : oldest_) = entry.newer;
}

void NodeCache::Impl::Shard::push_newest(Entry& entry) {
    entry.newer = nullptr;
    entry.older = newest_;
    (newest_ != nullptr ? newest_->newer : oldest_) = &entry;
    newest_ = &entry;
}

template <typename T>
std::optional<T> NodeCache::Impl::Shard::find(const Key& key, uint64_t key_hash) {
    const std::lock_guard lock(mutex_);
    Entry* entry = *slot_of(key, key_hash);
    if constexpr (std::is_same_v<T, LeafPtr>) {
        ++(entry != nullptr ? stats_.hits : stats_.misses);
    }
    if (entry == nullptr) {
        return std::nullopt;
    }
    if (entry != newest_) {
        unlink(*entry);
        push_newest(*entry);
    }
    return std::get<T>(entry->value);
}

void NodeCache::Impl::Shard::grow() {
    std::vector<Entry*> old(buckets_.size() * 2);
    old.swap(buckets_);
    for (Entry* entry : old) {
        while (entry != nullptr) {
            Entry* next = entry->chain;
            Entry*& bucket = buckets_[entry->key_hash & (buckets_.size() - 1)];
            entry->chain = bucket;
            bucket = entry;
            entry = next;
        }
    }
    memory_bytes_ += old.size() * sizeof(Entry*);
}

void NodeCache::Impl::Shard::insert(std::unique_ptr<Entry> entry, uint64_t budget_bytes) {
    std::vector<std::unique_ptr<Entry>> evicted;  // Freed after the lock is released.
    const std::lock_guard lock(mutex_);
    Entry** slot = slot_of(entry->key, entry->key_hash);
    if (*slot != nullptr || buckets_.size() * sizeof(Entry*) + entry->charge_bytes > budget_bytes) {
        evicted.push_back(std::move(entry));
        return;
    }
    Entry* added = entry.release();
    *slot = added;
    push_newest(*added);
    ++entries_;
    memory_bytes_ += added->charge_bytes;
    // Longer chains are better than a table that leaves no room for what it is for.
    if (entries_ > buckets_.size() && buckets_.size() * sizeof(Entry*) <= budget_bytes / 32) {
        grow();
    }
    while (memory_bytes_ > budget_bytes) {
        Entry* victim = oldest_;
        unlink(*victim);
        *slot_of(victim->key, victim->key_hash) = victim->chain;
        memory_bytes_ -= victim->charge_bytes;
        --entries_;
        ++stats_.evictions;
        evicted.emplace_back(victim);
    }
}

void NodeCache::Impl::Shard::erase(const Key& key, uint64_t key_hash) {
    std::unique_ptr<Entry> erased;  // Freed after the lock is released.
    const std::lock_guard lock(mutex_);
    Entry** slot = slot_of(key, key_hash);
    if (*slot != nullptr) {
        erased.reset(*slot);
        unlink(*erased);
        *slot = erased->chain;
        memory_bytes_ -= erased->charge_bytes;
        --entries_;
    }
}

void NodeCache::Impl::Shard::clear() {
    const std::lock_guard lock(mutex_);
    while (newest_ != nullptr) {
        const std::unique_ptr<Entry> entry(newest_);
        unlink(*entry);
        memory_bytes_ -= entry->charge_bytes;
    }
    std::fill(buckets_.begin(), buckets_.end(), nullptr);
    entries_ = 0;
}

uint64_t NodeCache::Impl::Shard::memory_bytes() const {
    const std::lock_guard lock(mutex_);
    return memory_bytes_;
}

void NodeCache::Impl::Shard::count_node_read() {
    const std::lock_guard lock(mutex_);
    ++stats_.node_reads;
}

void NodeCache::Impl::Shard::add_stats(Stats& stats) const {
    const std::lock_guard lock(mutex_);
    stats.hits += stats_.hits;
    stats.misses += stats_.misses;
    stats.node_reads += stats_.node_reads;
    stats.evictions += stats_.evictions;
}

NodeCache::Impl::Impl(uint64_t budget_bytes) {
    budget_bytes = std::max(budget_bytes, kMinBudgetBytes);
    const auto count =
        std::max(std::min<size_t>(budget_bytes / kMinShardBytes, kMaxShards), size_t{1});
    assert(count > 0);
    for (size_t i = 0; i < count; ++i) {
        shards.push_back(std::make_unique<Shard>());
    }
    shard_budget_bytes = budget_bytes / count;
}

void NodeCache::Impl::insert(const Key& key, Value value, uint64_t value_bytes) {
    auto entry = std::make_unique<Entry>();
    entry->key = key;
    entry->key_hash = key.hash();
    entry->value = std::move(value);
    entry->charge_bytes = sizeof(Entry) + value_bytes;
    Shard& shard = shard_of(entry->key_hash);
    shard.insert(std::move(entry), shard_budget_bytes);
}

NodeCache::NodeCache(uint64_t budget_bytes) : impl_(std::make_unique<Impl>(budget_bytes)) {}

NodeCache::~NodeCache() = default;

Result<LeafPtr> NodeCache::leaf(nebula::Store& store, const NodeRef& root, uint64_t leaf_number,
                                IoMode mode) {
    TreeReader reader(store, *this, mode);
    STELLARIUM_ASSIGN(const NodeRef ref, reader.leaf_ref(root, leaf_number));
    return reader.leaf(ref);
}

uint64_t NodeCache::memory_bytes() const {
    uint64_t total = 0;
    for (const auto& shard : impl_->shards) {
        total += shard->memory_bytes();
    }
    return total;
}

void NodeCache::clear() {
    for (const auto& shard : impl_->shards) {
        shard->clear();
    }
}

void NodeCache::forget_leaf(nebula::Store& store, const NodeRef& root, uint64_t leaf_number) {
    TreeReader reader(store, *this, IoMode::kNoWait);
    const auto ref = reader.leaf_ref(root, leaf_number);
    if (ref && !ref->empty()) {
        const auto key = Impl::Key::of_node(ref->id, 0);
        impl_->shard_of(key.hash()).erase(key, key.hash());
    }
}

std::optional<nebula::PageAddress> NodeCache::moved_to(nebula::PageAddress stale) const {
    if (!impl_->any_moved.load(std::memory_order_relaxed)) {
        return std::nullopt;
    }
    const std::shared_lock lock(impl_->moved_mutex);
    const auto it = impl_->moved.find(stale.value());
    if (it == impl_->moved.end()) {
        return std::nullopt;
    }
    return nebula::PageAddress(it->second);
}

void NodeCache::note_moved(nebula::PageAddress stale, nebula::PageAddress now) {
    const std::lock_guard lock(impl_->moved_mutex);
    if (impl_->moved.size() >= Impl::kMaxMoved) {
        impl_->moved.clear();
    }
    impl_->moved[stale.value()] = now.value();
    impl_->any_moved.store(true, std::memory_order_relaxed);
}

NodeCache::Stats NodeCache::stats() const {
    Stats stats;
    for (const auto& shard : impl_->shards) {
        shard->add_stats(stats);
    }
    return stats;
}

Result<InnerPtr> TreeReader::inner(const NodeRef& ref, uint32_t level) {
    if (ref.empty()) {
        return empty_inner();
    }
    using Key = NodeCache::Impl::Key;
    const Key key = Key::of_node(ref.id, level);
    if (const auto found = cache_.find<InnerPtr>(key)) {
        return *found;
    }
    if (mode_ == IoMode::kNoWait) {
        return not_cached();
    }
    STELLARIUM_ASSIGN(const nebula::ObjectBytes object, read_node(store_, ref));
    auto children = decode_tree_inner(object.content, object.aux, level);
    if (!children) {
        return std::unexpected(children.error().with_context("tree node " + ref.id.hex()));
    }
    cache_.shard_of(key.hash()).count_node_read();
    auto node = std::make_shared<const TreeChildren>(*std::move(children));
    cache_.insert(key, node, charge_of(*node));
    return node;
}

Result<LeafPtr> TreeReader::leaf(const NodeRef& ref) {
    if (ref.empty()) {
        return empty_leaf();
    }
    using Key = NodeCache::Impl::Key;
    const Key key = Key::of_node(ref.id, 0);
    if (const auto found = cache_.find<LeafPtr>(key)) {
        return *found;
    }
    if (mode_ == IoMode::kNoWait) {
        return not_cached();
    }
    STELLARIUM_ASSIGN(const nebula::ObjectBytes object, read_node(store_, ref));
    auto table = decode_tree_leaf(object.content, object.aux);
    auto extents = table ? resolve_extents(store_, *std::move(table))
                         : Result<Extents>(std::unexpected(table.error()));
    if (!extents) {
        return std::unexpected(extents.error().with_context("tree node " + ref.id.hex()));
    }
    cache_.shard_of(key.hash()).count_node_read();
    auto node = std::make_shared<const DecodedLeaf>(DecodedLeaf{*std::move(extents)});
    cache_.insert(key, node, charge_of(*node));
    return node;
}

Result<NodeRef> TreeReader::leaf_ref(const NodeRef& root, uint64_t leaf_number) {
    assert(leaf_number < kMaxLeaves);
    if (root.empty()) {
        return NodeRef{};
    }
    using Key = NodeCache::Impl::Key;
    const Key path = Key::of_path(root.id, leaf_number);
    if (const auto found = cache_.find<NodeRef>(path)) {
        return *found;
    }
    NodeRef ref = root;
    for (uint32_t level = kTreeLevels; level >= 1 && !ref.empty(); --level) {
        STELLARIUM_ASSIGN(const InnerPtr node, inner(ref, level));
        ref = child_of(*node,
                       static_cast<uint32_t>(leaf_number >> child_shift(level)) & (kFanout - 1));
    }
    cache_.insert(path, ref, 0);
    return ref;
}

void TreeReader::remember_inner(const Hash256& id, uint32_t level, TreeChildren children) {
    auto node = std::make_shared<const TreeChildren>(std::move(children));
    cache_.insert(NodeCache::Impl::Key::of_node(id, level), node, charge_of(*node));
}

void TreeReader::remember_leaf(const Hash256& id, const Extents& extents) {
    const bool resolved = std::all_of(extents.begin(), extents.end(), [](const Extent& extent) {
        return extent.chunk_address.has_value();
    });
    if (resolved) {
        auto node = std::make_shared<const DecodedLeaf>(DecodedLeaf{extents});
        cache_.insert(NodeCache::Impl::Key::of_node(id, 0), node, charge_of(*node));
    }
}

}  // namespace stellarium::nova
