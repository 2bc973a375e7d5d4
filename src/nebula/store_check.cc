// Checking the structure of a store that may be damaged.
//
// Every segment is read batch by batch, whatever its footer says, and both are compared; then the
// index with the entries, both ways. A stretch that holds neither a valid batch nor the footer, and
// that the dead map does not name, is a gap. Chunks and packs may lie in it unharmed: the header
// that named them is gone, but who looks for one knows its id, and a pack lists its members. So
// whatever could begin in a page of a gap is hashed, once, when something is looked for in vain.
#include <algorithm>
#include <cstring>
#include <utility>

#include "nebula/dead_map.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

/// Read between two looks at the caller's wish to stop.
constexpr uint64_t kDataStepBytes = uint64_t{8} << 20;
/// Pages of gaps that are searched: 256 MiB, which take some seconds and as much memory. What lies
/// in further ones is not found.
constexpr uint64_t kMaxSearchedPages = 65536;

uint64_t page_offset(uint32_t page) {
    return uint64_t{page} * kPageBytes;
}

bool before(const Entry& a, const Entry& b) {
    return std::pair(place_of(a), a.id) < std::pair(place_of(b), b.id);
}

bool cancelled(const CheckOptions& options) {
    return options.cancelled && options.cancelled();
}

std::unexpected<Error> cancelled_error() {
    return fail(ErrorCode::kCancelled, "the check was cancelled");
}

std::string plural(uint64_t count, std::string_view what) {
    return fmt::format("{} {}{}", count, what, count == 1 ? "" : "s");
}

std::string entries_text(uint64_t count) {
    return count == 1 ? std::string("1 entry") : fmt::format("{} entries", count);
}

}  // namespace

std::string_view to_string(Finding::Kind kind) {
    switch (kind) {
        case Finding::Kind::kSuperblock:
            return "superblock";
        case Finding::Kind::kDeadMap:
            return "dead-map";
        case Finding::Kind::kLog:
            return "log";
        case Finding::Kind::kSegmentHeader:
            return "segment-header";
        case Finding::Kind::kBatch:
            return "batch";
        case Finding::Kind::kFooter:
            return "footer";
        case Finding::Kind::kIndex:
            return "index";
        case Finding::Kind::kChunk:
            return "chunk";
        case Finding::Kind::kObject:
            return "object";
        case Finding::Kind::kVolume:
            return "volume";
    }
    return "?";
}

Result<std::unique_ptr<SalvagedStore>> SalvagedStore::open(const io::Env& env,
                                                           const std::string& directory,
                                                           const StoreOptions& options,
                                                           Salvage salvage) {
    STELLARIUM_TRY(check_options(options));
    auto store = std::make_unique<StoreImpl>(env, directory, options, salvage);
    STELLARIUM_TRY(store->open());
    return store;
}

// ---- Segments ---------------------------------------------------------------------------------

Result<StoreImpl::SegmentScan> StoreImpl::scan_segment(Segment& segment) {
    SegmentScan scan;
    const uint32_t number = segment.number();
    STELLARIUM_ASSIGN(const auto file, segments_->file(segment));
    STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
    scan.file_pages = std::min(pages_for(size), kSegmentPages);
    scan.end_of_file = scan.file_pages;
    const std::vector<PageRun> dead = segments_->dead_parts(segment).runs;

    std::vector<std::byte> page(kPageBytes);
    auto header = io::read_exact(*file, page, 0);
    if (header) {
        const auto decoded = decode_segment_header(page, store_id_, number);
        header = decoded ? Result<void>() : std::unexpected(decoded.error());
    }
    if (!header && header.error().code() != ErrorCode::kCorrupt) {
        return std::unexpected(header.error());
    }
    std::optional<SegmentHeader> other;
    if (!header) {
        scan.header_problem = header.error().message();
        const auto claimed = load<SegmentHeader>(page);
        if (const auto decoded = decode_segment_header(page, claimed.store_id, claimed.segment)) {
            other = *decoded;
        }
    }

    // The footer is found from the file's end. There is none where the log goes on.
    const bool may_have_footer =
        number != log_end_segment_ && size % kPageBytes == 0 && scan.file_pages >= 2;
    if (may_have_footer) {
        STELLARIUM_TRY(io::read_exact(*file, page, size - kPageBytes));
        const auto trailer = decode_footer_trailer(page, store_id_, number, scan.file_pages);
        if (trailer) {
            std::vector<std::byte> bytes(size - page_offset(trailer->footer_page));
            STELLARIUM_TRY(io::read_exact(*file, bytes, page_offset(trailer->footer_page)));
            const auto footer = decode_footer(bytes, store_id_, number, scan.file_pages);
            if (footer) {
                scan.has_footer = true;
                scan.footer_entries.assign(footer->entries.begin(), footer->entries.end());
                scan.end_of_file = trailer->footer_page;
            } else {
                // Where it began is not sure then: everything may be a batch.
                scan.footer_problem = footer.error().message();
            }
        }
    }

    // What lies behind the end of the log was never acknowledged.
    uint32_t end = scan.end_of_file;
    if (number == log_end_segment_ && !missing_before_.contains(RecoveredLog::kNoBatch)) {
        end = std::min(end, log_end_page_);
    }
    std::optional<ScannedBatch> previous;
    for (uint32_t at = 1; at < end;) {
        if (const uint32_t alive = skip_dead(dead, at); alive != at) {
            at = alive;
            previous.reset();
            scan.ends_whole = false;
            continue;
        }
        auto batch = read_batch(*file, store_id_, number, at, DataCheck::kNone, dead);
        if (!batch && batch.error().code() != ErrorCode::kCorrupt) {
            return std::unexpected(batch.error());
        }
        if (!batch) {
            STELLARIUM_ASSIGN(const auto next, find_batch(*file, store_id_, number, at + 1));
            const uint32_t gap_end = next ? std::min(*next, end) : end;
            // The dead parts of it are known.
            for (uint32_t from = skip_dead(dead, at); from < gap_end;) {
                uint32_t to = from + 1;
                while (to < gap_end && skip_dead(dead, to) == to) {
                    ++to;
                }
                scan.gaps.push_back(
                    {.run = {.page = from, .pages = to - from}, .why = batch.error().message()});
                from = skip_dead(dead, to);
            }
            at = gap_end;
            previous.reset();
            scan.ends_whole = false;
            continue;
        }
        if (previous && batch->previous_sequence != previous->sequence) {
            scan.problems.push_back(fmt::format(
                "{} at offset {}: batch {} follows batch {} by its header, and batch {} "
                "by its place",
                file->path(), page_offset(at), batch->sequence, batch->previous_sequence,
                previous->sequence));
        }
        if (batch->durable_through >= batch->sequence) {
            scan.problems.push_back(fmt::format(
                "{} at offset {}: batch {} says that batch {} was durable before it was written",
                file->path(), page_offset(at), batch->sequence, batch->durable_through));
        }
        if (scan.first_sequence == 0) {
            scan.first_sequence = batch->sequence;
            scan.first_predecessor = batch->previous_sequence;
            scan.starts_at_first_page = at == 1;
        }
        scan.last_sequence = batch->sequence;
        scan.end_page = batch->end_page;
        scan.ends_whole = true;
        ++scan.batches;
        scan.entries.insert(scan.entries.end(), batch->entries.begin(), batch->entries.end());
        for (const Entry& entry : batch->entries) {
            if (entry.entry_kind() == EntryKind::kPack &&
                std::ranges::find(batch->damaged_packs, entry.page.get()) !=
                    batch->damaged_packs.end()) {
                scan.damaged_packs.push_back({.page = entry.page, .pages = entry.pages()});
            }
        }
        at = batch->end_page;
        previous = std::move(*batch);
    }
    scan.is_foreign = other && scan.batches == 0;
    // Before the checkpoint a footer was synced; behind it a crash may have torn it, and cut the
    // file anywhere.
    const bool before_checkpoint = number < superblock_.log_segment;
    if (!scan.has_footer && number != log_end_segment_ && !scan.gaps.empty() &&
        scan.gaps.back().run.end() == scan.end_of_file && (may_have_footer || !before_checkpoint)) {
        scan.gaps.back().quiet = true;
        if (scan.footer_problem.empty() && before_checkpoint) {
            scan.footer_problem = "neither a batch nor a footer";
        }
    }
    return scan;
}

bool StoreImpl::ends_early(uint32_t number, const SegmentScan& scan, uint32_t next_number,
                           const SegmentScan& next) const {
    return number + 1 == next_number && next.starts_at_first_page && scan.ends_whole &&
           scan.batches > 0 && next.first_predecessor > scan.last_sequence;
}

StoreImpl::FooterDifference StoreImpl::compare_footer(Segment& segment, const SegmentScan& scan) {
    FooterDifference out;
    if (!scan.has_footer) {
        return out;
    }
    const auto lies_in = [](const Entry& entry, const PageRun& run) {
        return entry.page.get() >= run.page && entry.page.get() < run.end();
    };
    const auto is_member_of = [&lies_in](const Entry& entry, const PageRun& pack) {
        return entry.entry_kind() == EntryKind::kMember && lies_in(entry, pack);
    };
    // Where the footer knows members of a pack that does not match its id, the pack's own table is
    // not asked.
    std::vector<PageRun> better_in_footer;
    std::ranges::copy_if(
        scan.damaged_packs, std::back_inserter(better_in_footer), [&](const PageRun& pack) {
            return std::ranges::any_of(
                scan.footer_entries, [&](const Entry& entry) { return is_member_of(entry, pack); });
        });
    const auto footer_knows_better = [&](const Entry& entry) {
        return std::ranges::any_of(better_in_footer,
                                   [&](const PageRun& pack) { return is_member_of(entry, pack); });
    };
    std::ranges::copy_if(scan.entries, std::back_inserter(out.entries),
                         [&](const Entry& entry) { return !footer_knows_better(entry); });
    std::ranges::copy_if(
        scan.footer_entries, std::back_inserter(out.entries), [&](const Entry& entry) {
            return footer_knows_better(entry) ||
                   std::ranges::any_of(scan.gaps,
                                       [&](const Gap& gap) { return lies_in(entry, gap.run); });
        });
    std::ranges::sort(out.entries, before);
    // A footer that was written after they died (by a repair) does not name them; batches do.
    const std::vector<EntryPlace> dead_members = segments_->dead_parts(segment).members;
    const auto live = [&](const std::vector<Entry>& all) {
        std::vector<Entry> some;
        std::ranges::copy_if(all, std::back_inserter(some), [&](const Entry& entry) {
            const bool dead_member = entry.entry_kind() == EntryKind::kMember &&
                                     std::ranges::binary_search(dead_members, place_of(entry));
            return !segment.any_dead(entry.page, 1) && !dead_member;
        });
        std::ranges::sort(some, before);
        return some;
    };
    std::ranges::set_symmetric_difference(live(out.entries), live(scan.footer_entries),
                                          std::back_inserter(out.different), before);
    return out;
}

Result<void> StoreImpl::report_footer(Segment& segment, const SegmentScan& scan,
                                      const std::function<void(Finding)>& report) {
    FooterDifference difference = compare_footer(segment, scan);
    if (difference.different.empty()) {
        // Recovery has read the batches, and not the footer, which may know better.
        const std::vector<Entry> present = segments_->entries_in_memory(segment);
        const auto is_same = [](const Entry& a, const Entry& b) {
            return place_of(a) == place_of(b) && a.id == b.id;
        };
        if (present.empty() || std::ranges::equal(present, difference.entries, is_same)) {
            return {};
        }
        return take_entries(segment, std::move(difference.entries));
    }
    const Entry& first = difference.different.front();
    report({.kind = Finding::Kind::kFooter,
            .repairable = true,
            .what = fmt::format("the footer and the batches of a segment differ in {}",
                                entries_text(difference.different.size())),
            .file = segments_->path(segment.number()),
            .offset = first.offset_bytes(),
            .id = first.id,
            .consequence = "chunks may not be found",
            .advice = "--repair writes it anew"});
    return take_entries(segment, std::move(difference.entries));
}

/// What follows finds them, and a repair writes them.
Result<void> StoreImpl::take_entries(Segment& segment, std::vector<Entry> entries) {
    std::vector<Entry> live;
    segments_->set_entries(segment, std::move(entries));
    STELLARIUM_TRY(segments_->visit_live(
        segment, [&live](std::span<const Entry> all) { live.assign(all.begin(), all.end()); }));
    return with_index([&] { return insert_entries(segment.number(), live, nullptr); });
}

Result<void> StoreImpl::report_scan(Segment& segment, const SegmentScan& scan, CheckCounts& counts,
                                    const std::function<void(Finding)>& report) {
    const std::string path = segments_->path(segment.number());
    ++counts.segments;
    counts.batches += scan.batches;
    counts.entries += scan.entries.size();
    if (scan.is_foreign) {
        report(
            {.kind = Finding::Kind::kSegmentHeader,
             .repairable = true,
             .what = "the file is no segment of this store, or another one: " + scan.header_problem,
             .file = path,
             .offset = 0,
             .consequence = "what was in the right file is lost",
             .advice = "put the right file in its place; --repair moves this one aside"});
        return {};
    }
    if (!scan.header_problem.empty()) {
        // Emptied, or cut off within its first page.
        const bool nothing_left = scan.batches == 0 && !scan.has_footer && scan.file_pages < 2;
        report({.kind = Finding::Kind::kSegmentHeader,
                .repairable = true,
                .what = "the header of a segment is damaged: " + scan.header_problem,
                .file = path,
                .offset = 0,
                .consequence = nothing_left ? "all that was in the file is lost"
                                            : "none: all that it says is known",
                .advice = nothing_left ? "restore the file from a backup if there is one; --repair "
                                         "gives it up"
                                       : "--repair writes it anew"});
    }
    for (const std::string& problem : scan.problems) {
        report({.kind = Finding::Kind::kBatch,
                .what = problem,
                .file = path,
                .consequence = "batches may have been lost between them",
                .advice = "restore the file from a backup if there is one"});
    }
    for (const Gap& gap : scan.gaps) {
        uint64_t known = 0;
        for (const Entry& entry : scan.footer_entries) {
            known += entry.page.get() >= gap.run.page && entry.page.get() < gap.run.end() ? 1 : 0;
        }
        if (dead_map_lost_ || gap.quiet) {
            continue;  // Without the map it may well have been freed.
        }
        report(
            {.kind = Finding::Kind::kBatch,
             .repairable = true,
             .what =
                 fmt::format("no valid batch in {}: {}", plural(gap.run.pages, "page"), gap.why),
             .file = path,
             .offset = page_offset(gap.run.page),
             .consequence = scan.has_footer
                                ? fmt::format("none yet: the footer still leads to {} in it",
                                              entries_text(known))
                                : std::string("what lies there is found only by searching for it"),
             .advice = "--repair stores what can be read of it again, and gives up the rest"});
    }
    if (!scan.footer_problem.empty()) {
        report({.kind = Finding::Kind::kFooter,
                .harmless = segment.number() >= superblock_.log_segment,
                .repairable = true,
                .what = "the footer of a segment is damaged: " + scan.footer_problem,
                .file = path,
                .offset =
                    page_offset(scan.gaps.empty() ? scan.end_of_file : scan.gaps.back().run.page),
                .consequence = "opening the segment takes longer; nothing is lost",
                .advice = "--repair writes it anew"});
    }
    if (scan.has_footer) {
        STELLARIUM_TRY(report_footer(segment, scan, report));
    }
    uint64_t beyond = 0;
    std::optional<Entry> first_beyond;
    for (const Entry& entry : scan.entries) {
        if (entry.page.get() + entry.pages() > scan.file_pages &&
            entry.entry_kind() != EntryKind::kPack && !segment.any_dead(entry.page, 1)) {
            segments_->add_damaged(segment, entry);
            first_beyond = first_beyond ? first_beyond : entry;
            ++beyond;
        }
    }
    if (first_beyond) {
        report({.kind = Finding::Kind::kChunk,
                .repairable = true,
                .what = fmt::format("the file ends before {} of it", entries_text(beyond)),
                .file = path,
                .offset = first_beyond->offset_bytes(),
                .id = first_beyond->id,
                .consequence = "they cannot be read",
                .advice = "restore the file from a backup if there is one"});
    }
    return {};
}

bool StoreImpl::is_behind_log(uint32_t number) const {
    if (missing_before_.contains(RecoveredLog::kNoBatch)) {
        return false;
    }
    return log_end_segment_ == 0 ? number >= superblock_.log_segment : number > log_end_segment_;
}

/// Recovery has checked what lies behind the checkpoint. Which entries it found damaged it says in
/// words only.
Result<void> StoreImpl::check_new_entries(Segment& segment,
                                          const std::function<void(Finding)>& report) {
    if (segment.number() < superblock_.log_segment) {
        return {};
    }
    const uint32_t first =
        segment.number() == superblock_.log_segment ? superblock_.log_page.get() : 1;
    std::vector<Entry> unverified;
    STELLARIUM_TRY(segments_->visit_live(segment, [&](std::span<const Entry> entries) {
        for (const Entry& entry : entries) {
            if (entry.page.get() >= first && entry.entry_kind() != EntryKind::kPack &&
                !segment.is_verified(entry.page, entry.pages())) {
                unverified.push_back(entry);
            }
        }
    }));
    std::vector<std::byte> content;
    std::vector<std::byte> aux;
    for (const Entry& entry : unverified) {
        const auto read = segments_->read_object(segment, entry, content, aux);
        if (read) {
            continue;
        }
        if (read.error().code() != ErrorCode::kCorrupt) {
            return read;
        }
        segments_->add_damaged(segment, entry);
        report({.kind = Finding::Kind::kChunk,
                .repairable = true,
                .what = read.error().message(),
                .file = segments_->path(segment.number()),
                .offset = entry.offset_bytes(),
                .id = entry.id});
    }
    return {};
}

// ---- Index ------------------------------------------------------------------------------------

Result<void> StoreImpl::check_index(const std::function<void(Finding)>& report) {
    const std::string path = join_path(directory_, index_file_name(superblock_.index_generation));
    if (const auto whole = index_->verify(); !whole) {
        if (whole.error().code() != ErrorCode::kCorrupt) {
            return whole;
        }
        report({.kind = Finding::Kind::kIndex,
                .repairable = true,
                .what = "a part of the index is damaged: " + whole.error().message(),
                .file = path,
                .consequence = "opening the store takes longer; nothing is lost",
                .advice = "--repair writes it anew"});
        return repair_index();
    }
    if (index_bytes_written_ == 0) {
        return {};  // There is none, or it was refused as a whole.
    }
    // Every live entry is found...
    uint64_t missing = 0;
    std::optional<Finding> first;
    std::vector<PageAddress> candidates;
    std::map<uint32_t, std::vector<bool>> starts;
    for (Segment* segment : segments_->all()) {
        if (segment->number() >= superblock_.index_segment) {
            continue;
        }
        std::vector<bool>& pages = starts[segment->number()];
        pages.resize(kSegmentPages);
        Result<void> looked;
        std::vector<Entry> lost;
        STELLARIUM_TRY(segments_->visit_entries(*segment, [&](std::span<const Entry> entries) {
            for (const Entry& entry : entries) {
                pages[entry.page.get()] = true;
            }
        }));
        STELLARIUM_TRY(segments_->visit_live(*segment, [&](std::span<const Entry> entries) {
            for (const Entry& entry : entries) {
                if (entry.entry_kind() == EntryKind::kPack) {
                    continue;
                }
                candidates.clear();
                looked = index_->candidates(entry.id, candidates);
                if (!looked) {
                    return;
                }
                const auto address = PageAddress::make(segment->number(), entry.page.get());
                if (std::ranges::find(candidates, address) == candidates.end()) {
                    lost.push_back(entry);
                }
            }
        }));
        STELLARIUM_TRY(std::move(looked));
        missing += lost.size();
        if (!lost.empty() && !first) {
            first = Finding{.kind = Finding::Kind::kIndex,
                            .repairable = true,
                            .what = {},
                            .file = path,
                            .id = lost.front().id,
                            .consequence = "reading them takes a search; nothing is lost",
                            .advice = "--repair writes it anew"};
        }
        STELLARIUM_TRY(insert_entries(segment->number(), lost, nullptr));
    }
    if (first) {
        first->what = fmt::format("the index lacks {}", entries_text(missing));
        report(*std::move(first));
    }
    // ... and no pair leads to where nothing begins. Segments that are gone were freed.
    uint64_t nowhere = 0;
    PageAddress first_nowhere;
    STELLARIUM_TRY(index_->for_each([&](PageAddress address) {
        const auto found = starts.find(address.segment());
        if (found == starts.end() || found->second[address.page()]) {
            return;
        }
        Segment* segment = segments_->find(address.segment());
        if (segment == nullptr || segment->any_dead(address.page(), 1)) {
            return;
        }
        const auto gaps = gaps_.find(address.segment());
        if (gaps != gaps_.end() && skip_dead(gaps->second, address.page()) != address.page()) {
            return;
        }
        first_nowhere = nowhere == 0 ? address : first_nowhere;
        ++nowhere;
    }));
    if (nowhere > 0) {
        report({.kind = Finding::Kind::kIndex,
                .repairable = true,
                .what = fmt::format("{} of the index lead{} to where nothing begins, the first to "
                                    "{} at offset {}",
                                    entries_text(nowhere), nowhere == 1 ? "s" : "",
                                    segments_->path(first_nowhere.segment()),
                                    first_nowhere.offset_bytes()),
                .file = path,
                .consequence = "none: whatever is found is compared with the id asked for",
                .advice = "--repair writes it anew"});
    }
    return {};
}

// ---- The whole --------------------------------------------------------------------------------

Result<void> StoreImpl::check_data(const CheckOptions& options, CheckCounts& counts,
                                   const std::function<void(Finding)>& report) {
    std::map<std::pair<PageAddress, ChunkId>, bool> known;
    for (Segment* segment : segments_->all()) {
        STELLARIUM_ASSIGN(const auto entries,
                          segments_->damaged_entries(*segment, 0, kSegmentPages));
        for (const Entry& entry : entries) {
            known[{PageAddress::make(segment->number(), entry.page.get()), entry.id}] = true;
        }
    }
    const uint64_t total = segments_->all().size();
    PageAddress from;
    do {
        if (cancelled(options)) {
            return cancelled_error();
        }
        if (options.progress) {
            const auto segments = segments_->all();
            const auto at =
                std::ranges::lower_bound(segments, from.segment(), {}, &Segment::number);
            options.progress({.done = static_cast<uint64_t>(at - segments.begin()),
                              .total = total,
                              .data = true});
        }
        STELLARIUM_ASSIGN(const ScrubStep step,
                          scrub(from, kDataStepBytes, [&](const DamagedChunk& chunk) {
                              const bool is_known = known.contains({chunk.address, chunk.id});
                              report({.kind = Finding::Kind::kChunk,
                                      .harmless = is_known,
                                      .repairable = !is_known,
                                      .what = chunk.reason,
                                      .file = segments_->path(chunk.address.segment()),
                                      .offset = chunk.address.offset_bytes(),
                                      .id = chunk.id});
                          }));
        counts.data_bytes += step.bytes;
        from = step.next;
    } while (from);
    return {};
}

Result<CheckCounts> StoreImpl::check(const CheckOptions& options,
                                     const std::function<void(Finding)>& report) {
    CheckCounts counts;
    for (Finding& finding : open_findings_) {
        report(std::move(finding));
    }
    open_findings_.clear();
    const std::vector<Segment*> segments = segments_->all();
    std::optional<SegmentScan> previous;
    uint32_t previous_number = 0;
    uint64_t foreign = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        if (cancelled(options)) {
            return cancelled_error();
        }
        if (options.progress) {
            options.progress({.done = i, .total = segments.size()});
        }
        Segment& segment = *segments[i];
        if (segment.is_gone() || is_behind_log(segment.number())) {
            continue;
        }
        auto looked = scan_segment(segment);
        if (!looked && looked.error().code() == ErrorCode::kIo) {
            report({.kind = Finding::Kind::kBatch,
                    .what = "a segment cannot be read: " + looked.error().message(),
                    .file = segments_->path(segment.number()),
                    .consequence = "what lies there cannot be read",
                    .advice = "copy what can be read of it to a good disk, and check again"});
            continue;
        }
        STELLARIUM_ASSIGN(SegmentScan scan, std::move(looked));
        STELLARIUM_TRY(report_scan(segment, scan, counts, report));
        foreign += scan.is_foreign ? 1 : 0;
        // Behind the checkpoint that is for recovery to say.
        if (previous && segment.number() <= superblock_.log_segment &&
            ends_early(previous_number, *previous, segment.number(), scan)) {
            report(
                {.kind = Finding::Kind::kBatch,
                 .repairable = true,
                 .what = fmt::format("the file ends after batch {}, and the next one begins with "
                                     "the one after batch {}",
                                     previous->last_sequence, scan.first_predecessor),
                 .file = segments_->path(previous_number),
                 .offset = page_offset(previous->end_page),
                 .consequence = "what the batches between them held is lost",
                 .advice = "restore the file from a backup if there is one"});
        }
        for (const Gap& gap : scan.gaps) {
            if (!scan.is_foreign) {
                gaps_[segment.number()].push_back(gap.run);
            }
        }
        STELLARIUM_TRY(check_new_entries(segment, report));
        previous = std::move(scan);
        previous_number = segment.number();
    }
    if (foreign > 0 && counts.batches == 0) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("{} is that of another store: none of the segments is of store {}",
                                join_path(directory_, kSuperblockName), to_hex(store_id_)));
    }
    if (counts.batches == 0 && superblock_.durable_sequence > 0 && superblock_.payload_bytes == 0) {
        // A repair would make an empty store of it, and of what is put back later a heap of chunks.
        return fail(
            ErrorCode::kCorrupt,
            fmt::format("nothing is left in {} of {} batches that were durable, and there "
                        "is no checkpoint: put the segments back, or restore the store "
                        "from a backup",
                        join_path(directory_, kSegmentsName), superblock_.durable_sequence.get()));
    }
    STELLARIUM_TRY(check_index(report));
    if (options.data || dead_map_lost_) {
        // Without the dead map what does not match its id was freed, or is damaged: nobody knows.
        const auto none = [](const Finding&) {};
        STELLARIUM_TRY(dead_map_lost_ ? check_data(options, counts, none)
                                      : check_data(options, counts, report));
    }
    for (const std::string& sentence : warnings()) {
        if (sentence.find("never acknowledged") != std::string::npos) {
            report({.kind = Finding::Kind::kLog,
                    .harmless = true,
                    .what = sentence,
                    .file = join_path(directory_, kSegmentsName),
                    .consequence = "none: that is what a crash leaves",
                    .advice = "opening the store for writing cuts it off"});
        }
    }
    return counts;
}

// ---- Gaps -------------------------------------------------------------------------------------

Result<std::optional<StoreImpl::Found>> StoreImpl::find_in_gaps(const ChunkId& id) {
    if (!gaps_searched_) {
        STELLARIUM_TRY(search_gaps());
    }
    const auto found = gap_contents_.find(id);
    if (found == gap_contents_.end()) {
        return std::nullopt;
    }
    const GapContent content = found->second;
    gap_contents_.erase(found);
    STELLARIUM_TRY(segments_->insert_entry(*content.segment, content.entry));
    STELLARIUM_TRY(with_index(
        [&] { return insert_entries(content.segment->number(), {&content.entry, 1}, nullptr); }));
    return probe(id, Want::kAny);
}

Result<void> StoreImpl::search_gaps() {
    gaps_searched_ = true;
    uint64_t pages = 0;
    for (const auto& [number, runs] : gaps_) {
        Segment* segment = segments_->find(number);
        for (const PageRun& run : runs) {
            pages += run.pages;
            if (pages > kMaxSearchedPages) {
                return {};
            }
            if (auto searched = search_gap(*segment, run);
                !searched && searched.error().code() != ErrorCode::kIo) {
                return searched;
            }
        }
    }
    return {};
}

Result<void> StoreImpl::search_gap(Segment& segment, const PageRun& run) {
    STELLARIUM_ASSIGN(const auto file, segments_->file(segment));
    STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
    const uint64_t start = page_offset(run.page);
    if (size <= start) {
        return {};
    }
    std::vector<std::byte> bytes(page_offset(run.pages));
    STELLARIUM_TRY(io::read_exact(
        *file, MutableBytes(bytes).first(std::min<uint64_t>(bytes.size(), size - start)), start));
    const auto add = [&](const Entry& entry) {
        gap_contents_.try_emplace(entry.id, GapContent{.segment = &segment, .entry = entry});
    };
    std::vector<Bytes> inputs;
    std::vector<Hash256> hashes;
    for (uint32_t at = 0; at < run.pages; ++at) {
        const Bytes rest = Bytes(bytes).subspan(page_offset(at));
        const uint32_t most = std::min(kMaxChunkPages, run.pages - at);
        const uint32_t page = run.page + at;
        // A pack lists its members.
        if (const auto head = load<PackHeader>(rest);
            head.magic == kPackMagic && head.bytes <= std::min(rest.size(), kMaxPackBytes)) {
            if (const auto pack = decode_pack(rest.first(head.bytes))) {
                std::vector<Entry> members;
                append_member_entries(*pack, page, members);
                std::ranges::for_each(members, add);
                at += pages_for(head.bytes) - 1;
                continue;
            }
        }
        // A chunk of so many pages, or an object with zeros behind it.
        inputs.clear();
        for (uint32_t pages = 1; pages <= most; ++pages) {
            const Bytes whole = rest.first(page_offset(pages));
            inputs.push_back(whole);
            size_t length = whole.size();
            while (length > page_offset(pages - 1) && whole[length - 1] == std::byte{0}) {
                --length;
            }
            inputs.push_back(whole.first(length));
        }
        hashes.resize(inputs.size());
        hash_many(inputs, hashes);
        for (size_t i = 0; i < inputs.size(); ++i) {
            const bool whole = i % 2 == 0;
            if (inputs[i].empty() || (!whole && inputs[i].size() == inputs[i - 1].size())) {
                continue;
            }
            Entry entry{};
            entry.id = hashes[i];
            entry.page = static_cast<uint16_t>(page);
            entry.length = static_cast<uint32_t>(inputs[i].size());
            entry.kind = static_cast<uint8_t>(whole ? EntryKind::kChunk : EntryKind::kObject);
            add(entry);
        }
    }
    return {};
}

}  // namespace stellarium::nebula
