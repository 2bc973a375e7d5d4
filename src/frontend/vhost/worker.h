// A data thread: one epoll loop over the sockets and kick descriptors of the devices pinned to it.
//
// A turn of the loop: run what other threads posted, complete finished requests, handle events,
// then let each device that has work do a bounded part of it. It never blocks except in epoll_wait.
//
// Kick descriptors are registered edge-triggered and never read: every write to an eventfd gives a
// new edge, so a system call a kick is saved, and a front-end that reads its own eventfd at the
// wrong moment cannot make this thread wait.
//
// Thread rule: post(), complete() from any thread; everything else on the thread itself.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "frontend/vhost/request.h"

namespace stellarium::vhost {

struct Device;
class Session;

/// What an epoll event points at. Lives in its owner, which outlives the turn that closes it
/// (Worker::keep_until_end_of_turn).
struct EventSource {
    enum class Kind : uint8_t { kWake, kListener, kSocket, kKick };
    Kind kind = Kind::kWake;
    void* owner = nullptr;
    uint16_t queue = 0;
};

/// Nanoseconds of a clock that does not go back.
using NowNs = std::function<uint64_t()>;

class Worker {
  public:
    /// `clock`: for limits of rate; empty for the system's.
    static Result<std::unique_ptr<Worker>> create(unsigned number, NowNs clock = {});
    /// Stops the loop after what was posted, and joins it.
    ~Worker();
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    void post(std::function<void()> task);
    /// Hands a finished request back to its session.
    void complete(std::unique_ptr<Request> request);
    /// Interrupts a system call that the thread has been in since the last time this was asked; see
    /// watchdog.h.
    void interrupt_if_stuck();
    std::atomic<unsigned>& device_count() { return device_count_; }

    // ---- On the thread -----------------------------------------------------------------------

    Result<void> watch(int fd, uint32_t events, EventSource& source);
    void change(int fd, uint32_t events, EventSource& source);
    void unwatch(int fd);
    /// Puts a session on the list of those with work; it is not on it already.
    void make_ready(std::shared_ptr<Session> session);
    /// Looks at a ring without kick descriptor every kPollIntervalMs while the session lives.
    void poll_queue(const std::weak_ptr<Session>& session, uint16_t queue);
    /// Calls Device::on_listener again in a while: the process was out of descriptors.
    void accept_later(const std::weak_ptr<Device>& device);
    uint64_t now_ns() const;
    /// Calls Session::on_timer() at that time or up to a millisecond later. The session stops the
    /// timer before it ends. One for each session at a time.
    void start_timer(uint64_t at_ns, Session& session) { timers_.emplace(at_ns, &session); }
    void stop_timer(uint64_t at_ns, Session& session) { timers_.erase({at_ns, &session}); }
    void keep_until_end_of_turn(std::shared_ptr<void> object);
    /// write() of eight bytes to a descriptor whose other owner could make it wait. False when it
    /// had to be interrupted.
    bool write_event(int fd);
    std::unique_ptr<Request> take_request();
    void recycle(std::unique_ptr<Request> request);
    /// Scratch for the chain being decoded.
    Chain& chain() { return chain_; }

  private:
    struct PolledQueue {
        std::weak_ptr<Session> session;
        uint16_t queue;
    };

    Worker() = default;
    void run();
    void wake();
    bool run_posted();
    void run_ready();
    void run_polled();
    void run_timers();
    int timeout_ms() const;
    void run_late_accepts();

    NowNs clock_;
    UniqueFd epoll_;
    UniqueFd wake_fd_;
    EventSource wake_source_;
    std::thread thread_;
    std::atomic<unsigned> device_count_{0};

    std::atomic<uint64_t> event_writes_{0};  ///< Odd while one is under way.
    uint64_t last_seen_ = 0;                 ///< The watchdog's.

    std::mutex mutex_;  ///< Guards the next three.
    std::vector<std::function<void()>> tasks_;
    std::vector<std::unique_ptr<Request>> completed_;
    bool stop_ = false;

    std::deque<std::shared_ptr<Session>> ready_;
    std::vector<PolledQueue> polled_;
    std::set<std::pair<uint64_t, Session*>> timers_;  ///< By time.
    std::vector<std::weak_ptr<Device>> late_accepts_;
    std::chrono::steady_clock::time_point next_accept_;
    std::vector<std::shared_ptr<void>> graveyard_;
    std::vector<std::unique_ptr<Request>> recycled_;
    Chain chain_;
};

}  // namespace stellarium::vhost
