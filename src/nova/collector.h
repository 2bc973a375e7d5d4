// Garbage collection: what is needed is marked from the roots, the store frees the rest.
//
// docs/internals/garbage-collection.md has the steps and why they lose nothing; the store's half is
// nebula/collection.h. A run is a collection, and then, where it pays, a second one:
//
//   1. The barrier, a checkpoint of the frozen catalog (the caller's), and the position.
//   2. Mark: the catalog's own objects, the tree and delta of every image, volume and snapshot, and
//      of every leased state. Each stored node is read once, whoever refers to it. Memory: a path
//      of nodes, not the tree.
//   3. Plan: in parts of volumes' trees that nothing else refers to, leaves that hold pages which a
//      delta hides, and chunks of which less than half is alive.
//   4. Sweep (the store's).
//   5. Rewrite what was planned: such a leaf is folded, and the live part of such a chunk stored as
//      a chunk of its own. That frees the old ones, for step 6.
//   6. A second collection when step 5 has made enough garbage for it.
//
// Snapshots and images are never rewritten. The content of a volume is the same before and after.
//
// Thread rule: one run at a time, on any thread; everything else goes on beside it.
// Durability: what was freed stays freed; a crash at any point loses nothing.
// Errors: kCorrupt and kNotFound name the image, volume or snapshot whose tree is damaged; nothing
// has been freed then. kCancelled. Those of nebula/collection.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "nebula/collection.h"
#include "nebula/store.h"
#include "nova/catalog.h"
#include "nova/folder.h"
#include "nova/leases.h"
#include "nova/pool.h"
#include "nova/tree.h"

namespace stellarium::nova {

class Collector {
  public:
    /// What the caller's checkpoint was.
    struct Published {
        std::unique_ptr<nebula::Collection> collection;  ///< Its position is fixed.
        Catalog::Frozen frozen;
        std::vector<std::byte> payload;
        /// Taken after the catalog was frozen; their deltas are stored.
        std::vector<std::pair<std::string, VolumeState>> leased;
    };
    /// Begins a collection, publishes a checkpoint, fixes the position.
    using Publish = std::function<Result<Published>()>;

    Collector(nebula::Store& store, NodeCache& cache, Catalog& catalog, const Folder& folder,
              Publish publish)
        : store_(store),
          cache_(cache),
          catalog_(catalog),
          folder_(folder),
          publish_(std::move(publish)) {}

    Result<GcReport> run(const GcOptions& options) const;

  private:
    struct Plan;
    /// One collection; adds to `report`, and to `plan` when that is given.
    Result<void> collect(const GcOptions& options, GcReport& report, Plan* plan) const;
    Result<void> make_plan(const GcOptions& options, const Published& published, Plan& plan) const;
    Result<void> carry_out(const GcOptions& options, const Plan& plan, GcReport& report) const;

    nebula::Store& store_;
    NodeCache& cache_;
    Catalog& catalog_;
    const Folder& folder_;
    const Publish publish_;
};

}  // namespace stellarium::nova
