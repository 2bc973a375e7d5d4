#include "nova/reader.h"

#include <algorithm>
#include <array>

#include "nova/limits.h"

namespace stellarium::nova {
namespace {

/// The first extent that ends after `page`.
const Extent* first_after(const Extents& extents, uint32_t page) {
    const auto it = std::partition_point(extents.begin(), extents.end(),
                                         [page](const Extent& e) { return e.end_page() <= page; });
    return it == extents.end() ? nullptr : &*it;
}

/// Collects runs of physically consecutive pages, each of which is one read. Where that may block,
/// the device is told of several before the first is waited for: a volume that was written in no
/// order has a run for each page, and one after another they would take the device's latency each.
class RunReader {
  public:
    RunReader(nebula::Store& store, IovecCursor& into, IoMode mode)
        : store_(store), into_(into), mode_(mode) {}

    /// The next `length_bytes` of the target are zeros.
    void zeros(uint64_t length_bytes) {
        end_run();
        into_.fill_zero(length_bytes);
    }

    /// The next `length_bytes` of the target are the bytes from `skip_bytes` on of the page at
    /// `address` and the pages after it.
    Result<void> pages(nebula::PageAddress address, uint64_t skip_bytes, uint64_t length_bytes) {
        const bool continues = in_run_ && skip_bytes == 0 && address.value() == next_value_ &&
                               address.page() != 0 && bytes_ % kPageBytes == 0 &&
                               bytes_ + length_bytes <= kMaxReadRunBytes;
        if (!continues) {
            end_run();
            if (runs_.size() == kMaxRunsAtOnce) {
                STELLARIUM_TRY(read());
            }
            runs_.push_back({.first = address, .first_part = parts_.size()});
            in_run_ = true;
            if (skip_bytes != 0) {
                parts_.push_back(to_iovec(MutableBytes(before_).first(skip_bytes)));
            }
            bytes_ = skip_bytes;
        }
        into_.take(length_bytes, parts_);
        bytes_ += length_bytes;
        const uint64_t page_count = (skip_bytes + length_bytes + kPageBytes - 1) / kPageBytes;
        next_value_ = address.value() + page_count;
        return {};
    }

    /// Reads what was collected.
    Result<void> read() {
        end_run();
        if (mode_ != IoMode::kNoWait && runs_.size() > 1) {
            for (const Run& run : runs_) {
                store_.prefetch(run.first, run.pages);
            }
        }
        for (const Run& run : runs_) {
            const auto parts = std::span(parts_).subspan(run.first_part, run.parts);
            STELLARIUM_TRY(store_.read(run.first, parts, mode_));
        }
        runs_.clear();
        parts_.clear();
        return {};
    }

  private:
    static constexpr size_t kMaxRunsAtOnce = kPagesPerLeaf;

    struct Run {
        nebula::PageAddress first;
        size_t first_part = 0;  ///< Of parts_.
        size_t parts = 0;
        uint32_t pages = 0;
    };

    void end_run() {
        if (!in_run_) {
            return;
        }
        const uint64_t beyond = bytes_ % kPageBytes;
        if (beyond != 0) {
            parts_.push_back(to_iovec(MutableBytes(after_).first(kPageBytes - beyond)));
        }
        Run& run = runs_.back();
        run.parts = parts_.size() - run.first_part;
        run.pages = static_cast<uint32_t>((bytes_ + kPageBytes - 1) / kPageBytes);
        in_run_ = false;
    }

    nebula::Store& store_;
    IovecCursor& into_;
    IoMode mode_;
    std::vector<Run> runs_;
    std::vector<iovec> parts_;  ///< Of all runs.
    // Of the last run, while it can go on.
    bool in_run_ = false;
    uint64_t bytes_ = 0;
    uint64_t next_value_ = 0;  ///< The address after its last page.
    // Where the parts of the first and last page go that were not asked for.
    std::array<std::byte, kPageBytes> before_;
    std::array<std::byte, kPageBytes> after_;
};

/// Where the chunk of an extent begins. `may_be_stale`: the extent is of a delta, whose addresses
/// stay as they were when a chunk is moved; `look_up`: they were found to be stale.
Result<nebula::PageAddress> address_of(nebula::Store& store, NodeCache& cache, const Extent& extent,
                                       uint32_t page, bool in_delta, bool look_up, IoMode mode) {
    std::optional<nebula::PageAddress> chunk = extent.chunk_address;
    if (in_delta && chunk && !look_up) {
        if (const auto moved = cache.moved_to(*chunk)) {
            chunk = moved;
        }
    }
    if (!chunk || (in_delta && look_up)) {
        if (mode == IoMode::kNoWait) {
            return fail(ErrorCode::kWouldBlock, "a chunk has to be looked up");
        }
        STELLARIUM_ASSIGN(const nebula::ChunkLocation location, store.resolve(extent.id));
        if (extent.chunk_address && location.address != *extent.chunk_address) {
            cache.note_moved(*extent.chunk_address, location.address);
        }
        chunk = location.address;
    }
    return nebula::PageAddress(chunk->value() + extent.first_in_chunk + (page - extent.first_page));
}

/// One attempt of read_state(). `look_up`: addresses that deltas hold are not trusted.
Result<void> try_read_state(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                            uint64_t offset_bytes, IovecCursor& into, uint64_t length_bytes,
                            bool look_up, IoMode mode) {
    RunReader run(store, into, mode);
    const uint64_t end_bytes = offset_bytes + length_bytes;
    const uint64_t mapped_end_bytes =
        std::max(offset_bytes, std::min(end_bytes, state.pages() * kPageBytes));
    uint64_t position = offset_bytes;
    while (position < mapped_end_bytes) {
        const uint64_t leaf = position / kLeafBytes;
        const uint64_t leaf_start = leaf * kLeafBytes;
        const uint64_t stop = std::min(mapped_end_bytes, leaf_start + kLeafBytes);
        STELLARIUM_ASSIGN(const auto delta, state.delta.find(store, leaf, mode));
        std::shared_ptr<const DecodedLeaf> base;  // Looked up when the delta leaves a gap.
        while (position < stop) {
            const auto page = static_cast<uint32_t>((position - leaf_start) / kPageBytes);
            const Extent* extent = delta ? first_after(*delta, page) : nullptr;
            uint64_t limit = stop;
            bool in_delta = true;
            if (extent != nullptr && extent->first_page > page) {
                limit = std::min(stop, leaf_start + extent->first_page * kPageBytes);
                extent = nullptr;
            }
            if (extent == nullptr) {
                if (!base) {
                    STELLARIUM_ASSIGN(base, cache.leaf(store, state.root, leaf, mode));
                }
                in_delta = false;
                extent = first_after(base->extents, page);
                if (extent != nullptr && extent->first_page > page) {
                    limit = std::min(limit, leaf_start + extent->first_page * kPageBytes);
                    extent = nullptr;
                }
            }
            if (extent != nullptr) {
                limit = std::min(limit, leaf_start + extent->end_page() * kPageBytes);
            }
            if (extent == nullptr || extent->hole) {
                run.zeros(limit - position);
            } else {
                STELLARIUM_ASSIGN(const nebula::PageAddress address,
                                  address_of(store, cache, *extent, page, in_delta, look_up, mode));
                STELLARIUM_TRY(run.pages(address, position % kPageBytes, limit - position));
            }
            position = limit;
        }
    }
    STELLARIUM_TRY(run.read());
    into.fill_zero(end_bytes - position);
    return {};
}

}  // namespace

Result<void> read_state(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                        uint64_t offset_bytes, IovecCursor& into, uint64_t length_bytes,
                        IoMode mode) {
    const IovecCursor start = into;
    for (int attempt = 0;; ++attempt) {
        auto done = try_read_state(store, cache, state, offset_bytes, into, length_bytes,
                                   /*look_up=*/attempt > 0, mode);
        if (done || done.error().code() != ErrorCode::kStale) {
            return done;
        }
        if (mode == IoMode::kNoWait) {
            return fail(ErrorCode::kWouldBlock, "a chunk has moved");
        }
        if (attempt == kMaxStaleReads) {
            return done;
        }
        const uint64_t end_bytes = offset_bytes + length_bytes;
        for (uint64_t leaf = offset_bytes / kLeafBytes; leaf * kLeafBytes < end_bytes; ++leaf) {
            cache.forget_leaf(store, state.root, leaf);
        }
        into = start;
    }
}

Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(nebula::Store& store,
                                                               NodeCache& cache,
                                                               const VolumeState& state,
                                                               uint64_t offset_bytes) {
    std::optional<std::pair<uint64_t, uint64_t>> found;  // First and end page.
    if (offset_bytes >= state.size_bytes) {
        return std::nullopt;
    }
    const uint64_t first_page = offset_bytes / kPageBytes;
    STELLARIUM_TRY(for_each_leaf(
        store, cache, state, first_page / kPagesPerLeaf, [&](uint64_t leaf) -> Result<bool> {
            if (found && found->second != leaf * kPagesPerLeaf) {
                return false;
            }
            STELLARIUM_ASSIGN(const Extents extents, effective_leaf(store, cache, state, leaf));
            for (const Extent& extent : extents) {
                const uint64_t start =
                    std::max(first_page, leaf * kPagesPerLeaf + extent.first_page);
                const uint64_t end = leaf * kPagesPerLeaf + extent.end_page();
                if (end <= start) {
                    continue;
                }
                if (!found) {
                    found.emplace(start, end);
                } else if (found->second == start) {
                    found->second = end;
                } else {
                    return false;
                }
            }
            return !found || (found->second - found->first) * kPageBytes < kMaxDataRangeBytes;
        }));
    if (!found) {
        return std::nullopt;
    }
    const uint64_t start = std::max(offset_bytes, found->first * kPageBytes);
    const uint64_t end = std::min(state.size_bytes, found->second * kPageBytes);
    if (start >= end) {
        return std::nullopt;
    }
    return std::pair(start, end - start);
}

Result<void> locate_state(
    nebula::Store& store, NodeCache& cache, const VolumeState& state, uint64_t first_page,
    uint64_t pages,
    const std::function<void(uint64_t page, nebula::PageAddress address, uint32_t pages)>& visit) {
    const uint64_t end_page = std::min(first_page + pages, state.pages());
    for (uint64_t page = first_page; page < end_page;) {
        const uint64_t leaf = page / kPagesPerLeaf;
        const uint64_t leaf_page = leaf * kPagesPerLeaf;
        const uint64_t stop = std::min(end_page, leaf_page + kPagesPerLeaf);
        STELLARIUM_ASSIGN(const Extents extents, effective_leaf(store, cache, state, leaf));
        for (const Extent& extent : extents) {
            const uint64_t start = std::max(page, leaf_page + extent.first_page);
            const uint64_t end = std::min(stop, leaf_page + extent.end_page());
            if (start >= end) {
                continue;
            }
            std::optional<nebula::PageAddress> chunk = extent.chunk_address;
            if (chunk) {
                chunk = cache.moved_to(*chunk).value_or(*chunk);
            } else {
                STELLARIUM_ASSIGN(const nebula::ChunkLocation location, store.resolve(extent.id));
                chunk = location.address;
            }
            visit(start,
                  nebula::PageAddress(chunk->value() + extent.first_in_chunk +
                                      (start - leaf_page - extent.first_page)),
                  static_cast<uint32_t>(end - start));
        }
        page = stop;
    }
    return {};
}

}  // namespace stellarium::nova
