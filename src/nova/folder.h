// Folding: where a leaf's part of the delta has grown large, the leaf is rewritten with it.
//
// A delta over a leaf is worth folding when it has at least kMinFoldExtents extents and more than
// half as many as the leaf, so that a random write pays for a small multiple of itself. When all
// deltas together exceed kMaxDeltaExtents, the largest are folded whole, whatever they hold.
// A volume of which something cannot be read (kCorrupt, kNotFound) is passed over and reported:
// what is damaged in one volume is no reason to let the log of all grow for ever. The nodes are
// appended first; then one record says which leaves of the delta have become part of the tree. A
// crash in between leaves unreferenced nodes and the old state.
//
// A garbage collection also has leaves rewritten, to get rid of pages that the delta hides and of
// chunks that are mostly dead: the same, with the live parts of such chunks stored anew, as if the
// guest had written them once more.
//
// New nodes and chunks are appended under a protection, which ends after the record that makes them
// reachable: no collection frees them in between.
//
// Thread rule: any thread; one volume at a time is held by its commit_mutex.
// Durability: appended, not synced. Errors: those of nova/tree.h; nothing has changed then.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "base/error.h"
#include "nebula/store.h"
#include "nova/catalog.h"
#include "nova/committer.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// What is to be done to one leaf beside folding it.
struct LeafRewrite {
    std::vector<ChunkId> chunks;  ///< Their pages are stored in chunks of their own.
};

class Folder {
  public:
    /// `skipped` is told of volumes that were passed over.
    Folder(nebula::Store& store, NodeCache& cache, Catalog& catalog, Committer& committer,
           std::function<void(const Entity&, const Error&)> skipped = {})
        : store_(store),
          cache_(cache),
          catalog_(catalog),
          committer_(committer),
          skipped_(std::move(skipped)) {}

    /// All volumes of the pool.
    Result<void> fold_where_due() const;

    /// Folds leaves of a volume whatever they hold, with new chunks in place of those named, where
    /// they are still used. Returns the bytes of the new chunks.
    Result<uint64_t> rewrite(Entity& entity, const std::map<uint64_t, LeafRewrite>& leaves) const;

  private:
    /// Takes away an error that is no reason to stop.
    Result<void> pass_over_damaged(const Entity& entity, Result<void> done) const;
    Result<void> fold_candidates(Entity& entity) const;
    Result<void> fold_whole(Entity& entity) const;
    /// With the commit_mutex held.
    Result<void> fold(Entity& entity, std::span<const uint64_t> leaves) const;
    /// Publishes new leaves of `state`, which is the entity's.
    Result<void> replace(nebula::Store& protection, Entity& entity, const VolumeState& state,
                         const std::map<uint64_t, Extents>& leaves) const;

    nebula::Store& store_;
    NodeCache& cache_;
    Catalog& catalog_;
    Committer& committer_;
    const std::function<void(const Entity&, const Error&)> skipped_;
};

}  // namespace stellarium::nova
