// Reading and appending of nodes as objects of the store; private to the tree's implementation.
//
// Hints are worth some trouble where trees are large (imports) and none where a few nodes are
// written (a fold): a node without them costs its reader a probe of the index for each child.
//
// Thread rule: NodeWriter belongs to one thread; read_node may be called from any.
#pragma once

#include <functional>
#include <vector>

#include "nebula/store.h"
#include "nova/codec.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// The verified content of a stored node. A node that is not there is kCorrupt: something stored
/// refers to it.
Result<nebula::ObjectBytes> read_node(nebula::Store& store, const NodeRef& ref);

/// Gathers new nodes and appends them in few large batches, in the order in which they were added;
/// so a node never comes before its children. Nothing is synced.
class NodeWriter {
  public:
    /// Content gathered before a batch is appended.
    static constexpr size_t kBatchBytes = size_t{1} << 20;

    explicit NodeWriter(nebula::Store& store) : store_(store) {}

    /// `stored`, when given, is called with the node's name and place after it was appended, and
    /// never if that fails.
    Result<void> add(EncodedNode node, std::function<void(const NodeRef&)> stored = {});
    /// Adds an inner node of a tree and returns its name. It goes into the batch after that of its
    /// children, where that is a full one, so that it can carry hints of where they lie.
    Result<NodeRef> add_inner(uint32_t level, TreeChildren children);
    /// Appends everything that is gathered.
    Result<void> flush();

  private:
    struct Pending {
        EncodedNode node;
        std::function<void(const NodeRef&)> stored;
    };
    struct PendingInner {
        uint32_t level;
        TreeChildren children;
    };
    Result<void> append_pending();
    /// Looks up the children that have no hint, and moves the inner nodes to the next batch.
    void move_inner();

    nebula::Store& store_;
    std::vector<Pending> pending_;  ///< The next batch.
    size_t pending_bytes_ = 0;
    std::vector<PendingInner> inner_;  ///< For the batch after it; children before parents.
};

}  // namespace stellarium::nova
