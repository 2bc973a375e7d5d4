#include "nova/folder.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "nebula/chunker.h"
#include "nova/chunk_hashing.h"
#include "nova/iovecs.h"
#include "nova/limits.h"
#include "nova/reader.h"

namespace stellarium::nova {

namespace {

/// Copies extents, and stores pages of some chunks in new ones.
class LeafRewriter {
  public:
    LeafRewriter(nebula::Store& store, NodeCache& cache, const VolumeState& state, uint64_t leaf,
                 const std::vector<ChunkId>& chunks)
        : store_(store), cache_(cache), state_(state), leaf_(leaf), chunks_(chunks) {}

    Result<Extents> rewrite(const Extents& old) {
        Extents result;
        for (size_t i = 0; i < old.size();) {
            if (!is_chosen(old[i])) {
                append_merged(result, old[i++]);
                continue;
            }
            const size_t first = i++;
            while (i < old.size() && is_chosen(old[i]) &&
                   old[i].first_page == old[i - 1].end_page()) {
                ++i;
            }
            STELLARIUM_TRY(store_run(old[first].first_page, old[i - 1].end_page(), result));
        }
        return result;
    }

    uint64_t stored_bytes() const { return stored_bytes_; }

  private:
    bool is_chosen(const Extent& extent) const {
        return std::find(chunks_.begin(), chunks_.end(), extent.id) != chunks_.end();
    }

    /// Cuts and hashes the pages [first, end) as a write of them would.
    Result<void> store_run(uint32_t first, uint32_t end, Extents& result) {
        std::vector<std::byte> content((end - first) * kPageBytes);
        const uint64_t first_page = leaf_ * kPagesPerLeaf + first;
        const iovec whole = to_iovec(content);
        IovecCursor cursor(std::span(&whole, 1));
        STELLARIUM_TRY(read_state(store_, cache_, state_, first_page * kPageBytes, cursor,
                                  content.size(), IoMode::kMayBlock));
        std::vector<nebula::Cut> cuts;
        nebula::cut_block_data(content, first_page, cuts);
        if (cuts.empty()) {
            return {};
        }
        std::vector<Bytes> pieces;
        pieces.reserve(cuts.size());
        for (const nebula::Cut& cut : cuts) {
            pieces.push_back(Bytes(content).subspan((cut.first_page - first_page) * kPageBytes,
                                                    cut.pages * kPageBytes));
        }
        std::vector<Hash256> ids(pieces.size());
        hash_chunks(pieces, ids);
        nebula::WriteBatch batch;
        for (size_t i = 0; i < pieces.size(); ++i) {
            batch.add_chunk(ids[i], pieces[i]);
        }
        STELLARIUM_ASSIGN(const nebula::Appended appended, store_.append(batch));
        for (size_t i = 0; i < cuts.size(); ++i) {
            append_merged(result,
                          {.first_page = static_cast<uint16_t>(cuts[i].first_page % kPagesPerLeaf),
                           .pages = static_cast<uint16_t>(cuts[i].pages),
                           .first_in_chunk = 0,
                           .hole = false,
                           .id = ids[i],
                           .chunk_address = appended.locations[i].address});
        }
        stored_bytes_ += appended.new_bytes;
        return {};
    }

    nebula::Store& store_;
    NodeCache& cache_;
    const VolumeState& state_;
    const uint64_t leaf_;
    const std::vector<ChunkId>& chunks_;
    uint64_t stored_bytes_ = 0;
};

}  // namespace

Result<void> Folder::replace(nebula::Store& protection, Entity& entity, const VolumeState& state,
                             const std::map<uint64_t, Extents>& leaves) const {
    FoldRecord record{.volume = entity.id, .root = {}, .leaves = {}};
    for (const auto& [leaf, extents] : leaves) {
        record.leaves.push_back(static_cast<uint32_t>(leaf));
    }
    STELLARIUM_ASSIGN(record.root, update_tree(protection, cache_, state.root, leaves));
    // What is logged must apply, and taking leaves away may have to read their neighbours.
    Delta rest = state.delta;
    for (const uint32_t leaf : record.leaves) {
        STELLARIUM_TRY(rest.set(store_, leaf, {}));
    }
    const PendingRecord pending = PendingRecord::of(record);
    STELLARIUM_TRY(committer_.commit({}, std::span(&pending, 1)));
    return {};
}

Result<void> Folder::fold(Entity& entity, std::span<const uint64_t> leaves) const {
    if (leaves.empty()) {
        return {};
    }
    const auto protection = store_.protect();
    for (size_t i = 0; i < leaves.size(); i += kFoldBatchLeaves) {
        const auto part = leaves.subspan(i, std::min(kFoldBatchLeaves, leaves.size() - i));
        const VolumeState state = entity.state();
        std::map<uint64_t, Extents> rewritten;
        uint64_t hidden = 0;
        for (const uint64_t leaf : part) {
            STELLARIUM_ASSIGN(rewritten[leaf], effective_leaf(store_, cache_, state, leaf));
            STELLARIUM_ASSIGN(const auto top, state.delta.find(store_, leaf));
            STELLARIUM_ASSIGN(const auto base, cache_.leaf(store_, state.root, leaf));
            hidden += top ? hidden_pages(base->extents, *top) : 0;
        }
        STELLARIUM_TRY(replace(*protection, entity, state, rewritten));
        catalog_.add_dead_pages(hidden);
    }
    return {};
}

Result<uint64_t> Folder::rewrite(Entity& entity,
                                 const std::map<uint64_t, LeafRewrite>& leaves) const {
    const auto protection = store_.protect();
    const std::lock_guard lock(entity.commit_mutex);
    if (entity.removed() || entity.state().damage) {
        return 0;
    }
    const VolumeState state = entity.state();
    std::map<uint64_t, Extents> rewritten;
    uint64_t stored_bytes = 0;
    for (const auto& [leaf, what] : leaves) {
        if (leaf * kPagesPerLeaf >= state.pages()) {
            continue;  // The volume has shrunk.
        }
        STELLARIUM_ASSIGN(const Extents old, effective_leaf(store_, cache_, state, leaf));
        LeafRewriter rewriter(*protection, cache_, state, leaf, what.chunks);
        STELLARIUM_ASSIGN(Extents now, rewriter.rewrite(old));
        STELLARIUM_ASSIGN(const auto top, state.delta.find(store_, leaf));
        if (top || !same_content(old, now)) {
            rewritten.emplace(leaf, std::move(now));
        }
        stored_bytes += rewriter.stored_bytes();
    }
    if (!rewritten.empty()) {
        STELLARIUM_TRY(replace(*protection, entity, state, rewritten));
    }
    return stored_bytes;
}

Result<void> Folder::fold_candidates(Entity& entity) const {
    const std::lock_guard lock(entity.commit_mutex);
    if (entity.removed() || entity.fold_candidates.empty() || entity.state().damage) {
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
    if (entity.removed() || entity.state().damage) {
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

Result<void> Folder::pass_over_damaged(const Entity& entity, Result<void> done) const {
    if (done || (done.error().code() != ErrorCode::kCorrupt &&
                 done.error().code() != ErrorCode::kNotFound)) {
        return done;
    }
    if (skipped_) {
        skipped_(entity, done.error());
    }
    return {};
}

Result<void> Folder::fold_where_due() const {
    std::vector<std::pair<uint64_t, EntityPtr>> by_size;
    uint64_t total = 0;
    for (const EntityPtr& entity : catalog_.list(EntityKind::kVolume)) {
        STELLARIUM_TRY(pass_over_damaged(*entity, fold_candidates(*entity)));
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
        STELLARIUM_TRY(pass_over_damaged(*entity, fold_whole(*entity)));
        total -= extents;
    }
    return {};
}

}  // namespace stellarium::nova
