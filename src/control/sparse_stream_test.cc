#include "control/sparse_stream.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/hash.h"
#include "io/simulated.h"

namespace stellarium::control {
namespace {

using Extents = std::map<uint64_t, std::vector<std::byte>>;

class MapSource final : public SparseSource {
  public:
    MapSource(Extents extents, uint64_t size, std::optional<uint64_t> hint)
        : extents_(std::move(extents)), at_(extents_.begin()), size_(size), hint_(hint) {}
    std::optional<uint64_t> size_hint() const override { return hint_; }
    uint64_t size_bytes() const override { return size_; }
    Result<std::optional<SparseExtent>> next() override {
        if (fail_after_ == 0) {
            return fail(ErrorCode::kBusy, "the file changed");
        }
        --fail_after_;
        if (at_ == extents_.end()) {
            return std::nullopt;
        }
        const SparseExtent extent{at_->first, at_->second};
        ++at_;
        return extent;
    }
    void fail_after(int calls) { fail_after_ = calls; }

  private:
    Extents extents_;
    Extents::const_iterator at_;
    uint64_t size_;
    std::optional<uint64_t> hint_;
    int fail_after_ = -1;
};

/// Gives its bytes in pieces of a fixed size.
class BufferBytes final : public ByteSource {
  public:
    BufferBytes(std::vector<std::byte> bytes, size_t piece)
        : bytes_(std::move(bytes)), piece_(piece) {}
    Result<size_t> read_some(MutableBytes into) override {
        const size_t count = std::min({into.size(), piece_, bytes_.size() - at_});
        std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at_), count, into.begin());
        at_ += count;
        return count;
    }

  private:
    std::vector<std::byte> bytes_;
    size_t piece_;
    size_t at_ = 0;
};

std::vector<std::byte> encode(SparseSource& source) {
    std::vector<std::byte> bytes;
    SparseEncoder encoder(source);
    for (auto pieces = encoder.next(); !pieces.empty(); pieces = encoder.next()) {
        for (const Bytes piece : pieces) {
            bytes.insert(bytes.end(), piece.begin(), piece.end());
        }
    }
    return bytes;
}

struct Decoded {
    Extents extents;
    uint64_t size = 0;
    std::optional<uint64_t> hint;
};

Result<Decoded> decode(std::vector<std::byte> bytes, size_t piece = 1 << 20) {
    SparseDecoder decoder(std::make_unique<BufferBytes>(std::move(bytes), piece));
    Decoded decoded;
    while (true) {
        STELLARIUM_ASSIGN(const auto extent, decoder.next());
        if (!extent) {
            break;
        }
        decoded.extents[extent->offset_bytes].assign(extent->data.begin(), extent->data.end());
    }
    decoded.size = decoder.size_bytes();
    decoded.hint = decoder.size_hint();
    return decoded;
}

std::vector<std::byte> random_bytes(size_t size, uint64_t seed) {
    std::vector<std::byte> bytes(size);
    io::SeededRandom(seed).fill(bytes);
    return bytes;
}

Extents sample() {
    return {{0, random_bytes(4096, 1)},
            {8192, random_bytes(1, 2)},
            {uint64_t{64} << 40, random_bytes(kMaxFrameBytes, 3)}};
}
constexpr uint64_t kSampleSize = (uint64_t{64} << 40) + kMaxFrameBytes + 12345;

TEST(SparseStream, ComesBackWhole) {
    for (const size_t piece : {size_t{1}, size_t{7}, size_t{4096}, size_t{1} << 22}) {
        MapSource source(sample(), kSampleSize, kSampleSize);
        const auto decoded = decode(encode(source), piece);
        ASSERT_TRUE(decoded) << decoded.error().message();
        EXPECT_EQ(decoded->extents, sample());
        EXPECT_EQ(decoded->size, kSampleSize);
        EXPECT_EQ(decoded->hint, kSampleSize);
    }
}

TEST(SparseStream, EmptyAndUnknownSizes) {
    MapSource empty({}, 0, std::nullopt);
    const auto decoded = decode(encode(empty));
    ASSERT_TRUE(decoded);
    EXPECT_TRUE(decoded->extents.empty());
    EXPECT_EQ(decoded->size, 0U);
    EXPECT_EQ(decoded->hint, std::nullopt);
}

TEST(SparseStream, AnErrorOfTheSenderArrives) {
    MapSource source(sample(), kSampleSize, kSampleSize);
    source.fail_after(2);
    const auto decoded = decode(encode(source));
    ASSERT_FALSE(decoded);
    EXPECT_EQ(decoded.error().code(), ErrorCode::kBusy);
    EXPECT_EQ(decoded.error().message(), "the file changed");
}

TEST(SparseStream, EveryTruncationIsRefused) {
    Extents small{{0, random_bytes(100, 4)}, {5000, random_bytes(50, 5)}};
    MapSource source(small, 9000, 9000);
    const std::vector<std::byte> bytes = encode(source);
    for (size_t length = 0; length < bytes.size(); ++length) {
        const auto decoded =
            decode({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(length)});
        ASSERT_FALSE(decoded) << length;
        EXPECT_EQ(decoded.error().code(), ErrorCode::kProtocol) << length;
    }
}

TEST(SparseStream, EveryFlippedBitIsRefused) {
    Extents small{{0, random_bytes(64, 6)}, {5000, random_bytes(32, 7)}};
    MapSource source(small, 9000, 9000);
    const std::vector<std::byte> bytes = encode(source);
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
        std::vector<std::byte> damaged = bytes;
        damaged[bit / 8] ^= std::byte{1} << (bit % 8);
        EXPECT_FALSE(decode(std::move(damaged))) << "bit " << bit;
    }
}

TEST(SparseStream, TrailingBytesAreRefused) {
    MapSource source({}, 10, 10);
    std::vector<std::byte> bytes = encode(source);
    bytes.push_back(std::byte{0});
    const auto decoded = decode(std::move(bytes));
    ASSERT_FALSE(decoded);
    EXPECT_NE(decoded.error().message().find("follow the end frame"), std::string::npos);
}

/// A stream made by hand, so that its checksums are right and its meaning is wrong.
class Forger {
  public:
    Forger(uint32_t version = kSparseVersion, uint32_t reserved = 0) {
        SparseStreamHeader header;
        header.magic = kSparseMagic;
        header.version = version;
        header.reserved = reserved;
        header.size_hint = kUnknownSize;
        header.checksum =
            checksum64(bytes_of(header).first(offsetof(SparseStreamHeader, checksum)));
        add(bytes_of(header));
    }
    Forger& frame(uint32_t type, uint64_t offset, Bytes payload,
                  std::optional<uint32_t> length = {}) {
        SparseFrameHeader header;
        header.type = type;
        header.length = length.value_or(static_cast<uint32_t>(payload.size()));
        header.offset = offset;
        header.checksum = checksum64(
            payload, checksum64(bytes_of(header).first(offsetof(SparseFrameHeader, checksum))));
        add(bytes_of(header));
        add(payload);
        return *this;
    }
    Result<Decoded> decode_it() const { return decode(bytes_); }

  private:
    void add(Bytes bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }
    std::vector<std::byte> bytes_;
};

TEST(SparseStream, WrongMeaningIsRefusedWhateverItsChecksum) {
    const std::vector<std::byte> data(16);
    EXPECT_TRUE(Forger().frame(1, 0, data).frame(2, 16, {}).decode_it());
    // Backwards, overlapping, ending before the data, empty, unknown, beyond every bound.
    EXPECT_FALSE(Forger().frame(1, 100, data).frame(1, 0, data).frame(2, 200, {}).decode_it());
    EXPECT_FALSE(Forger().frame(1, 0, data).frame(1, 8, data).frame(2, 200, {}).decode_it());
    EXPECT_FALSE(Forger().frame(1, 0, data).frame(2, 15, {}).decode_it());
    EXPECT_FALSE(Forger().frame(1, 0, {}).frame(2, 16, {}).decode_it());
    EXPECT_FALSE(Forger().frame(9, 0, data).frame(2, 16, {}).decode_it());
    EXPECT_FALSE(Forger().frame(1, ~uint64_t{0} - 8, data).frame(2, 16, {}).decode_it());
    EXPECT_FALSE(Forger().frame(2, kMaxSparseSize + 1, {}).decode_it());
    EXPECT_FALSE(Forger().frame(2, 16, data).decode_it());
    // A length that would ask for 4 GiB is refused before anything is read.
    EXPECT_FALSE(Forger().frame(1, 0, data, 0xffffffffU).decode_it());
    const auto newer = Forger(kSparseVersion + 1).decode_it();
    ASSERT_FALSE(newer);
    EXPECT_EQ(newer.error().code(), ErrorCode::kUnsupported);
    EXPECT_FALSE(Forger(kSparseVersion, 1).frame(2, 0, {}).decode_it());
}

// --- docs/formats/sparse-stream.md ---------------------------------------------------------------

std::string page_path() {
    return std::string(STELLARIUM_SOURCE_DIR) + "/docs/formats/sparse-stream.md";
}

std::string read_page() {
    std::ifstream file(page_path());
    return {std::istreambuf_iterator<char>(file), {}};
}

/// "field offset size" of each row below the heading of a struct.
std::vector<std::string> documented_fields(const std::string& page, const std::string& name) {
    std::vector<std::string> fields;
    const size_t begin = page.find("### `" + name + "`");
    const std::string section = page.substr(begin, page.find("\n#", begin + 1) - begin);
    std::istringstream lines(section);
    for (std::string line; std::getline(lines, line);) {
        // | 16 | 8 | u64 | `size_hint` | meaning |
        std::istringstream cells(line);
        std::string bar;
        std::string offset;
        std::string size;
        std::string type;
        std::string field;
        if (cells >> bar >> offset >> bar >> size >> bar >> type >> bar >> field &&
            field.starts_with('`')) {
            fields.push_back(field.substr(1, field.size() - 2) + ' ' + offset + ' ' + size);
        }
    }
    return fields;
}

#define FIELD(type, name)                                                   \
    std::string(#name) + ' ' + std::to_string(offsetof(type, name)) + ' ' + \
        std::to_string(sizeof(type::name))

TEST(SparseStreamPage, ListsTheFieldsOfTheStructs) {
    const std::string page = read_page();
    EXPECT_EQ(documented_fields(page, "SparseStreamHeader"),
              (std::vector<std::string>{
                  FIELD(SparseStreamHeader, magic), FIELD(SparseStreamHeader, version),
                  FIELD(SparseStreamHeader, reserved), FIELD(SparseStreamHeader, size_hint),
                  FIELD(SparseStreamHeader, checksum)}));
    EXPECT_EQ(documented_fields(page, "SparseFrameHeader"),
              (std::vector<std::string>{
                  FIELD(SparseFrameHeader, type), FIELD(SparseFrameHeader, length),
                  FIELD(SparseFrameHeader, offset), FIELD(SparseFrameHeader, checksum)}));
}

/// As the page shows it.
std::string hex_dump(Bytes bytes) {
    std::string dump;
    for (size_t at = 0; at < bytes.size(); at += 16) {
        const Bytes line = bytes.subspan(at, std::min<size_t>(16, bytes.size() - at));
        dump += fmt::format("{:06x} ", at);
        std::string text;
        for (const std::byte byte : line) {
            const auto value = static_cast<unsigned char>(byte);
            dump += fmt::format(" {:02x}", value);
            text += value >= ' ' && value <= '~' ? static_cast<char>(value) : '.';
        }
        dump += std::string(3 * (16 - line.size()), ' ') + "  " + text + '\n';
    }
    return dump;
}

/// STELLARIUM_UPDATE_GOLDEN=1 writes the dump into the page anew.
TEST(SparseStreamPage, ShowsARealStream) {
    const Bytes hello = bytes_of(std::string_view("hello"));
    MapSource source({{4096, {hello.begin(), hello.end()}}}, 8192, 8192);
    const std::string dump = hex_dump(encode(source));
    const std::string page = read_page();
    const std::string head = "<!-- hexdump: stream -->\n```\n";
    const size_t begin = page.find(head) + head.size();
    const size_t end = page.find("```", begin);
    if (std::getenv("STELLARIUM_UPDATE_GOLDEN") != nullptr) {
        std::ofstream(page_path()) << page.substr(0, begin) << dump << page.substr(end);
        return;
    }
    EXPECT_EQ(page.substr(begin, end - begin), dump);
}

}  // namespace
}  // namespace stellarium::control
