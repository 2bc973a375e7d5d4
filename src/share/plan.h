// How a range of an image is put together out of files: what lies in long runs is mapped where it
// is, the rest is gathered in one memory file, so that the number of mappings is bounded.
//
//     STELLARIUM_ASSIGN(const Plan plan, make_plan(*reader, 0, 0, {}));
//     STELLARIUM_ASSIGN(const Mapping mapping, Mapping::make(plan, {}));
//
// Of all runs the longest are mapped; between two of those lies at most one piece of the memory
// file. What no piece covers is a hole. The memory file is sealed: nobody can change it any more.
//
// Thread rule: make_plan() from any thread, with a reader of the caller's; a Plan is a value.
// Ownership: a plan owns its descriptors, and so leases its segments while it lives.
// Errors: kInvalidArgument (ranges), kLimitExceeded (segments, gathered bytes); those of
// nova::Reader.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "nova/pool.h"
#include "share/limits.h"

namespace stellarium::share {

/// Whole pages of a file, and where in the range they go.
struct Piece {
    uint64_t offset_bytes = 0;  ///< Within the range.
    uint64_t length_bytes = 0;
    uint64_t file_offset_bytes = 0;
    uint32_t file = 0;  ///< Which of Plan::files.
    friend bool operator==(const Piece&, const Piece&) = default;
};

struct Plan {
    uint64_t length_bytes = 0;    ///< Of the range, in whole pages.
    uint64_t gathered_bytes = 0;  ///< Of those, copied into the memory file.
    std::vector<UniqueFd> files;  ///< Read-only; the memory file is the last one, if there is one.
    std::vector<Piece> pieces;    ///< Ascending, not overlapping.

    /// What the kernel needs at most for it.
    size_t mappings() const { return 2 * pieces.size() + 1; }
};

struct PlanOptions {
    size_t max_mappings = kDefaultMappings;
    size_t max_files = kMaxFiles;
    uint64_t max_gathered_bytes = std::numeric_limits<uint64_t>::max();
};

/// `offset_bytes` is a multiple of the page size, `length_bytes` too unless the range reaches the
/// end; 0: up to the end. Reads and checks the whole range.
Result<Plan> make_plan(nova::Reader& reader, uint64_t offset_bytes, uint64_t length_bytes,
                       const PlanOptions& options);

/// Checks a plan that somebody else made: pieces in order, inside of the range and of their files.
/// kProtocol.
Result<void> check_plan(const Plan& plan);

}  // namespace stellarium::share
