// Who uses damaged chunks: which parts of which volume cannot be read.
//
//     ChunkUserFinder finder(store, bad_ids);
//     for (each image, volume and snapshot) {
//         STELLARIUM_ASSIGN(const BadRanges bad, finder.ranges_of(state, {}));
//         for (const BadRange& range : bad.ranges) { ... }
//     }
//
// Walks the tree and the delta of each state. A node below which nothing is bad is read once,
// whoever refers to it, as long as no more than kMaxRememberedNodes of its kind are remembered;
// after that, again for each that refers to it. What a delta hides of the tree is not counted.
// Where a node itself is bad, or cannot be read, nobody knows what the pages that it covers hold:
// they are bad, all of them. Nodes of deltas that are not stored yet are looked at in memory, so
// nothing is appended, and a read-only store will do.
//
// Thread rule: one thread. The states must be leased (leases.h) where a collection may run.
// Memory: kMaxRememberedNodes twice, and kMaxBadRanges for what is remembered of bad nodes and for
// the ranges of one state.
// Errors: kCancelled; those of the store that are no damage.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>
#include <absl/container/flat_hash_set.h>

#include "base/error.h"
#include "base/hash.h"
#include "nebula/store.h"
#include "nova/delta_node.h"
#include "nova/entity.h"
#include "nova/node_walk.h"
#include "nova/pool.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// Asked about what a walk comes to, when not all that is bad is known before.
struct ChunkJudge {
    /// Whether a chunk is bad of which pages below `end_page` are referred to. Asked for each
    /// reference of each distinct node.
    std::function<Result<bool>(const ChunkId& id, std::optional<nebula::PageAddress> hint,
                               uint32_t end_page)>
        is_bad{};
    /// Told of each node that cannot be read or decoded, and why; more than once, perhaps.
    std::function<void(const NodeRef& node, const Error& error)> unreadable{};
};

class ChunkUserFinder {
  public:
    /// `bad`: chunks, and nodes, that are damaged or missing. Copied.
    ChunkUserFinder(nebula::Store& store, std::span<const ChunkId> bad)
        : store_(store), bad_(bad.begin(), bad.end()) {}
    /// The judge knows, or finds out, what is bad.
    ChunkUserFinder(nebula::Store& store, ChunkJudge judge)
        : store_(store), judge_(std::move(judge)) {}

    /// Ascending, cut at the size; what touches and has the same cause is one range.
    Result<BadRanges> ranges_of(const VolumeState& state, const std::function<bool()>& cancelled);

    bool is_bad(const ChunkId& id) const { return bad_.contains(id); }
    /// Nodes read from the store so far; for tests.
    uint64_t nodes_read() const { return nodes_read_; }

  private:
    struct Run {
        uint64_t page = 0;
        uint64_t pages = 0;
        Hash256 cause;
    };
    using Runs = std::vector<Run>;
    /// What is bad of a node, relative to the first leaf that it covers.
    struct BadNode {
        std::vector<NodeVisit> children;  ///< Those below which something is bad.
        Runs runs;
    };
    /// Half an id: enough to tell the nodes of one store apart.
    using Key = std::pair<uint64_t, uint64_t>;
    static Key key_of(const Hash256& id);

    Result<bool> is_bad(const Extent& extent, std::optional<nebula::PageAddress> hint) const;
    Result<bool> visit(const NodeVisit& at, Runs& out);
    Result<bool> visit_memory(const DeltaNode& node, uint64_t leaf, Runs& out);
    Result<void> visit_children(const std::vector<NodeVisit>& children, const NodeVisit& at,
                                Runs& out);
    Result<void> hidden_by(const DeltaNode& node, uint64_t leaf, uint64_t first, uint64_t last,
                           Runs& out);
    Result<void> hidden_by(const NodeVisit& at, uint64_t first, uint64_t last, Runs& out);
    static void append_run(Runs& runs, const Run& run);
    void remember(const NodeVisit& at, const BadNode& node);
    bool full(const Runs& out) const;
    Result<std::optional<NodeContent>> read(const NodeVisit& at);
    Result<void> check_cancelled() const;

    nebula::Store& store_;
    const absl::flat_hash_set<ChunkId, Hash256Hasher> bad_;
    const ChunkJudge judge_;
    absl::flat_hash_set<Key> good_leaves_;
    absl::flat_hash_set<Key> good_inner_;
    absl::flat_hash_map<Key, BadNode> bad_nodes_;
    uint64_t remembered_ = 0;  ///< Children and runs in bad_nodes_.
    const std::function<bool()>* cancelled_ = nullptr;
    uint64_t nodes_read_ = 0;
};

}  // namespace stellarium::nova
