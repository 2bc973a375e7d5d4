#include "frontend/vhost/blocking_pool.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <system_error>

#include <fmt/core.h>
#include <pthread.h>
#include <signal.h>

namespace stellarium::vhost {

namespace {
/// How long a thread that was added waits for work before it ends.
constexpr std::chrono::seconds kIdleThreadTime{1};
}  // namespace

BlockingPool::BlockingPool(unsigned threads) {
    threads = std::max(threads, 1U);
    state(Lane::kRead).per_device = std::max(threads / 2, 1U);
    state(Lane::kWrite).grows = true;
    const std::array<unsigned, kLanes> counts = {threads, threads, 1};
    for (size_t lane = 0; lane < kLanes; ++lane) {
        std::lock_guard lock(lanes_[lane].mutex);
        lanes_[lane].kept = counts[lane];
        for (unsigned i = 0; i < counts[lane]; ++i) {
            start_thread(static_cast<Lane>(lane));
        }
    }
}

BlockingPool::~BlockingPool() {
    for (LaneState& lane : lanes_) {
        {
            std::lock_guard lock(lane.mutex);
            lane.stop = true;
        }
        lane.work.notify_all();
        for (std::thread& thread : lane.threads) {
            thread.join();
        }
    }
}

void BlockingPool::start_thread(Lane lane) {
    LaneState& lane_state = state(lane);
    for (Threads::iterator ended : lane_state.ended) {
        ended->join();
        lane_state.threads.erase(ended);
    }
    lane_state.ended.clear();
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    for (int synchronous : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT}) {
        ::sigdelset(&all, synchronous);
    }
    ::pthread_sigmask(SIG_BLOCK, &all, &before);
    Threads::iterator self = lane_state.threads.emplace(lane_state.threads.end());
    try {
        *self = std::thread([this, lane, self] { run(lane, self); });
        ::pthread_setname_np(self->native_handle(), "vhost-blocking");
        ++lane_state.idle;
    } catch (const std::system_error&) {
        // The system has no more threads: those that there are will do it, later.
        lane_state.threads.erase(self);
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void BlockingPool::submit(Lane lane, std::shared_ptr<Device> device,
                          std::unique_ptr<Request> request) {
    LaneState& lane_state = state(lane);
    {
        std::lock_guard lock(lane_state.mutex);
        if (device->abandoning.load()) {
            return give_up(*device, std::move(request));
        }
        std::unique_ptr<LaneBacklog>& slot = device->backlogs[static_cast<size_t>(lane)];
        if (!slot) {
            slot = std::make_unique<LaneBacklog>();
        }
        slot->waiting.push_back(std::move(request));
        if (slot->queued || slot->running >= lane_state.per_device) {
            return;
        }
        slot->queued = true;
        lane_state.runnable.push_back(std::move(device));
        if (lane_state.grows && lane_state.runnable.size() > lane_state.idle) {
            start_thread(lane);
        }
    }
    lane_state.work.notify_one();
}

void BlockingPool::abandon(Device& device) {
    device.abandoning.store(true);
    for (size_t lane = 0; lane < kLanes; ++lane) {
        std::deque<std::unique_ptr<Request>> waiting;
        {
            std::lock_guard lock(lanes_[lane].mutex);
            LaneBacklog* backlog = device.backlogs[lane].get();
            if (backlog == nullptr) {
                continue;
            }
            waiting.swap(backlog->waiting);
            if (backlog->queued) {
                backlog->queued = false;
                std::erase_if(lanes_[lane].runnable, [&](const std::shared_ptr<Device>& other) {
                    return other.get() == &device;
                });
            }
        }
        for (std::unique_ptr<Request>& request : waiting) {
            give_up(device, std::move(request));
        }
    }
}

void BlockingPool::give_up(Device& device, std::unique_ptr<Request> request) {
    request->abandoned = true;
    device.worker->complete(std::move(request));
}

void BlockingPool::run(Lane lane, Threads::iterator self) {
    LaneState& lane_state = state(lane);
    std::unique_lock lock(lane_state.mutex);
    while (true) {
        auto has_work = [&] { return lane_state.stop || !lane_state.runnable.empty(); };
        auto too_many = [&] {
            return lane_state.threads.size() - lane_state.ended.size() > lane_state.kept;
        };
        if (too_many() && !lane_state.work.wait_for(lock, kIdleThreadTime, has_work)) {
            if (too_many()) {
                --lane_state.idle;
                lane_state.ended.push_back(self);
                return;
            }
        }
        lane_state.work.wait(lock, has_work);
        if (lane_state.runnable.empty()) {
            return;
        }
        --lane_state.idle;
        std::shared_ptr<Device> device = std::move(lane_state.runnable.front());
        lane_state.runnable.pop_front();
        LaneBacklog& backlog = *device->backlogs[static_cast<size_t>(lane)];
        std::unique_ptr<Request> request = std::move(backlog.waiting.front());
        backlog.waiting.pop_front();
        ++backlog.running;
        auto queue_again = [&] {
            backlog.queued = !backlog.waiting.empty() && backlog.running < lane_state.per_device;
            if (backlog.queued) {
                lane_state.runnable.push_back(device);
                lane_state.work.notify_one();
            }
        };
        queue_again();
        lock.unlock();
        do_request(lane, device, std::move(request));
        lock.lock();
        --backlog.running;
        if (!backlog.queued) {
            queue_again();
        }
        ++lane_state.idle;
    }
}

void BlockingPool::do_request(Lane lane, const std::shared_ptr<Device>& device,
                              std::unique_ptr<Request> request) {
    IoMode mode = lane == Lane::kLarge ? IoMode::kNoWait : IoMode::kMayBlock;
    Result<void> result = perform(*device->disk, *request, mode, &device->abandoning);
    if (!result && result.error().code() == ErrorCode::kWouldBlock && mode == IoMode::kNoWait) {
        Lane next = waiting_lane(*request);
        submit(next, device, std::move(request));
        return;
    }
    if (!result && result.error().code() == ErrorCode::kCancelled && device->abandoning.load()) {
        return give_up(*device, std::move(request));
    }
    request->status = status_of(*device, *request, result);
    device->worker->complete(std::move(request));
}

Lane waiting_lane(const Request& request) {
    return request.kind == RequestKind::kRead ? Lane::kRead : Lane::kWrite;
}

uint8_t status_of(Device& device, const Request& request, const Result<void>& result) {
    if (result) {
        return kBlkStatusOk;
    }
    // A guest may repeat what fails as fast as it likes: log the 1st, 2nd, 4th, 8th, ...
    uint64_t failures = device.failures.fetch_add(1, std::memory_order_relaxed) + 1;
    if (std::has_single_bit(failures)) {
        device.log(LogLevel::kError,
                   fmt::format("{} of {} bytes at {} failed ({} failures so far): {}",
                               request_kind_name(request.kind), request.length_bytes,
                               request.offset_bytes, failures, result.error().message()));
    }
    int status = error_mapping(result.error().code()).virtio_blk_status;
    // Whatever the table says, a failure must not look like success.
    return status == kBlkStatusOk ? kBlkStatusIoError : static_cast<uint8_t>(status);
}

}  // namespace stellarium::vhost
