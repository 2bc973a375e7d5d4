// What a garbage collection, or a protection, found to be needed: bits for the entries of segments.
//
// An entry is named by segment and ordinal, its place in the segment's list of entries. That list
// only grows while the store is open, but for one case: where a footer rots and has to be read
// again, the batches are read in its place, and may list more or less. The segment is renumbered
// then (Segment::renumbered), and a set that is older than that says nothing about it: `since` of
// the set is what SegmentSet::renumberings() was when it began. An entry is alive when it was
// visited (by the marking from the roots) or kept (by an append that wrote it or found it as a
// duplicate). Being kept does not make it visited: what it refers to must still be visited.
//
//     MarkSet marks;
//     if (marks.visit(segment, ordinal)) { /* for the first time: go on with what it refers to */ }
//     const MarkSet::Bits live = marks.live(segment);
//
// Thread rule: every function may be called from any thread at the same time.
// Cost: for each segment with a mark three bits an entry, and a bit a page when pages were marked.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "nebula/types.h"

namespace stellarium::nebula {

class MarkSet {
  public:
    /// One bit an ordinal; those behind the end are not set.
    class Bits {
      public:
        bool test(uint32_t ordinal) const {
            const size_t word = ordinal / 64;
            return all_ || (word < words_.size() && (words_[word] >> (ordinal % 64) & 1) != 0);
        }
        /// False when it was set before.
        bool set(uint32_t ordinal);
        void merge(const Bits& other);
        /// Every bit there is.
        static Bits everything() {
            Bits bits;
            bits.all_ = true;
            return bits;
        }

      private:
        std::vector<uint64_t> words_;
        bool all_ = false;
    };

    explicit MarkSet(uint64_t since = 0) : since_(since) {}

    uint64_t since() const { return since_.load(); }

    /// True the first time. The second time makes it shared.
    bool visit(uint32_t segment, uint32_t ordinal);
    /// The same for a chunk that starts at `page`, of which the pages in `mask` are needed.
    bool visit_pages(uint32_t segment, uint32_t ordinal, uint32_t page, uint16_t mask);
    void keep(uint32_t segment, uint32_t ordinal);
    /// Keeps all that `other` has alive; is as old as the older of the two from then on.
    void keep_all(const MarkSet& other);

    bool is_live(uint32_t segment, uint32_t ordinal) const;
    /// Visited more than once.
    bool is_shared(uint32_t segment, uint32_t ordinal) const;
    bool is_kept(uint32_t segment, uint32_t ordinal) const;
    /// The needed pages of a chunk of at most kMaxChunkPages pages from `page` on.
    uint16_t visited_pages(uint32_t segment, uint32_t page, uint32_t pages) const;
    /// Visited or kept.
    Bits live(uint32_t segment) const;

  private:
    struct Segment {
        Bits visited;
        Bits shared;
        Bits kept;
        std::vector<uint64_t> pages;
    };
    /// By segment number, so that marking threads seldom meet.
    struct Stripe {
        mutable std::mutex mutex;
        std::unordered_map<uint32_t, Segment> segments;
    };
    static constexpr size_t kStripes = 64;

    Stripe& stripe(uint32_t segment) { return stripes_[segment % kStripes]; }
    const Stripe& stripe(uint32_t segment) const { return stripes_[segment % kStripes]; }

    std::array<Stripe, kStripes> stripes_;
    std::atomic<uint64_t> since_;
};

}  // namespace stellarium::nebula
