// What of a segment is alive, in entries and in pages: a pure function of its entries and of which
// of them are alive.
//
// Pages are dead where nothing needs them any more: the pages of a dead chunk or object, those of a
// pack without a live member, and the header of a batch whose entries are all dead. A header stays
// while one entry of its batch lives, because a scan of the segment finds the entry through it.
// (Batches are told apart by their headers, which are the pages between entries; batches without
// entries count to the next one that has some.)
//
// Thread rule: a pure function. Ownership: the result has no references to its input.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "nebula/dead_map.h"
#include "nebula/format.h"

namespace stellarium::nebula {

struct SegmentLiveness {
    uint64_t live_entries = 0;  ///< Packs not counted; the same below.
    uint64_t live_bytes = 0;    ///< Content.
    uint64_t dead_entries = 0;
    uint64_t dead_bytes = 0;
    std::vector<PageRun> dead_runs;      ///< Ascending, not adjacent.
    std::vector<uint32_t> dead_members;  ///< Ordinals of dead members of packs that live.
    /// Content bytes of those: dead, but nothing can be punched for them.
    uint64_t dead_member_bytes = 0;
    std::vector<uint32_t> sparse_packs;  ///< Ordinals of packs that live in a small part only.
    uint32_t dead_pages = 0;             ///< Of all runs.
    bool has_live = false;               ///< Entries, or a pack of unknown members.
    uint32_t end_page = 1;               ///< Behind the last entry that was looked at.
};

/// Looks at the entries before `end_page`. A pack is sparse when less than `sparse_below` of its
/// bytes belong to live members.
SegmentLiveness liveness_of(std::span<const Entry> entries, uint32_t end_page, double sparse_below,
                            const std::function<bool(uint32_t ordinal)>& is_live);

}  // namespace stellarium::nebula
