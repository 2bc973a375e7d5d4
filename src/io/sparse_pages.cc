#include "io/sparse_pages.h"

#include <algorithm>
#include <cstring>

namespace stellarium::io {
namespace {

/// Stands for allocated space that was never written. Shared by all, so never changed in place.
const SparsePages::PageRef& unwritten_page() {
    static const SparsePages::PageRef kPage = [] {
        SparsePages::PageRef made;
        made.mutate().fill(std::byte{0});
        return made;
    }();
    return kPage;
}

constexpr uint64_t page_of(uint64_t offset_bytes) {
    return offset_bytes / SparsePages::kPageBytes;
}

/// Calls step(offset, length) for the part of the range in each page.
template <typename Step>
void for_each_page_part(uint64_t offset_bytes, uint64_t length_bytes, Step&& step) {
    const uint64_t end = offset_bytes + length_bytes;
    while (offset_bytes < end) {
        const uint64_t page_end = (page_of(offset_bytes) + 1) * SparsePages::kPageBytes;
        const uint64_t length = std::min(end, page_end) - offset_bytes;
        step(offset_bytes, length);
        offset_bytes += length;
    }
}

}  // namespace

const SparsePages::PageRef* SparsePages::find(uint64_t page) const {
    if (!table_.has_value()) {
        return nullptr;
    }
    const uint64_t leaf = page / kPagesPerLeaf;
    const auto at = std::ranges::lower_bound(*table_, leaf, {}, &Table::value_type::first);
    if (at == table_->end() || at->first != leaf) {
        return nullptr;
    }
    const PageRef& found = (*at->second)[page % kPagesPerLeaf];
    return found.has_value() ? &found : nullptr;
}

SparsePages::PageRef& SparsePages::slot(uint64_t page) {
    Table& table = table_.mutate();
    const uint64_t leaf = page / kPagesPerLeaf;
    auto at = std::ranges::lower_bound(table, leaf, {}, &Table::value_type::first);
    if (at == table.end() || at->first != leaf) {
        at = table.emplace(at, leaf, CopyOnWrite<Leaf>());
    }
    return at->second.mutate()[page % kPagesPerLeaf];
}

void SparsePages::read(MutableBytes into, uint64_t offset_bytes) const {
    for_each_page_part(offset_bytes, into.size(), [&](uint64_t offset, uint64_t length) {
        std::byte* to = into.data() + (offset - offset_bytes);
        if (const PageRef* page = find(page_of(offset))) {
            std::memcpy(to, (*page)->data() + offset % kPageBytes, length);
        } else {
            std::memset(to, 0, length);
        }
    });
}

void SparsePages::write(Bytes from, uint64_t offset_bytes) {
    for_each_page_part(offset_bytes, from.size(), [&](uint64_t offset, uint64_t length) {
        write_in_page(from.subspan(offset - offset_bytes, length), offset);
    });
}

SparsePages::PageRef SparsePages::write_in_page(Bytes from, uint64_t offset_bytes) {
    PageRef& page = slot(page_of(offset_bytes));
    if (!page.has_value()) {
        ++allocated_pages_;
    }
    std::memcpy(page.mutate().data() + offset_bytes % kPageBytes, from.data(), from.size());
    return page;
}

void SparsePages::set_page(uint64_t page, PageRef content) {
    PageRef& target = slot(page);
    allocated_pages_ += content.has_value() ? 1 : 0;
    allocated_pages_ -= target.has_value() ? 1 : 0;
    target = std::move(content);
}

void SparsePages::zero(uint64_t offset_bytes, uint64_t length_bytes) {
    const uint64_t end = offset_bytes + length_bytes;
    for (const uint64_t page : allocated_in(offset_bytes, length_bytes)) {
        const uint64_t page_begin = page * kPageBytes;
        const uint64_t from = std::max(offset_bytes, page_begin);
        const uint64_t to = std::min(end, page_begin + kPageBytes);
        PageRef& target = slot(page);
        if (to - from == kPageBytes) {
            target.reset();
            --allocated_pages_;
        } else if (!target.shares_with(unwritten_page())) {
            std::memset(target.mutate().data() + (from - page_begin), 0, to - from);
        }
    }
}

void SparsePages::allocate(uint64_t page) {
    PageRef& target = slot(page);
    if (!target.has_value()) {
        target = unwritten_page();
        ++allocated_pages_;
    }
}

bool SparsePages::is_allocated(uint64_t page) const {
    return find(page) != nullptr;
}

std::vector<uint64_t> SparsePages::allocated_in(uint64_t offset_bytes,
                                                uint64_t length_bytes) const {
    std::vector<uint64_t> pages;
    if (!table_.has_value() || length_bytes == 0) {
        return pages;
    }
    const uint64_t first = page_of(offset_bytes);
    const uint64_t last = page_of(offset_bytes + length_bytes - 1);
    auto at =
        std::ranges::lower_bound(*table_, first / kPagesPerLeaf, {}, &Table::value_type::first);
    for (; at != table_->end() && at->first <= last / kPagesPerLeaf; ++at) {
        for (uint64_t i = 0; i < kPagesPerLeaf; ++i) {
            const uint64_t page = at->first * kPagesPerLeaf + i;
            if (page >= first && page <= last && (*at->second)[i].has_value()) {
                pages.push_back(page);
            }
        }
    }
    return pages;
}

std::optional<std::pair<uint64_t, uint64_t>> SparsePages::next_data(uint64_t offset_bytes,
                                                                    uint64_t end_bytes) const {
    if (!table_.has_value() || offset_bytes >= end_bytes) {
        return std::nullopt;
    }
    std::optional<uint64_t> begin;
    uint64_t end = 0;  // Of the run that began.
    const uint64_t first = page_of(offset_bytes);
    auto at =
        std::ranges::lower_bound(*table_, first / kPagesPerLeaf, {}, &Table::value_type::first);
    for (; at != table_->end(); ++at) {
        if (begin && end != at->first * kPagesPerLeaf * kPageBytes) {
            break;
        }
        const uint64_t skip = at->first == first / kPagesPerLeaf ? first % kPagesPerLeaf : 0;
        bool ended = false;
        for (uint64_t i = skip; i < kPagesPerLeaf; ++i) {
            const PageRef& page = (*at->second)[i];
            const bool written = page.has_value() && !page.shares_with(unwritten_page());
            if (!written && begin) {
                ended = true;
                break;
            }
            if (written) {
                const uint64_t page_begin = (at->first * kPagesPerLeaf + i) * kPageBytes;
                begin = begin.value_or(std::max(page_begin, offset_bytes));
                end = page_begin + kPageBytes;
            }
        }
        if (ended) {
            break;
        }
    }
    if (!begin || *begin >= end_bytes) {
        return std::nullopt;
    }
    return std::pair(*begin, std::min(end, end_bytes) - *begin);
}

}  // namespace stellarium::io
