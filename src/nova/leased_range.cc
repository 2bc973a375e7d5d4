#include "nova/leased_range.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <unordered_map>
#include <vector>

#include <fmt/format.h>

#include "nova/limits.h"
#include "nova/reader.h"

namespace stellarium::nova {
namespace {

/// Read and checked at once.
constexpr uint32_t kCheckedPages = 256;
constexpr std::chrono::milliseconds kBusyPause{1};

/// The segments of one range.
class SegmentFiles {
  public:
    SegmentFiles(nebula::Store& store, size_t most) : store_(store), most_(most) {}

    /// The place of the segment's file in files(), leased now if it was not yet.
    Result<uint32_t> place_of(uint32_t segment) {
        const auto known = places_.find(segment);
        if (known != places_.end()) {
            return known->second;
        }
        if (files_.size() >= most_) {
            return fail(
                ErrorCode::kLimitExceeded,
                fmt::format("the range lies in more than {} segments: map a shorter one", most_));
        }
        for (int attempt = 0;; ++attempt) {
            auto leased = store_.lease_segment(segment);
            if (leased) {
                const auto place = static_cast<uint32_t>(files_.size());
                files_.push_back(*std::move(leased));
                places_.emplace(segment, place);
                return place;
            }
            if (leased.error().code() != ErrorCode::kBusy || attempt == kMaxBusyLeases) {
                return std::unexpected(std::move(leased).error());
            }
            std::this_thread::sleep_for(kBusyPause);
        }
    }
    std::vector<std::shared_ptr<io::File>> take() { return std::move(files_); }

  private:
    nebula::Store& store_;
    const size_t most_;
    std::vector<std::shared_ptr<io::File>> files_;
    std::unordered_map<uint32_t, uint32_t> places_;
};

/// Pages that follow each other in the content and in a segment; a lease knows files only.
struct SegmentRun {
    uint64_t page = 0;
    nebula::PageAddress address;
    uint32_t pages = 0;
};

Result<std::vector<SegmentRun>> runs_of(nebula::Store& store, NodeCache& cache,
                                        const VolumeState& state, uint64_t first_page,
                                        uint64_t pages) {
    std::vector<SegmentRun> runs;
    STELLARIUM_TRY(
        locate_state(store, cache, state, first_page, pages,
                     [&](uint64_t page, nebula::PageAddress address, uint32_t count) {
                         if (!runs.empty() && runs.back().page + runs.back().pages == page &&
                             runs.back().address.segment() == address.segment() &&
                             runs.back().address.page() + runs.back().pages == address.page()) {
                             runs.back().pages += count;
                         } else {
                             runs.push_back({.page = page, .address = address, .pages = count});
                         }
                     }));
    return runs;
}

Result<LeasedRange> try_lease(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                              uint64_t first_page, uint64_t pages, size_t max_files) {
    LeasedRange range;
    STELLARIUM_ASSIGN(const std::vector<SegmentRun> runs,
                      runs_of(store, cache, state, first_page, pages));
    SegmentFiles files(store, max_files);
    range.runs.reserve(runs.size());
    std::vector<std::byte> scratch(size_t{kCheckedPages} * nebula::kPageBytes);
    for (const SegmentRun& run : runs) {
        STELLARIUM_ASSIGN(const uint32_t file, files.place_of(run.address.segment()));
        for (uint32_t done = 0; done < run.pages; done += kCheckedPages) {
            const uint32_t count = std::min(kCheckedPages, run.pages - done);
            const iovec whole{.iov_base = scratch.data(),
                              .iov_len = size_t{count} * nebula::kPageBytes};
            STELLARIUM_TRY(store.read(nebula::PageAddress(run.address.value() + done),
                                      std::span(&whole, 1), IoMode::kMayBlock));
        }
        range.runs.push_back({.page = run.page,
                              .pages = run.pages,
                              .file = file,
                              .file_offset_bytes = run.address.offset_bytes()});
    }
    range.files = files.take();
    return range;
}

}  // namespace

Result<LeasedRange> lease_range(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                                uint64_t first_page, uint64_t pages, size_t max_files) {
    const uint64_t end_page = std::min(first_page + pages, state.pages());
    for (int attempt = 0;; ++attempt) {
        auto leased = try_lease(store, cache, state, first_page, pages, max_files);
        if (leased || leased.error().code() != ErrorCode::kStale || attempt == kMaxStaleReads) {
            return leased;
        }
        // An ordinary read looks up again what has moved, and remembers where it is.
        std::vector<std::byte> scratch(kLeafBytes);
        for (uint64_t leaf = first_page / kPagesPerLeaf; leaf * kPagesPerLeaf < end_page; ++leaf) {
            cache.forget_leaf(store, state.root, leaf);
            const uint64_t length =
                std::min<uint64_t>(kLeafBytes, state.pages() * kPageBytes - leaf * kLeafBytes);
            const iovec whole{.iov_base = scratch.data(), .iov_len = length};
            IovecCursor cursor(std::span(&whole, 1));
            STELLARIUM_TRY(read_state(store, cache, state, leaf * kLeafBytes, cursor, length,
                                      IoMode::kMayBlock));
        }
    }
}

}  // namespace stellarium::nova
