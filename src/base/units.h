// Sizes and times as people write them: "10GiB", "512", "1.5 GiB", "4KB"; "30d", "90s".
//
// Thread rule: pure functions.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"

namespace stellarium {

inline constexpr uint64_t kKiB = uint64_t{1} << 10;
inline constexpr uint64_t kMiB = uint64_t{1} << 20;
inline constexpr uint64_t kGiB = uint64_t{1} << 30;
inline constexpr uint64_t kTiB = uint64_t{1} << 40;

/// Parses a size in bytes. Binary units (K, KiB, M, MiB, ... P, PiB) are powers of 1024, decimal
/// ones (KB, MB, ...) powers of 1000; a bare number is bytes; a fraction must come out as whole
/// bytes. Errors: kInvalidArgument with an example of what is accepted.
Result<uint64_t> parse_size(std::string_view text);

/// Parses a time: a whole number and s, m, h or d, such as "90s", "12h" or "30d"; or "0".
/// kInvalidArgument with an example of what is accepted.
Result<std::chrono::seconds> parse_duration(std::string_view text);

/// "1.5 GiB": three significant digits, binary units, exact below 1 KiB.
std::string format_size(uint64_t bytes);

}  // namespace stellarium
