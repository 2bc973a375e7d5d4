// The differences of two states: both trees and both deltas walked in step.
//
// At each position there are four parts: the tree node and the delta's part of `a`, and those of
// `b`. Where both pairs are equal by name nothing below is looked at; so the walk touches the paths
// to what differs, and the nodes beside them only as names in their parents. A leaf is compared run
// by run of equally mapped pages; with `compare_content`, runs that are mapped to different chunks
// are read and compared.
#include <algorithm>
#include <bit>
#include <cstring>

#include "nova/delta_cursor.h"
#include "nova/limits.h"
#include "nova/node_cache.h"
#include "nova/tree.h"

namespace stellarium::nova {

namespace {

/// One side at one position of the walk.
struct Side {
    NodeRef ref;
    DeltaCursor delta;
    bool empty() const { return ref.empty() && delta.empty(); }
};

/// Merges ranges that touch before they are visited.
class RangeMerger {
  public:
    explicit RangeMerger(const std::function<Result<void>(uint64_t, uint64_t)>& visit)
        : visit_(visit) {}
    Result<void> add(uint64_t first_page, uint64_t pages) {
        if (pages_ != 0 && first_page_ + pages_ == first_page) {
            pages_ += pages;
            return {};
        }
        STELLARIUM_TRY(finish());
        first_page_ = first_page;
        pages_ = pages;
        return {};
    }
    Result<void> finish() {
        const uint64_t pages = std::exchange(pages_, 0);
        return pages == 0 ? Result<void>{} : visit_(first_page_, pages);
    }

  private:
    const std::function<Result<void>(uint64_t, uint64_t)>& visit_;
    uint64_t first_page_ = 0;
    uint64_t pages_ = 0;
};

/// Walks the pages of a leaf in order; each step is a run that one extent or one gap covers.
class PageRuns {
  public:
    explicit PageRuns(const Extents& extents) : extents_(extents) {}
    /// The extent that covers `page`, or null. Pages asked for must not descend.
    const Extent* at(uint32_t page) {
        while (next_ < extents_.size() && extents_[next_].end_page() <= page) {
            ++next_;
        }
        const bool covered = next_ < extents_.size() && extents_[next_].first_page <= page;
        return covered ? &extents_[next_] : nullptr;
    }
    /// End of the run that at(page) found.
    uint32_t run_end(uint32_t page) const {
        if (next_ == extents_.size()) {
            return kPagesPerLeaf;
        }
        const Extent& extent = extents_[next_];
        return extent.first_page <= page ? extent.end_page() : extent.first_page;
    }

  private:
    const Extents& extents_;
    size_t next_ = 0;
};

bool maps_same(const Extent* a, const Extent* b, uint32_t page) {
    if (a == nullptr || b == nullptr) {
        return a == b;
    }
    return a->id == b->id &&
           a->first_in_chunk + (page - a->first_page) == b->first_in_chunk + (page - b->first_page);
}

class Differ {
  public:
    Differ(nebula::Store& store, NodeCache& cache, const VolumeState& a, const VolumeState& b,
           bool compare_content, const std::function<Result<void>(uint64_t, uint64_t)>& visit)
        : store_(store),
          reader_(store, cache),
          pages_a_(a.pages()),
          pages_b_(b.pages()),
          compare_content_(compare_content),
          merger_(visit) {}

    Result<void> run(const VolumeState& a, const VolumeState& b) {
        STELLARIUM_TRY(
            walk(kTreeLevels, 0, {a.root, DeltaCursor(a.delta)}, {b.root, DeltaCursor(b.delta)}));
        return merger_.finish();
    }

  private:
    Result<void> walk(uint32_t level, uint64_t base, Side a, Side b) {
        const uint64_t first_page = base * kPagesPerLeaf;
        const uint64_t end_page = first_page + leaves_below(level) * kPagesPerLeaf;
        // Beyond its size a volume is zeros, whatever a tree may still hold there.
        if (first_page >= pages_a_) {
            a = {};
        }
        if (first_page >= pages_b_) {
            b = {};
        }
        if (a.empty() && b.empty()) {
            return {};
        }
        const bool cut_equally = pages_a_ == pages_b_ || end_page <= std::min(pages_a_, pages_b_);
        if (cut_equally && a.ref == b.ref && a.delta.surely_equals(b.delta)) {
            return {};
        }
        if (level == 0) {
            return compare_leaf(first_page, a, b);
        }
        STELLARIUM_ASSIGN(const InnerPtr node_a, reader_.inner(a.ref, level));
        STELLARIUM_ASSIGN(const InnerPtr node_b, reader_.inner(b.ref, level));
        STELLARIUM_ASSIGN(const uint64_t delta_a, a.delta.present(store_, level));
        STELLARIUM_ASSIGN(const uint64_t delta_b, b.delta.present(store_, level));
        for (uint64_t rest = node_a->present | node_b->present | delta_a | delta_b; rest != 0;
             rest &= rest - 1) {
            const auto index = static_cast<uint32_t>(std::countr_zero(rest));
            STELLARIUM_TRY(walk(level - 1, base + (uint64_t{index} << child_shift(level)),
                                {child_of(*node_a, index), a.delta.child(level, index)},
                                {child_of(*node_b, index), b.delta.child(level, index)}));
        }
        return {};
    }

    Result<Extents> effective(Side& side, uint64_t pages) {
        STELLARIUM_ASSIGN(const ExtentsPtr top, side.delta.extents(store_));
        STELLARIUM_ASSIGN(const LeafPtr below, reader_.leaf(side.ref));
        Extents extents = top == nullptr ? below->extents : overlay(below->extents, *top, false);
        truncate(extents, static_cast<uint32_t>(std::min<uint64_t>(pages, kPagesPerLeaf)));
        return extents;
    }

    Result<void> compare_leaf(uint64_t first_page, Side& a, Side& b) {
        const uint64_t within_a = pages_a_ > first_page ? pages_a_ - first_page : 0;
        const uint64_t within_b = pages_b_ > first_page ? pages_b_ - first_page : 0;
        STELLARIUM_ASSIGN(const Extents extents_a, effective(a, within_a));
        STELLARIUM_ASSIGN(const Extents extents_b, effective(b, within_b));
        PageRuns runs_a(extents_a);
        PageRuns runs_b(extents_b);
        for (uint32_t page = 0; page < kPagesPerLeaf;) {
            const Extent* in_a = runs_a.at(page);
            const Extent* in_b = runs_b.at(page);
            const uint32_t end = std::min(runs_a.run_end(page), runs_b.run_end(page));
            if (!maps_same(in_a, in_b, page)) {
                STELLARIUM_TRY(compare_run(first_page, page, end, in_a, in_b));
            }
            page = end;
        }
        return {};
    }

    /// Pages [page, end) of the leaf at `first_page` are mapped differently: one extent or a gap on
    /// each side.
    Result<void> compare_run(uint64_t first_page, uint32_t page, uint32_t end, const Extent* a,
                             const Extent* b) {
        if (!compare_content_) {
            return merger_.add(first_page + page, end - page);
        }
        const size_t bytes = (end - page) * nebula::kPageBytes;
        STELLARIUM_TRY(read(a, page, bytes, content_a_));
        STELLARIUM_TRY(read(b, page, bytes, content_b_));
        for (size_t offset = 0; offset < bytes; offset += nebula::kPageBytes, ++page) {
            if (std::memcmp(content_a_.data() + offset, content_b_.data() + offset,
                            nebula::kPageBytes) != 0) {
                STELLARIUM_TRY(merger_.add(first_page + page, 1));
            }
        }
        return {};
    }

    /// At most a chunk's length, for at least one side of a run is an extent.
    Result<void> read(const Extent* extent, uint32_t page, size_t bytes,
                      std::vector<std::byte>& into) {
        into.resize(bytes);
        if (extent == nullptr) {
            std::fill(into.begin(), into.end(), std::byte{0});
            return {};
        }
        Extent resolved = *extent;
        const iovec part{into.data(), bytes};
        for (int attempt = 0;; ++attempt) {
            if (!resolved.chunk_address || attempt > 0) {
                STELLARIUM_ASSIGN(const nebula::ChunkLocation location, store_.resolve(extent->id));
                resolved.chunk_address = location.address;
            }
            auto done = store_.read(resolved.address_of(page), {&part, 1}, IoMode::kMayBlock);
            if (done || done.error().code() != ErrorCode::kStale || attempt == kMaxStaleReads) {
                return done;
            }
        }
    }

    nebula::Store& store_;
    TreeReader reader_;
    const uint64_t pages_a_;
    const uint64_t pages_b_;
    const bool compare_content_;
    RangeMerger merger_;
    std::vector<std::byte> content_a_;
    std::vector<std::byte> content_b_;
};

}  // namespace

Result<void> diff(nebula::Store& store, NodeCache& cache, const VolumeState& a,
                  const VolumeState& b, bool compare_content,
                  const std::function<Result<void>(uint64_t first_page, uint64_t pages)>& visit) {
    return Differ(store, cache, a, b, compare_content, visit).run(a, b);
}

}  // namespace stellarium::nova
