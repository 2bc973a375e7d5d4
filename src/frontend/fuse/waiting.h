// Requests that wait for room, and how many threads they may have.
//
// All files share a few threads. A volume whose buffer is full, or whose disk is, would take all of
// them, one for each of its writes, and nobody else's requests would be read. Here the requests of
// one node have at most `of_node` threads to wait with, and those of all nodes `in_all`; others are
// kept without one, and done in their order by threads that have waited. A request that is kept
// needs its own copy of what it works on; beyond `kept_bytes` of copies it waits with its thread
// all the same, so that memory is bounded.
//
//     WaitingRequests waiting({.of_node = 4, .in_all = 12, .kept_bytes = 64 << 20});
//     waiting.wait(node, data.size(),
//                  [&] { answer(write(data)); },                      // waits, and answers
//                  [&] { return [copy = copied(data)] { answer(write(copy)); }; });
//
// Whatever is kept is done before the last thread that waits returns.
//
// Thread rule: any thread. Jobs run with no lock held.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace stellarium::fuse {

class WaitingRequests {
  public:
    using Job = std::function<void()>;
    struct Limits {
        unsigned of_node = 1;
        unsigned in_all = 1;
        size_t kept_bytes = 0;
    };
    struct Status {
        unsigned waiting = 0;  ///< With a thread.
        size_t kept = 0;       ///< Without.
        size_t kept_bytes = 0;
    };

    explicit WaitingRequests(const Limits& limits) : limits_(limits) {}

    /// Runs `here`, and then what has been kept meanwhile; or keeps what `keep` makes, whose copies
    /// take `bytes`.
    void wait(uint64_t node, size_t bytes, const Job& here, const std::function<Job()>& keep);
    Status status() const;

  private:
    struct Kept {
        size_t bytes = 0;
        Job job;
    };
    struct Node {
        unsigned waiting = 0;
        std::deque<Kept> kept;
    };

    /// A thread that has waited for `node` goes on with the next of it, or of another one.
    std::optional<std::pair<uint64_t, Job>> next(uint64_t node);

    const Limits limits_;
    mutable std::mutex mutex_;
    std::unordered_map<uint64_t, Node> nodes_;  ///< That wait. Guarded by mutex_, as is the rest.
    unsigned waiting_ = 0;
    size_t kept_ = 0;
    size_t kept_bytes_ = 0;
};

}  // namespace stellarium::fuse
