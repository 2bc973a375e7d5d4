// The bytes of tree and delta nodes: docs/formats/tree.md, as structs, encoders and decoders.
//
// Every node has exactly one encoding: encoding is a function of content, and decoding refuses
// whatever the encoder would not have written. So a node's id names its content and not merely one
// way to write it, and hostile bytes are refused before anything uses them.
//
//     EncodedNode leaf = encode_tree_leaf(extents);          // content, aux, id
//     batch.add_object(leaf.id, leaf.content, leaf.aux);
//     STELLARIUM_ASSIGN(ExtentTable table, decode_tree_leaf(object.content, object.aux));
//     STELLARIUM_ASSIGN(Extents extents, resolve_extents(store, std::move(table)));
//
// Thread rule: all functions are pure, but for resolve_extents, which asks the store.
// Errors: kCorrupt (kUnsupported for a newer version) saying what is wrong and at which byte; the
// caller adds which node it was. Hints (aux) are never an error: what cannot be one is dropped.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/hash.h"
#include "nebula/store.h"
#include "nebula/types.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// The first four bytes of a node, as text "SLTL" and so on.
enum class NodeMagic : uint32_t {
    kTreeLeaf = 0x4c544c53,     // SLTL
    kTreeInner = 0x49544c53,    // SLTI
    kDeltaLeaf = 0x4c444c53,    // SLDL
    kDeltaInner = 0x49444c53,   // SLDI
    kDeltaBucket = 0x42444c53,  // SLDB
};

inline constexpr uint8_t kNodeVersion = 1;
/// A delta subtree with at most this many extents is one bucket node, whatever its height; with
/// more it is an inner node. A bucket is rewritten whole, so more would cost more for each write to
/// a big delta; fewer would cost a path of nodes for a small one.
inline constexpr uint32_t kBucketExtents = 64;

struct NodeHeader {
    U32Le magic;
    U8 version;
    U8 level;       ///< 0: covers one leaf; n: covers 64^n leaves.
    U16Le entries;  ///< Extents of a leaf, children of an inner node, leaves of a bucket.
};
static_assert(sizeof(NodeHeader) == 8);

/// An extent in 32 bits: first page (9), pages - 1 (9), first page in chunk (4), ordinal in the
/// table of chunks (9), hole (1), from the highest bit down.
struct ExtentEntry {
    U32Le bits;
};
static_assert(sizeof(ExtentEntry) == 4);

struct InnerHeader {
    NodeHeader node;
    U64Le present;  ///< Bit i: child i is there.
};
static_assert(sizeof(InnerHeader) == 16);

struct DeltaChild {
    Hash256 id;
    U32Le leaves;   ///< With extents, below this child.
    U40Le extents;  ///< Below this child.
};
static_assert(sizeof(DeltaChild) == 41);

struct BucketLeaf {
    U32Le leaf;     ///< Relative to the first leaf that the bucket covers.
    U16Le extents;  ///< How many of the entries that follow are this leaf's.
};
static_assert(sizeof(BucketLeaf) == 6);

/// Largest node: a leaf whose every page is an extent of a chunk of its own.
inline constexpr size_t kMaxNodeBytes =
    sizeof(NodeHeader) + kPagesPerLeaf * (sizeof(ExtentEntry) + sizeof(ChunkId));

struct EncodedNode {
    Hash256 id;
    std::vector<std::byte> content;
    std::vector<std::byte> aux;
};

/// Decoded extents whose chunks have not been looked up yet. The hints are unverified.
struct ExtentTable {
    Extents extents;                 ///< Without addresses.
    std::vector<uint16_t> ordinals;  ///< For each extent, its chunk below; unused for holes.
    std::vector<ChunkId> chunks;
    std::vector<std::optional<nebula::PageAddress>> hints;  ///< One for each chunk.
};

/// Children of an inner node; bit i of `present` tells whether child i is there.
struct TreeChildren {
    uint64_t present = 0;
    std::vector<NodeRef> children;
};

struct DeltaChildRef {
    NodeRef ref;
    uint64_t leaves = 0;
    uint64_t extents = 0;
};
struct DeltaChildren {
    uint64_t present = 0;
    std::vector<DeltaChildRef> children;
};

/// Leaves of a bucket, as (leaf relative to the bucket's first, number of extents), in the order of
/// the extents in `table`.
struct BucketTable {
    std::vector<std::pair<uint64_t, uint32_t>> leaves;
    ExtentTable table;
};

/// Extents are canonical and not empty; `chunk_address` becomes the hint.
EncodedNode encode_tree_leaf(const Extents& extents);
EncodedNode encode_delta_leaf(const Extents& extents);
/// `level` is 1 to kTreeLevels; at least one child; none is the empty node.
EncodedNode encode_tree_inner(uint32_t level, const TreeChildren& children);
EncodedNode encode_delta_inner(uint32_t level, const DeltaChildren& children);
/// Leaves ascend, relative to the bucket's first; at most kBucketExtents extents in all.
EncodedNode encode_delta_bucket(uint32_t level,
                                const std::vector<std::pair<uint64_t, const Extents*>>& leaves);

Result<ExtentTable> decode_tree_leaf(Bytes content, Bytes aux);
Result<TreeChildren> decode_tree_inner(Bytes content, Bytes aux, uint32_t level);
Result<ExtentTable> decode_delta_leaf(Bytes content, Bytes aux);
Result<DeltaChildren> decode_delta_inner(Bytes content, Bytes aux, uint32_t level);
Result<BucketTable> decode_delta_bucket(Bytes content, Bytes aux, uint32_t level);

/// Which kind of node the bytes claim to be; nullopt for none.
std::optional<NodeMagic> node_magic(Bytes content);

/// Looks up every chunk, each once, hint first. An extent whose chunk cannot be resolved keeps no
/// address, so that damage of one chunk hides no other; one that reaches beyond its chunk's end is
/// kCorrupt.
Result<Extents> resolve_extents(nebula::Store& store, ExtentTable table);

/// The node in words, one line for each entry, for `stellarctl dump`: any bytes, also damaged.
std::string describe_node(Bytes content, Bytes aux);

}  // namespace stellarium::nova
