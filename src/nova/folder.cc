#include "nova/folder.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "nova/limits.h"

namespace stellarium::nova {

Result<void> Folder::fold(Entity& entity, std::span<const uint64_t> leaves) const {
    for (size_t i = 0; i < leaves.size(); i += kFoldBatchLeaves) {
        const auto part = leaves.subspan(i, std::min(kFoldBatchLeaves, leaves.size() - i));
        const VolumeState state = entity.state();
        std::map<uint64_t, Extents> rewritten;
        FoldRecord record{.volume = entity.id, .root = {}, .leaves = {}};
        for (const uint64_t leaf : part) {
            STELLARIUM_ASSIGN(rewritten[leaf], effective_leaf(store_, cache_, state, leaf));
            record.leaves.push_back(static_cast<uint32_t>(leaf));
        }
        STELLARIUM_ASSIGN(record.root, update_tree(store_, cache_, state.root, rewritten));
        const PendingRecord pending = PendingRecord::of(record);
        STELLARIUM_TRY(committer_.commit({}, std::span(&pending, 1)));
    }
    return {};
}

Result<void> Folder::fold_candidates(Entity& entity) const {
    const std::lock_guard lock(entity.commit_mutex);
    if (entity.removed() || entity.fold_candidates.empty()) {
        return {};
    }
    const VolumeState state = entity.state();
    std::vector<uint64_t> due;
    for (const uint64_t leaf : entity.fold_candidates) {
        STELLARIUM_ASSIGN(const auto delta, state.delta.find(store_, leaf));
        if (!delta || delta->size() < kMinFoldExtents) {
            continue;
        }
        STELLARIUM_ASSIGN(const auto base, cache_.leaf(store_, state.root, leaf));
        if (delta->size() * 2 > base->extents.size()) {
            due.push_back(leaf);
        }
    }
    entity.fold_candidates.clear();
    return fold(entity, due);
}

Result<void> Folder::fold_whole(Entity& entity) const {
    const std::lock_guard lock(entity.commit_mutex);
    if (entity.removed()) {
        return {};
    }
    std::vector<uint64_t> leaves;
    STELLARIUM_TRY(entity.state().delta.for_each(store_, 0, kMaxLeaves - 1,
                                                 [&](uint64_t leaf, const Extents&) {
                                                     leaves.push_back(leaf);
                                                     return true;
                                                 }));
    entity.fold_candidates.clear();
    return fold(entity, leaves);
}

Result<void> Folder::fold_where_due() const {
    std::vector<std::pair<uint64_t, EntityPtr>> by_size;
    uint64_t total = 0;
    for (const EntityPtr& entity : catalog_.list(EntityKind::kVolume)) {
        STELLARIUM_TRY(fold_candidates(*entity));
        const uint64_t extents = entity->state().delta.extents();
        if (extents > 0) {
            by_size.emplace_back(extents, entity);
            total += extents;
        }
    }
    if (total <= kMaxDeltaExtents) {
        return {};
    }
    std::sort(by_size.begin(), by_size.end(),
              [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const auto& [extents, entity] : by_size) {
        if (total <= kMaxDeltaExtents / 2) {
            break;
        }
        STELLARIUM_TRY(fold_whole(*entity));
        total -= extents;
    }
    return {};
}

}  // namespace stellarium::nova
