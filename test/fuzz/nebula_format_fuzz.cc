// The content store's structures, one at a time: whatever a decoder accepts lies within its bytes
// and is encoded as the same bytes again.
//
// Input: which structure; flags (1: the checksum is made right, so that what lies behind it is
// reached); its bytes, of which zeros at the end may be left out.
#include <array>

#include "nebula/dead_map.h"
#include "nebula/format.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace nebula;  // NOLINT(google-build-using-namespace)

constexpr StoreId kStore = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr uint32_t kSegmentNumber = 7;
constexpr uint32_t kPageNumber = 33;
constexpr uint32_t kGeneration = 3;
constexpr size_t kSealBytes = 16;  ///< Magic and checksum.

enum class Structure : uint8_t { kSuperblock, kSegment, kBatch, kFooter, kPack, kDeadMap };
constexpr uint32_t kStructures = 6;

/// For what starts with magic and checksum.
void fix_seal(Input& bytes, uint64_t magic) {
    std::array<U64Le, 2> front{};
    front[0] = magic;
    front[1] = checksum64(Bytes(bytes).subspan(kSealBytes));
    std::memcpy(bytes.data(), front.data(), kSealBytes);
}

void superblock(Feed& feed, bool fix) {
    Input page = feed.padded(kPageBytes);
    if (fix) {
        fix_seal(page, kSuperblockMagic);
    }
    const auto slot = decode_superblock_slot(page);
    if (!slot) {
        return;
    }
    const auto versions = check_versions(slot->read_version, slot->write_version,
                                         slot->features_refuse, slot->features_read_only);
    if (!versions || !versions->empty()) {
        return;
    }
    SuperblockSlot again = *slot;
    seal(again);
    require(again.read_version > slot->read_version || again.write_version > slot->write_version ||
                equal(bytes_of(again), page),
            "a superblock slot that was decoded is sealed as the same bytes");
}

void segment_header(Feed& feed, bool fix) {
    Input page = feed.padded(kPageBytes);
    if (fix) {
        fix_seal(page, kSegmentHeaderMagic);
    }
    const auto header = decode_segment_header(page, kStore, kSegmentNumber);
    if (header && header->read_version == kFormatReadVersion &&
        header->write_version == kFormatWriteVersion && header->features_refuse == 0 &&
        header->features_read_only == 0 && header->features_ignore == 0) {
        const SegmentHeader again =
            make_segment_header(kStore, kSegmentNumber, header->first_sequence);
        require(equal(bytes_of(again), page),
                "a segment header that was decoded is made again as the same bytes");
    }
}

void check_entries(std::span<const Entry> entries, uint32_t first_page, uint32_t end_page,
                   bool with_members) {
    uint64_t before = 0;
    for (const Entry& entry : entries) {
        require(entry.page.get() >= first_page && entry.page.get() + entry.pages() <= end_page,
                "an entry lies within its batch or segment");
        require(with_members || entry.entry_kind() != EntryKind::kMember,
                "a batch header lists no members");
        require(entry.offset_bytes() >= before, "entries ascend");
        before = entry.offset_bytes();
    }
}

void batch(Feed& feed, bool fix) {
    const uint32_t claimed = feed.below(4) + 1;
    Input pages = feed.padded(claimed * kPageBytes);
    if (fix) {
        BatchHeader header = load<BatchHeader>(pages);
        header.store_id = kStore;
        header.segment = kSegmentNumber;
        header.page = kPageNumber;
        header.header_pages = claimed;
        std::memcpy(pages.data(), &header, sizeof(header));
        seal_batch(pages);
        fix_seal(pages, kBatchMagic);
    }
    const auto peeked = peek_header_pages(pages, kStore, kSegmentNumber, kPageNumber);
    require(!peeked || looks_like_batch(pages, kStore, kSegmentNumber, kPageNumber),
            "what has the pages of a batch looks like one");
    if (!peeked || *peeked != claimed) {
        return;
    }
    const auto view = decode_batch(pages, kStore, kSegmentNumber, kPageNumber);
    if (!view) {
        return;
    }
    require(view->end_page() <= kSegmentPages, "a batch ends within its segment");
    check_entries(view->entries, kPageNumber + claimed, view->end_page(), false);
    // Built again from what was decoded.
    Input again(pages.size());
    std::memcpy(again.data(), view->header, sizeof(BatchHeader));
    if (!view->entries.empty()) {
        std::memcpy(again.data() + sizeof(BatchHeader), view->entries.data(),
                    view->entries.size_bytes());
    }
    size_t at = sizeof(BatchHeader) + view->entries.size_bytes();
    uint32_t records = 0;
    must(view->for_each_record([&](uint16_t kind, Bytes payload) -> Result<void> {
        RecordHeader header{};
        header.kind = kind;
        header.length = static_cast<uint32_t>(payload.size());
        std::memcpy(again.data() + at, &header, sizeof(header));
        at += sizeof(header);
        std::ranges::copy(payload, again.begin() + static_cast<std::ptrdiff_t>(at));
        at += payload.size();
        ++records;
        return {};
    }));
    seal_batch(again);
    require(records == view->header->records && equal(again, pages),
            "a batch header that was decoded is built again as the same bytes");
}

/// The trailer comes first in the input, so that few entries make a short input.
void footer(Feed& feed, bool fix) {
    const uint32_t count = feed.below(300);
    FooterTrailer trailer = load<FooterTrailer>(feed.padded(sizeof(FooterTrailer)));
    Input entries = feed.padded(count * sizeof(Entry));
    Input pages;
    if (fix) {
        const std::span<const Entry> list(reinterpret_cast<const Entry*>(entries.data()), count);
        pages = encode_footer(kStore, kSegmentNumber, trailer.footer_page, list,
                              trailer.first_sequence, trailer.last_sequence);
    } else {
        pages = entries;
        pages.resize(footer_pages(count) * kPageBytes);
        std::memcpy(pages.data() + pages.size() - sizeof(trailer), &trailer, sizeof(trailer));
    }
    const uint64_t file_pages = uint64_t{trailer.footer_page.get()} + pages.size() / kPageBytes;
    const auto view = decode_footer(pages, kStore, kSegmentNumber, file_pages);
    if (!view) {
        return;
    }
    check_entries(view->entries, 1, view->trailer.footer_page, true);
    require(equal(encode_footer(kStore, kSegmentNumber, view->trailer.footer_page, view->entries,
                                view->trailer.first_sequence, view->trailer.last_sequence),
                  pages),
            "a footer that was decoded is encoded as the same bytes");
}

void pack(Feed& feed) {
    const Bytes bytes = feed.rest();
    const auto view = decode_pack(bytes);
    if (!view) {
        return;
    }
    PackBuilder builder;
    bool canonical = true;
    size_t at = sizeof(PackHeader) + view->entries.size_bytes();
    for (const PackEntry& entry : view->entries) {
        const Bytes content =
            bytes.subspan(entry.offset.get() + sizeof(PackMember), entry.content_bytes.get());
        const Bytes aux = bytes.subspan(entry.offset.get() + sizeof(PackMember) + content.size(),
                                        entry.aux_bytes.get());
        // Gaps between members, and prefixes, are judged when members are read.
        PackMember prefix{};
        prefix.content_bytes = entry.content_bytes;
        prefix.aux_bytes = entry.aux_bytes;
        prefix.aux_checksum = static_cast<uint32_t>(checksum64(aux));
        canonical = canonical && entry.offset == at &&
                    equal(bytes_of(prefix), bytes.subspan(at, sizeof(PackMember)));
        at = size_t{entry.offset.get()} + sizeof(PackMember) + content.size() + aux.size();
        canonical = builder.add(entry.id, content, aux) && canonical;
    }
    std::vector<Entry> entries;
    append_member_entries(*view, 5, entries);
    require(entries.size() == view->entries.size(), "each member has an entry");
    for (const Entry& entry : entries) {
        require((entry.offset_bytes() - uint64_t{5} * kPageBytes) + sizeof(PackMember) +
                        entry.length.get() <=
                    bytes.size(),
                "a member's entry lies within the pack");
    }
    canonical = canonical && at == bytes.size() && view->header->version == kPackVersion &&
                !builder.empty();
    require(!canonical || equal(builder.finish(), bytes),
            "a pack that was decoded is built again as the same bytes");
}

void dead_map(Feed& feed, bool fix) {
    const Bytes given = feed.rest();
    Input bytes(given.begin(), given.end());
    if (fix && bytes.size() >= sizeof(DeadMapHeader)) {
        DeadMapHeader header = load<DeadMapHeader>(bytes);
        header.store_id = kStore;
        header.generation = kGeneration;
        header.page_bytes = kPageBytes;
        header.file_bytes = bytes.size();
        std::memcpy(bytes.data(), &header, sizeof(header));
        fix_seal(bytes, kDeadMapMagic);
    }
    const auto map = decode_dead_map(bytes, kStore, kGeneration);
    if (!map) {
        return;
    }
    for (const auto& [number, segment] : map->segments) {
        require(!segment.empty(), "a segment of the dead map says something");
        for (const PageRun& run : segment.runs) {
            require(skip_dead(segment.runs, run.page) == run.end(), "a run is found by its start");
        }
    }
    const Input again = encode_dead_map(kStore, *map);
    const auto decoded = decode_dead_map(again, kStore, kGeneration);
    require(decoded && decoded->segments == map->segments,
            "a dead map that was decoded, encoded, and decoded again is the same");
    const auto header = load<DeadMapHeader>(bytes);
    require(header.read_version != kFormatReadVersion ||
                header.write_version != kFormatWriteVersion || header.features_refuse != 0 ||
                header.features_ignore != 0 || equal(again, bytes),
            "a dead map that was decoded is encoded as the same bytes");
}

Entry entry_of(EntryKind kind, uint32_t page, uint32_t offset, uint32_t length) {
    Entry entry{};
    entry.id = hash(bytes_of(std::string_view("entry")));
    entry.page = static_cast<uint16_t>(page);
    entry.offset = static_cast<uint16_t>(offset);
    entry.length = length;
    entry.kind = static_cast<uint8_t>(kind);
    return entry;
}

Input seed(Structure structure, unsigned flags) {
    Input out;
    append_byte(out, static_cast<unsigned>(structure));
    append_byte(out, flags);
    return out;
}

void cut_zeros(Input& out) {
    while (!out.empty() && out.back() == std::byte{0}) {
        out.pop_back();
    }
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    for (const unsigned flags : {0U, 1U}) {
        Input input = seed(Structure::kSuperblock, flags);
        SuperblockSlot slot{};
        slot.store_id = kStore;
        slot.generation = 4;
        slot.sequence = 9;
        slot.durable_sequence = 9;
        slot.highest_sequence = 9;
        slot.log_segment = 1;
        slot.log_page = 7;
        slot.last_segment = 1;
        slot.features_refuse = kFeatureDeadMap;
        slot.dead_map_generation = 1;
        slot.payload_bytes = 72;
        slot.payload[3] = 1;
        seal(slot);
        append(input, bytes_of(slot));
        cut_zeros(input);
        out.push_back(input);

        input = seed(Structure::kSegment, flags);
        append(input, bytes_of(make_segment_header(kStore, kSegmentNumber, 12)));
        cut_zeros(input);
        out.push_back(input);

        input = seed(Structure::kBatch, flags);
        append_byte(input, 0);
        Input pages(kPageBytes);
        BatchHeader header{};
        header.store_id = kStore;
        header.segment = kSegmentNumber;
        header.page = kPageNumber;
        header.sequence = 5;
        header.previous_sequence = 4;
        header.durable_through = 4;
        header.header_pages = 1;
        header.data_pages = 18;
        header.entries = 2;
        header.records = 1;
        header.record_bytes = sizeof(RecordHeader) + 3;
        const std::array entries = {entry_of(EntryKind::kChunk, kPageNumber + 1, 0, kMaxChunkBytes),
                                    entry_of(EntryKind::kPack, kPageNumber + 17, 0, 900)};
        RecordHeader record{};
        record.kind = 0x0109;
        record.length = 3;
        std::memcpy(pages.data(), &header, sizeof(header));
        std::memcpy(pages.data() + sizeof(header), entries.data(), sizeof(entries));
        std::memcpy(pages.data() + sizeof(header) + sizeof(entries), &record, sizeof(record));
        seal_batch(pages);
        append(input, pages);
        cut_zeros(input);
        out.push_back(input);

        input = seed(Structure::kFooter, flags);
        const std::array listed = {entry_of(EntryKind::kChunk, 2, 0, 2 * kPageBytes),
                                   entry_of(EntryKind::kPack, 4, 0, 900),
                                   entry_of(EntryKind::kMember, 4, 100, 300),
                                   entry_of(EntryKind::kObject, 6, 0, 5000)};
        append_byte(input, listed.size());
        append_byte(input, 0);
        const Input encoded = encode_footer(kStore, kSegmentNumber, 9, listed, 3, 5);
        append(input, Bytes(encoded).last(sizeof(FooterTrailer)));
        append(input, std::as_bytes(std::span(listed)));
        out.push_back(input);

        input = seed(Structure::kDeadMap, flags);
        DeadMap map{.generation = kGeneration, .segments = {}};
        map.segments[2].whole = true;
        map.segments[5].runs = {{.page = 1, .pages = 4}, {.page = 9, .pages = 100}};
        map.segments[5].members = {6U << 16 | 16, 6U << 16 | 400};
        map.segments[9].damaged = {3U << 16};
        append(input, encode_dead_map(kStore, map));
        out.push_back(input);
    }
    Input input = seed(Structure::kPack, 0);
    PackBuilder builder;
    const std::string first(40, 'a');
    const std::string second(300, 'b');
    builder.add(hash(bytes_of(std::string_view(first))), bytes_of(std::string_view(first)), {});
    builder.add(hash(bytes_of(std::string_view(second))), bytes_of(std::string_view(second)),
                bytes_of(std::string_view("hints")));
    append(input, builder.finish());
    out.push_back(input);
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    Feed feed(data, size);
    const auto structure = static_cast<Structure>(feed.below(kStructures));
    const bool fix = (feed.u8() & 1) != 0;
    switch (structure) {
        case Structure::kSuperblock:
            superblock(feed, fix);
            break;
        case Structure::kSegment:
            segment_header(feed, fix);
            break;
        case Structure::kBatch:
            batch(feed, fix);
            break;
        case Structure::kFooter:
            footer(feed, fix);
            break;
        case Structure::kPack:
            pack(feed);
            break;
        case Structure::kDeadMap:
            dead_map(feed, fix);
            break;
    }
    return 0;
}
