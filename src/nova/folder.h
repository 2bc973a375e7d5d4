// Folding: where a leaf's part of the delta has grown large, the leaf is rewritten with it.
//
// A delta over a leaf is worth folding when it has at least kMinFoldExtents extents and more than
// half as many as the leaf, so that a random write pays for a small multiple of itself. When all
// deltas together exceed kMaxDeltaExtents, the largest are folded whole, whatever they hold.
// The nodes are appended first; then one record says which leaves of the delta have become part of
// the tree. A crash in between leaves unreferenced nodes and the old state.
//
// Thread rule: any thread; one volume at a time is held by its commit_mutex.
// Durability: appended, not synced. Errors: those of nova/tree.h; nothing has changed then.
#pragma once

#include <cstdint>
#include <span>

#include "base/error.h"
#include "nebula/store.h"
#include "nova/catalog.h"
#include "nova/committer.h"
#include "nova/tree.h"

namespace stellarium::nova {

class Folder {
  public:
    Folder(nebula::Store& store, NodeCache& cache, Catalog& catalog, Committer& committer)
        : store_(store), cache_(cache), catalog_(catalog), committer_(committer) {}

    /// All volumes of the pool.
    Result<void> fold_where_due() const;

  private:
    Result<void> fold_candidates(Entity& entity) const;
    Result<void> fold_whole(Entity& entity) const;
    /// With the commit_mutex held.
    Result<void> fold(Entity& entity, std::span<const uint64_t> leaves) const;

    nebula::Store& store_;
    NodeCache& cache_;
    Catalog& catalog_;
    Committer& committer_;
};

}  // namespace stellarium::nova
