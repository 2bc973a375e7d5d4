// Bounds what clients have on its way: each has a reserve of its own, and all share the rest.
//
// Whoever holds nothing may always take up to kReservedBytes, so no client stops another one, and
// a client that is refused holds something itself: it goes on when that is given back.
//
// Thread rule: any thread; one client's `held` one thread at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/budget.h"
#include "frontend/nbd/limits.h"

namespace stellarium::nbd {

class MemoryBudget {
  public:
    explicit MemoryBudget(uint64_t shared_bytes = kSharedBytes) : shared_(shared_bytes) {}

    /// Adds `bytes` to what a client holds; false when that would be too much now.
    bool take(uint64_t& held, uint64_t bytes) {
        if (held + bytes > kMaxClientBytes) {
            return false;
        }
        if (!shared_.take(beyond(held + bytes) - beyond(held))) {
            return false;
        }
        held += bytes;
        return true;
    }
    void give(uint64_t& held, uint64_t bytes) {
        shared_.give_back(beyond(held) - beyond(held - bytes));
        held -= bytes;
    }
    uint64_t used() const { return shared_.taken(); }

  private:
    static uint64_t beyond(uint64_t held) { return held - std::min(held, kReservedBytes); }

    Budget shared_;
};

}  // namespace stellarium::nbd
