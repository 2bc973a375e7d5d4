// Reading the content that a volume's state names: delta over leaf, extents, segments.
//
// What is physically consecutive is read in one piece, straight into the caller's buffers; holes
// are filled with zeros. Dirty pages are not looked at: that is volume.h.
//
// A garbage collection may move a chunk, or free one whose state is outdated. Addresses that are
// stale are looked up again here, a bounded number of times. A state that is neither leased nor
// that of an entity may turn out to name what is gone: then the caller starts again with the
// present state (see Volume::read).
//
//     IovecCursor cursor(buffers);
//     STELLARIUM_TRY(read_state(store, cache, state, offset_bytes, cursor, length_bytes, mode));
//
// Thread rule: any function from any thread; a state is a value of the caller's own.
// Errors: kWouldBlock with IoMode::kNoWait when something is not in memory or has moved (the
// buffers may be partly overwritten then); kCorrupt and kNotFound for nodes and chunks that are not
// there; those of nebula/store.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "base/block_device.h"
#include "base/error.h"
#include "nebula/store.h"
#include "nova/iovecs.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// Fills the next `length_bytes` of `into` with the content from `offset_bytes` on. Any offset and
/// length; what lies beyond the size reads as zeros.
Result<void> read_state(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                        uint64_t offset_bytes, IovecCursor& into, uint64_t length_bytes,
                        IoMode mode);

/// The first mapped range at or after `offset_bytes`, as (offset, length), in whole pages but cut
/// at the size; ranges that touch are merged, up to kMaxDataRangeBytes. nullopt: only holes follow.
Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(nebula::Store& store,
                                                               NodeCache& cache,
                                                               const VolumeState& state,
                                                               uint64_t offset_bytes);

/// Calls `visit` for each run of pages, one after another in the store, that hold [first_page,
/// first_page + pages) of the content, in that order; holes and what lies beyond the end are left
/// out. An address may go stale at any time.
Result<void> locate_state(
    nebula::Store& store, NodeCache& cache, const VolumeState& state, uint64_t first_page,
    uint64_t pages,
    const std::function<void(uint64_t page, nebula::PageAddress address, uint32_t pages)>& visit);

}  // namespace stellarium::nova
