#include <fmt/format.h>
#include <gtest/gtest.h>

#include "nova/testing/page_model.h"
#include "nova/tree.h"

namespace stellarium::nova {
namespace {

using testing::extents_of;
using testing::imaginary_chunks;
using testing::overlay_maps;
using testing::PageMap;
using testing::RandomMaps;

TEST(Extents, OverlayAndTruncateAgreeWithPlainArrays) {
    const std::vector<Extent> chunks = imaginary_chunks(24);
    for (uint64_t seed = 1; seed <= 1500; ++seed) {
        SCOPED_TRACE(fmt::format("seed {}", seed));
        RandomMaps maps(seed, chunks);
        const PageMap below = maps.map(maps.below(60), maps.below(2) == 0);
        const PageMap top = maps.map(maps.below(60), true);
        for (const bool keep_holes : {false, true}) {
            const Extents expected = extents_of(overlay_maps(below, top, keep_holes), chunks);
            const Extents actual =
                overlay(extents_of(below, chunks), extents_of(top, chunks), keep_holes);
            ASSERT_TRUE(is_canonical(actual, keep_holes));
            ASSERT_TRUE(same_content(expected, actual));
            for (const Extent& extent : actual) {
                ASSERT_EQ(extent.chunk_address.has_value(), !extent.hole);
            }
        }
        const auto end = static_cast<uint32_t>(maps.below(kPagesPerLeaf + 1));
        PageMap cut = top;
        RandomMaps::fill(cut, end, kPagesPerLeaf, {});
        Extents extents = extents_of(top, chunks);
        truncate(extents, end);
        ASSERT_TRUE(same_content(extents_of(cut, chunks), extents));
        if (::testing::Test::HasFatalFailure()) {
            return;
        }
    }
}

TEST(Extents, OverlayIsAssociative) {
    // A delta over a delta over a leaf reads the same in whichever order they are merged: what
    // makes folding invisible.
    const std::vector<Extent> chunks = imaginary_chunks(8);
    for (uint64_t seed = 1; seed <= 300; ++seed) {
        RandomMaps maps(seed, chunks);
        const Extents leaf = extents_of(maps.map(30, false), chunks);
        const Extents older = extents_of(maps.map(20, true), chunks);
        const Extents newer = extents_of(maps.map(20, true), chunks);
        ASSERT_TRUE(same_content(overlay(overlay(leaf, older, false), newer, false),
                                 overlay(leaf, overlay(older, newer, true), false)))
            << "seed " << seed;
    }
}

TEST(Extents, NeighboursThatContinueAChunkMerge) {
    const Extent chunk = imaginary_chunks(16)[15];
    ASSERT_EQ(chunk.pages, 16);
    Extent first = chunk.slice(0, 5);
    Extent second = chunk.slice(5, 16);
    Extents merged{first};
    append_merged(merged, second);
    ASSERT_EQ(merged.size(), 1U);
    EXPECT_TRUE(merged[0].same_content(chunk));

    // The same pages of the chunk again, or a gap between them, do not continue it.
    Extent repeated = second;
    repeated.first_in_chunk = 4;
    EXPECT_FALSE(first.continued_by(repeated));
    Extent later = second;
    later.first_page = 6;
    EXPECT_FALSE(first.continued_by(later));
}

TEST(Extents, AnOverwriteInTheMiddleKeepsBothEnds) {
    const std::vector<Extent> chunks = imaginary_chunks(17);
    Extent written = chunks[16];
    ASSERT_EQ(written.pages, 1);
    written.first_page = 7;
    const Extents result = overlay({{chunks[15]}}, {{written}}, false);
    ASSERT_EQ(result.size(), 3U);
    EXPECT_EQ(result[0].end_page(), 7U);
    EXPECT_EQ(result[2].first_page, 8U);
    EXPECT_EQ(result[2].first_in_chunk, 8U);
    EXPECT_EQ(result[2].address_of(9).value(), chunks[15].chunk_address->value() + 9);
}

TEST(Extents, WhatIsNotCanonicalIsTold) {
    const std::vector<Extent> chunks = imaginary_chunks(16);
    Extent good = chunks[3];
    good.first_page = 100;
    EXPECT_TRUE(is_canonical({{good}}, false));
    const auto broken = [&](auto change) {
        Extent extent = good;
        change(extent);
        return !is_canonical({{extent}}, true);
    };
    EXPECT_TRUE(broken([](Extent& e) { e.pages = 0; }));
    EXPECT_TRUE(broken([](Extent& e) { e.first_page = 509; }));
    EXPECT_TRUE(broken([](Extent& e) { e.first_in_chunk = 13; }));
    EXPECT_TRUE(broken([](Extent& e) { e.id = {}; }));
    EXPECT_TRUE(broken([](Extent& e) { e.hole = true; })) << "a hole with an id";

    Extent gap;
    gap.hole = true;
    gap.pages = kPagesPerLeaf;
    EXPECT_TRUE(is_canonical({{gap}}, true));
    EXPECT_FALSE(is_canonical({{gap}}, false));
    EXPECT_FALSE(is_canonical({{good, good}}, true)) << "overlapping";
    EXPECT_FALSE(is_canonical({{good.slice(100, 102), good.slice(102, 104)}}, true)) << "unmerged";
}

}  // namespace
}  // namespace stellarium::nova
