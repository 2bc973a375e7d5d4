#include "nebula/liveness.h"

#include <algorithm>

namespace stellarium::nebula {
namespace {

/// Collects runs in ascending order and joins adjacent ones.
void add_run(std::vector<PageRun>& runs, uint32_t page, uint32_t end_page) {
    if (page == end_page) {
        return;
    }
    if (!runs.empty() && runs.back().page + runs.back().pages == page) {
        runs.back().pages += end_page - page;
    } else {
        runs.push_back({page, end_page - page});
    }
}

/// The entries of a batch, with the pages before it that hold its header.
struct Group {
    uint32_t first_page = 1;
    std::vector<PageRun> dead;
    bool has_live = false;
};

}  // namespace

SegmentLiveness liveness_of(std::span<const Entry> entries, uint32_t end_page, double sparse_below,
                            const std::function<bool(uint32_t ordinal)>& is_live) {
    SegmentLiveness out;
    Group group;
    const auto finish_group = [&] {
        if (!group.has_live) {
            add_run(out.dead_runs, group.first_page, out.end_page);
        } else {
            for (const PageRun& run : group.dead) {
                add_run(out.dead_runs, run.page, run.page + run.pages);
            }
        }
    };
    for (size_t i = 0; i < entries.size() && entries[i].page.get() < end_page;) {
        const Entry& entry = entries[i];
        const auto ordinal = static_cast<uint32_t>(i);
        const uint32_t unit_end = entry.page.get() + entry.pages();
        bool alive = false;
        size_t next = i + 1;
        if (entry.entry_kind() != EntryKind::kPack) {
            alive = is_live(ordinal);
            (alive ? out.live_entries : out.dead_entries) += 1;
            (alive ? out.live_bytes : out.dead_bytes) += entry.length.get();
        } else {
            std::vector<uint32_t> dead;
            uint64_t dead_member_bytes = 0;
            uint64_t live_stored_bytes = 0;
            const uint64_t pack_end = entry.offset_bytes() + entry.length.get();
            for (; next < entries.size() && entries[next].entry_kind() == EntryKind::kMember;
                 ++next) {
                const uint64_t bytes = entries[next].length;
                if (!is_live(static_cast<uint32_t>(next))) {
                    dead.push_back(static_cast<uint32_t>(next));
                    dead_member_bytes += bytes;
                    continue;
                }
                alive = true;
                ++out.live_entries;
                out.live_bytes += bytes;
                const bool is_last = next + 1 == entries.size() ||
                                     entries[next + 1].entry_kind() != EntryKind::kMember;
                live_stored_bytes += (is_last ? pack_end : entries[next + 1].offset_bytes()) -
                                     entries[next].offset_bytes() + sizeof(PackEntry);
            }
            // A pack whose members are not known is asked about itself.
            alive = alive || (next == i + 1 && is_live(ordinal));
            out.dead_bytes += dead_member_bytes;
            out.dead_entries += dead.size();
            if (alive && !dead.empty()) {
                out.dead_members.insert(out.dead_members.end(), dead.begin(), dead.end());
                out.dead_member_bytes += dead_member_bytes;
                if (static_cast<double>(live_stored_bytes) <
                    sparse_below * static_cast<double>(entry.length.get())) {
                    out.sparse_packs.push_back(ordinal);
                }
            }
        }
        if (entry.page.get() > out.end_page) {
            // A header lies between: the next batch begins.
            if (i > 0) {
                finish_group();
            }
            group = {.first_page = out.end_page, .dead = {}, .has_live = false};
        }
        group.has_live = group.has_live || alive;
        out.has_live = out.has_live || alive;
        if (!alive) {
            add_run(group.dead, entry.page, unit_end);
        }
        out.end_page = unit_end;
        i = next;
    }
    if (out.end_page > 1) {
        finish_group();
    }
    for (const PageRun& run : out.dead_runs) {
        out.dead_pages += run.pages;
    }
    return out;
}

}  // namespace stellarium::nebula
