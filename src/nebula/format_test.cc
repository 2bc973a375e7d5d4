// The formats are what docs/formats/ says: tables against the structs, dumps against real bytes,
// decoders against damaged and hostile input.
//
// STELLARIUM_UPDATE_GOLDEN=1 writes the dumps into the pages anew.
#include "nebula/format.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <regex>
#include <string>
#include <tuple>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "io/simulated.h"
#include "nebula/dead_map.h"
#include "nebula/index.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct FieldPlace {
    std::string name;
    size_t offset;
    size_t size;
    friend bool operator==(const FieldPlace&, const FieldPlace&) = default;
};
void PrintTo(const FieldPlace& field, std::ostream* out) {  // NOLINT(readability-identifier-naming)
    *out << field.name << " at " << field.offset << ", " << field.size << " bytes";
}

struct StructLayout {
    size_t size;
    std::vector<FieldPlace> fields;
};

#define FIELD(type, name)                               \
    FieldPlace {                                        \
        #name, offsetof(type, name), sizeof(type::name) \
    }

std::map<std::string, StructLayout> layouts() {
    return {
        {"SuperblockSlot",
         {sizeof(SuperblockSlot),
          {FIELD(SuperblockSlot, magic),
           FIELD(SuperblockSlot, checksum),
           FIELD(SuperblockSlot, read_version),
           FIELD(SuperblockSlot, write_version),
           FIELD(SuperblockSlot, page_bytes),
           FIELD(SuperblockSlot, features_refuse),
           FIELD(SuperblockSlot, features_read_only),
           FIELD(SuperblockSlot, features_ignore),
           FIELD(SuperblockSlot, store_id),
           FIELD(SuperblockSlot, generation),
           FIELD(SuperblockSlot, sequence),
           FIELD(SuperblockSlot, durable_sequence),
           FIELD(SuperblockSlot, highest_sequence),
           FIELD(SuperblockSlot, log_segment),
           FIELD(SuperblockSlot, log_page),
           FIELD(SuperblockSlot, last_segment),
           FIELD(SuperblockSlot, index_generation),
           FIELD(SuperblockSlot, chunks),
           FIELD(SuperblockSlot, unique_bytes),
           FIELD(SuperblockSlot, stored_bytes),
           FIELD(SuperblockSlot, appended_bytes),
           FIELD(SuperblockSlot, duplicate_bytes),
           FIELD(SuperblockSlot, payload_bytes),
           FIELD(SuperblockSlot, index_segment),
           FIELD(SuperblockSlot, index_appended_bytes),
           FIELD(SuperblockSlot, dead_map_generation),
           FIELD(SuperblockSlot, dead_map_freed),
           FIELD(SuperblockSlot, reserved),
           FIELD(SuperblockSlot, payload),
           FIELD(SuperblockSlot, padding)}}},
        {"SegmentHeader",
         {sizeof(SegmentHeader),
          {FIELD(SegmentHeader, magic), FIELD(SegmentHeader, checksum),
           FIELD(SegmentHeader, read_version), FIELD(SegmentHeader, write_version),
           FIELD(SegmentHeader, page_bytes), FIELD(SegmentHeader, features_refuse),
           FIELD(SegmentHeader, features_read_only), FIELD(SegmentHeader, features_ignore),
           FIELD(SegmentHeader, store_id), FIELD(SegmentHeader, segment),
           FIELD(SegmentHeader, reserved), FIELD(SegmentHeader, first_sequence),
           FIELD(SegmentHeader, padding)}}},
        {"BatchHeader",
         {sizeof(BatchHeader),
          {FIELD(BatchHeader, magic), FIELD(BatchHeader, checksum), FIELD(BatchHeader, store_id),
           FIELD(BatchHeader, segment), FIELD(BatchHeader, page), FIELD(BatchHeader, sequence),
           FIELD(BatchHeader, previous_sequence), FIELD(BatchHeader, durable_through),
           FIELD(BatchHeader, header_pages), FIELD(BatchHeader, data_pages),
           FIELD(BatchHeader, entries), FIELD(BatchHeader, records),
           FIELD(BatchHeader, record_bytes), FIELD(BatchHeader, reserved),
           FIELD(BatchHeader, duplicate_bytes)}}},
        {"Entry",
         {sizeof(Entry),
          {FIELD(Entry, id), FIELD(Entry, page), FIELD(Entry, offset), FIELD(Entry, length),
           FIELD(Entry, kind)}}},
        {"RecordHeader",
         {sizeof(RecordHeader),
          {FIELD(RecordHeader, kind), FIELD(RecordHeader, reserved), FIELD(RecordHeader, length)}}},
        {"FooterTrailer",
         {sizeof(FooterTrailer),
          {FIELD(FooterTrailer, magic), FIELD(FooterTrailer, checksum),
           FIELD(FooterTrailer, store_id), FIELD(FooterTrailer, segment),
           FIELD(FooterTrailer, footer_page), FIELD(FooterTrailer, entries),
           FIELD(FooterTrailer, reserved), FIELD(FooterTrailer, first_sequence),
           FIELD(FooterTrailer, last_sequence)}}},
        {"DeadMapHeader",
         {sizeof(DeadMapHeader),
          {FIELD(DeadMapHeader, magic), FIELD(DeadMapHeader, checksum),
           FIELD(DeadMapHeader, read_version), FIELD(DeadMapHeader, write_version),
           FIELD(DeadMapHeader, page_bytes), FIELD(DeadMapHeader, features_refuse),
           FIELD(DeadMapHeader, features_read_only), FIELD(DeadMapHeader, features_ignore),
           FIELD(DeadMapHeader, store_id), FIELD(DeadMapHeader, generation),
           FIELD(DeadMapHeader, segments), FIELD(DeadMapHeader, file_bytes),
           FIELD(DeadMapHeader, reserved)}}},
        {"DeadMapSegment",
         {sizeof(DeadMapSegment),
          {FIELD(DeadMapSegment, segment), FIELD(DeadMapSegment, flags),
           FIELD(DeadMapSegment, runs), FIELD(DeadMapSegment, members),
           FIELD(DeadMapSegment, damaged), FIELD(DeadMapSegment, reserved)}}},
        {"DeadMapRun", {sizeof(DeadMapRun), {FIELD(DeadMapRun, page), FIELD(DeadMapRun, pages)}}},
        {"DeadMapPlace",
         {sizeof(DeadMapPlace), {FIELD(DeadMapPlace, page), FIELD(DeadMapPlace, offset)}}},
        {"PackHeader",
         {sizeof(PackHeader),
          {FIELD(PackHeader, magic), FIELD(PackHeader, version), FIELD(PackHeader, members),
           FIELD(PackHeader, bytes), FIELD(PackHeader, reserved)}}},
        {"PackEntry",
         {sizeof(PackEntry),
          {FIELD(PackEntry, id), FIELD(PackEntry, offset), FIELD(PackEntry, content_bytes),
           FIELD(PackEntry, aux_bytes), FIELD(PackEntry, reserved)}}},
        {"PackMember",
         {sizeof(PackMember),
          {FIELD(PackMember, content_bytes), FIELD(PackMember, aux_bytes),
           FIELD(PackMember, aux_checksum)}}},
    };
}
#undef FIELD

std::string page_path(const std::string& page) {
    return fmt::format("{}/docs/formats/{}.md", STELLARIUM_SOURCE_DIR, page);
}

std::vector<std::string> read_lines(const std::string& path) {
    std::ifstream file(path);
    EXPECT_TRUE(file) << path;
    std::vector<std::string> lines;
    for (std::string line; std::getline(file, line);) {
        lines.push_back(line);
    }
    return lines;
}

TEST(FormatPages, TablesAreTheStructs) {
    const std::regex heading(R"(### `(\w+)` \((\d+) bytes\))");
    const std::regex row(R"(\| (\d+) \| (\d+) \| (\w+) \| `(\w+)` \| .+ \|)");
    std::map<std::string, StructLayout> missing = layouts();
    for (const std::string page : {"superblock", "segment", "pack", "dead-map"}) {
        std::string name;
        std::vector<FieldPlace> fields;
        const auto finish = [&] {
            if (name.empty()) {
                return;
            }
            const auto expected = missing.find(name);
            ASSERT_NE(expected, missing.end()) << name << " is no struct of format.h";
            EXPECT_EQ(fields, expected->second.fields) << name;
            missing.erase(expected);
            fields.clear();
            name.clear();
        };
        for (const std::string& line : read_lines(page_path(page))) {
            std::smatch match;
            if (line.starts_with("#")) {
                finish();
            }
            if (std::regex_match(line, match, heading)) {
                name = match[1];
                ASSERT_TRUE(missing.contains(name)) << name;
                EXPECT_EQ(std::stoul(match[2]), missing[name].size) << name;
            } else if (!name.empty() && std::regex_match(line, match, row)) {
                const size_t size = std::stoul(match[2]);
                const std::string type = match[3];
                fields.push_back({match[4], std::stoul(match[1]), size});
                if (type != "bytes") {
                    EXPECT_EQ(type, fmt::format("u{}", 8 * size)) << name << " " << match[4];
                }
            }
        }
        finish();
    }
    for (const auto& [name, layout] : missing) {
        ADD_FAILURE() << name << " is described on no page";
    }
}

TEST(FormatPages, StatedConstantsAreTheCode) {
    EXPECT_EQ(kMaxObjectBytes, 65280U);
    EXPECT_EQ(kMaxPackBytes, 65528U);
    EXPECT_EQ(kMaxBatchDataPages, 2048U);
    EXPECT_EQ(kMaxRecordBytes, 4U << 20);
    EXPECT_EQ(kMaxCheckpointPayload, 1024U);
    EXPECT_EQ(kSegmentPages, 16384U);
    EXPECT_EQ(text_of(bytes_of(U64Le(kSuperblockMagic))), std::string("STLRSUP\0", 8));
    EXPECT_EQ(text_of(bytes_of(U64Le(kSegmentHeaderMagic))), std::string("STLRSEG\0", 8));
    EXPECT_EQ(text_of(bytes_of(U64Le(kBatchMagic))), std::string("STLRBCH\0", 8));
    EXPECT_EQ(text_of(bytes_of(U64Le(kFooterMagic))), std::string("STLRFOT\0", 8));
    EXPECT_EQ(text_of(bytes_of(U64Le(kDeadMapMagic))), std::string("STLRDED\0", 8));
    EXPECT_EQ(text_of(bytes_of(U32Le(kPackMagic))), "PACK");
}

/// Sixteen bytes a line with offsets, runs of equal lines shortened to a star.
std::vector<std::string> hexdump(Bytes bytes, uint64_t offset) {
    std::vector<std::string> lines;
    std::string last;
    bool starred = false;
    for (size_t at = 0; at < bytes.size(); at += 16) {
        const Bytes row = bytes.subspan(at, std::min<size_t>(16, bytes.size() - at));
        std::string digits;
        std::string text;
        for (const std::byte byte : row) {
            const auto value = std::to_integer<unsigned char>(byte);
            digits += fmt::format("{:02x} ", value);
            text += value >= 0x20 && value < 0x7f ? static_cast<char>(value) : '.';
        }
        if (digits == last) {
            if (!starred) {
                lines.emplace_back("*");
            }
            starred = true;
            continue;
        }
        lines.push_back(fmt::format("{:06x}  {:48} {}", offset + at, digits, text));
        last = digits;
        starred = false;
    }
    lines.push_back(fmt::format("{:06x}", offset + bytes.size()));
    return lines;
}

ByteVector read_range(io::FileSystem& files, const std::string& path, uint64_t offset,
                      size_t length) {
    ByteVector bytes(length);
    const auto file = files.open(path, io::OpenMode::kReadOnly);
    EXPECT_OK(file);
    EXPECT_OK(io::read_exact(**file, bytes, offset));
    return bytes;
}

/// Compares the dump in the page with the bytes, or puts it there.
void check_hexdump(const std::string& page, const std::string& name, Bytes bytes, uint64_t offset) {
    const std::vector<std::string> expected = hexdump(bytes, offset);
    std::vector<std::string> lines = read_lines(page_path(page));
    const auto marker = std::ranges::find(lines, fmt::format("<!-- hexdump: {} -->", name));
    ASSERT_NE(marker, lines.end()) << page << " has no dump named " << name;
    const auto first = marker + 2;
    const auto last = std::find(first, lines.end(), "```");
    ASSERT_NE(last, lines.end());
    // NOLINTNEXTLINE(concurrency-mt-unsafe): no thread sets it.
    if (std::getenv("STELLARIUM_UPDATE_GOLDEN") == nullptr) {
        EXPECT_EQ(std::vector(first, last), expected)
            << page << ".md: run with STELLARIUM_UPDATE_GOLDEN=1 if the format has changed";
        return;
    }
    const auto place = lines.erase(first, last);
    lines.insert(place, expected.begin(), expected.end());
    std::ofstream file(page_path(page));
    for (const std::string& line : lines) {
        file << line << '\n';
    }
}

TEST(FormatPages, DumpsAreRealFiles) {
    io::SimulatedMachine machine(1);
    const StoreOptions options{.segment_bytes = kMinSegmentBytes};
    auto opened = open_store(machine.env(), "/pool", options);
    ASSERT_OK(opened);
    Store& store = *opened->store;
    const Blob chunk = make_chunk(1, 2);
    const auto text_bytes = [](std::string_view text) { return bytes_of(text); };
    const Bytes small = text_bytes("small");
    const Bytes object = text_bytes("object");
    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    batch.add_object(hash(small), small, text_bytes("hint"));
    batch.add_object(hash(object), object);
    batch.add_record(7, text_bytes("record"));
    ASSERT_OK(store.append(batch));
    batch.clear();
    batch.add_record(8, text_bytes("another"));
    ASSERT_OK(store.append(batch));
    ASSERT_OK(store.checkpoint(1, text_bytes("older")));
    ASSERT_OK(store.checkpoint(2, text_bytes("tables")));

    check_hexdump("superblock", "superblock",
                  read_range(machine.files(), "/pool/superblock", 2 * kPageBytes, kPageBytes),
                  2 * kPageBytes);
    const std::string segment = "/pool/segments/0000001.seg";
    check_hexdump("segment", "segment-header", read_range(machine.files(), segment, 0, kPageBytes),
                  0);
    const ByteVector header = read_range(machine.files(), segment, kPageBytes, kPageBytes);
    check_hexdump("segment", "batch-header", header, kPageBytes);
    const auto view = decode_batch(header, store.uuid(), 1, 1);
    ASSERT_OK(view);
    ASSERT_EQ(view->entries.size(), 2U);
    const Entry& pack = view->entries[1];
    ASSERT_EQ(pack.entry_kind(), EntryKind::kPack);
    check_hexdump("pack", "pack",
                  read_range(machine.files(), segment, pack.offset_bytes(), pack.length), 0);

    // Filled until the next segment begins.
    for (uint64_t i = 2; store.stats().segments == 1; ++i) {
        const Blob more = make_chunk(i, kMaxChunkPages);
        WriteBatch filler;
        filler.add_chunk(more.id, more.bytes);
        ASSERT_OK(store.append(filler));
    }
    const auto file = machine.files().open(segment, io::OpenMode::kReadOnly);
    ASSERT_OK(file);
    const uint64_t size = (*file)->size_bytes().value_or(0);
    const uint64_t trailer = size - sizeof(FooterTrailer);
    check_hexdump("segment", "footer-trailer",
                  read_range(machine.files(), segment, trailer, sizeof(FooterTrailer)), trailer);
}

TEST(FormatPages, DeadMapDumpIsARealFile) {
    io::SimulatedMachine machine(1);
    auto opened = open_store(machine.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
    ASSERT_OK(opened);
    Store& store = *opened->store;
    const std::array chunks{make_chunk(1, 2), make_chunk(2, 3), make_chunk(3, 1)};
    const std::array objects{make_blob(4, 300), make_blob(5, 300)};
    WriteBatch batch;
    for (const Blob& chunk : chunks) {
        batch.add_chunk(chunk.id, chunk.bytes);
    }
    for (const Blob& object : objects) {
        batch.add_object(object.id, object.bytes);
    }
    ASSERT_OK(store.append(batch));
    ASSERT_OK(store.checkpoint(1, {}));
    const PageAddress damaged = store.resolve(chunks[2].id)->address;
    ASSERT_OK(store.close());
    machine.files().damage("/pool/segments/0000001.seg", damaged.offset_bytes(), 1, 1);
    opened = open_store(machine.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
    ASSERT_OK(opened);
    ASSERT_FALSE(read_chunk(*opened->store, chunks[2].id));

    const auto collection = opened->store->begin_collection();
    ASSERT_OK(collection);
    ASSERT_OK((*collection)->fix_position());
    ASSERT_OK((*collection)->mark_pages(chunks[0].id, {}, 3));
    ASSERT_OK((*collection)->mark_pages(chunks[2].id, {}, 1));
    ASSERT_OK((*collection)->mark_object(objects[0].id, {}));
    ASSERT_OK((*collection)->sweep({}));
    const std::string path = "/pool/dead-1.map";
    const auto file = machine.files().open(path, io::OpenMode::kReadOnly);
    ASSERT_OK(file);
    const ByteVector bytes = read_range(machine.files(), path, 0, (*file)->size_bytes().value());
    check_hexdump("dead-map", "dead-map", bytes, 0);
    const auto map = decode_dead_map(bytes, opened->store->uuid(), 1);
    ASSERT_OK(map);
    ASSERT_EQ(map->segments.size(), 1U);
    const DeadSegment& segment = map->segments.at(1);
    EXPECT_EQ(segment.runs, (std::vector<PageRun>{{.page = 4, .pages = 3}}));
    EXPECT_EQ(segment.members.size(), 1U);
    EXPECT_EQ(segment.damaged, (std::vector<EntryPlace>{damaged.page() << 16}));
}

// ---- Decoders ---------------------------------------------------------------------------------

const StoreId kStoreId{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

SuperblockSlot good_slot() {
    SuperblockSlot slot{};
    slot.store_id = kStoreId;
    slot.generation = 5;
    slot.log_segment = 3;
    slot.log_page = 17;
    slot.payload_bytes = 3;
    slot.payload = {1, 2, 3};
    seal(slot);
    return slot;
}

/// Applies `change` to a sealed slot and seals it again, as a hostile or newer writer would.
Error refusal_of_slot(const std::function<void(SuperblockSlot&)>& change) {
    SuperblockSlot slot = good_slot();
    change(slot);
    slot.checksum = checksum64(bytes_of(slot).subspan(16));
    const auto decoded = decode_superblock_slot(bytes_of(slot));
    EXPECT_FALSE(decoded);
    return decoded ? Error(ErrorCode::kIo, "") : decoded.error();
}

TEST(Superblock, DamageAnywhereInASlotIsSeen) {
    const SuperblockSlot slot = good_slot();
    ASSERT_OK(decode_superblock_slot(bytes_of(slot)));
    for (size_t at = 0; at < sizeof(slot); ++at) {
        ByteVector bytes(bytes_of(slot).begin(), bytes_of(slot).end());
        bytes[at] ^= std::byte{0x10};
        const auto decoded = decode_superblock_slot(bytes);
        ASSERT_FALSE(decoded) << at;
        ASSERT_EQ(decoded.error().code(), ErrorCode::kCorrupt);
        ASSERT_NE(decoded.error().message().find("offset"), std::string::npos);
    }
    EXPECT_FALSE(decode_superblock_slot(ByteVector(kPageBytes)));
}

TEST(Superblock, SealedNonsenseIsRefused) {
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.payload_bytes = 1025; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.payload_bytes = 2; }).code(),
              ErrorCode::kCorrupt)
        << "bytes behind the payload";
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.log_segment = 0; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.log_page = kSegmentPages + 1; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.reserved[3] = 1; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.padding[9] = 1; }).code(), ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.dead_map_generation = 1; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.features_refuse = kFeatureDeadMap; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.dead_map_freed = 1; }).code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(refusal_of_slot([](auto& slot) { slot.page_bytes = 8192; }).code(),
              ErrorCode::kUnsupported);
}

TEST(Superblock, VersionsAndFeatures) {
    const auto current = check_versions(1, 1, 0, 0);
    ASSERT_OK(current);
    EXPECT_TRUE(current->empty());
    EXPECT_EQ(check_versions(2, 2, 0, 0).error().code(), ErrorCode::kUnsupported);
    EXPECT_EQ(check_versions(1, 1, kFeatureDeadMap, 0).value(), "");
    EXPECT_EQ(check_versions(1, 1, 4, 0).error().code(), ErrorCode::kUnsupported);
    for (const auto& reason : {check_versions(1, 2, 0, 0), check_versions(1, 1, 0, 8)}) {
        ASSERT_OK(reason);
        EXPECT_FALSE(reason->empty());
    }
}

/// A sealed batch at segment 7, page 20, with every kind of entry and two records.
struct MadeBatch {
    static constexpr uint32_t kSegment = 7;
    static constexpr uint32_t kPage = 20;
    ByteVector bytes;

    MadeBatch() {
        const std::array<std::string_view, 2> records{"first", ""};
        size_t record_bytes = 0;
        for (const auto record : records) {
            record_bytes += sizeof(RecordHeader) + record.size();
        }
        BatchHeader header{};
        header.store_id = kStoreId;
        header.segment = kSegment;
        header.page = kPage;
        header.sequence = 9;
        header.previous_sequence = 8;
        header.durable_through = 6;
        header.header_pages = 1;
        header.data_pages = 5;
        header.entries = 3;
        header.records = records.size();
        header.record_bytes = static_cast<uint32_t>(record_bytes);
        append(header);
        append(entry(21, EntryKind::kChunk, 2 * kPageBytes));
        append(entry(23, EntryKind::kObject, 5000));
        append(entry(25, EntryKind::kPack, 100));
        for (const auto record : records) {
            RecordHeader record_header{};
            record_header.kind = 4;
            record_header.length = static_cast<uint32_t>(record.size());
            append(record_header);
            bytes.insert(bytes.end(), bytes_of(record).begin(), bytes_of(record).end());
        }
        bytes.resize(kPageBytes);
        seal_batch(bytes);
    }

    template <typename T>
    void append(const T& value) {
        bytes.insert(bytes.end(), bytes_of(value).begin(), bytes_of(value).end());
    }
    static Entry entry(uint16_t page, EntryKind kind, uint32_t length) {
        Entry out{};
        out.id = hash(bytes_of(U16Le(page)));
        out.page = page;
        out.length = length;
        out.kind = static_cast<uint8_t>(kind);
        return out;
    }
    Result<BatchView> decode() const { return decode_batch(bytes, kStoreId, kSegment, kPage); }

    /// Changes the header or an entry as a hostile writer would, and decodes.
    template <typename T>
    ErrorCode refusal(size_t offset, const std::function<void(T&)>& change) const {
        MadeBatch other = *this;
        T value = load<T>(Bytes(other.bytes).subspan(offset));
        change(value);
        std::memcpy(other.bytes.data() + offset, &value, sizeof(T));
        seal_batch(other.bytes);
        const auto decoded = other.decode();
        EXPECT_FALSE(decoded);
        return decoded ? ErrorCode::kIo : decoded.error().code();
    }
};

TEST(Batch, DecodesWhatWasMade) {
    const MadeBatch made;
    const auto batch = made.decode();
    ASSERT_OK(batch);
    EXPECT_EQ(batch->end_page(), 26U);
    ASSERT_EQ(batch->entries.size(), 3U);
    EXPECT_EQ(batch->entries[1].pages(), 2U);
    std::vector<std::string> records;
    ASSERT_OK(batch->for_each_record([&](uint16_t kind, Bytes payload) -> Result<void> {
        EXPECT_EQ(kind, 4U);
        records.push_back(text_of(payload));
        return {};
    }));
    EXPECT_EQ(records, (std::vector<std::string>{"first", ""}));
}

TEST(Batch, DamageAnywhereIsSeen) {
    const MadeBatch made;
    for (size_t at = 0; at < made.bytes.size(); ++at) {
        MadeBatch damaged = made;
        damaged.bytes[at] ^= std::byte{1};
        // The first page says how many pages to read: only then can the rest be looked at.
        const auto pages =
            peek_header_pages(damaged.bytes, kStoreId, MadeBatch::kSegment, MadeBatch::kPage);
        if (pages) {
            damaged.bytes.resize(*pages * kPageBytes);
            const auto decoded = damaged.decode();
            ASSERT_FALSE(decoded) << at;
            ASSERT_EQ(decoded.error().code(), ErrorCode::kCorrupt);
        } else {
            ASSERT_EQ(pages.error().code(), ErrorCode::kCorrupt);
        }
    }
}

TEST(Batch, BelongsToItsPlaceAndStore) {
    const MadeBatch made;
    StoreId other = kStoreId;
    other[0] ^= 1;
    EXPECT_FALSE(decode_batch(made.bytes, other, MadeBatch::kSegment, MadeBatch::kPage));
    EXPECT_FALSE(decode_batch(made.bytes, kStoreId, MadeBatch::kSegment + 1, MadeBatch::kPage));
    EXPECT_FALSE(decode_batch(made.bytes, kStoreId, MadeBatch::kSegment, MadeBatch::kPage + 1));
    EXPECT_TRUE(looks_like_batch(made.bytes, kStoreId, MadeBatch::kSegment, MadeBatch::kPage));
    EXPECT_FALSE(looks_like_batch(made.bytes, other, MadeBatch::kSegment, MadeBatch::kPage));
}

TEST(Batch, SealedNonsenseIsRefused) {
    const MadeBatch made;
    const auto header = [&](const std::function<void(BatchHeader&)>& change) {
        return made.refusal<BatchHeader>(0, change);
    };
    EXPECT_EQ(header([](auto& h) { h.entries = 4; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.entries = 0xFFFFFFFF; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.records = 3; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.record_bytes = 0; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.record_bytes = 0xFFFFFFFF; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.record_bytes = h.record_bytes - 1; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.data_pages = 4; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.data_pages = kSegmentPages; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.sequence = 8; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.durable_through = 9; }), ErrorCode::kCorrupt);
    EXPECT_EQ(header([](auto& h) { h.reserved = 1; }), ErrorCode::kCorrupt);

    constexpr size_t kFirstRecord = sizeof(BatchHeader) + 3 * sizeof(Entry);
    const auto record = [&](const std::function<void(RecordHeader&)>& change) {
        return made.refusal<RecordHeader>(kFirstRecord, change);
    };
    EXPECT_EQ(record([](auto& r) { r.reserved = 1; }), ErrorCode::kCorrupt);
    EXPECT_EQ(record([](auto& r) { r.length = 6; }), ErrorCode::kCorrupt);
    EXPECT_EQ(record([](auto& r) { r.length = 14; }), ErrorCode::kCorrupt);
    EXPECT_EQ(record([](auto& r) { r.length = 0xFFFFFFFF; }), ErrorCode::kCorrupt);

    const auto entry = [&](size_t number, const std::function<void(Entry&)>& change) {
        return made.refusal<Entry>(sizeof(BatchHeader) + number * sizeof(Entry), change);
    };
    EXPECT_EQ(entry(0, [](auto& e) { e.page = 20; }), ErrorCode::kCorrupt) << "in the header";
    EXPECT_EQ(entry(0, [](auto& e) { e.offset = 1; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(0, [](auto& e) { e.length = 100; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(0, [](auto& e) { e.length = 0; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(0, [](auto& e) { e.length = 3 * kPageBytes; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(0, [](auto& e) { e.length = 0xFFF000; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(0, [](auto& e) { e.kind = 4; }), ErrorCode::kCorrupt) << "a member";
    EXPECT_EQ(entry(0, [](auto& e) { e.kind = 0; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(0, [](auto& e) { e.kind = 9; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(1, [](auto& e) { e.length = kMaxObjectBytes + 1; }), ErrorCode::kCorrupt);
    EXPECT_EQ(entry(2, [](auto& e) { e.page = 23; }), ErrorCode::kCorrupt) << "out of order";
    EXPECT_EQ(entry(2, [](auto& e) { e.page = 26; }), ErrorCode::kCorrupt) << "behind the batch";
    EXPECT_EQ(entry(2, [](auto& e) { e.page = 0xFFFF; }), ErrorCode::kCorrupt);
}

std::vector<Entry> footer_entries() {
    std::vector<Entry> entries{MadeBatch::entry(2, EntryKind::kChunk, kPageBytes),
                               MadeBatch::entry(4, EntryKind::kPack, 6000)};
    Entry member = MadeBatch::entry(5, EntryKind::kMember, 100);
    member.offset = 60;
    entries.push_back(member);
    return entries;
}

TEST(Footer, DecodesWhatWasMadeAndSeesDamage) {
    constexpr uint32_t kFooterPage = 6;
    const std::vector<Entry> entries = footer_entries();
    const ByteVector footer = encode_footer(kStoreId, 3, kFooterPage, entries, 4, 8);
    const uint64_t file_pages = kFooterPage + footer.size() / kPageBytes;
    const auto decoded = decode_footer(footer, kStoreId, 3, file_pages);
    ASSERT_OK(decoded);
    EXPECT_EQ(decoded->entries.size(), entries.size());
    EXPECT_EQ(decoded->trailer.first_sequence, 4U);
    EXPECT_EQ(decoded->trailer.last_sequence, 8U);
    EXPECT_FALSE(decode_footer_trailer(footer, kStoreId, 4, file_pages));
    EXPECT_FALSE(decode_footer_trailer(footer, kStoreId, 3, file_pages + 1));
    EXPECT_FALSE(decode_footer_trailer(ByteVector(kPageBytes), kStoreId, 3, file_pages));
    for (size_t at = 0; at < footer.size(); ++at) {
        ByteVector damaged = footer;
        damaged[at] ^= std::byte{0x80};
        if (decode_footer_trailer(damaged, kStoreId, 3, file_pages)) {
            ASSERT_FALSE(decode_footer(damaged, kStoreId, 3, file_pages)) << at;
        }
    }
}

TEST(Footer, SealedNonsenseIsRefused) {
    const auto refused = [](std::vector<Entry> entries) {
        const ByteVector footer = encode_footer(kStoreId, 3, 6, entries, 4, 8);
        return !decode_footer(footer, kStoreId, 3, 6 + footer.size() / kPageBytes);
    };
    std::vector<Entry> entries = footer_entries();
    EXPECT_FALSE(refused(entries));
    entries[2].page = 3;
    EXPECT_TRUE(refused(entries)) << "a member before its pack";
    entries = footer_entries();
    entries[2].length = 2000;
    EXPECT_TRUE(refused(entries)) << "a member that leaves its pack";
    entries = footer_entries();
    entries[2].offset = kPageBytes;
    EXPECT_TRUE(refused(entries)) << "an offset outside the page";
    entries = footer_entries();
    entries.erase(entries.begin() + 1);
    EXPECT_TRUE(refused(entries)) << "a member without a pack";
    entries = footer_entries();
    std::swap(entries[0], entries[1]);
    EXPECT_TRUE(refused(entries)) << "out of order";
}

TEST(SegmentHeaderFormat, DamageAndForeignersAreRefused) {
    const SegmentHeader header = make_segment_header(kStoreId, 3, 10);
    ASSERT_OK(decode_segment_header(bytes_of(header), kStoreId, 3));
    EXPECT_FALSE(decode_segment_header(bytes_of(header), kStoreId, 4));
    EXPECT_FALSE(decode_segment_header(bytes_of(header), StoreId{}, 3));
    for (size_t at = 0; at < sizeof(header); at += 3) {
        ByteVector bytes(bytes_of(header).begin(), bytes_of(header).end());
        bytes[at] ^= std::byte{4};
        ASSERT_FALSE(decode_segment_header(bytes, kStoreId, 3)) << at;
    }
    SegmentHeader newer = header;
    newer.read_version = 2;
    newer.checksum = checksum64(bytes_of(newer).subspan(16));
    EXPECT_EQ(decode_segment_header(bytes_of(newer), kStoreId, 3).error().code(),
              ErrorCode::kUnsupported);
}

DeadMap good_dead_map() {
    DeadMap map{.generation = 7, .segments = {}};
    map.segments[2].whole = true;
    map.segments[5] = {.whole = false,
                       .runs = {{.page = 1, .pages = 3}, {.page = 9, .pages = 100}},
                       .members = {200U << 16 | 56U, 200U << 16 | 900U},
                       .damaged = {300U << 16}};
    map.segments[9].damaged = {4U << 16 | 60U};
    return map;
}

TEST(DeadMapFormat, DecodesWhatWasMadeAndSeesDamage) {
    const DeadMap map = good_dead_map();
    const ByteVector bytes = encode_dead_map(kStoreId, map);
    const auto decoded = decode_dead_map(bytes, kStoreId, 7);
    ASSERT_OK(decoded);
    EXPECT_EQ(decoded->segments, map.segments);
    EXPECT_EQ(decode_dead_map(bytes, kStoreId, 8).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(decode_dead_map(bytes, StoreId{}, 7).error().code(), ErrorCode::kCorrupt);
    for (size_t at = 0; at < bytes.size(); ++at) {
        ByteVector damaged = bytes;
        damaged[at] ^= std::byte{2};
        const auto refused = decode_dead_map(damaged, kStoreId, 7);
        ASSERT_FALSE(refused) << at;
        ASSERT_EQ(refused.error().code(), ErrorCode::kCorrupt) << at;
        ASSERT_NE(refused.error().message().find("offset"), std::string::npos);
    }
    for (size_t length = 0; length < bytes.size(); ++length) {
        ASSERT_FALSE(decode_dead_map(Bytes(bytes).first(length), kStoreId, 7)) << length;
    }
    EXPECT_OK(
        decode_dead_map(encode_dead_map(kStoreId, {.generation = 1, .segments = {}}), kStoreId, 1));
}

TEST(DeadMapFormat, SealedNonsenseIsRefused) {
    // Where the parts of good_dead_map() stand.
    constexpr size_t kWholeRow = sizeof(DeadMapHeader);
    constexpr size_t kRow = kWholeRow + sizeof(DeadMapSegment);
    constexpr size_t kRuns = kRow + sizeof(DeadMapSegment);
    constexpr size_t kMembers = kRuns + 2 * sizeof(DeadMapRun);
    const auto refusal = [](size_t at, uint64_t value, size_t size) {
        ByteVector bytes = encode_dead_map(kStoreId, good_dead_map());
        const U64Le word(value);
        std::memcpy(bytes.data() + at, &word, size);
        const U64Le sum(checksum64(Bytes(bytes).subspan(16)));
        std::memcpy(bytes.data() + 8, &sum, sizeof(sum));
        const auto decoded = decode_dead_map(bytes, kStoreId, 7);
        EXPECT_FALSE(decoded) << at;
        return decoded ? ErrorCode::kIo : decoded.error().code();
    };
    EXPECT_EQ(refusal(offsetof(DeadMapHeader, read_version), 2, 2), ErrorCode::kUnsupported);
    EXPECT_EQ(refusal(offsetof(DeadMapHeader, write_version), 2, 2), ErrorCode::kUnsupported);
    EXPECT_EQ(refusal(offsetof(DeadMapHeader, features_read_only), 1, 8), ErrorCode::kUnsupported);
    for (const auto& [at, value, size] : std::vector<std::tuple<size_t, uint64_t, size_t>>{
             {offsetof(DeadMapHeader, page_bytes), 8192, 4},
             {offsetof(DeadMapHeader, segments), 2, 4},
             {offsetof(DeadMapHeader, segments), 4, 4},
             {offsetof(DeadMapHeader, segments), 0xFFFFFFFF, 4},
             {offsetof(DeadMapHeader, file_bytes), 1, 8},
             {offsetof(DeadMapHeader, reserved), 1, 1},
             {kWholeRow + offsetof(DeadMapSegment, segment), 0, 4},
             {kWholeRow + offsetof(DeadMapSegment, segment), 5, 4},
             {kWholeRow + offsetof(DeadMapSegment, flags), 0, 4},
             {kWholeRow + offsetof(DeadMapSegment, flags), 3, 4},
             {kRow + offsetof(DeadMapSegment, flags), 1, 4},
             {kRow + offsetof(DeadMapSegment, segment), 0xFFFFFFFF, 4},
             {kRow + offsetof(DeadMapSegment, runs), 0xFFFFFFFF, 4},
             {kRow + offsetof(DeadMapSegment, damaged), 0xFFFFFFFF, 4},
             {kRow + offsetof(DeadMapSegment, reserved), 1, 4},
             {kRuns, 0, 2},          // Page 0 holds the segment's header.
             {kRuns + 2, 0, 2},      // A run of nothing.
             {kRuns + 2, 8, 2},      // Adjacent to the next.
             {kRuns + 2, 9, 2},      // Overlapping.
             {kRuns + 6, 16384, 2},  // Past the segment's end.
             {kMembers, 0, 2},
             {kMembers, 16384, 2},
             {kMembers, 201, 2},
             {kMembers + 2, 4096, 2},
             {kMembers + 2, 900, 2},
         }) {
        EXPECT_EQ(refusal(at, value, size), ErrorCode::kCorrupt) << at << " " << value;
    }
}

TEST(DeadMapFormat, RunsAreSkipped) {
    const std::vector<PageRun> runs{{.page = 1, .pages = 3}, {.page = 9, .pages = 2}};
    const std::vector<uint32_t> expected{0, 4, 4, 4, 4, 5, 6, 7, 8, 11, 11, 11, 12};
    for (uint32_t page = 0; page < expected.size(); ++page) {
        EXPECT_EQ(skip_dead(runs, page), expected[page]) << page;
    }
    EXPECT_EQ(skip_dead({}, 3), 3U);
}

TEST(Pack, HostileTablesAreRefused) {
    const ByteVector content = make_bytes(1, 50);
    const ByteVector aux = make_bytes(2, 9);
    PackBuilder builder;
    ASSERT_TRUE(builder.add(hash(content), content, aux));
    ASSERT_TRUE(builder.add(hash({}), {}, {}));
    const ByteVector pack = builder.finish();
    EXPECT_TRUE(builder.empty());
    const auto view = decode_pack(pack);
    ASSERT_OK(view);
    ASSERT_EQ(view->entries.size(), 2U);
    std::vector<Entry> members;
    append_member_entries(*view, 9, members);
    EXPECT_EQ(members[0].offset_bytes(), 9 * kPageBytes + 16 + 80);
    EXPECT_EQ(members[1].length, 0U);

    // No byte of header or tables may be changed in a way that leads outside the pack.
    for (size_t at = 0; at < sizeof(PackHeader) + 2 * sizeof(PackEntry); ++at) {
        for (const unsigned bit : {0U, 3U, 7U}) {
            ByteVector damaged = pack;
            damaged[at] ^= std::byte{1} << bit;
            const auto decoded = decode_pack(damaged);
            if (!decoded) {
                continue;
            }
            uint64_t end = sizeof(PackHeader) + decoded->entries.size_bytes();
            for (const PackEntry& entry : decoded->entries) {
                ASSERT_GE(entry.offset.get(), end);
                end = entry.offset.get() + sizeof(PackMember) + entry.content_bytes.get() +
                      entry.aux_bytes.get();
                ASSERT_LE(end, damaged.size());
            }
        }
    }
    for (size_t length = 0; length < pack.size(); ++length) {
        ASSERT_FALSE(decode_pack(Bytes(pack).first(length))) << length;
    }
}

TEST(Pack, IsFullInTime) {
    PackBuilder builder;
    const ByteVector content = make_bytes(1, 3000);
    size_t count = 0;
    while (builder.add(hash(content), content, {})) {
        ++count;
    }
    EXPECT_EQ(count, (kMaxPackBytes - sizeof(PackHeader)) / (3000 + 48));
    EXPECT_LE(builder.finish().size(), kMaxPackBytes);
    const ByteVector largest = make_bytes(2, kMaxObjectBytes);
    EXPECT_TRUE(builder.add(hash(largest), largest, {}));
}

}  // namespace
}  // namespace stellarium::nebula
