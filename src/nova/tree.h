// The content of a volume: a Merkle radix tree of extents (root), and a delta of newer extents.
//
// A leaf covers 2 MiB (512 pages) and lists extents; inner nodes have 64 children; the height is
// fixed (kTreeLevels inner levels), so the root of equal content is equal whatever the volume's
// size. An absent child is a hole. Nodes are objects in the store, named by the hash of their
// canonical bytes; location hints travel beside them, outside the hash.
//
// A Delta maps leaf numbers to extents that lie over the leaf. It is a persistent structure:
// copying one is O(1) and shares everything, so snapshot and clone copy a pointer; changing one
// copies only the path it touches, and only where that is shared. Its nodes are stored as objects
// too, each once (a stored node remembers its name), so a checkpoint writes only what changed since
// the last.
//
// Thread rule: Delta, Extents and NodeRef are values: one writer or many readers; different copies
// are independent although they share nodes. Tree functions may be called from any thread.
// Source of the structure: Merkle 1987; Driscoll et al. 1989 (path copying).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/hash.h"
#include "nebula/store.h"

namespace stellarium::nova {

inline constexpr uint32_t kPagesPerLeaf = 512;
inline constexpr uint32_t kFanout = 64;
inline constexpr uint32_t kTreeLevels = 5;  ///< 64^5 leaves of 2 MiB: 2 PiB.
inline constexpr uint64_t kMaxLeaves = uint64_t{1} << 30;

/// One run of pages of a leaf. In a leaf: mapped only. In a delta: mapped or hole.
struct Extent {
    uint16_t first_page = 0;     ///< In the leaf, 0 to 511.
    uint16_t pages = 0;          ///< 1 to 16 when mapped; 1 to 512 for a hole.
    uint8_t first_in_chunk = 0;  ///< First page used of the chunk.
    bool hole = false;           ///< Reads as zeros and hides what lies below.
    ChunkId id;                  ///< Zero for a hole.
    /// Of the CHUNK's first page; nullopt until resolved. Not part of equality or of the hash.
    std::optional<nebula::PageAddress> chunk_address;

    uint32_t end_page() const { return uint32_t{first_page} + pages; }
    bool same_content(const Extent& other) const;
};

/// Sorted by first_page, not overlapping. Neighbours that continue the same chunk are merged.
using Extents = std::vector<Extent>;

/// `top` laid over `below`. keep_holes: a delta over a delta keeps holes; over a leaf they vanish.
Extents overlay(std::span<const Extent> below, std::span<const Extent> top, bool keep_holes);
/// Removes every page at or above `end_page`, cutting an extent that crosses it.
void truncate(Extents& extents, uint32_t end_page);

/// Names a stored node. A zero id is the empty node (all holes).
struct NodeRef {
    Hash256 id{};
    std::optional<nebula::PageAddress> hint;
    bool empty() const { return id == Hash256{}; }
    friend bool operator==(const NodeRef& a, const NodeRef& b) { return a.id == b.id; }
};

struct DeltaNode;  // private to tree.cc

/// See the head of this file. Reading nodes that are only on disk needs the store: such functions
/// return Result.
class Delta {
  public:
    Delta() = default;

    bool empty() const { return root_ == nullptr; }
    /// True when both are the same version (pointer or name): no walk.
    bool same_version(const Delta& other) const;

    /// The extents over `leaf`; nullptr when there are none. Valid as long as the pointer is held.
    Result<std::shared_ptr<const Extents>> find(nebula::Store& store, uint64_t leaf) const;
    /// Replaces what lies over `leaf`; empty extents erase it.
    Result<void> set(nebula::Store& store, uint64_t leaf, Extents extents);
    /// Calls `visit` for every leaf in [first, last] with extents, ascending, until it returns
    /// false.
    Result<void> for_each(nebula::Store& store, uint64_t first_leaf, uint64_t last_leaf,
                          const std::function<bool(uint64_t leaf, const Extents&)>& visit) const;
    /// Leaves that have extents (exact), and extents in all of them. O(1).
    uint64_t leaves() const;
    uint64_t extents() const;

    /// Stores every node that is not stored yet and returns the name of the root (empty when the
    /// delta is). Appends without sync; sequence_out: the last batch appended, if any.
    Result<NodeRef> persist(nebula::Store& store) const;
    /// A delta whose nodes are read when first needed. Counts come with the root node.
    static Result<Delta> load(nebula::Store& store, const NodeRef& root);

  private:
    explicit Delta(std::shared_ptr<DeltaNode> root) : root_(std::move(root)) {}
    std::shared_ptr<DeltaNode> root_;
    friend struct DeltaNode;
};

/// A decoded leaf with every extent resolved to its physical place; shared by all volumes that hold
/// the same node.
struct DecodedLeaf {
    Extents extents;
};

/// Bounded cache of decoded nodes, shared by all volumes of a pool. Thread-safe.
class NodeCache {
  public:
    explicit NodeCache(uint64_t budget_bytes);
    ~NodeCache();
    /// The leaf under `root`; an empty leaf when it is a hole. Addresses are resolved and checked.
    Result<std::shared_ptr<const DecodedLeaf>> leaf(nebula::Store& store, const NodeRef& root,
                                                    uint64_t leaf_number);
    uint64_t memory_bytes() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
    friend class TreeAccess;
};

/// Writes a tree from scratch, leaf by leaf in ascending order (import). Appends nodes in batches
/// as they fill; nothing is synced. Memory: one partial node a level.
class TreeBuilder {
  public:
    explicit TreeBuilder(nebula::Store& store);
    ~TreeBuilder();
    /// Leaves must ascend; empty extents are skipped.
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
};

/// The extents of one leaf as a reader sees them: delta over leaf, no holes, addresses resolved.
Result<Extents> effective_leaf(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                               uint64_t leaf_number);

/// Folds the whole delta into the tree: the canonical way to name content by one root.
Result<NodeRef> fold_all(nebula::Store& store, NodeCache& cache, const VolumeState& state);

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
