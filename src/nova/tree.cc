// Trees: building, updating, cutting, and reading a volume's state through root and delta.
#include "nova/tree.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>

#include "nova/delta_cursor.h"
#include "nova/node_cache.h"
#include "nova/node_io.h"

namespace stellarium::nova {

namespace {

/// Leaves folded by one update: bounds what a fold of a huge delta holds in memory.
constexpr size_t kLeavesPerUpdate = 4096;
/// Updates of at most this many leaves put their nodes into the cache: a guest is using those.
constexpr size_t kRememberedLeaves = 1024;

/// First leaf wholly beyond `pages`.
uint64_t leaf_limit(uint64_t pages) {
    return pages / kPagesPerLeaf + (pages % kPagesPerLeaf != 0 ? 1 : 0);
}

/// Pages of leaf `leaf_number` within a volume of `pages`.
uint32_t pages_within(uint64_t pages, uint64_t leaf_number) {
    const uint64_t first = leaf_number * kPagesPerLeaf;
    return static_cast<uint32_t>(
        std::min<uint64_t>(pages > first ? pages - first : 0, kPagesPerLeaf));
}

/// update_tree and its recursion.
class Updater {
  public:
    using Leaves = std::map<uint64_t, Extents>;

    Updater(TreeReader& reader, NodeWriter& writer, bool remember)
        : reader_(reader), writer_(writer), remember_(remember) {}

    /// The subtree `old` of `level` that starts at leaf `base`, with the leaves [first, end) in it
    /// replaced; there is at least one.
    Result<NodeRef> update(uint32_t level, const NodeRef& old, uint64_t base,
                           Leaves::const_iterator first, Leaves::const_iterator end) {
        if (level == 0) {
            return update_leaf(old, first->second);
        }
        STELLARIUM_ASSIGN(const InnerPtr node, reader_.inner(old, level));
        std::array<NodeRef, kFanout> children;
        uint64_t rest = node->present;
        for (const NodeRef& child : node->children) {
            children[static_cast<size_t>(std::countr_zero(rest))] = child;
            rest &= rest - 1;
        }
        bool changed = false;
        while (first != end) {
            const uint64_t index = (first->first - base) >> child_shift(level);
            const uint64_t child_base = base + (index << child_shift(level));
            auto child_end = first;
            while (child_end != end && child_end->first < child_base + leaves_below(level - 1)) {
                ++child_end;
            }
            STELLARIUM_ASSIGN(const NodeRef updated,
                              update(level - 1, children[index], child_base, first, child_end));
            changed |= updated != children[index];
            children[index] = updated;
            first = child_end;
        }
        return changed ? put(level, children) : old;
    }

    /// The subtree without its leaves from `first_leaf` (relative to it) on.
    Result<NodeRef> cut(uint32_t level, const NodeRef& old, uint64_t first_leaf) {
        if (old.empty() || first_leaf == 0) {
            return NodeRef{};
        }
        if (first_leaf >= leaves_below(level)) {
            return old;
        }
        STELLARIUM_ASSIGN(const InnerPtr node, reader_.inner(old, level));
        const auto boundary = static_cast<uint32_t>(first_leaf >> child_shift(level));
        std::array<NodeRef, kFanout> children;
        for (uint32_t index = 0; index < boundary; ++index) {
            children[index] = child_of(*node, index);
        }
        const NodeRef last = child_of(*node, boundary);
        STELLARIUM_ASSIGN(children[boundary],
                          cut(level - 1, last, first_leaf & (leaves_below(level - 1) - 1)));
        const bool changed =
            children[boundary] != last || (node->present >> boundary) > uint64_t{1};
        return changed ? put(level, children) : old;
    }

  private:
    Result<NodeRef> update_leaf(const NodeRef& old, const Extents& extents) {
        if (extents.empty()) {
            return NodeRef{};
        }
        EncodedNode leaf = encode_tree_leaf(extents);
        if (leaf.id == old.id) {
            return old;
        }
        const NodeRef ref{leaf.id, std::nullopt};
        STELLARIUM_TRY(writer_.add(std::move(leaf)));
        if (remember_) {
            reader_.remember_leaf(ref.id, extents);
        }
        return ref;
    }

    Result<NodeRef> put(uint32_t level, const std::array<NodeRef, kFanout>& children) {
        TreeChildren node;
        for (uint32_t index = 0; index < kFanout; ++index) {
            if (!children[index].empty()) {
                node.present |= uint64_t{1} << index;
                node.children.push_back(children[index]);
            }
        }
        if (node.children.empty()) {
            return NodeRef{};
        }
        STELLARIUM_ASSIGN(const NodeRef ref, writer_.add_inner(level, node));
        if (remember_) {
            reader_.remember_inner(ref.id, level, std::move(node));
        }
        return ref;
    }

    TreeReader& reader_;
    NodeWriter& writer_;
    bool remember_;
};

/// `root` without leaves from `first_leaf` on.
Result<NodeRef> cut_tree(nebula::Store& store, NodeCache& cache, const NodeRef& root,
                         uint64_t first_leaf) {
    TreeReader reader(store, cache);
    NodeWriter writer(store);
    STELLARIUM_ASSIGN(const NodeRef cut,
                      Updater(reader, writer, true).cut(kTreeLevels, root, first_leaf));
    STELLARIUM_TRY(writer.flush());
    return cut;
}

/// for_each_leaf's walk: tree and delta in step.
class LeafWalk {
  public:
    LeafWalk(nebula::Store& store, NodeCache& cache, const VolumeState& state, uint64_t first_leaf,
             const std::function<Result<bool>(uint64_t)>& visit)
        : store_(store),
          reader_(store, cache),
          state_(state),
          first_leaf_(first_leaf),
          end_leaf_(leaf_limit(state.pages())),
          visit_(visit) {}

    Result<bool> walk(uint32_t level, uint64_t base, const NodeRef& ref, DeltaCursor cursor) {
        if (level == 0) {
            return walk_leaf(base, ref, cursor);
        }
        STELLARIUM_ASSIGN(const InnerPtr node, reader_.inner(ref, level));
        STELLARIUM_ASSIGN(const uint64_t in_delta, cursor.present(store_, level));
        for (uint64_t rest = node->present | in_delta; rest != 0; rest &= rest - 1) {
            const auto index = static_cast<uint32_t>(std::countr_zero(rest));
            const uint64_t child_base = base + (uint64_t{index} << child_shift(level));
            if (child_base >= end_leaf_) {
                break;
            }
            if (child_base + leaves_below(level - 1) <= first_leaf_) {
                continue;
            }
            STELLARIUM_ASSIGN(const bool go_on, walk(level - 1, child_base, child_of(*node, index),
                                                     cursor.child(level, index)));
            if (!go_on) {
                return false;
            }
        }
        return true;
    }

  private:
    Result<bool> walk_leaf(uint64_t leaf_number, const NodeRef& ref, DeltaCursor& cursor) {
        STELLARIUM_ASSIGN(const ExtentsPtr top, cursor.extents(store_));
        const uint32_t pages = pages_within(state_.pages(), leaf_number);
        const auto maps_pages = [&](const Extents& extents) {
            return std::any_of(extents.begin(), extents.end(), [&](const Extent& extent) {
                return !extent.hole && extent.first_page < pages;
            });
        };
        bool mapped = top != nullptr && maps_pages(*top);
        if (!mapped && top == nullptr && pages == kPagesPerLeaf) {
            mapped = !ref.empty();  // A stored leaf is never empty: no need to read it.
        } else if (!mapped) {
            STELLARIUM_ASSIGN(const LeafPtr below, reader_.leaf(ref));
            mapped =
                maps_pages(top == nullptr ? below->extents : overlay(below->extents, *top, false));
        }
        return mapped ? visit_(leaf_number) : Result<bool>(true);
    }

    nebula::Store& store_;
    TreeReader reader_;
    const VolumeState& state_;
    const uint64_t first_leaf_;
    const uint64_t end_leaf_;
    const std::function<Result<bool>(uint64_t)>& visit_;
};

}  // namespace

/// The nodes that are not complete yet: one of each level, on the path to the last leaf added.
struct TreeBuilder::Impl {
    explicit Impl(nebula::Store& store) : writer(store) {}

    NodeWriter writer;
    std::optional<uint64_t> last_leaf;
    /// open[level] gathers children of the node of that level; 1 to kTreeLevels are used.
    std::array<TreeChildren, kTreeLevels + 1> open;

    void put(uint32_t level, uint64_t leaf_number, const NodeRef& child) {
        const uint64_t index = (leaf_number >> child_shift(level)) & (kFanout - 1);
        open[level].present |= uint64_t{1} << index;
        open[level].children.push_back(child);
    }
    /// Finishes the node of `level` that `leaf_number` lies under.
    Result<NodeRef> close(uint32_t level) {
        return writer.add_inner(level, std::exchange(open[level], {}));
    }
};

TreeBuilder::TreeBuilder(nebula::Store& store) : impl_(std::make_unique<Impl>(store)) {}

TreeBuilder::~TreeBuilder() = default;

Result<void> TreeBuilder::add_leaf(uint64_t leaf_number, const Extents& extents) {
    assert(leaf_number < kMaxLeaves && (!impl_->last_leaf || *impl_->last_leaf < leaf_number));
    assert(is_canonical(extents, false));
    if (extents.empty()) {
        return {};
    }
    if (impl_->last_leaf) {
        // Nodes that the new leaf is not under are complete.
        for (uint32_t level = 1; level < kTreeLevels; ++level) {
            const uint32_t shift = kFanoutBits * level;
            if (*impl_->last_leaf >> shift == leaf_number >> shift) {
                break;
            }
            STELLARIUM_ASSIGN(const NodeRef node, impl_->close(level));
            impl_->put(level + 1, *impl_->last_leaf, node);
        }
    }
    impl_->last_leaf = leaf_number;
    EncodedNode leaf = encode_tree_leaf(extents);
    impl_->put(1, leaf_number, {leaf.id, std::nullopt});
    return impl_->writer.add(std::move(leaf));
}

Result<NodeRef> TreeBuilder::finish() {
    if (!impl_->last_leaf) {
        return NodeRef{};
    }
    NodeRef node;
    for (uint32_t level = 1; level <= kTreeLevels; ++level) {
        if (level > 1) {
            impl_->put(level, *impl_->last_leaf, node);
        }
        STELLARIUM_ASSIGN(node, impl_->close(level));
    }
    STELLARIUM_TRY(impl_->writer.flush());
    impl_->last_leaf.reset();
    return node;
}

Result<NodeRef> update_tree(nebula::Store& store, NodeCache& cache, const NodeRef& root,
                            const std::map<uint64_t, Extents>& leaves) {
    if (leaves.empty()) {
        return root;
    }
    assert(leaves.rbegin()->first < kMaxLeaves);
    TreeReader reader(store, cache);
    NodeWriter writer(store);
    Updater updater(reader, writer, leaves.size() <= kRememberedLeaves);
    STELLARIUM_ASSIGN(const NodeRef updated,
                      updater.update(kTreeLevels, root, 0, leaves.begin(), leaves.end()));
    STELLARIUM_TRY(writer.flush());
    return updated;
}

Result<Extents> effective_leaf(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                               uint64_t leaf_number, IoMode mode) {
    STELLARIUM_ASSIGN(const ExtentsPtr top, state.delta.find(store, leaf_number, mode));
    STELLARIUM_ASSIGN(const LeafPtr below, cache.leaf(store, state.root, leaf_number, mode));
    Extents extents = top == nullptr ? below->extents : overlay(below->extents, *top, false);
    truncate(extents, pages_within(state.pages(), leaf_number));
    return extents;
}

Result<NodeRef> fold_all(nebula::Store& store, NodeCache& cache, const VolumeState& state) {
    STELLARIUM_ASSIGN(const VolumeState exact, resized(store, cache, state, state.size_bytes));
    NodeRef root = exact.root;
    uint64_t next_leaf = 0;
    while (next_leaf < kMaxLeaves) {
        std::vector<std::pair<uint64_t, Extents>> tops;
        STELLARIUM_TRY(exact.delta.for_each(store, next_leaf, kMaxLeaves - 1,
                                            [&](uint64_t leaf, const Extents& extents) {
                                                tops.emplace_back(leaf, extents);
                                                return tops.size() < kLeavesPerUpdate;
                                            }));
        if (tops.empty()) {
            break;
        }
        next_leaf = tops.back().first + 1;
        std::map<uint64_t, Extents> leaves;
        for (const auto& [leaf, top] : tops) {
            STELLARIUM_ASSIGN(const LeafPtr below, cache.leaf(store, root, leaf));
            leaves.emplace_hint(leaves.end(), leaf, overlay(below->extents, top, false));
        }
        STELLARIUM_ASSIGN(root, update_tree(store, cache, root, leaves));
    }
    return root;
}

Result<VolumeState> resized(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                            uint64_t size_bytes) {
    VolumeState result = state;
    result.size_bytes = std::min(size_bytes, state.size_bytes);
    const uint64_t pages = result.pages();
    const uint64_t end_leaf = leaf_limit(pages);
    STELLARIUM_TRY(result.delta.erase_from(store, end_leaf));
    STELLARIUM_ASSIGN(result.root, cut_tree(store, cache, state.root, end_leaf));
    if (const auto within = static_cast<uint32_t>(pages % kPagesPerLeaf); within != 0) {
        const uint64_t last_leaf = end_leaf - 1;
        STELLARIUM_ASSIGN(const ExtentsPtr top, result.delta.find(store, last_leaf));
        if (top != nullptr && top->back().end_page() > within) {
            Extents cut = *top;
            truncate(cut, within);
            STELLARIUM_TRY(result.delta.set(store, last_leaf, std::move(cut)));
        }
        STELLARIUM_ASSIGN(const LeafPtr below, cache.leaf(store, result.root, last_leaf));
        if (!below->extents.empty() && below->extents.back().end_page() > within) {
            std::map<uint64_t, Extents> leaves{{last_leaf, below->extents}};
            truncate(leaves.begin()->second, within);
            STELLARIUM_ASSIGN(result.root, update_tree(store, cache, result.root, leaves));
        }
    }
    result.size_bytes = size_bytes;
    return result;
}

Result<void> for_each_leaf(nebula::Store& store, NodeCache& cache, const VolumeState& state,
                           uint64_t first_leaf,
                           const std::function<Result<bool>(uint64_t leaf_number)>& visit) {
    LeafWalk walk(store, cache, state, first_leaf, visit);
    STELLARIUM_TRY(walk.walk(kTreeLevels, 0, state.root, DeltaCursor(state.delta)));
    return {};
}

}  // namespace stellarium::nova
