// Threads for the requests that a device could not do without waiting.
//
// Three lanes, each with threads of its own:
//   - reads: a page that is not in memory; the disk answers soon, so several of a device may run;
//   - writes, discards, write-zeroes: they wait for the device's buffer space, perhaps for long.
//     One of each device at a time: more of them would only wait for the same space. When all
//     threads of the lane are taken it gets another one, so however many devices are stalled, a
//     healthy one finds a thread; it ends when it has nothing to do. So there are never more than
//     attached devices, but for the first ones;
//   - large transfers: long copies that do not wait. They are tried without waiting, and go to one
//     of the other lanes when they would wait after all.
// Within a lane the devices take turns.
//
// Thread rule: submit() from any thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <list>
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
    /// Gives up the requests of a device that have not begun, now and until its `abandoning` is
    /// false again: its worker gets them back with `abandoned` set.
    void abandon(Device& device);

  private:
    using Threads = std::list<std::thread>;
    struct LaneState {
        std::mutex mutex;  ///< Guards what may change of the rest.
        Threads threads;
        std::vector<Threads::iterator> ended;  ///< To be joined.
        size_t idle = 0;                       ///< Threads that wait, or are on their way to it.
        size_t kept = 0;                       ///< As many threads never end.
        bool grows = false;                    ///< When all threads are busy.
        std::condition_variable work;
        std::deque<std::shared_ptr<Device>> runnable;
        unsigned per_device = 1;
        bool stop = false;
    };

    void run(Lane lane, Threads::iterator self);
    /// With the lane's mutex held.
    void start_thread(Lane lane);
    static void give_up(Device& device, std::unique_ptr<Request> request);
    void do_request(Lane lane, const std::shared_ptr<Device>& device,
                    std::unique_ptr<Request> request);
    LaneState& state(Lane lane) { return lanes_[static_cast<size_t>(lane)]; }

    std::array<LaneState, kLanes> lanes_;
};

/// The lane where a request may wait.
Lane waiting_lane(const Request& request);

/// Translates a device's answer into a virtio status, logging what the guest cannot see.
uint8_t status_of(Device& device, const Request& request, const Result<void>& result);

}  // namespace stellarium::vhost
