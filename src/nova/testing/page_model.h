// The plain shadow of the tree's data: one value for each page.
//
// Thread rule: values.
#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "nova/tree.h"

namespace stellarium::nova::testing {

/// What one page is mapped to.
struct PageMapping {
    enum class Kind : uint8_t { kAbsent, kHole, kMapped };
    Kind kind = Kind::kAbsent;
    uint32_t chunk = 0;  ///< Which of the chunks that the test knows.
    uint32_t page = 0;   ///< In that chunk.
    friend bool operator==(const PageMapping&, const PageMapping&) = default;
};
using PageMap = std::array<PageMapping, kPagesPerLeaf>;

/// The canonical extents of a map, page by page; `chunks` are whole chunks as stored.
inline Extents extents_of(const PageMap& map, const std::vector<Extent>& chunks) {
    Extents extents;
    for (uint32_t page = 0; page < kPagesPerLeaf; ++page) {
        const PageMapping& mapping = map[page];
        if (mapping.kind == PageMapping::Kind::kAbsent) {
            continue;
        }
        Extent extent;
        if (mapping.kind == PageMapping::Kind::kMapped) {
            extent = chunks[mapping.chunk];
            extent.first_in_chunk = static_cast<uint8_t>(mapping.page);
        } else {
            extent.hole = true;
        }
        extent.first_page = static_cast<uint16_t>(page);
        extent.pages = 1;
        append_merged(extents, extent);
    }
    return extents;
}

/// `top` over `below`; without keep_holes, holes become absent.
inline PageMap overlay_maps(const PageMap& below, const PageMap& top, bool keep_holes) {
    PageMap result;
    for (uint32_t page = 0; page < kPagesPerLeaf; ++page) {
        result[page] = top[page].kind != PageMapping::Kind::kAbsent ? top[page] : below[page];
        if (!keep_holes && result[page].kind == PageMapping::Kind::kHole) {
            result[page] = {};
        }
    }
    return result;
}

/// Random runs over random places: whole chunks, parts of chunks, holes, and pages left absent.
class RandomMaps {
  public:
    RandomMaps(uint64_t seed, const std::vector<Extent>& chunks) : random(seed), chunks_(chunks) {}

    std::mt19937_64 random;

    uint64_t below(uint64_t limit) { return random() % limit; }

    void scribble(PageMap& map, bool with_holes) {
        const auto first = static_cast<uint32_t>(below(kPagesPerLeaf));
        const uint64_t what = below(with_holes ? 5 : 4);
        if (what == 4) {
            fill(map, first, static_cast<uint32_t>(1 + below(below(8) == 0 ? 512 : 20)),
                 {PageMapping::Kind::kHole, 0, 0});
            return;
        }
        const auto chunk = static_cast<uint32_t>(below(chunks_.size()));
        const uint32_t pages = chunks_[chunk].pages;
        const auto from = static_cast<uint32_t>(what == 0 ? below(pages) : 0);
        const auto count =
            static_cast<uint32_t>(what <= 1 ? 1 + below(pages - from) : pages - from);
        for (uint32_t i = 0; i < count && first + i < kPagesPerLeaf; ++i) {
            map[first + i] = {PageMapping::Kind::kMapped, chunk, from + i};
        }
    }
    PageMap map(uint64_t scribbles, bool with_holes) {
        PageMap result;
        for (uint64_t i = 0; i < scribbles; ++i) {
            scribble(result, with_holes);
        }
        return result;
    }
    static void fill(PageMap& map, uint32_t first, uint32_t count, const PageMapping& mapping) {
        for (uint32_t page = first; page < first + count && page < kPagesPerLeaf; ++page) {
            map[page] = mapping;
        }
    }

  private:
    const std::vector<Extent>& chunks_;
};

/// Chunks of every length that are in no store: for tests that only map.
inline std::vector<Extent> imaginary_chunks(size_t count) {
    std::vector<Extent> chunks(count);
    for (size_t i = 0; i < count; ++i) {
        const U64Le number = i;
        chunks[i].id = hash(bytes_of(number));
        chunks[i].pages = static_cast<uint16_t>(1 + i % nebula::kMaxChunkPages);
        chunks[i].chunk_address = nebula::PageAddress::make(
            static_cast<uint32_t>(1 + i / 100), static_cast<uint32_t>(16 * (1 + i % 100)));
    }
    return chunks;
}

}  // namespace stellarium::nova::testing
