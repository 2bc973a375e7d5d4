// Records what a guest reads of its disk: pages, in the order of their first touch.
//
//     auto recorder = std::make_shared<Recorder>(*env.clock, volume_size_bytes);
//     pool.observe_reads(id, recorder);
//     ...
//     pool.observe_reads(id, nullptr);
//     BootTrace trace = recorder->trace(env.clock->wall());
//
// Bounded: it takes no more when the trace has kMaxTraceRuns runs or kMaxTracePages pages, or after
// the time limit.
//
// Thread rule: everything from any thread at the same time. on_read() takes a lock for as long as
// it takes to look at a bit for each page of the request.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>

#include <absl/container/flat_hash_map.h>

#include "boot/limits.h"
#include "boot/manifest.h"
#include "io/io.h"
#include "nova/leaf_bits.h"
#include "nova/tree.h"
#include "nova/volume.h"

namespace stellarium::boot {

class Recorder final : public nova::ReadObserver {
  public:
    /// The clock outlives it.
    Recorder(io::Clock& clock, uint64_t size_bytes,
             std::chrono::nanoseconds time_limit = kMaxRecordingTime)
        : clock_(clock),
          end_page_((size_bytes + nova::kPageBytes - 1) / nova::kPageBytes),
          end_(clock.monotonic() + time_limit) {}

    void on_read(uint64_t offset_bytes, uint64_t length_bytes) override;

    struct Progress {
        uint64_t pages = 0;
        uint64_t runs = 0;
        bool cut = false;  ///< A limit was reached: it takes no more.
    };
    Progress progress() const;
    BootTrace trace(std::chrono::nanoseconds wall) const;

  private:
    /// With mutex_ held: pages [first, end), which nobody has touched, come next.
    void append(uint64_t first, uint64_t end);

    io::Clock& clock_;
    const uint64_t end_page_;
    const std::chrono::nanoseconds end_;
    std::atomic<bool> cut_{false};
    mutable std::mutex mutex_;
    // Guarded by mutex_:
    absl::flat_hash_map<uint64_t, nova::LeafBits> touched_;  ///< By leaf.
    std::vector<PageRange> runs_;
    uint64_t pages_ = 0;
};

}  // namespace stellarium::boot
