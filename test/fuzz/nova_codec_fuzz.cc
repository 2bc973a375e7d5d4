// The nodes of trees and deltas: every node has one encoding, so whatever a decoder accepts is what
// the encoder writes, hints included.
//
// Input: which node; its level; how many bytes its content has; content; the rest is aux.
#include <utility>

#include "nova/codec.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace nova;  // NOLINT(google-build-using-namespace)
using nebula::PageAddress;

constexpr uint32_t kKinds = 5;
/// In the order of NodeMagic.
constexpr std::array kMagics = {NodeMagic::kTreeLeaf, NodeMagic::kTreeInner, NodeMagic::kDeltaLeaf,
                                NodeMagic::kDeltaInner, NodeMagic::kDeltaBucket};

/// The extents with the hints as addresses, which is what an encoder takes hints from.
Extents with_hints(const ExtentTable& table) {
    Extents extents = table.extents;
    for (size_t i = 0; i < extents.size(); ++i) {
        if (!extents[i].hole) {
            extents[i].chunk_address = table.hints.at(table.ordinals.at(i));
        }
    }
    return extents;
}

void check_table(const ExtentTable& table) {
    require(
        table.ordinals.size() == table.extents.size() && table.hints.size() == table.chunks.size(),
        "a table has an ordinal for each extent and a hint for each chunk");
    for (size_t i = 0; i < table.extents.size(); ++i) {
        const Extent& extent = table.extents[i];
        require(extent.end_page() <= kPagesPerLeaf, "an extent lies within its leaf");
        require(extent.hole || (table.ordinals[i] < table.chunks.size() &&
                                extent.first_in_chunk + extent.pages <= nebula::kMaxChunkPages &&
                                extent.id == table.chunks[table.ordinals[i]]),
                "an extent lies within its chunk, and knows it");
    }
}

void check_same(const EncodedNode& again, Bytes content) {
    require(equal(again.content, content), "a node that was decoded is encoded as the same bytes");
    require(again.id == hash(content), "a node is named by the hash of its bytes");
}

void leaf(NodeMagic magic, Bytes content, Bytes aux) {
    const bool tree = magic == NodeMagic::kTreeLeaf;
    const auto decode = [tree](Bytes node, Bytes hints) {
        return tree ? decode_tree_leaf(node, hints) : decode_delta_leaf(node, hints);
    };
    const auto table = decode(content, aux);
    if (!table) {
        return;
    }
    check_table(*table);
    require(is_canonical(table->extents, !tree), "a leaf that was decoded is canonical");
    const Extents extents = with_hints(*table);
    const EncodedNode again = tree ? encode_tree_leaf(extents) : encode_delta_leaf(extents);
    check_same(again, content);
    const auto decoded = decode(again.content, again.aux);
    require(decoded && decoded->hints == table->hints, "hints survive");
}

void bucket(Bytes content, Bytes aux, uint32_t level) {
    const auto table = decode_delta_bucket(content, aux, level);
    if (!table) {
        return;
    }
    check_table(table->table);
    const Extents all = with_hints(table->table);
    require(all.size() <= kBucketExtents, "a bucket holds few extents");
    std::vector<Extents> parts;
    size_t at = 0;
    for (const auto& [number, count] : table->leaves) {
        require(count > 0 && count <= all.size() - at, "the leaves of a bucket share its extents");
        parts.emplace_back(all.begin() + static_cast<std::ptrdiff_t>(at),
                           all.begin() + static_cast<std::ptrdiff_t>(at + count));
        require(is_canonical(parts.back(), true), "each leaf of a bucket is canonical");
        at += count;
    }
    require(at == all.size(), "the leaves of a bucket have all of its extents");
    std::vector<std::pair<uint64_t, const Extents*>> leaves;
    for (size_t i = 0; i < parts.size(); ++i) {
        leaves.emplace_back(table->leaves[i].first, &parts[i]);
    }
    const EncodedNode again = encode_delta_bucket(level, leaves);
    check_same(again, content);
    const auto decoded = decode_delta_bucket(again.content, again.aux, level);
    require(decoded && decoded->table.hints == table->table.hints, "hints survive");
}

void tree_inner(Bytes content, Bytes aux, uint32_t level) {
    const auto children = decode_tree_inner(content, aux, level);
    if (!children) {
        return;
    }
    const EncodedNode again = encode_tree_inner(level, *children);
    check_same(again, content);
    const auto decoded = must(decode_tree_inner(again.content, again.aux, level));
    for (size_t i = 0; i < decoded.children.size(); ++i) {
        require(decoded.children[i].hint == children->children[i].hint, "hints survive");
    }
}

void delta_inner(Bytes content, Bytes aux, uint32_t level) {
    const auto children = decode_delta_inner(content, aux, level);
    if (!children) {
        return;
    }
    uint64_t extents = 0;
    for (const DeltaChildRef& child : children->children) {
        require(child.leaves > 0 && child.extents >= child.leaves, "a child counts what it has");
        extents += child.extents;
    }
    require(extents > kBucketExtents, "what would fit a bucket is no inner node");
    const EncodedNode again = encode_delta_inner(level, *children);
    check_same(again, content);
    const auto decoded = must(decode_delta_inner(again.content, again.aux, level));
    for (size_t i = 0; i < decoded.children.size(); ++i) {
        require(decoded.children[i].ref.hint == children->children[i].ref.hint, "hints survive");
    }
}

ChunkId id_of(uint64_t number) {
    return hash(bytes_of(U64Le(number)));
}

Extent extent(uint16_t first_page, uint16_t pages, uint64_t chunk, uint8_t first_in_chunk = 0) {
    Extent out;
    out.first_page = first_page;
    out.pages = pages;
    out.first_in_chunk = first_in_chunk;
    out.id = id_of(chunk);
    out.chunk_address = PageAddress::make(1, static_cast<uint32_t>(chunk * 16));
    return out;
}

Extent hole(uint16_t first_page, uint16_t pages) {
    Extent out;
    out.first_page = first_page;
    out.pages = pages;
    out.hole = true;
    return out;
}

void add_seed(std::vector<Input>& out, unsigned kind, uint32_t level, const EncodedNode& node) {
    Input input;
    append_byte(input, kind);
    append_byte(input, level);
    append_number(input, static_cast<uint16_t>(node.content.size()));
    append(input, node.content);
    append(input, node.aux);
    out.push_back(std::move(input));
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    const Extents mapped = {extent(0, 16, 1), extent(16, 4, 2, 3), extent(100, 1, 1, 5)};
    const Extents mixed = {extent(3, 2, 4), hole(5, 500), extent(511, 1, 2)};
    add_seed(out, 0, 0, encode_tree_leaf(mapped));
    add_seed(out, 2, 0, encode_delta_leaf(mixed));
    TreeChildren children{.present = 0b1010, .children = {}};
    children.children.push_back({.id = id_of(1), .hint = PageAddress::make(1, 7)});
    children.children.push_back({.id = id_of(2), .hint = std::nullopt});
    DeltaChildren deltas{.present = 0b11, .children = {}};
    deltas.children.push_back({.ref = children.children[0], .leaves = 2, .extents = 40});
    deltas.children.push_back({.ref = children.children[1], .leaves = 1, .extents = 41});
    for (const uint32_t level : {1U, kTreeLevels}) {
        add_seed(out, 1, level, encode_tree_inner(level, children));
        add_seed(out, 3, level, encode_delta_inner(level, deltas));
        add_seed(out, 4, level, encode_delta_bucket(level, {{0, &mapped}, {63, &mixed}}));
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    Feed feed(data, size);
    const uint32_t kind = feed.below(kKinds);
    const uint32_t level = 1 + (feed.u8() + kTreeLevels - 1) % kTreeLevels;
    const stellarium::Bytes content = feed.bytes(feed.u16());
    const stellarium::Bytes aux = feed.rest();
    switch (kMagics.at(kind)) {
        case NodeMagic::kTreeLeaf:
        case NodeMagic::kDeltaLeaf:
            leaf(kMagics.at(kind), content, aux);
            break;
        case NodeMagic::kTreeInner:
            tree_inner(content, aux, level);
            break;
        case NodeMagic::kDeltaInner:
            delta_inner(content, aux, level);
            break;
        case NodeMagic::kDeltaBucket:
            bucket(content, aux, level);
            break;
    }
    require(!describe_node(content, aux).empty(), "any bytes can be described");
    return 0;
}
