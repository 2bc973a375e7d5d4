#include "nova/codec.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>

#include <fmt/format.h>

namespace stellarium::nova {

namespace {

using nebula::PageAddress;

constexpr uint32_t kHoleBit = 1;
constexpr uint32_t kOrdinalShift = 1;
constexpr uint32_t kOrdinalMask = 0x1ff;
constexpr uint32_t kFirstInChunkShift = 10;
constexpr uint32_t kFirstInChunkMask = 0xf;
constexpr uint32_t kPagesShift = 14;
constexpr uint32_t kPagesMask = 0x1ff;
constexpr uint32_t kFirstPageShift = 23;
constexpr uint32_t kFirstPageMask = 0x1ff;
static_assert(kPagesPerLeaf - 1 == kFirstPageMask && kPagesPerLeaf - 1 == kPagesMask);
static_assert(nebula::kMaxChunkPages - 1 == kFirstInChunkMask);
static_assert(kPagesPerLeaf - 1 == kOrdinalMask, "a leaf has at most one chunk a page");
static_assert(kBucketExtents <= kPagesPerLeaf, "ordinals of a bucket fit too");

/// Writes values one after another into a vector sized beforehand.
class Writer {
  public:
    explicit Writer(size_t size) : bytes_(size) {}
    template <typename T>
    void put(const T& value) {
        static_assert(std::is_trivially_copyable_v<T> && alignof(T) == 1);
        assert(used_ + sizeof(T) <= bytes_.size());
        std::memcpy(bytes_.data() + used_, &value, sizeof(T));
        used_ += sizeof(T);
    }
    std::vector<std::byte> take() {
        assert(used_ == bytes_.size());
        return std::move(bytes_);
    }

  private:
    std::vector<std::byte> bytes_;
    size_t used_ = 0;
};

/// Reads values one after another; the caller checks remaining() first.
class Reader {
  public:
    explicit Reader(Bytes bytes) : bytes_(bytes) {}
    size_t offset() const { return used_; }
    size_t remaining() const { return bytes_.size() - used_; }
    template <typename T>
    T get() {
        assert(remaining() >= sizeof(T));
        T value = load<T>(bytes_.subspan(used_));
        used_ += sizeof(T);
        return value;
    }

  private:
    Bytes bytes_;
    size_t used_ = 0;
};

/// Numbers distinct chunk ids in the order in which they come: at most kPagesPerLeaf of them.
/// Open addressing; ids are uniformly distributed, and a hostile set costs kPagesPerLeaf compares.
class ChunkNumbers {
  public:
    /// The ordinal of `id`, and whether it is new.
    std::pair<uint16_t, bool> number(const ChunkId& id, std::vector<ChunkId>& chunks) {
        size_t slot = static_cast<size_t>(id.prefix()) % slots_.size();
        while (slots_[slot] != 0) {
            const uint16_t ordinal = static_cast<uint16_t>(slots_[slot] - 1);
            if (chunks[ordinal] == id) {
                return {ordinal, false};
            }
            slot = (slot + 1) % slots_.size();
        }
        chunks.push_back(id);
        slots_[slot] = static_cast<uint16_t>(chunks.size());
        return {static_cast<uint16_t>(chunks.size() - 1), true};
    }

  private:
    std::array<uint16_t, size_t{4} * kPagesPerLeaf> slots_{};  // Ordinal + 1; 0 is free.
};

U32Le magic_of(NodeMagic magic) {
    return static_cast<uint32_t>(magic);
}

std::string_view kind_name(NodeMagic magic) {
    switch (magic) {
        case NodeMagic::kTreeLeaf:
            return "tree leaf";
        case NodeMagic::kTreeInner:
            return "tree inner node";
        case NodeMagic::kDeltaLeaf:
            return "delta leaf";
        case NodeMagic::kDeltaInner:
            return "delta inner node";
        case NodeMagic::kDeltaBucket:
            return "delta bucket";
    }
    return "unknown node";
}

U40Le hint_bytes(const std::optional<PageAddress>& hint) {
    return hint ? hint->value() : 0;
}

/// Hints are outside the hash: anything may stand there.
std::optional<PageAddress> checked_hint(uint64_t value) {
    if (value == 0 || value >> PageAddress::kPageBits > PageAddress::kMaxSegment) {
        return std::nullopt;
    }
    return PageAddress(value);
}

/// `count` hints from `aux`; none when its length does not fit.
std::vector<std::optional<PageAddress>> decode_hints(Bytes aux, size_t count) {
    std::vector<std::optional<PageAddress>> hints(count);
    if (aux.size() == count * sizeof(U40Le)) {
        Reader reader(aux);
        for (auto& hint : hints) {
            hint = checked_hint(reader.get<U40Le>());
        }
    }
    return hints;
}

std::unexpected<Error> bad(NodeMagic magic, size_t offset, std::string_view reason) {
    return fail(ErrorCode::kCorrupt,
                fmt::format("{}, byte {}: {}", kind_name(magic), offset, reason));
}

/// Entries and table of chunks of one or more lists of extents.
class ExtentEncoder {
  public:
    void add(const Extent& extent) {
        uint32_t bits = uint32_t{extent.first_page} << kFirstPageShift |
                        (uint32_t{extent.pages} - 1) << kPagesShift;
        if (extent.hole) {
            bits |= kHoleBit;
        } else {
            const auto [ordinal, is_new] = numbers_.number(extent.id, chunks_);
            if (is_new) {
                hints_.push_back(extent.chunk_address);
            } else if (!hints_[ordinal]) {
                hints_[ordinal] = extent.chunk_address;
            }
            bits |= uint32_t{extent.first_in_chunk} << kFirstInChunkShift | uint32_t{ordinal}
                                                                                << kOrdinalShift;
        }
        entries_.push_back({bits});
    }
    size_t size_bytes() const {
        return entries_.size() * sizeof(ExtentEntry) + chunks_.size() * sizeof(ChunkId);
    }
    void write(Writer& writer) const {
        for (const ExtentEntry& entry : entries_) {
            writer.put(entry);
        }
        for (const ChunkId& id : chunks_) {
            writer.put(id);
        }
    }
    std::vector<std::byte> aux() const {
        Writer writer(hints_.size() * sizeof(U40Le));
        for (const auto& hint : hints_) {
            writer.put(hint_bytes(hint));
        }
        return writer.take();
    }

  private:
    ChunkNumbers numbers_;
    std::vector<ExtentEntry> entries_;
    std::vector<ChunkId> chunks_;
    std::vector<std::optional<PageAddress>> hints_;
};

EncodedNode finished(std::vector<std::byte> content, std::vector<std::byte> aux) {
    EncodedNode node;
    node.id = hash(content);
    node.content = std::move(content);
    node.aux = std::move(aux);
    return node;
}

EncodedNode encode_leaf(NodeMagic magic, const Extents& extents) {
    assert(!extents.empty() && is_canonical(extents, magic == NodeMagic::kDeltaLeaf));
    ExtentEncoder encoder;
    for (const Extent& extent : extents) {
        encoder.add(extent);
    }
    Writer writer(sizeof(NodeHeader) + encoder.size_bytes());
    writer.put(NodeHeader{magic_of(magic), kNodeVersion, uint8_t{0},
                          static_cast<uint16_t>(extents.size())});
    encoder.write(writer);
    return finished(writer.take(), encoder.aux());
}

Result<NodeHeader> decode_header(Reader& reader, NodeMagic magic, uint32_t level) {
    if (reader.remaining() < sizeof(NodeHeader)) {
        return bad(magic, reader.remaining(), "ends within its header");
    }
    const auto header = reader.get<NodeHeader>();
    if (header.magic != static_cast<uint32_t>(magic)) {
        return bad(magic, 0, fmt::format("magic is 0x{:08x}", header.magic.get()));
    }
    if (header.version != kNodeVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{} of version {}; this program reads version {}", kind_name(magic),
                                header.version.get(), kNodeVersion));
    }
    if (header.level != level) {
        return bad(magic, 5, fmt::format("level is {}, not {}", header.level.get(), level));
    }
    if (header.entries == 0) {
        return bad(magic, 6, "has no entries");
    }
    return header;
}

/// Reads `count` extent entries and then, to the end of the node, their chunks. Checks everything
/// but the order of extents, which depends on where one leaf ends.
Result<ExtentTable> decode_extents(Reader& reader, NodeMagic magic, size_t count) {
    if (reader.remaining() < count * sizeof(ExtentEntry)) {
        return bad(magic, reader.offset() + reader.remaining(), "ends within its extents");
    }
    ExtentTable table;
    table.extents.resize(count);
    table.ordinals.resize(count);
    size_t chunks = 0;
    for (size_t i = 0; i < count; ++i) {
        const size_t offset = reader.offset();
        const uint32_t bits = reader.get<ExtentEntry>().bits;
        Extent& extent = table.extents[i];
        extent.first_page = static_cast<uint16_t>(bits >> kFirstPageShift & kFirstPageMask);
        extent.pages = static_cast<uint16_t>((bits >> kPagesShift & kPagesMask) + 1);
        extent.first_in_chunk =
            static_cast<uint8_t>(bits >> kFirstInChunkShift & kFirstInChunkMask);
        extent.hole = (bits & kHoleBit) != 0;
        const auto ordinal = static_cast<uint16_t>(bits >> kOrdinalShift & kOrdinalMask);
        if (extent.hole) {
            if (ordinal != 0 || extent.first_in_chunk != 0) {
                return bad(magic, offset, "a hole that names a chunk");
            }
            continue;
        }
        // Chunks are numbered in the order of their first use.
        if (ordinal > chunks) {
            return bad(magic, offset, "chunks are not numbered in order of use");
        }
        chunks += ordinal == chunks ? 1 : 0;
        table.ordinals[i] = ordinal;
    }
    if (reader.remaining() != chunks * sizeof(ChunkId)) {
        return bad(magic, reader.offset(),
                   fmt::format("{} bytes of chunk ids for {} chunks", reader.remaining(), chunks));
    }
    table.chunks.reserve(chunks);
    ChunkNumbers numbers;
    for (size_t i = 0; i < chunks; ++i) {
        const size_t offset = reader.offset();
        if (!numbers.number(reader.get<ChunkId>(), table.chunks).second) {
            return bad(magic, offset, "a chunk id stands twice");
        }
    }
    for (size_t i = 0; i < count; ++i) {
        if (!table.extents[i].hole) {
            table.extents[i].id = table.chunks[table.ordinals[i]];
        }
    }
    return table;
}

Result<ExtentTable> decode_leaf(NodeMagic magic, Bytes content, Bytes aux) {
    Reader reader(content);
    STELLARIUM_ASSIGN(const NodeHeader header, decode_header(reader, magic, 0));
    if (header.entries > kPagesPerLeaf) {
        return bad(magic, 6, fmt::format("{} extents", header.entries.get()));
    }
    STELLARIUM_ASSIGN(ExtentTable table, decode_extents(reader, magic, header.entries));
    if (!is_canonical(table.extents, magic == NodeMagic::kDeltaLeaf)) {
        return bad(magic, sizeof(NodeHeader), "extents overlap, or are not in canonical form");
    }
    table.hints = decode_hints(aux, table.chunks.size());
    return table;
}

Result<uint64_t> decode_present(Reader& reader, NodeMagic magic, uint32_t level,
                                size_t child_bytes) {
    assert(level >= 1 && level <= kTreeLevels);
    STELLARIUM_ASSIGN(const NodeHeader header, decode_header(reader, magic, level));
    if (reader.remaining() < sizeof(U64Le)) {
        return bad(magic, reader.offset(), "ends within its header");
    }
    const uint64_t present = reader.get<U64Le>();
    if (static_cast<uint32_t>(std::popcount(present)) != header.entries) {
        return bad(magic, 8, "the bitmap of children does not fit their number");
    }
    if (reader.remaining() != header.entries * child_bytes) {
        return bad(
            magic, reader.offset(),
            fmt::format("{} bytes for {} children", reader.remaining(), header.entries.get()));
    }
    return present;
}

void put_inner_header(Writer& writer, NodeMagic magic, uint32_t level, uint64_t present,
                      size_t children) {
    assert(level >= 1 && level <= kTreeLevels && children > 0);
    assert(static_cast<size_t>(std::popcount(present)) == children);
    writer.put(InnerHeader{{magic_of(magic), kNodeVersion, static_cast<uint8_t>(level),
                            static_cast<uint16_t>(children)},
                           present});
}

}  // namespace

std::optional<NodeMagic> node_magic(Bytes content) {
    if (content.size() < sizeof(NodeHeader)) {
        return std::nullopt;
    }
    const auto magic = static_cast<NodeMagic>(load<U32Le>(content).get());
    switch (magic) {
        case NodeMagic::kTreeLeaf:
        case NodeMagic::kTreeInner:
        case NodeMagic::kDeltaLeaf:
        case NodeMagic::kDeltaInner:
        case NodeMagic::kDeltaBucket:
            return magic;
    }
    return std::nullopt;
}

EncodedNode encode_tree_leaf(const Extents& extents) {
    return encode_leaf(NodeMagic::kTreeLeaf, extents);
}

EncodedNode encode_delta_leaf(const Extents& extents) {
    return encode_leaf(NodeMagic::kDeltaLeaf, extents);
}

EncodedNode encode_tree_inner(uint32_t level, const TreeChildren& children) {
    const size_t count = children.children.size();
    Writer content(sizeof(InnerHeader) + count * sizeof(Hash256));
    Writer aux(count * sizeof(U40Le));
    put_inner_header(content, NodeMagic::kTreeInner, level, children.present, count);
    for (const NodeRef& child : children.children) {
        assert(!child.empty());
        content.put(child.id);
        aux.put(hint_bytes(child.hint));
    }
    return finished(content.take(), aux.take());
}

EncodedNode encode_delta_inner(uint32_t level, const DeltaChildren& children) {
    const size_t count = children.children.size();
    Writer content(sizeof(InnerHeader) + count * sizeof(DeltaChild));
    Writer aux(count * sizeof(U40Le));
    put_inner_header(content, NodeMagic::kDeltaInner, level, children.present, count);
    for (const DeltaChildRef& child : children.children) {
        assert(!child.ref.empty());
        content.put(DeltaChild{child.ref.id, static_cast<uint32_t>(child.leaves), child.extents});
        aux.put(hint_bytes(child.ref.hint));
    }
    return finished(content.take(), aux.take());
}

EncodedNode encode_delta_bucket(uint32_t level,
                                const std::vector<std::pair<uint64_t, const Extents*>>& leaves) {
    assert(level >= 1 && level <= kTreeLevels && !leaves.empty());
    ExtentEncoder encoder;
    for (const auto& [leaf, extents] : leaves) {
        assert(!extents->empty() && is_canonical(*extents, true));
        for (const Extent& extent : *extents) {
            encoder.add(extent);
        }
    }
    Writer writer(sizeof(NodeHeader) + leaves.size() * sizeof(BucketLeaf) + encoder.size_bytes());
    writer.put(NodeHeader{magic_of(NodeMagic::kDeltaBucket), kNodeVersion,
                          static_cast<uint8_t>(level), static_cast<uint16_t>(leaves.size())});
    for (const auto& [leaf, extents] : leaves) {
        assert(leaf < leaves_below(level));
        writer.put(BucketLeaf{static_cast<uint32_t>(leaf), static_cast<uint16_t>(extents->size())});
    }
    encoder.write(writer);
    return finished(writer.take(), encoder.aux());
}

Result<ExtentTable> decode_tree_leaf(Bytes content, Bytes aux) {
    return decode_leaf(NodeMagic::kTreeLeaf, content, aux);
}

Result<ExtentTable> decode_delta_leaf(Bytes content, Bytes aux) {
    return decode_leaf(NodeMagic::kDeltaLeaf, content, aux);
}

Result<TreeChildren> decode_tree_inner(Bytes content, Bytes aux, uint32_t level) {
    constexpr NodeMagic kMagic = NodeMagic::kTreeInner;
    Reader reader(content);
    TreeChildren children;
    STELLARIUM_ASSIGN(children.present, decode_present(reader, kMagic, level, sizeof(Hash256)));
    const auto count = static_cast<size_t>(std::popcount(children.present));
    const auto hints = decode_hints(aux, count);
    children.children.resize(count);
    for (size_t i = 0; i < count; ++i) {
        const size_t offset = reader.offset();
        children.children[i] = {reader.get<Hash256>(), hints[i]};
        if (children.children[i].empty()) {
            return bad(kMagic, offset, "a child without an id");
        }
    }
    return children;
}

Result<DeltaChildren> decode_delta_inner(Bytes content, Bytes aux, uint32_t level) {
    constexpr NodeMagic kMagic = NodeMagic::kDeltaInner;
    Reader reader(content);
    DeltaChildren children;
    STELLARIUM_ASSIGN(children.present, decode_present(reader, kMagic, level, sizeof(DeltaChild)));
    const auto count = static_cast<size_t>(std::popcount(children.present));
    const auto hints = decode_hints(aux, count);
    children.children.resize(count);
    uint64_t extents = 0;
    for (size_t i = 0; i < count; ++i) {
        const size_t offset = reader.offset();
        const auto entry = reader.get<DeltaChild>();
        DeltaChildRef& child = children.children[i];
        child = {{entry.id, hints[i]}, entry.leaves, entry.extents};
        if (child.ref.empty()) {
            return bad(kMagic, offset, "a child without an id");
        }
        if (child.leaves == 0 || child.leaves > leaves_below(level - 1) ||
            child.extents < child.leaves || child.extents > child.leaves * kPagesPerLeaf) {
            return bad(kMagic, offset,
                       fmt::format("a child of level {} with {} leaves and {} extents", level - 1,
                                   child.leaves, child.extents));
        }
        extents += child.extents;
    }
    if (extents <= kBucketExtents) {
        return bad(kMagic, sizeof(InnerHeader),
                   fmt::format("an inner node of {} extents; up to {} are a bucket", extents,
                               kBucketExtents));
    }
    return children;
}

Result<BucketTable> decode_delta_bucket(Bytes content, Bytes aux, uint32_t level) {
    constexpr NodeMagic kMagic = NodeMagic::kDeltaBucket;
    assert(level >= 1 && level <= kTreeLevels);
    Reader reader(content);
    STELLARIUM_ASSIGN(const NodeHeader header, decode_header(reader, kMagic, level));
    if (header.entries > kBucketExtents ||
        reader.remaining() < header.entries * sizeof(BucketLeaf)) {
        return bad(kMagic, 6, fmt::format("{} leaves do not fit", header.entries.get()));
    }
    BucketTable bucket;
    size_t extents = 0;
    for (uint32_t i = 0; i < header.entries; ++i) {
        const size_t offset = reader.offset();
        const auto leaf = reader.get<BucketLeaf>();
        const bool ascends = i == 0 || bucket.leaves.back().first < leaf.leaf;
        if (!ascends || leaf.leaf >= leaves_below(level) || leaf.extents == 0) {
            return bad(kMagic, offset, "leaves are out of order, out of range or empty");
        }
        extents += leaf.extents;
        if (extents > kBucketExtents) {
            return bad(kMagic, offset,
                       fmt::format("more than {} extents in a bucket", kBucketExtents));
        }
        bucket.leaves.emplace_back(leaf.leaf, leaf.extents);
    }
    STELLARIUM_ASSIGN(bucket.table, decode_extents(reader, kMagic, extents));
    std::span<const Extent> rest = bucket.table.extents;
    for (const auto& [leaf, count] : bucket.leaves) {
        if (!is_canonical(rest.first(count), true)) {
            return bad(
                kMagic, sizeof(NodeHeader),
                fmt::format("extents of leaf {} overlap, or are not in canonical form", leaf));
        }
        rest = rest.subspan(count);
    }
    bucket.table.hints = decode_hints(aux, bucket.table.chunks.size());
    return bucket;
}

Result<Extents> resolve_extents(nebula::Store& store, ExtentTable table) {
    std::vector<Result<nebula::ChunkLocation>> locations;
    locations.reserve(table.chunks.size());
    for (size_t i = 0; i < table.chunks.size(); ++i) {
        locations.push_back(store.resolve(table.chunks[i], table.hints[i]));
    }
    for (size_t i = 0; i < table.extents.size(); ++i) {
        Extent& extent = table.extents[i];
        if (extent.hole || !locations[table.ordinals[i]]) {
            continue;
        }
        const nebula::ChunkLocation& location = *locations[table.ordinals[i]];
        if (extent.first_in_chunk + uint32_t{extent.pages} > location.pages) {
            return fail(ErrorCode::kCorrupt,
                        fmt::format("pages {} to {} of chunk {}, which has {} pages",
                                    extent.first_in_chunk, extent.first_in_chunk + extent.pages - 1,
                                    extent.id.hex(), location.pages));
        }
        extent.chunk_address = location.address;
    }
    return std::move(table.extents);
}

namespace {

std::string describe_extents(std::span<const Extent> extents) {
    std::string text;
    for (const Extent& extent : extents) {
        const std::string pages =
            fmt::format("pages {:3} to {:3}", extent.first_page, extent.end_page() - 1);
        text += extent.hole ? fmt::format("  {}: hole\n", pages)
                            : fmt::format("  {}: chunk {} from its page {}\n", pages,
                                          extent.id.hex(), extent.first_in_chunk);
    }
    return text;
}

std::string describe_damage(const Error& error) {
    return fmt::format("  damaged: {}\n", error.message());
}

}  // namespace

std::string describe_node(Bytes content, Bytes aux) {
    const std::optional<NodeMagic> magic = node_magic(content);
    if (!magic) {
        return fmt::format("{} bytes that are no node of a tree or delta\n", content.size());
    }
    const auto header = load<NodeHeader>(content);
    const uint32_t level = header.level;
    std::string text = fmt::format("{}, version {}, level {}, {} entries\n", kind_name(*magic),
                                   header.version.get(), level, header.entries.get());
    const bool is_leaf = *magic == NodeMagic::kTreeLeaf || *magic == NodeMagic::kDeltaLeaf;
    if (!is_leaf && (level < 1 || level > kTreeLevels)) {
        return text + "  damaged: no such level\n";
    }
    switch (*magic) {
        case NodeMagic::kTreeLeaf:
        case NodeMagic::kDeltaLeaf: {
            const auto table = decode_leaf(*magic, content, aux);
            return text +
                   (table ? describe_extents(table->extents) : describe_damage(table.error()));
        }
        case NodeMagic::kTreeInner: {
            const auto children = decode_tree_inner(content, aux, level);
            if (!children) {
                return text + describe_damage(children.error());
            }
            uint64_t present = children->present;
            for (const NodeRef& child : children->children) {
                text +=
                    fmt::format("  child {:2}: {}\n", std::countr_zero(present), child.id.hex());
                present &= present - 1;
            }
            return text;
        }
        case NodeMagic::kDeltaInner: {
            const auto children = decode_delta_inner(content, aux, level);
            if (!children) {
                return text + describe_damage(children.error());
            }
            uint64_t present = children->present;
            for (const DeltaChildRef& child : children->children) {
                text += fmt::format("  child {:2}: {} ({} leaves, {} extents)\n",
                                    std::countr_zero(present), child.ref.id.hex(), child.leaves,
                                    child.extents);
                present &= present - 1;
            }
            return text;
        }
        case NodeMagic::kDeltaBucket: {
            const auto bucket = decode_delta_bucket(content, aux, level);
            if (!bucket) {
                return text + describe_damage(bucket.error());
            }
            std::span<const Extent> rest = bucket->table.extents;
            for (const auto& [leaf, count] : bucket->leaves) {
                text += fmt::format(" leaf {}:\n{}", leaf, describe_extents(rest.first(count)));
                rest = rest.subspan(count);
            }
            return text;
        }
    }
    return text;
}

}  // namespace stellarium::nova
