// How much the heavy tests do, and from which seed: for tests only.
//
//     for (uint64_t i = 0; i < scaled(60, 6); ++i) run(first_seed() + i);
//
// STELLARIUM_TEST_SEED sets the first seed (a failing test prints the one to give),
// STELLARIUM_TEST_SCALE multiplies what is done (make crash), and STELLARIUM_TEST_SANITIZER, set by
// scripts/run-tests.sh, asks for less, because a sanitizer makes everything ten times as slow.
//
// Thread rule: any thread, as long as none changes the environment.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace stellarium {

inline uint64_t number_from_environment(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): no thread sets it.
    return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

inline uint64_t first_seed(uint64_t otherwise = 1) {
    return number_from_environment("STELLARIUM_TEST_SEED", otherwise);
}

inline bool under_sanitizer() {
    // NOLINTNEXTLINE(concurrency-mt-unsafe): no thread sets it.
    return std::getenv("STELLARIUM_TEST_SANITIZER") != nullptr;
}

/// `usual`, or `if_slow` under a sanitizer, times the scale asked for.
inline uint64_t scaled(uint64_t usual, uint64_t if_slow) {
    return (under_sanitizer() ? if_slow : usual) *
           number_from_environment("STELLARIUM_TEST_SCALE", 1);
}

}  // namespace stellarium
