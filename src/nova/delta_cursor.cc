#include "nova/delta_cursor.h"

#include <algorithm>

namespace stellarium::nova {

DeltaCursor::DeltaCursor(const Delta& delta) : node_(delta.root_.get()) {}

bool DeltaCursor::surely_equals(const DeltaCursor& other) const {
    if (node_ != nullptr && other.node_ != nullptr) {
        return same_node(*node_, *other.node_);
    }
    if (node_ != nullptr || other.node_ != nullptr) {
        return false;
    }
    return std::equal(entries_.begin(), entries_.end(), other.entries_.begin(),
                      other.entries_.end(), [&](const DeltaEntry& a, const DeltaEntry& b) {
                          return a.leaf - base_ == b.leaf - other.base_ &&
                                 (a.extents == b.extents || same_content(*a.extents, *b.extents));
                      });
}

Result<void> DeltaCursor::open(nebula::Store& store) {
    if (node_ != nullptr) {
        STELLARIUM_TRY(load_delta_node(store, *node_, IoMode::kMayBlock));
        if (!node_->body.is_inner()) {
            entries_ = node_->body.entries;
            base_ = 0;
            node_ = nullptr;
        }
    }
    return {};
}

Result<uint64_t> DeltaCursor::present(nebula::Store& store, uint32_t level) {
    STELLARIUM_TRY(open(store));
    if (node_ != nullptr) {
        return node_->body.present;
    }
    uint64_t present = 0;
    for (const DeltaEntry& entry : entries_) {
        present |= uint64_t{1} << ((entry.leaf - base_) >> child_shift(level));
    }
    return present;
}

DeltaCursor DeltaCursor::child(uint32_t level, uint32_t index) const {
    DeltaCursor below;
    if (node_ != nullptr) {
        below.node_ = node_->body.child(index);
        return below;
    }
    below.base_ = base_ + (uint64_t{index} << child_shift(level));
    const uint64_t end = below.base_ + leaves_below(level - 1);
    const auto before = [](const DeltaEntry& entry, uint64_t leaf) { return entry.leaf < leaf; };
    const auto first = std::lower_bound(entries_.begin(), entries_.end(), below.base_, before);
    const auto last = std::lower_bound(first, entries_.end(), end, before);
    below.entries_ = {first, last};
    return below;
}

Result<ExtentsPtr> DeltaCursor::extents(nebula::Store& store) {
    STELLARIUM_TRY(open(store));
    return entries_.empty() ? nullptr : entries_.front().extents;
}

}  // namespace stellarium::nova
