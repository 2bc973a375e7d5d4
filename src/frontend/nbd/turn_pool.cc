#include "frontend/nbd/turn_pool.h"

#include <chrono>
#include <system_error>
#include <utility>

#include <pthread.h>

namespace stellarium::nbd {

namespace {
/// How long a thread that was added waits for work before it ends.
constexpr std::chrono::seconds kIdleThreadTime{1};
}  // namespace

TurnPool::TurnPool(std::string name, Options options) : name_(std::move(name)), options_(options) {
    const std::lock_guard lock(mutex_);
    for (unsigned i = 0; i < options_.threads; ++i) {
        start_thread();
    }
}

TurnPool::~TurnPool() {
    stop();
}

void TurnPool::stop() {
    Threads threads;
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    {
        // None is added any more.
        const std::lock_guard lock(mutex_);
        ended_.clear();
        threads.splice(threads.end(), threads_);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

void TurnPool::start_thread() {
    for (const Threads::iterator ended : std::exchange(ended_, {})) {
        ended->join();
        threads_.erase(ended);
    }
    const auto self = threads_.emplace(threads_.end());
    try {
        *self = std::thread([this, self] { run(self); });
        pthread_setname_np(self->native_handle(), name_.c_str());
        ++idle_;
    } catch (const std::system_error&) {
        // The system has no more threads: those that there are will do it, later.
        threads_.erase(self);
    }
}

void TurnPool::queue(const std::shared_ptr<Turns>& owner) {
    if (!owner->queued_ && !owner->waiting_.empty() && owner->running_ < options_.at_once) {
        owner->queued_ = true;
        runnable_.push_back(owner);
        work_.notify_one();
    }
}

void TurnPool::submit(const std::shared_ptr<Turns>& owner, Work work) {
    const std::lock_guard lock(mutex_);
    owner->waiting_.push_back(std::move(work));
    queue(owner);
    if (options_.grows && !stop_ && runnable_.size() > idle_) {
        start_thread();
    }
}

void TurnPool::run(Threads::iterator self) {
    std::unique_lock lock(mutex_);
    const auto has_work = [&] { return stop_ || !runnable_.empty(); };
    while (true) {
        const auto too_many = [&] { return threads_.size() - ended_.size() > options_.threads; };
        if (!stop_ && too_many() && !work_.wait_for(lock, kIdleThreadTime, has_work) &&
            too_many()) {
            --idle_;
            ended_.push_back(self);
            return;
        }
        work_.wait(lock, has_work);
        if (runnable_.empty()) {
            --idle_;
            return;
        }
        --idle_;
        const std::shared_ptr<Turns> owner = std::move(runnable_.front());
        runnable_.pop_front();
        owner->queued_ = false;
        Work work = std::move(owner->waiting_.front());
        owner->waiting_.pop_front();
        ++owner->running_;
        queue(owner);
        lock.unlock();
        work();
        work = nullptr;  // What it owns may wait, too.
        lock.lock();
        --owner->running_;
        queue(owner);
        ++idle_;
    }
}

}  // namespace stellarium::nbd
