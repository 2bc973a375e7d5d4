// Where content is cut into chunks: at page boundaries for block data, at any byte for streams.
//
// The cuts decide which chunks exist, so they are a format: a changed constant would silently stop
// every new chunk from deduplicating with every old one. All constants are written down here and
// in chunker.cc, and chunker_test.cc pins boundaries and ids of generated data for ever.
//
// Block data (disk images, guest writes, VM memory), per page of 4 KiB:
//   1. A zero page is a hole: it belongs to no chunk and costs nothing.
//   2. A run of other pages is cut after a page that ends a chunk: one whose last 64 bytes are all
//      zero (usually the tail of a file), or whose last 64 bytes hash to one of an eighth of all
//      values; and in any case after 16 pages.
//   3. A cut is always made at a multiple of kCutRegionPages (8 MiB) of the volume. Hence a region
//      is cut without knowing its neighbours, on any thread, and a reader of large buffers carries
//      no state: buffers that start at multiples of 8 MiB give the same cuts as the whole image in
//      one piece.
// A chunk may span leaves of a volume's tree (2 MiB): each leaf then refers to its own pages of the
// chunk, a partial reference; split_at_leaves() yields the parts. Cutting at every leaf instead
// would spare that, but costs what the 8 MiB rule was made for: files move by whole pages between
// builds of an image, and every forced cut leaves a chunk on each side of it that no other build
// has. Measured on two builds of a Debian image (256 and 314 MB of non-zero pages), against fixed
// 4 KiB pages (bytes added by the second, bytes of both, index entries of both):
//
//     forced cut every   hash mask   added by second   both      entries
//     2 MiB              1/4         1.170             1.049     0.413
//     2 MiB              1/8         1.270             1.074     0.321
//     8 MiB              1/4         1.120             1.040     0.410
//     8 MiB (chosen)     1/8         1.169             1.054     0.317
//     never              1/8         1.141             1.049     0.316
//
// Only one cache line of a page is read where the page does not end in zeros, so cutting costs a
// small part of hashing. A page whose tail is zero is read further, until its first set byte.
//
// Byte streams (tar layers, kernels, single files): FastCDC.
//
// Thread rule: all functions are pure. Memory is borrowed for the call. Nothing fails.
//
//     std::vector<Cut> cuts;
//     cut_block_data(buffer, offset_bytes / kPageBytes, cuts);  // a region, or several
//     for (const Cut& cut : cuts) { store(cut.first_page, pages_of(cut)); }  // gaps are holes
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "nebula/types.h"

namespace stellarium::nebula {

/// Block data is always cut at multiples of this page number: 8 MiB.
inline constexpr uint32_t kCutRegionPages = 2048;
static_assert(kCutRegionPages % kLeafPages == 0);

/// Pages [first_page, first_page + pages) of a volume, to be stored as one chunk.
struct Cut {
    uint64_t first_page = 0;
    uint32_t pages = 0;  ///< 1 to kMaxChunkPages.
    friend bool operator==(const Cut&, const Cut&) = default;
};

/// Pages [first_page, first_page + pages) of a volume, all zero or none of them zero.
struct PageRun {
    uint64_t first_page = 0;
    uint64_t pages = 0;
    bool zero = false;
    friend bool operator==(const PageRun&, const PageRun&) = default;
};

/// True when a chunk that contains this page ends with it. `page` is exactly kPageBytes long.
bool page_ends_chunk(Bytes page);

/// True when all kPageBytes bytes of `page` are zero.
bool is_zero_page(Bytes page);

/// Appends the maximal runs of zero and of non-zero pages. `pages` is a whole number of pages, the
/// first of which is page `first_page` of the volume.
void split_runs(Bytes pages, uint64_t first_page, std::vector<PageRun>& out);

/// Appends the cuts of one run of non-zero pages that starts at page `first_page` of the volume.
/// They cover the run without gaps; the run's end is a cut.
void cut_pages(Bytes run, uint64_t first_page, std::vector<Cut>& out);

/// split_runs and cut_pages in one pass: appends the chunks of any block data in order; what they
/// leave out is zero.
void cut_block_data(Bytes pages, uint64_t first_page, std::vector<Cut>& out);

/// A part of a cut that lies within one leaf of a volume's tree.
struct LeafPart {
    uint64_t first_page = 0;
    uint32_t pages = 0;
    uint32_t first_page_in_chunk = 0;
    friend bool operator==(const LeafPart&, const LeafPart&) = default;
};

/// Calls `visit(LeafPart)` for each leaf that the cut touches, in order: once, or twice when the
/// cut spans a leaf border.
template <typename Visit>
void split_at_leaves(const Cut& cut, Visit&& visit) {
    for (uint32_t done = 0; done < cut.pages;) {
        const uint64_t page = cut.first_page + done;
        const auto left_in_leaf = static_cast<uint32_t>(kLeafPages - page % kLeafPages);
        const uint32_t pages = std::min(cut.pages - done, left_in_leaf);
        visit(LeafPart{page, pages, done});
        done += pages;
    }
}

/// FastCDC: content-defined cuts of byte streams, so that inserted and removed bytes change only
/// the chunks around them.
///
/// Normalised chunking of level 2, after Xia et al., "FastCDC: a Fast and Efficient Content-Defined
/// Chunking Approach for Data Deduplication" (USENIX ATC 2016) and "The Design of Fast
/// Content-Defined Chunking for Data Deduplication Based Storage Systems" (TPDS 2020). As there,
/// the minimum is a quarter of the average, and the maximum four times it (the papers use eight;
/// ours is the store's limit for a chunk). The fingerprint starts at the minimum; before the
/// average a cut needs its top 16 bits to be zero, after it 12 bits.
class FastCdc {
  public:
    static constexpr size_t kMinBytes = size_t{4} << 10;
    static constexpr size_t kAverageBytes = size_t{16} << 10;
    static constexpr size_t kMaxBytes = kMaxChunkBytes;

    /// The length of the first chunk of `remaining`, the stream from the last cut on. 0 means that
    /// more bytes are needed to tell, or that the stream is finished: with `is_last` (nothing
    /// follows `remaining`) 0 is returned for empty input only. kMaxBytes of input always give a
    /// cut, so a caller that offers at least that much never sees 0 before the end. Cuts do not
    /// depend on how the stream was divided into calls.
    static size_t next_cut(Bytes remaining, bool is_last);
};
static_assert(FastCdc::kMinBytes < FastCdc::kAverageBytes &&
              FastCdc::kAverageBytes < FastCdc::kMaxBytes);

}  // namespace stellarium::nebula
