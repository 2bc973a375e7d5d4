#include <algorithm>
#include <bit>
#include <cassert>
#include <chrono>
#include <deque>
#include <thread>
#include <unordered_map>
#include <utility>

#include "nebula/liveness.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

/// Passes everything on, and keeps what is appended through it.
class ProtectedStore final : public Store {
  public:
    ProtectedStore(StoreImpl& store, uint64_t since) : store_(store), marks_(since) {}
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
    Result<void> read(PageAddress address, std::span<const iovec> into, IoMode mode) override {
        return store_.read(address, into, mode);
    }
    Result<ObjectBytes> get_object(const ChunkId& id, std::optional<PageAddress> hint) override {
        return store_.get_object(id, hint);
    }
    std::optional<PageAddress> object_address(const ChunkId& id) override {
        return store_.object_address(id);
    }
    Result<std::shared_ptr<io::File>> lease_segment(uint32_t segment) override {
        return store_.lease_segment(segment);
    }
    void prefetch(PageAddress address, uint32_t pages) override { store_.prefetch(address, pages); }
    Result<void> checkpoint(uint64_t sequence, Bytes payload) override {
        return store_.checkpoint(sequence, payload);
    }
    uint64_t bytes_since_checkpoint() const override { return store_.bytes_since_checkpoint(); }
    Result<void> prove_durable() override { return store_.prove_durable(); }
    Result<std::unique_ptr<Collection>> begin_collection() override {
        return store_.begin_collection();
    }
    std::unique_ptr<Store> protect() override { return store_.protect(); }
    Result<ScrubStep> scrub(PageAddress from, uint64_t budget_bytes,
                            const std::function<void(const DamagedChunk&)>& report) override {
        return store_.scrub(from, budget_bytes, report);
    }
    Result<std::vector<DamagedChunk>> damaged() override { return store_.damaged(); }
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
    auto handle = std::make_unique<ProtectedStore>(*this, segments_->renumberings());
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
    explicit CollectionImpl(StoreImpl& store)
        : store_(store), marks_(store.segments_->renumberings()) {}
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
    /// A segment as the marks leave it.
    struct Found {
        SegmentLiveness liveness;
        uint64_t dead_before = 0;  ///< Entries that were dead already; counted as dead in liveness.
        uint64_t dead_bytes_before = 0;
        uint32_t dead_pages_before = 0;
        bool can_be_emptied = false;  ///< Closed, and all its entries are known.
    };
    /// Counts bytes, and makes time pass for them.
    class Pace {
      public:
        explicit Pace(const SweepOptions& options) : options_(options) {}
        /// kCancelled when that was asked for.
        Result<void> spend(uint64_t bytes);

      private:
        const SweepOptions& options_;
    };

    Result<void> check_marking() const;
    /// The last page that this collection looks at in this segment, plus one; 0: none.
    uint32_t end_page_in(const Segment& segment) const;
    /// What marks and protections say of the segment is about its present list of entries;
    /// append_mutex_ is held.
    bool has_marks_of(const Segment& segment) const;
    /// kCorrupt when the entry's ordinal is of another list than the marks'.
    Result<void> check_numbering(const StoreImpl::Found& found) const;
    /// Marked, or kept by whatever protection there is; everything where nobody knows.
    /// append_mutex_ is held.
    MarkSet::Bits live_in(const Segment& segment) const;
    /// Marked or kept, or newer than the position; append_mutex_ is held.
    bool is_needed(const StoreImpl::Found& found) const;
    Result<Found> look_at(Segment& segment, const MarkSet::Bits& live, double sparse_below);
    Result<CollectionReport> count(const SweepOptions& options);

    static bool is_worth_emptying(const Segment& segment, const SegmentLiveness& liveness,
                                  double move_below);
    Result<void> move_sparse(const SweepOptions& options, Pace& pace);
    Result<void> move_entries(Segment& segment, const std::vector<uint32_t>& ordinals, Pace& pace);
    /// A mark may have found the rotten one of two copies, when it is not known for that (any
    /// more): true when no other copy that is needed can be read. append_mutex_ is held.
    Result<bool> is_only_whole_copy(Segment& segment, const LocatedEntry& unmarked);
    Result<void> condemn(Segment& segment);
    Result<void> condemn_slice(Segment& segment, const std::vector<LocatedEntry>& dead);
    /// After the last slice: dead pages, and whether the segment as a whole is dead.
    Result<void> settle(Segment& segment, double sparse_below);
    Result<void> free_condemned(Pace& pace);

    StoreImpl& store_;
    MarkSet marks_;
    uint32_t end_segment_ = 0;  ///< The position; 0: not fixed yet.
    uint32_t end_page_ = 0;
    bool swept_ = false;
    CollectionReport report_;
    std::unordered_map<uint32_t, MarkSet::Bits> moved_;  ///< By segment: what has a copy now.
    uint64_t erased_pairs_ = 0;
    bool anything_new_ = false;  ///< The newest dead map does not name all that is dead.
    uint64_t reclaimable_bytes_ = 0;
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

uint32_t CollectionImpl::end_page_in(const Segment& segment) const {
    if (segment.number() < end_segment_) {
        return kSegmentPages;
    }
    return segment.number() == end_segment_ ? end_page_ : 0;
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
    STELLARIUM_TRY(check_numbering(found));
    return marks_.visit(found.segment->number(), found.ordinal) ? Mark::kNew : Mark::kAgain;
}

Result<Collection::Mark> CollectionImpl::mark_pages(const ChunkId& id,
                                                    std::optional<PageAddress> hint,
                                                    uint16_t pages) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_ASSIGN(const auto found, store_.find(id, hint, StoreImpl::Want::kPages));
    STELLARIUM_TRY(check_numbering(found));
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
    STELLARIUM_TRY(check_numbering(found));
    return marks_.is_shared(found.segment->number(), found.ordinal);
}

Result<std::optional<SparseChunk>> CollectionImpl::sparse(const ChunkId& id,
                                                          std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_ASSIGN(const auto found, store_.find(id, hint, StoreImpl::Want::kPages));
    STELLARIUM_TRY(check_numbering(found));
    const uint32_t segment = found.segment->number();
    const uint32_t pages = found.entry.pages();
    const uint16_t live = marks_.visited_pages(segment, found.entry.page, pages);
    if (live == 0 || 2 * static_cast<uint32_t>(std::popcount(live)) >= pages ||
        marks_.is_shared(segment, found.ordinal) || marks_.is_kept(segment, found.ordinal)) {
        return std::nullopt;
    }
    return SparseChunk{.id = id, .live_pages = live, .pages = static_cast<uint8_t>(pages)};
}

// ---- Sweeping ---------------------------------------------------------------------------------

namespace {

/// Entries that are condemned within one hold of the append lock.
constexpr size_t kCondemnSlice = 1024;
/// Content that is moved by one append.
constexpr uint64_t kMoveBytes = uint64_t{1} << 20;
/// Punching costs by the hole, copying by the page: a segment with less than this share alive is
/// emptied rather than punched when what is dead lies in many short runs.
constexpr double kMoveFragmentedBelow = 0.5;
constexpr uint32_t kManyHoles = 32;
constexpr uint32_t kShortHolePages = 8;
/// The longest sleep between two looks at whether to stop.
constexpr std::chrono::milliseconds kLongestPause{50};

}  // namespace

Result<void> CollectionImpl::Pace::spend(uint64_t bytes) {
    std::chrono::nanoseconds left{};
    if (options_.rate_bytes_per_second > 0) {
        left = std::chrono::nanoseconds(
            static_cast<int64_t>(1e9 * static_cast<double>(bytes) /
                                 static_cast<double>(options_.rate_bytes_per_second)));
    }
    while (true) {
        if (options_.cancelled && options_.cancelled()) {
            return fail(ErrorCode::kCancelled, "the garbage collection was cancelled");
        }
        if (left <= std::chrono::nanoseconds(0)) {
            return {};
        }
        const auto pause = std::min<std::chrono::nanoseconds>(left, kLongestPause);
        std::this_thread::sleep_for(pause);
        left -= pause;
    }
}

bool CollectionImpl::has_marks_of(const Segment& segment) const {
    const uint64_t renumbered = segment.renumbered();
    return renumbered <= marks_.since() &&
           std::ranges::all_of(store_.protections_, [renumbered](const MarkSet* protection) {
               return renumbered <= protection->since();
           });
}

Result<void> CollectionImpl::check_numbering(const StoreImpl::Found& found) const {
    if (found.segment->renumbered() <= marks_.since()) {
        return {};
    }
    return fail(ErrorCode::kCorrupt,
                fmt::format("{}: its footer cannot be read any more, so what was found to be "
                            "needed there is not known; nothing was freed: collect again",
                            store_.segments_->path(found.segment->number())));
}

MarkSet::Bits CollectionImpl::live_in(const Segment& segment) const {
    if (!has_marks_of(segment)) {
        return MarkSet::Bits::everything();
    }
    MarkSet::Bits live = marks_.live(segment.number());
    for (const MarkSet* protection : store_.protections_) {
        live.merge(protection->live(segment.number()));
    }
    return live;
}

bool CollectionImpl::is_needed(const StoreImpl::Found& found) const {
    const uint32_t segment = found.segment->number();
    return found.entry.page.get() >= end_page_in(*found.segment) || !has_marks_of(*found.segment) ||
           marks_.is_live(segment, found.ordinal) ||
           std::ranges::any_of(store_.protections_, [&](const MarkSet* protection) {
               return protection->is_live(segment, found.ordinal);
           });
}

Result<CollectionImpl::Found> CollectionImpl::look_at(Segment& segment, const MarkSet::Bits& live,
                                                      double sparse_below) {
    Found out;
    const uint32_t end_page = end_page_in(segment);
    std::vector<bool> dead;
    STELLARIUM_TRY(store_.segments_->visit_each(
        segment, 0, [&](uint32_t /*ordinal*/, const Entry& entry, bool is_dead) {
            if (entry.page.get() >= end_page) {
                return false;
            }
            dead.push_back(is_dead);
            if (is_dead && entry.entry_kind() != EntryKind::kPack) {
                ++out.dead_before;
                out.dead_bytes_before += entry.length.get();
            }
            return true;
        }));
    STELLARIUM_TRY(store_.segments_->visit_entries(segment, [&](std::span<const Entry> entries) {
        out.liveness = liveness_of(entries, end_page, sparse_below, [&](uint32_t ordinal) {
            return ordinal >= dead.size() ||
                   (!dead[ordinal] &&
                    (entries[ordinal].entry_kind() == EntryKind::kPack || live.test(ordinal)));
        });
    }));
    for (const PageRun& run : store_.segments_->dead_parts(segment).runs) {
        out.dead_pages_before += run.pages;
    }
    // Of a segment with unreadable parts nobody knows what else it holds.
    out.can_be_emptied =
        segment.number() < end_segment_ && store_.segments_->metadata_damage(segment).empty();
    return out;
}

Result<CollectionReport> CollectionImpl::count(const SweepOptions& options) {
    Pace pace(options);
    for (Segment* segment : store_.segments_->all()) {
        STELLARIUM_TRY(pace.spend(0));
        MarkSet::Bits live;
        {
            const std::lock_guard guard(store_.append_mutex_);
            live = live_in(*segment);
        }
        STELLARIUM_ASSIGN(const Found found, look_at(*segment, live, options.move_below));
        report_.segments += 1;
        report_.live_chunks += found.liveness.live_entries;
        report_.live_bytes += found.liveness.live_bytes;
        report_.dead_chunks += found.liveness.dead_entries - found.dead_before;
        report_.dead_bytes += found.liveness.dead_bytes - found.dead_bytes_before;
        reclaimable_bytes_ += found.liveness.dead_member_bytes;
        if (found.can_be_emptied && !found.liveness.has_live) {
            report_.segments_freed += 1;
            STELLARIUM_ASSIGN(const uint32_t pages, store_.file_pages(*segment));
            report_.freed_bytes += uint64_t{pages - found.dead_pages_before} * kPageBytes;
        } else if (found.liveness.dead_pages > found.dead_pages_before) {
            report_.freed_bytes +=
                uint64_t{found.liveness.dead_pages - found.dead_pages_before} * kPageBytes;
        }
    }
    reclaimable_bytes_ += report_.freed_bytes;
    return report_;
}

Result<CollectionReport> CollectionImpl::sweep(const SweepOptions& options) {
    STELLARIUM_TRY(check_marking());
    STELLARIUM_TRY(store_.check_writable());
    swept_ = true;
    const auto note_reclaimable = [this] {
        const std::lock_guard guard(store_.state_mutex_);
        store_.reclaimable_bytes_ = reclaimable_bytes_;
    };
    if (options.dry_run) {
        auto counted = count(options);
        if (counted) {
            note_reclaimable();
        }
        return counted;
    }
    const auto set_running = [this](bool running) {
        const std::lock_guard guard(store_.checkpoint_mutex_);
        store_.sweep_running_ = running;
        store_.condemning_ = running;
    };
    Pace pace(options);
    auto swept = [&]() -> Result<void> {
        STELLARIUM_TRY(move_sparse(options, pace));
        // What was moved is durable before what it was moved from may go.
        STELLARIUM_TRY(store_.sync(store_.sequence()));
        set_running(true);
        for (Segment* segment : store_.segments_->all()) {
            STELLARIUM_TRY(pace.spend(0));
            STELLARIUM_TRY(condemn(*segment));
            STELLARIUM_TRY(settle(*segment, options.move_below));
        }
        return free_condemned(pace);
    }();
    set_running(false);
    if (!swept) {
        return std::unexpected(std::move(swept).error());
    }
    note_reclaimable();
    return report_;
}

bool CollectionImpl::is_worth_emptying(const Segment& segment, const SegmentLiveness& liveness,
                                       double move_below) {
    const double live_share = static_cast<double>(liveness.end_page - liveness.dead_pages) /
                              static_cast<double>(liveness.end_page);
    if (live_share < move_below) {
        return true;
    }
    uint32_t holes = 0;
    uint32_t pages = 0;
    for (const PageRun& run : liveness.dead_runs) {
        const auto& punched = segment.reclaim.punched;
        const auto done = std::ranges::lower_bound(punched, run.page, {}, &PageRun::page);
        if (done == punched.end() || *done != run) {
            ++holes;
            pages += run.pages;
        }
    }
    return move_below > 0 && live_share < kMoveFragmentedBelow && holes >= kManyHoles &&
           pages < kShortHolePages * holes;
}

/// Copies what is left of segments and packs that are mostly dead, so that they die as a whole.
Result<void> CollectionImpl::move_sparse(const SweepOptions& options, Pace& pace) {
    for (Segment* segment : store_.segments_->all()) {
        if (end_page_in(*segment) == 0 || !store_.segments_->metadata_damage(*segment).empty()) {
            continue;  // Nothing of it is condemned, so there is nothing to gain.
        }
        MarkSet::Bits live;
        {
            const std::lock_guard guard(store_.append_mutex_);
            live = live_in(*segment);
        }
        STELLARIUM_ASSIGN(const Found found, look_at(*segment, live, options.move_below));
        const SegmentLiveness& liveness = found.liveness;
        const bool empty_it = found.can_be_emptied && liveness.live_entries > 0 &&
                              is_worth_emptying(*segment, liveness, options.move_below);
        std::vector<uint32_t> ordinals;
        bool in_sparse_pack = false;
        const uint32_t end_page = end_page_in(*segment);
        if (!empty_it && liveness.sparse_packs.empty()) {
            continue;
        }
        STELLARIUM_ASSIGN(auto unleased, store_.lock_unleased(segment->number()));
        if (!unleased) {
            continue;  // It could not be given back while somebody has it mapped.
        }
        unleased.reset();
        STELLARIUM_TRY(store_.segments_->visit_each(
            *segment, 0, [&](uint32_t ordinal, const Entry& entry, bool is_dead) {
                if (entry.page.get() >= end_page) {
                    return false;
                }
                if (entry.entry_kind() != EntryKind::kMember) {
                    in_sparse_pack = std::ranges::binary_search(liveness.sparse_packs, ordinal);
                }
                if (entry.entry_kind() != EntryKind::kPack && !is_dead && live.test(ordinal) &&
                    (empty_it || in_sparse_pack)) {
                    ordinals.push_back(ordinal);
                }
                return true;
            }));
        auto moved = move_entries(*segment, ordinals, pace);
        if (!moved && moved.error().code() == ErrorCode::kNoSpace) {
            // What is dead as it is will make room for the next time.
            return {};
        }
        STELLARIUM_TRY(std::move(moved));
    }
    return {};
}

Result<void> CollectionImpl::move_entries(Segment& segment, const std::vector<uint32_t>& ordinals,
                                          Pace& pace) {
    std::deque<std::vector<std::byte>> bytes;  // Content and aux, which items refer to.
    std::vector<Item> items;
    std::vector<uint32_t> in_flight;
    uint64_t batch_bytes = 0;
    const auto write = [&]() -> Result<void> {
        STELLARIUM_TRY(store_.append_copies(std::exchange(items, {})));
        for (const uint32_t ordinal : std::exchange(in_flight, {})) {
            moved_[segment.number()].set(ordinal);
        }
        report_.moved_bytes += batch_bytes;
        bytes.clear();
        // Read and written.
        return pace.spend(2 * std::exchange(batch_bytes, 0));
    };
    for (const uint32_t ordinal : ordinals) {
        Entry entry{};
        STELLARIUM_TRY(
            store_.segments_->visit_each(segment, ordinal, [&](uint32_t, const Entry& at, bool) {
                entry = at;
                return false;
            }));
        std::vector<std::byte>& content = bytes.emplace_back();
        std::vector<std::byte>& aux = bytes.emplace_back();
        auto read = store_.segments_->read_object(segment, entry, content, aux);
        if (!read &&
            (read.error().code() == ErrorCode::kCorrupt || read.error().code() == ErrorCode::kIo)) {
            // It stays where it is, and is no reason to free nothing. What is rotten is remembered
            // as such by now; what cannot be read is for scrub to judge.
            store_.warn(read.error().message());
            continue;
        }
        STELLARIUM_TRY(std::move(read));
        batch_bytes += content.size();
        items.push_back(
            {.id = entry.id, .content = content, .aux = aux, .kind = entry.entry_kind()});
        in_flight.push_back(ordinal);
        if (batch_bytes >= kMoveBytes) {
            STELLARIUM_TRY(write());
        }
    }
    return items.empty() ? Result<void>() : write();
}

Result<bool> CollectionImpl::is_only_whole_copy(Segment& segment, const LocatedEntry& unmarked) {
    const ChunkId& id = unmarked.entry.id;
    const PageAddress address = PageAddress::make(segment.number(), unmarked.entry.page.get());
    std::vector<PageAddress> candidates;
    STELLARIUM_TRY(store_.with_index([&]() -> Result<void> {
        candidates.clear();
        return store_.index_->candidates(id, candidates);
    }));
    bool others_are_bad = false;
    for (const PageAddress other : candidates) {
        if (other == address) {
            continue;
        }
        STELLARIUM_ASSIGN(const auto found, store_.confirm(id, other, StoreImpl::Want::kAny));
        if (!found || !is_needed(*found)) {
            continue;
        }
        std::vector<std::byte> content;
        std::vector<std::byte> aux;
        const auto read =
            store_.segments_->read_object(*found->segment, found->entry, content, aux);
        if (read) {
            return false;
        }
        if (read.error().code() != ErrorCode::kCorrupt && read.error().code() != ErrorCode::kIo) {
            return std::unexpected(read.error());
        }
        others_are_bad = true;
    }
    return others_are_bad;
}

/// Declares dead what nothing marked or kept, and what has been copied. Slice by slice, so that
/// appends wait for a moment only; what they find or write in between is kept.
Result<void> CollectionImpl::condemn(Segment& segment) {
    const uint32_t end_page = end_page_in(segment);
    if (end_page == 0 || !store_.segments_->metadata_damage(segment).empty()) {
        return {};
    }
    const MarkSet::Bits& moved = moved_[segment.number()];
    uint32_t next = 0;
    bool more = true;
    while (more) {
        std::vector<LocatedEntry> dead;
        size_t looked = 0;
        more = false;
        const std::lock_guard guard(store_.append_mutex_);
        STELLARIUM_TRY(store_.check_writable());
        if (!has_marks_of(segment)) {
            return {};  // Nor of what was copied.
        }
        const MarkSet::Bits live = live_in(segment);
        STELLARIUM_TRY(store_.segments_->visit_each(
            segment, next, [&](uint32_t ordinal, const Entry& entry, bool is_dead) {
                if (entry.page.get() >= end_page) {
                    return false;
                }
                if (++looked > kCondemnSlice) {
                    more = true;
                    return false;
                }
                next = ordinal + 1;
                if (!is_dead && entry.entry_kind() != EntryKind::kPack &&
                    (!live.test(ordinal) || moved.test(ordinal))) {
                    dead.push_back({.entry = entry, .ordinal = ordinal});
                }
                return true;
            }));
        if (!has_marks_of(segment)) {
            return {};  // Renumbered while it was looked at.
        }
        std::vector<LocatedEntry> given_up;
        for (const LocatedEntry& found : dead) {
            const bool has_copy = moved.test(found.ordinal);
            STELLARIUM_ASSIGN(const bool only,
                              has_copy ? Result<bool>(false) : is_only_whole_copy(segment, found));
            if (only) {
                marks_.keep(segment.number(), found.ordinal);
            } else {
                given_up.push_back(found);
            }
        }
        if (!given_up.empty()) {
            STELLARIUM_TRY(condemn_slice(segment, given_up));
        }
    }
    return {};
}

Result<void> CollectionImpl::condemn_slice(Segment& segment,
                                           const std::vector<LocatedEntry>& dead) {
    std::vector<Entry> entries;
    uint64_t bytes = 0;
    for (const LocatedEntry& found : dead) {
        entries.push_back(found.entry);
        bytes += found.entry.length.get();
    }
    store_.condemn_epoch_.fetch_add(1);
    store_.segments_->set_dead(segment, entries, {});
    {
        const std::lock_guard guard(store_.state_mutex_);
        store_.condemned_chunks_ += entries.size();
        store_.condemned_bytes_ += bytes;
    }
    const MarkSet::Bits& moved = moved_[segment.number()];
    for (const LocatedEntry& found : dead) {
        const PageAddress address = PageAddress::make(segment.number(), found.entry.page.get());
        STELLARIUM_ASSIGN(const bool erased, store_.with_index([&] {
            return store_.index_->erase(found.entry.id, address);
        }));
        erased_pairs_ += erased ? 1 : 0;
        if (!moved.test(found.ordinal)) {
            report_.dead_chunks += 1;
            report_.dead_bytes += found.entry.length.get();
            continue;
        }
        // Whoever protects it protects the copy from now on.
        const auto want = found.entry.entry_kind() == EntryKind::kChunk ? StoreImpl::Want::kPages
                                                                        : StoreImpl::Want::kAny;
        for (MarkSet* protection : store_.protections_) {
            if (protection->is_live(segment.number(), found.ordinal)) {
                STELLARIUM_ASSIGN(const auto copy, store_.probe(found.entry.id, want));
                assert(copy);
                protection->keep(copy->segment->number(), copy->ordinal);
            }
        }
    }
    return {};
}

Result<void> CollectionImpl::settle(Segment& segment, double sparse_below) {
    // Nothing dead comes back to life, so no lock is needed to see what is left.
    STELLARIUM_ASSIGN(const Found found,
                      look_at(segment, MarkSet::Bits::everything(), sparse_below));
    report_.segments += 1;
    report_.live_chunks += found.liveness.live_entries;
    report_.live_bytes += found.liveness.live_bytes;
    reclaimable_bytes_ += found.liveness.dead_member_bytes;
    if (found.liveness.dead_pages > found.dead_pages_before) {
        store_.segments_->set_dead(segment, {}, found.liveness.dead_runs);
    }
    Segment::Reclaim& reclaim = segment.reclaim;
    reclaim.whole = found.can_be_emptied && !found.liveness.has_live;
    anything_new_ = anything_new_ || (reclaim.whole && !reclaim.recorded_whole) ||
                    found.liveness.dead_pages > reclaim.recorded_pages;
    return {};
}

Result<void> CollectionImpl::free_condemned(Pace& pace) {
    {
        const std::lock_guard checkpoint_guard(store_.checkpoint_mutex_);
        const std::lock_guard state_guard(store_.state_mutex_);
        const bool unfinished =
            store_.superblock_.dead_map_generation != 0 && store_.superblock_.dead_map_freed == 0;
        if (!anything_new_ && !unfinished && store_.condemned_chunks_ == 0) {
            return {};
        }
    }
    auto recorded = store_.record_dead(erased_pairs_);
    if (!recorded && recorded.error().code() == ErrorCode::kNoSpace) {
        STELLARIUM_ASSIGN(const bool made_room,
                          store_.free_unrecorded(report_.segments_freed, report_.freed_bytes));
        if (made_room) {
            recorded = store_.record_dead(erased_pairs_);
        }
    }
    STELLARIUM_TRY(std::move(recorded));
    STELLARIUM_TRY(store_.free_recorded(
        [&](uint64_t bytes) {
            report_.freed_bytes += bytes;
            return pace.spend(bytes);
        },
        report_.segments_freed, report_.segments_leased));
    if (report_.segments_leased == 0) {
        STELLARIUM_TRY(store_.record_freed());
    }
    store_.reserve_.hold();
    return {};
}

}  // namespace stellarium::nebula
