// Threads for what may wait, in turns between those that it is done for.
//
//     TurnPool pool("nbd-read", {.threads = 8, .at_once = 6});
//     auto turns = std::make_shared<TurnPool::Turns>();     // one for each export
//     pool.submit(turns, [] { ... });
//
// At most `at_once` of one owner's work runs at the same time, and owners with work take turns, so
// that one whose work waits for long does not hold up another. A pool that `grows` gets one more
// thread when all are taken, so a healthy owner always finds one; such a thread ends when it has
// had nothing to do for a second.
//
// Thread rule: submit() from any thread. Work must not throw.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace stellarium::nbd {

class TurnPool {
  public:
    using Work = std::move_only_function<void()>;
    /// The work of one owner. Belongs to the pool that it is given to.
    class Turns {
        friend class TurnPool;
        std::deque<Work> waiting_;
        unsigned running_ = 0;
        bool queued_ = false;
    };
    struct Options {
        unsigned threads = 1;
        unsigned at_once = 1;
        bool grows = false;
    };

    TurnPool(std::string name, Options options);
    ~TurnPool();  ///< stop().
    TurnPool(const TurnPool&) = delete;
    TurnPool& operator=(const TurnPool&) = delete;

    void submit(const std::shared_ptr<Turns>& owner, Work work);
    /// Does what was submitted, and joins the threads. Nothing may be submitted afterwards.
    void stop();

  private:
    using Threads = std::list<std::thread>;
    void start_thread();  ///< mutex_ is held.
    void run(Threads::iterator self);
    void queue(const std::shared_ptr<Turns>& owner);  ///< mutex_ is held.

    const std::string name_;
    const Options options_;
    std::mutex mutex_;  ///< Guards the rest, and all Turns.
    std::condition_variable work_;
    std::deque<std::shared_ptr<Turns>> runnable_;
    Threads threads_;
    std::vector<Threads::iterator> ended_;  ///< To be joined.
    size_t idle_ = 0;
    bool stop_ = false;
};

}  // namespace stellarium::nbd
