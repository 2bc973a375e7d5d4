#include "nova/node_walk.h"

#include <bit>
#include <iterator>

#include <fmt/format.h>

#include "nova/delta_node.h"
#include "nova/node_io.h"

namespace stellarium::nova {

Result<NodeContent> decode_node(const NodeVisit& at, const nebula::ObjectBytes& object) {
    NodeContent node;
    const Bytes content(object.content);
    const Bytes aux(object.aux);
    const auto add_child = [&](uint64_t& present, const NodeRef& ref) {
        const auto index = static_cast<uint64_t>(std::countr_zero(present));
        present &= present - 1;
        node.children.push_back({.ref = ref,
                                 .level = at.level - 1,
                                 .in_delta = at.in_delta,
                                 .leaf = at.leaf + (index << child_shift(at.level))});
    };
    if (at.level == 0) {
        STELLARIUM_ASSIGN(node.table, at.in_delta ? decode_delta_leaf(content, aux)
                                                  : decode_tree_leaf(content, aux));
        node.leaves.emplace_back(at.leaf, static_cast<uint32_t>(node.table.extents.size()));
    } else if (!at.in_delta) {
        STELLARIUM_ASSIGN(TreeChildren inner, decode_tree_inner(content, aux, at.level));
        for (const NodeRef& child : inner.children) {
            add_child(inner.present, child);
        }
    } else if (node_magic(content) == NodeMagic::kDeltaBucket) {
        STELLARIUM_ASSIGN(BucketTable bucket, decode_delta_bucket(content, aux, at.level));
        node.table = std::move(bucket.table);
        for (const auto& [leaf, count] : bucket.leaves) {
            node.leaves.emplace_back(at.leaf + leaf, count);
        }
    } else {
        STELLARIUM_ASSIGN(DeltaChildren inner, decode_delta_inner(content, aux, at.level));
        for (const DeltaChildRef& child : inner.children) {
            add_child(inner.present, child.ref);
        }
    }
    return node;
}

Result<NodeContent> read_and_decode(nebula::Store& store, const NodeVisit& at) {
    STELLARIUM_ASSIGN(const nebula::ObjectBytes object, read_node(store, at.ref));
    auto node = decode_node(at, object);
    if (!node) {
        return std::unexpected(node.error().with_context(
            fmt::format("{} node {}", at.in_delta ? "delta" : "tree", at.ref.id.hex())));
    }
    return node;
}

void push_children(std::vector<NodeVisit>& stack, NodeContent& node) {
    stack.insert(stack.end(), std::make_move_iterator(node.children.rbegin()),
                 std::make_move_iterator(node.children.rend()));
}

}  // namespace stellarium::nova
