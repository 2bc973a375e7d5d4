// Where content is cut into chunks: at page boundaries for block data, at any byte for streams.
//
// The cuts decide which chunks exist, so they are a format: a changed constant would silently stop
// every new chunk from deduplicating with every old one. All constants are written down here and
// in chunker.cc, and chunker_test.cc pins boundaries and ids of generated data for ever.
//
// Block data (disk images, guest writes, VM memory), per page of 4 KiB:
//   1. A zero page is a hole: it belongs to no chunk and costs nothing.
//   2. A run of other pages is cut after a page that ends a chunk: one whose last 64 bytes begin
//      with 48 zeros, whatever the last 16 hold; or whose last 64 bytes hash to one of an eighth of
//      all values; and in any case after 16 pages.
// The zeros are the tail of a file, or the free space of a metadata block whose very end is a
// checksum (a directory block of ext4 ends with 12 bytes of it). Such blocks differ in every build
// of an image; with a cut behind them they do not make the file behind them differ too.
//
// Nothing else cuts: no alignment to leaves or buffers. Files move by whole pages between builds,
// so every forced cut would leave a chunk on each side of it that no other build has. A chunk may
// span leaves of a volume's tree (2 MiB): each leaf then refers to its own pages of the chunk, a
// partial reference; split_at_leaves() yields the parts. Measured on two pairs of Debian images
// (359 and 240 MB of non-zero pages, the second of a pair rebuilt with more packages), against
// fixed 4 KiB pages: bytes added by the second, bytes of both, index entries of both:
//
//     zeros        hash mask   forced cut   first pair             second pair
//     64 of 64     1/8         2 MiB        2.17   1.072   0.317   1.27   1.070   0.321
//     64 of 64     1/8         8 MiB        1.68   1.049   0.313   1.17   1.050   0.317
//     64 of 64     1/4         8 MiB        1.51   1.039   0.406   1.13   1.040   0.410
//     48 of 64     1/8         8 MiB        1.19   1.025   0.330   1.04   1.025   0.337
//     48 of 64     1/4         none         1.02   1.015   0.417   1.01   1.016   0.425
//     48 of 64     1/8         none         1.02   1.017   0.328   1.01   1.019   0.336   (chosen)
//
// Only one cache line of a page is read where the page does not end in zeros, so cutting costs a
// small part of hashing. A page whose tail is zero is read further, until its first set byte.
//
// Byte streams (tar layers, kernels, single files): FastCDC.
//
// Thread rule: all functions are pure. Memory is borrowed for the call. Nothing fails.
//
//     std::vector<Cut> cuts;
//     cut_block_data(buffer, offset_bytes / kPageBytes, cuts);
//     carry(open_pages(buffer, cuts));  // a stream: they go before the next buffer's pages
//     for (const Cut& cut : cuts) { store(cut.first_page, pages_of(cut)); }  // gaps are holes
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "nebula/types.h"

namespace stellarium::nebula {

/// Pages [first_page, first_page + pages) of a volume, to be stored as one chunk.
struct Cut {
    uint64_t first_page = 0;
    uint32_t pages = 0;  ///< 1 to kMaxChunkPages.
    friend bool operator==(const Cut&, const Cut&) = default;
};

/// Pages [first_page, first_page + pages) of a volume, all zero or none of them zero.
/// (A PageRun is pages of a segment.)
struct ContentRun {
    uint64_t first_page = 0;
    uint64_t pages = 0;
    bool zero = false;
    friend bool operator==(const ContentRun&, const ContentRun&) = default;
};

/// True when a chunk that contains this page ends with it. `page` is exactly kPageBytes long.
bool page_ends_chunk(Bytes page);

/// True when all kPageBytes bytes of `page` are zero.
bool is_zero_page(Bytes page);

/// Appends the maximal runs of zero and of non-zero pages. `pages` is a whole number of pages, the
/// first of which is page `first_page` of the volume.
void split_runs(Bytes pages, uint64_t first_page, std::vector<ContentRun>& out);

/// Appends the cuts of one run of non-zero pages that starts at page `first_page` of the volume.
/// They cover the run without gaps; the run's end is a cut.
void cut_pages(Bytes run, uint64_t first_page, std::vector<Cut>& out);

/// split_runs and cut_pages in one pass: appends the chunks of any block data in order; what they
/// leave out is zero.
void cut_block_data(Bytes pages, uint64_t first_page, std::vector<Cut>& out);

/// How many pages at the end of `pages` are a chunk that pages to come could still join: those of
/// the last of `cuts`, if nothing but the end of the buffer ended it, else 0. Whoever cuts a stream
/// in pieces drops that cut and puts these pages before the next ones, if those follow at once.
uint32_t open_pages(Bytes pages, uint64_t first_page, const std::vector<Cut>& cuts);

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
