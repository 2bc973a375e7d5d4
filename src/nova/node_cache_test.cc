#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "nova/testing/test_store.h"
#include "nova/tree.h"

namespace stellarium::nova {
namespace {

using testing::must;
using testing::TestStore;

/// A tree of `leaves` different leaves, each with `extents` extents.
NodeRef make_tree(TestStore& test, uint64_t leaves, uint32_t extents) {
    std::vector<Extent> chunks;
    for (uint32_t i = 0; i < 16; ++i) {
        chunks.push_back(test.add_chunk(i, 1));
    }
    TreeBuilder builder(test.store());
    for (uint64_t leaf = 0; leaf < leaves; ++leaf) {
        Extents list;
        for (uint32_t i = 0; i < extents; ++i) {
            list.push_back(testing::placed(chunks[(leaf >> (i % 8)) % 16], 2 * i));
        }
        must(builder.add_leaf(leaf, list));
    }
    return must(builder.finish());
}

TEST(NodeCache, ReadsEachNodeOnceAndAnswersWithoutWaitingThen) {
    TestStore test;
    const NodeRef root = make_tree(test, 200, 20);
    NodeCache cache(uint64_t{16} << 20);
    const auto refused = cache.leaf(test.store(), root, 7, IoMode::kNoWait);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kWouldBlock);
    test.store().objects_read = 0;
    for (int round = 0; round < 3; ++round) {
        for (uint64_t leaf = 0; leaf < 200; ++leaf) {
            EXPECT_EQ(must(cache.leaf(test.store(), root, leaf))->extents.size(), 20U);
        }
    }
    EXPECT_EQ(test.store().objects_read, 200U + 4 + (kTreeLevels - 1));
    EXPECT_EQ(cache.stats().node_reads, test.store().objects_read);
    EXPECT_EQ(cache.stats().hits, 400U);
    EXPECT_EQ(cache.stats().misses, 200U);
    EXPECT_EQ(cache.stats().evictions, 0U);
    EXPECT_TRUE(cache.leaf(test.store(), root, 7, IoMode::kNoWait));
    // A hole is known as such, too; and the empty tree needs nothing.
    EXPECT_TRUE(must(cache.leaf(test.store(), root, 200))->extents.empty());
    EXPECT_TRUE(must(cache.leaf(test.store(), root, 200, IoMode::kNoWait))->extents.empty());
    EXPECT_TRUE(must(cache.leaf(test.store(), {}, 5, IoMode::kNoWait))->extents.empty());

    const uint64_t used = cache.memory_bytes();
    EXPECT_GT(used, 200 * 20 * sizeof(Extent));
    EXPECT_LT(used, 200 * (20 * sizeof(Extent) + 512) + 65'536);
    cache.clear();
    EXPECT_LT(cache.memory_bytes(), 65'536U);
    EXPECT_FALSE(cache.leaf(test.store(), root, 7, IoMode::kNoWait));
}

TEST(NodeCache, VolumesThatHoldTheSameNodesShareThem) {
    TestStore test;
    const NodeRef root = make_tree(test, 200, 20);
    NodeCache cache(uint64_t{16} << 20);
    const auto leaf = must(cache.leaf(test.store(), root, 7));
    const NodeRef other = must(update_tree(test.store(), cache, root, {{100, {}}}));
    ASSERT_NE(other, root);
    const uint64_t objects_read = test.store().objects_read;
    EXPECT_EQ(must(cache.leaf(test.store(), other, 7)), leaf);
    EXPECT_EQ(test.store().objects_read, objects_read);
}

TEST(NodeCache, StaysWithinItsBudgetAndKeepsWhatIsUsed) {
    TestStore test;
    const NodeRef root = make_tree(test, 1000, 100);
    constexpr uint64_t kBudget = uint64_t{512} << 10;
    NodeCache cache(kBudget);
    must(cache.leaf(test.store(), root, 0));
    std::mt19937_64 random(1);
    for (int i = 0; i < 3000; ++i) {
        EXPECT_EQ(must(cache.leaf(test.store(), root, random() % 1000))->extents.size(), 100U);
        EXPECT_LE(cache.memory_bytes(), kBudget);
        // Used all the time, it stays while thousands of others come and go.
        ASSERT_TRUE(cache.leaf(test.store(), root, 0, IoMode::kNoWait)) << i;
    }
    EXPECT_GT(cache.stats().evictions, 1000U);
    EXPECT_GT(cache.memory_bytes(), kBudget / 2);
    // A leaf in hand outlives its eviction.
    const auto held = must(cache.leaf(test.store(), root, 1));
    cache.clear();
    EXPECT_EQ(held->extents.size(), 100U);
}

TEST(NodeCache, ManyThreadsReadThroughATinyCache) {
    // For the thread sanitizer: look-ups, misses, insertions and evictions at once.
    TestStore test;
    const NodeRef root = make_tree(test, 300, 30);
    NodeCache cache(0);
    std::vector<std::thread> threads;
    for (uint64_t seed = 1; seed <= 4; ++seed) {
        threads.emplace_back([&, seed] {
            std::mt19937_64 random(seed);
            for (int i = 0; i < 1500; ++i) {
                const uint64_t number = random() % 300;
                const auto leaf = must(cache.leaf(test.store(), root, number));
                ASSERT_EQ(leaf->extents.size(), 30U);
                ASSERT_EQ(
                    leaf->extents[1].id,
                    must(cache.leaf(test.store(), root, number ^ (number & 1)))->extents[1].id);
                if (i % 500 == 0) {
                    cache.clear();
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_LE(cache.memory_bytes(), uint64_t{64} << 10);
}

}  // namespace
}  // namespace stellarium::nova
