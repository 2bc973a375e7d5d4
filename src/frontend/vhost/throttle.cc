#include "frontend/vhost/throttle.h"

#include <algorithm>

#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

namespace {

/// A burst of an hour times nanoseconds does not fit into 64 bits.
__extension__ using Uint128 = unsigned __int128;

constexpr uint64_t kSecondNs = 1'000'000'000;

// The fullest bucket, and the deepest debt, are far from the ends of int64_t.
static_assert(kMaxBandwidthBytes * kMaxBurstSeconds < uint64_t{1} << 62);
static_assert(kMaxRequestBytes < uint64_t{1} << 62);

}  // namespace

void TokenBucket::set(uint64_t tokens_per_second, uint64_t burst, uint64_t now_ns) {
    if (rate_ == 0) {
        tokens_ = static_cast<int64_t>(burst);
        fraction_ = 0;
        filled_at_ns_ = now_ns;
    } else {
        fill(now_ns);
    }
    rate_ = tokens_per_second;
    burst_ = static_cast<int64_t>(burst);
    if (tokens_ >= burst_) {
        tokens_ = burst_;
        fraction_ = 0;
    }
}

void TokenBucket::fill(uint64_t now_ns) {
    if (now_ns <= filled_at_ns_) {
        return;
    }
    const Uint128 gained = Uint128{now_ns - filled_at_ns_} * rate_ + fraction_;
    filled_at_ns_ = now_ns;
    const auto room = static_cast<uint64_t>(burst_ - tokens_);
    if (gained / kSecondNs >= room) {
        tokens_ = burst_;
        fraction_ = 0;
        return;
    }
    tokens_ += static_cast<int64_t>(gained / kSecondNs);
    fraction_ = static_cast<uint64_t>(gained % kSecondNs);
}

bool TokenBucket::ready(uint64_t now_ns) {
    if (rate_ == 0) {
        return true;
    }
    fill(now_ns);
    return tokens_ > 0;
}

void TokenBucket::charge(uint64_t tokens) {
    if (rate_ != 0) {
        tokens_ -= static_cast<int64_t>(tokens);
    }
}

uint64_t TokenBucket::ready_at() const {
    if (rate_ == 0 || tokens_ > 0) {
        return filled_at_ns_;
    }
    const Uint128 missing = Uint128{static_cast<uint64_t>(1 - tokens_)} * kSecondNs - fraction_;
    return filled_at_ns_ + static_cast<uint64_t>((missing + rate_ - 1) / rate_);
}

void Throttle::set(const RateLimits& limits, uint64_t now_ns) {
    requests_.set(limits.iops, limits.iops_burst, now_ns);
    bytes_.set(limits.bandwidth_bytes, limits.bandwidth_burst_bytes, now_ns);
}

bool Throttle::admits(uint64_t now_ns) {
    // Both, so that both know the time.
    const bool request = requests_.ready(now_ns);
    const bool bytes = bytes_.ready(now_ns);
    return request && bytes;
}

void Throttle::charge(uint64_t data_bytes) {
    requests_.charge(1);
    bytes_.charge(data_bytes);
}

uint64_t Throttle::admits_at() const {
    return std::max(requests_.ready_at(), bytes_.ready_at());
}

}  // namespace stellarium::vhost
