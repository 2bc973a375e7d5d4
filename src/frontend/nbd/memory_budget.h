// Bounds what clients have on its way: each has a reserve of its own, and all share the rest.
//
// Whoever holds nothing may always take up to kReservedBytes, so no client stops another one, and
// a client that is refused holds something itself: it goes on when that is given back.
//
// Thread rule: any thread; one client's `held` one thread at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "frontend/nbd/limits.h"

namespace stellarium::nbd {

class MemoryBudget {
  public:
    explicit MemoryBudget(uint64_t shared_bytes = kSharedBytes) : shared_bytes_(shared_bytes) {}

    /// Adds `bytes` to what a client holds; false when that would be too much now.
    bool take(uint64_t& held, uint64_t bytes) {
        if (held + bytes > kMaxClientBytes) {
            return false;
        }
        const uint64_t more = beyond(held + bytes) - beyond(held);
        uint64_t used = used_.load(std::memory_order_relaxed);
        while (more > 0) {
            if (used + more > shared_bytes_) {
                return false;
            }
            if (used_.compare_exchange_weak(used, used + more, std::memory_order_relaxed)) {
                break;
            }
        }
        held += bytes;
        return true;
    }
    void give(uint64_t& held, uint64_t bytes) {
        used_.fetch_sub(beyond(held) - beyond(held - bytes), std::memory_order_relaxed);
        held -= bytes;
    }
    uint64_t used() const { return used_.load(std::memory_order_relaxed); }

  private:
    static uint64_t beyond(uint64_t held) { return held - std::min(held, kReservedBytes); }

    const uint64_t shared_bytes_;
    std::atomic<uint64_t> used_{0};
};

}  // namespace stellarium::nbd
