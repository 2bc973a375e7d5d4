#include "nova/chunk_users.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "nova/delta_cursor.h"
#include "nova/limits.h"

namespace stellarium::nova {
namespace {

/// Pages that a node of `level` covers.
uint64_t pages_of(uint32_t level) {
    return leaves_below(level) * kPagesPerLeaf;
}

uint64_t first_page_of(uint64_t leaf) {
    return leaf * kPagesPerLeaf;
}

/// Damage of what was read, and nothing that another try may change.
bool is_damage(const Error& error) {
    return error.code() == ErrorCode::kCorrupt || error.code() == ErrorCode::kNotFound ||
           error.code() == ErrorCode::kIo;
}

/// Calls `visit(first page in the volume, extent)` for each extent of a table.
template <typename Function>
void for_each_extent(const NodeContent& node, Function visit) {
    size_t next = 0;
    for (const auto& [leaf, count] : node.leaves) {
        for (const size_t end = next + count; next < end; ++next) {
            visit(leaf, first_page_of(leaf) + node.table.extents[next].first_page, next);
        }
    }
}

}  // namespace

ChunkUserFinder::Key ChunkUserFinder::key_of(const Hash256& id) {
    const Bytes bytes = std::as_bytes(std::span(id.bytes));
    return {load<U64Le>(bytes), load<U64Le>(bytes.subspan(8))};
}

Result<void> ChunkUserFinder::check_cancelled() const {
    if (cancelled_ != nullptr && *cancelled_ && (*cancelled_)()) {
        return fail(ErrorCode::kCancelled, "the search for what uses damaged chunks was cancelled");
    }
    return {};
}

/// One state has so many ranges that no more of them are looked for.
bool ChunkUserFinder::full(const Runs& out) const {
    return out.size() >= kMaxBadRanges;
}

Result<bool> ChunkUserFinder::is_bad(const Extent& extent,
                                     std::optional<nebula::PageAddress> hint) const {
    if (extent.hole) {
        return false;
    }
    if (bad_.contains(extent.id)) {
        return true;
    }
    return judge_.is_bad
               ? judge_.is_bad(extent.id, hint, uint32_t{extent.first_in_chunk} + extent.pages)
               : Result<bool>(false);
}

/// nullopt: it is bad.
Result<std::optional<NodeContent>> ChunkUserFinder::read(const NodeVisit& at) {
    if (bad_.contains(at.ref.id)) {
        return std::nullopt;
    }
    STELLARIUM_TRY(check_cancelled());
    ++nodes_read_;
    auto node = read_and_decode(store_, at);
    if (!node) {
        if (is_damage(node.error())) {
            if (judge_.unreadable) {
                judge_.unreadable(at.ref, node.error());
            }
            return std::nullopt;
        }
        return std::unexpected(std::move(node).error());
    }
    return *std::move(node);
}

/// `node` is relative to the first leaf of `at`.
void ChunkUserFinder::remember(const NodeVisit& at, const BadNode& node) {
    const uint64_t cost = 1 + node.children.size() + node.runs.size();
    if (remembered_ + cost <= kMaxBadRanges &&
        bad_nodes_.try_emplace(key_of(at.ref.id), node).second) {
        remembered_ += cost;
    }
}

Result<void> ChunkUserFinder::visit_children(const std::vector<NodeVisit>& children,
                                             const NodeVisit& at, Runs& out) {
    for (NodeVisit child : children) {
        child.leaf += at.leaf;
        STELLARIUM_TRY(visit(child, out));
    }
    return {};
}

/// Appends, or lengthens the last one.
void ChunkUserFinder::append_run(Runs& runs, const Run& run) {
    if (!runs.empty() && runs.back().page + runs.back().pages == run.page &&
        runs.back().cause == run.cause) {
        runs.back().pages += run.pages;
    } else {
        runs.push_back(run);
    }
}

/// Appends what is bad below a stored node; false when nothing is.
Result<bool> ChunkUserFinder::visit(const NodeVisit& at, Runs& out) {
    if (full(out)) {
        return true;
    }
    auto& good = at.level == 0 ? good_leaves_ : good_inner_;
    if (good.contains(key_of(at.ref.id))) {
        return false;
    }
    if (const auto known = bad_nodes_.find(key_of(at.ref.id)); known != bad_nodes_.end()) {
        const BadNode node = known->second;  // A copy: the table may grow meanwhile.
        for (Run run : node.runs) {
            run.page += first_page_of(at.leaf);
            out.push_back(run);
        }
        STELLARIUM_TRY(visit_children(node.children, at, out));
        return true;
    }
    STELLARIUM_ASSIGN(const auto content, read(at));
    BadNode node;
    if (!content) {
        node.runs.push_back({.page = 0, .pages = pages_of(at.level), .cause = at.ref.id});
    } else {
        Result<void> judged;
        for_each_extent(*content, [&](uint64_t, uint64_t page, size_t index) {
            const Extent& extent = content->table.extents[index];
            if (!judged || extent.hole) {
                return;
            }
            const auto bad = is_bad(extent, content->table.hints[content->table.ordinals[index]]);
            if (!bad) {
                judged = std::unexpected(bad.error());
            } else if (*bad) {
                append_run(node.runs, {.page = page - first_page_of(at.leaf),
                                       .pages = extent.pages,
                                       .cause = extent.id});
            }
        });
        STELLARIUM_TRY(std::move(judged));
        for (const NodeVisit& child : content->children) {
            STELLARIUM_ASSIGN(const bool is_bad, visit(child, out));
            if (is_bad) {
                node.children.push_back(child);
                node.children.back().leaf -= at.leaf;
            }
        }
    }
    if (node.runs.empty() && node.children.empty()) {
        if (good.size() < kMaxRememberedNodes) {
            good.insert(key_of(at.ref.id));
        }
        return false;
    }
    for (Run run : node.runs) {
        run.page += first_page_of(at.leaf);
        out.push_back(run);
    }
    if (!full(out)) {
        remember(at, node);  // Else some of its children were not looked at.
    }
    return true;
}

/// The same for a node of a delta, which may be in memory only.
Result<bool> ChunkUserFinder::visit_memory(const DeltaNode& node, uint64_t leaf, Runs& out) {
    if (node.named.load(std::memory_order_acquire)) {
        return visit({.ref = node.name, .level = node.level, .in_delta = true, .leaf = leaf}, out);
    }
    const size_t before = out.size();
    for (const DeltaEntry& entry : node.body.entries) {
        for (const Extent& extent : *entry.extents) {
            STELLARIUM_ASSIGN(const bool bad, is_bad(extent, extent.chunk_address));
            if (bad && !full(out)) {
                out.push_back({.page = first_page_of(leaf + entry.leaf) + extent.first_page,
                               .pages = extent.pages,
                               .cause = extent.id});
            }
        }
    }
    uint64_t present = node.body.present;
    for (const DeltaNodePtr& child : node.body.children) {
        const auto index = static_cast<uint64_t>(std::countr_zero(present));
        present &= present - 1;
        STELLARIUM_TRY(visit_memory(*child, leaf + (index << child_shift(node.level)), out));
    }
    return out.size() > before;
}

/// Appends the pages that a delta has over the leaves [first, last]: all that it hides there.
Result<void> ChunkUserFinder::hidden_by(const NodeVisit& at, uint64_t first, uint64_t last,
                                        Runs& out) {
    if (at.leaf > last || at.leaf + leaves_below(at.level) <= first || full(out)) {
        return {};
    }
    STELLARIUM_ASSIGN(const auto content, read(at));
    if (!content) {
        out.push_back(
            {.page = first_page_of(at.leaf), .pages = pages_of(at.level), .cause = at.ref.id});
        return {};
    }
    for_each_extent(*content, [&](uint64_t leaf, uint64_t page, size_t index) {
        if (leaf >= first && leaf <= last) {
            out.push_back({.page = page, .pages = content->table.extents[index].pages, .cause{}});
        }
    });
    for (const NodeVisit& child : content->children) {
        STELLARIUM_TRY(hidden_by(child, first, last, out));
    }
    return {};
}

Result<void> ChunkUserFinder::hidden_by(const DeltaNode& node, uint64_t leaf, uint64_t first,
                                        uint64_t last, Runs& out) {
    if (leaf > last || leaf + leaves_below(node.level) <= first) {
        return {};
    }
    if (node.named.load(std::memory_order_acquire)) {
        return hidden_by(
            NodeVisit{.ref = node.name, .level = node.level, .in_delta = true, .leaf = leaf}, first,
            last, out);
    }
    for (const DeltaEntry& entry : node.body.entries) {
        if (leaf + entry.leaf < first || leaf + entry.leaf > last) {
            continue;
        }
        for (const Extent& extent : *entry.extents) {
            out.push_back({.page = first_page_of(leaf + entry.leaf) + extent.first_page,
                           .pages = extent.pages,
                           .cause{}});
        }
    }
    uint64_t present = node.body.present;
    for (const DeltaNodePtr& child : node.body.children) {
        const auto index = static_cast<uint64_t>(std::countr_zero(present));
        present &= present - 1;
        STELLARIUM_TRY(
            hidden_by(*child, leaf + (index << child_shift(node.level)), first, last, out));
    }
    return {};
}

Result<BadRanges> ChunkUserFinder::ranges_of(const VolumeState& state,
                                             const std::function<bool()>& cancelled) {
    cancelled_ = &cancelled;
    STELLARIUM_TRY(check_cancelled());
    const uint64_t end_page = state.pages();
    if (end_page == 0) {
        return BadRanges{};
    }
    const auto by_page = [](const Run& a, const Run& b) { return a.page < b.page; };

    Runs tree;
    if (!state.root.empty()) {
        STELLARIUM_TRY(visit({.ref = state.root, .level = kTreeLevels}, tree));
    }
    bool complete = !full(tree);
    std::sort(tree.begin(), tree.end(), by_page);
    const DeltaNode* delta = DeltaCursor(state.delta).node();
    Runs runs;
    if (delta == nullptr) {
        runs = std::move(tree);
    } else {
        STELLARIUM_TRY(visit_memory(*delta, 0, runs));
        complete = complete && !full(runs);
        for (size_t i = 0; i < tree.size();) {
            // Neighbouring leaves at once.
            const uint64_t first = tree[i].page / kPagesPerLeaf;
            uint64_t last = first;
            size_t end = i;
            while (end < tree.size() && tree[end].page / kPagesPerLeaf <= last + 1) {
                last = std::max(last, (std::min(tree[end].page + tree[end].pages, end_page) - 1) /
                                          kPagesPerLeaf);
                ++end;
            }
            Runs hidden;
            STELLARIUM_TRY(hidden_by(*delta, 0, first, last, hidden));
            complete = complete && !full(hidden);
            std::sort(hidden.begin(), hidden.end(), by_page);
            size_t next = 0;
            for (; i < end; ++i) {
                uint64_t page = tree[i].page;
                const uint64_t stop = tree[i].page + tree[i].pages;
                while (next > 0 && hidden[next - 1].page + hidden[next - 1].pages > page) {
                    --next;
                }
                for (; page < stop && next < hidden.size() && hidden[next].page < stop; ++next) {
                    if (hidden[next].page > page) {
                        runs.push_back({.page = page,
                                        .pages = hidden[next].page - page,
                                        .cause = tree[i].cause});
                    }
                    page = std::max(page, hidden[next].page + hidden[next].pages);
                }
                if (page < stop) {
                    runs.push_back({.page = page, .pages = stop - page, .cause = tree[i].cause});
                }
            }
        }
        std::sort(runs.begin(), runs.end(), by_page);
    }

    BadRanges result{.ranges = {}, .complete = complete};
    for (const Run& run : runs) {
        const uint64_t start = run.page * kPageBytes;
        if (start >= state.size_bytes) {
            break;
        }
        const uint64_t stop = std::min((run.page + run.pages) * kPageBytes, state.size_bytes);
        if (!result.ranges.empty()) {
            BadRange& before = result.ranges.back();
            if (before.cause == run.cause && before.offset_bytes + before.length_bytes == start) {
                before.length_bytes = stop - before.offset_bytes;
                continue;
            }
        }
        result.ranges.push_back(
            {.offset_bytes = start, .length_bytes = stop - start, .cause = run.cause});
    }
    return result;
}

}  // namespace stellarium::nova
