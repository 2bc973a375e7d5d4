// The algebra of extents within one leaf: canonical form, overlay, cutting.
#include <algorithm>
#include <cassert>

#include "nova/tree.h"

namespace stellarium::nova {

bool Extent::same_content(const Extent& other) const {
    return first_page == other.first_page && pages == other.pages &&
           first_in_chunk == other.first_in_chunk && hole == other.hole && id == other.id;
}

bool Extent::continued_by(const Extent& next) const {
    if (end_page() != next.first_page || hole != next.hole) {
        return false;
    }
    return hole || (first_in_chunk + pages == next.first_in_chunk && id == next.id);
}

Extent Extent::slice(uint32_t first, uint32_t end) const {
    assert(first >= first_page && first < end && end <= end_page());
    Extent part = *this;
    part.first_page = static_cast<uint16_t>(first);
    part.pages = static_cast<uint16_t>(end - first);
    if (!hole) {
        part.first_in_chunk = static_cast<uint8_t>(first_in_chunk + (first - first_page));
    }
    return part;
}

bool same_content(std::span<const Extent> a, std::span<const Extent> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](const Extent& x, const Extent& y) { return x.same_content(y); });
}

bool is_canonical(std::span<const Extent> extents, bool holes_allowed) {
    const Extent* previous = nullptr;
    for (const Extent& extent : extents) {
        if (extent.pages == 0 || extent.end_page() > kPagesPerLeaf) {
            return false;
        }
        if (extent.hole) {
            if (!holes_allowed || extent.first_in_chunk != 0 || extent.id != ChunkId{}) {
                return false;
            }
        } else if (extent.first_in_chunk + uint32_t{extent.pages} > nebula::kMaxChunkPages ||
                   extent.id == ChunkId{}) {
            return false;
        }
        if (previous != nullptr &&
            (previous->end_page() > extent.first_page || previous->continued_by(extent))) {
            return false;
        }
        previous = &extent;
    }
    return true;
}

uint64_t hidden_pages(std::span<const Extent> below, std::span<const Extent> top) {
    uint64_t hidden = 0;
    for (size_t i = 0, k = 0; i < below.size() && k < top.size();) {
        if (!below[i].hole) {
            const uint32_t first = std::max(below[i].first_page, top[k].first_page);
            const uint32_t end = std::min(below[i].end_page(), top[k].end_page());
            hidden += end > first ? end - first : 0;
        }
        (below[i].end_page() <= top[k].end_page() ? i : k) += 1;
    }
    return hidden;
}

void append_merged(Extents& extents, const Extent& next) {
    assert(extents.empty() || extents.back().end_page() <= next.first_page);
    if (!extents.empty() && extents.back().continued_by(next)) {
        Extent& last = extents.back();
        last.pages = static_cast<uint16_t>(last.pages + next.pages);
        if (!last.chunk_address) {
            last.chunk_address = next.chunk_address;
        }
        return;
    }
    extents.push_back(next);
}

Extents overlay(std::span<const Extent> below, std::span<const Extent> top, bool keep_holes) {
    Extents merged;
    merged.reserve(below.size() + 2 * top.size());
    auto keep = [&](const Extent& extent) {
        if (keep_holes || !extent.hole) {
            append_merged(merged, extent);
        }
    };
    // What of `below` lies before the next extent of `top` is kept; what lies under it is dropped.
    size_t next = 0;          // In `below`.
    uint32_t first_page = 0;  // Pages of `below` before this one are done with.
    auto keep_below_until = [&](uint32_t end_page) {
        for (; next < below.size() && below[next].first_page < end_page; ++next) {
            const uint32_t first = std::max(uint32_t{below[next].first_page}, first_page);
            const uint32_t end = std::min(below[next].end_page(), end_page);
            if (first < end) {
                keep(below[next].slice(first, end));
            }
            if (below[next].end_page() > end_page) {
                return;  // The rest of it may show again behind `top`.
            }
        }
    };
    for (const Extent& extent : top) {
        keep_below_until(extent.first_page);
        keep(extent);
        first_page = extent.end_page();
    }
    keep_below_until(kPagesPerLeaf);
    return merged;
}

void truncate(Extents& extents, uint32_t end_page) {
    while (!extents.empty() && extents.back().first_page >= end_page) {
        extents.pop_back();
    }
    if (!extents.empty() && extents.back().end_page() > end_page) {
        extents.back() = extents.back().slice(extents.back().first_page, end_page);
    }
}

}  // namespace stellarium::nova
