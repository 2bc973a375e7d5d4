#include "nebula/chunker.h"

#include <array>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

namespace stellarium::nebula {
namespace {

/// SplitMix64 (Steele et al., 2014). Written out here because the golden values below depend on
/// every bit of it.
class SplitMix64 {
  public:
    explicit SplitMix64(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        state_ += 0x9E3779B97F4A7C15;
        uint64_t z = state_;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t bound) { return next() % bound; }

  private:
    uint64_t state_;
};

using Buffer = std::vector<std::byte>;

void fill_random(MutableBytes into, SplitMix64& random) {
    for (size_t i = 0; i < into.size(); i += 8) {
        const U64Le word = random.next();
        std::memcpy(into.data() + i, &word, std::min<size_t>(8, into.size() - i));
    }
}

Buffer random_bytes(size_t size, uint64_t seed) {
    SplitMix64 random(seed);
    Buffer data(size);
    fill_random(data, random);
    return data;
}

/// Of ten pages, about one is zero, one has a zero tail, the others are random.
Buffer mixed_pages(size_t pages, uint64_t seed) {
    SplitMix64 random(seed);
    Buffer data(pages * kPageBytes);
    for (size_t page = 0; page < pages; ++page) {
        const uint64_t kind = random.below(10);
        if (kind > 0) {
            fill_random(MutableBytes(data).subspan(page * kPageBytes,
                                                   kind == 1 ? kPageBytes - 100 : kPageBytes),
                        random);
        }
    }
    return data;
}

/// Pages that never end a chunk: random, drawn again until they do not.
Buffer endless_pages(size_t pages, uint64_t seed) {
    SplitMix64 random(seed);
    Buffer data(pages * kPageBytes);
    for (size_t page = 0; page < pages; ++page) {
        const MutableBytes bytes = MutableBytes(data).subspan(page * kPageBytes, kPageBytes);
        do {
            fill_random(bytes, random);
        } while (page_ends_chunk(bytes));
    }
    return data;
}

std::vector<Cut> cut(Bytes pages, uint64_t first_page = 0) {
    std::vector<Cut> cuts;
    cut_block_data(pages, first_page, cuts);
    return cuts;
}

Bytes bytes_at(Bytes data, const Cut& cut, uint64_t first_page = 0) {
    return data.subspan((cut.first_page - first_page) * kPageBytes, cut.pages * kPageBytes);
}

std::set<Hash256> ids(Bytes data, const std::vector<Cut>& cuts) {
    std::set<Hash256> result;
    for (const Cut& c : cuts) {
        result.insert(hash(bytes_at(data, c)));
    }
    return result;
}

std::vector<Bytes> stream_chunks(Bytes stream) {
    std::vector<Bytes> chunks;
    while (!stream.empty()) {
        const size_t length = FastCdc::next_cut(stream, true);
        chunks.push_back(stream.first(length));
        stream = stream.subspan(length);
    }
    return chunks;
}

std::set<Hash256> stream_ids(Bytes stream) {
    std::set<Hash256> result;
    for (const Bytes chunk : stream_chunks(stream)) {
        result.insert(hash(chunk));
    }
    return result;
}

size_t count_missing(const std::set<Hash256>& in, const std::set<Hash256>& from) {
    return static_cast<size_t>(
        std::ranges::count_if(in, [&](const Hash256& id) { return !from.contains(id); }));
}

// --- Golden values. A change of any of them is a change of format: old stores would stop
// --- deduplicating with new data. Do not update them; find out what changed the cuts.

TEST(ChunkerGolden, BlockCutsOfMixedPages) {
    const Buffer data = mixed_pages(3000, 1);
    const std::vector<Cut> cuts = cut(data);
    Hasher boundaries;
    Hasher chunk_ids;
    for (const Cut& c : cuts) {
        boundaries.update(bytes_of(U64Le{c.first_page}));
        boundaries.update(bytes_of(U32Le{c.pages}));
        chunk_ids.update(bytes_of(hash(bytes_at(data, c))));
    }
    const std::vector<Cut> first(cuts.begin(), cuts.begin() + 8);
    EXPECT_EQ(first, (std::vector<Cut>{
                         {0, 4}, {5, 2}, {7, 1}, {8, 3}, {11, 2}, {14, 1}, {15, 3}, {18, 1}}));
    EXPECT_EQ(cuts.size(), 791U);
    EXPECT_EQ(boundaries.finish().hex(),
              "30058a2c20a9a9fe931884ddef2d5c3bd00cca9406cbff80c0a96f428127135e");
    EXPECT_EQ(chunk_ids.finish().hex(),
              "2766d9cf0be66701021a15a6b2f12137fa3515263bb7e096972f24c1905c53b3");
}

TEST(ChunkerGolden, WhichRandomPagesEndAChunk) {
    const Buffer data = random_bytes(64 * kPageBytes, 2);
    uint64_t ends = 0;
    for (size_t page = 0; page < 64; ++page) {
        ends |= uint64_t{page_ends_chunk(Bytes(data).subspan(page * kPageBytes, kPageBytes))}
                << page;
    }
    EXPECT_EQ(ends, 0x5001400014020008U);
}

TEST(ChunkerGolden, StreamCutsOfRandomBytes) {
    const Buffer data = random_bytes(4'000'003, 3);
    const std::vector<Bytes> chunks = stream_chunks(data);
    Hasher lengths;
    Hasher chunk_ids;
    std::vector<size_t> first;
    for (const Bytes chunk : chunks) {
        lengths.update(bytes_of(U32Le{static_cast<uint32_t>(chunk.size())}));
        chunk_ids.update(bytes_of(hash(chunk)));
        if (first.size() < 8) {
            first.push_back(chunk.size());
        }
    }
    EXPECT_EQ(first, (std::vector<size_t>{20349, 11391, 16614, 21092, 24237, 15512, 23290, 17714}));
    EXPECT_EQ(chunks.size(), 217U);
    EXPECT_EQ(lengths.finish().hex(),
              "d3f6a5f1a8ddcb14c5598719f9779535aa47a30b1412922dd9173f45bcb6a2f8");
    EXPECT_EQ(chunk_ids.finish().hex(),
              "564412aa7c156a30385b4aab403793e5ddca69291f37f59c45c27500a95755e6");
}

TEST(ChunkerGolden, StreamCutsOfText) {
    std::string text;
    for (SplitMix64 random(4); text.size() < 2'000'000;) {
        text += fmt::format("line {} of {}\n", text.size(), random.below(1000));
    }
    Hasher lengths;
    const std::vector<Bytes> chunks = stream_chunks(bytes_of(std::string_view(text)));
    for (const Bytes chunk : chunks) {
        lengths.update(bytes_of(U32Le{static_cast<uint32_t>(chunk.size())}));
    }
    EXPECT_EQ(chunks.size(), 106U);
    EXPECT_EQ(lengths.finish().hex(),
              "0a6f41f6b785cd23f33e513db402c5ccd397ae52f0f0a62c962a0ef69d71a278");
}

TEST(ChunkerGolden, Limits) {
    EXPECT_EQ(kPageBytes, 4096U);
    EXPECT_EQ(kMaxChunkPages, 16U);
    EXPECT_EQ(FastCdc::kMinBytes, 4096U);
    EXPECT_EQ(FastCdc::kAverageBytes, 16384U);
    EXPECT_EQ(FastCdc::kMaxBytes, 65536U);
}

/// The rule that made the keys in chunker.cc, applied again: a page's cut computed as documented,
/// with other code, must be the cut.
TEST(ChunkerGolden, TailHashIsTheDocumentedOne) {
    std::array<uint64_t, 9> keys{};
    for (size_t i = 0; i < keys.size(); ++i) {
        const std::string text = fmt::format("stellarium page tail key {}", i);
        keys[i] = hash(bytes_of(std::string_view(text))).prefix();
    }
    const Buffer data = random_bytes(512 * kPageBytes, 5);
    for (size_t page = 0; page < 512; ++page) {
        const Bytes tail = Bytes(data).subspan(page * kPageBytes, kPageBytes).last(64);
        // 64 x 64 bit products by halves, summed with carry.
        uint64_t low = 0;
        uint64_t high = 0;
        for (size_t i = 0; i < 8; i += 2) {
            const uint64_t a = load<U64Le>(tail.subspan(8 * i, 8)) + keys[i];
            const uint64_t b = load<U64Le>(tail.subspan(8 * i + 8, 8)) + keys[i + 1];
            const uint64_t a0 = a & 0xFFFFFFFF;
            const uint64_t a1 = a >> 32;
            const uint64_t b0 = b & 0xFFFFFFFF;
            const uint64_t b1 = b >> 32;
            const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
            const uint64_t middle2 = a0 * b1 + (middle & 0xFFFFFFFF);
            const uint64_t product_low = a * b;
            const uint64_t product_high = a1 * b1 + (middle >> 32) + (middle2 >> 32);
            low += product_low;
            high += product_high + (low < product_low ? 1 : 0);
        }
        uint64_t x = low ^ high;
        x = (x ^ x >> 32) * keys[8];
        ASSERT_EQ(page_ends_chunk(Bytes(data).subspan(page * kPageBytes, kPageBytes)),
                  x < uint64_t{1} << 61)
            << "page " << page;
    }
}

// --- Properties.

TEST(Chunker, AnEighthOfRandomPagesEndAChunk) {
    const Buffer data = random_bytes(8192 * kPageBytes / 16, 6);
    // Any 64 bytes serve as a tail: slide a page-sized window by 64 bytes.
    size_t ends = 0;
    size_t windows = 0;
    for (size_t at = 0; at + kPageBytes <= data.size(); at += 64) {
        ++windows;
        ends += page_ends_chunk(Bytes(data).subspan(at, kPageBytes)) ? 1 : 0;
    }
    EXPECT_NEAR(static_cast<double>(ends) / static_cast<double>(windows), 0.125, 0.01);
}

TEST(Chunker, OnlyTheLast64BytesDecide) {
    SplitMix64 random(7);
    Buffer page = random_bytes(kPageBytes, 8);
    for (int i = 0; i < 200; ++i) {
        const bool before = page_ends_chunk(page);
        page[random.below(kPageBytes - 64)] ^= std::byte{0x40};
        EXPECT_EQ(page_ends_chunk(page), before);
    }
    std::fill(page.end() - 64, page.end(), std::byte{0});
    EXPECT_TRUE(page_ends_chunk(page));
    EXPECT_FALSE(is_zero_page(page));
}

TEST(Chunker, OneSetBitAnywhereMakesAPageNonZero) {
    Buffer page(kPageBytes);
    EXPECT_TRUE(is_zero_page(page));
    for (size_t i = 0; i < kPageBytes; ++i) {
        page[i] = std::byte{1};
        ASSERT_FALSE(is_zero_page(page)) << i;
        page[i] = std::byte{0};
    }
}

TEST(Chunker, EmptyAndAllZeroGiveNoChunks) {
    EXPECT_TRUE(cut({}).empty());
    EXPECT_TRUE(cut(Buffer(100 * kPageBytes)).empty());
    std::vector<ContentRun> runs;
    split_runs({}, 7, runs);
    EXPECT_TRUE(runs.empty());
    split_runs(Buffer(100 * kPageBytes), 7, runs);
    EXPECT_EQ(runs, (std::vector<ContentRun>{{7, 100, true}}));
}

TEST(Chunker, SixteenPagesAreOneChunkAndSeventeenAreTwo) {
    const Buffer data = endless_pages(33, 9);
    EXPECT_EQ(cut(Bytes(data).first(16 * kPageBytes)), (std::vector<Cut>{{0, 16}}));
    EXPECT_EQ(cut(Bytes(data).first(17 * kPageBytes)), (std::vector<Cut>{{0, 16}, {16, 1}}));
    EXPECT_EQ(cut(data), (std::vector<Cut>{{0, 16}, {16, 16}, {32, 1}}));
}

TEST(Chunker, TheEndOfAPageMayHoldAChecksumBehindFreeSpace) {
    Buffer page = endless_pages(1, 10);
    std::fill(page.end() - 64, page.end() - 16, std::byte{0});
    EXPECT_TRUE(page_ends_chunk(page));
    EXPECT_FALSE(is_zero_page(page));
    // One byte more, and the hash decides.
    size_t ends = 0;
    for (int value = 1; value < 256; ++value) {
        page[kPageBytes - 17] = static_cast<std::byte>(value);
        ends += page_ends_chunk(page) ? 1 : 0;
    }
    EXPECT_LT(ends, 80U);
}

TEST(Chunker, NeitherLeavesNorBuffersCut) {
    const Buffer data = endless_pages(20, 10);
    EXPECT_EQ(cut(Bytes(data).first(10 * kPageBytes), kLeafPages - 5),
              (std::vector<Cut>{{kLeafPages - 5, 10}}));
    EXPECT_EQ(open_pages(Bytes(data).first(10 * kPageBytes), 7,
                         cut(Bytes(data).first(10 * kPageBytes), 7)),
              10U);
    // Full, ended by content, followed by zeros, empty: closed.
    EXPECT_EQ(
        open_pages(Bytes(data).first(16 * kPageBytes), 0, cut(Bytes(data).first(16 * kPageBytes))),
        0U);
    Buffer ended(data.begin(), data.begin() + 2 * kPageBytes);
    std::fill(ended.end() - 64, ended.end(), std::byte{0});
    EXPECT_EQ(open_pages(ended, 0, cut(ended)), 0U);
    Buffer before_hole(data.begin(), data.begin() + 2 * kPageBytes);
    std::fill(before_hole.begin() + kPageBytes, before_hole.end(), std::byte{0});
    EXPECT_EQ(open_pages(before_hole, 0, cut(before_hole)), 0U);
    EXPECT_EQ(open_pages({}, 0, {}), 0U);
}

TEST(Chunker, LeafPartsTileTheCut) {
    std::vector<LeafPart> parts;
    const auto collect = [&](const LeafPart& part) { parts.push_back(part); };
    split_at_leaves({kLeafPages - 5, 10}, collect);
    EXPECT_EQ(parts, (std::vector<LeafPart>{{kLeafPages - 5, 5, 0}, {kLeafPages, 5, 5}}));
    parts.clear();
    split_at_leaves({kLeafPages - 16, 16}, collect);
    split_at_leaves({kLeafPages, 1}, collect);
    EXPECT_EQ(parts, (std::vector<LeafPart>{{kLeafPages - 16, 16, 0}, {kLeafPages, 1, 0}}));
}

TEST(Chunker, ChunksCoverExactlyTheNonZeroPagesAndKeepTheRules) {
    const uint64_t first_page = 5 * kLeafPages - 100;
    const Buffer data = mixed_pages(2500, 11);
    const auto page_at = [&](uint64_t page) {
        return Bytes(data).subspan((page - first_page) * kPageBytes, kPageBytes);
    };
    const uint64_t end = first_page + 2500;
    uint64_t next = first_page;
    for (const Cut& c : cut(data, first_page)) {
        ASSERT_GE(c.first_page, next);
        ASSERT_GE(c.pages, 1U);
        ASSERT_LE(c.pages, kMaxChunkPages);
        for (; next < c.first_page; ++next) {
            ASSERT_TRUE(is_zero_page(page_at(next)));
        }
        for (; next < c.first_page + c.pages; ++next) {
            ASSERT_FALSE(is_zero_page(page_at(next)));
            const bool last = next + 1 == c.first_page + c.pages;
            ASSERT_TRUE(last || !page_ends_chunk(page_at(next)));
            ASSERT_TRUE(!last || page_ends_chunk(page_at(next)) || c.pages == kMaxChunkPages ||
                        next + 1 == end || is_zero_page(page_at(next + 1)));
        }
    }
    for (; next < end; ++next) {
        ASSERT_TRUE(is_zero_page(page_at(next)));
    }
}

TEST(Chunker, RunsThenCutsEqualsOnePass) {
    const Buffer data = mixed_pages(2500, 12);
    std::vector<ContentRun> runs;
    split_runs(data, 100, runs);
    std::vector<Cut> cuts;
    uint64_t next = 100;
    for (const ContentRun& run : runs) {
        EXPECT_EQ(run.first_page, next);
        EXPECT_GT(run.pages, 0U);
        next += run.pages;
        if (!run.zero) {
            cut_pages(
                Bytes(data).subspan((run.first_page - 100) * kPageBytes, run.pages * kPageBytes),
                run.first_page, cuts);
        }
    }
    EXPECT_EQ(next, 2600U);
    EXPECT_EQ(cuts, cut(data, 100));
}

TEST(Chunker, PiecesOfAStreamGiveTheCutsOfTheWhole) {
    constexpr size_t kPages = 3000;
    const Buffer data = mixed_pages(kPages, 13);
    const std::vector<Cut> whole = cut(data);
    SplitMix64 random(14);
    for (int round = 0; round < 20; ++round) {
        std::vector<Cut> cuts;
        uint64_t start = 0;  // Of the pages not finally cut yet.
        for (uint64_t end = 0; end < kPages;) {
            end = std::min<uint64_t>(kPages, end + 1 + random.below(round < 10 ? 20 : 700));
            const Bytes piece = Bytes(data).subspan(start * kPageBytes, (end - start) * kPageBytes);
            std::vector<Cut> piece_cuts;
            cut_block_data(piece, start, piece_cuts);
            const uint32_t open = end < kPages ? open_pages(piece, start, piece_cuts) : 0;
            if (open > 0) {
                piece_cuts.pop_back();
            }
            cuts.insert(cuts.end(), piece_cuts.begin(), piece_cuts.end());
            start = end - open;
        }
        ASSERT_EQ(cuts, whole) << "round " << round;
    }
}

TEST(Chunker, InsertedAndRemovedPagesChangeOnlyTheirSurroundings) {
    const Buffer data = random_bytes(1024 * kPageBytes, 14);
    const std::set<Hash256> before = ids(data, cut(data));
    SplitMix64 random(15);
    for (int round = 0; round < 20; ++round) {
        const size_t at = random.below(1024) * kPageBytes;
        const Buffer inserted = random_bytes((1 + random.below(40)) * kPageBytes, 1000 + at);
        Buffer longer = data;
        longer.insert(longer.begin() + static_cast<ptrdiff_t>(at), inserted.begin(),
                      inserted.end());
        // At most the chunks of the insertion itself, and some until the cuts meet again.
        const size_t allowed = inserted.size() / kPageBytes + 8;
        EXPECT_LE(count_missing(ids(longer, cut(longer)), before), allowed) << "at " << at;

        Buffer shorter = data;
        const size_t removed = std::min(inserted.size(), data.size() - at);
        shorter.erase(shorter.begin() + static_cast<ptrdiff_t>(at),
                      shorter.begin() + static_cast<ptrdiff_t>(at + removed));
        EXPECT_LE(count_missing(ids(shorter, cut(shorter)), before), 8U) << "at " << at;
    }
}

TEST(FastCdc, EmptyShortAndExactInputs) {
    EXPECT_EQ(FastCdc::next_cut({}, true), 0U);
    EXPECT_EQ(FastCdc::next_cut({}, false), 0U);
    const Buffer zeros(FastCdc::kMaxBytes + 1);
    for (const size_t size : {size_t{1}, FastCdc::kMinBytes - 1, FastCdc::kMinBytes}) {
        EXPECT_EQ(FastCdc::next_cut(Bytes(zeros).first(size), false), 0U);
        EXPECT_EQ(FastCdc::next_cut(Bytes(zeros).first(size), true), size);
    }
    // Zeros never match the masks, so they are cut at the maximum.
    EXPECT_EQ(FastCdc::next_cut(Bytes(zeros).first(FastCdc::kMaxBytes - 1), false), 0U);
    EXPECT_EQ(FastCdc::next_cut(Bytes(zeros).first(FastCdc::kMaxBytes), false), FastCdc::kMaxBytes);
    EXPECT_EQ(FastCdc::next_cut(zeros, true), FastCdc::kMaxBytes);
}

TEST(FastCdc, LengthsKeepTheLimitsAndTheAverage) {
    const Buffer data = random_bytes(8'000'000, 16);
    const std::vector<Bytes> chunks = stream_chunks(data);
    for (size_t i = 0; i < chunks.size(); ++i) {
        EXPECT_LE(chunks[i].size(), FastCdc::kMaxBytes);
        EXPECT_TRUE(chunks[i].size() > FastCdc::kMinBytes || i + 1 == chunks.size());
    }
    const size_t average = data.size() / chunks.size();
    EXPECT_GT(average, FastCdc::kAverageBytes * 3 / 4);
    EXPECT_LT(average, FastCdc::kAverageBytes * 3 / 2);
}

TEST(FastCdc, CutsDoNotDependOnFeeding) {
    const Buffer data = random_bytes(1'000'000, 17);
    const std::vector<Bytes> expected = stream_chunks(data);
    SplitMix64 random(18);
    for (int round = 0; round < 10; ++round) {
        size_t start = 0;
        size_t offered = 0;
        std::vector<size_t> lengths;
        while (start < data.size()) {
            const size_t cut_length = FastCdc::next_cut(Bytes(data).subspan(start, offered - start),
                                                        offered == data.size());
            if (cut_length == 0) {
                ASSERT_LT(offered - start, FastCdc::kMaxBytes);
                offered = std::min(data.size(), offered + 1 + random.below(30'000));
                continue;
            }
            lengths.push_back(cut_length);
            start += cut_length;
        }
        ASSERT_EQ(lengths.size(), expected.size());
        for (size_t i = 0; i < lengths.size(); ++i) {
            ASSERT_EQ(lengths[i], expected[i].size());
        }
    }
}

TEST(FastCdc, InsertedAndRemovedBytesChangeOnlyTheirSurroundings) {
    const Buffer data = random_bytes(2'000'000, 19);
    const std::set<Hash256> before = stream_ids(data);
    SplitMix64 random(20);
    for (int round = 0; round < 10; ++round) {
        const size_t at = random.below(data.size() - 1000);
        const auto size = static_cast<ptrdiff_t>(1 + random.below(1000));
        const auto position = static_cast<ptrdiff_t>(at);
        Buffer longer = data;
        longer.insert(longer.begin() + position, static_cast<size_t>(size), std::byte{0x55});
        EXPECT_LE(count_missing(stream_ids(longer), before), 12U) << "at " << at;
        Buffer shorter = data;
        shorter.erase(shorter.begin() + position, shorter.begin() + position + size);
        EXPECT_LE(count_missing(stream_ids(shorter), before), 12U) << "at " << at;
    }
}

}  // namespace
}  // namespace stellarium::nebula
