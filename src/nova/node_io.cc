#include "nova/node_io.h"

#include <fmt/format.h>

namespace stellarium::nova {

Result<nebula::ObjectBytes> read_node(nebula::Store& store, const NodeRef& ref) {
    auto object = store.get_object(ref.id, ref.hint);
    if (!object && object.error().code() == ErrorCode::kNotFound) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("tree node {} is missing from the store", ref.id.hex()));
    }
    return object;
}

Result<void> NodeWriter::add(EncodedNode node, std::function<void(const NodeRef&)> stored) {
    pending_bytes_ += node.content.size() + node.aux.size();
    pending_.push_back({std::move(node), std::move(stored)});
    if (pending_bytes_ < kBatchBytes) {
        return {};
    }
    STELLARIUM_TRY(append_pending());
    move_inner();
    return {};
}

Result<NodeRef> NodeWriter::add_inner(uint32_t level, TreeChildren children) {
    const NodeRef ref{encode_tree_inner(level, children).id, std::nullopt};
    inner_.push_back({level, std::move(children)});
    return ref;
}

void NodeWriter::move_inner() {
    for (PendingInner& inner : inner_) {
        for (NodeRef& child : inner.children.children) {
            if (!child.hint) {
                child.hint = store_.object_address(child.id);
            }
        }
        EncodedNode node = encode_tree_inner(inner.level, inner.children);
        pending_bytes_ += node.content.size() + node.aux.size();
        pending_.push_back({std::move(node), {}});
    }
    inner_.clear();
}

Result<void> NodeWriter::flush() {
    move_inner();
    return append_pending();
}

Result<void> NodeWriter::append_pending() {
    if (pending_.empty()) {
        return {};
    }
    nebula::WriteBatch batch;
    for (const Pending& pending : pending_) {
        batch.add_object(pending.node.id, pending.node.content, pending.node.aux);
    }
    STELLARIUM_TRY(store_.append(batch));
    for (const Pending& pending : pending_) {
        if (pending.stored) {
            pending.stored({pending.node.id, store_.object_address(pending.node.id)});
        }
    }
    pending_.clear();
    pending_bytes_ = 0;
    return {};
}

}  // namespace stellarium::nova
