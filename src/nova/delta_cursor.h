// A position in a delta, walked in step with a tree; private to the tree's implementation.
//
// A tree and a delta cut the leaf numbers into the same subtrees of 64^level leaves. A cursor
// stands for what a delta holds in one of them: a node, or a part of a bucket further up. It
// borrows the Delta, which must outlive it unchanged.
//
// Thread rule: a value; loading nodes is safe beside other readers.
#pragma once

#include <cstdint>
#include <span>

#include "nova/delta_node.h"
#include "nova/tree.h"

namespace stellarium::nova {

class DeltaCursor {
  public:
    DeltaCursor() = default;
    /// The whole of `delta`: level kTreeLevels.
    explicit DeltaCursor(const Delta& delta);

    bool empty() const { return node_ == nullptr && entries_.empty(); }
    /// The node that it stands for; null when there is none, or when it is part of a bucket.
    const DeltaNode* node() const { return node_; }
    /// True when both surely hold the same. Looks at pointers, names and short lists only; false
    /// may also mean "not known without reading".
    bool surely_equals(const DeltaCursor& other) const;

    /// Which children hold anything: bit i for child i. Reads the node if needed.
    Result<uint64_t> present(nebula::Store& store, uint32_t level);
    /// After present(): the position of child `index`.
    DeltaCursor child(uint32_t level, uint32_t index) const;
    /// At level 0: the extents, or null.
    Result<ExtentsPtr> extents(nebula::Store& store);

  private:
    /// Turns a node that is a bucket into the list of its entries.
    Result<void> open(nebula::Store& store);

    DeltaNode* node_ = nullptr;
    std::span<const DeltaEntry> entries_;
    uint64_t base_ = 0;  ///< First leaf of this position, in the numbering of `entries_`.
};

}  // namespace stellarium::nova
