// Walking the stored nodes of trees and deltas without keeping them: for what has to see all of
// them, such as garbage collection. Private to this component.
//
//     std::vector<NodeVisit> stack{{.ref = state.root, .level = kTreeLevels}};
//     while (!stack.empty()) {
//         const NodeVisit at = stack.back();
//         stack.pop_back();
//         STELLARIUM_ASSIGN(NodeContent node, read_and_decode(store, at));
//         push_children(stack, node);
//     }
//
// Thread rule: pure functions, but for read_and_decode, which asks the store.
// Errors: kCorrupt names the node.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "base/error.h"
#include "nebula/store.h"
#include "nova/codec.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// A stored node on the way down; `leaf` is the first one that it covers.
struct NodeVisit {
    NodeRef ref;
    uint32_t level = 0;
    bool in_delta = false;
    uint64_t leaf = 0;
};

/// What a stored node refers to: nodes, or chunks.
struct NodeContent {
    std::vector<NodeVisit> children;
    ExtentTable table;
    /// Leaves that the table's extents are over, in their order: number and count of extents.
    std::vector<std::pair<uint64_t, uint32_t>> leaves;
};

/// The node at `at`, which `object` holds.
Result<NodeContent> decode_node(const NodeVisit& at, const nebula::ObjectBytes& object);
Result<NodeContent> read_and_decode(nebula::Store& store, const NodeVisit& at);
/// Pushes children so that the first one is visited first.
void push_children(std::vector<NodeVisit>& stack, NodeContent& node);

}  // namespace stellarium::nova
