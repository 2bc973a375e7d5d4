// Every bound of boot recording and prefetch.
//
// Thread rule: constants.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "nova/limits.h"

namespace stellarium::boot {

// A boot manifest.
inline constexpr size_t kMaxTraces = 8;  ///< Kept for a later merge; the oldest goes.
inline constexpr size_t kMaxTraceRuns = 16'384;
inline constexpr uint64_t kMaxTracePages = 131'072;  ///< 512 MiB.
inline constexpr size_t kMaxPrefetchRuns = 32'768;
inline constexpr size_t kMaxHintsBytes = 4096;
static_assert((kMaxTraces * kMaxTraceRuns + kMaxPrefetchRuns) * 8 + kMaxHintsBytes + 4096 <=
              nova::kMaxBootManifestBytes);

/// What merging them takes: 16 bytes for each page of each trace, and as many for the list.
inline constexpr uint64_t kMergeBytes = kMaxTraces * kMaxTracePages * 16 * 2;

// Recording. One takes 80 bytes for each 2 MiB in which something was read, in a table that is half
// full at times, and 16 for each run.
inline constexpr size_t kMaxRecordings = 8;
inline constexpr uint64_t kRecordingBytes = uint64_t{4} << 20;
static_assert((kMaxTraceRuns + kMaxTracePages / 512) * 80 * 5 / 2 + kMaxTraceRuns * 16 * 2 <=
              kRecordingBytes);
inline constexpr std::chrono::seconds kMaxRecordingTime{600};

// Prefetch.
/// Planned, and put in order, at a time: what lies next to each other in the store is read at once.
inline constexpr uint64_t kPlanPages = 2048;
/// One read, and the buffer it goes to.
inline constexpr uint64_t kStageReadBytes = uint64_t{2} << 20;
/// Asked of the disk before it is read.
inline constexpr uint64_t kReadAheadBytes = uint64_t{4} << 20;
/// Prefetch stops when the system has less memory to give than this.
inline constexpr uint64_t kMinAvailableBytes = uint64_t{128} << 20;
/// How long one read of a prefetch waits for guests' reads to be done.
inline constexpr std::chrono::microseconds kMaxYield{4000};
inline constexpr std::chrono::microseconds kYieldStep{250};
/// What was staged so recently is not staged again for the next clone that is attached.
inline constexpr std::chrono::seconds kFreshFor{10};
/// Calls that wait for a prefetch at once.
inline constexpr unsigned kMaxWaitingPrefetches = 2;

}  // namespace stellarium::boot
