#include <map>
#include <random>
#include <thread>
#include <unordered_map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "nova/codec.h"
#include "nova/testing/page_model.h"
#include "nova/testing/test_store.h"
#include "nova/tree.h"

namespace stellarium::nova {
namespace {

using testing::extents_of;
using testing::hole;
using testing::imaginary_chunks;
using testing::must;
using testing::RandomMaps;
using testing::TestStore;

using Model = std::map<uint64_t, Extents>;

/// Leaf numbers that share nodes at every level, and some that share none.
uint64_t random_leaf(RandomMaps& maps) {
    switch (maps.below(4)) {
        case 0:
            return maps.below(kMaxLeaves);
        case 1:
            return maps.below(64);
        case 2:
            return 4096 * maps.below(64) + maps.below(3);
        default:
            return 100'000 + maps.below(300);
    }
}

void expect_equal(TestStore& test, const Delta& delta, const Model& model) {
    ASSERT_EQ(delta.leaves(), model.size());
    ASSERT_EQ(delta.empty(), model.empty());
    uint64_t extents = 0;
    auto expected = model.begin();
    must(delta.for_each(test.store(), 0, kMaxLeaves - 1, [&](uint64_t leaf, const Extents& found) {
        EXPECT_NE(expected, model.end());
        EXPECT_EQ(leaf, expected->first);
        EXPECT_TRUE(same_content(found, expected->second));
        extents += found.size();
        ++expected;
        return true;
    }));
    ASSERT_EQ(expected, model.end());
    ASSERT_EQ(delta.extents(), extents);
}

Delta built_from(TestStore& test, const Model& model) {
    Delta delta;
    for (const auto& [leaf, extents] : model) {
        must(delta.set(test.store(), leaf, extents));
    }
    return delta;
}

struct Footprint {
    uint64_t nodes = 0;
    uint64_t bytes = 0;
};

/// Distinct nodes and lists of extents of all deltas together.
Footprint footprint(const std::vector<Delta>& deltas) {
    std::unordered_map<const void*, size_t> seen;
    for (const Delta& delta : deltas) {
        delta.visit_resident([&](const void* node, size_t bytes) { seen[node] = bytes; });
    }
    Footprint total;
    for (const auto& [node, bytes] : seen) {
        ++total.nodes;
        total.bytes += bytes;
    }
    return total;
}

TEST(Delta, RandomProgramsAgreeWithAMapOnEveryCopy) {
    const std::vector<Extent> chunks = imaginary_chunks(30);
    for (uint64_t seed = 1; seed <= 6; ++seed) {
        SCOPED_TRACE(fmt::format("seed {}", seed));
        TestStore test;
        RandomMaps maps(seed, chunks);
        std::vector<std::pair<Delta, Model>> versions(1);
        for (int step = 0; step < 1500; ++step) {
            SCOPED_TRACE(fmt::format("step {}", step));
            auto& [delta, model] = versions[maps.below(versions.size())];
            const uint64_t what = maps.below(100);
            if (what < 70) {
                const uint64_t leaf = random_leaf(maps);
                const auto extents =
                    extents_of(maps.map(maps.below(10) == 0 ? 100 : maps.below(4), true), chunks);
                must(delta.set(test.store(), leaf, extents));
                if (extents.empty()) {
                    model.erase(leaf);
                } else {
                    model[leaf] = extents;
                }
            } else if (what < 80 && !model.empty()) {
                const auto victim = model.lower_bound(random_leaf(maps));
                if (victim != model.end()) {
                    must(delta.set(test.store(), victim->first, {}));
                    model.erase(victim);
                }
            } else if (what < 88) {
                const uint64_t leaf = random_leaf(maps);
                const auto found = must(delta.find(test.store(), leaf));
                const auto expected = model.find(leaf);
                ASSERT_EQ(found != nullptr, expected != model.end());
                ASSERT_TRUE(found == nullptr || same_content(*found, expected->second));
            } else if (what < 92) {
                versions.emplace_back(delta, model);  // Invalidates the references above.
                if (versions.size() > 8) {
                    versions.erase(versions.begin() + static_cast<std::ptrdiff_t>(maps.below(8)));
                }
            } else if (what < 95) {
                const NodeRef name = must(delta.persist(test.store()));
                ASSERT_EQ(name.empty(), model.empty());
            } else if (what < 97) {
                const NodeRef name = must(delta.persist(test.store()));
                delta = maps.below(2) == 0
                            ? must(Delta::load(test.store(), name))
                            : Delta::from_name(test.store(), name, delta.leaves(), delta.extents());
            } else if (what < 99) {
                const uint64_t first = random_leaf(maps);
                must(delta.erase_from(test.store(), first));
                model.erase(model.lower_bound(first), model.end());
            } else {
                expect_equal(test, delta, model);
            }
            if (HasFatalFailure() || HasNonfatalFailure()) {
                return;
            }
        }
        for (const auto& [delta, model] : versions) {
            expect_equal(test, delta, model);
            // The same content by another way has the same name.
            EXPECT_EQ(must(delta.persist(test.store())),
                      must(built_from(test, model).persist(test.store())));
        }
    }
}

TEST(Delta, SurvivesRestartAndReadsOnlyWhatIsAsked) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    RandomMaps maps(5, chunks);
    Model model;
    for (int i = 0; i < 2000; ++i) {
        model[maps.below(kMaxLeaves)] = extents_of(maps.map(4, true), chunks);
    }
    NodeRef name;
    uint64_t leaves = 0;
    uint64_t extents = 0;
    {
        const Delta delta = built_from(test, model);
        name = must(delta.persist(test.store()));
        leaves = delta.leaves();
        extents = delta.extents();
    }
    test.reopen();
    test.store().objects_read = 0;
    const Delta unread = Delta::from_name(test.store(), name, leaves, extents);
    EXPECT_EQ(unread.leaves(), model.size());
    EXPECT_EQ(test.store().objects_read, 0U);
    const uint64_t some_leaf = model.begin()->first;
    const auto refused = unread.find(test.store(), some_leaf, IoMode::kNoWait);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kWouldBlock);
    ASSERT_NE(must(unread.find(test.store(), some_leaf)), nullptr);
    EXPECT_LE(test.store().objects_read, kTreeLevels + 1);
    EXPECT_NE(must(unread.find(test.store(), some_leaf, IoMode::kNoWait)), nullptr);

    // A second delta of that name shares what the first has read.
    const Delta second = must(Delta::load(test.store(), name));
    EXPECT_TRUE(second.same_version(unread));
    const uint64_t read_before = test.store().objects_read;
    EXPECT_NE(must(second.find(test.store(), some_leaf)), nullptr);
    EXPECT_EQ(test.store().objects_read, read_before);
    EXPECT_EQ(footprint({unread, second}).nodes, footprint({unread}).nodes);
    expect_equal(test, second, model);
}

TEST(Delta, PersistWritesOnlyWhatChanged) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    Delta delta;
    for (uint64_t leaf = 0; leaf < 3000; ++leaf) {
        must(delta.set(test.store(), leaf, {chunks[leaf % 30], hole(300, 1)}));
    }
    const NodeRef first = must(delta.persist(test.store()));
    const uint64_t objects = test.store().stats().chunks;
    const uint64_t appends = test.store().appends;
    EXPECT_EQ(must(delta.persist(test.store())), first);
    EXPECT_EQ(test.store().appends, appends) << "nothing to write";
    must(delta.set(test.store(), 77, {chunks[1], hole(100, 1)}));
    EXPECT_NE(must(delta.persist(test.store())), first);
    EXPECT_EQ(test.store().appends, appends + 1);
    EXPECT_LE(test.store().stats().chunks - objects, kTreeLevels + 1);
}

TEST(Delta, ManyDeltasShareOneBatch) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    std::vector<Delta> deltas(300);
    std::vector<const Delta*> all;
    for (uint64_t i = 0; i < deltas.size(); ++i) {
        if (i != 7) {
            must(deltas[i].set(test.store(), i, {chunks[i % 30]}));
        }
        all.push_back(&deltas[i]);
    }
    const uint64_t appends = test.store().appends;
    const std::vector<NodeRef> names = must(Delta::persist_all(test.store(), all));
    EXPECT_EQ(test.store().appends, appends + 1);
    ASSERT_EQ(names.size(), deltas.size());
    EXPECT_TRUE(names[7].empty());
    for (uint64_t i = 0; i < deltas.size(); ++i) {
        EXPECT_EQ(names[i], must(deltas[i].persist(test.store())));
    }
    EXPECT_EQ(test.store().appends, appends + 1) << "all were named already";
    EXPECT_TRUE(must(Delta::persist_all(test.store(), {})).empty());
}

TEST(Delta, ASmallDeltaIsOneNode) {
    // What makes ten thousand clones with a few writes each cheap to checkpoint.
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    Delta delta;
    for (uint64_t i = 0; i < kBucketExtents; ++i) {
        must(delta.set(test.store(), i * 16'000'000, {chunks[i % 30]}));
    }
    const uint64_t objects = test.store().stats().chunks;
    must(delta.persist(test.store()));
    EXPECT_EQ(test.store().stats().chunks - objects, 1U);
}

TEST(Delta, TenThousandSnapshotsCostWhatChangedAndReadAsTheFirst) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(500);
    constexpr uint64_t kVolumeLeaves = 5000;
    const size_t snapshots = scaled(10'000, 1'000);
    std::vector<Delta> chain;
    Delta live;
    Model model;
    for (uint64_t leaf = 0; leaf < kVolumeLeaves; leaf += 5) {
        must(live.set(test.store(), leaf, {chunks[leaf % 500]}));
        model[leaf] = {chunks[leaf % 500]};
    }
    const uint64_t bytes_of_one = footprint({live}).bytes;
    std::mt19937_64 random(1);
    for (size_t i = 0; i < snapshots; ++i) {
        chain.push_back(live);
        const uint64_t leaf = random() % kVolumeLeaves;
        const Extents extents{chunks[i % 500], testing::placed(chunks[(i + 16) % 500], 64)};
        must(live.set(test.store(), leaf, extents));
        model[leaf] = extents;
    }
    // Each change costs its path: the leaf and five nodes of at most 64 pointers.
    const Footprint all = footprint(chain);
    EXPECT_LE(all.bytes - bytes_of_one, snapshots * 4096);
    // The last is shaped as if it had been written at once: no trace of ten thousand ancestors.
    const Delta at_once = built_from(test, model);
    EXPECT_EQ(footprint({live}).nodes, footprint({at_once}).nodes);
    EXPECT_EQ(must(live.persist(test.store())), must(at_once.persist(test.store())));
    // Nor did they change: the first still holds what it held.
    EXPECT_EQ(chain.front().leaves(), kVolumeLeaves / 5);
    EXPECT_EQ(must(chain.front().find(test.store(), 5))->size(), 1U);
}

TEST(Delta, AnUnsharedDeltaIsChangedInPlace) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    Delta delta;
    for (uint64_t leaf = 0; leaf < 1000; ++leaf) {
        must(delta.set(test.store(), leaf, {chunks[leaf % 30]}));
    }
    std::vector<const void*> before;
    delta.visit_resident([&](const void* node, size_t) { before.push_back(node); });
    must(delta.set(test.store(), 500, {chunks[7]}));
    std::vector<const void*> after;
    delta.visit_resident([&](const void* node, size_t) { after.push_back(node); });
    ASSERT_EQ(before.size(), after.size());
    size_t different = 0;
    for (size_t i = 0; i < before.size(); ++i) {
        different += before[i] != after[i] ? 1 : 0;
    }
    EXPECT_LE(different, 1U) << "the list of extents of the one leaf";
}

TEST(Delta, AFailedChangeChangesNothing) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    Model model;
    for (uint64_t leaf = 0; leaf < 200; ++leaf) {
        model[leaf * 3] = {chunks[leaf % 30]};
    }
    const NodeRef name = must(built_from(test, model).persist(test.store()));
    Delta delta = must(Delta::load(test.store(), name));
    const Delta before = delta;
    test.store().fail_reads = true;
    EXPECT_FALSE(delta.set(test.store(), 300, {chunks[0]}));
    EXPECT_FALSE(delta.erase_from(test.store(), 300));
    test.store().fail_reads = false;
    EXPECT_TRUE(delta.same_version(before));

    // When the extents shrink to a bucket's worth, siblings are read that no look-up had read.
    must(delta.erase_from(test.store(), 66 * 3));
    ASSERT_EQ(delta.extents(), kBucketExtents + 2U);
    const NodeRef sixty_six = must(delta.persist(test.store()));
    delta = Delta();
    delta = must(Delta::load(test.store(), sixty_six));
    must(delta.set(test.store(), 0, {}));
    test.store().fail_reads = true;
    EXPECT_FALSE(delta.set(test.store(), 3, {}));
    test.store().fail_reads = false;
    model.erase(model.lower_bound(66 * 3), model.end());
    model.erase(0);
    expect_equal(test, delta, model);
    must(delta.set(test.store(), 3, {}));
    model.erase(3);
    expect_equal(test, delta, model);

    test.store().fail_appends = true;
    EXPECT_FALSE(delta.persist(test.store()));
    test.store().fail_appends = false;
    EXPECT_EQ(must(delta.persist(test.store())),
              must(built_from(test, model).persist(test.store())));
}

TEST(Delta, NodesThatLieAreRefused) {
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    const auto stored = [&](const EncodedNode& node) {
        nebula::WriteBatch batch;
        batch.add_object(node.id, node.content, node.aux);
        must(test.store().append(batch));
        return NodeRef{node.id, std::nullopt};
    };
    // A root that promises more below than there is.
    const Extents one{chunks[0]};
    const NodeRef bucket = stored(encode_delta_bucket(kTreeLevels - 1, {{3, &one}}));
    DeltaChildren children;
    children.present = 1;
    children.children = {{bucket, 80, 80}};
    const Delta liar = must(Delta::load(test.store(), stored(encode_delta_inner(5, children))));
    const auto found = liar.find(test.store(), 3);
    ASSERT_FALSE(found);
    EXPECT_EQ(found.error().code(), ErrorCode::kCorrupt);
    EXPECT_NE(found.error().message().find(bucket.id.hex()), std::string::npos);

    // A node of another level, of another kind, and one that is not there.
    EXPECT_FALSE(Delta::load(test.store(), bucket));
    EXPECT_FALSE(Delta::load(test.store(), stored(encode_tree_leaf(one))));
    const auto missing = Delta::load(test.store(), {chunks[9].id, std::nullopt});
    ASSERT_FALSE(missing);
    EXPECT_EQ(missing.error().code(), ErrorCode::kCorrupt);
    const Delta nowhere = Delta::from_name(test.store(), {chunks[9].id, std::nullopt}, 1, 1);
    EXPECT_FALSE(nowhere.find(test.store(), 1));
}

TEST(Delta, AWriterDisturbsNeitherReadersNorAPersistOfItsCopies) {
    // For the thread sanitizer: each copy is used by one thread while the original is written.
    TestStore test;
    const std::vector<Extent> chunks = imaginary_chunks(30);
    constexpr uint64_t kLeaves = 300;
    Delta live;
    for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
        must(live.set(test.store(), leaf, {chunks[0]}));
    }
    for (uint16_t round = 1; round <= 12; ++round) {
        const auto check = [&test, &chunks](const Delta& copy, uint16_t expected) {
            for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
                const auto found = must(copy.find(test.store(), leaf));
                ASSERT_NE(found, nullptr);
                ASSERT_EQ(found->front().id, chunks[expected].id);
            }
        };
        const auto before = static_cast<uint16_t>(round - 1);
        std::thread reader([check, before, copy = live] { check(copy, before); });
        std::thread persister([check, before, &test, copy = live] {
            const NodeRef name = must(copy.persist(test.store()));
            check(must(Delta::load(test.store(), name)), before);
        });
        for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
            must(live.set(test.store(), leaf, {chunks[round]}));
        }
        reader.join();
        persister.join();
        check(live, round);
    }
    // Many readers of one unread delta load its nodes at the same time.
    const NodeRef name = must(live.persist(test.store()));
    const uint64_t leaves = live.leaves();
    const uint64_t extents = live.extents();
    live = Delta();
    const Delta unread = Delta::from_name(test.store(), name, leaves, extents);
    std::vector<std::thread> readers;
    for (int i = 0; i < 4; ++i) {
        readers.emplace_back([&unread, &test, &chunks] {
            for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
                ASSERT_EQ(must(unread.find(test.store(), leaf))->front().id, chunks[12].id);
            }
        });
    }
    for (std::thread& thread : readers) {
        thread.join();
    }
}

}  // namespace
}  // namespace stellarium::nova
