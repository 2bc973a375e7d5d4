// What is said to be damaged of a volume, as the pages that cannot be read; for tests.
#pragma once

#include <cstdint>
#include <map>

#include <gtest/gtest.h>

#include "nova/limits.h"
#include "nova/pool.h"

namespace stellarium::nova::testing {

/// What the ranges say, page by page.
inline std::map<uint64_t, ChunkId> pages_of(const BadRanges& bad, uint64_t size_bytes) {
    std::map<uint64_t, ChunkId> pages;
    uint64_t end = 0;
    for (const BadRange& range : bad.ranges) {
        EXPECT_GE(range.offset_bytes, end);
        EXPECT_EQ(range.offset_bytes % kPageBytes, 0U);
        EXPECT_GT(range.length_bytes, 0U);
        end = range.offset_bytes + range.length_bytes;
        EXPECT_LE(end, size_bytes);
        for (uint64_t at = range.offset_bytes; at < end; at += kPageBytes) {
            pages[at / kPageBytes] = range.cause;
        }
    }
    return pages;
}

}  // namespace stellarium::nova::testing
