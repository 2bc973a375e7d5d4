// Recovery of the log: which batches there are, where it ends, and whether that is a torn end or
// damage. The rules are those of docs/internals/crash-model.md, "Recovery", points 3 and 4.
//
// Nothing is changed on disk here: the result says what the store has to cut off.
//
// Thread rule: one call, before the segments are used by anybody else.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/io.h"
#include "nebula/format.h"
#include "nebula/segment.h"

namespace stellarium::nebula {

/// What the superblock keeps count of; see StoreStats.
struct Counters {
    uint64_t chunks = 0;
    uint64_t unique_bytes = 0;
    uint64_t stored_bytes = 0;
    uint64_t appended_bytes = 0;
    uint64_t duplicate_bytes = 0;

    /// Counts one batch of so many pages (its segment's header page included, when it is the
    /// first there). Entries of packs are not chunks.
    void add_batch(uint32_t pages, std::span<const Entry> entries, uint64_t batch_duplicate_bytes);
    /// Counts pages of headers and footers.
    void add_pages(uint32_t pages);
};

/// A batch of the log after the last checkpoint.
struct BatchPosition {
    uint64_t sequence = 0;
    uint32_t segment = 0;
    uint32_t page = 0;
    uint32_t records = 0;
    Counters before;  ///< The counters when this batch was about to be appended.
};

struct RecoveredLog {
    static constexpr uint64_t kNoBatch = UINT64_MAX;

    uint64_t last_sequence = 0;     ///< The log ends with this batch.
    uint64_t highest_sequence = 0;  ///< Of any valid header, also of those cut off.
    uint32_t last_segment = 0;      ///< Highest number of any segment file.
    uint32_t tail_segment = 0;      ///< Where the next batch goes; 0: a new segment.
    uint32_t tail_page = 0;
    uint64_t tail_first_sequence = 0;  ///< Of the tail segment's first batch; 0: none yet.
    std::shared_ptr<io::File> tail_file;
    std::deque<BatchPosition> batches;
    Counters counters;
    std::vector<std::string> damage;  ///< Proven corruption: the store must not be written.
    bool records_lost = false;        ///< By it, records that were durable are missing.
    /// With salvage: why records may be missing before the batch with this number; kNoBatch: after
    /// the last one.
    std::map<uint64_t, std::string> missing_before;
    std::vector<std::string> warnings;  ///< What was cut off, and why.
    std::string not_writable;  ///< Why a segment of the log may be read only; empty: none is.
    bool cut_tail = false;     ///< tail_segment has bytes behind tail_page.
    std::vector<uint32_t> drop_segments;  ///< Segment files behind the end of the log.
    /// Segments of the log whose header page is not valid (lost by a crash, or damaged); all that
    /// it says is known.
    struct HeaderNeeded {
        uint32_t segment = 0;
        uint64_t first_sequence = 0;
        std::shared_ptr<io::File> file;
    };
    std::vector<HeaderNeeded> headers_needed;
    /// Segments before the tail, after the checkpoint, that have no valid footer.
    struct FooterNeeded {
        uint32_t segment = 0;
        uint32_t end_page = 0;
        uint64_t first_sequence = 0;
        uint64_t last_sequence = 0;
        std::shared_ptr<io::File> file;
    };
    std::vector<FooterNeeded> footers_needed;
};

/// `numbers`: all segment files, ascending. Makes the segments from the checkpoint's position on
/// known to `segments`, with their entries in memory. With `may_write` their files are first
/// synced and dropped from the page cache, so that what is judged is what the disk holds (after a
/// failed sync of an earlier process the cache may be better than the disk). With `salvage` a
/// damaged log is followed behind what is damaged: to the next valid batch, however far that is, as
/// long as something proves that there was more. With `proof_lost` the superblock's durable number
/// is not known: what lies behind the end of the log counts as lost then, and not as torn.
Result<RecoveredLog> recover_log(io::FileSystem& files, SegmentSet& segments,
                                 const StoreId& store_id, const SuperblockSlot& superblock,
                                 const std::vector<uint32_t>& numbers, bool may_write, bool salvage,
                                 bool proof_lost);

}  // namespace stellarium::nebula
