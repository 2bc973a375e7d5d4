// Delta: a persistent radix map from leaf number to extents.
//
// Copying a Delta copies one counted reference. set() walks from the root to the leaf and, at each
// node, asks whether it may be changed in place: it is fresh (not stored) and has one reference.
// If not, the node is copied, which adds a reference to each of its children, so that those are
// found shared in turn. Hence one shared node on the path makes everything below it shared, and
// nothing that another Delta can see ever changes.
//
// Why the question "is mine the only reference?" has a stable answer: the count is one, and the
// holder is the Delta being written (or its exclusive parent). Another reference could only be made
// by copying this Delta, which the thread rule forbids during a write, or through the table of
// named nodes, which holds no fresh ones. The count is read with acquire order, so that what a
// former holder read or wrote (persist() naming a node, say) has happened before our change.
//
// Shape. A subtree with at most kBucketExtents extents is one bucket, otherwise an inner node;
// level 0 is always one leaf. So equal contents have equal nodes, whatever their history.
#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <mutex>
#include <unordered_map>

#include <fmt/format.h>

#include "nova/codec.h"
#include "nova/delta_node.h"
#include "nova/node_io.h"
#include "nova/tree.h"

namespace stellarium::nova {

namespace {

/// Guards the step from unloaded to loaded, and from fresh to named. Striped: those are rare.
std::mutex& state_mutex(const DeltaNode& node) {
    static std::array<std::mutex, 64> mutexes;
    return mutexes[(reinterpret_cast<uintptr_t>(&node) >> 7) % mutexes.size()];
}

/// All named nodes in memory, so that the same node is not held twice: after a restart, ten
/// thousand snapshots of one volume are read as one structure and not as ten thousand. Holds no
/// references; a node removes itself at its end.
class NamedNodes {
  public:
    static NamedNodes& instance() {
        static auto* nodes = new NamedNodes;  // Never destroyed: Deltas may live in statics.
        return *nodes;
    }

    /// The node of that name, unloaded if it is not in memory.
    DeltaNodePtr get(uint64_t store_tag, uint32_t level, const NodeRef& name, uint64_t leaves,
                     uint64_t extents) {
        Shard& shard = shard_of(name.id);
        const Key key{name.id, store_tag, level, leaves, extents};
        const std::lock_guard lock(shard.mutex);
        DeltaNode*& slot = shard.nodes[key];
        if (slot != nullptr && try_retain(*slot)) {
            return DeltaNodePtr(slot);
        }
        auto* node = new DeltaNode(level, leaves, extents);
        node->name = name;
        node->store_tag = store_tag;
        node->interned = true;
        node->named.store(true, std::memory_order_release);
        slot = node;
        return DeltaNodePtr(node);
    }

    /// Called under state_mutex(node) when it is given its name.
    void add(DeltaNode& node) {
        Shard& shard = shard_of(node.name.id);
        const std::lock_guard lock(shard.mutex);
        node.interned = shard.nodes.try_emplace(key_of(node), &node).second;
    }

    /// Called when the last reference to an interned node is gone.
    void remove(const DeltaNode& node) {
        Shard& shard = shard_of(node.name.id);
        const std::lock_guard lock(shard.mutex);
        const auto found = shard.nodes.find(key_of(node));
        if (found != shard.nodes.end() && found->second == &node) {
            shard.nodes.erase(found);
        }
    }

  private:
    struct Key {
        Hash256 id;
        uint64_t store_tag;
        uint32_t level;
        uint64_t leaves;
        uint64_t extents;
        friend bool operator==(const Key&, const Key&) = default;
    };
    struct KeyHasher {
        size_t operator()(const Key& key) const { return static_cast<size_t>(key.id.prefix()); }
    };
    struct Shard {
        std::mutex mutex;
        std::unordered_map<Key, DeltaNode*, KeyHasher> nodes;
    };

    static Key key_of(const DeltaNode& node) {
        return {node.name.id, node.store_tag, node.level, node.leaves, node.extents};
    }
    Shard& shard_of(const Hash256& id) { return shards_[id.bytes[31] % shards_.size()]; }
    /// False when the last reference is gone and the node is about to be removed.
    static bool try_retain(DeltaNode& node) {
        uint32_t references = node.references.load(std::memory_order_relaxed);
        while (references != 0) {
            if (node.references.compare_exchange_weak(references, references + 1,
                                                      std::memory_order_acquire,
                                                      std::memory_order_relaxed)) {
                return true;
            }
        }
        return false;
    }

    std::array<Shard, 16> shards_;
};

uint64_t tag_of(const nebula::Store& store) {
    const std::array<uint8_t, 16> uuid = store.uuid();
    return load<U64Le>(std::as_bytes(std::span(uuid)));
}

bool may_change_in_place(const DeltaNode& node) {
    return node.references.load(std::memory_order_acquire) == 1 &&
           !node.named.load(std::memory_order_acquire);
}

DeltaNodePtr make_fresh(uint32_t level, DeltaNode::Body body) {
    uint64_t leaves = 0;
    uint64_t extents = 0;
    for (const DeltaNodePtr& child : body.children) {
        leaves += child->leaves;
        extents += child->extents;
    }
    for (const DeltaEntry& entry : body.entries) {
        ++leaves;
        extents += entry.extents->size();
    }
    auto* node = new DeltaNode(level, leaves, extents);
    node->body = std::move(body);
    node->loaded.store(true, std::memory_order_release);
    return DeltaNodePtr(node);
}

/// The canonical subtree of `entries`, which ascend and are relative to its first leaf; null for
/// none.
DeltaNodePtr build(uint32_t level, std::span<const DeltaEntry> entries) {
    if (entries.empty()) {
        return {};
    }
    uint64_t extents = 0;
    for (const DeltaEntry& entry : entries) {
        extents += entry.extents->size();
    }
    DeltaNode::Body body;
    if (level == 0 || extents <= kBucketExtents) {
        body.entries.assign(entries.begin(), entries.end());
        return make_fresh(level, std::move(body));
    }
    const uint32_t shift = child_shift(level);
    std::vector<DeltaEntry> below;
    for (size_t i = 0; i < entries.size();) {
        const uint64_t index = entries[i].leaf >> shift;
        below.clear();
        for (; i < entries.size() && entries[i].leaf >> shift == index; ++i) {
            below.push_back({entries[i].leaf - (index << shift), entries[i].extents});
        }
        body.present |= uint64_t{1} << index;
        body.children.push_back(build(level - 1, below));
    }
    return make_fresh(level, std::move(body));
}

/// Appends every entry below `node`, which starts at leaf `base`.
Result<void> collect(nebula::Store& store, DeltaNode& node, uint64_t base,
                     std::vector<DeltaEntry>& out) {
    STELLARIUM_TRY(load_delta_node(store, node, IoMode::kMayBlock));
    for (const DeltaEntry& entry : node.body.entries) {
        out.push_back({base + entry.leaf, entry.extents});
    }
    uint64_t present = node.body.present;
    for (const DeltaNodePtr& child : node.body.children) {
        const auto index = static_cast<uint64_t>(std::countr_zero(present));
        STELLARIUM_TRY(collect(store, *child, base + (index << child_shift(node.level)), out));
        present &= present - 1;
    }
    return {};
}

auto lower_bound(const std::vector<DeltaEntry>& entries, uint64_t leaf) {
    return std::lower_bound(entries.begin(), entries.end(), leaf,
                            [](const DeltaEntry& entry, uint64_t l) { return entry.leaf < l; });
}

/// Sets (or, with a null value, erases) one entry in an ascending list.
void put_entry(std::vector<DeltaEntry>& entries, uint64_t leaf, const ExtentsPtr& value) {
    const auto at = entries.begin() + (lower_bound(entries, leaf) - entries.cbegin());
    if (at != entries.end() && at->leaf == leaf) {
        if (value == nullptr) {
            entries.erase(at);
        } else {
            at->extents = value;
        }
    } else if (value != nullptr) {
        entries.insert(at, {leaf, value});
    }
}

/// What one set() does, known before anything is changed.
struct Change {
    ExtentsPtr value;
    uint64_t old_extents = 0;
    uint64_t new_extents = 0;
};

/// Applies `change` to the subtree in `slot`. Everything on the path is loaded. On error nothing
/// has changed: what can fail happens at the lowest node that is rewritten, before that.
Result<void> assign(nebula::Store& store, DeltaNodePtr& slot, uint32_t level, uint64_t leaf,
                    const Change& change) {
    if (!slot) {
        const DeltaEntry entry{leaf, change.value};
        slot = build(level, {&entry, 1});
        return {};
    }
    DeltaNode& node = *slot;
    const uint64_t extents = node.extents - change.old_extents + change.new_extents;
    if (extents == 0) {
        slot = {};
        return {};
    }
    const bool becomes_bucket = level == 0 || extents <= kBucketExtents;
    if (!becomes_bucket && node.body.is_inner()) {
        const auto index = static_cast<uint32_t>(leaf >> child_shift(level));
        const uint64_t bit = uint64_t{1} << index;
        DeltaNodePtr target = std::move(slot);
        if (!may_change_in_place(*target)) {
            auto* copy = new DeltaNode(level, node.leaves, node.extents);
            copy->body = target->body;
            copy->loaded.store(true, std::memory_order_release);
            slot = std::exchange(target, DeltaNodePtr(copy));
        }
        DeltaNode::Body& body = target->body;
        const size_t position = body.child_position(index);
        const bool was_present = (body.present & bit) != 0;
        DeltaNodePtr child = was_present ? std::move(body.children[position]) : DeltaNodePtr();
        const Result<void> assigned =
            assign(store, child, level - 1, leaf & (leaves_below(level - 1) - 1), change);
        if (!assigned) {
            body.children[position] = std::move(child);  // Only a present child can fail.
            // A pointer that was moved from is null, so this asks whether it was replaced.
            if (!slot) {  // NOLINT(bugprone-use-after-move)
                slot = std::move(target);
            }
            return assigned;
        }
        const auto at = body.children.begin() + static_cast<std::ptrdiff_t>(position);
        if (!child) {
            body.children.erase(at);
            body.present &= ~bit;
        } else if (was_present) {
            *at = std::move(child);
        } else {
            body.children.insert(at, std::move(child));
            body.present |= bit;
        }
        target->extents = extents;
        target->leaves += (change.new_extents != 0 ? 1U : 0U);
        target->leaves -= (change.old_extents != 0 ? 1U : 0U);
        slot = std::move(target);
        return {};
    }
    if (becomes_bucket && !node.body.is_inner() && may_change_in_place(node)) {
        put_entry(node.body.entries, leaf, change.value);
        node.extents = extents;
        node.leaves = node.body.entries.size();
        return {};
    }
    // The shape changes, or the bucket is shared: rebuilt from its entries.
    std::vector<DeltaEntry> entries;
    STELLARIUM_TRY(collect(store, node, 0, entries));
    put_entry(entries, leaf, change.value);
    slot = build(level, entries);
    return {};
}

Result<DeltaNodePtr> cut_from(nebula::Store& store, const DeltaNodePtr& node, uint64_t first_leaf) {
    if (!node || first_leaf == 0) {
        return DeltaNodePtr();
    }
    const uint32_t level = node->level;
    if (first_leaf >= leaves_below(level)) {
        return node;
    }
    STELLARIUM_TRY(load_delta_node(store, *node, IoMode::kMayBlock));
    const DeltaNode::Body& old = node->body;
    if (!old.is_inner()) {
        const auto end = lower_bound(old.entries, first_leaf);
        if (end == old.entries.end()) {
            return node;
        }
        return build(level, std::span(old.entries.begin(), end));
    }
    const auto boundary = static_cast<uint32_t>(first_leaf >> child_shift(level));
    DeltaNode::Body body;
    uint64_t present = old.present;
    bool changed = false;
    for (const DeltaNodePtr& child : old.children) {
        const auto index = static_cast<uint32_t>(std::countr_zero(present));
        present &= present - 1;
        if (index > boundary) {
            changed = true;
            break;
        }
        DeltaNodePtr kept = child;
        if (index == boundary) {
            STELLARIUM_ASSIGN(kept,
                              cut_from(store, child, first_leaf & (leaves_below(level - 1) - 1)));
            changed |= kept.get() != child.get();
        }
        if (kept) {
            body.present |= uint64_t{1} << index;
            body.children.push_back(std::move(kept));
        }
    }
    if (!changed) {
        return node;
    }
    if (body.children.empty()) {
        return DeltaNodePtr();
    }
    DeltaNodePtr cut = make_fresh(level, std::move(body));
    if (cut->extents > kBucketExtents) {
        return cut;
    }
    std::vector<DeltaEntry> entries;
    STELLARIUM_TRY(collect(store, *cut, 0, entries));
    return build(level, entries);
}

Result<bool> visit_range(nebula::Store& store, DeltaNode& node, uint64_t base, uint64_t first_leaf,
                         uint64_t last_leaf,
                         const std::function<bool(uint64_t, const Extents&)>& visit) {
    STELLARIUM_TRY(load_delta_node(store, node, IoMode::kMayBlock));
    for (const DeltaEntry& entry : node.body.entries) {
        const uint64_t leaf = base + entry.leaf;
        if (leaf > last_leaf) {
            break;
        }
        if (leaf >= first_leaf && !visit(leaf, *entry.extents)) {
            return false;
        }
    }
    uint64_t present = node.body.present;
    for (const DeltaNodePtr& child : node.body.children) {
        const auto index = static_cast<uint64_t>(std::countr_zero(present));
        present &= present - 1;
        const uint64_t child_base = base + (index << child_shift(node.level));
        if (child_base > last_leaf) {
            break;
        }
        if (child_base + leaves_below(node.level - 1) <= first_leaf) {
            continue;
        }
        STELLARIUM_ASSIGN(const bool go_on,
                          visit_range(store, *child, child_base, first_leaf, last_leaf, visit));
        if (!go_on) {
            return false;
        }
    }
    return true;
}

/// Adds `node` and what it refers to, unless stored already, children first.
Result<NodeRef> store_node(uint64_t store_tag, NodeWriter& writer, const DeltaNodePtr& node) {
    if (node->named.load(std::memory_order_acquire)) {
        return node->name;
    }
    const DeltaNode::Body& body = node->body;
    EncodedNode encoded;
    if (body.is_inner()) {
        DeltaChildren children;
        children.present = body.present;
        children.children.reserve(body.children.size());
        for (const DeltaNodePtr& child : body.children) {
            STELLARIUM_ASSIGN(NodeRef ref, store_node(store_tag, writer, child));
            children.children.push_back({ref, child->leaves, child->extents});
        }
        encoded = encode_delta_inner(node->level, children);
    } else if (node->level == 0) {
        encoded = encode_delta_leaf(*body.entries.front().extents);
    } else {
        std::vector<std::pair<uint64_t, const Extents*>> leaves;
        leaves.reserve(body.entries.size());
        for (const DeltaEntry& entry : body.entries) {
            leaves.emplace_back(entry.leaf, entry.extents.get());
        }
        encoded = encode_delta_bucket(node->level, leaves);
    }
    const NodeRef ref{encoded.id, std::nullopt};
    STELLARIUM_TRY(writer.add(std::move(encoded), [node, store_tag](const NodeRef& stored) {
        const std::lock_guard lock(state_mutex(*node));
        if (!node->named.load(std::memory_order_relaxed)) {
            node->name = stored;
            node->store_tag = store_tag;
            NamedNodes::instance().add(*node);
            node->named.store(true, std::memory_order_release);
        }
    }));
    return ref;
}

/// Splits resolved extents of several leaves into entries.
std::vector<DeltaEntry> split_entries(const BucketTable& bucket, const Extents& resolved) {
    std::vector<DeltaEntry> entries;
    entries.reserve(bucket.leaves.size());
    auto next = resolved.begin();
    for (const auto& [leaf, count] : bucket.leaves) {
        entries.push_back({leaf, std::make_shared<const Extents>(next, next + count)});
        next += count;
    }
    return entries;
}

/// Reads and decodes one stored node.
Result<DeltaNode::Body> read_body(nebula::Store& store, uint32_t level, const NodeRef& name) {
    const auto decode = [&](const nebula::ObjectBytes& object) -> Result<DeltaNode::Body> {
        DeltaNode::Body body;
        if (level == 0) {
            STELLARIUM_ASSIGN(ExtentTable table, decode_delta_leaf(object.content, object.aux));
            STELLARIUM_ASSIGN(Extents extents, resolve_extents(store, std::move(table)));
            body.entries.push_back({0, std::make_shared<const Extents>(std::move(extents))});
        } else if (node_magic(object.content) == NodeMagic::kDeltaBucket) {
            STELLARIUM_ASSIGN(BucketTable bucket,
                              decode_delta_bucket(object.content, object.aux, level));
            STELLARIUM_ASSIGN(const Extents resolved,
                              resolve_extents(store, std::move(bucket.table)));
            body.entries = split_entries(bucket, resolved);
        } else {
            STELLARIUM_ASSIGN(const DeltaChildren children,
                              decode_delta_inner(object.content, object.aux, level));
            body.present = children.present;
            body.children.reserve(children.children.size());
            for (const DeltaChildRef& child : children.children) {
                body.children.push_back(NamedNodes::instance().get(
                    tag_of(store), level - 1, child.ref, child.leaves, child.extents));
            }
        }
        return body;
    };
    STELLARIUM_ASSIGN(const nebula::ObjectBytes object, read_node(store, name));
    auto body = decode(object);
    if (!body) {
        return std::unexpected(body.error().with_context("delta node " + name.id.hex()));
    }
    return body;
}

/// Leaves and extents of a body.
std::pair<uint64_t, uint64_t> counts(const DeltaNode::Body& body) {
    uint64_t leaves = body.entries.size();
    uint64_t extents = 0;
    for (const DeltaEntry& entry : body.entries) {
        extents += entry.extents->size();
    }
    for (const DeltaNodePtr& child : body.children) {
        leaves += child->leaves;
        extents += child->extents;
    }
    return {leaves, extents};
}

/// Gives an unloaded node its body; checks that it is the one that was promised.
Result<void> publish_body(DeltaNode& node, DeltaNode::Body body) {
    const auto [leaves, extents] = counts(body);
    if (leaves != node.leaves || extents != node.extents) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("delta node {} has {} leaves and {} extents, not {} and {} as its "
                                "parent says",
                                node.name.id.hex(), leaves, extents, node.leaves, node.extents));
    }
    const std::lock_guard lock(state_mutex(node));
    if (!node.loaded.load(std::memory_order_relaxed)) {
        node.body = std::move(body);
        node.loaded.store(true, std::memory_order_release);
    }
    return {};
}

void visit_nodes(const DeltaNode& node, const std::function<void(const void*, size_t)>& visit) {
    if (!node.loaded.load(std::memory_order_acquire)) {
        visit(&node, sizeof(DeltaNode));
        return;
    }
    const DeltaNode::Body& body = node.body;
    visit(&node, sizeof(DeltaNode) + body.children.capacity() * sizeof(DeltaNodePtr) +
                     body.entries.capacity() * sizeof(DeltaEntry));
    for (const DeltaEntry& entry : body.entries) {
        visit(entry.extents.get(), sizeof(Extents) + entry.extents->capacity() * sizeof(Extent));
    }
    for (const DeltaNodePtr& child : body.children) {
        visit_nodes(*child, visit);
    }
}

}  // namespace

size_t DeltaNode::Body::child_position(uint32_t index) const {
    return static_cast<size_t>(std::popcount(present & ((uint64_t{1} << index) - 1)));
}

DeltaNode* DeltaNode::Body::child(uint32_t index) const {
    return (present >> index & 1) != 0 ? children[child_position(index)].get() : nullptr;
}

void DeltaNodePtr::retain() const {
    if (node_ != nullptr) {
        node_->references.fetch_add(1, std::memory_order_relaxed);
    }
}

void DeltaNodePtr::release() const {
    if (node_ == nullptr || node_->references.fetch_sub(1, std::memory_order_acq_rel) != 1) {
        return;
    }
    if (node_->interned) {
        NamedNodes::instance().remove(*node_);
    }
    delete node_;
}

Result<void> load_delta_node(nebula::Store& store, DeltaNode& node, IoMode mode) {
    if (node.loaded.load(std::memory_order_acquire)) {
        return {};
    }
    if (mode == IoMode::kNoWait) {
        return fail(ErrorCode::kWouldBlock, "delta not read");
    }
    STELLARIUM_ASSIGN(DeltaNode::Body body, read_body(store, node.level, node.name));
    return publish_body(node, std::move(body));
}

bool same_node(const DeltaNode& a, const DeltaNode& b) {
    return &a == &b || (a.named.load(std::memory_order_acquire) &&
                        b.named.load(std::memory_order_acquire) && a.name == b.name);
}

bool Delta::same_version(const Delta& other) const {
    if (!root_ || !other.root_) {
        return empty() && other.empty();
    }
    return same_node(*root_, *other.root_);
}

Result<ExtentsPtr> Delta::find(nebula::Store& store, uint64_t leaf, IoMode mode) const {
    assert(leaf < kMaxLeaves);
    DeltaNode* node = root_.get();
    while (node != nullptr) {
        STELLARIUM_TRY(load_delta_node(store, *node, mode));
        const DeltaNode::Body& body = node->body;
        if (!body.is_inner()) {
            const auto entry = lower_bound(body.entries, leaf);
            if (entry == body.entries.end() || entry->leaf != leaf) {
                return nullptr;
            }
            return entry->extents;
        }
        const auto index = static_cast<uint32_t>(leaf >> child_shift(node->level));
        leaf &= leaves_below(node->level - 1) - 1;
        node = body.child(index);
    }
    return nullptr;
}

Result<void> Delta::set(nebula::Store& store, uint64_t leaf, Extents extents) {
    assert(leaf < kMaxLeaves && is_canonical(extents, true));
    STELLARIUM_ASSIGN(const ExtentsPtr old, find(store, leaf));  // Loads the path, too.
    if (extents.empty() && old == nullptr) {
        return {};
    }
    Change change;
    change.old_extents = old == nullptr ? 0 : old->size();
    change.new_extents = extents.size();
    if (!extents.empty()) {
        extents.shrink_to_fit();
        change.value = std::make_shared<const Extents>(std::move(extents));
    }
    return assign(store, root_, kTreeLevels, leaf, change);
}

bool Delta::reads_neighbours(uint64_t leaf, uint64_t extents) const {
    const DeltaNode* node = root_.get();
    while (node != nullptr) {
        if (!node->loaded.load(std::memory_order_acquire)) {
            return true;
        }
        if (!node->body.is_inner()) {
            return false;
        }
        if (node->extents <= kBucketExtents + extents) {
            return true;
        }
        const auto index = static_cast<uint32_t>(leaf >> child_shift(node->level));
        leaf &= leaves_below(node->level - 1) - 1;
        node = node->body.child(index);
    }
    return false;
}

Result<void> Delta::erase_from(nebula::Store& store, uint64_t first_leaf) {
    STELLARIUM_ASSIGN(root_, cut_from(store, root_, first_leaf));
    return {};
}

Result<void> Delta::for_each(
    nebula::Store& store, uint64_t first_leaf, uint64_t last_leaf,
    const std::function<bool(uint64_t leaf, const Extents&)>& visit) const {
    if (root_) {
        STELLARIUM_TRY(visit_range(store, *root_, 0, first_leaf, last_leaf, visit));
    }
    return {};
}

uint64_t Delta::leaves() const {
    return root_ ? root_->leaves : 0;
}

uint64_t Delta::extents() const {
    return root_ ? root_->extents : 0;
}

Result<NodeRef> Delta::persist(nebula::Store& store) const {
    const Delta* const self = this;
    STELLARIUM_ASSIGN(const std::vector<NodeRef> names, persist_all(store, {&self, 1}));
    return names.front();
}

Result<std::vector<NodeRef>> Delta::persist_all(nebula::Store& store,
                                                std::span<const Delta* const> deltas) {
    const uint64_t store_tag = tag_of(store);
    NodeWriter writer(store);
    for (const Delta* delta : deltas) {
        if (delta->root_) {
            STELLARIUM_TRY(store_node(store_tag, writer, delta->root_));
        }
    }
    STELLARIUM_TRY(writer.flush());
    std::vector<NodeRef> names;
    names.reserve(deltas.size());
    for (const Delta* delta : deltas) {
        names.push_back(delta->root_ ? delta->root_->name : NodeRef{});
    }
    return names;
}

Result<Delta> Delta::load(nebula::Store& store, const NodeRef& root) {
    Delta delta;
    if (!root.empty()) {
        STELLARIUM_ASSIGN(DeltaNode::Body body, read_body(store, kTreeLevels, root));
        const auto [leaves, extents] = counts(body);
        delta = from_name(store, root, leaves, extents);
        STELLARIUM_TRY(publish_body(*delta.root_, std::move(body)));
    }
    return delta;
}

Delta Delta::from_name(const nebula::Store& store, const NodeRef& root, uint64_t leaves,
                       uint64_t extents) {
    Delta delta;
    if (!root.empty()) {
        delta.root_ = NamedNodes::instance().get(tag_of(store), kTreeLevels, root, leaves, extents);
    }
    return delta;
}

void Delta::visit_resident(const std::function<void(const void* node, size_t bytes)>& visit) const {
    if (root_) {
        visit_nodes(*root_, visit);
    }
}

}  // namespace stellarium::nova
