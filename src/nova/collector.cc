#include "nova/collector.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <map>
#include <optional>
#include <span>
#include <thread>

#include <fmt/format.h>

#include "nova/codec.h"
#include "nova/limits.h"
#include "nova/node_walk.h"
#include "nova/pieces.h"

namespace stellarium::nova {
namespace {

using nebula::Collection;

/// The pages of each chunk of the table that its extents use, bit i for page i.
std::vector<uint16_t> used_pages(const ExtentTable& table) {
    std::vector<uint16_t> masks(table.chunks.size());
    for (size_t i = 0; i < table.extents.size(); ++i) {
        const Extent& extent = table.extents[i];
        if (!extent.hole) {
            const uint32_t mask = ((uint32_t{1} << extent.pages) - 1) << extent.first_in_chunk;
            masks[table.ordinals[i]] = static_cast<uint16_t>(masks[table.ordinals[i]] | mask);
        }
    }
    return masks;
}

/// Marks everything below some roots. Belongs to one run.
class Marker {
  public:
    Marker(nebula::Store& store, Collection& collection, const GcOptions& options, uint64_t total)
        : store_(store), collection_(collection), options_(options) {
        progress_.phase = GcProgress::Phase::kMark;
        progress_.total = total;
    }

    Result<void> mark_object(const NodeRef& ref) {
        STELLARIUM_TRY(collection_.mark_object(ref.id, ref.hint));
        return count(1);
    }

    /// Marks a tree and a delta. Returns the bytes of the chunks that were not marked before.
    Result<uint64_t> mark(const NodeRef& root, const NodeRef& delta) {
        uint64_t new_pages = 0;
        for (const bool in_delta : {false, true}) {
            const NodeRef& top = in_delta ? delta : root;
            if (!top.empty()) {
                stack_.push_back({.ref = top, .level = kTreeLevels, .in_delta = in_delta});
            }
            while (!stack_.empty()) {
                const NodeVisit at = stack_.back();
                stack_.pop_back();
                STELLARIUM_TRY(visit(at, new_pages));
            }
        }
        return new_pages * kPageBytes;
    }

  private:
    Result<void> visit(const NodeVisit& at, uint64_t& new_pages) {
        STELLARIUM_ASSIGN(const Collection::Mark mark,
                          collection_.mark_object(at.ref.id, at.ref.hint));
        if (mark == Collection::Mark::kAgain) {
            return {};
        }
        STELLARIUM_ASSIGN(NodeContent node, read_and_decode(store_, at));
        const std::vector<uint16_t> masks = used_pages(node.table);
        for (size_t i = 0; i < masks.size(); ++i) {
            STELLARIUM_ASSIGN(
                const Collection::Mark chunk,
                collection_.mark_pages(node.table.chunks[i], node.table.hints[i], masks[i]));
            if (chunk == Collection::Mark::kNew) {
                new_pages += static_cast<uint64_t>(std::popcount(masks[i]));
            }
        }
        push_children(stack_, node);
        return count(1 + masks.size());
    }

    Result<void> count(uint64_t marks) {
        progress_.done += marks;
        if (options_.cancelled && options_.cancelled()) {
            return fail(ErrorCode::kCancelled, "the garbage collection was cancelled");
        }
        if (options_.progress && progress_.done >= report_at_) {
            options_.progress(progress_);
            report_at_ = progress_.done + kMarksPerReport;
        }
        return {};
    }

    static constexpr uint64_t kMarksPerReport = 4096;

    nebula::Store& store_;
    Collection& collection_;
    const GcOptions& options_;
    GcProgress progress_;
    uint64_t report_at_ = 0;
    std::vector<NodeVisit> stack_;
};

/// "the tree of volume 'a'", for errors.
std::string content_of(const Catalog::Frozen& frozen, const Catalog::Frozen::Item& item) {
    if (item.kind != EntityKind::kSnapshot) {
        return fmt::format("{} '{}'", kind_name(item.kind), item.name);
    }
    const auto volume = std::lower_bound(
        frozen.items.begin(), frozen.items.end(), item.parent,
        [](const Catalog::Frozen::Item& other, uint64_t id) { return other.id < id; });
    const bool found = volume != frozen.items.end() && volume->id == item.parent;
    return fmt::format("snapshot '{}@{}'", found ? volume->name : "?", item.name);
}

std::unexpected<Error> stopped(const Error& error, const std::string& what) {
    if (error.code() == ErrorCode::kCorrupt || error.code() == ErrorCode::kNotFound) {
        return std::unexpected(Error(ErrorCode::kCorrupt, error.message())
                                   .with_context(fmt::format("{} is damaged, so that nobody knows "
                                                             "what it needs, and nothing is freed",
                                                             what)));
    }
    return std::unexpected(error.with_context(what));
}

/// Sleeps so that `bytes` take their time.
Result<void> pace(const GcOptions& options, uint64_t bytes) {
    constexpr std::chrono::milliseconds kStep{100};
    const auto cancelled = [&] { return options.cancelled && options.cancelled(); };
    if (options.rate_bytes_per_second != 0) {
        std::chrono::milliseconds left(bytes * 1000 / options.rate_bytes_per_second);
        while (left.count() > 0 && !cancelled()) {
            std::this_thread::sleep_for(std::min(left, kStep));
            left -= kStep;
        }
    }
    if (cancelled()) {
        return fail(ErrorCode::kCancelled, "the garbage collection was cancelled");
    }
    return {};
}

}  // namespace

/// What step 5 does: leaves of volumes, and the chunks in them that are stored anew.
struct Collector::Plan {
    struct Volume {
        uint64_t id = 0;
        std::map<uint64_t, LeafRewrite> leaves;
    };
    std::vector<Volume> volumes;
    uint64_t chunks = 0;
    uint64_t leaves = 0;
    uint64_t gain_bytes = 0;

    bool full() const { return chunks >= kMaxRewrittenChunks || leaves >= kMaxRewrittenLeaves; }
};

Result<void> Collector::make_plan(const GcOptions& options, const Published& published,
                                  Plan& plan) const {
    Collection& collection = *published.collection;
    /// Gains of the leaves of one volume.
    struct Candidate {
        LeafRewrite rewrite;
        uint64_t gain_pages = 0;
    };
    for (const Catalog::Frozen::Item& item : published.frozen.items) {
        if (item.kind != EntityKind::kVolume) {
            continue;
        }
        std::map<uint64_t, Candidate> candidates;
        std::vector<NodeVisit> stack;
        if (!item.state.root.empty()) {
            stack.push_back({.ref = item.state.root, .level = kTreeLevels});
        }
        STELLARIUM_ASSIGN(const NodeRef delta, item.state.delta.persist(store_));
        if (!delta.empty()) {
            stack.push_back({.ref = delta, .level = kTreeLevels, .in_delta = true});
        }
        while (!stack.empty()) {
            if (options.cancelled && options.cancelled()) {
                return fail(ErrorCode::kCancelled, "the garbage collection was cancelled");
            }
            const NodeVisit at = stack.back();
            stack.pop_back();
            STELLARIUM_ASSIGN(const bool shared, collection.is_shared(at.ref.id, at.ref.hint));
            if (shared) {
                continue;
            }
            STELLARIUM_ASSIGN(NodeContent node, read_and_decode(store_, at));
            push_children(stack, node);
            if (node.leaves.empty()) {
                continue;
            }
            if (!at.in_delta && !item.state.delta.empty()) {
                STELLARIUM_ASSIGN(const auto top, item.state.delta.find(store_, at.leaf));
                if (top) {
                    candidates[at.leaf].gain_pages += hidden_pages(node.table.extents, *top);
                }
            }
            // Which leaf a chunk's gain is counted for does not matter: the first one.
            std::vector<bool> looked_at(node.table.chunks.size());
            size_t next = 0;
            for (const auto& [leaf, count] : node.leaves) {
                for (const size_t end = next + count; next < end; ++next) {
                    const uint16_t ordinal = node.table.ordinals[next];
                    if (node.table.extents[next].hole || looked_at[ordinal]) {
                        continue;
                    }
                    looked_at[ordinal] = true;
                    const ChunkId& id = node.table.chunks[ordinal];
                    STELLARIUM_ASSIGN(const auto sparse,
                                      collection.sparse(id, node.table.hints[ordinal]));
                    if (sparse) {
                        Candidate& candidate = candidates[leaf];
                        candidate.rewrite.chunks.push_back(id);
                        candidate.gain_pages +=
                            sparse->pages -
                            static_cast<uint64_t>(std::popcount(sparse->live_pages));
                    }
                }
            }
        }
        Plan::Volume volume{.id = item.id, .leaves = {}};
        for (auto& [leaf, candidate] : candidates) {
            if (candidate.gain_pages * kPageBytes < kMinRewriteGainBytes || plan.full()) {
                continue;
            }
            plan.gain_bytes += candidate.gain_pages * kPageBytes;
            plan.chunks += candidate.rewrite.chunks.size();
            ++plan.leaves;
            volume.leaves.emplace_hint(volume.leaves.end(), leaf, std::move(candidate.rewrite));
        }
        if (!volume.leaves.empty()) {
            plan.volumes.push_back(std::move(volume));
        }
    }
    return {};
}

Result<void> Collector::collect(const GcOptions& options, GcReport& report, Plan* plan) const {
    STELLARIUM_ASSIGN(const Published published, publish_());
    const Catalog::Frozen& frozen = published.frozen;
    Collection& collection = *published.collection;

    Marker marker(store_, collection, options, store_.stats().chunks);
    STELLARIUM_TRY(Catalog::for_each_piece(
        store_, published.payload, [&](const NodeRef& ref) { return marker.mark_object(ref); }));
    for (const auto& [root, pieces] : frozen.boots) {
        const auto marked = load_pieces(store_, pieces, "boot manifest", [&](const NodeRef& ref) {
            return marker.mark_object(ref);
        });
        // One that is damaged is of no use, and must not keep everything else from being freed.
        if (!marked && marked.error().code() != ErrorCode::kCorrupt &&
            marked.error().code() != ErrorCode::kNotFound) {
            return std::unexpected(marked.error().with_context("a boot manifest"));
        }
    }
    std::vector<std::pair<uint64_t, uint64_t>> own_bytes;
    own_bytes.reserve(frozen.items.size());
    for (const Catalog::Frozen::Item& item : frozen.items) {
        // Stored by the checkpoint: this only asks for the name.
        STELLARIUM_ASSIGN(const NodeRef delta, item.state.delta.persist(store_));
        const auto own = marker.mark(item.state.root, delta);
        if (!own) {
            return stopped(own.error(), content_of(frozen, item));
        }
        own_bytes.emplace_back(item.id, *own);
    }
    for (const auto& [what, state] : published.leased) {
        STELLARIUM_ASSIGN(const NodeRef delta, state.delta.persist(store_));
        if (const auto marked = marker.mark(state.root, delta); !marked) {
            return stopped(marked.error(), what);
        }
    }
    if (plan != nullptr && !options.dry_run) {
        STELLARIUM_TRY(make_plan(options, published, *plan));
    }

    GcProgress progress{.phase = GcProgress::Phase::kFree, .done = 0, .total = 0};
    if (options.progress) {
        options.progress(progress);
    }
    auto swept = collection.sweep({.dry_run = options.dry_run,
                                   .rate_bytes_per_second = options.rate_bytes_per_second,
                                   .cancelled = options.cancelled});
    // Also after an error: some may have moved or gone. What readers decode from now on is resolved
    // by an index without them.
    cache_.clear();
    if (!swept) {
        return std::unexpected(std::move(swept).error());
    }
    report.add(*swept);
    for (const auto& [id, bytes] : own_bytes) {
        if (const EntityPtr entity = catalog_.find(id)) {
            entity->own_bytes = bytes;
        }
    }
    return {};
}

Result<void> Collector::carry_out(const GcOptions& options, const Plan& plan,
                                  GcReport& report) const {
    GcProgress progress{.phase = GcProgress::Phase::kRewrite, .done = 0, .total = plan.leaves};
    for (const Plan::Volume& volume : plan.volumes) {
        const EntityPtr entity = catalog_.find(volume.id);
        if (!entity) {
            continue;
        }
        for (auto it = volume.leaves.begin(); it != volume.leaves.end();) {
            // A few at a time: the volume's commits wait meanwhile.
            std::map<uint64_t, LeafRewrite> some;
            for (; it != volume.leaves.end() && some.size() < kRewriteBatchLeaves; ++it) {
                some.insert(*it);
            }
            STELLARIUM_ASSIGN(const uint64_t bytes, folder_.rewrite(*entity, some));
            report.rewritten_bytes += bytes;
            progress.done += some.size();
            if (options.progress) {
                options.progress(progress);
            }
            STELLARIUM_TRY(pace(options, bytes));
        }
    }
    return {};
}

Result<GcReport> Collector::run(const GcOptions& options) const {
    GcReport report;
    Plan plan;
    STELLARIUM_TRY(collect(options, report, &plan));
    if (!options.dry_run && plan.leaves > 0) {
        if (auto rewritten = carry_out(options, plan, report); !rewritten) {
            // On a full disk there may be no room for the new parts, and the next run does it.
            if (rewritten.error().code() == ErrorCode::kNoSpace) {
                return report;
            }
            return std::unexpected(std::move(rewritten).error());
        }
        if (plan.gain_bytes >= store_.stats().stored_bytes / kSecondCollectionShare) {
            STELLARIUM_TRY(collect(options, report, nullptr));
        } else {
            catalog_.add_dead_pages(plan.gain_bytes / kPageBytes);
        }
    }
    return report;
}

}  // namespace stellarium::nova
