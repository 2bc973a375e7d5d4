// Making a damaged store whole again, in an order in which a crash at any point costs nothing:
//
//   1. what can be read in gaps is appended to a new segment, as copies; nothing else is written
//   2. the copies and what the layer above appended are synced
//   3. the dead map, which names the gaps, and the index go to new files, synced
//   4. the superblock: one generation over the one that is not used, synced, then the other
//   5. headers and footers of segments, each in its place; a footer goes behind the file's end
//
// Before 4 the old superblock leads to the old state, with a few batches behind it that no record
// is in: another repair finds them and begins anew. After 4 the new one leads to the new state, and
// what is left to do is derived.
#include <algorithm>
#include <cstring>
#include <utility>

#include "nebula/dead_map.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

constexpr uint64_t kCopyBytes = uint64_t{4} << 20;

bool lies_in(const Entry& entry, const PageRun& run) {
    return entry.page.get() < run.end() && entry.page.get() + entry.pages() > run.page;
}

}  // namespace

Result<void> StoreImpl::evacuate(Segment& segment, const SegmentScan& scan, bool lost_end,
                                 RepairReport& report) {
    std::vector<PageRun> runs;
    runs.reserve(scan.gaps.size() + 1);
    for (const Gap& gap : scan.gaps) {
        runs.push_back(gap.run);
    }
    if (lost_end) {
        // A page in place of what was cut off: that something is missing here is known by now.
        runs.push_back({.page = std::max(scan.file_pages, scan.end_page), .pages = 1});
    }
    if (is_behind_log(segment.number())) {
        // Never acknowledged, and not to come back.
        runs = {{.page = 1, .pages = std::max(scan.file_pages, 2U) - 1}};
    } else if (segment.number() == log_end_segment_ && scan.file_pages > log_end_page_ &&
               !missing_before_.contains(RecoveredLog::kNoBatch)) {
        runs.push_back({.page = log_end_page_, .pages = scan.file_pages - log_end_page_});
    }
    std::vector<Entry> given_up;
    std::vector<Entry> readable;
    std::deque<std::vector<std::byte>> bytes;
    std::vector<Item> items;
    uint64_t item_bytes = 0;
    const auto write = [&]() -> Result<void> {
        STELLARIUM_TRY(append_copies(std::exchange(items, {})));
        bytes.clear();
        report.copied_bytes += std::exchange(item_bytes, 0);
        return {};
    };
    STELLARIUM_TRY(segments_->visit_live(segment, [&](std::span<const Entry> entries) {
        for (const Entry& entry : entries) {
            const bool in_gap = std::ranges::any_of(
                runs, [&entry](const PageRun& run) { return lies_in(entry, run); });
            if (in_gap) {
                given_up.push_back(entry);
            }
            if ((in_gap || dead_map_lost_) && entry.entry_kind() != EntryKind::kPack) {
                readable.push_back(entry);
            }
        }
    }));
    for (const Entry& entry : readable) {
        std::vector<std::byte>& content = bytes.emplace_back();
        std::vector<std::byte>& aux = bytes.emplace_back();
        const auto read = segments_->read_object(segment, entry, content, aux);
        if (!read && read.error().code() != ErrorCode::kCorrupt) {
            return read;
        }
        if (!read) {
            // Without a dead map: freed, as far as anybody can know.
            if (dead_map_lost_) {
                given_up.push_back(entry);
            }
            continue;
        }
        const bool in_gap =
            std::ranges::any_of(runs, [&entry](const PageRun& run) { return lies_in(entry, run); });
        if (!in_gap) {
            continue;
        }
        items.push_back(
            {.id = entry.id, .content = content, .aux = aux, .kind = entry.entry_kind()});
        ++report.copied;
        item_bytes += content.size();
        if (item_bytes >= kCopyBytes) {
            STELLARIUM_TRY(write());
        }
    }
    if (!items.empty()) {
        STELLARIUM_TRY(write());
    }
    if (!given_up.empty() || !runs.empty()) {
        condemn_epoch_.fetch_add(1);
        segments_->set_dead(segment, given_up, runs);
        for (const PageRun& run : runs) {
            report.dead_pages += run.pages;
        }
    }
    bool has_live = false;
    STELLARIUM_TRY(segments_->visit_live(
        segment, [&](std::span<const Entry> entries) { has_live = !entries.empty(); }));
    segment.reclaim.whole = !has_live;
    return {};
}

Result<void> StoreImpl::rebuild_index() {
    index_ = std::make_unique<ChunkIndex>();
    for (Segment* segment : segments_->all()) {
        if (segment->reclaim.whole) {
            continue;
        }
        Result<void> inserted;
        STELLARIUM_TRY(segments_->visit_live(*segment, [&](std::span<const Entry> entries) {
            inserted = insert_entries(segment->number(), entries, nullptr);
        }));
        STELLARIUM_TRY(std::move(inserted));
    }
    index_bytes_written_ = 0;
    return {};
}

/// What the superblock counted may have been lost with what it counted.
Result<void> StoreImpl::count_anew() {
    Counters counters;
    for (Segment* segment : segments_->all()) {
        if (segment->reclaim.whole) {
            continue;
        }
        STELLARIUM_TRY(segments_->visit_live(*segment, [&](std::span<const Entry> entries) {
            for (const Entry& entry : entries) {
                if (entry.entry_kind() != EntryKind::kPack) {
                    ++counters.chunks;
                    counters.unique_bytes += entry.length;
                }
            }
        }));
        STELLARIUM_ASSIGN(const uint32_t pages, file_pages(*segment));
        uint32_t dead_pages = 0;
        for (const PageRun& run : segments_->dead_parts(*segment).runs) {
            dead_pages += run.page < pages ? std::min(run.end(), pages) - run.page : 0;
        }
        counters.stored_bytes += uint64_t{pages - dead_pages} * kPageBytes;
    }
    const std::lock_guard guard(state_mutex_);
    counters.appended_bytes = counters_.appended_bytes;
    counters.duplicate_bytes = counters_.duplicate_bytes;
    counters_ = counters;
    return {};
}

Result<void> StoreImpl::publish_repair(Bytes payload) {
    const std::lock_guard guard(checkpoint_mutex_);
    STELLARIUM_TRY(check_writable());
    STELLARIUM_TRY(sync(sequence()));
    STELLARIUM_TRY(sync_footers());
    SuperblockSlot slot = superblock_;
    bool anything_dead = !whole_dead_files_.empty();
    for (Segment* segment : segments_->all()) {
        anything_dead =
            anything_dead || segment->reclaim.whole || !segments_->dead_parts(*segment).empty();
    }
    std::optional<DeadRecord> record;
    if (anything_dead) {
        STELLARIUM_ASSIGN(record, write_dead_map(slot));
        // Counted anew below.
        record->chunks = 0;
        record->unique_bytes = 0;
        record->stored_bytes = 0;
    } else {
        slot.dead_map_generation = 0;
        slot.dead_map_freed = 0;
    }
    slot.index_appended_bytes = 0;
    STELLARIUM_TRY(write_index(slot, /*all_is_recorded=*/true, 0));
    {
        const std::lock_guard state_guard(state_mutex_);
        batches_.clear();
    }
    fill_position(slot, sequence());
    slot.sequence = sequence();
    slot.payload = {};
    slot.payload_bytes = static_cast<uint32_t>(payload.size());
    if (!payload.empty()) {
        std::memcpy(slot.payload.data(), payload.data(), payload.size());
    }
    // Both generations, whatever publish() thinks necessary: each copy is to be whole.
    STELLARIUM_TRY(publish(slot, record ? &*record : nullptr));
    STELLARIUM_TRY(publish(slot));
    const std::lock_guard state_guard(state_mutex_);
    checkpoint_appended_bytes_ = slot.appended_bytes;
    return {};
}

Result<void> StoreImpl::rewrite_metadata(const Rewrite& rewrite, RepairReport& report) {
    Segment& segment = *rewrite.segment;
    const SegmentScan& scan = rewrite.scan;
    STELLARIUM_ASSIGN(const auto file,
                      files_.open(segments_->path(segment.number()), io::OpenMode::kReadWrite));
    if (rewrite.writes_header()) {
        const SegmentHeader fresh = make_segment_header(store_id_, segment.number(),
                                                        std::max<uint64_t>(scan.first_sequence, 1));
        STELLARIUM_TRY(io::write_all(*file, bytes_of(fresh), 0));
        ++report.headers;
    }
    if (rewrite.writes_footer()) {
        std::vector<Entry> entries;
        STELLARIUM_TRY(segments_->visit_live(segment, [&](std::span<const Entry> live) {
            entries.assign(live.begin(), live.end());
        }));
        // In place of the one that is there; or behind what was cut off, too: that is a hole then,
        // and matches no id.
        const uint32_t footer_page =
            rewrite.footer_differs
                ? scan.end_of_file
                : std::max(scan.file_pages, scan.end_page) + (rewrite.lost_end ? 1 : 0);
        const uint32_t end_page = footer_page + footer_pages(entries.size());
        if (end_page <= kSegmentPages) {
            const std::vector<std::byte> bytes =
                encode_footer(store_id_, segment.number(), footer_page, entries,
                              scan.first_sequence, scan.last_sequence);
            STELLARIUM_TRY(io::write_all(*file, Bytes(bytes), uint64_t{footer_page} * kPageBytes));
            STELLARIUM_TRY(file->truncate(uint64_t{end_page} * kPageBytes));
            ++report.footers;
        } else if (rewrite.footer_differs) {
            STELLARIUM_TRY(file->truncate(uint64_t{footer_page} * kPageBytes));
        }
    }
    if (auto synced = file->datasync(); !synced) {
        poison(synced.error(), "a sync of a segment");
        return synced;
    }
    return {};
}

Result<RepairReport> StoreImpl::repair(Bytes payload) {
    STELLARIUM_TRY(check_writable());
    if (superblock_file_ == nullptr) {
        // Empty until the first generation is written, it is as good as missing.
        STELLARIUM_ASSIGN(superblock_file_, files_.open(join_path(directory_, kSuperblockName),
                                                        io::OpenMode::kCreate));
        STELLARIUM_TRY(files_.sync_directory(directory_));
    }
    RepairReport report;
    std::vector<Rewrite> rewrites;
    const std::vector<Segment*> segments = segments_->all();
    std::optional<SegmentScan> next;
    for (size_t i = 0; i < segments.size() && segments[i]->number() <= last_found_segment_; ++i) {
        Segment* segment = segments[i];
        Rewrite rewrite{.segment = segment, .scan = {}};
        SegmentScan& scan = rewrite.scan;
        if (next) {
            scan = std::move(*next);
            next.reset();
        } else {
            STELLARIUM_ASSIGN(scan, scan_segment(*segment));
        }
        if (scan.is_foreign) {
            rewrites.push_back(std::move(rewrite));
            continue;
        }
        if (i + 1 < segments.size() && segments[i + 1]->number() <= last_found_segment_) {
            STELLARIUM_ASSIGN(next, scan_segment(*segments[i + 1]));
            rewrite.lost_end =
                ends_early(segment->number(), scan, segments[i + 1]->number(), *next);
        }
        rewrite.footer_differs = !compare_footer(*segment, scan).different.empty();
        STELLARIUM_TRY(evacuate(*segment, scan, rewrite.lost_end, report));
        if (!segment->reclaim.whole && (rewrite.writes_header() || rewrite.writes_footer())) {
            scan.entries.clear();
            scan.footer_entries.clear();
            rewrites.push_back(std::move(rewrite));
        }
    }
    STELLARIUM_TRY(rebuild_index());
    STELLARIUM_TRY(count_anew());
    STELLARIUM_TRY(publish_repair(payload));
    for (const Rewrite& rewrite : rewrites) {
        if (rewrite.scan.is_foreign) {
            const std::string path = segments_->path(rewrite.segment->number());
            STELLARIUM_TRY(files_.rename(path, path + ".foreign"));
            STELLARIUM_TRY(files_.sync_directory(join_path(directory_, kSegmentsName)));
            continue;
        }
        if (auto done = rewrite_metadata(rewrite, report);
            !done && done.error().code() != ErrorCode::kNoSpace) {
            return std::unexpected(std::move(done).error());
        }
    }
    return report;
}

}  // namespace stellarium::nebula
