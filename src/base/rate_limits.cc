#include "base/rate_limits.h"

#include <string_view>

#include <fmt/format.h>

namespace stellarium {
namespace {

using Format = std::string (*)(uint64_t);

std::string plain(uint64_t value) {
    return fmt::format("{}", value);
}

/// Checks a rate with its burst, which it fills in.
Result<void> complete_one(std::string_view name, Format format, uint64_t least, uint64_t most,
                          uint64_t rate, uint64_t& burst) {
    const auto refuse = [](std::string message) {
        return fail(ErrorCode::kInvalidArgument, std::move(message));
    };
    if (rate == 0) {
        if (burst != 0) {
            return refuse(fmt::format("a burst of {0} needs a limit of {0} too", name));
        }
        return {};
    }
    if (rate < least || rate > most) {
        return refuse(fmt::format("a limit of {} is from {} to {} a second, and not {}", name,
                                  format(least), format(most), format(rate)));
    }
    if (burst == 0) {
        burst = rate;
    }
    const uint64_t least_burst = (rate + kBurstsPerSecond - 1) / kBurstsPerSecond;
    const uint64_t most_burst = rate * kMaxBurstSeconds;
    if (burst < least_burst || burst > most_burst) {
        return refuse(fmt::format(
            "with a limit of {0} a second the burst of {1} is from {2} to {3}, "
            "which is 10 ms to an hour of it, and not {4}",
            format(rate), name, format(least_burst), format(most_burst), format(burst)));
    }
    return {};
}

}  // namespace

Result<RateLimits> completed(RateLimits limits) {
    STELLARIUM_TRY(
        complete_one("requests", plain, kMinIops, kMaxIops, limits.iops, limits.iops_burst));
    STELLARIUM_TRY(complete_one("bandwidth", format_size, kMinBandwidthBytes, kMaxBandwidthBytes,
                                limits.bandwidth_bytes, limits.bandwidth_burst_bytes));
    return limits;
}

std::string format_rate_limits(const RateLimits& limits) {
    std::string text;
    if (limits.iops != 0) {
        text = fmt::format("{} requests/s (burst {})", limits.iops, limits.iops_burst);
    }
    if (limits.bandwidth_bytes != 0) {
        text += fmt::format("{}{}/s (burst {})", text.empty() ? "" : ", ",
                            format_size(limits.bandwidth_bytes),
                            format_size(limits.bandwidth_burst_bytes));
    }
    return text;
}

}  // namespace stellarium
