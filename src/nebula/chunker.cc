#include "nebula/chunker.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <string>

#include <fmt/format.h>

namespace stellarium::nebula {
namespace {

// The tail hash. The last 64 bytes are eight little-endian words w; with the keys k below, and all
// sums and products of the words modulo 2^64 except the outer sum, which is modulo 2^128:
//
//     s = (w0+k0)(w1+k1) + (w2+k2)(w3+k3) + (w4+k4)(w5+k5) + (w6+k6)(w7+k7)
//     x = low half of s  XOR  high half of s
//     h = (x XOR x >> 32) * k8
//
// s is NH of Black et al., "UMAC: Fast and Secure Message Authentication" (CRYPTO 1999): two tails
// that differ collide with a probability near 2^-64 over the keys. The page ends a chunk when the
// top kTailMaskBits of h are zero. Content made to defeat the cuts costs its owner dedup only: a
// chunk still ends after 16 pages.
//
// Key i is the first eight bytes, as a little-endian integer, of BLAKE3("stellarium page tail key
// i"), i in decimal: nobody chose them. The test recomputes them.
constexpr size_t kTailBytes = 64;
constexpr int kTailMaskBits = 3;
constexpr std::array<uint64_t, 9> kTailKeys{
    0x9743ed450667a944, 0xa762ddeb5af7e90a, 0x59fb54203ea77545,
    0xf0b473d21a43aedb, 0x34915dee90402295, 0x24172aeb91a94cfa,
    0x01b29ae2be215f79, 0x534118a6fd213b26, 0x0d50293736f3fe0b,
};
static_assert(kTailKeys[8] % 2 == 1, "the last multiplication must lose nothing");

__extension__ using Uint128 = unsigned __int128;

constexpr size_t kTailWords = kTailBytes / sizeof(uint64_t);
using Tail = std::array<uint64_t, kTailWords>;

Tail tail_of(const std::byte* page) {
    Tail words;
    for (size_t i = 0; i < kTailWords; ++i) {
        words[i] =
            load<U64Le>(Bytes(page + kPageBytes - kTailBytes + i * sizeof(uint64_t), 8)).get();
    }
    return words;
}

bool is_zero(const Tail& tail) {
    uint64_t any = 0;
    for (const uint64_t word : tail) {
        any |= word;
    }
    return any == 0;
}

bool hash_matches(const Tail& tail) {
    Uint128 sum = 0;
    for (size_t i = 0; i < kTailWords; i += 2) {
        sum += Uint128{tail[i] + kTailKeys[i]} * (tail[i + 1] + kTailKeys[i + 1]);
    }
    uint64_t x = static_cast<uint64_t>(sum) ^ static_cast<uint64_t>(sum >> 64);
    x = (x ^ x >> 32) * kTailKeys[kTailWords];
    return x >> (64 - kTailMaskBits) == 0;
}

/// The tail of a file, or free space before a checksum: zeros up to the last 16 bytes.
bool is_free_space(const Tail& tail) {
    return (tail[0] | tail[1] | tail[2] | tail[3] | tail[4] | tail[5]) == 0;
}

bool tail_ends_chunk(const Tail& tail) {
    return is_free_space(tail) || hash_matches(tail);
}

/// Cuts a run page by page. finish() closes the chunk at the end of the run.
class RunCutter {
  public:
    explicit RunCutter(std::vector<Cut>& out) : out_(out) {}

    void add(uint64_t page_number, const Tail& tail) {
        if (open_.pages == 0) {
            open_.first_page = page_number;
        }
        ++open_.pages;
        if (tail_ends_chunk(tail) || open_.pages == kMaxChunkPages) {
            finish();
        }
    }

    void finish() {
        if (open_.pages > 0) {
            out_.push_back(open_);
            open_ = {};
        }
    }

  private:
    std::vector<Cut>& out_;
    Cut open_;
};

// The gear table: entry i is the first eight bytes, as a little-endian integer, of
// BLAKE3("stellarium fastcdc gear i"), i in decimal.
std::array<uint64_t, 256> make_gear() {
    std::array<uint64_t, 256> gear{};
    for (size_t i = 0; i < gear.size(); ++i) {
        const std::string text = fmt::format("stellarium fastcdc gear {}", i);
        gear[i] = hash(bytes_of(std::string_view(text))).prefix();
    }
    return gear;
}

// The fingerprint moves left by one bit a byte, so its top bits depend on the last 64 to 49 bytes:
// the widest window there is. (The 2016 paper spreads its mask bits for the same reason, down to
// bit 16 of its tables; taking the topmost ones needs no table of masks.)
constexpr int kStrictBits = 16;  // Before the average: log2(average) + 2.
constexpr int kLooseBits = 12;   // From the average on: log2(average) - 2.
static_assert(size_t{1} << ((kStrictBits + kLooseBits) / 2) == FastCdc::kAverageBytes);

constexpr uint64_t top_bits(int bits) {
    return ~uint64_t{0} << (64 - bits);
}

}  // namespace

bool page_ends_chunk(Bytes page) {
    assert(page.size() == kPageBytes);
    return tail_ends_chunk(tail_of(page.data()));
}

bool is_zero_page(Bytes page) {
    assert(page.size() == kPageBytes);
    return is_zero(tail_of(page.data())) && all_zero(page);
}

void split_runs(Bytes pages, uint64_t first_page, std::vector<ContentRun>& out) {
    assert(pages.size() % kPageBytes == 0);
    ContentRun run;
    for (size_t at = 0; at < pages.size(); at += kPageBytes) {
        const bool zero = is_zero_page(pages.subspan(at, kPageBytes));
        if (run.pages == 0 || zero != run.zero) {
            if (run.pages > 0) {
                out.push_back(run);
            }
            run = {first_page + at / kPageBytes, 0, zero};
        }
        ++run.pages;
    }
    if (run.pages > 0) {
        out.push_back(run);
    }
}

void cut_pages(Bytes run, uint64_t first_page, std::vector<Cut>& out) {
    assert(run.size() % kPageBytes == 0);
    RunCutter cutter(out);
    for (size_t at = 0; at < run.size(); at += kPageBytes) {
        cutter.add(first_page + at / kPageBytes, tail_of(run.data() + at));
    }
    cutter.finish();
}

void cut_block_data(Bytes pages, uint64_t first_page, std::vector<Cut>& out) {
    assert(pages.size() % kPageBytes == 0);
    RunCutter cutter(out);
    for (size_t at = 0; at < pages.size(); at += kPageBytes) {
        const Tail tail = tail_of(pages.data() + at);
        if (is_zero(tail) && all_zero(pages.subspan(at, kPageBytes))) {
            cutter.finish();
        } else {
            cutter.add(first_page + at / kPageBytes, tail);
        }
    }
    cutter.finish();
}

uint32_t open_pages(Bytes pages, uint64_t first_page, const std::vector<Cut>& cuts) {
    if (cuts.empty() ||
        cuts.back().first_page + cuts.back().pages != first_page + pages.size() / kPageBytes ||
        cuts.back().pages == kMaxChunkPages || page_ends_chunk(pages.last(kPageBytes))) {
        return 0;
    }
    return cuts.back().pages;
}

size_t FastCdc::next_cut(Bytes remaining, bool is_last) {
    static const std::array<uint64_t, 256> kGear = make_gear();
    const size_t limit = std::min(remaining.size(), kMaxBytes);
    uint64_t fingerprint = 0;
    size_t at = kMinBytes;
    for (const auto& [end, mask] : {std::pair(kAverageBytes, top_bits(kStrictBits)),
                                    std::pair(kMaxBytes, top_bits(kLooseBits))}) {
        for (const size_t stop = std::min(limit, end); at < stop; ++at) {
            fingerprint = (fingerprint << 1) + kGear[std::to_integer<uint8_t>(remaining[at])];
            if ((fingerprint & mask) == 0) {
                return at + 1;
            }
        }
    }
    return limit == kMaxBytes || is_last ? limit : 0;
}

}  // namespace stellarium::nebula
