#include "base/units.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <string>

#include <fmt/format.h>

namespace stellarium {
namespace {

constexpr std::string_view kPrefixes = "KMGTP";

/// The multiplier of a unit's text ("", "B", "K", "KiB", "KB", ...), or 0 when it is none.
uint64_t multiplier_of(std::string_view unit) {
    std::string upper;
    std::ranges::transform(unit, std::back_inserter(upper),
                           [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    if (upper.empty() || upper == "B") {
        return 1;
    }
    const size_t power = kPrefixes.find(upper[0]);
    if (power == std::string_view::npos) {
        return 0;
    }
    const std::string_view rest = std::string_view(upper).substr(1);
    uint64_t base = 1024;
    if (rest == "B") {
        base = 1000;
    } else if (!rest.empty() && rest != "IB") {
        return 0;
    }
    uint64_t result = 1;
    for (size_t i = 0; i <= power; ++i) {
        result *= base;
    }
    return result;
}

std::unexpected<Error> bad_size(std::string_view text, std::string_view why) {
    return fail(
        ErrorCode::kInvalidArgument,
        fmt::format("'{}' is not a size: {} (write for example 512, 64KiB, 10GiB)", text, why));
}

}  // namespace

Result<uint64_t> parse_size(std::string_view text) {
    size_t digits = 0;
    while (digits < text.size() &&
           (std::isdigit(static_cast<unsigned char>(text[digits])) != 0 || text[digits] == '.')) {
        ++digits;
    }
    const std::string_view number = text.substr(0, digits);
    std::string_view unit = text.substr(digits);
    while (!unit.empty() && unit.front() == ' ') {
        unit.remove_prefix(1);
    }
    if (number.empty()) {
        return bad_size(text, "it must start with a number");
    }
    const uint64_t multiplier = multiplier_of(unit);
    if (multiplier == 0) {
        return bad_size(text, "unknown unit");
    }
    uint64_t whole = 0;
    auto [end, code] = std::from_chars(number.begin(), number.end(), whole);
    if (code == std::errc::result_out_of_range) {
        return bad_size(text, "it is too large");
    }
    if (end == number.end() && code == std::errc()) {
        uint64_t bytes = 0;
        if (__builtin_mul_overflow(whole, multiplier, &bytes)) {
            return bad_size(text, "it is too large");
        }
        return bytes;
    }
    double fraction = 0;
    auto [fraction_end, fraction_code] = std::from_chars(number.begin(), number.end(), fraction);
    if (fraction_end != number.end() || fraction_code != std::errc()) {
        return bad_size(text, "the number is malformed");
    }
    const double bytes = fraction * static_cast<double>(multiplier);
    if (bytes >= 0x1p63) {
        return bad_size(text, "it is too large");
    }
    if (bytes != std::floor(bytes)) {
        return bad_size(text, "it is not a whole number of bytes");
    }
    return static_cast<uint64_t>(bytes);
}

Result<std::chrono::seconds> parse_duration(std::string_view text) {
    const auto bad = [text](std::string_view why) {
        return fail(
            ErrorCode::kInvalidArgument,
            fmt::format("'{}' is not a time: {} (write for example 90s, 12h, 30d)", text, why));
    };
    constexpr uint64_t kMaxSeconds = uint64_t{100} * 365 * 86'400;
    uint64_t number = 0;
    const auto [end, code] = std::from_chars(text.begin(), text.end(), number);
    if (end == text.begin()) {
        return bad("it must start with a whole number");
    }
    const std::string_view unit(end, text.end());
    uint64_t seconds = 0;
    if (unit == "s") {
        seconds = 1;
    } else if (unit == "m") {
        seconds = 60;
    } else if (unit == "h") {
        seconds = 3600;
    } else if (unit == "d") {
        seconds = 86'400;
    } else if (!unit.empty() || number != 0) {
        return bad("it must end in s, m, h or d");
    }
    if (code != std::errc() || (seconds != 0 && number > kMaxSeconds / seconds)) {
        return bad("it is more than 100 years");
    }
    return std::chrono::seconds(number * seconds);
}

std::string format_size(uint64_t bytes) {
    static constexpr std::array<std::string_view, 6> kNames{"KiB", "MiB", "GiB",
                                                            "TiB", "PiB", "EiB"};
    if (bytes < kKiB) {
        return fmt::format("{} B", bytes);
    }
    double value = static_cast<double>(bytes) / 1024;
    size_t unit = 0;
    // 1023.5 would be rounded up to "1024 KiB".
    while (value >= 1023.5 && unit + 1 < kNames.size()) {
        value /= 1024;
        ++unit;
    }
    const int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
    return fmt::format("{:.{}f} {}", value, decimals, kNames[unit]);
}

}  // namespace stellarium
