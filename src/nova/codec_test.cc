#include "nova/codec.h"

#include <bit>
#include <cstddef>
#include <fstream>
#include <random>
#include <sstream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "nova/testing/page_model.h"
#include "nova/testing/test_store.h"

namespace stellarium::nova {
namespace {

using testing::extents_of;
using testing::hole;
using testing::imaginary_chunks;
using testing::RandomMaps;

std::string hex_of(Bytes bytes) {
    std::string text;
    for (const std::byte b : bytes) {
        text += fmt::format("{:02x}", static_cast<unsigned>(b));
    }
    return text;
}

ChunkId filled_id(uint8_t value) {
    ChunkId id;
    id.bytes.fill(value);
    return id;
}

Extent mapped(uint32_t first_page, uint32_t pages, uint32_t first_in_chunk, uint8_t chunk) {
    Extent extent;
    extent.first_page = static_cast<uint16_t>(first_page);
    extent.pages = static_cast<uint16_t>(pages);
    extent.first_in_chunk = static_cast<uint8_t>(first_in_chunk);
    extent.id = filled_id(chunk);
    extent.chunk_address = nebula::PageAddress::make(chunk, 16);
    return extent;
}

/// A chunk with a page overwritten, and a chunk at the very end.
Extents golden_extents() {
    return {mapped(0, 7, 0, 0xaa), mapped(7, 1, 0, 0xbb), mapped(8, 8, 8, 0xaa),
            mapped(511, 1, 3, 0xcc)};
}

struct AnyNode {
    NodeMagic magic;
    uint32_t level;
    EncodedNode node;
};

std::vector<AnyNode> golden_nodes() {
    const Extents extents = golden_extents();
    const Extents with_hole{mapped(2, 3, 1, 0xaa), hole(5, 507)};
    std::vector<AnyNode> nodes;
    nodes.push_back({NodeMagic::kTreeLeaf, 0, encode_tree_leaf(extents)});
    TreeChildren children;
    children.present = uint64_t{1} << 63 | 1;
    children.children = {{filled_id(0x11), nebula::PageAddress::make(1, 2)},
                         {filled_id(0x22), std::nullopt}};
    nodes.push_back({NodeMagic::kTreeInner, 5, encode_tree_inner(5, children)});
    nodes.push_back({NodeMagic::kDeltaLeaf, 0, encode_delta_leaf(with_hole)});
    DeltaChildren delta_children;
    delta_children.present = 0x6;
    delta_children.children = {{{filled_id(0x33), std::nullopt}, 1, 60},
                               {{filled_id(0x44), std::nullopt}, 3, 500}};
    nodes.push_back({NodeMagic::kDeltaInner, 2, encode_delta_inner(2, delta_children)});
    nodes.push_back({NodeMagic::kDeltaBucket, 5,
                     encode_delta_bucket(5, {{3, &extents}, {1'000'000'000, &with_hole}})});
    return nodes;
}

struct Golden {
    const char* content;
    const char* aux;
    const char* id;
};

// Changing any of these makes every stored volume unreadable, or names its content differently: a
// new version of the format is needed instead.
const Golden kGolden[] = {
    {"534c544c01000400008001000200800300e00104040c80ffaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
     "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
     "bbbbbbbbbbbbbbbbcccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
     "10802a000010c02e00001000330000",
     "bfe573dd512f189ea0d8da92d406875539acd2d0a36de335f1e7005d0e68d85d"},
    {"534c5449010502000100000000000080111111111111111111111111111111111111111111111111"
     "11111111111111112222222222222222222222222222222222222222222222222222222222222222",
     "02400000000000000000", "e95243f14d583a723d57a36286025295b3198390f187838e05ca5f941a6a4f67"},
    {"534c444c01000200008400010180fe02aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
     "aaaaaaaaaaaaaaaa",
     "10802a0000", "6ca2ffd7d608a06dee1dceba1fa5a987c2ee68b81a26b097d52f64c9a6a0429e"},
    {"534c4449010202000600000000000000333333333333333333333333333333333333333333333333"
     "3333333333333333010000003c000000004444444444444444444444444444444444444444444444"
     "44444444444444444403000000f401000000",
     "00000000000000000000", "5d8cea80620fad05e0368ac5f5ca50fb9fd284704669638daf0c66148f8103cd"},
    {"534c44420105020003000000040000ca9a3b0200008001000200800300e00104040c80ff00840001"
     "0180fe02aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabbbbbbbb"
     "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbcccccccccccccccccccccccc"
     "cccccccccccccccccccccccccccccccccccccccc",
     "10802a000010c02e00001000330000",
     "8e75faece301dcdf6a1e2dbeff2802f26c7168fedf05a983223e586c684ba066"},
};

TEST(NodeFormat, GoldenBytesAndIdsNeverChange) {
    const std::vector<AnyNode> nodes = golden_nodes();
    ASSERT_EQ(nodes.size(), std::size(kGolden));
    for (size_t i = 0; i < nodes.size(); ++i) {
        const EncodedNode& node = nodes[i].node;
        EXPECT_EQ(hex_of(node.content), kGolden[i].content) << "node " << i;
        EXPECT_EQ(hex_of(node.aux), kGolden[i].aux) << "node " << i;
        EXPECT_EQ(node.id.hex(), kGolden[i].id) << "node " << i;
        EXPECT_EQ(hash(node.content), node.id);
    }
}

/// Decodes as what the magic says and encodes the result again; the error when it is refused.
Result<EncodedNode> recode(uint32_t level, Bytes content, Bytes aux) {
    const auto leaf_hints = [](ExtentTable& table) {
        for (size_t i = 0; i < table.extents.size(); ++i) {
            if (!table.extents[i].hole) {
                table.extents[i].chunk_address = table.hints[table.ordinals[i]];
            }
        }
    };
    switch (node_magic(content).value_or(NodeMagic::kTreeLeaf)) {
        case NodeMagic::kTreeLeaf: {
            STELLARIUM_ASSIGN(ExtentTable table, decode_tree_leaf(content, aux));
            leaf_hints(table);
            return encode_tree_leaf(table.extents);
        }
        case NodeMagic::kDeltaLeaf: {
            STELLARIUM_ASSIGN(ExtentTable table, decode_delta_leaf(content, aux));
            leaf_hints(table);
            return encode_delta_leaf(table.extents);
        }
        case NodeMagic::kTreeInner: {
            STELLARIUM_ASSIGN(const TreeChildren children, decode_tree_inner(content, aux, level));
            return encode_tree_inner(level, children);
        }
        case NodeMagic::kDeltaInner: {
            STELLARIUM_ASSIGN(const DeltaChildren children,
                              decode_delta_inner(content, aux, level));
            return encode_delta_inner(level, children);
        }
        case NodeMagic::kDeltaBucket: {
            STELLARIUM_ASSIGN(BucketTable bucket, decode_delta_bucket(content, aux, level));
            leaf_hints(bucket.table);
            std::vector<Extents> lists;
            auto next = bucket.table.extents.begin();
            for (const auto& [leaf, count] : bucket.leaves) {
                lists.emplace_back(next, next + count);
                next += count;
            }
            std::vector<std::pair<uint64_t, const Extents*>> leaves;
            for (size_t i = 0; i < lists.size(); ++i) {
                leaves.emplace_back(bucket.leaves[i].first, &lists[i]);
            }
            return encode_delta_bucket(level, leaves);
        }
    }
    std::abort();
}

TEST(NodeFormat, DecodingInvertsEncoding) {
    for (const AnyNode& any : golden_nodes()) {
        const auto again = recode(any.level, any.node.content, any.node.aux);
        ASSERT_TRUE(again) << again.error().message();
        EXPECT_EQ(again->content, any.node.content);
        EXPECT_EQ(again->aux, any.node.aux);
    }
    const std::vector<Extent> chunks = imaginary_chunks(600);
    for (uint64_t seed = 1; seed <= 300; ++seed) {
        SCOPED_TRACE(fmt::format("seed {}", seed));
        RandomMaps maps(seed, chunks);
        const Extents extents = extents_of(maps.map(1 + maps.below(600), seed % 2 == 0), chunks);
        const EncodedNode node =
            seed % 2 == 0 ? encode_delta_leaf(extents) : encode_tree_leaf(extents);
        ASSERT_LE(node.content.size(), kMaxNodeBytes);
        const auto again = recode(0, node.content, node.aux);
        ASSERT_TRUE(again) << again.error().message();
        ASSERT_EQ(again->id, node.id);
        ASSERT_EQ(again->aux, node.aux);
    }
}

TEST(NodeFormat, WhateverIsAcceptedIsTheOnlyEncodingOfItsContent) {
    // Mutates valid nodes in the ways that rot, truncation and malice do. Each result is refused,
    // or is what the encoder itself would have written; nothing crashes or reads out of bounds.
    std::vector<AnyNode> nodes = golden_nodes();
    const std::vector<Extent> chunks = imaginary_chunks(40);
    for (uint64_t seed = 1; seed <= 4; ++seed) {
        RandomMaps maps(seed, chunks);
        const Extents extents = extents_of(maps.map(40, true), chunks);
        nodes.push_back({NodeMagic::kDeltaLeaf, 0, encode_delta_leaf(extents)});
        nodes.push_back(
            {NodeMagic::kTreeLeaf, 0, encode_tree_leaf(extents_of(maps.map(40, false), chunks))});
    }
    uint64_t accepted = 0;
    uint64_t refused = 0;
    std::mt19937_64 random(7);
    for (int round = 0; round < 20'000; ++round) {
        const AnyNode& any = nodes[random() % nodes.size()];
        std::vector<std::byte> content = any.node.content;
        std::vector<std::byte> aux = any.node.aux;
        for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
            // Most edits near the front, where the structure is.
            const size_t range =
                random() % 2 == 0 ? std::min<size_t>(content.size(), 64) : content.size();
            const auto at = static_cast<std::ptrdiff_t>(range == 0 ? 0 : random() % range);
            switch (random() % 6) {
                case 0:
                    if (!content.empty()) {
                        content[static_cast<size_t>(at)] ^= std::byte{1} << (random() % 8);
                    }
                    break;
                case 1:
                    if (!content.empty()) {
                        content[static_cast<size_t>(at)] = static_cast<std::byte>(random());
                    }
                    break;
                case 2:
                    content.resize(static_cast<size_t>(at));
                    break;
                case 3:
                    content.insert(content.begin() + at, random() % 40, std::byte{0});
                    break;
                case 4:
                    content.erase(
                        content.begin() + at,
                        content.begin() + std::min<std::ptrdiff_t>(at + 4, std::ssize(content)));
                    break;
                default:
                    aux.resize(random() % 64, static_cast<std::byte>(random()));
                    break;
            }
        }
        const auto level = any.level == 0 ? 1 : any.level;
        const auto again = recode(level, content, aux);
        if (again) {
            ++accepted;
            ASSERT_EQ(again->content, content) << "round " << round << ": " << hex_of(content);
        } else {
            ++refused;
            ASSERT_TRUE(again.error().code() == ErrorCode::kCorrupt ||
                        again.error().code() == ErrorCode::kUnsupported);
        }
        ASSERT_FALSE(describe_node(content, aux).empty());
    }
    EXPECT_GT(accepted, 1000U) << "edits of ids and hints alone leave valid nodes";
    EXPECT_GT(refused, 1000U);
}

TEST(NodeFormat, RefusalsSayWhatAndWhere) {
    const EncodedNode leaf = encode_tree_leaf(golden_extents());
    const auto refusal = [](std::vector<std::byte> content) {
        const auto table = decode_tree_leaf(content, {});
        return table ? std::string("accepted") : table.error().message();
    };
    EXPECT_EQ(refusal({}), "tree leaf, byte 0: ends within its header");
    auto changed = leaf.content;
    changed[0] = std::byte{'X'};
    EXPECT_EQ(refusal(changed), "tree leaf, byte 0: magic is 0x4c544c58");
    changed = leaf.content;
    changed[5] = std::byte{1};
    EXPECT_EQ(refusal(changed), "tree leaf, byte 5: level is 1, not 0");
    changed = leaf.content;
    changed[6] = std::byte{0};
    EXPECT_EQ(refusal(changed), "tree leaf, byte 6: has no entries");
    changed = leaf.content;
    changed.pop_back();
    EXPECT_EQ(refusal(changed), "tree leaf, byte 24: 95 bytes of chunk ids for 3 chunks");
    changed = leaf.content;
    changed[4] = std::byte{2};
    const auto newer = decode_tree_leaf(changed, {});
    ASSERT_FALSE(newer);
    EXPECT_EQ(newer.error().code(), ErrorCode::kUnsupported);

    // Counts of children that cannot be, a delta that hides how much is below it.
    DeltaChildren children;
    children.present = 1;
    children.children = {{{filled_id(1), std::nullopt}, 1, 600}};
    const auto counts = encode_delta_inner(1, children);
    EXPECT_FALSE(decode_delta_inner(counts.content, counts.aux, 1));
    children.children[0].extents = kBucketExtents;
    const auto small = encode_delta_inner(1, children);
    EXPECT_FALSE(decode_delta_inner(small.content, small.aux, 1)) << "should be a bucket";
}

TEST(NodeFormat, HintsAreNeverTrusted) {
    const EncodedNode leaf = encode_tree_leaf(golden_extents());
    ASSERT_EQ(leaf.aux.size(), 15U);
    auto all_ones = leaf.aux;
    std::fill(all_ones.begin(), all_ones.end(), std::byte{0xff});
    for (const auto& aux : {std::vector<std::byte>{}, std::vector<std::byte>(14), all_ones}) {
        const auto table = decode_tree_leaf(leaf.content, aux);
        ASSERT_TRUE(table);
        for (const auto& hint : table->hints) {
            EXPECT_FALSE(hint);
        }
    }
    const auto table = decode_tree_leaf(leaf.content, leaf.aux);
    ASSERT_TRUE(table);
    ASSERT_EQ(table->hints.size(), 3U);
    EXPECT_EQ(table->hints[1], nebula::PageAddress::make(0xbb, 16));
    EXPECT_FALSE(table->extents[0].chunk_address) << "a hint is not an address";
}

TEST(NodeFormat, ResolvingAsksForEachChunkOnceAndKeepsDamageApart) {
    testing::TestStore test;
    const Extent present = test.add_chunk(1, 16);
    const Extent other = test.add_chunk(2, 1);
    Extents extents = overlay({{present}}, {{testing::placed(other, 4)}}, false);
    extents.push_back(mapped(100, 2, 0, 0xdd));  // In no store.
    const EncodedNode leaf = encode_tree_leaf(extents);
    test.store().chunks_resolved = 0;
    const Extents resolved = testing::must(
        resolve_extents(test.store(), testing::must(decode_tree_leaf(leaf.content, leaf.aux))));
    EXPECT_EQ(test.store().chunks_resolved, 3U);
    ASSERT_EQ(resolved.size(), 4U);
    EXPECT_EQ(resolved[0].chunk_address, present.chunk_address);
    EXPECT_EQ(resolved[1].chunk_address, other.chunk_address);
    EXPECT_EQ(resolved[2].chunk_address, present.chunk_address);
    EXPECT_FALSE(resolved[3].chunk_address);

    // A leaf that claims pages its chunk does not have.
    Extent beyond = testing::placed(other, 0);
    beyond.pages = 2;
    const EncodedNode lie = encode_tree_leaf({beyond});
    const auto refused =
        resolve_extents(test.store(), testing::must(decode_tree_leaf(lie.content, lie.aux)));
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kCorrupt);
}

TEST(NodeFormat, DescriptionsNameEveryEntry) {
    std::string all;
    for (const AnyNode& any : golden_nodes()) {
        all += describe_node(any.node.content, any.node.aux);
    }
    EXPECT_NE(all.find("tree leaf, version 1, level 0, 4 entries"), std::string::npos);
    EXPECT_NE(all.find("pages   8 to  15: chunk aaaa"), std::string::npos);
    EXPECT_NE(all.find("child 63: 2222"), std::string::npos);
    EXPECT_NE(all.find("(3 leaves, 500 extents)"), std::string::npos);
    EXPECT_NE(all.find("leaf 1000000000:\n  pages   2 to   4"), std::string::npos);
    EXPECT_NE(describe_node({}, {}).find("no node"), std::string::npos);
}

}  // namespace
}  // namespace stellarium::nova
