// Brings ranges of a state into the host's page cache, checked against their ids, before a guest
// asks for them.
//
//     STELLARIUM_ASSIGN(const auto reader, pool.open_reader("vm-1"));
//     STELLARIUM_ASSIGN(StageReport report, stage(*reader, manifest.prefetch, {}));
//
// The list is taken a plan at a time (kPlanPages, in its order). Within a plan, what lies next to
// each other in the store is one read, whatever its order in the list was; reads come in the order
// of the first page that the list has of them. Chunks that a read touches are checked as a guest's
// read would check them, so that the guest finds them in memory and checked.
//
// Guests come first: before each read it waits, a moment at most, for theirs to be done, and the
// thread should have a low priority (Lowly). Memory: a buffer of kStageReadBytes, and the pages
// themselves, which are the system's to drop; it stops where the system has little to give.
//
// Thread rule: any thread; `reader` for as long as the call takes.
// Errors: kCancelled; those of the store that are no damage. What is damaged is passed over and
// counted: the guest that reads it is told.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/error.h"
#include "boot/manifest.h"
#include "nova/pool.h"

namespace stellarium::boot {

/// One read of the store, and which pages of the state it is for.
struct PlannedRead {
    nebula::PageAddress address;
    uint32_t pages = 0;
    std::vector<PageRange> parts;  ///< In the order of the list.
};

/// Joins what lies next to each other into reads of at most kStageReadBytes.
std::vector<PlannedRead> plan_reads(std::span<const nova::StoredRun> runs);

struct StageReport {
    uint64_t wanted_bytes = 0;   ///< Asked for, holes included.
    uint64_t staged_bytes = 0;   ///< Read and checked, in whole pages of the store.
    uint64_t damaged_bytes = 0;  ///< Could not be read.
    uint64_t reads = 0;
    bool short_of_memory = false;  ///< It stopped for that.
    std::chrono::nanoseconds duration{};

    void add(const StageReport& other);
};

struct StageOptions {
    /// Asked before each read; true: stop.
    std::function<bool()> cancelled{};
    /// Told after each read how many bytes of the list are done.
    std::function<void(uint64_t done_bytes)> progress{};
    /// Guests' reads that wait for the disk now.
    std::function<uint32_t()> waiting_reads{};
    /// What the system has to give without swapping; 0: it does not say.
    std::function<uint64_t()> available_bytes{};
};

Result<StageReport> stage(nova::Reader& reader, std::span<const PageRange> ranges,
                          const StageOptions& options);
/// Everything that the state holds, in its order.
Result<StageReport> stage_all(nova::Reader& reader, const StageOptions& options);

/// MemAvailable of /proc/meminfo; 0: it does not say.
uint64_t available_memory_bytes();

/// Gives the calling thread the lowest priority for the disk and a low one for the processor, for
/// good. Best effort.
void make_lowly();

}  // namespace stellarium::boot
