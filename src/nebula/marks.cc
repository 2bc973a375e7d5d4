#include "nebula/marks.h"

#include <algorithm>
#include <cassert>

namespace stellarium::nebula {

bool MarkSet::Bits::set(uint32_t ordinal) {
    const size_t word = ordinal / 64;
    const uint64_t bit = uint64_t{1} << (ordinal % 64);
    if (word >= words_.size()) {
        words_.resize(word + 1);
    }
    const bool is_new = (words_[word] & bit) == 0;
    words_[word] |= bit;
    return is_new;
}

void MarkSet::Bits::merge(const Bits& other) {
    all_ = all_ || other.all_;
    words_.resize(std::max(words_.size(), other.words_.size()));
    for (size_t i = 0; i < other.words_.size(); ++i) {
        words_[i] |= other.words_[i];
    }
}

bool MarkSet::visit(uint32_t segment, uint32_t ordinal) {
    Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    Segment& marks = at.segments[segment];
    const bool is_new = marks.visited.set(ordinal);
    if (!is_new) {
        marks.shared.set(ordinal);
    }
    return is_new;
}

bool MarkSet::visit_pages(uint32_t segment, uint32_t ordinal, uint32_t page, uint16_t mask) {
    Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    Segment& marks = at.segments[segment];
    marks.pages.resize(kSegmentPages / 64);
    for (uint32_t i = 0; i < kMaxChunkPages; ++i) {
        if ((mask >> i & 1) != 0) {
            assert(page + i < kSegmentPages);
            marks.pages[(page + i) / 64] |= uint64_t{1} << ((page + i) % 64);
        }
    }
    const bool is_new = marks.visited.set(ordinal);
    if (!is_new) {
        marks.shared.set(ordinal);
    }
    return is_new;
}

void MarkSet::keep(uint32_t segment, uint32_t ordinal) {
    Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    at.segments[segment].kept.set(ordinal);
}

void MarkSet::keep_all(const MarkSet& other) {
    for (uint64_t since = since_.load();
         since > other.since() && !since_.compare_exchange_weak(since, other.since());) {
    }
    for (size_t i = 0; i < kStripes; ++i) {
        // Never both locks at once: two sets might be merged into each other.
        std::vector<std::pair<uint32_t, Bits>> found;
        {
            const std::lock_guard guard(other.stripes_[i].mutex);
            for (const auto& [number, marks] : other.stripes_[i].segments) {
                found.emplace_back(number, marks.kept);
                found.back().second.merge(marks.visited);
            }
        }
        const std::lock_guard guard(stripes_[i].mutex);
        for (const auto& [number, bits] : found) {
            stripes_[i].segments[number].kept.merge(bits);
        }
    }
}

bool MarkSet::is_live(uint32_t segment, uint32_t ordinal) const {
    const Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    const auto it = at.segments.find(segment);
    return it != at.segments.end() &&
           (it->second.visited.test(ordinal) || it->second.kept.test(ordinal));
}

bool MarkSet::is_shared(uint32_t segment, uint32_t ordinal) const {
    const Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    const auto it = at.segments.find(segment);
    return it != at.segments.end() && it->second.shared.test(ordinal);
}

bool MarkSet::is_kept(uint32_t segment, uint32_t ordinal) const {
    const Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    const auto it = at.segments.find(segment);
    return it != at.segments.end() && it->second.kept.test(ordinal);
}

uint16_t MarkSet::visited_pages(uint32_t segment, uint32_t page, uint32_t pages) const {
    const Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    const auto it = at.segments.find(segment);
    uint16_t mask = 0;
    if (it == at.segments.end() || it->second.pages.empty()) {
        return mask;
    }
    for (uint32_t i = 0; i < pages; ++i) {
        const uint64_t bit = it->second.pages[(page + i) / 64] >> ((page + i) % 64) & 1;
        mask = static_cast<uint16_t>(mask | bit << i);
    }
    return mask;
}

MarkSet::Bits MarkSet::live(uint32_t segment) const {
    const Stripe& at = stripe(segment);
    const std::lock_guard guard(at.mutex);
    Bits bits;
    if (const auto it = at.segments.find(segment); it != at.segments.end()) {
        bits = it->second.visited;
        bits.merge(it->second.kept);
    }
    return bits;
}

}  // namespace stellarium::nebula
