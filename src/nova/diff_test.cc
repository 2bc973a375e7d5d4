#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "nova/testing/page_model.h"
#include "nova/testing/test_store.h"
#include "nova/tree.h"

namespace stellarium::nova {
namespace {

using testing::extents_of;
using testing::hole;
using testing::must;
using testing::overlay_maps;
using testing::PageMap;
using testing::RandomMaps;
using testing::TestStore;

constexpr uint64_t kLeafBytes = uint64_t{kPagesPerLeaf} * nebula::kPageBytes;
using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;

Ranges difference(TestStore& test, NodeCache& cache, const VolumeState& a, const VolumeState& b,
                  bool compare_content) {
    Ranges ranges;
    must(diff(test.store(), cache, a, b, compare_content,
              [&](uint64_t first_page, uint64_t pages) -> Result<void> {
                  ranges.emplace_back(first_page, pages);
                  return {};
              }));
    return ranges;
}

/// The shadow: per page, which content it has; 0 is zeros.
using Content = std::map<uint64_t, uint64_t>;

Ranges model_difference(const Content& a, const Content& b) {
    Ranges ranges;
    const auto differ = [&](uint64_t page) {
        if (!ranges.empty() && ranges.back().first + ranges.back().second == page) {
            ++ranges.back().second;
        } else {
            ranges.emplace_back(page, 1);
        }
    };
    auto next_a = a.begin();
    auto next_b = b.begin();
    while (next_a != a.end() || next_b != b.end()) {
        const uint64_t page_a = next_a == a.end() ? UINT64_MAX : next_a->first;
        const uint64_t page_b = next_b == b.end() ? UINT64_MAX : next_b->first;
        if (page_a == page_b) {
            if (next_a->second != next_b->second) {
                differ(page_a);
            }
            ++next_a;
            ++next_b;
        } else {
            differ(std::min(page_a, page_b));
            ++(page_a < page_b ? next_a : next_b);
        }
    }
    return ranges;
}

TEST(Diff, AgreesWithPlainPagesOfDescendants) {
    for (uint64_t seed = 1; seed <= 6; ++seed) {
        SCOPED_TRACE(fmt::format("seed {}", seed));
        TestStore test(seed);
        // Chunks in two families with equal pages in different chunks: chunk i of the first has
        // i + 1 pages of tag 0, so page p of each of them has the same content.
        std::vector<Extent> chunks;
        for (uint32_t pages = 1; pages <= nebula::kMaxChunkPages; ++pages) {
            chunks.push_back(test.add_chunk(0, pages));
            chunks.push_back(test.add_chunk(pages, pages));
        }
        const auto content_of = [](const testing::PageMapping& mapping) {
            const uint64_t tag = mapping.chunk % 2 == 0 ? 0 : mapping.chunk / 2 + 1;
            return 1 + tag * 100 + mapping.page;
        };
        const auto mapping_of = [](const testing::PageMapping& mapping) {
            return uint64_t{mapping.chunk} * 100 + mapping.page + 1;
        };
        RandomMaps maps(seed, chunks);
        NodeCache cache(uint64_t{1} << 20);
        struct Version {
            VolumeState state;
            std::map<uint64_t, PageMap> model;
        };
        std::vector<Version> versions(1);
        versions[0].state.size_bytes = 5000 * kLeafBytes;
        for (int step = 0; step < 60; ++step) {
            Version next = versions[maps.below(versions.size())];
            for (uint64_t writes = maps.below(6); writes > 0; --writes) {
                const uint64_t leaf = maps.below(2) == 0 ? maps.below(5000) : 64 * maps.below(70);
                if ((leaf + 1) * kLeafBytes > next.state.size_bytes) {
                    continue;
                }
                const PageMap top = maps.map(1 + maps.below(3), true);
                const auto now = must(next.state.delta.find(test.store(), leaf));
                must(next.state.delta.set(
                    test.store(), leaf,
                    overlay(now ? *now : Extents{}, extents_of(top, chunks), true)));
                next.model[leaf] = overlay_maps(next.model[leaf], top, false);
            }
            const uint64_t what = maps.below(8);
            if (what == 0) {
                next.state.root = must(fold_all(test.store(), cache, next.state));
                next.state.delta = Delta();
            } else if (what == 1) {
                next.state.delta =
                    must(Delta::load(test.store(), must(next.state.delta.persist(test.store()))));
            } else if (what == 2) {
                // A size alone, as resize at the end of the data; what is beyond is not looked at.
                next.state.size_bytes = (1 + maps.below(5000 * kPagesPerLeaf)) * 4096;
            }
            const Version& other = versions[maps.below(versions.size())];
            for (const bool compare_content : {false, true}) {
                const auto flat = [&](const Version& version) {
                    Content content;
                    for (const auto& [leaf, map] : version.model) {
                        for (uint64_t page = 0; page < kPagesPerLeaf; ++page) {
                            const auto& mapping = map[page];
                            const uint64_t number = leaf * kPagesPerLeaf + page;
                            if (mapping.kind == testing::PageMapping::Kind::kMapped &&
                                number < version.state.pages()) {
                                content[number] =
                                    compare_content ? content_of(mapping) : mapping_of(mapping);
                            }
                        }
                    }
                    return content;
                };
                const Ranges expected = model_difference(flat(other), flat(next));
                ASSERT_EQ(difference(test, cache, other.state, next.state, compare_content),
                          expected)
                    << "step " << step;
                ASSERT_EQ(difference(test, cache, next.state, other.state, compare_content),
                          expected);
            }
            versions.push_back(std::move(next));
        }
    }
}

TEST(Diff, CostsWhatDiffers) {
    TestStore test;
    std::vector<Extent> chunks;
    for (uint32_t i = 0; i < 16; ++i) {
        chunks.push_back(test.add_chunk(i, i + 1));
    }
    VolumeState base;
    base.size_bytes = uint64_t{40'000} * kLeafBytes;
    TreeBuilder builder(test.store());
    for (uint64_t leaf = 0; leaf < 40'000; ++leaf) {
        must(builder.add_leaf(leaf, {chunks[leaf % 16], testing::placed(chunks[leaf / 16 % 16], 64),
                                     testing::placed(chunks[leaf / 256 % 16], 128)}));
    }
    base.root = must(builder.finish());
    for (uint64_t leaf = 0; leaf < 40'000; leaf += 10) {
        must(base.delta.set(test.store(), leaf, {testing::placed(chunks[0], 300)}));
    }
    VolumeState changed = base;
    must(changed.delta.set(test.store(), 20'000, {testing::placed(chunks[1], 300)}));
    {
        NodeCache cache(uint64_t{4} << 20);
        changed.root =
            must(update_tree(test.store(), cache, changed.root, {{33'333, {chunks[5]}}}));
    }
    // Both as after a restart: nothing is in memory.
    const NodeRef delta_a = must(base.delta.persist(test.store()));
    const NodeRef delta_b = must(changed.delta.persist(test.store()));
    base.delta = Delta();
    changed.delta = Delta();
    base.delta = must(Delta::load(test.store(), delta_a));
    changed.delta = must(Delta::load(test.store(), delta_b));
    NodeCache cache(uint64_t{4} << 20);
    test.store().objects_read = 0;
    const Ranges ranges = difference(test, cache, base, changed, true);
    EXPECT_GE(ranges.size(), 2U);
    // Two changed leaves: a path of tree nodes and one of delta nodes for each, on both sides.
    EXPECT_LE(test.store().objects_read, 2 * 2 * 2 * (kTreeLevels + 1U));

    // Equal ones cost nothing at all.
    test.store().objects_read = 0;
    EXPECT_TRUE(difference(test, cache, base, base, true).empty());
    EXPECT_EQ(test.store().objects_read, 0U);
}

TEST(Diff, EqualContentCutDifferentlyIsReadAndNotReported) {
    TestStore test;
    const auto content = TestStore::chunk_content(1, 8);
    const Extent whole = test.add_chunk(content);
    const auto half = content.begin() + 4 * nebula::kPageBytes;
    const Extent front = test.add_chunk({content.begin(), half});
    const Extent back = test.add_chunk({half, content.end()});
    const Extent zeros = test.add_chunk(std::vector<std::byte>(nebula::kPageBytes));
    VolumeState a;
    a.size_bytes = kLeafBytes;
    VolumeState b = a;
    must(a.delta.set(test.store(), 0, {whole}));
    must(b.delta.set(test.store(), 0,
                     {front, testing::placed(back, 4), testing::placed(zeros, 100)}));
    NodeCache cache(uint64_t{1} << 20);
    EXPECT_TRUE(difference(test, cache, a, b, true).empty());
    EXPECT_EQ(difference(test, cache, a, b, false), (Ranges{{0, 8}, {100, 1}}));
    // An error of the visitor ends the walk and comes back.
    const auto stopped = diff(test.store(), cache, a, b, false, [](uint64_t, uint64_t) {
        return Result<void>(fail(ErrorCode::kCancelled, "enough"));
    });
    ASSERT_FALSE(stopped);
    EXPECT_EQ(stopped.error().code(), ErrorCode::kCancelled);
}

}  // namespace
}  // namespace stellarium::nova
