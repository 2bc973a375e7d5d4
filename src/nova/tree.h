// The content of a volume: a Merkle radix tree of extents (root), and a delta of newer extents.
//
// A leaf covers 2 MiB (512 pages) and lists extents; inner nodes have 64 children; the height is
// fixed (kTreeLevels inner levels), so the root of equal content is equal whatever the volume's
// size. An absent child is a hole. Nodes are objects in the store, named by the hash of their
// canonical bytes; location hints travel beside them, outside the hash (docs/formats/tree.md).
//
// A Delta maps leaf numbers to extents that lie over the leaf. It is a persistent structure:
// copying one is O(1) and shares everything, so snapshot and clone copy a pointer; changing one
// copies only the path it touches, and only where that is shared. Its nodes are stored as objects
// too, each once (a stored node remembers its name), so a checkpoint writes only what changed since
// the last. Its shape depends on its content alone, so equal deltas have equal names.
//
//     STELLARIUM_ASSIGN(auto now, state.delta.find(store, leaf));           // nullptr: nothing
//     Extents merged = overlay(now ? *now : Extents{}, written, /*keep_holes=*/true);
//     STELLARIUM_TRY(state.delta.set(store, leaf, std::move(merged)));
//     VolumeState snapshot = state;                                         // O(1)
//     STELLARIUM_ASSIGN(Extents extents, effective_leaf(store, cache, state, leaf));
//
// Thread rule: Delta, Extents and NodeRef are values: one writer or many readers; different copies
// are independent although they share nodes, and persist() of one copy may run while another copy
// is written. Copying or destroying a Delta while another thread writes that same object is a race.
// Tree functions and NodeCache may be called from any thread.
// Durability: what this header appends is not synced; see nebula/store.h.
// Errors: kCorrupt when a stored node is missing, damaged, or not in canonical form, naming its id;
// kWouldBlock with IoMode::kNoWait when a node is not in memory; and those of nebula/store.h. An
// operation that fails has changed nothing.
// Source of the structure: Merkle 1987; Driscoll et al. 1989 (path copying).
#pragma once

#include <cassert>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/block_device.h"
#include "base/error.h"
#include "base/hash.h"
#include "nebula/store.h"

namespace stellarium::nova {

inline constexpr uint32_t kPagesPerLeaf = 512;
inline constexpr uint32_t kFanoutBits = 6;
inline constexpr uint32_t kFanout = 1U << kFanoutBits;
inline constexpr uint32_t kTreeLevels = 5;  ///< 64^5 leaves of 2 MiB: 2 PiB.
inline constexpr uint64_t kMaxLeaves = uint64_t{1} << (kFanoutBits * kTreeLevels);
/// The leaves that one node of `level` covers.
constexpr uint64_t leaves_below(uint32_t level) {
    return uint64_t{1} << (kFanoutBits * level);
}
static_assert(kPagesPerLeaf == nebula::kLeafPages && kMaxLeaves == uint64_t{1} << 30);

/// One run of pages of a leaf. In a leaf: mapped only. In a delta: mapped or hole.
struct Extent {
    uint16_t first_page = 0;     ///< In the leaf, 0 to 511.
    uint16_t pages = 0;          ///< 1 to 16 when mapped; 1 to 512 for a hole.
    uint8_t first_in_chunk = 0;  ///< First page used of the chunk; 0 for a hole.
    bool hole = false;           ///< Reads as zeros and hides what lies below.
    ChunkId id;                  ///< Zero for a hole.
    /// Of the CHUNK's first page. When present, store.resolve() gave it (or append() did), so it
    /// may be read from. Nodes read from the store have it wherever the chunk could be resolved;
    /// where it is missing, store.resolve(id) says why. Not part of equality or of the hash.
    std::optional<nebula::PageAddress> chunk_address;

    uint32_t end_page() const { return uint32_t{first_page} + pages; }
    bool same_content(const Extent& other) const;
    /// True when `next` follows in the leaf and in the chunk, or both are holes that touch.
    bool continued_by(const Extent& next) const;
    /// Where page `page` of the leaf lies; it must be one of this extent's, with a known address.
    nebula::PageAddress address_of(uint32_t page) const {
        assert(chunk_address);
        // NOLINTNEXTLINE(bugprone-unchecked-optional-access): the contract above.
        return nebula::PageAddress(chunk_address->value() + first_in_chunk + (page - first_page));
    }
    /// The pages [first, end) of this extent; they must be some of its own.
    Extent slice(uint32_t first, uint32_t end) const;
};

/// Sorted by first_page, not overlapping. Neighbours that continue the same chunk are merged, so
/// that a given mapping of pages has one form only (canonical).
using Extents = std::vector<Extent>;

bool same_content(std::span<const Extent> a, std::span<const Extent> b);
/// What canonical demands, page numbers and chunk limits included.
bool is_canonical(std::span<const Extent> extents, bool holes_allowed);
/// `top` laid over `below`. keep_holes: a delta over a delta keeps holes; over a leaf they vanish.
Extents overlay(std::span<const Extent> below, std::span<const Extent> top, bool keep_holes);
/// How many pages `below` maps that `top`, holes included, covers.
uint64_t hidden_pages(std::span<const Extent> below, std::span<const Extent> top);
/// Removes every page at or above `end_page`, cutting an extent that crosses it.
void truncate(Extents& extents, uint32_t end_page);
/// Adds `next`, which starts at or after the end of the last one, merging the two if they continue.
void append_merged(Extents& extents, const Extent& next);

/// Names a stored node. A zero id is the empty node (all holes).
struct NodeRef {
    Hash256 id{};
    std::optional<nebula::PageAddress> hint;
    bool empty() const { return id == Hash256{}; }
    friend bool operator==(const NodeRef& a, const NodeRef& b) { return a.id == b.id; }
};

struct DeltaNode;  // private to delta.cc

/// Counted reference to a DeltaNode. Unlike std::shared_ptr it can tell, with acquire order, that
/// it is the only one (see delta.cc for why that matters).
class DeltaNodePtr {
  public:
    DeltaNodePtr() = default;
    /// Takes over one reference.
    explicit DeltaNodePtr(DeltaNode* node) : node_(node) {}
    DeltaNodePtr(const DeltaNodePtr& other) : node_(other.node_) { retain(); }
    DeltaNodePtr(DeltaNodePtr&& other) noexcept : node_(std::exchange(other.node_, nullptr)) {}
    DeltaNodePtr& operator=(DeltaNodePtr other) noexcept {
        std::swap(node_, other.node_);
        return *this;
    }
    ~DeltaNodePtr() { release(); }

    DeltaNode* get() const { return node_; }
    DeltaNode* operator->() const { return node_; }
    DeltaNode& operator*() const { return *node_; }
    explicit operator bool() const { return node_ != nullptr; }

  private:
    void retain() const;
    void release() const;
    DeltaNode* node_ = nullptr;
};

/// See the head of this file. Reading nodes that are only on disk needs the store: such functions
/// return Result. What was read stays in memory as long as a Delta refers to it; equal nodes of
/// different deltas of one store are one in memory.
class Delta {
  public:
    Delta() = default;

    bool empty() const { return !root_; }
    /// True when both are the same version (pointer or name): no walk.
    bool same_version(const Delta& other) const;

    /// The extents over `leaf`; nullptr when there are none. Valid as long as the pointer is held.
    Result<std::shared_ptr<const Extents>> find(nebula::Store& store, uint64_t leaf,
                                                IoMode mode = IoMode::kMayBlock) const;
    /// Replaces what lies over `leaf` (canonical, asserted); empty extents erase it.
    Result<void> set(nebula::Store& store, uint64_t leaf, Extents extents);
    /// Erases every leaf at or above `first_leaf`. Cost: the height, not what is erased.
    Result<void> erase_from(nebula::Store& store, uint64_t first_leaf);
    /// Calls `visit` for every leaf in [first, last] with extents, ascending, until it returns
    /// false.
    Result<void> for_each(nebula::Store& store, uint64_t first_leaf, uint64_t last_leaf,
                          const std::function<bool(uint64_t leaf, const Extents&)>& visit) const;
    /// Whether set() may have to read more than find() over `leaf` does, when `extents` extents at
    /// most have gone from the delta: a node that gets small takes in the nodes below it.
    bool reads_neighbours(uint64_t leaf, uint64_t extents) const;
    /// Leaves that have extents (exact), and extents in all of them. O(1).
    uint64_t leaves() const;
    uint64_t extents() const;

    /// Stores every node that is not stored yet and returns the name of the root (empty when the
    /// delta is). Appends without sync: the last batch is at most store.sequence() on return.
    Result<NodeRef> persist(nebula::Store& store) const;
    /// The same for many deltas, with their nodes packed into few batches: what a checkpoint of
    /// thousands of volumes with a few writes each should use. Names in the order of `deltas`.
    static Result<std::vector<NodeRef>> persist_all(nebula::Store& store,
                                                    std::span<const Delta* const> deltas);
    /// A delta whose nodes are read when first needed; the root node is read now.
    static Result<Delta> load(nebula::Store& store, const NodeRef& root);
    /// The same without reading anything: for catalogs that also keep leaves() and extents(). A
    /// root node with other counts is kCorrupt when it is first read.
    static Delta from_name(const nebula::Store& store, const NodeRef& root, uint64_t leaves,
                           uint64_t extents);

    /// Calls `visit` once for each node in memory that this delta refers to, with its size. Nodes
    /// that several deltas share have the same `node` pointer.
    void visit_resident(const std::function<void(const void* node, size_t bytes)>& visit) const;

  private:
    friend class DeltaCursor;
    DeltaNodePtr root_;
};

/// A decoded leaf; its extents are resolved (see Extent::chunk_address). Shared by all volumes that
/// hold the same node.
struct DecodedLeaf {
    Extents extents;
};

/// Bounded cache of decoded nodes, shared by all volumes of a pool. Thread-safe.
class NodeCache {
  public:
    explicit NodeCache(uint64_t budget_bytes);
    ~NodeCache();
    NodeCache(const NodeCache&) = delete;
    NodeCache& operator=(const NodeCache&) = delete;

    /// The leaf under `root`; an empty leaf when it is a hole. Never null.
    Result<std::shared_ptr<const DecodedLeaf>> leaf(nebula::Store& store, const NodeRef& root,
                                                    uint64_t leaf_number,
                                                    IoMode mode = IoMode::kMayBlock);
    /// Bytes of all entries, tables included; never above the budget.
    uint64_t memory_bytes() const;
    /// Forgets everything, so that addresses are resolved again (after chunks were moved).
    void clear();
    /// Forgets the leaf under `root`, because an address in it is stale.
    void forget_leaf(nebula::Store& store, const NodeRef& root, uint64_t leaf_number);

    /// Where the chunk lies now that was at a stale address, as far as that was found out before.
    /// Extents of deltas in memory keep the address that they had.
    std::optional<nebula::PageAddress> moved_to(nebula::PageAddress stale) const;
    void note_moved(nebula::PageAddress stale, nebula::PageAddress now);

    struct Stats {
        uint64_t hits = 0;    ///< Calls of leaf() answered from memory.
        uint64_t misses = 0;  ///< Calls that had to look at nodes on disk.
        uint64_t node_reads = 0;
        uint64_t evictions = 0;
    };
    Stats stats() const;

  private:
    friend class TreeReader;
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// Writes a tree from scratch, leaf by leaf in ascending order (import). Appends nodes in batches
/// as they fill; nothing is synced. Memory: the nodes of one batch, and one partial node a level.
class TreeBuilder {
  public:
    explicit TreeBuilder(nebula::Store& store);
    ~TreeBuilder();
    TreeBuilder(const TreeBuilder&) = delete;
    TreeBuilder& operator=(const TreeBuilder&) = delete;
    /// Leaves must ascend; empty extents are skipped. Extents are canonical, without holes.
    Result<void> add_leaf(uint64_t leaf_number, const Extents& extents);
    Result<NodeRef> finish();

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// Replaces whole leaves of a tree (empty extents make a hole) and returns the new root. Only the
/// paths to them are rewritten; nodes are appended, not synced.
Result<NodeRef> update_tree(nebula::Store& store, NodeCache& cache, const NodeRef& root,
                            const std::map<uint64_t, Extents>& leaves);

/// What a volume, image or snapshot holds.
struct VolumeState {
    NodeRef root;
    Delta delta;
    uint64_t size_bytes = 0;
    /// Why this is not what the volume ought to hold (Catalog::replay); nullptr: it is.
    std::shared_ptr<const std::string> damage = nullptr;

    uint64_t pages() const {
        return size_bytes / nebula::kPageBytes + (size_bytes % nebula::kPageBytes != 0);
    }
};

/// The extents of one leaf as a reader sees them: delta over leaf, cut at the size, no holes,
/// addresses resolved.
Result<Extents> effective_leaf(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                               uint64_t leaf_number, IoMode mode = IoMode::kMayBlock);

/// Folds the whole delta into the tree: the canonical way to name content by one root. Nothing
/// beyond the size is in it.
Result<NodeRef> fold_all(nebula::Store& store, NodeCache& cache, const VolumeState& state);

/// Sets the size. Shrinking removes every mapping beyond it, from root and delta (a later growth
/// must show zeros there), by rewriting at most one path of each. Appends without sync.
Result<VolumeState> resized(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                            uint64_t size_bytes);

/// Leaf numbers, ascending from `first_leaf`, that are not wholly holes (in root or delta), until
/// `visit` returns false.
Result<void> for_each_leaf(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                           uint64_t first_leaf,
                           const std::function<Result<bool>(uint64_t leaf_number)>& visit);

/// Calls `visit(first_page, pages)` ascending for each maximal range of pages, in units of the
/// volume's pages, whose content differs between `a` and `b`; a page past one's size counts as
/// zeros there. Time grows with what differs: equal subtrees are skipped by name. With
/// `compare_content`, pages whose mapping differs are compared byte by byte before they are
/// reported, so that equal content cut differently is not.
Result<void> diff(nebula::Store& store, NodeCache& cache, const VolumeState& a,
                  const VolumeState& b, bool compare_content,
                  const std::function<Result<void>(uint64_t first_page, uint64_t pages)>& visit);

}  // namespace stellarium::nova
