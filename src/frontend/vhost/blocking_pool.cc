#include "frontend/vhost/blocking_pool.h"

#include <algorithm>
#include <bit>

#include <fmt/core.h>
#include <pthread.h>
#include <signal.h>

namespace stellarium::vhost {

BlockingPool::BlockingPool(unsigned threads) {
    threads = std::max(threads, 1U);
    state(Lane::kRead).per_device = std::max(threads / 2, 1U);
    const std::array<unsigned, kLanes> counts = {threads, threads, 1};
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    for (int synchronous : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT}) {
        ::sigdelset(&all, synchronous);
    }
    ::pthread_sigmask(SIG_BLOCK, &all, &before);
    for (size_t lane = 0; lane < kLanes; ++lane) {
        for (unsigned i = 0; i < counts[lane]; ++i) {
            threads_.emplace_back([this, lane] { run(static_cast<Lane>(lane)); });
            ::pthread_setname_np(threads_.back().native_handle(), "vhost-blocking");
        }
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

BlockingPool::~BlockingPool() {
    for (LaneState& lane : lanes_) {
        {
            std::lock_guard lock(lane.mutex);
            lane.stop = true;
        }
        lane.work.notify_all();
    }
    for (std::thread& thread : threads_) {
        thread.join();
    }
}

void BlockingPool::submit(Lane lane, std::shared_ptr<Device> device,
                          std::unique_ptr<Request> request) {
    LaneState& lane_state = state(lane);
    {
        std::lock_guard lock(lane_state.mutex);
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
    }
    lane_state.work.notify_one();
}

void BlockingPool::run(Lane lane) {
    LaneState& lane_state = state(lane);
    std::unique_lock lock(lane_state.mutex);
    while (true) {
        lane_state.work.wait(lock, [&] { return lane_state.stop || !lane_state.runnable.empty(); });
        if (lane_state.runnable.empty()) {
            return;
        }
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
    }
}

void BlockingPool::do_request(Lane lane, const std::shared_ptr<Device>& device,
                              std::unique_ptr<Request> request) {
    IoMode mode = lane == Lane::kLarge ? IoMode::kNoWait : IoMode::kMayBlock;
    Result<void> result = perform(*device->disk, *request, mode);
    if (!result && result.error().code() == ErrorCode::kWouldBlock && mode == IoMode::kNoWait) {
        Lane next = waiting_lane(*request);
        submit(next, device, std::move(request));
        return;
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
