// Reading and appending of nodes as objects of the store; private to the tree's implementation.
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
    /// Appends what is gathered.
    Result<void> flush();

  private:
    struct Pending {
        EncodedNode node;
        std::function<void(const NodeRef&)> stored;
    };
    nebula::Store& store_;
    std::vector<Pending> pending_;
    size_t pending_bytes_ = 0;
};

}  // namespace stellarium::nova
