// Nodes of a Delta in memory; private to the tree's implementation.
//
// A node covers 64^level leaves and is one of: an inner node with children; a bucket with the
// entries of all its leaves; at level 0, the entry of one leaf. Which one it is depends on the
// number of extents alone (kBucketExtents).
//
// A node is in one of three states:
//   fresh    made by set(), not stored. It may be changed in place by the one Delta that refers to
//            it, if nothing else does (references == 1, all the way from the root).
//   named    stored; `name` is set. Never changes again, apart from what is derived.
//   unloaded named, but its body has not been read yet. The body is published once.
//
// Thread rule: fields other than the atomics are written before the node is shared, or under
// state_mutex() before `named` or `loaded` is set with release order, and read after it was seen
// with acquire order.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "nova/tree.h"

namespace stellarium::nova {

using ExtentsPtr = std::shared_ptr<const Extents>;

/// The extents over one leaf; `leaf` is relative to the first leaf that its node covers.
struct DeltaEntry {
    uint64_t leaf = 0;
    ExtentsPtr extents;
};

struct DeltaNode {
    /// What a node holds when it is loaded.
    struct Body {
        uint64_t present = 0;                ///< Of an inner node: bit i for child i.
        std::vector<DeltaNodePtr> children;  ///< Of an inner node: those that are present.
        std::vector<DeltaEntry> entries;     ///< Of a bucket or leaf: ascending, not empty.

        bool is_inner() const { return !children.empty(); }
        /// Child `index` of an inner node, or null.
        DeltaNode* child(uint32_t index) const;
        size_t child_position(uint32_t index) const;
    };

    DeltaNode(uint32_t node_level, uint64_t leaf_count, uint64_t extent_count)
        : level(node_level), leaves(leaf_count), extents(extent_count) {}

    std::atomic<uint32_t> references{1};
    std::atomic<bool> loaded{false};
    std::atomic<bool> named{false};
    bool interned = false;  ///< In the table of named nodes, which then must be told of the end.
    const uint32_t level;
    uint64_t leaves;   ///< Known even when not loaded; checked when the body is read.
    uint64_t extents;  ///< The same.
    uint64_t store_tag = 0;
    NodeRef name;
    Body body;
};

/// The leaves that one child of a node of `level` covers, as a shift.
inline uint32_t child_shift(uint32_t level) {
    return kFanoutBits * (level - 1);
}

/// One node, or two of the same name.
bool same_node(const DeltaNode& a, const DeltaNode& b);

/// Reads the body if that has not happened yet. kNoWait: kWouldBlock instead.
Result<void> load_delta_node(nebula::Store& store, DeltaNode& node, IoMode mode);

}  // namespace stellarium::nova
