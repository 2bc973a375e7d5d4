#include "frontend/vhost/worker.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>

#include <fmt/core.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "frontend/vhost/device.h"
#include "frontend/vhost/limits.h"
#include "frontend/vhost/session.h"
#include "frontend/vhost/watchdog.h"

namespace stellarium::vhost {

Result<std::unique_ptr<Worker>> Worker::create(unsigned number, NowNs clock) {
    std::unique_ptr<Worker> worker(new Worker());
    worker->clock_ = std::move(clock);
    worker->epoll_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
    worker->wake_fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!worker->epoll_ || !worker->wake_fd_) {
        return std::unexpected(Error::from_errno(errno, "epoll of a vhost data thread"));
    }
    STELLARIUM_TRY(worker->watch(worker->wake_fd_.get(), EPOLLIN | EPOLLET, worker->wake_source_));
    worker->thread_ = std::thread([self = worker.get()] { self->run(); });
    ::pthread_setname_np(worker->thread_.native_handle(), fmt::format("vhost-{}", number).c_str());
    return worker;
}

Worker::~Worker() {
    if (thread_.joinable()) {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        wake();
        thread_.join();
    }
}

void Worker::wake() {
    uint64_t one = 1;
    // Only this process writes to it, far less often than would fill the counter.
    [[maybe_unused]] ssize_t n = ::write(wake_fd_.get(), &one, sizeof(one));
}

void Worker::post(std::function<void()> task) {
    bool first = false;
    {
        std::lock_guard lock(mutex_);
        first = tasks_.empty() && completed_.empty();
        tasks_.push_back(std::move(task));
    }
    if (first) {
        wake();
    }
}

void Worker::complete(std::unique_ptr<Request> request) {
    bool first = false;
    {
        std::lock_guard lock(mutex_);
        first = tasks_.empty() && completed_.empty();
        completed_.push_back(std::move(request));
    }
    if (first) {
        wake();
    }
}

Result<void> Worker::watch(int fd, uint32_t events, EventSource& source) {
    epoll_event event = {};
    event.events = events;
    event.data.ptr = &source;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
        return std::unexpected(Error::from_errno(errno, "watching a descriptor"));
    }
    return {};
}

void Worker::change(int fd, uint32_t events, EventSource& source) {
    epoll_event event = {};
    event.events = events;
    event.data.ptr = &source;
    // Changing what is registered cannot fail.
    [[maybe_unused]] int rc = ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
    assert(rc == 0);
}

void Worker::unwatch(int fd) {
    // Explicitly, because the front-end holds the same file and closing ours would not end it.
    [[maybe_unused]] int rc = ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    assert(rc == 0);
}

bool Worker::write_event(int fd) {
    uint64_t one = 1;
    event_writes_.fetch_add(1, std::memory_order_relaxed);
    ssize_t written = ::write(fd, &one, sizeof(one));
    bool interrupted = written < 0 && errno == EINTR;
    event_writes_.fetch_add(1, std::memory_order_relaxed);
    // When it is full, it already says what there is to say.
    return !interrupted;
}

void Worker::interrupt_if_stuck() {
    uint64_t now = event_writes_.load(std::memory_order_relaxed);
    if (now % 2 == 1 && now == last_seen_) {
        ::pthread_kill(thread_.native_handle(), kWatchdogSignal);
    }
    last_seen_ = now;
}

void Worker::make_ready(std::shared_ptr<Session> session) {
    ready_.push_back(std::move(session));
}

void Worker::poll_queue(const std::weak_ptr<Session>& session, uint16_t queue) {
    polled_.push_back(PolledQueue{session, queue});
}

void Worker::keep_until_end_of_turn(std::shared_ptr<void> object) {
    graveyard_.push_back(std::move(object));
}

std::unique_ptr<Request> Worker::take_request() {
    if (recycled_.empty()) {
        return std::make_unique<Request>();
    }
    std::unique_ptr<Request> request = std::move(recycled_.back());
    recycled_.pop_back();
    return request;
}

void Worker::recycle(std::unique_ptr<Request> request) {
    request->reset();
    if (recycled_.size() < kRecycledRequests && request->data.capacity() <= kRecycledSegments) {
        recycled_.push_back(std::move(request));
    }
}

void Worker::run() {
    // The process's signals are for its main thread; SIGBUS is raised by this one's own accesses.
    sigset_t set;
    ::sigfillset(&set);
    for (int signal : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT, kWatchdogSignal}) {
        ::sigdelset(&set, signal);
    }
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);

    std::array<epoll_event, 64> events;
    while (run_posted()) {
        graveyard_.clear();
        int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()),
                                 timeout_ms());
        for (int i = 0; i < count; ++i) {
            auto& source = *static_cast<EventSource*>(events[static_cast<size_t>(i)].data.ptr);
            switch (source.kind) {
                case EventSource::Kind::kWake:
                    break;
                case EventSource::Kind::kListener:
                    static_cast<Device*>(source.owner)->on_listener();
                    break;
                case EventSource::Kind::kSocket:
                    static_cast<Session*>(source.owner)->on_socket();
                    break;
                case EventSource::Kind::kKick:
                    static_cast<Session*>(source.owner)->on_kick(source.queue);
                    break;
            }
        }
        if (!polled_.empty()) {
            run_polled();
        }
        if (!timers_.empty()) {
            run_timers();
        }
        run_ready();
        if (!late_accepts_.empty() && std::chrono::steady_clock::now() >= next_accept_) {
            run_late_accepts();
        }
    }
}

int Worker::timeout_ms() const {
    if (!ready_.empty()) {
        return 0;
    }
    int timeout_ms = !polled_.empty()         ? kPollIntervalMs
                     : !late_accepts_.empty() ? kAcceptRetryMs
                                              : -1;
    if (!timers_.empty()) {
        // Rounded up, so that the thread does not run in circles for the last part of it.
        const uint64_t now = now_ns();
        const uint64_t at = timers_.begin()->first;
        const uint64_t left_ms = at <= now ? 0 : (at - now + 999'999) / 1'000'000;
        const int timer_ms = static_cast<int>(std::min<uint64_t>(left_ms, kMaxTimerMs));
        timeout_ms = timeout_ms < 0 ? timer_ms : std::min(timeout_ms, timer_ms);
    }
    return timeout_ms;
}

uint64_t Worker::now_ns() const {
    if (clock_) {
        return clock_();
    }
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                     std::chrono::steady_clock::now().time_since_epoch())
                                     .count());
}

void Worker::run_timers() {
    const uint64_t now = now_ns();
    while (!timers_.empty() && timers_.begin()->first <= now) {
        Session* session = timers_.begin()->second;
        timers_.erase(timers_.begin());
        session->on_timer();
    }
}

void Worker::accept_later(const std::weak_ptr<Device>& device) {
    late_accepts_.push_back(device);
    next_accept_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(kAcceptRetryMs);
}

void Worker::run_late_accepts() {
    std::vector<std::weak_ptr<Device>> devices;
    devices.swap(late_accepts_);
    for (const std::weak_ptr<Device>& weak : devices) {
        if (std::shared_ptr<Device> device = weak.lock()) {
            device->start_listening();
        }
    }
}

bool Worker::run_posted() {
    std::vector<std::function<void()>> tasks;
    std::vector<std::unique_ptr<Request>> completed;
    bool stop = false;
    {
        std::lock_guard lock(mutex_);
        tasks.swap(tasks_);
        completed.swap(completed_);
        stop = stop_;
    }
    for (std::unique_ptr<Request>& request : completed) {
        std::shared_ptr<Session> session = request->session;
        session->on_completed(std::move(request));
    }
    for (const std::function<void()>& task : tasks) {
        task();
    }
    // Everything was detached before stop was asked for, so nothing is left to run.
    return !stop || !tasks.empty() || !completed.empty();
}

void Worker::run_ready() {
    // Those that become ready during this turn wait for the next.
    for (size_t count = ready_.size(); count > 0; --count) {
        std::shared_ptr<Session> session = std::move(ready_.front());
        ready_.pop_front();
        session->take_turn();
    }
}

void Worker::run_polled() {
    std::erase_if(polled_, [](const PolledQueue& polled) {
        std::shared_ptr<Session> session = polled.session.lock();
        return session == nullptr || !session->poll(polled.queue);
    });
}

}  // namespace stellarium::vhost
