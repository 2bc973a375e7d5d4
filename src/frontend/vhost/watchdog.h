// Frees a data thread from a front-end that makes it wait.
//
// A data thread waits for nothing but events, with one exception that it cannot rule out: the write
// that signals a call eventfd. The descriptor is made non-blocking when it arrives, but the file is
// shared with the front-end, which may undo that and fill the counter at the wrong moment. (Sockets
// have MSG_DONTWAIT for this; eventfds have nothing like it.) So a thread of its own looks at the
// data threads now and then, and sends a signal to one that has not come back from such a write.
// The write then fails with EINTR, and that front-end is disconnected.
//
// Thread rule: made and destroyed by one thread; the workers outlive it.
#pragma once

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <thread>
#include <vector>

namespace stellarium::vhost {

class Worker;

/// Does nothing to a process that does not ask for it, and is not used by anything else here.
inline constexpr int kWatchdogSignal = SIGURG;

class Watchdog {
  public:
    explicit Watchdog(std::vector<Worker*> workers);
    ~Watchdog();
    Watchdog(const Watchdog&) = delete;
    Watchdog& operator=(const Watchdog&) = delete;

  private:
    void run();

    std::vector<Worker*> workers_;
    std::mutex mutex_;
    std::condition_variable stopping_;
    bool stop_ = false;
    std::thread thread_;
};

}  // namespace stellarium::vhost
