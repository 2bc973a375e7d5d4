// Passes of scrub over the store, with a position that outlives the process.
//
//     Scrubber scrubber(env, store);
//     scrubber.load();
//     STELLARIUM_ASSIGN(const ScrubPass pass, scrubber.run({.rate_bytes_per_second = 64 << 20},
//                                                          1.0, found));
//
// A pass covers the segments that there are when it begins: what is appended later is for the next
// one, so that a slow pass beside fast writers ends. The position is kept in the file `scrub` of
// the store's directory (docs/formats/scrub.md). It is a convenience: where it is missing, damaged
// or cannot be written (a full disk), the next pass begins from the start.
//
// Thread rule: run() on one thread at a time; everything else from any.
// Durability: the position at the end, and now and then. What is damaged is remembered by the
// store's next checkpoint.
// Errors: kCancelled; those of Store::scrub that concern the store as a whole.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>

#include "base/error.h"
#include "io/io.h"
#include "nebula/store.h"
#include "nova/format.h"
#include "nova/pool.h"

namespace stellarium::nova {

class Scrubber {
  public:
    /// Both outlive it.
    Scrubber(const io::Env& env, nebula::Store& store) : env_(env), store_(store) {}

    /// Reads the file. Before the first run().
    void load();

    /// Goes on with the present pass, or begins one. Reads during at most `share_of_time`.
    Result<ScrubPass> run(const ScrubOptions& options, double share_of_time,
                          const std::function<void(const nebula::DamagedChunk&)>& found);

    /// Begins the schedule, unless it has been for this store.
    void begin_schedule();
    /// When the next pass is due, since 1970: at once when one was interrupted.
    std::chrono::nanoseconds due(std::chrono::seconds every) const;

    /// Without `damaged_chunks` and `next_due`.
    ScrubStats stats() const;

  private:
    void begin_pass();
    /// Best effort.
    void save();
    Result<void> write_file(const format::ScrubFile& file);

    const io::Env env_;
    nebula::Store& store_;
    mutable std::mutex mutex_;
    format::ScrubFile file_{};  ///< Guarded by mutex_.
    bool running_ = false;      ///< Guarded by mutex_.
    uint64_t checked_bytes_ = 0;
    uint64_t passes_ = 0;
    std::string last_error_;
};

}  // namespace stellarium::nova
