#include "cli/interrupt.h"

#include <atomic>
#include <csignal>

#include <pthread.h>

namespace stellarium::cli {
namespace {

std::atomic<bool> interrupt_flag{false};
static_assert(std::atomic<bool>::is_always_lock_free);

pthread_t main_thread;

/// The system may choose any thread; only the main one waits in calls that should end.
void on_signal(int signal_number) {
    if (pthread_equal(pthread_self(), main_thread) == 0) {
        pthread_kill(main_thread, signal_number);
        return;
    }
    if (interrupt_flag.exchange(true, std::memory_order_relaxed)) {
        std::signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
}

}  // namespace

void install_interrupt_handler() {
    main_thread = pthread_self();
    struct sigaction action{};
    action.sa_handler = on_signal;
    for (const int signal_number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT}) {
        struct sigaction before{};
        sigaction(signal_number, nullptr, &before);
        if (before.sa_handler != SIG_IGN) {  // Under nohup, and in a shell's background.
            sigaction(signal_number, &action, nullptr);
        }
    }
    // Writing to a closed pipe, or past a file size limit, is an error like any other.
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
}

bool interrupted() {
    return interrupt_flag.load(std::memory_order_relaxed);
}

Result<void> check_interrupt() {
    if (interrupted()) {
        return fail(ErrorCode::kCancelled, "interrupted");
    }
    return {};
}

}  // namespace stellarium::cli
