// Who uses damaged chunks: exactly the pages that cannot be read, of everything that has them.
#include "nova/chunk_users.h"

#include <map>
#include <set>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "nova/limits.h"
#include "nova/testing/bad_pages.h"
#include "nova/testing/page_model.h"
#include "nova/testing/test_store.h"

namespace stellarium::nova {
namespace {

using testing::extents_of;
using testing::must;
using testing::overlay_maps;
using testing::PageMap;
using testing::PageMapping;
using testing::pages_of;
using testing::RandomMaps;
using testing::TestStore;

/// A volume, and what each of its pages is mapped to.
struct ShadowedState {
    VolumeState state;
    std::map<uint64_t, PageMap> model;
};

TEST(ChunkUsers, RandomStatesAgreeWithPlainPages) {
    constexpr uint64_t kStride = 131;
    constexpr uint64_t kLeaves = 30;
    constexpr uint64_t kSize = kStride * kLeaves * kLeafBytes - 5 * kPageBytes - 512;
    uint64_t pages_found = 0;
    for (uint64_t seed = first_seed(); seed < first_seed() + scaled(12, 3); ++seed) {
        SCOPED_TRACE(fmt::format("STELLARIUM_TEST_SEED={}", seed));
        TestStore test(seed);
        std::vector<Extent> chunks;
        for (uint32_t i = 0; i < 40; ++i) {
            chunks.push_back(test.add_chunk(i, 1 + i % nebula::kMaxChunkPages));
        }
        RandomMaps maps(seed, chunks);
        NodeCache cache(kMiB);
        std::vector<ShadowedState> states(1);
        states[0].state.size_bytes = kSize;
        for (int step = 0; step < 300; ++step) {
            ShadowedState& volume = states[maps.below(states.size())];
            const uint64_t leaf = kStride * maps.below(kLeaves);
            const uint64_t what = maps.below(100);
            if (what < 70) {
                const PageMap top = maps.map(1 + maps.below(5), true);
                const auto now = must(volume.state.delta.find(test.store(), leaf));
                must(volume.state.delta.set(
                    test.store(), leaf,
                    overlay(now ? *now : Extents{}, extents_of(top, chunks), true)));
                volume.model[leaf] = overlay_maps(volume.model[leaf], top, false);
            } else if (what < 80) {
                const auto top = must(volume.state.delta.find(test.store(), leaf));
                if (top != nullptr) {
                    const auto below = must(cache.leaf(test.store(), volume.state.root, leaf));
                    volume.state.root =
                        must(update_tree(test.store(), cache, volume.state.root,
                                         {{leaf, overlay(below->extents, *top, false)}}));
                    must(volume.state.delta.set(test.store(), leaf, {}));
                }
            } else if (what < 85) {
                volume.state.root = must(fold_all(test.store(), cache, volume.state));
                volume.state.delta = Delta();
            } else if (what < 92) {
                const NodeRef name = must(volume.state.delta.persist(test.store()));
                volume.state.delta = must(Delta::load(test.store(), name));
            } else if (states.size() < 6) {
                states.push_back(ShadowedState(volume));
            }
        }
        std::vector<ChunkId> bad;
        std::set<uint32_t> bad_numbers;
        for (uint32_t i = 0; i < 1 + seed % 4; ++i) {
            bad_numbers.insert(static_cast<uint32_t>(maps.below(chunks.size())));
        }
        for (const uint32_t number : bad_numbers) {
            bad.push_back(chunks[number].id);
        }
        const uint64_t appends = test.store().appends;
        ChunkUserFinder finder(test.store(), bad);
        for (const ShadowedState& volume : states) {
            std::map<uint64_t, ChunkId> expected;
            for (const auto& [leaf, map] : volume.model) {
                for (uint64_t page = 0; page < kPagesPerLeaf; ++page) {
                    if (map[page].kind == PageMapping::Kind::kMapped &&
                        bad_numbers.contains(map[page].chunk) &&
                        leaf * kPagesPerLeaf + page < volume.state.pages()) {
                        expected[leaf * kPagesPerLeaf + page] = chunks[map[page].chunk].id;
                    }
                }
            }
            const BadRanges found = must(finder.ranges_of(volume.state, {}));
            EXPECT_TRUE(found.complete);
            ASSERT_EQ(pages_of(found, kSize), expected);
            pages_found += expected.size();
        }
        EXPECT_EQ(test.store().appends, appends) << "looking writes nothing";
    }
    EXPECT_GT(pages_found, 1000U);
}

TEST(ChunkUsers, ReadsEachNodeOnceAndStopsWhereThereIsTooMuch) {
    TestStore test;
    const Extent good = test.add_chunk(1, 16);
    const Extent bad = test.add_chunk(2, 1);
    constexpr uint64_t kLeaves = 300;
    NodeRef root;
    {
        TreeBuilder builder(test.store());
        for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
            // Every page of each other leaf is the bad one; the leaves differ in one page.
            Extents extents;
            for (uint32_t page = 0; page < kPagesPerLeaf; ++page) {
                Extent extent = leaf % 2 == 0 && page != leaf ? bad : good;
                extent.first_page = static_cast<uint16_t>(page);
                extent.first_in_chunk = static_cast<uint8_t>(
                    leaf % 2 == 0 && page != leaf ? 0 : (page * 7 + leaf) % 16);
                extent.pages = 1;
                append_merged(extents, extent);
            }
            must(builder.add_leaf(leaf, extents));
        }
        root = must(builder.finish());
    }
    const VolumeState state{.root = root, .delta = {}, .size_bytes = kLeaves * kLeafBytes};
    ChunkUserFinder finder(test.store(), std::span(&bad.id, 1));
    const BadRanges first = must(finder.ranges_of(state, {}));
    // Single pages of one chunk each, but neighbours are one range.
    EXPECT_TRUE(first.complete);
    EXPECT_GE(first.ranges.size(), kLeaves / 2);
    const uint64_t read = finder.nodes_read();
    EXPECT_LE(read, kLeaves + kLeaves / 64 + 2 + kTreeLevels);
    for (int again = 0; again < 50; ++again) {
        EXPECT_EQ(must(finder.ranges_of(state, {})).ranges.size(), first.ranges.size());
    }
    EXPECT_EQ(finder.nodes_read(), read) << "what is bad is remembered, too";

    // So many that they cannot all be listed.
    Extents striped;
    for (uint32_t page = 0; page < kPagesPerLeaf; page += 2) {
        Extent extent = bad;
        extent.first_page = static_cast<uint16_t>(page);
        striped.push_back(extent);
    }
    TreeBuilder builder(test.store());
    for (uint64_t leaf = 0; leaf < 2 * kMaxBadRanges / striped.size(); ++leaf) {
        must(builder.add_leaf(leaf, striped));
    }
    const VolumeState many{
        .root = must(builder.finish()), .delta = {}, .size_bytes = kMaxLeaves * kLeafBytes};
    const BadRanges some = must(finder.ranges_of(many, {}));
    EXPECT_FALSE(some.complete);
    EXPECT_GE(some.ranges.size(), kMaxBadRanges);
    EXPECT_LT(some.ranges.size(), kMaxBadRanges + kPagesPerLeaf);
    const auto cancelled = finder.ranges_of(many, [] { return true; });
    ASSERT_FALSE(cancelled);
    EXPECT_EQ(cancelled.error().code(), ErrorCode::kCancelled);
}

}  // namespace
}  // namespace stellarium::nova
