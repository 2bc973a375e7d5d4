#include "test/model/pool_shadow.h"

#include <algorithm>

namespace stellarium::nova::model {

Content::Page& Content::page_for_writing(uint64_t number) {
    auto& page = pages_[number];
    if (!page) {
        page = std::make_shared<Page>();
    } else if (page.use_count() > 1) {
        page = std::make_shared<Page>(*page);
    }
    return *page;
}

void Content::resize(uint64_t size_bytes) {
    if (size_bytes < size_bytes_) {
        zero(size_bytes, size_bytes_ - size_bytes);
    }
    size_bytes_ = size_bytes;
}

void Content::write(uint64_t offset_bytes, Bytes data) {
    while (!data.empty()) {
        const uint64_t within = offset_bytes % kPageBytes;
        const size_t step = std::min<uint64_t>(data.size(), kPageBytes - within);
        std::memcpy(page_for_writing(offset_bytes / kPageBytes).data() + within, data.data(), step);
        data = data.subspan(step);
        offset_bytes += step;
    }
}

void Content::zero(uint64_t offset_bytes, uint64_t length_bytes) {
    const uint64_t end = offset_bytes + length_bytes;
    for (auto it = pages_.lower_bound(offset_bytes / kPageBytes); it != pages_.end();) {
        const uint64_t start = std::max(offset_bytes, it->first * kPageBytes);
        const uint64_t stop = std::min(end, (it->first + 1) * kPageBytes);
        if (start >= stop) {
            break;
        }
        if (stop - start == kPageBytes) {
            it = pages_.erase(it);
            continue;
        }
        std::memset(page_for_writing(it->first).data() + start % kPageBytes, 0, stop - start);
        ++it;
    }
}

void Content::read(uint64_t offset_bytes, MutableBytes into) const {
    while (!into.empty()) {
        const uint64_t within = offset_bytes % kPageBytes;
        const size_t step = std::min<uint64_t>(into.size(), kPageBytes - within);
        const auto it = pages_.find(offset_bytes / kPageBytes);
        if (it == pages_.end()) {
            std::memset(into.data(), 0, step);
        } else {
            std::memcpy(into.data(), it->second->data() + within, step);
        }
        into = into.subspan(step);
        offset_bytes += step;
    }
}

std::set<uint64_t> Content::data_pages() const {
    std::set<uint64_t> pages;
    for (const auto& [number, page] : pages_) {
        if (!all_zero(*page)) {
            pages.insert(number);
        }
    }
    return pages;
}

std::set<uint64_t> Content::differing_pages(const Content& a, const Content& b) {
    std::set<uint64_t> candidates;
    for (const Content* content : {&a, &b}) {
        for (const auto& [number, page] : content->pages_) {
            candidates.insert(number);
        }
    }
    std::erase_if(candidates, [&](uint64_t number) {
        return a.read(number * kPageBytes, kPageBytes) == b.read(number * kPageBytes, kPageBytes);
    });
    return candidates;
}

void ShadowVolume::remember(uint64_t offset_bytes, uint64_t length_bytes) {
    for (uint64_t sector = offset_bytes / kSectorBytes;
         sector < (offset_bytes + length_bytes) / kSectorBytes; ++sector) {
        auto& versions = older[sector];
        versions.push_back(content.sector(sector));
        if (auto unsettled = uncertain.extract(sector)) {
            versions.insert(versions.end(), unsettled.mapped().begin(), unsettled.mapped().end());
        }
    }
}

void ShadowVolume::write(uint64_t offset_bytes, Bytes data) {
    remember(offset_bytes, data.size());
    content.write(offset_bytes, data);
}

void ShadowVolume::zero(uint64_t offset_bytes, uint64_t length_bytes) {
    // Only what holds something, or may, can be something else after a crash.
    std::set<uint64_t> pages = content.data_pages();
    for (const auto& [sector, versions] : uncertain) {
        pages.insert(sector * kSectorBytes / kPageBytes);
    }
    for (const uint64_t page : pages) {
        const uint64_t start = std::max(offset_bytes, page * kPageBytes);
        const uint64_t stop = std::min(offset_bytes + length_bytes, (page + 1) * kPageBytes);
        if (start < stop) {
            remember(start, stop - start);
        }
    }
    content.zero(offset_bytes, length_bytes);
}

void ShadowVolume::may_have_written(uint64_t offset_bytes, Bytes data) {
    for (uint64_t done = 0; done < data.size(); done += kSectorBytes) {
        Sector sector{};
        std::memcpy(sector.data(), data.data() + done, sector.size());
        uncertain[(offset_bytes + done) / kSectorBytes].push_back(sector);
    }
}

void parent_renamed(Shadow& shadow, const std::string& from, const std::string& to) {
    for (auto& [name, volume] : shadow) {
        if (volume.parent_removed) {
            continue;
        }
        if (volume.parent == from) {
            volume.parent = to;
        } else if (volume.parent.starts_with(from + "@")) {
            volume.parent = to + volume.parent.substr(from.size());
        }
    }
}

void parent_removed(Shadow& shadow, const std::string& source) {
    for (auto& [name, volume] : shadow) {
        volume.parent_removed =
            volume.parent_removed || volume.parent == source ||
            (volume.parent.starts_with(source + "@") && source.find('@') == std::string::npos);
    }
}

}  // namespace stellarium::nova::model
