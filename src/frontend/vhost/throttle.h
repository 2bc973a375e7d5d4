// Whether a device may take its next request: token buckets for requests and for bytes.
//
// A bucket fills at its rate up to its burst. A request is taken when every bucket holds at least
// one token, and then costs one of the requests' and one for each of its bytes, if need be on
// credit: a request longer than the burst passes, and what follows it waits until its debt is paid.
// So a request is never taken and then kept waiting: what has to wait stays in the guest's ring,
// where a lost connection, a stopped ring or the next daemon finds it like any other.
//
// Time is given by the caller, in nanoseconds of a clock that does not go back; all arithmetic is
// in whole numbers, so that a bucket is ready at the very nanosecond that it names.
//
// Thread rule: one thread at a time.
//
//     Throttle throttle;
//     throttle.set({.iops = 100, .iops_burst = 100}, now);
//     if (throttle.admits(now)) { throttle.charge(4096); } else { wait until throttle.admits_at() }
#pragma once

#include <cstdint>

#include "base/rate_limits.h"

namespace stellarium::vhost {

class TokenBucket {
  public:
    /// A rate of 0 is no limit. A bucket that had none before is full; else it keeps what it holds,
    /// within the new burst, and what it owes.
    void set(uint64_t tokens_per_second, uint64_t burst, uint64_t now_ns);
    bool limited() const { return rate_ != 0; }
    /// Holds a token, or has no limit.
    bool ready(uint64_t now_ns);
    /// Takes tokens, also those that it does not hold.
    void charge(uint64_t tokens);
    /// When it is ready, as of the last time it was asked.
    uint64_t ready_at() const;

  private:
    void fill(uint64_t now_ns);

    uint64_t rate_ = 0;
    int64_t burst_ = 0;
    int64_t tokens_ = 0;
    uint64_t fraction_ = 0;  ///< Of a token, in 1e-9.
    uint64_t filled_at_ns_ = 0;
};

class Throttle {
  public:
    /// Takes what completed() gave.
    void set(const RateLimits& limits, uint64_t now_ns);
    bool limited() const { return requests_.limited() || bytes_.limited(); }
    bool admits(uint64_t now_ns);
    /// For each request that was admitted. `data_bytes`: what it reads or writes.
    void charge(uint64_t data_bytes);
    /// When the next request is admitted, as of the last time that admits() said no.
    uint64_t admits_at() const;

  private:
    TokenBucket requests_;
    TokenBucket bytes_;
};

}  // namespace stellarium::vhost
