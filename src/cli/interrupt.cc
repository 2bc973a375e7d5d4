#include "cli/interrupt.h"

#include <atomic>
#include <csignal>

namespace stellarium::cli {
namespace {

std::atomic<bool> interrupt_flag{false};
static_assert(std::atomic<bool>::is_always_lock_free);

void on_signal(int) {
    interrupt_flag.store(true, std::memory_order_relaxed);
}

}  // namespace

void install_interrupt_handler() {
    struct sigaction action{};
    action.sa_handler = on_signal;
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
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
