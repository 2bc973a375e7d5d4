// What of images, volumes and snapshots is in memory, and who shares it.
//
// Counts references: an extent of a tree or a delta refers to pages of a chunk, which lie in a
// segment, and such a page is resident or it is not. It is shared when two of the states refer to
// it, by way of the same node or of two. What a delta hides of the tree under it is counted until
// it is folded. Dirty pages are not.
//
//     SharingFinder finder(store, resident_pages_of);
//     for (const VolumeState& state : states) STELLARIUM_TRY(finder.add(state));
//     for (const VolumeState& state : states) STELLARIUM_ASSIGN(auto counts, finder.count(state));
//
// First each state claims the nodes and the pages that it comes to. A node that a second one comes
// to belongs to many, with everything below it; that is gone through once more, and not again for a
// third. Then each state is counted: what is its own is walked, of what belongs to many the sum is
// remembered. So each node is read at most three times.
//
// Thread rule: one thread. The states must be leased (leases.h) where a collection may run.
// Memory: some 60 bytes for each node and 16 for each resident page that something refers to.
// Errors: those of the store that are no damage; kReadOnly when a delta has nodes that are not
// stored yet and cannot be.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "base/error.h"
#include "base/hash.h"
#include "nebula/store.h"
#include "nova/node_walk.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// One bit for each page of a segment, those beyond the end left out.
using ResidentPages = std::vector<bool>;

/// Which pages of the segment's file are in the page cache; empty on the simulated disk, and when
/// there is no such segment any more.
Result<ResidentPages> resident_pages(nebula::Store& store, uint32_t segment);

class SharingFinder {
  public:
    using Resident = std::function<Result<ResidentPages>(uint32_t segment)>;
    SharingFinder(nebula::Store& store, Resident resident)
        : store_(store), resident_(std::move(resident)) {}

    /// In pages.
    struct Counts {
        uint64_t stored = 0;
        uint64_t resident = 0;
        uint64_t own = 0;  ///< Of the resident ones, that no other state refers to.
    };
    /// All states first, then their counts in the same order.
    Result<void> add(const VolumeState& state);
    Result<Counts> count(const VolumeState& state);

    uint64_t resident_pages_in_all() const { return pages_.size(); }
    bool complete() const { return complete_; }
    uint64_t nodes_read() const { return nodes_read_; }  ///< For tests.

  private:
    static constexpr uint32_t kMany = 0;
    struct Node {
        uint32_t owner = kMany;  ///< The state's number, from 1.
        bool counted = false;    ///< Of many: `sum` is known.
        Counts sum{};
    };
    /// A run of pages in a segment that a node refers to.
    using VisitPages = std::function<void(uint64_t address, bool is_resident)>;

    Result<std::vector<NodeVisit>> tops_of(const VolumeState& state) const;
    Result<void> claim(const NodeVisit& top, uint32_t owner);
    Result<Counts> count(const NodeVisit& at, uint32_t owner);
    Result<NodeContent> read(const NodeVisit& at);
    Result<void> for_each_page(const NodeContent& node, const VisitPages& visit);
    Result<bool> is_resident(nebula::PageAddress address);

    nebula::Store& store_;
    const Resident resident_;
    uint32_t added_ = 0;
    uint32_t counted_ = 0;
    absl::flat_hash_map<Hash256, Node, Hash256Hasher> nodes_;
    absl::flat_hash_map<uint64_t, uint32_t> pages_;  ///< By address, resident ones: the owner.
    absl::flat_hash_map<uint32_t, ResidentPages> segments_;
    bool complete_ = true;
    uint64_t nodes_read_ = 0;
};

}  // namespace stellarium::nova
