// An attached device: what the server, its data thread and the blocking pool share of it.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "base/block_device.h"
#include "base/budget.h"
#include "base/unique_fd.h"
#include "frontend/vhost/limits.h"
#include "frontend/vhost/listener.h"
#include "frontend/vhost/server.h"
#include "frontend/vhost/throttle.h"
#include "frontend/vhost/worker.h"

namespace stellarium::vhost {

class BlockingPool;
class Session;

/// Which queue of the blocking pool a request waits in; see blocking_pool.h.
enum class Lane : uint8_t { kRead, kWrite, kLarge };
inline constexpr size_t kLanes = 3;

/// Written by one thread (the data thread), read by any.
struct LiveTotals {
    std::atomic<uint64_t> requests{0};
    std::atomic<uint64_t> bytes{0};
    std::atomic<uint64_t> errors{0};
    std::atomic<uint64_t> latency_ns{0};
};

/// Requests of this device that wait for a thread of the blocking pool. Guarded by the lane.
struct LaneBacklog {
    std::deque<std::unique_ptr<Request>> waiting;
    unsigned running = 0;
    bool queued = false;
};

/// Thread rule: the first part is constant after attach, but for options.limits, which the server's
/// mutex guards; atomics and the guarded text are for all; the rest belongs to the data thread.
struct Device : std::enable_shared_from_this<Device> {
    std::string name;
    std::shared_ptr<BlockDevice> disk;
    AttachOptions options;
    std::string serial;
    bool read_only = false;
    Logger logger;
    std::shared_ptr<Budget> descriptors;  ///< Empty: no bound.
    Worker* worker = nullptr;
    BlockingPool* pool = nullptr;

    std::array<LiveTotals, kRequestKinds> totals;
    std::atomic<bool> connected{false};
    std::atomic<int> peer_pid{0};
    std::atomic<uint64_t> in_flight{0};
    /// The session ends: whatever of its requests has not begun is given up.
    std::atomic<bool> abandoning{false};
    std::atomic<uint64_t> connections{0};
    std::atomic<uint64_t> forced_disconnects{0};
    std::atomic<uint64_t> failures{0};  ///< Requests that the device failed.
    std::atomic<uint64_t> throttled_requests{0};
    std::atomic<uint64_t> throttled_ns{0};
    mutable std::mutex fault_mutex;
    std::string last_fault;
    std::array<std::unique_ptr<LaneBacklog>, kLanes> backlogs;  ///< Made at first use.

    Listener listener;
    EventSource listener_source;
    /// Of the device, not of a connection: who connects again finds no full bucket.
    Throttle throttle;
    std::shared_ptr<Session> session;
    std::function<void()> when_detached;

    void log(LogLevel level, std::string_view message) const {
        if (logger) {
            logger(level, name, message);
        }
    }

    // All of these run on the data thread.
    void start_listening();
    void on_listener();
    void on_resize();
    void set_limits(const RateLimits& limits);
    /// Called by the session when it is closed and none of its requests is outstanding.
    void on_session_drained();
    void begin_detach(std::function<void()> done);

  private:
    void finish_detach();
    bool listening_ = false;
};

}  // namespace stellarium::vhost
