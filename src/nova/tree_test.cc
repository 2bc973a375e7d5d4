#include "nova/tree.h"

#include <map>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "nova/codec.h"
#include "nova/testing/page_model.h"
#include "nova/testing/test_store.h"

namespace stellarium::nova {
namespace {

using testing::extents_of;
using testing::hole;
using testing::must;
using testing::overlay_maps;
using testing::PageMap;
using testing::RandomMaps;
using testing::TestStore;

constexpr uint64_t kCacheBytes = uint64_t{1} << 20;
constexpr uint64_t kLeafBytes = uint64_t{kPagesPerLeaf} * nebula::kPageBytes;

/// Chunks of 1 to 16 pages in the store.
std::vector<Extent> stored_chunks(TestStore& test, size_t count) {
    std::vector<Extent> chunks;
    for (size_t i = 0; i < count; ++i) {
        chunks.push_back(test.add_chunk(i, static_cast<uint32_t>(1 + i % nebula::kMaxChunkPages)));
    }
    return chunks;
}

NodeRef built(TestStore& test, const std::map<uint64_t, Extents>& leaves) {
    TreeBuilder builder(test.store());
    for (const auto& [leaf, extents] : leaves) {
        must(builder.add_leaf(leaf, extents));
    }
    return must(builder.finish());
}

std::vector<uint64_t> leaves_of(TestStore& test, NodeCache& cache, const VolumeState& state,
                                uint64_t first_leaf = 0) {
    std::vector<uint64_t> leaves;
    must(for_each_leaf(test.store(), cache, state, first_leaf, [&](uint64_t leaf) -> Result<bool> {
        leaves.push_back(leaf);
        return true;
    }));
    return leaves;
}

TEST(Tree, RandomProgramsOnAStateAgreeWithPlainPages) {
    // A volume of 40 leaves spread over the tree, written through delta and tree, resized, folded
    // in parts and wholly; the shadow is one value for each page.
    constexpr uint64_t kStride = 131;
    constexpr uint64_t kLeaves = 40;
    for (uint64_t seed = 1; seed <= 5; ++seed) {
        SCOPED_TRACE(fmt::format("seed {}", seed));
        TestStore test(seed);
        const std::vector<Extent> chunks = stored_chunks(test, 20);
        RandomMaps maps(seed, chunks);
        NodeCache cache(seed % 2 == 0 ? kCacheBytes : 0);
        VolumeState state;
        state.size_bytes = kStride * kLeaves * kLeafBytes;
        std::map<uint64_t, PageMap> model;
        for (int step = 0; step < 400; ++step) {
            SCOPED_TRACE(fmt::format("step {}", step));
            const uint64_t leaf = kStride * maps.below(kLeaves);
            const uint64_t what = maps.below(100);
            if (what < 55 && (leaf + 1) * kLeafBytes <= state.size_bytes) {
                const PageMap top = maps.map(1 + maps.below(5), true);
                const auto now = must(state.delta.find(test.store(), leaf));
                must(state.delta.set(
                    test.store(), leaf,
                    overlay(now ? *now : Extents{}, extents_of(top, chunks), true)));
                model[leaf] = overlay_maps(model[leaf], top, false);
            } else if (what < 70) {
                // One leaf of the delta is folded into the tree, as a background fold does.
                const auto top = must(state.delta.find(test.store(), leaf));
                if (top != nullptr) {
                    const auto below = must(cache.leaf(test.store(), state.root, leaf));
                    state.root = must(update_tree(test.store(), cache, state.root,
                                                  {{leaf, overlay(below->extents, *top, false)}}));
                    must(state.delta.set(test.store(), leaf, {}));
                }
            } else if (what < 74) {
                state.root = must(fold_all(test.store(), cache, state));
                state.delta = Delta();
            } else if (what < 80) {
                const uint64_t pages = maps.below(kStride * kLeaves * kPagesPerLeaf + 1);
                state = must(resized(test.store(), cache, state, pages * nebula::kPageBytes));
                for (auto& [number, map] : model) {
                    for (uint64_t page = 0; page < kPagesPerLeaf; ++page) {
                        if (number * kPagesPerLeaf + page >= pages) {
                            map[page] = {};
                        }
                    }
                }
                // And back, so that most of the volume can be written again.
                state = must(resized(test.store(), cache, state, kStride * kLeaves * kLeafBytes));
            } else if (what < 85) {
                state.delta =
                    must(Delta::load(test.store(), must(state.delta.persist(test.store()))));
            } else {
                const Extents actual = must(effective_leaf(test.store(), cache, state, leaf));
                ASSERT_TRUE(is_canonical(actual, false));
                ASSERT_TRUE(same_content(actual, extents_of(model[leaf], chunks)));
                for (const Extent& extent : actual) {
                    ASSERT_TRUE(extent.chunk_address);
                }
            }
        }
        std::map<uint64_t, Extents> content;
        std::vector<uint64_t> mapped;
        for (const auto& [leaf, map] : model) {
            content[leaf] = extents_of(map, chunks);
            ASSERT_TRUE(same_content(must(effective_leaf(test.store(), cache, state, leaf)),
                                     content[leaf]));
            if (!content[leaf].empty()) {
                mapped.push_back(leaf);
            }
        }
        EXPECT_EQ(leaves_of(test, cache, state), mapped);
        // Whatever the history, the same content has the same root.
        EXPECT_EQ(must(fold_all(test.store(), cache, state)), built(test, content));
    }
}

TEST(Tree, BuildingUpdatingAndFoldingGiveOneRoot) {
    TestStore test;
    const std::vector<Extent> chunks = stored_chunks(test, 20);
    RandomMaps maps(3, chunks);
    NodeCache cache(kCacheBytes);
    std::map<uint64_t, Extents> content;
    for (int i = 0; i < 300; ++i) {
        content[maps.below(3) == 0 ? maps.below(kMaxLeaves) : maps.below(200)] =
            extents_of(maps.map(3, false), chunks);
    }
    const NodeRef root = built(test, content);
    EXPECT_EQ(must(update_tree(test.store(), cache, {}, content)), root);
    NodeRef one_by_one;
    VolumeState written;
    written.size_bytes = kMaxLeaves * kLeafBytes;
    for (auto next = content.rbegin(); next != content.rend(); ++next) {
        one_by_one = must(update_tree(test.store(), cache, one_by_one, {*next}));
        must(written.delta.set(test.store(), next->first, next->second));
    }
    EXPECT_EQ(one_by_one, root);
    EXPECT_EQ(must(fold_all(test.store(), cache, written)), root);
    // The size is not part of the root, only of the identity beside it.
    written.size_bytes = kMaxLeaves * kLeafBytes - 4096;
    EXPECT_EQ(must(fold_all(test.store(), cache, written)), root);
    // Removing everything leads back to the empty node.
    std::map<uint64_t, Extents> nothing;
    for (const auto& [leaf, extents] : content) {
        nothing[leaf] = {};
    }
    EXPECT_TRUE(must(update_tree(test.store(), cache, root, nothing)).empty());
    EXPECT_TRUE(built(test, {}).empty());
}

TEST(Tree, AnUpdateWritesItsPathInOneBatch) {
    TestStore test;
    const std::vector<Extent> chunks = stored_chunks(test, 20);
    NodeCache cache(kCacheBytes);
    std::map<uint64_t, Extents> content;
    for (uint64_t leaf = 0; leaf < 6000; ++leaf) {
        content[leaf] = {chunks[leaf % 20], testing::placed(chunks[leaf / 20 % 20], 100)};
    }
    const NodeRef root = built(test, content);
    const uint64_t appends = test.store().appends;
    const uint64_t objects = test.store().stats().chunks;
    const NodeRef updated =
        must(update_tree(test.store(), cache, root, {{4711, {chunks[3]}}, {4712, {chunks[4]}}}));
    EXPECT_EQ(test.store().appends - appends, 1U);
    EXPECT_LE(test.store().stats().chunks - objects, kTreeLevels + 2U);
    // Guests that read what was just folded find it in memory.
    EXPECT_TRUE(cache.leaf(test.store(), updated, 4711, IoMode::kNoWait));
    // An update that changes nothing writes nothing.
    EXPECT_EQ(must(update_tree(test.store(), cache, updated, {{4711, {chunks[3]}}, {7000, {}}})),
              updated);
    EXPECT_EQ(test.store().appends - appends, 1U);
}

TEST(Tree, HintsLeadFromImportedNodesToTheirChildren) {
    TestStore test;
    const std::vector<Extent> chunks = stored_chunks(test, 16);
    std::map<uint64_t, Extents> content;
    for (uint64_t leaf = 0; leaf < 2000; ++leaf) {
        for (uint32_t page = 0; page < kPagesPerLeaf; page += 4) {
            content[leaf].push_back(
                testing::placed(chunks[(leaf >> (page % 11)) % 2 + 2 * (page % 3)], page));
            content[leaf].back().pages = 1;
        }
    }
    const NodeRef root = built(test, content);
    uint64_t with_hint = 0;
    uint64_t children = 0;
    std::vector<std::pair<NodeRef, uint32_t>> todo{{root, kTreeLevels}};
    while (!todo.empty()) {
        const auto [ref, level] = todo.back();
        todo.pop_back();
        if (ref.hint) {
            EXPECT_EQ(ref.hint, test.store().object_address(ref.id));
        }
        if (level == 0) {
            continue;
        }
        const auto object = must(test.store().get_object(ref.id, ref.hint));
        for (const NodeRef& child :
             must(decode_tree_inner(object.content, object.aux, level)).children) {
            ++children;
            with_hint += child.hint.has_value() ? 1 : 0;
            todo.emplace_back(child, level - 1);
        }
    }
    // All but those in the last batch, whose places nobody knew when their parents were written.
    EXPECT_GT(children, 2000U);
    EXPECT_GT(with_hint, children / 2);
}

TEST(Tree, ASparseVolumeOfOnePebibyteIsWalkedByWhatItHolds) {
    TestStore test;
    const std::vector<Extent> chunks = stored_chunks(test, 3);
    NodeCache cache(kCacheBytes);
    VolumeState state;
    state.size_bytes = uint64_t{1} << 50;
    const uint64_t last = state.size_bytes / kLeafBytes - 1;
    state.root = built(test, {{0, {chunks[0]}}, {last, {chunks[1]}}});
    must(state.delta.set(test.store(), 12'345'678, {chunks[2]}));
    must(state.delta.set(test.store(), 99, {hole(0, kPagesPerLeaf)}));
    cache.clear();
    test.store().objects_read = 0;
    EXPECT_EQ(leaves_of(test, cache, state), (std::vector<uint64_t>{0, 12'345'678, last}));
    EXPECT_LE(test.store().objects_read, 2 * kTreeLevels + 3U);
    EXPECT_EQ(leaves_of(test, cache, state, 1), (std::vector<uint64_t>{12'345'678, last}));
    EXPECT_EQ(leaves_of(test, cache, state, last), (std::vector<uint64_t>{last}));

    // Holes hide what lies below; pages beyond the size are not there.
    must(state.delta.set(test.store(), 0, {hole(0, 300)}));
    state.size_bytes = last * kLeafBytes;
    EXPECT_EQ(leaves_of(test, cache, state), (std::vector<uint64_t>{12'345'678}));
    EXPECT_TRUE(must(effective_leaf(test.store(), cache, state, last)).empty());
    // A visitor may stop.
    uint64_t visited = 0;
    must(for_each_leaf(test.store(), cache, state, 0, [&](uint64_t) -> Result<bool> {
        ++visited;
        return false;
    }));
    EXPECT_EQ(visited, 1U);
}

TEST(Tree, ShrinkingRewritesOnePathAndForgetsWhatWasBeyond) {
    TestStore test;
    const std::vector<Extent> chunks = stored_chunks(test, 16);
    NodeCache cache(kCacheBytes);
    VolumeState state;
    state.size_bytes = 5000 * kLeafBytes;
    std::map<uint64_t, Extents> content;
    for (uint64_t leaf = 0; leaf < 5000; ++leaf) {
        content[leaf] = {chunks[15], testing::placed(chunks[leaf % 16], 200)};
    }
    state.root = built(test, content);
    must(state.delta.set(test.store(), 4000, {testing::placed(chunks[0], 50)}));
    must(state.delta.set(test.store(), 1234, {testing::placed(chunks[15], 4)}));
    const VolumeState before = state;
    const uint64_t objects = test.store().stats().chunks;
    // In the middle of leaf 1234, of a chunk below and of one in the delta.
    state = must(resized(test.store(), cache, state, 1234 * kLeafBytes + 8 * 4096));
    EXPECT_LE(test.store().stats().chunks - objects, 2 * (kTreeLevels + 1U));
    EXPECT_EQ(state.delta.leaves(), 1U);
    state = must(resized(test.store(), cache, state, before.size_bytes));
    EXPECT_TRUE(must(effective_leaf(test.store(), cache, state, 4000)).empty());
    EXPECT_EQ(leaves_of(test, cache, state).size(), 1235U);
    const Extents cut = must(effective_leaf(test.store(), cache, state, 1234));
    ASSERT_EQ(cut.size(), 2U);
    EXPECT_EQ(cut.back().end_page(), 8U);
    // The state that was copied before has everything still.
    EXPECT_EQ(must(effective_leaf(test.store(), cache, before, 4000)).size(), 3U);
    // To nothing, and from nothing.
    EXPECT_TRUE(must(resized(test.store(), cache, state, 0)).root.empty());
}

TEST(Tree, MissingAndLyingNodesAreErrorsThatNameThem) {
    TestStore test;
    const std::vector<Extent> chunks = stored_chunks(test, 3);
    NodeCache cache(kCacheBytes);
    const auto error_of = [&](const NodeRef& root) {
        const auto leaf = cache.leaf(test.store(), root, 0);
        EXPECT_FALSE(leaf);
        return leaf ? Error(ErrorCode::kBusy, "") : leaf.error();
    };
    const NodeRef missing{hash(bytes_of(std::string_view("nothing"))), std::nullopt};
    EXPECT_EQ(error_of(missing).code(), ErrorCode::kCorrupt);
    EXPECT_NE(error_of(missing).message().find(missing.id.hex()), std::string::npos);
    // A node of level 4 used as a root, and an object that is no node.
    const NodeRef root = built(test, {{0, {chunks[0]}}});
    const auto object = must(test.store().get_object(root.id, root.hint));
    const NodeRef child =
        must(decode_tree_inner(object.content, object.aux, kTreeLevels)).children.at(0);
    EXPECT_NE(error_of(child).message().find("level is 4, not 5"), std::string::npos);
    EXPECT_EQ(error_of({chunks[0].id, std::nullopt}).code(), ErrorCode::kCorrupt);
    // Nothing of that was kept, and nothing is read twice that was.
    EXPECT_TRUE(cache.leaf(test.store(), root, 0));
    test.store().fail_reads = true;
    EXPECT_TRUE(cache.leaf(test.store(), root, 0));
    EXPECT_FALSE(cache.leaf(test.store(), child, 0));
    test.store().fail_reads = false;
    test.store().fail_appends = true;
    EXPECT_FALSE(update_tree(test.store(), cache, root, {{1, {chunks[1]}}}));
    TreeBuilder builder(test.store());
    must(builder.add_leaf(0, {chunks[0]}));
    EXPECT_FALSE(builder.finish());
}

}  // namespace
}  // namespace stellarium::nova
