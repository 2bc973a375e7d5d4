// Threads for the requests that a device could not do without waiting.
//
// Three lanes, each with threads of its own:
//   - reads: a page that is not in memory; the disk answers soon, so several of a device may run;
//   - writes, discards, write-zeroes: they wait for the device's buffer space, perhaps for long.
//     One of each device at a time: more of them would only wait for the same space;
//   - large transfers: long copies that do not wait. They are tried without waiting, and go to one
//     of the other lanes when they would wait after all.
// Within a lane the devices take turns. So a stalled device holds at most one thread of the write
// lane, and a healthy device, whose writes do not wait, does not need that lane.
//
// Thread rule: submit() from any thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "frontend/vhost/device.h"
#include "frontend/vhost/request.h"

namespace stellarium::vhost {

class BlockingPool {
  public:
    explicit BlockingPool(unsigned threads);
    /// Nothing may be waiting any more. Joins the threads.
    ~BlockingPool();
    BlockingPool(const BlockingPool&) = delete;
    BlockingPool& operator=(const BlockingPool&) = delete;

    /// Does the request on a thread and hands it to its device's worker.
    void submit(Lane lane, std::shared_ptr<Device> device, std::unique_ptr<Request> request);

  private:
    struct LaneState {
        std::mutex mutex;
        std::condition_variable work;
        std::deque<std::shared_ptr<Device>> runnable;
        unsigned per_device = 1;
        bool stop = false;
    };

    void run(Lane lane);
    void do_request(Lane lane, const std::shared_ptr<Device>& device,
                    std::unique_ptr<Request> request);
    LaneState& state(Lane lane) { return lanes_[static_cast<size_t>(lane)]; }

    std::array<LaneState, kLanes> lanes_;
    std::vector<std::thread> threads_;
};

/// The lane where a request may wait.
Lane waiting_lane(const Request& request);

/// Translates a device's answer into a virtio status, logging what the guest cannot see.
uint8_t status_of(Device& device, const Request& request, const Result<void>& result);

}  // namespace stellarium::vhost
