// Content where it lies in the segments, leased so that it can be mapped.
//
// The order is what makes it safe beside a collection: first the segment is leased, so that nothing
// of it is freed from then on; then its pages are read, which finds what was declared dead before
// (kStale), and checks the rest against their ids. What is stale is looked up again, a bounded
// number of times.
//
//     STELLARIUM_ASSIGN(LeasedRange range, lease_range(store, cache, state, 0, 512, 64));
//     mmap(address, ..., range.files[run.file]->descriptor(), run.file_offset_bytes);
//
// Thread rule: from any thread; a state is a value of the caller's own, which a lease or an entity
// keeps (leases.h).
// Errors: kLimitExceeded; those of reader.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "nebula/store.h"
#include "nova/pool.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// See Reader::lease.
Result<LeasedRange> lease_range(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                                uint64_t first_page, uint64_t pages, size_t max_files);

}  // namespace stellarium::nova
