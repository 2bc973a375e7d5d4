// The segment files: their batches, their entries, their bytes.
//
// SegmentSet knows every segment file of a store. It opens files and maps footers when they are
// first needed, keeps a bounded number of each, and answers three questions: which entry lies at a
// page, what are the bytes of these pages, and have they been checked against their ids since the
// store was opened. BatchReader functions below it parse the log.
//
// Thread rule: SegmentSet and Segment may be used from any thread at the same time, except that a
// segment grows from one thread at a time (the store's append lock).
// Ownership: a Segment lives as long as its SegmentSet, also when its file is gone. What garbage
// collection declared dead is not found any more; whoever may still be reading it must hold a pin
// that the collection waits for before the bytes go (reader_gate.h).
// Errors: kCorrupt names file, offset, id and reason; kIo is the system's; kWouldBlock only from
// no-wait reads; kStale for pages that are dead.
//
//     Segment* segment = segments.find(address.segment());
//     auto entry = segments.entry_at(*segment, address.page(), id);
//     STELLARIUM_TRY(segments.read_verified(*segment, address.page(), into, ReadCheck::kFirst,
//     false));
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <vector>

#include <sys/uio.h>

#include "base/error.h"
#include "io/io.h"
#include "nebula/dead_map.h"
#include "nebula/format.h"
#include "nebula/types.h"

namespace stellarium::nebula {

/// Open segment files kept for reading; the process has 20,000 descriptors in all.
inline constexpr size_t kMaxOpenSegmentFiles = 1024;
/// Footers kept mapped; a process has 65,530 mappings in all.
inline constexpr size_t kMaxMappedFooters = 16384;
/// One read for checking covers at most this much, and the chunks that it cuts through.
inline constexpr uint32_t kMaxCheckedReadPages = 512;

/// "segments/0000012.seg", below the store's directory.
std::string segment_file_name(uint32_t segment);
/// The inverse for the part behind the slash; nullopt for other names.
std::optional<uint32_t> parse_segment_file_name(std::string_view name);

/// read_exact for scattered buffers. With kNoWait: kWouldBlock when not all is in memory.
Result<void> read_exact_into(io::File& file, std::span<const iovec> into, uint64_t offset_bytes,
                             IoMode mode);

// ---- Reading the log --------------------------------------------------------------------------

/// A batch as found on disk.
struct ScannedBatch {
    uint32_t page = 0;
    uint32_t end_page = 0;
    uint64_t sequence = 0;
    uint64_t previous_sequence = 0;
    uint64_t durable_through = 0;
    uint64_t duplicate_bytes = 0;
    uint32_t records = 0;
    std::vector<Entry> entries;       ///< With the members of packs.
    std::vector<std::string> damage;  ///< One sentence for each chunk that does not match its id.
    std::string lost_members;  ///< Why the members of some pack are missing; empty: none are.
    std::vector<uint32_t> damaged_packs;  ///< Pages of packs whose tables may be wrong or missing.
};

enum class DataCheck : uint8_t {
    kNone,    ///< Headers only, and packs for their members.
    kHashes,  ///< Everything against its id.
};

/// Reads the batch at `page`. kCorrupt: there is none, with the reason; damaged data is no error
/// but listed. Other codes: the file could not be read, which says nothing about the batch. What
/// lies in the runs `dead` is neither read nor judged, and dead packs have no members.
Result<ScannedBatch> read_batch(io::File& file, const StoreId& store_id, uint32_t segment,
                                uint32_t page, DataCheck check, std::span<const PageRun> dead = {});
/// Its header pages, checked; for replay and dumps.
Result<std::vector<std::byte>> read_batch_header(io::File& file, const StoreId& store_id,
                                                 uint32_t segment, uint32_t page);
/// The first page at or after `page` where a valid batch header stands.
Result<std::optional<uint32_t>> find_batch(io::File& file, const StoreId& store_id,
                                           uint32_t segment, uint32_t page);

// ---- Segments ---------------------------------------------------------------------------------

class SegmentSet;

/// One segment file. Its entries are in memory while it grows (or when its footer is unusable), and
/// in its mapped footer afterwards.
class Segment {
  public:
    explicit Segment(uint32_t number) : number_(number) {}
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    uint32_t number() const { return number_; }

    /// Set whether all pages of [page, page + pages) were checked.
    bool is_verified(uint32_t page, uint32_t pages) const;
    void set_verified(uint32_t page, uint32_t pages);

    /// True when one of the pages is dead, or the file gone. Never blocks.
    bool any_dead(uint32_t page, uint32_t pages) const;
    bool is_gone() const { return gone_.load(std::memory_order_seq_cst); }

    /// Which renumbering of SegmentSet::renumberings() was the last of this segment's: its footer
    /// was read, and later could not be read again, so that the batches' list took its place.
    /// Ordinals from before say nothing any more. 0: none. Set before a new ordinal is given out.
    uint64_t renumbered() const { return renumbered_.load(std::memory_order_seq_cst); }

    /// What the store remembers of freeing this segment. Used by the sweep that runs, or, when none
    /// does, under the store's checkpoint lock.
    struct Reclaim {
        bool whole = false;             ///< Nothing of it is needed: it is to be unlinked.
        bool recorded_whole = false;    ///< And the newest dead map says so.
        uint32_t recorded_pages = 0;    ///< Dead pages by the newest dead map.
        uint64_t unfreed_bytes = 0;     ///< Of those, still taking room.
        std::vector<PageRun> punched;   ///< Given back already.
        std::vector<PageRun> recorded;  ///< In the newest dead map.
    };
    Reclaim reclaim;

  private:
    friend class SegmentSet;
    using PageBits = std::atomic<uint64_t>;
    static constexpr size_t kPageWords = kSegmentPages / 64;

    static PageBits* bits_of(std::atomic<PageBits*>& bits);
    void clear_verified(uint32_t page, uint32_t pages);
    /// mutex_ is held.
    bool is_dead(const Entry& entry) const;
    bool is_damaged(const Entry& entry) const;

    const uint32_t number_;
    mutable std::shared_mutex mutex_;  ///< Guards all below up to file_used_.
    std::shared_ptr<io::File> file_;
    bool header_checked_ = false;
    bool in_memory_ = false;   ///< entries_ holds them; else footer_ does, or nothing yet.
    bool was_mapped_ = false;  ///< Its footer was in use, so ordinals of it may be remembered.
    std::vector<Entry> entries_;
    std::unique_ptr<io::MappedBytes> footer_;
    std::span<const Entry> footer_entries_;
    std::string metadata_damage_;  ///< Why some entries are missing; empty when none are known to.

    std::vector<EntryPlace> dead_members_;  ///< Of packs that are not dead; ascending.
    std::vector<EntryPlace> damaged_;       ///< Ascending.

    std::atomic<bool> file_used_ = false;  ///< Since the cache last looked.
    std::atomic<bool> footer_used_ = false;
    std::atomic<PageBits*> verified_ = nullptr;
    std::atomic<PageBits*> dead_ = nullptr;
    std::atomic<bool> gone_ = false;
    std::atomic<uint64_t> renumbered_ = 0;
};

/// An entry and its place in its segment's list of entries.
struct LocatedEntry {
    Entry entry;
    uint32_t ordinal = 0;
    bool damaged = false;  ///< It failed its check once: nothing may be deduplicated against it.
};

/// When bytes are checked against their ids.
enum class ReadCheck : uint8_t {
    kFirst,  ///< When they have not been since open.
    kAlways,
};

class SegmentSet {
  public:
    SegmentSet(io::FileSystem& files, std::string directory, const StoreId& store_id,
               size_t mapped_footers = kMaxMappedFooters);
    ~SegmentSet();

    /// What add() and add_in_memory() know of a segment from the start. Before any of them.
    void set_dead_map(DeadMap map) { dead_map_ = std::move(map); }
    /// What that says of a segment, known or not.
    std::vector<PageRun> known_dead_runs(uint32_t number) const;

    /// Null when there is no such segment. Never blocks.
    Segment* find(uint32_t number) const;
    /// Makes a segment known whose file exists; its entries are loaded when needed.
    Segment& add(uint32_t number);
    /// All known segments whose files are not gone, ascending.
    std::vector<Segment*> all() const;
    size_t count() const;

    /// Makes a segment known whose entries the caller appends (or knows).
    Segment& add_in_memory(uint32_t number, std::shared_ptr<io::File> file,
                           std::vector<Entry> entries);
    void append_entries(Segment& segment, std::span<const Entry> entries);
    /// Adds an entry that a salvage found, where it belongs among the others.
    Result<void> insert_entry(Segment& segment, const Entry& entry);
    /// From now on these are the segment's entries, whatever its footer says. For salvage, before
    /// anybody has marked any of them.
    void set_entries(Segment& segment, std::vector<Entry> entries);
    /// A copy of all entries in memory, for writing a footer.
    std::vector<Entry> entries_in_memory(const Segment& segment) const;
    /// Forgets the entries in memory and maps the footer instead. False when there is no valid
    /// footer that starts at `footer_page`; the entries stay in memory then.
    bool use_footer(Segment& segment, uint32_t footer_page);

    /// The file, opened for reading when it is not open yet.
    Result<std::shared_ptr<io::File>> file(Segment& segment);
    bool has_open_file(Segment& segment) const;
    std::string path(uint32_t number) const;

    /// The live entry of `id` that starts at `page` (packs themselves excluded); nullopt: none.
    Result<std::optional<LocatedEntry>> entry_at(Segment& segment, uint32_t page,
                                                 const ChunkId& id);
    struct Sought {
        uint32_t page = 0;
        const ChunkId* id = nullptr;
    };
    /// The same for several of one segment; `found` has a place for each. Best with ascending
    /// pages.
    Result<void> entries_at(Segment& segment, std::span<const Sought> sought,
                            std::span<std::optional<LocatedEntry>> found);
    /// Calls `visit` for the segment's entries, the dead ones too (none when its file is gone).
    /// They are valid during the call only, which must not call back into this segment.
    Result<void> visit_entries(Segment& segment,
                               const std::function<void(std::span<const Entry>)>& visit);
    /// The same for a copy of those that are alive, packs with live members included.
    Result<void> visit_live(Segment& segment,
                            const std::function<void(std::span<const Entry>)>& visit);
    /// Calls `visit(ordinal, entry, is_dead)` for those from `first` on, until it returns false.
    Result<void> visit_each(
        Segment& segment, uint32_t first,
        const std::function<bool(uint32_t ordinal, const Entry& entry, bool is_dead)>& visit);

    // Death and damage. What is dead stays dead.

    /// From now on nothing finds these entries, and pages of these runs are not read.
    void set_dead(Segment& segment, std::span<const Entry> entries, std::span<const PageRun> runs);
    /// What the dead map says of the segment.
    DeadSegment dead_parts(Segment& segment);
    /// Its file is unlinked: forgets descriptor, mapping and entries.
    void set_gone(Segment& segment);
    /// Remembers that the entry failed its check, and has its pages checked again when read.
    void add_damaged(Segment& segment, const Entry& entry);
    /// The damaged entries that touch these pages.
    Result<std::vector<Entry>> damaged_entries(Segment& segment, uint32_t page, uint32_t pages);
    uint64_t damaged_count() const;
    /// Changes with each new damaged entry.
    uint64_t damage_version() const { return damage_version_.load(std::memory_order_acquire); }
    /// Entries of this segment may be missing, for this reason.
    void add_metadata_damage(Segment& segment, std::string sentence);
    /// Why entries of this segment may be missing; empty when none are known to be.
    std::string metadata_damage(Segment& segment);

    /// Fills `into` with whole pages from `page` on, all belonging to page-addressable entries.
    /// No byte of a chunk is served before the chunk was checked.
    Result<void> read_pages(Segment& segment, uint32_t page, std::span<const iovec> into,
                            ReadCheck check, IoMode mode);
    /// Reads and checks one entry's content, and the aux bytes of a pack member.
    Result<void> read_object(Segment& segment, const Entry& entry, std::vector<std::byte>& content,
                             std::vector<std::byte>& aux);

    /// Sentences about damaged headers and footers that were worked around.
    std::vector<std::string> take_warnings();
    /// How many segments were numbered anew since open; see Segment::renumbered.
    uint64_t renumberings() const { return renumberings_.load(std::memory_order_seq_cst); }
    uint64_t chunks_verified() const { return chunks_verified_.load(std::memory_order_relaxed); }

  private:
    static constexpr size_t kBlockSegments = 4096;
    static constexpr size_t kBlocks = (size_t{PageAddress::kMaxSegment} + 1) / kBlockSegments + 1;
    struct Block {
        std::array<std::atomic<Segment*>, kBlockSegments> segments{};
    };

    /// Loads the segment's entries; `lock` is held exclusively on its mutex.
    Result<void> load_entries(Segment& segment, std::unique_lock<std::shared_mutex>& lock);
    Result<void> map_footer(Segment& segment, io::File& file);
    Result<std::shared_ptr<io::File>> open_locked(Segment& segment);
    template <typename Visit>
    Result<void> with_entries(Segment& segment, Visit&& visit);
    Result<void> read_checked(Segment& segment, uint32_t page, std::span<const iovec> into,
                              IoMode mode);
    void note_file_opened(Segment& segment);
    void note_footer_mapped(Segment& segment);
    void warn(std::string sentence);
    void take_dead_parts(Segment& segment);
    static std::vector<PageRun> dead_runs(const Segment& segment);
    std::unexpected<Error> stale(const Segment& segment, uint32_t page) const;

    io::FileSystem& files_;
    const std::string directory_;
    const StoreId store_id_;
    const size_t most_mapped_footers_;
    std::unique_ptr<std::array<std::atomic<Block*>, kBlocks>> blocks_;
    mutable std::mutex list_mutex_;  ///< Guards adding, and list_.
    std::vector<std::unique_ptr<Segment>> list_;
    std::mutex cache_mutex_;  ///< Guards the two queues. Taken without any segment's lock held.
    std::deque<Segment*> open_files_;
    std::deque<Segment*> mapped_footers_;
    std::mutex warnings_mutex_;
    std::vector<std::string> warnings_;
    std::atomic<uint64_t> chunks_verified_ = 0;
    std::atomic<uint64_t> damage_version_ = 0;
    std::atomic<uint64_t> renumberings_ = 0;
    DeadMap dead_map_;
};

}  // namespace stellarium::nebula
