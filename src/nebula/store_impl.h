// The store behind store.h, private to this component: one class, its parts in several files.
//
//   store_open.cc    create, open: superblock, recovery, index
//   store_lookup.cc  from an id to an entry and its bytes; repair of the index
//   store_append.cc  deduplicate, lay out, write
//   store_commit.cc  sync, checkpoint
//   store_collect.cc garbage collection: protections, marking, sweep
//   store_reclaim.cc the dead map, and giving back what it names
//   store_scrub.cc   looking for rot
//   store_check.cc   checking the structure of a store that may be damaged
//   store_repair.cc  making it whole again
//   store.cc         the rest: batches, replay, state, close
//
// Thread rule: as store.h. Locks are taken in this order: checkpoint_mutex_, append_mutex_,
// repair_mutex_, state_mutex_; those inside SegmentSet and ChunkIndex come last. state_mutex_ is
// never held across a call to the disk.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <fmt/format.h>

#include "nebula/check.h"
#include "nebula/format.h"
#include "nebula/index.h"
#include "nebula/marks.h"
#include "nebula/reader_gate.h"
#include "nebula/recovery.h"
#include "nebula/reserve.h"
#include "nebula/segment.h"
#include "nebula/store.h"

namespace stellarium::nebula {

static_assert(StoreOptions{}.mapped_footers == kMaxMappedFooters);

/// The superblock's name until a new store is complete.
inline constexpr std::string_view kNewSuperblockName = "superblock.new";
inline constexpr std::string_view kLockName = "lock";
inline constexpr std::string_view kSegmentsName = "segments";
/// What ends it that a damaged store is read-only.
inline constexpr std::string_view kHowToRepair =
    "'stellarctl fsck --repair', while no daemon has the store, says what is lost and makes it "
    "writable again";

inline std::string join_path(const std::string& directory, std::string_view name) {
    return fmt::format("{}/{}", directory, name);
}
inline std::string index_file_name(uint32_t generation) {
    return fmt::format("index-{}.ckpt", generation);
}
inline uint32_t pages_for(size_t bytes) {
    return static_cast<uint32_t>((bytes + kPageBytes - 1) / kPageBytes);
}
Result<void> check_options(const StoreOptions& options);

/// A place of the append plan: one distinct id of a batch.
struct Item {
    ChunkId id;
    Bytes content;
    Bytes aux{};
    EntryKind kind = EntryKind::kChunk;
    bool stored = false;    ///< Found, or written by now.
    PageAddress address{};  ///< Where, once stored.
    uint32_t ordinal = 0;   ///< In that segment's list of entries.
};

/// What is written as one run of pages: a chunk, an object, or a pack.
struct Unit {
    EntryKind kind = EntryKind::kChunk;
    ChunkId id;
    Bytes bytes;
    size_t item = 0;                ///< Of chunks and objects.
    std::vector<size_t> members{};  ///< Items, of packs.

    uint32_t pages() const { return pages_for(bytes.size()); }
    size_t footer_entries() const { return 1 + members.size(); }
};

struct Plan {
    std::vector<Item> items;
    std::vector<size_t> chunk_items;  ///< Of each add_chunk, in order.
    std::deque<std::vector<std::byte>> packs;
    std::vector<Unit> units;
};

/// Lock order: checkpoint_mutex_, append_mutex_, repair_mutex_, state_mutex_; those inside
/// SegmentSet and ChunkIndex come last.
class StoreImpl final : public SalvagedStore {
  public:
    StoreImpl(const io::Env& env, std::string directory, const StoreOptions& options,
              Salvage salvage = Salvage::kNone)
        : env_(env),
          files_(*env.files),
          directory_(std::move(directory)),
          options_(options),
          reserve_(files_, directory_,
                   options.read_only || salvage != Salvage::kNone ? 0 : options.reserve_bytes),
          salvage_(salvage),
          segment_pages_(static_cast<uint32_t>(options.segment_bytes / kPageBytes)) {}

    Result<void> open();

    Bytes checkpoint_payload() const override {
        return std::as_bytes(std::span(superblock_.payload)).first(superblock_.payload_bytes);
    }
    Result<void> replay(ReplaySink& sink) override;
    Result<Appended> append(WriteBatch& batch) override { return append(batch, nullptr); }
    Result<void> sync(uint64_t sequence) override;
    uint64_t sequence() const override { return sequence_.load(std::memory_order_acquire); }
    Result<void> contains(std::span<const ChunkId> ids, std::span<bool> out) override;
    Result<ChunkLocation> resolve(const ChunkId& id, std::optional<PageAddress> hint) override;
    Result<void> read(PageAddress address, std::span<const iovec> into, IoMode mode) override;
    Result<ObjectBytes> get_object(const ChunkId& id, std::optional<PageAddress> hint) override;
    std::optional<PageAddress> object_address(const ChunkId& id) override;
    Result<std::shared_ptr<io::File>> lease_segment(uint32_t segment) override;
    void prefetch(PageAddress address, uint32_t pages) override;
    Result<void> checkpoint(uint64_t sequence, Bytes payload) override;
    uint64_t bytes_since_checkpoint() const override;
    Result<void> prove_durable() override;
    Result<std::unique_ptr<Collection>> begin_collection() override;
    std::unique_ptr<Store> protect() override;
    Result<ScrubStep> scrub(PageAddress from, uint64_t budget_bytes,
                            const std::function<void(const DamagedChunk&)>& report) override;
    Result<std::vector<DamagedChunk>> damaged() override;
    StoreStats stats() const override;
    const std::string& directory() const override { return directory_; }
    std::array<uint8_t, 16> uuid() const override { return store_id_; }
    std::optional<std::string> read_only_reason() const override;
    std::vector<std::string> warnings() const override;
    Result<void> close() override;

    // SalvagedStore.
    Result<CheckCounts> check(const CheckOptions& options,
                              const std::function<void(Finding)>& report) override;
    Result<RepairReport> repair(Bytes payload) override;

    // For what protect() returns.
    /// Appends, and keeps what was written or found in `protection` too when that is not null.
    Result<Appended> append(WriteBatch& batch, MarkSet* protection);
    Result<void> contains_protected(std::span<const ChunkId> ids, std::span<bool> out,
                                    MarkSet& protection);
    void end_protection(MarkSet& protection);

  private:
    friend class CollectionImpl;

    struct Found {
        Segment* segment = nullptr;
        Entry entry;
        uint32_t ordinal = 0;
        bool damaged = false;
        PageAddress address() const {
            return PageAddress::make(segment->number(), entry.page.get());
        }
    };
    /// Which entries answer a question.
    enum class Want : uint8_t { kAny, kPages };
    struct Unsynced {
        std::shared_ptr<io::File> file;
        uint32_t segment = 0;
        uint64_t last_sequence = 0;
    };
    struct PendingFooter {
        std::shared_ptr<io::File> file;
        Segment* segment = nullptr;
        uint32_t end_page = 0;
        uint64_t first_sequence = 0;
        uint64_t last_sequence = 0;
    };
    /// The segment that batches go to; guarded by append_mutex_.
    struct Active {
        Segment* segment = nullptr;  ///< Null before the first batch.
        std::shared_ptr<io::File> file;
        uint32_t end_page = 0;
        size_t entries = 0;
        uint64_t first_sequence = 0;
        uint64_t last_sequence = 0;
        bool has_remains = false;  ///< Bytes of an append that failed lie behind end_page.
    };

    /// What a new dead map names that the one before did not.
    struct DeadRecord {
        struct Part {
            Segment* segment = nullptr;
            bool whole = false;
            uint32_t dead_pages = 0;
            std::vector<PageRun> runs{};
        };
        std::vector<Part> segments;  ///< All that it names.
        uint64_t damage_version = 0;
        uint64_t chunks = 0;  ///< These three are to be taken off the counters.
        uint64_t unique_bytes = 0;
        uint64_t stored_bytes = 0;

        void take_off(SuperblockSlot& slot) const;
    };

    /// Pages of a segment that hold neither a batch nor a footer, and are not known to be dead.
    struct Gap {
        PageRun run;
        std::string why;
        bool quiet = false;  ///< At the end of the file: the footer's place, and reported as such.
    };
    /// What a look at every batch of a segment file found.
    struct SegmentScan {
        uint32_t file_pages = 0;      ///< The last one may be cut short.
        std::string header_problem;   ///< Of page 0; empty: none.
        std::string footer_problem;   ///< Empty: it is good, or there is none.
        bool has_footer = false;      ///< A good one.
        uint32_t end_page = 1;        ///< Behind the last batch.
        uint32_t end_of_file = 0;     ///< Behind the last page that is not the footer's.
        uint64_t first_sequence = 0;  ///< Of its batches; 0: none is left.
        uint64_t last_sequence = 0;
        uint64_t first_predecessor = 0;  ///< previous_sequence of a batch at page 1.
        bool starts_at_first_page = false;
        bool ends_whole = true;   ///< No gap and nothing dead behind the last batch.
        bool is_foreign = false;  ///< A whole header of another store or segment, and no batch.
        uint64_t batches = 0;
        std::vector<Gap> gaps;
        std::vector<std::string> problems;  ///< Batches that do not follow each other.
        std::vector<Entry> entries;         ///< Of the batches, members of packs included.
        std::vector<Entry> footer_entries;
        std::vector<PageRun> damaged_packs;  ///< Whose members the footer knows better.
    };
    /// What a good footer and the batches say together, where they do not say the same.
    struct FooterDifference {
        std::vector<Entry> entries;    ///< All that the segment holds.
        std::vector<Entry> different;  ///< In one of them only; empty: they agree.
    };

    // Opening.
    Result<void> read_superblock();
    /// The place of a superblock for a salvage of the whole log: `newest` is its newest valid copy,
    /// if there is one.
    Result<void> begin_at_first_batch(const std::optional<SuperblockSlot>& newest);
    /// The store whose segments most of the files are.
    Result<StoreId> store_of_segments();
    /// The highest number of a dead map of this store that can be read; 0: none.
    Result<uint32_t> newest_dead_map();
    Result<void> check_whole_log() const;
    Result<void> open_dead_map();
    Result<void> open_segments();
    Result<void> apply_recovery(RecoveredLog& log);
    Result<void> open_index();
    Result<void> remove_leftovers();

    // Salvage.
    void note(Finding finding) { open_findings_.push_back(std::move(finding)); }
    Result<SegmentScan> scan_segment(Segment& segment);
    FooterDifference compare_footer(Segment& segment, const SegmentScan& scan);
    /// True when batches are missing between the end of a segment and the beginning of the next.
    bool ends_early(uint32_t number, const SegmentScan& scan, uint32_t next_number,
                    const SegmentScan& next) const;
    Result<void> report_scan(Segment& segment, const SegmentScan& scan, CheckCounts& counts,
                             const std::function<void(Finding)>& report);
    Result<void> take_entries(Segment& segment, std::vector<Entry> entries);
    Result<void> report_footer(Segment& segment, const SegmentScan& scan,
                               const std::function<void(Finding)>& report);
    /// Nothing proves that this segment's batches were ever acknowledged.
    bool is_behind_log(uint32_t number) const;
    Result<void> check_new_entries(Segment& segment, const std::function<void(Finding)>& report);
    Result<void> check_index(const std::function<void(Finding)>& report);
    Result<void> check_data(const CheckOptions& options, CheckCounts& counts,
                            const std::function<void(Finding)>& report);
    /// Looks at everything that may lie in gaps; `gap_contents_` has it then.
    Result<void> search_gaps();
    Result<void> search_gap(Segment& segment, const PageRun& run);
    /// What a gap may hold under this id.
    Result<std::optional<Found>> find_in_gaps(const ChunkId& id);
    /// Stores again what can be read in the gaps, and gives up the rest.
    Result<void> evacuate(Segment& segment, const SegmentScan& scan, bool lost_end,
                          RepairReport& report);
    Result<void> rebuild_index();
    Result<void> count_anew();
    Result<void> publish_repair(Bytes payload);
    /// A segment whose metadata is written anew, or which is moved aside.
    struct Rewrite {
        Segment* segment = nullptr;
        SegmentScan scan;
        bool lost_end = false;
        bool footer_differs = false;  ///< From the batches.

        bool writes_header() const { return !scan.header_problem.empty(); }
        /// Where the footer is whole it names what is dead by now, too.
        bool writes_footer() const {
            return footer_differs || (!scan.has_footer && scan.batches > 0);
        }
    };
    Result<void> rewrite_metadata(const Rewrite& rewrite, RepairReport& report);

    // Finding.
    Result<std::optional<Found>> confirm(const ChunkId& id, PageAddress address, Want want);
    Result<std::optional<Found>> probe(const ChunkId& id, Want want);
    Result<Found> find(const ChunkId& id, std::optional<PageAddress> hint, Want want);
    Result<void> probe_items(Plan& plan);
    Result<void> find_stored(std::span<const ChunkId> ids,
                             const std::function<void(size_t, const Found&)>& found);
    Result<void> healed_or(Result<void> error, Segment& segment, uint32_t page,
                           std::span<const iovec> into);
    Result<void> audit_index();
    Result<void> repair_index();
    template <typename Call>
    auto with_index(Call&& call) -> decltype(call());
    /// Runs `work`. Where the disk is full, and this thread may, the reserve goes and it runs
    /// again.
    template <typename Work>
    Result<void> with_reserve(Work work);
    /// Remembers whether the disk is full, from how an append went.
    void note_space(const Result<void>& appended);
    Result<void> insert_entries(uint32_t segment, std::span<const Entry> entries,
                                const std::vector<bool>* only_shards);

    // Appending; append_mutex_ is held.
    Result<void> check_batch(const WriteBatch& batch, size_t& record_bytes) const;
    static Plan make_plan(const WriteBatch& batch);
    void make_units(Plan& plan) const;
    bool fits_empty_segment(uint32_t batch_pages, size_t footer_entries) const;
    bool fits_active(uint32_t batch_pages, size_t footer_entries) const;
    Result<void> write_plan(Plan& plan, const WriteBatch& batch, size_t record_bytes,
                            uint64_t duplicate_bytes, MarkSet* protection);
    Result<void> write_batch(Plan& plan, std::span<const Unit> units, const WriteBatch* records,
                             size_t record_bytes, uint64_t duplicate_bytes, MarkSet* protection);
    /// Appends without looking for duplicates; for copies of what is stored.
    Result<void> append_copies(std::vector<Item> items);
    /// Has the collection that runs, if any, and the protection, if any, keep this entry.
    void keep(uint32_t segment, uint32_t ordinal, MarkSet* protection);
    /// The active segment has changes that batches up to `sequence` rely on. state_mutex_ is held.
    void note_unsynced(uint64_t sequence);
    Result<void> start_segment();
    Result<void> write_footer(const PendingFooter& footer);

    // Checkpoints; checkpoint_mutex_ is held.
    Result<void> sync_footers();
    /// When it is time to, or when `dead_pairs`, erased since, make up much of the old one. Not
    /// while something is condemned and not recorded, unless `slot` is about to record it.
    Result<void> write_index(SuperblockSlot& slot, bool all_is_recorded, uint64_t dead_pairs);
    void fill_position(SuperblockSlot& slot, uint64_t sequence);
    Result<void> write_superblock(const SuperblockSlot& slot);
    /// Makes `slot` the newest generation; both generations, when it names another dead map, whose
    /// record is applied then. Removes the files that are named no more.
    Result<void> publish(SuperblockSlot& slot, const DeadRecord* record = nullptr);

    // Reclaiming; by the sweep that runs, or with checkpoint_mutex_ held when none does.
    /// Something is condemned or damaged that the newest dead map does not name.
    bool has_unrecorded() const;
    /// Writes what is dead and damaged into a new dead map, which `slot` names then.
    /// checkpoint_mutex_ is held.
    Result<DeadRecord> write_dead_map(SuperblockSlot& slot);
    /// The superblock names that map now: what is in it is recorded, and counts no more.
    void apply(const DeadRecord& record);
    /// The whole of it: sync, map, superblock. `dead_pairs`: see write_index.
    Result<void> record_dead(uint64_t dead_pairs);
    /// Unlinks and punches what the dead map names, and says so in the superblock. `freed(bytes)`
    /// is called after each step and may fail to stop it. Leased segments are left for the next
    /// time, and counted.
    Result<void> free_recorded(const std::function<Result<void>(uint64_t bytes)>& freed,
                               uint64_t& segments_freed, uint64_t& segments_leased);
    /// The segment's file, to which nobody can get a lease while it is open; nullptr: somebody has
    /// one, see Store::lease_segment.
    Result<std::unique_ptr<io::File>> lock_unleased(uint32_t segment);
    /// Says in the superblock that nothing that the dead map names takes room any more.
    Result<void> record_freed();
    /// False: there was nothing.
    Result<bool> free_unrecorded(uint64_t& segments_freed, uint64_t& freed_bytes);
    Result<uint32_t> file_pages(Segment& segment);
    Result<void> unlink_segment(Segment& segment);
    /// False: this file system cannot. `file`: what lock_unleased() gave.
    Result<bool> punch_segment(Segment& segment, io::File& file);
    Result<bool> is_stored_whole(const Entry& entry);
    /// Reads the pages that these entries share, from the disk, and checks each.
    Result<void> scrub_unit(Segment& segment, std::span<const Entry> entries, ScrubStep& step,
                            const std::function<void(const DamagedChunk&)>& report);
    void subtract_from_counters(uint64_t chunks, uint64_t unique_bytes, uint64_t stored_bytes);
    Result<void> finish_reclaim();

    Result<void> check_usable() const;
    Result<void> check_writable() const;
    void poison(const Error& error, std::string_view what);
    void set_read_only(std::string reason);
    void warn(std::string sentence) const;

    const io::Env env_;
    io::FileSystem& files_;
    const std::string directory_;
    const StoreOptions options_;
    Reserve reserve_;
    std::atomic<uint64_t> full_appends_ = 0;
    std::atomic<bool> disk_full_ = false;
    const Salvage salvage_;
    const uint32_t segment_pages_;
    std::unique_ptr<io::FileLock> lock_;
    std::shared_ptr<io::File> superblock_file_;
    StoreId store_id_{};
    std::unique_ptr<SegmentSet> segments_;
    std::unique_ptr<ChunkIndex> index_;
    std::atomic<bool> replayed_ = false;
    std::atomic<bool> closed_ = false;
    std::atomic<bool> writable_ = true;
    /// A sync failed: what was read or written by now may be something else in the file.
    std::atomic<bool> distrusts_files_ = false;

    std::mutex checkpoint_mutex_;  ///< One checkpoint at a time; guards superblock_ after open.
    SuperblockSlot superblock_{};
    uint64_t index_bytes_written_ = 0;
    bool sweep_running_ = false;  ///< From the first condemned entry to the last freed byte.
    bool condemning_ = false;     ///< Until it is recorded.
    uint32_t last_dead_map_ = 0;  ///< The highest number tried.
    uint64_t recorded_damage_version_ = 0;
    std::atomic<bool> holes_unsupported_ = false;
    std::vector<uint32_t> whole_dead_files_;  ///< Segments to be unlinked that were never opened.

    std::mutex append_mutex_;  ///< Layout and write of batches: one at a time, in sequence order.
    Active active_;
    uint32_t last_segment_ = 0;
    MarkSet* collection_marks_ = nullptr;  ///< Of the collection that runs; null: none does.
    std::vector<MarkSet*> protections_;
    /// Changes when entries are condemned: what was found before may be dead then.
    std::atomic<uint64_t> condemn_epoch_ = 0;

    ReaderGate gate_;  ///< Held while bytes of segments are read that a collection may free.

    std::mutex repair_mutex_;  ///< One index repair or audit at a time.
    std::atomic<bool> index_audited_ = false;
    std::atomic<uint64_t> index_misses_recovered_ = 0;

    mutable std::mutex state_mutex_;  ///< Guards what follows.
    std::condition_variable sync_done_;
    bool sync_running_ = false;
    std::atomic<uint64_t> sequence_ = 0;  ///< Written under state_mutex_.
    uint64_t highest_sequence_ = 0;
    uint64_t durable_sequence_ = 0;
    Counters counters_;
    uint64_t checkpoint_appended_bytes_ = 0;
    uint64_t pending_duplicate_bytes_ = 0;  ///< Not yet written into a batch header.
    std::deque<BatchPosition> batches_;     ///< Those after the checkpoint.
    std::vector<Unsynced> unsynced_;
    uint64_t segments_created_ = 0;
    uint64_t segments_created_synced_ = 0;
    std::vector<PendingFooter> pending_footers_;  ///< Not yet written, or not yet synced.
    uint64_t condemned_chunks_ = 0;               ///< Not in the newest dead map yet.
    uint64_t condemned_bytes_ = 0;
    uint64_t unfreed_bytes_ = 0;      ///< Named by the dead map, and not yet given back.
    uint64_t reclaimable_bytes_ = 0;  ///< See StoreStats::dead_bytes.
    std::optional<std::string> read_only_reason_;
    bool records_lost_ = false;                       ///< Set by open().
    std::map<uint64_t, std::string> missing_before_;  ///< See RecoveredLog. Set by open().
    mutable std::vector<std::string> warnings_;

    // Of a salvage, by one thread.
    struct GapContent {
        Segment* segment = nullptr;
        Entry entry;
    };
    std::vector<Finding> open_findings_;  ///< What open() had to work around.
    bool superblock_copies_differ_ = false;
    bool dead_map_lost_ = false;
    uint32_t log_end_segment_ = 0;  ///< Where the log was found to end; 0: before any segment.
    uint32_t log_end_page_ = 0;
    uint32_t last_found_segment_ = 0;                ///< Those above it are made by the salvage.
    std::map<uint32_t, std::vector<PageRun>> gaps_;  ///< By segment, as check() found them.
    bool gaps_searched_ = false;
    bool proof_lost_ = false;  ///< No copy of the superblock says how far the log was durable.
    bool segments_missing_ = false;  ///< The folder: made again with the first segment.
    std::unordered_map<ChunkId, GapContent, Hash256Hasher> gap_contents_;
};

template <typename Work>
Result<void> StoreImpl::with_reserve(Work work) {
    Result<void> done = work();
    if (!done && done.error().code() == ErrorCode::kNoSpace && ReserveScope::active() &&
        reserve_.release()) {
        done = work();
    }
    return done;
}

template <typename Call>
auto StoreImpl::with_index(Call&& call) -> decltype(call()) {
    for (uint32_t tries = 0;; ++tries) {
        auto result = call();
        if (result || result.error().code() != ErrorCode::kCorrupt || tries >= kIndexShards) {
            return result;
        }
        if (auto repaired = repair_index(); !repaired) {
            return std::unexpected(std::move(repaired).error());
        }
    }
}

}  // namespace stellarium::nebula
