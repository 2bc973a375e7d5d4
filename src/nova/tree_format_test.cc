// Holds docs/formats/tree.md and arena.md to the code: constants, magics, offsets, bits and dumps.
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

}  // namespace
}  // namespace stellarium::nova
