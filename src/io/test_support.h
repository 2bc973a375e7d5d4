// What the tests of src/io share.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "io/io.h"

namespace stellarium::io {

/// `size` bytes that are the same for the same tag, and unlike those of another.
inline std::vector<std::byte> pattern(size_t size, uint64_t tag) {
    std::vector<std::byte> bytes(size);
    uint64_t x = (tag + 1) * 0x9E3779B97F4A7C15U;
    for (std::byte& byte : bytes) {
        x = x * 6364136223846793005U + 1442695040888963407U;
        byte = static_cast<std::byte>(x >> 56U);
    }
    return bytes;
}

inline std::vector<std::byte> filled(size_t size, uint8_t value) {
    return std::vector<std::byte>(size, std::byte{value});
}

/// The whole file; an empty one and a failing test when it cannot be read.
inline std::vector<std::byte> contents(File& file) {
    const auto size = file.size_bytes();
    EXPECT_TRUE(size) << size.error().message();
    std::vector<std::byte> bytes(size.value_or(0));
    const auto read = read_exact(file, bytes, 0);
    EXPECT_TRUE(read) << read.error().message();
    return bytes;
}

}  // namespace stellarium::io

/// Passes when a Result holds a value, or says why it does not.
#define STELLARIUM_EXPECT_OK(expr)                                      \
    do {                                                                \
        const auto& stellarium_expected_ = (expr);                      \
        EXPECT_TRUE(stellarium_expected_.has_value())                   \
            << #expr << ": " << stellarium_expected_.error().message(); \
    } while (false)
#define STELLARIUM_ASSERT_OK(expr)                                      \
    do {                                                                \
        const auto& stellarium_expected_ = (expr);                      \
        ASSERT_TRUE(stellarium_expected_.has_value())                   \
            << #expr << ": " << stellarium_expected_.error().message(); \
    } while (false)
/// Passes when a Result holds this error.
#define STELLARIUM_EXPECT_FAILS(expr, expected_code)                             \
    do {                                                                         \
        const auto& stellarium_expected_ = (expr);                               \
        ASSERT_FALSE(stellarium_expected_.has_value()) << #expr << " succeeded"; \
        EXPECT_EQ(stellarium_expected_.error().code(), expected_code)            \
            << stellarium_expected_.error().message();                           \
    } while (false)
