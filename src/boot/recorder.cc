#include "boot/recorder.h"

#include <algorithm>

namespace stellarium::boot {

void Recorder::append(uint64_t first, uint64_t end) {
    const uint64_t room = kMaxTracePages - pages_;
    if (end - first > room) {
        end = first + room;
        cut_.store(true, std::memory_order_relaxed);
    }
    if (first == end) {
        return;
    }
    if (!runs_.empty() && runs_.back().page + runs_.back().pages == first) {
        runs_.back().pages += end - first;
    } else if (runs_.size() == kMaxTraceRuns) {
        cut_.store(true, std::memory_order_relaxed);
        return;
    } else {
        runs_.push_back({.page = first, .pages = end - first});
    }
    pages_ += end - first;
}

void Recorder::on_read(uint64_t offset_bytes, uint64_t length_bytes) {
    if (cut_.load(std::memory_order_relaxed)) {
        return;
    }
    if (clock_.monotonic() >= end_) {
        cut_.store(true, std::memory_order_relaxed);
        return;
    }
    const uint64_t first = std::min(offset_bytes / nova::kPageBytes, end_page_);
    const uint64_t length =
        std::min(length_bytes, end_page_ * nova::kPageBytes);  // So that nothing overflows.
    const uint64_t end =
        std::min(first + (offset_bytes % nova::kPageBytes + length + nova::kPageBytes - 1) /
                             nova::kPageBytes,
                 end_page_);
    const std::lock_guard lock(mutex_);
    for (uint64_t page = first; page < end;) {
        nova::LeafBits& bits = touched_[page / nova::kPagesPerLeaf];
        const uint64_t stop = std::min(end, (page / nova::kPagesPerLeaf + 1) * nova::kPagesPerLeaf);
        while (page < stop) {
            const auto is_touched = [&](uint64_t which) {
                return nova::has_bit(bits, which % nova::kPagesPerLeaf);
            };
            if (is_touched(page)) {
                ++page;
                continue;
            }
            const uint64_t start = page;
            for (; page < stop && !is_touched(page); ++page) {
                nova::set_bit(bits, page % nova::kPagesPerLeaf);
            }
            append(start, page);
            if (cut_.load(std::memory_order_relaxed)) {
                return;
            }
        }
    }
}

Recorder::Progress Recorder::progress() const {
    const std::lock_guard lock(mutex_);
    return {.pages = pages_, .runs = runs_.size(), .cut = cut_.load(std::memory_order_relaxed)};
}

BootTrace Recorder::trace(std::chrono::nanoseconds wall) const {
    const std::lock_guard lock(mutex_);
    return {.recorded_ns = static_cast<uint64_t>(wall.count()),
            .cut = cut_.load(std::memory_order_relaxed),
            .runs = runs_};
}

}  // namespace stellarium::boot
