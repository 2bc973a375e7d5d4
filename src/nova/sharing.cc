#include "nova/sharing.h"

#include <cerrno>
#include <optional>
#include <string>
#include <utility>

#include <sys/mman.h>

#include "nova/limits.h"

namespace stellarium::nova {
namespace {

bool is_damage(const Error& error) {
    return error.code() == ErrorCode::kCorrupt || error.code() == ErrorCode::kNotFound ||
           error.code() == ErrorCode::kIo;
}

void add_to(SharingFinder::Counts& sum, const SharingFinder::Counts& more) {
    sum.stored += more.stored;
    sum.resident += more.resident;
    sum.own += more.own;
}

}  // namespace

Result<ResidentPages> resident_pages(nebula::Store& store, uint32_t segment) {
    auto file = store.lease_segment(segment);
    if (!file &&
        (file.error().code() == ErrorCode::kStale || file.error().code() == ErrorCode::kBusy)) {
        return ResidentPages();  // It is being freed, or was.
    }
    if (!file) {
        return std::unexpected(std::move(file).error());
    }
    if ((*file)->descriptor() < 0) {
        return ResidentPages();
    }
    STELLARIUM_ASSIGN(const uint64_t size, (*file)->size_bytes());
    if (size == 0) {
        return ResidentPages();
    }
    const auto failed = [&](const char* what) {
        return std::unexpected(Error::from_errno(errno, std::string(what) + (*file)->path()));
    };
    // Nothing of it is touched: a mapping is how mincore(2) is told what to look at.
    void* const mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, (*file)->descriptor(), 0);
    if (mapped == MAP_FAILED) {
        return failed("map ");
    }
    std::vector<unsigned char> in_core((size + kPageBytes - 1) / kPageBytes);
    const int asked = mincore(mapped, size, in_core.data());
    const int error = errno;
    if (munmap(mapped, size) != 0) {
        return failed("unmap ");
    }
    if (asked != 0) {
        errno = error;
        return failed("mincore ");
    }
    ResidentPages pages(in_core.size());
    for (size_t i = 0; i < pages.size(); ++i) {
        pages[i] = (in_core[i] & 1U) != 0;
    }
    return pages;
}

Result<std::vector<NodeVisit>> SharingFinder::tops_of(const VolumeState& state) const {
    std::vector<NodeVisit> tops;
    if (!state.root.empty()) {
        tops.push_back({.ref = state.root, .level = kTreeLevels});
    }
    STELLARIUM_ASSIGN(const NodeRef delta, state.delta.persist(store_));
    if (!delta.empty()) {
        tops.push_back({.ref = delta, .level = kTreeLevels, .in_delta = true});
    }
    return tops;
}

Result<NodeContent> SharingFinder::read(const NodeVisit& at) {
    ++nodes_read_;
    auto node = read_and_decode(store_, at);
    if (!node && is_damage(node.error())) {
        complete_ = false;
        return NodeContent{};
    }
    return node;
}

Result<bool> SharingFinder::is_resident(nebula::PageAddress address) {
    auto known = segments_.find(address.segment());
    if (known == segments_.end()) {
        STELLARIUM_ASSIGN(ResidentPages pages, resident_(address.segment()));
        known = segments_.emplace(address.segment(), std::move(pages)).first;
    }
    return address.page() < known->second.size() && known->second[address.page()];
}

Result<void> SharingFinder::for_each_page(const NodeContent& node, const VisitPages& visit) {
    std::vector<std::optional<nebula::PageAddress>> places(node.table.chunks.size());
    for (size_t i = 0; i < places.size(); ++i) {
        const auto location = store_.resolve(node.table.chunks[i], node.table.hints[i]);
        if (location) {
            places[i] = location->address;
        } else if (is_damage(location.error())) {
            complete_ = false;
        } else {
            return std::unexpected(location.error());
        }
    }
    for (size_t i = 0; i < node.table.extents.size(); ++i) {
        const Extent& extent = node.table.extents[i];
        const std::optional<nebula::PageAddress>& place = places[node.table.ordinals[i]];
        if (extent.hole || !place) {
            continue;
        }
        const uint64_t first = place->value() + extent.first_in_chunk;
        for (uint64_t address = first; address < first + extent.pages; ++address) {
            STELLARIUM_ASSIGN(const bool resident, is_resident(nebula::PageAddress(address)));
            visit(address, resident);
        }
    }
    return {};
}

Result<void> SharingFinder::add(const VolumeState& state) {
    const uint32_t owner = ++added_;
    STELLARIUM_ASSIGN(const std::vector<NodeVisit> tops, tops_of(state));
    for (const NodeVisit& top : tops) {
        STELLARIUM_TRY(claim(top, owner));
    }
    return {};
}

Result<void> SharingFinder::claim(const NodeVisit& top, uint32_t owner) {
    // With each node, on whose behalf: below one that is shared, everything is.
    std::vector<std::pair<NodeVisit, uint32_t>> stack{{top, owner}};
    while (!stack.empty()) {
        const auto [at, wanted] = stack.back();
        stack.pop_back();
        const auto [known, is_new] = nodes_.try_emplace(at.ref.id, Node{.owner = wanted});
        uint32_t now = wanted;
        if (!is_new) {
            if (known->second.owner == kMany || known->second.owner == wanted) {
                continue;
            }
            known->second.owner = kMany;
            now = kMany;
        }
        STELLARIUM_ASSIGN(const NodeContent node, read(at));
        STELLARIUM_TRY(for_each_page(node, [&](uint64_t address, bool is_resident) {
            if (is_resident) {
                const auto [page, first] = pages_.try_emplace(address, now);
                if (!first && page->second != now) {
                    page->second = kMany;
                }
            }
        }));
        for (const NodeVisit& child : node.children) {
            stack.emplace_back(child, now);
        }
    }
    return {};
}

Result<SharingFinder::Counts> SharingFinder::count(const VolumeState& state) {
    const uint32_t owner = ++counted_;
    STELLARIUM_ASSIGN(const std::vector<NodeVisit> tops, tops_of(state));
    Counts sum;
    for (const NodeVisit& top : tops) {
        STELLARIUM_ASSIGN(const Counts counts, count(top, owner));
        add_to(sum, counts);
    }
    return sum;
}

/// As deep as a tree is.
Result<SharingFinder::Counts> SharingFinder::count(const NodeVisit& at, uint32_t owner) {
    const auto known = nodes_.find(at.ref.id);
    if (known == nodes_.end()) {
        complete_ = false;  // The state was given after its delta had changed.
        return Counts{};
    }
    if (known->second.counted) {
        return known->second.sum;
    }
    STELLARIUM_ASSIGN(const NodeContent node, read(at));
    Counts sum;
    STELLARIUM_TRY(for_each_page(node, [&](uint64_t address, bool is_resident) {
        sum.stored += 1;
        if (is_resident) {
            const auto page = pages_.find(address);
            sum.resident += 1;
            sum.own += page != pages_.end() && page->second == owner ? 1 : 0;
        }
    }));
    for (const NodeVisit& child : node.children) {
        STELLARIUM_ASSIGN(const Counts counts, count(child, owner));
        add_to(sum, counts);
    }
    // Looked up again: the table may have been laid out anew.
    Node& remembered = nodes_[at.ref.id];
    if (remembered.owner == kMany) {
        remembered.counted = true;
        remembered.sum = sum;
    }
    return sum;
}

}  // namespace stellarium::nova
