// Holds docs/formats/tree.md, arena.md and records.md to the code: constants, magics, offsets, bits
// and dumps.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/hash.h"
#include "io/simulated.h"
#include "nova/arena.h"
#include "nova/codec.h"
#include "nova/format.h"
#include "nova/limits.h"
#include "nova/records.h"

namespace stellarium::nova {
namespace {

/// The page, as lines under their nearest heading.
class Page {
  public:
    explicit Page(const std::string& name = "tree.md") {
        std::ifstream file(STELLARIUM_SOURCE_DIR "/docs/formats/" + name);
        std::string heading;
        for (std::string line; std::getline(file, line);) {
            if (line.starts_with("## ") || line.starts_with("### ")) {
                heading = line.substr(line.find(' ') + 1);
            } else {
                sections_[heading].push_back(line);
            }
        }
    }
    bool has(const std::string& heading) const { return sections_.contains(heading); }
    /// Cells of the rows of the tables in a section, without the headings of the tables.
    std::vector<std::vector<std::string>> rows(const std::string& heading) const {
        std::vector<std::vector<std::string>> rows;
        for (const std::string& line : sections_.at(heading)) {
            if (!line.starts_with("| ")) {
                continue;
            }
            std::vector<std::string> cells;
            std::istringstream stream(line.substr(2));
            for (std::string cell; std::getline(stream, cell, '|');) {
                const size_t first = cell.find_first_not_of(" `");
                const size_t last = cell.find_last_not_of(" `");
                cells.push_back(first == std::string::npos ? ""
                                                           : cell.substr(first, last - first + 1));
            }
            if (cells[0].starts_with("---")) {
                rows.pop_back();  // What came before was the heading.
            } else {
                rows.push_back(std::move(cells));
            }
        }
        return rows;
    }
    /// The bytes of the hex dumps of a section.
    std::vector<std::vector<std::byte>> dumps(const std::string& heading) const {
        std::vector<std::vector<std::byte>> dumps;
        bool inside = false;
        for (const std::string& line : sections_.at(heading)) {
            if (line.starts_with("```")) {
                inside = !inside;
                if (inside) {
                    dumps.emplace_back();
                }
            } else if (inside) {
                std::istringstream stream(line.substr(4));
                for (std::string digits; stream >> digits;) {
                    dumps.back().push_back(static_cast<std::byte>(std::stoul(digits, nullptr, 16)));
                }
            }
        }
        return dumps;
    }

  private:
    std::map<std::string, std::vector<std::string>> sections_;
};

struct Field {
    std::string name;
    size_t offset;
    size_t size;
    bool operator==(const Field&) const = default;
};

#define STELLARIUM_FIELD(Struct, field)                        \
    Field {                                                    \
        #field, offsetof(Struct, field), sizeof(Struct::field) \
    }

void expect_struct(const Page& page, const std::string& name, size_t size,
                   const std::vector<Field>& fields) {
    const std::string heading = fmt::format("`{}` ({} bytes)", name, size);
    ASSERT_TRUE(page.has(heading)) << heading;
    std::vector<Field> documented;
    for (const auto& row : page.rows(heading)) {
        documented.push_back({row.at(2), std::stoul(row.at(0)), std::stoul(row.at(1))});
    }
    EXPECT_EQ(documented.size(), fields.size()) << name;
    for (size_t i = 0; i < std::min(documented.size(), fields.size()); ++i) {
        EXPECT_TRUE(documented[i] == fields[i]) << name << "." << fields[i].name;
    }
}

TEST(TreeFormatPage, StructsAreAsDocumented) {
    const Page page;
    expect_struct(page, "NodeHeader", sizeof(NodeHeader),
                  {STELLARIUM_FIELD(NodeHeader, magic), STELLARIUM_FIELD(NodeHeader, version),
                   STELLARIUM_FIELD(NodeHeader, level), STELLARIUM_FIELD(NodeHeader, entries)});
    expect_struct(page, "InnerHeader", sizeof(InnerHeader),
                  {STELLARIUM_FIELD(InnerHeader, node), STELLARIUM_FIELD(InnerHeader, present)});
    expect_struct(page, "DeltaChild", sizeof(DeltaChild),
                  {STELLARIUM_FIELD(DeltaChild, id), STELLARIUM_FIELD(DeltaChild, leaves),
                   STELLARIUM_FIELD(DeltaChild, extents)});
    expect_struct(page, "BucketLeaf", sizeof(BucketLeaf),
                  {STELLARIUM_FIELD(BucketLeaf, leaf), STELLARIUM_FIELD(BucketLeaf, extents)});
}

TEST(TreeFormatPage, ConstantsAndMagicsAreAsDocumented) {
    const Page page;
    std::map<std::string, uint64_t> constants{
        {"kPagesPerLeaf", kPagesPerLeaf},   {"kFanout", kFanout},
        {"kTreeLevels", kTreeLevels},       {"kMaxChunkPages", nebula::kMaxChunkPages},
        {"kBucketExtents", kBucketExtents}, {"kNodeVersion", kNodeVersion},
        {"kMaxNodeBytes", kMaxNodeBytes}};
    std::map<std::string, NodeMagic> magics{{"kTreeLeaf", NodeMagic::kTreeLeaf},
                                            {"kTreeInner", NodeMagic::kTreeInner},
                                            {"kDeltaLeaf", NodeMagic::kDeltaLeaf},
                                            {"kDeltaInner", NodeMagic::kDeltaInner},
                                            {"kDeltaBucket", NodeMagic::kDeltaBucket}};
    for (const auto& row : page.rows("Shape")) {
        if (const auto constant = constants.find(row.at(0)); constant != constants.end()) {
            EXPECT_EQ(row.at(1), std::to_string(constant->second)) << row.at(0);
            constants.erase(constant);
        } else {
            ASSERT_TRUE(magics.contains(row.at(0))) << row.at(0);
            const U32Le letters = static_cast<uint32_t>(magics[row.at(0)]);
            ASSERT_EQ(row.at(1).size(), sizeof(letters));
            EXPECT_EQ(std::memcmp(row.at(1).data(), &letters, sizeof(letters)), 0) << row.at(0);
            magics.erase(row.at(0));
        }
    }
    EXPECT_TRUE(constants.empty() && magics.empty()) << "not documented";
}

TEST(TreeFormatPage, BitsOfAnExtentAreAsDocumented) {
    const Page page;
    // The largest value of each field alone, as the encoder writes it.
    const auto bits_of = [](Extent extent, bool is_hole) {
        extent.hole = is_hole;
        extent.pages = std::max<uint16_t>(extent.pages, 1);
        if (!is_hole) {
            extent.id.bytes.fill(1);
        }
        const EncodedNode node = encode_delta_leaf({extent});
        return load<ExtentEntry>(Bytes(node.content).subspan(sizeof(NodeHeader))).bits.get();
    };
    Extent last_page;
    last_page.first_page = kPagesPerLeaf - 1;
    Extent longest;
    longest.pages = kPagesPerLeaf;
    Extent deepest;
    deepest.first_in_chunk = nebula::kMaxChunkPages - 1;
    Extents many(kPagesPerLeaf);
    for (uint32_t i = 0; i < kPagesPerLeaf; ++i) {
        many[i].first_page = static_cast<uint16_t>(i);
        many[i].pages = 1;
        many[i].id.bytes = {static_cast<uint8_t>(i), static_cast<uint8_t>(i >> 8), 1};
    }
    const EncodedNode full = encode_tree_leaf(many);
    const uint32_t last_entry =
        load<ExtentEntry>(
            Bytes(full.content)
                .subspan(sizeof(NodeHeader) + (kPagesPerLeaf - 1) * sizeof(ExtentEntry)))
            .bits;
    std::map<std::string, uint32_t> masks{{"hole", bits_of({}, true)},
                                          {"chunk", last_entry & ~bits_of(last_page, false)},
                                          {"first_in_chunk", bits_of(deepest, false)},
                                          {"pages", bits_of(longest, true) & ~bits_of({}, true)},
                                          {"first_page", bits_of(last_page, false)}};
    for (const auto& row : page.rows("`ExtentEntry` (4 bytes)")) {
        const auto bit = static_cast<uint32_t>(std::stoul(row.at(0)));
        const auto bits = static_cast<uint32_t>(std::stoul(row.at(1)));
        ASSERT_TRUE(masks.contains(row.at(2)));
        EXPECT_EQ(masks[row.at(2)], ((uint64_t{1} << bits) - 1) << bit) << row.at(2);
        masks.erase(row.at(2));
    }
    EXPECT_TRUE(masks.empty());
}

TEST(TreeFormatPage, DumpsAreNodesThatDecode) {
    const auto dumps = Page().dumps("Examples");
    ASSERT_EQ(dumps.size(), 2U);
    const auto leaf = decode_tree_leaf(dumps[0], {});
    ASSERT_TRUE(leaf) << leaf.error().message();
    ASSERT_EQ(leaf->extents.size(), 4U);
    EXPECT_EQ(leaf->extents[1].first_page, 7U);
    EXPECT_EQ(leaf->extents[3].first_in_chunk, 3U);
    EXPECT_EQ(encode_tree_leaf(leaf->extents).content, dumps[0]);
    const auto bucket = decode_delta_bucket(dumps[1], {}, kTreeLevels);
    ASSERT_TRUE(bucket) << bucket.error().message();
    ASSERT_EQ(bucket->leaves.size(), 2U);
    EXPECT_EQ(bucket->leaves[1].first, 1'000'000'000U);
    EXPECT_TRUE(bucket->table.extents.back().hole);
}

TEST(ScrubFormatPage, StructsAndDumpAreAsDocumented) {
    using format::ScrubFile;
    using format::ScrubPassRecord;
    const Page page("scrub.md");
    expect_struct(page, "ScrubFile", sizeof(ScrubFile),
                  {STELLARIUM_FIELD(ScrubFile, magic), STELLARIUM_FIELD(ScrubFile, version),
                   STELLARIUM_FIELD(ScrubFile, end_segment), STELLARIUM_FIELD(ScrubFile, store),
                   STELLARIUM_FIELD(ScrubFile, next), STELLARIUM_FIELD(ScrubFile, first_ns),
                   STELLARIUM_FIELD(ScrubFile, present), STELLARIUM_FIELD(ScrubFile, last),
                   STELLARIUM_FIELD(ScrubFile, checksum)});
    expect_struct(
        page, "ScrubPassRecord", sizeof(ScrubPassRecord),
        {STELLARIUM_FIELD(ScrubPassRecord, started_ns), STELLARIUM_FIELD(ScrubPassRecord, ended_ns),
         STELLARIUM_FIELD(ScrubPassRecord, bytes), STELLARIUM_FIELD(ScrubPassRecord, entries),
         STELLARIUM_FIELD(ScrubPassRecord, damaged)});
    const auto dumps = page.dumps("Examples");
    ASSERT_EQ(dumps.size(), 1U);
    ScrubFile file{};
    file.magic = format::kScrubMagic;
    file.version = format::kScrubVersion;
    file.end_segment = 5;
    file.store.fill(0x11);
    file.next = nebula::PageAddress::make(2, 77).value();
    file.first_ns = 1'700'000'000'000'000'000;
    file.present.started_ns = 1'700'000'100'000'000'000;
    file.present.bytes = 70'000'000;
    file.present.entries = 4000;
    file.checksum = checksum64(bytes_of(file).first(offsetof(ScrubFile, checksum)));
    std::string text;
    for (size_t i = 0; i < sizeof(file); ++i) {
        text += i % 16 == 0 ? fmt::format("\n{:04x} ", i) : std::string();
        text += fmt::format(" {:02x}", static_cast<unsigned>(bytes_of(file)[i]));
    }
    EXPECT_TRUE(std::ranges::equal(dumps[0], bytes_of(file))) << "written now:" << text;
}

TEST(ArenaFormatPage, StructsAndConstantsAreAsDocumented) {
    using format::ArenaHeader;
    using format::ArenaSlot;
    using format::ArenaSlotKind;
    const Page page("arena.md");
    expect_struct(page, "ArenaHeader", sizeof(ArenaHeader),
                  {STELLARIUM_FIELD(ArenaHeader, magic), STELLARIUM_FIELD(ArenaHeader, version),
                   STELLARIUM_FIELD(ArenaHeader, slot_count), STELLARIUM_FIELD(ArenaHeader, store),
                   STELLARIUM_FIELD(ArenaHeader, arena), STELLARIUM_FIELD(ArenaHeader, previous),
                   STELLARIUM_FIELD(ArenaHeader, boot), STELLARIUM_FIELD(ArenaHeader, device),
                   STELLARIUM_FIELD(ArenaHeader, inode), STELLARIUM_FIELD(ArenaHeader, checksum)});
    expect_struct(page, "ArenaSlot", sizeof(ArenaSlot),
                  {STELLARIUM_FIELD(ArenaSlot, volume), STELLARIUM_FIELD(ArenaSlot, page),
                   STELLARIUM_FIELD(ArenaSlot, sequence),
                   STELLARIUM_FIELD(ArenaSlot, data_checksum), STELLARIUM_FIELD(ArenaSlot, kind),
                   STELLARIUM_FIELD(ArenaSlot, reserved), STELLARIUM_FIELD(ArenaSlot, checksum)});
    std::map<std::string, uint64_t> values{
        {"kArenaVersion", format::kArenaVersion},
        {"kPageBytes", kPageBytes},
        {"kPagesPerLeaf", kPagesPerLeaf},
        {"kFree", static_cast<uint64_t>(ArenaSlotKind::kFree)},
        {"kPage", static_cast<uint64_t>(ArenaSlotKind::kPage)},
        {"kZeros", static_cast<uint64_t>(ArenaSlotKind::kZeros)}};
    for (const char* section : {"Shape", "Kinds of slots"}) {
        for (const auto& row : page.rows(section)) {
            ASSERT_TRUE(values.contains(row.at(0))) << row.at(0);
            EXPECT_EQ(row.at(1), std::to_string(values[row.at(0)])) << row.at(0);
            values.erase(row.at(0));
        }
    }
    EXPECT_TRUE(values.empty()) << "not documented";
}

TEST(ArenaFormatPage, DumpsAreWhatIsWritten) {
    io::SimulatedMachine machine(1);
    Identity store{};
    Identity identity{};
    Identity previous{};
    store.fill(0x11);
    identity.fill(0x22);
    previous.fill(0x33);
    const auto arena = Arena::make_file(machine.env(), "/a.arena", kMinDirtyBudgetBytes,
                                        {.store = store, .superblock = {.device = 5, .inode = 77}},
                                        identity, previous);
    ASSERT_TRUE(arena) << arena.error().message();
    const MutableBytes data = (*arena)->data(0);
    std::ranges::fill(data, std::byte{0xab});
    (*arena)->publish_page(0, 3, 7, checksum64(data));
    const auto file = machine.files().open("/a.arena", io::OpenMode::kReadOnly);
    ASSERT_TRUE(file);
    std::vector<std::byte> header(sizeof(format::ArenaHeader));
    std::vector<std::byte> slot(sizeof(format::ArenaSlot));
    ASSERT_TRUE(io::read_exact(**file, header, 0));
    ASSERT_TRUE(io::read_exact(**file, slot, kPageBytes));
    const auto dumps = Page("arena.md").dumps("Examples");
    ASSERT_EQ(dumps.size(), 2U);
    const auto text = [](Bytes bytes) {
        std::string out;
        for (size_t i = 0; i < bytes.size(); ++i) {
            out += i % 16 == 0 ? fmt::format("\n{:04x} ", i) : std::string();
            out += fmt::format(" {:02x}", static_cast<unsigned>(bytes[i]));
        }
        return out;
    };
    EXPECT_EQ(dumps[0], header) << text(header);
    EXPECT_EQ(dumps[1], slot) << text(slot);
}

TEST(RecordsFormatPage, StructsAreAsDocumented) {
    const Page page("records.md");
    expect_struct(
        page, "NodeName", sizeof(format::NodeName),
        {STELLARIUM_FIELD(format::NodeName, id), STELLARIUM_FIELD(format::NodeName, hint)});
    expect_struct(
        page, "Create", sizeof(format::Create),
        {STELLARIUM_FIELD(format::Create, id), STELLARIUM_FIELD(format::Create, kind),
         STELLARIUM_FIELD(format::Create, name_bytes), STELLARIUM_FIELD(format::Create, reserved),
         STELLARIUM_FIELD(format::Create, size_bytes), STELLARIUM_FIELD(format::Create, created_ns),
         STELLARIUM_FIELD(format::Create, data_bytes), STELLARIUM_FIELD(format::Create, root)});
    expect_struct(
        page, "Clone", sizeof(format::Clone),
        {STELLARIUM_FIELD(format::Clone, source), STELLARIUM_FIELD(format::Clone, first_id),
         STELLARIUM_FIELD(format::Clone, size_bytes), STELLARIUM_FIELD(format::Clone, created_ns),
         STELLARIUM_FIELD(format::Clone, count), STELLARIUM_FIELD(format::Clone, reserved)});
    expect_struct(
        page, "Snapshot", sizeof(format::Snapshot),
        {STELLARIUM_FIELD(format::Snapshot, id), STELLARIUM_FIELD(format::Snapshot, volume),
         STELLARIUM_FIELD(format::Snapshot, created_ns),
         STELLARIUM_FIELD(format::Snapshot, name_bytes),
         STELLARIUM_FIELD(format::Snapshot, reserved)});
    expect_struct(
        page, "Rollback", sizeof(format::Rollback),
        {STELLARIUM_FIELD(format::Rollback, volume), STELLARIUM_FIELD(format::Rollback, snapshot)});
    expect_struct(
        page, "Resize", sizeof(format::Resize),
        {STELLARIUM_FIELD(format::Resize, volume), STELLARIUM_FIELD(format::Resize, size_bytes),
         STELLARIUM_FIELD(format::Resize, root)});
    expect_struct(
        page, "Rename", sizeof(format::Rename),
        {STELLARIUM_FIELD(format::Rename, id), STELLARIUM_FIELD(format::Rename, name_bytes),
         STELLARIUM_FIELD(format::Rename, reserved)});
    expect_struct(
        page, "Remove", sizeof(format::Remove),
        {STELLARIUM_FIELD(format::Remove, count), STELLARIUM_FIELD(format::Remove, reserved)});
    expect_struct(
        page, "Attachment", sizeof(format::Attachment),
        {STELLARIUM_FIELD(format::Attachment, id), STELLARIUM_FIELD(format::Attachment, present),
         STELLARIUM_FIELD(format::Attachment, reserved0),
         STELLARIUM_FIELD(format::Attachment, label_bytes),
         STELLARIUM_FIELD(format::Attachment, options_bytes),
         STELLARIUM_FIELD(format::Attachment, reserved)});
    expect_struct(page, "Map", sizeof(format::Map),
                  {STELLARIUM_FIELD(format::Map, volume), STELLARIUM_FIELD(format::Map, count),
                   STELLARIUM_FIELD(format::Map, reserved)});
    expect_struct(
        page, "MapEntry", sizeof(format::MapEntry),
        {STELLARIUM_FIELD(format::MapEntry, page), STELLARIUM_FIELD(format::MapEntry, chunk_pages),
         STELLARIUM_FIELD(format::MapEntry, id)});
    expect_struct(page, "Hole", sizeof(format::Hole),
                  {STELLARIUM_FIELD(format::Hole, volume), STELLARIUM_FIELD(format::Hole, count),
                   STELLARIUM_FIELD(format::Hole, reserved)});
    expect_struct(
        page, "HoleEntry", sizeof(format::HoleEntry),
        {STELLARIUM_FIELD(format::HoleEntry, page), STELLARIUM_FIELD(format::HoleEntry, pages)});
    expect_struct(
        page, "Fold", sizeof(format::Fold),
        {STELLARIUM_FIELD(format::Fold, volume), STELLARIUM_FIELD(format::Fold, root),
         STELLARIUM_FIELD(format::Fold, count), STELLARIUM_FIELD(format::Fold, reserved)});
    expect_struct(
        page, "Arena", sizeof(format::Arena),
        {STELLARIUM_FIELD(format::Arena, id), STELLARIUM_FIELD(format::Arena, path_bytes),
         STELLARIUM_FIELD(format::Arena, closed), STELLARIUM_FIELD(format::Arena, reserved)});
    expect_struct(page, "Boot", sizeof(format::Boot),
                  {STELLARIUM_FIELD(format::Boot, root), STELLARIUM_FIELD(format::Boot, pieces),
                   STELLARIUM_FIELD(format::Boot, levels), STELLARIUM_FIELD(format::Boot, bytes)});
    expect_struct(
        page, "Sharing", sizeof(format::Sharing),
        {STELLARIUM_FIELD(format::Sharing, id), STELLARIUM_FIELD(format::Sharing, shareable),
         STELLARIUM_FIELD(format::Sharing, reserved)});
    expect_struct(page, "CatalogSharingHeader", sizeof(format::CatalogSharingHeader),
                  {STELLARIUM_FIELD(format::CatalogSharingHeader, shareable_count),
                   STELLARIUM_FIELD(format::CatalogSharingHeader, reserved)});
    expect_struct(page, "CatalogBootHeader", sizeof(format::CatalogBootHeader),
                  {STELLARIUM_FIELD(format::CatalogBootHeader, boot_count),
                   STELLARIUM_FIELD(format::CatalogBootHeader, origin_count)});
    expect_struct(page, "CatalogOrigin", sizeof(format::CatalogOrigin),
                  {STELLARIUM_FIELD(format::CatalogOrigin, id),
                   STELLARIUM_FIELD(format::CatalogOrigin, root)});
    expect_struct(page, "CatalogRoot", sizeof(format::CatalogRoot),
                  {STELLARIUM_FIELD(format::CatalogRoot, magic),
                   STELLARIUM_FIELD(format::CatalogRoot, read_version),
                   STELLARIUM_FIELD(format::CatalogRoot, write_version),
                   STELLARIUM_FIELD(format::CatalogRoot, levels),
                   STELLARIUM_FIELD(format::CatalogRoot, catalog_bytes),
                   STELLARIUM_FIELD(format::CatalogRoot, pieces),
                   STELLARIUM_FIELD(format::CatalogRoot, checksum)});
    expect_struct(page, "CatalogHeader", sizeof(format::CatalogHeader),
                  {STELLARIUM_FIELD(format::CatalogHeader, next_id),
                   STELLARIUM_FIELD(format::CatalogHeader, imported_bytes),
                   STELLARIUM_FIELD(format::CatalogHeader, written_bytes),
                   STELLARIUM_FIELD(format::CatalogHeader, state_count),
                   STELLARIUM_FIELD(format::CatalogHeader, entity_count),
                   STELLARIUM_FIELD(format::CatalogHeader, attachment_count),
                   STELLARIUM_FIELD(format::CatalogHeader, arena_path_bytes),
                   STELLARIUM_FIELD(format::CatalogHeader, arena_closed),
                   STELLARIUM_FIELD(format::CatalogHeader, reserved),
                   STELLARIUM_FIELD(format::CatalogHeader, arena_id)});
    expect_struct(page, "CatalogState", sizeof(format::CatalogState),
                  {STELLARIUM_FIELD(format::CatalogState, root),
                   STELLARIUM_FIELD(format::CatalogState, delta),
                   STELLARIUM_FIELD(format::CatalogState, delta_leaves),
                   STELLARIUM_FIELD(format::CatalogState, delta_extents)});
    expect_struct(page, "CatalogEntity", sizeof(format::CatalogEntity),
                  {STELLARIUM_FIELD(format::CatalogEntity, id),
                   STELLARIUM_FIELD(format::CatalogEntity, parent),
                   STELLARIUM_FIELD(format::CatalogEntity, size_bytes),
                   STELLARIUM_FIELD(format::CatalogEntity, created_ns),
                   STELLARIUM_FIELD(format::CatalogEntity, state),
                   STELLARIUM_FIELD(format::CatalogEntity, kind),
                   STELLARIUM_FIELD(format::CatalogEntity, name_bytes),
                   STELLARIUM_FIELD(format::CatalogEntity, parent_name_bytes)});
    expect_struct(page, "CatalogAttachment", sizeof(format::CatalogAttachment),
                  {STELLARIUM_FIELD(format::CatalogAttachment, id),
                   STELLARIUM_FIELD(format::CatalogAttachment, label_bytes),
                   STELLARIUM_FIELD(format::CatalogAttachment, options_bytes),
                   STELLARIUM_FIELD(format::CatalogAttachment, reserved)});
    expect_struct(page, "CatalogDamage", sizeof(format::CatalogDamage),
                  {STELLARIUM_FIELD(format::CatalogDamage, id),
                   STELLARIUM_FIELD(format::CatalogDamage, reason_bytes),
                   STELLARIUM_FIELD(format::CatalogDamage, reserved)});
}

TEST(RecordsFormatPage, KindsAreAsDocumented) {
    const Page page("records.md");
    const std::map<std::string, RecordKind> kinds{
        {"kCreate", RecordKind::kCreate},     {"kClone", RecordKind::kClone},
        {"kSnapshot", RecordKind::kSnapshot}, {"kRollback", RecordKind::kRollback},
        {"kResize", RecordKind::kResize},     {"kRename", RecordKind::kRename},
        {"kRemove", RecordKind::kRemove},     {"kAttachment", RecordKind::kAttachment},
        {"kMap", RecordKind::kMap},           {"kHole", RecordKind::kHole},
        {"kFold", RecordKind::kFold},         {"kArena", RecordKind::kArena},
        {"kBoot", RecordKind::kBoot},         {"kSharing", RecordKind::kSharing},
    };
    const auto rows = page.rows("Records");
    EXPECT_EQ(rows.size(), kinds.size());
    for (const auto& row : rows) {
        ASSERT_TRUE(kinds.contains(row.at(0))) << row.at(0);
        EXPECT_EQ(std::stoul(row.at(1), nullptr, 16), static_cast<unsigned>(kinds.at(row.at(0))));
    }
}

TEST(RecordsFormatPage, DumpsAreWhatIsWritten) {
    const auto dumps = Page("records.md").dumps("Real payloads");
    ASSERT_EQ(dumps.size(), 3U);
    const SnapshotRecord snapshot{
        .id = 7, .volume = 3, .created_ns = 1'700'000'000'000'000'000, .name = "one"};
    EXPECT_EQ(encode(snapshot), dumps[0]);
    const auto decoded = decode<SnapshotRecord>(dumps[0]);
    ASSERT_TRUE(decoded) << decoded.error().message();
    EXPECT_EQ(decoded->name, "one");
    MapEntry entry{.page = 513, .pages = 2, .first_in_chunk = 2, .id = {}};
    for (size_t i = 0; i < entry.id.bytes.size(); ++i) {
        entry.id.bytes[i] = static_cast<uint8_t>(i);
    }
    const MapRecord map{.volume = 3, .entries = {entry}};
    EXPECT_EQ(encode(map), dumps[1]);
    const auto again = decode<MapRecord>(dumps[1]);
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_EQ(again->entries, map.entries);
    BootRecord boot;
    boot.root.bytes.fill(0x11);
    boot.manifest = Pieces{.top = {}, .levels = 1, .bytes = 70'000};
    boot.manifest->top.id.bytes.fill(0x22);
    boot.manifest->top.hint = nebula::PageAddress::make(2, 77);
    EXPECT_EQ(encode(boot), dumps[2]) << ::testing::PrintToString(encode(boot));
    const auto bound = decode<BootRecord>(dumps[2]);
    ASSERT_TRUE(bound) << bound.error().message();
    EXPECT_EQ(bound->root, boot.root);
    EXPECT_EQ(bound->manifest, boot.manifest);
}

}  // namespace
}  // namespace stellarium::nova
