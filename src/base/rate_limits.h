// How much a volume may ask of the disk: requests and bytes a second, each with a burst.
//
// A burst is what may be asked for at once after a rest; the rate holds on the average from then
// on.
//
// Thread rule: values.
//
//     STELLARIUM_ASSIGN(RateLimits limits, completed(RateLimits{.iops = 500}));
//     // limits.iops_burst is 500 now: one second's worth
#pragma once

#include <cstdint>
#include <string>

#include "base/error.h"
#include "base/units.h"

namespace stellarium {

inline constexpr uint64_t kMinIops = 1;
inline constexpr uint64_t kMaxIops = 100'000'000;
inline constexpr uint64_t kMinBandwidthBytes = 4 * kKiB;
inline constexpr uint64_t kMaxBandwidthBytes = kTiB;
/// A burst holds what the rate gives in 10 ms to an hour. With less, a data thread would have to
/// look at the rings more often than it does for the rate to be reached.
inline constexpr uint64_t kBurstsPerSecond = 100;
inline constexpr uint64_t kMaxBurstSeconds = 3600;

struct RateLimits {
    uint64_t iops = 0;                   ///< Requests a second, of every kind; 0: no limit.
    uint64_t iops_burst = 0;             ///< Requests; 0: one second's worth.
    uint64_t bandwidth_bytes = 0;        ///< Bytes read and written a second; 0: no limit.
    uint64_t bandwidth_burst_bytes = 0;  ///< 0: one second's worth.

    bool any() const { return iops != 0 || bandwidth_bytes != 0; }
    bool operator==(const RateLimits&) const = default;
};

/// With the bursts that were left out. kInvalidArgument for a rate or burst out of bounds, and for
/// a burst without its rate.
Result<RateLimits> completed(RateLimits limits);

/// "500 requests/s (burst 1000), 20 MiB/s (burst 20 MiB)"; "" when there are none.
std::string format_rate_limits(const RateLimits& limits);

}  // namespace stellarium
