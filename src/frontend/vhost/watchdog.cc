#include "frontend/vhost/watchdog.h"

#include <chrono>
#include <mutex>

#include <pthread.h>

#include "frontend/vhost/limits.h"
#include "frontend/vhost/worker.h"

namespace stellarium::vhost {

namespace {

/// Without SA_RESTART, so that the interrupted call returns.
void install_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_handler = [](int) {};
        ::sigemptyset(&action.sa_mask);
        ::sigaction(kWatchdogSignal, &action, nullptr);
    });
}

}  // namespace

Watchdog::Watchdog(std::vector<Worker*> workers) : workers_(std::move(workers)) {
    install_handler();
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, &before);
    thread_ = std::thread([this] { run(); });
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ::pthread_setname_np(thread_.native_handle(), "vhost-watchdog");
}

Watchdog::~Watchdog() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    stopping_.notify_all();
    thread_.join();
}

void Watchdog::run() {
    std::unique_lock lock(mutex_);
    while (
        !stopping_.wait_for(lock, std::chrono::milliseconds(kWatchdogMs), [&] { return stop_; })) {
        for (Worker* worker : workers_) {
            worker->interrupt_if_stuck();
        }
    }
}

}  // namespace stellarium::vhost
