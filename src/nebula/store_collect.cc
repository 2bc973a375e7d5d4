#include <algorithm>
#include <bit>
#include <cassert>
#include <utility>

#include "nebula/liveness.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

/// Passes everything on, and keeps what is appended through it.
class ProtectedStore final : public Store {
  public:
    explicit ProtectedStore(StoreImpl& store) : store_(store) {}
    ~ProtectedStore() override { store_.end_protection(marks_); }
    ProtectedStore(const ProtectedStore&) = delete;
    ProtectedStore& operator=(const ProtectedStore&) = delete;

    MarkSet& marks() { return marks_; }

    Bytes checkpoint_payload() const override { return store_.checkpoint_payload(); }
    Result<void> replay(ReplaySink& sink) override { return store_.replay(sink); }
    Result<Appended> append(WriteBatch& batch) override { return store_.append(batch, &marks_); }
    Result<void> sync(uint64_t sequence) override { return store_.sync(sequence); }
    uint64_t sequence() const override { return store_.sequence(); }
    Result<void> contains(std::span<const ChunkId> ids, std::span<bool> out) override {
        return store_.contains_protected(ids, out, marks_);
    }
    Result<ChunkLocation> resolve(const ChunkId& id, std::optional<PageAddress> hint) override {
        return store_.resolve(id, hint);
    }
    Result<void> read(PageAddress address, std::span<const iovec> into, bool no_wait) override {
        return store_.read(address, into, no_wait);
    }
    Result<ObjectBytes> get_object(const ChunkId& id, std::optional<PageAddress> hint) override {
        return store_.get_object(id, hint);
    }
    std::optional<PageAddress> object_address(const ChunkId& id) override {
        return store_.object_address(id);
    }
    void prefetch(PageAddress address, uint32_t pages) override { store_.prefetch(address, pages); }
    Result<void> checkpoint(uint64_t sequence, Bytes payload) override {
        return store_.checkpoint(sequence, payload);
    }
    uint64_t bytes_since_checkpoint() const override { return store_.bytes_since_checkpoint(); }
    Result<std::unique_ptr<Collection>> begin_collection() override {
        return store_.begin_collection();
    }
    std::unique_ptr<Store> protect() override { return store_.protect(); }
    StoreStats stats() const override { return store_.stats(); }
    const std::string& directory() const override { return store_.directory(); }
    std::array<uint8_t, 16> uuid() const override { return store_.uuid(); }
    std::optional<std::string> read_only_reason() const override {
        return store_.read_only_reason();
    }
    std::vector<std::string> warnings() const override { return store_.warnings(); }
    Result<void> close() override { return store_.close(); }

  private:
    StoreImpl& store_;
    MarkSet marks_;
};

}  // namespace

// ---- Protections ------------------------------------------------------------------------------

std::unique_ptr<Store> StoreImpl::protect() {
    auto handle = std::make_unique<ProtectedStore>(*this);
    const std::lock_guard guard(append_mutex_);
    protections_.push_back(&handle->marks());
    return handle;
}

void StoreImpl::end_protection(MarkSet& protection) {
    const std::lock_guard guard(append_mutex_);
    std::erase(protections_, &protection);
    // The collection that runs may have frozen the roots before the work became reachable.
    if (collection_marks_ != nullptr) {
        collection_marks_->keep_all(protection);
    }
}

Result<void> StoreImpl::contains_protected(std::span<const ChunkId> ids, std::span<bool> out,
                                           MarkSet& protection) {
    assert(ids.size() == out.size());
    STELLARIUM_TRY(check_usable());
    std::ranges::fill(out, false);
    // Nothing that was found may be condemned before it is kept.
    const std::lock_guard guard(append_mutex_);
    return find_stored(ids, [&](size_t i, const Found& found) {
        out[i] = true;
        keep(found.segment->number(), found.ordinal, &protection);
    });
}

// ---- The collection ---------------------------------------------------------------------------

class CollectionImpl final : public Collection {
  public:
    explicit CollectionImpl(StoreImpl& store) : store_(store) {}
    ~CollectionImpl() override {
        const std::lock_guard guard(store_.append_mutex_);
        store_.collection_marks_ = nullptr;
    }
    CollectionImpl(const CollectionImpl&) = delete;
    CollectionImpl& operator=(const CollectionImpl&) = delete;

    MarkSet& marks() { return marks_; }

    Result<void> fix_position() override;
    Result<Mark> mark_object(const ChunkId& id, std::optional<PageAddress> hint) override;
    Result<Mark> mark_pages(const ChunkId& id, std::optional<PageAddress> hint,
                            uint16_t pages) override;
    Result<bool> is_shared(const ChunkId& id, std::optional<PageAddress> hint) override;
    Result<std::optional<SparseChunk>> sparse(const ChunkId& id,
                                              std::optional<PageAddress> hint) override;
    Result<CollectionReport> sweep(const SweepOptions& options) override;

  private:
    Result<void> check_marking() const;
    /// What is alive of the segment's entries before the position.
    Result<SegmentLiveness> liveness(Segment& segment, double sparse_below);
    /// The last page that this collection looks at in this segment, plus one.
    uint32_t end_page_in(uint32_t segment) const;

    StoreImpl& store_;
    MarkSet marks_;
    uint32_t end_segment_ = 0;  ///< The position; 0: not fixed yet.
    uint32_t end_page_ = 0;
    bool swept_ = false;
};

Result<std::unique_ptr<Collection>> StoreImpl::begin_collection() {
    STELLARIUM_TRY(check_writable());
    const std::lock_guard guard(append_mutex_);
    if (collection_marks_ != nullptr) {
        return fail(ErrorCode::kBusy,
                    fmt::format("a garbage collection of {} is running", directory_));
    }
    auto collection = std::make_unique<CollectionImpl>(*this);
    collection_marks_ = &collection->marks();
    return collection;
}

Result<void> CollectionImpl::fix_position() {
    const std::lock_guard guard(store_.checkpoint_mutex_);
    end_segment_ = store_.superblock_.log_segment;
    end_page_ = store_.superblock_.log_page;
    return {};
}

uint32_t CollectionImpl::end_page_in(uint32_t segment) const {
    if (segment < end_segment_) {
        return kSegmentPages;
    }
    return segment == end_segment_ ? end_page_ : 0;
}

Result<void> CollectionImpl::check_marking() const {
    STELLARIUM_TRY(store_.check_usable());
    if (end_segment_ == 0 || swept_) {
        return fail(ErrorCode::kInvalidArgument,
                    swept_ ? "this collection has been swept already"
                           : "a collection marks after its position was fixed");
    }
    return {};
}

Result<Collection::Mark> CollectionImpl::mark_object(const ChunkId& id,
                                                     std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_ASSIGN(const auto found, store_.find(id, hint, StoreImpl::Want::kAny));
    return marks_.visit(found.segment->number(), found.ordinal) ? Mark::kNew : Mark::kAgain;
}

Result<Collection::Mark> CollectionImpl::mark_pages(const ChunkId& id,
                                                    std::optional<PageAddress> hint,
                                                    uint16_t pages) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_ASSIGN(const auto found, store_.find(id, hint, StoreImpl::Want::kPages));
    const uint32_t known = found.entry.pages();
    if (pages == 0 || (known < kMaxChunkPages && (uint32_t{pages} >> known) != 0)) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("a node refers to pages {:#x} of chunk {}, which has {}", pages,
                                id.hex(), known));
    }
    return marks_.visit_pages(found.segment->number(), found.ordinal, found.entry.page, pages)
               ? Mark::kNew
               : Mark::kAgain;
}

Result<bool> CollectionImpl::is_shared(const ChunkId& id, std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_ASSIGN(const auto found, store_.find(id, hint, StoreImpl::Want::kAny));
    return marks_.is_shared(found.segment->number(), found.ordinal);
}

Result<std::optional<SparseChunk>> CollectionImpl::sparse(const ChunkId& id,
                                                          std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_ASSIGN(const auto found, store_.find(id, hint, StoreImpl::Want::kPages));
    const uint32_t segment = found.segment->number();
    const uint32_t pages = found.entry.pages();
    const uint16_t live = marks_.visited_pages(segment, found.entry.page, pages);
    if (live == 0 || 2 * static_cast<uint32_t>(std::popcount(live)) >= pages ||
        marks_.is_shared(segment, found.ordinal) || marks_.is_kept(segment, found.ordinal)) {
        return std::nullopt;
    }
    return SparseChunk{.id = id, .live_pages = live, .pages = static_cast<uint8_t>(pages)};
}

Result<SegmentLiveness> CollectionImpl::liveness(Segment& segment, double sparse_below) {
    const uint32_t number = segment.number();
    MarkSet::Bits live = marks_.live(number);
    {
        const std::lock_guard guard(store_.append_mutex_);
        for (const MarkSet* protection : store_.protections_) {
            live.merge(protection->live(number));
        }
    }
    SegmentLiveness out;
    STELLARIUM_TRY(store_.segments_->visit_entries(segment, [&](std::span<const Entry> entries) {
        out = liveness_of(entries, end_page_in(number), sparse_below,
                          [&live](uint32_t ordinal) { return live.test(ordinal); });
    }));
    return out;
}

Result<CollectionReport> CollectionImpl::sweep(const SweepOptions& options) {
    STELLARIUM_TRY(check_marking());
    if (!options.dry_run) {
        return fail(ErrorCode::kUnsupported, "only dry runs can be swept so far");
    }
    swept_ = true;
    CollectionReport report;
    for (Segment* segment : store_.segments_->all()) {
        STELLARIUM_ASSIGN(const SegmentLiveness found, liveness(*segment, options.move_below));
        report.segments += 1;
        report.live_chunks += found.live_entries;
        report.live_bytes += found.live_bytes;
        report.dead_chunks += found.dead_entries;
        report.dead_bytes += found.dead_bytes;
        report.freed_bytes += uint64_t{found.dead_pages} * kPageBytes;
        const bool all_dead = segment->number() < end_segment_ && found.live_entries == 0 &&
                              store_.segments_->metadata_damage(*segment).empty();
        report.segments_freed += all_dead ? 1 : 0;
        if (options.cancelled && options.cancelled()) {
            return fail(ErrorCode::kCancelled, "the collection was cancelled");
        }
    }
    return report;
}

}  // namespace stellarium::nebula
