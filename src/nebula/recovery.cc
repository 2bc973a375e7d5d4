#include "nebula/recovery.h"

#include <algorithm>
#include <optional>

#include <fmt/format.h>

namespace stellarium::nebula {
namespace {

/// A writer may be appending while we read: what looks like damage is looked at again.
constexpr int kReadOnlyLooks = 3;

class Recovery {
  public:
    Recovery(io::FileSystem& files, SegmentSet& segments, const StoreId& store_id,
             const SuperblockSlot& superblock, bool may_write, bool salvage, bool proof_lost)
        : files_(files),
          segments_(segments),
          store_id_(store_id),
          superblock_(superblock),
          may_write_(may_write),
          salvage_(salvage),
          proof_lost_(proof_lost) {}

    Result<RecoveredLog> run(const std::vector<uint32_t>& numbers);

  private:
    struct Source {
        uint32_t number = 0;
        std::shared_ptr<io::File> file;
        Segment* segment = nullptr;  ///< Known to the set from its first batch on.
        size_t entries = 0;
        std::string header_damage{};
        uint64_t first_sequence = 0;
        uint64_t last_sequence = 0;
    };
    /// The highest numbers that any valid header from a place on carries.
    struct Evidence {
        uint64_t durable_through = 0;
        std::string from;
    };

    Result<void> open_sources(const std::vector<uint32_t>& numbers);
    /// Of a source whose batches are read again from the first one on.
    std::vector<PageRun> dead_of(size_t source) const {
        return segments_.known_dead_runs(sources_[source].number);
    }
    Result<void> read_before_checkpoint();
    Result<void> read_after_checkpoint();
    /// The batch that the next segment's first one follows; nullopt when there is none.
    Result<std::optional<uint64_t>> predecessor_of_next(size_t source);
    Result<Evidence> evidence_behind(size_t source, uint32_t page);
    /// A valid batch, and in which source it was found.
    struct BatchBehind {
        size_t source = 0;
        ScannedBatch batch;
    };
    /// The first valid batch from a place on that is newer than the log so far.
    Result<std::optional<BatchBehind>> batch_behind(size_t source, uint32_t page);
    /// Makes the entries of what lies behind a place of a damaged log known.
    Result<void> add_entries_behind(size_t source, uint32_t page);
    /// Makes the batch's entries known.
    void add_entries(Source& source, const ScannedBatch& batch);
    /// Takes the batch into the log.
    void accept(Source& source, const ScannedBatch& batch);
    /// The log ends before this page of this source.
    Result<void> end_log(size_t source, uint32_t page, const std::string& why);

    io::FileSystem& files_;
    SegmentSet& segments_;
    const StoreId& store_id_;
    const SuperblockSlot& superblock_;
    const bool may_write_;
    const bool salvage_;
    const bool proof_lost_;
    std::vector<Source> sources_;
    RecoveredLog log_;
};

Result<RecoveredLog> Recovery::run(const std::vector<uint32_t>& numbers) {
    log_.last_sequence = superblock_.sequence;
    log_.highest_sequence = std::max(superblock_.highest_sequence.get(), log_.last_sequence);
    log_.last_segment = superblock_.last_segment;
    if (!numbers.empty()) {
        log_.last_segment = std::max(log_.last_segment, numbers.back());
    }
    log_.counters = {.chunks = superblock_.chunks,
                     .unique_bytes = superblock_.unique_bytes,
                     .stored_bytes = superblock_.stored_bytes,
                     .appended_bytes = superblock_.appended_bytes,
                     .duplicate_bytes = superblock_.duplicate_bytes};
    STELLARIUM_TRY(open_sources(numbers));
    const bool log_file_is_there =
        !sources_.empty() && sources_.front().number == superblock_.log_segment;
    if (!log_file_is_there && superblock_.log_page > 1) {
        log_.damage.push_back(
            fmt::format("{} is missing: the superblock says that the log goes on at its page {}",
                        segments_.path(superblock_.log_segment), superblock_.log_page.get()));
        log_.records_lost = true;
        if (!salvage_) {
            for (const Source& source : sources_) {
                segments_.add(source.number);
            }
            return std::move(log_);
        }
    }
    STELLARIUM_TRY(read_before_checkpoint());
    STELLARIUM_TRY(read_after_checkpoint());
    return std::move(log_);
}

Result<void> Recovery::open_sources(const std::vector<uint32_t>& numbers) {
    for (const uint32_t number : numbers) {
        if (number < superblock_.log_segment) {
            continue;
        }
        const auto mode = may_write_ ? io::OpenMode::kReadWrite : io::OpenMode::kReadOnly;
        STELLARIUM_ASSIGN(std::shared_ptr<io::File> file,
                          files_.open(segments_.path(number), mode));
        if (may_write_) {
            STELLARIUM_TRY(file->datasync());
            STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
            file->drop_cache(0, size);
        }
        std::vector<std::byte> page(kPageBytes);
        Result<void> header = io::read_exact(*file, page, 0);
        if (header) {
            const auto decoded = decode_segment_header(page, store_id_, number);
            if (!decoded) {
                header = std::unexpected(decoded.error().with_context(file->path()));
            } else {
                STELLARIUM_ASSIGN(
                    const std::string why_not,
                    check_versions(decoded->read_version, decoded->write_version,
                                   decoded->features_refuse, decoded->features_read_only));
                if (!why_not.empty()) {
                    log_.not_writable = fmt::format("{}: {}", file->path(), why_not);
                }
            }
        }
        if (!header && header.error().code() != ErrorCode::kCorrupt) {
            return header;
        }
        sources_.push_back({.number = number, .file = std::move(file)});
        if (!header) {
            sources_.back().header_damage = header.error().message();
        }
    }
    return {};
}

Result<void> Recovery::read_before_checkpoint() {
    if (sources_.empty() || sources_.front().number != superblock_.log_segment) {
        return {};
    }
    Source& source = sources_.front();
    STELLARIUM_ASSIGN(const uint64_t size, source.file->size_bytes());
    if (superblock_.log_page > 1 && size < uint64_t{superblock_.log_page} * kPageBytes) {
        log_.damage.push_back(fmt::format(
            "{} ends at offset {}, but {} bytes of it were durable at the last checkpoint: the "
            "file is truncated",
            source.file->path(), size, uint64_t{superblock_.log_page} * kPageBytes));
        log_.records_lost = true;  // Whatever followed went with it.
    }
    const std::vector<PageRun> dead = segments_.known_dead_runs(source.number);
    for (uint32_t page = skip_dead(dead, 1); page < superblock_.log_page;
         page = skip_dead(dead, page)) {
        auto batch =
            read_batch(*source.file, store_id_, source.number, page, DataCheck::kNone, dead);
        if (batch) {
            add_entries(source, *batch);
            page = batch->end_page;
            continue;
        }
        if (batch.error().code() != ErrorCode::kCorrupt) {
            return std::unexpected(batch.error());
        }
        log_.damage.push_back(fmt::format("{}; this batch was durable at the last checkpoint",
                                          batch.error().message()));
        // What lies there may be asked for, and is damaged rather than unheard of.
        if (source.segment == nullptr) {
            source.segment = &segments_.add_in_memory(source.number, source.file, {});
        }
        segments_.add_metadata_damage(*source.segment, batch.error().message());
        STELLARIUM_ASSIGN(const auto next,
                          find_batch(*source.file, store_id_, source.number, page));
        if (!next) {
            break;
        }
        page = *next;
    }
    return {};
}

void Recovery::add_entries(Source& source, const ScannedBatch& batch) {
    if (source.segment == nullptr) {
        source.segment = &segments_.add_in_memory(source.number, source.file, {});
    }
    if (!source.header_damage.empty()) {
        log_.headers_needed.push_back(
            {.segment = source.number, .first_sequence = batch.sequence, .file = source.file});
        log_.warnings.push_back(
            fmt::format("{}; its batches are whole{}", source.header_damage,
                        may_write_ && !salvage_ ? ", and the header is written anew" : ""));
        source.header_damage.clear();
    }
    segments_.append_entries(*source.segment, batch.entries);
    if (!batch.lost_members.empty()) {
        segments_.add_metadata_damage(*source.segment, batch.lost_members);
    }
    source.entries += batch.entries.size();
    if (source.first_sequence == 0) {
        source.first_sequence = batch.sequence;
    }
    source.last_sequence = batch.sequence;
}

void Recovery::accept(Source& source, const ScannedBatch& batch) {
    add_entries(source, batch);
    if (batch.damage.empty()) {
        for (const Entry& entry : batch.entries) {
            source.segment->set_verified(entry.page, entry.pages());
        }
    }
    log_.batches.push_back({.sequence = batch.sequence,
                            .segment = source.number,
                            .page = batch.page,
                            .records = batch.records,
                            .before = log_.counters});
    if (batch.page == 1) {
        log_.counters.add_pages(1);
    }
    log_.counters.add_batch(batch.end_page - batch.page, batch.entries, batch.duplicate_bytes);
    log_.last_sequence = batch.sequence;
    log_.highest_sequence = std::max(log_.highest_sequence, batch.sequence);
}

Result<void> Recovery::read_after_checkpoint() {
    if (sources_.empty()) {
        return end_log(0, 0,
                       fmt::format("{} does not exist", segments_.path(superblock_.log_segment)));
    }
    size_t source = 0;
    uint32_t page =
        sources_.front().number == superblock_.log_segment ? superblock_.log_page.get() : 1;
    int looks_left = may_write_ ? 0 : kReadOnlyLooks;
    STELLARIUM_ASSIGN(auto next_follows, predecessor_of_next(source));
    while (true) {
        std::string why;
        std::optional<ScannedBatch> found;
        auto batch = read_batch(*sources_[source].file, store_id_, sources_[source].number, page,
                                DataCheck::kHashes, dead_of(source));
        if (batch && next_follows == log_.last_sequence) {
            // A writer goes on in the next segment and does not come back: this one's append
            // failed.
            why = fmt::format(
                "{} at offset {}: batch {} was given up, the log goes on in the next "
                "segment",
                sources_[source].file->path(), uint64_t{page} * kPageBytes, batch->sequence);
        } else if (batch && batch->previous_sequence == log_.last_sequence) {
            found = std::move(*batch);
        } else if (batch) {
            why = fmt::format("{} at offset {}: batch {} follows batch {}, not {}",
                              sources_[source].file->path(), uint64_t{page} * kPageBytes,
                              batch->sequence, batch->previous_sequence, log_.last_sequence);
        } else if (batch.error().code() == ErrorCode::kCorrupt) {
            why = batch.error().message();
        } else {
            return std::unexpected(batch.error());
        }

        if (!found && source + 1 < sources_.size()) {
            // A segment's last batch: the log goes on where the next segment says so.
            auto next =
                read_batch(*sources_[source + 1].file, store_id_, sources_[source + 1].number, 1,
                           DataCheck::kHashes, dead_of(source + 1));
            if (next && next->previous_sequence == log_.last_sequence) {
                log_.counters.add_pages(footer_pages(sources_[source].entries));
                log_.footers_needed.push_back({.segment = sources_[source].number,
                                               .end_page = page,
                                               .first_sequence = sources_[source].first_sequence,
                                               .last_sequence = sources_[source].last_sequence,
                                               .file = sources_[source].file});
                found = std::move(*next);
                ++source;
                STELLARIUM_ASSIGN(next_follows, predecessor_of_next(source));
            } else if (!next && next.error().code() != ErrorCode::kCorrupt) {
                return std::unexpected(next.error());
            }
        }

        if (found && !found->damage.empty()) {
            log_.highest_sequence = std::max(log_.highest_sequence, found->sequence);
            STELLARIUM_ASSIGN(const Evidence evidence, evidence_behind(source, found->end_page));
            if (evidence.durable_through < found->sequence) {
                return end_log(source, found->page, found->damage.front());
            }
            if (looks_left > 0) {
                --looks_left;
                continue;
            }
            for (const std::string& damage : found->damage) {
                log_.damage.push_back(fmt::format("{}; batch {} was durable, as {} proves", damage,
                                                  found->sequence, evidence.from));
            }
        }
        if (found) {
            page = found->end_page;
            accept(sources_[source], *found);
            continue;
        }

        STELLARIUM_ASSIGN(const Evidence evidence, evidence_behind(source, page));
        if (evidence.durable_through > log_.last_sequence && looks_left > 0) {
            --looks_left;
            continue;
        }
        if (evidence.durable_through > log_.last_sequence) {
            log_.damage.push_back(fmt::format(
                "{}; the log stops after batch {}, but {} proves that batches up to {} were "
                "durable",
                why, log_.last_sequence, evidence.from, evidence.durable_through));
            log_.records_lost = true;
            if (salvage_) {
                STELLARIUM_ASSIGN(auto behind, batch_behind(source, page));
                if (behind) {
                    log_.missing_before.emplace(behind->batch.sequence, log_.damage.back());
                    source = behind->source;
                    page = behind->batch.end_page;
                    accept(sources_[source], behind->batch);
                    STELLARIUM_ASSIGN(next_follows, predecessor_of_next(source));
                    continue;
                }
                log_.missing_before.emplace(RecoveredLog::kNoBatch, log_.damage.back());
            }
        }
        return end_log(source, page, why);
    }
}

Result<std::optional<Recovery::BatchBehind>> Recovery::batch_behind(size_t source, uint32_t page) {
    for (size_t i = source; i < sources_.size(); ++i) {
        uint32_t at = i == source ? page : 1;
        while (true) {
            STELLARIUM_ASSIGN(const auto next,
                              find_batch(*sources_[i].file, store_id_, sources_[i].number, at));
            if (!next) {
                break;
            }
            STELLARIUM_ASSIGN(auto batch,
                              read_batch(*sources_[i].file, store_id_, sources_[i].number, *next,
                                         DataCheck::kHashes));
            if (batch.sequence > log_.last_sequence) {
                for (const std::string& damage : batch.damage) {
                    log_.damage.push_back(damage);
                }
                return BatchBehind{.source = i, .batch = std::move(batch)};
            }
            at = batch.end_page;
        }
    }
    return std::nullopt;
}

Result<void> Recovery::add_entries_behind(size_t source, uint32_t page) {
    uint32_t at = page;
    while (true) {
        STELLARIUM_ASSIGN(const auto next, find_batch(*sources_[source].file, store_id_,
                                                      sources_[source].number, at));
        if (!next) {
            return {};
        }
        STELLARIUM_ASSIGN(const auto batch,
                          read_batch(*sources_[source].file, store_id_, sources_[source].number,
                                     *next, DataCheck::kNone));
        add_entries(sources_[source], batch);
        at = batch.end_page;
    }
}

Result<std::optional<uint64_t>> Recovery::predecessor_of_next(size_t source) {
    if (source + 1 >= sources_.size()) {
        return std::nullopt;
    }
    const Source& next = sources_[source + 1];
    const auto bytes = read_batch_header(*next.file, store_id_, next.number, 1);
    if (!bytes && bytes.error().code() != ErrorCode::kCorrupt) {
        return std::unexpected(bytes.error());
    }
    if (!bytes) {
        return std::nullopt;
    }
    STELLARIUM_ASSIGN(const BatchView view, decode_batch(*bytes, store_id_, next.number, 1));
    return view.header->previous_sequence.get();
}

Result<Recovery::Evidence> Recovery::evidence_behind(size_t source, uint32_t page) {
    Evidence evidence{.durable_through = superblock_.durable_sequence, .from = "the superblock"};
    for (size_t i = source; i < sources_.size(); ++i) {
        uint32_t at = i == source ? page : 1;
        while (true) {
            STELLARIUM_ASSIGN(const auto next,
                              find_batch(*sources_[i].file, store_id_, sources_[i].number, at));
            if (!next) {
                break;
            }
            STELLARIUM_ASSIGN(const auto bytes, read_batch_header(*sources_[i].file, store_id_,
                                                                  sources_[i].number, *next));
            STELLARIUM_ASSIGN(const BatchView view,
                              decode_batch(bytes, store_id_, sources_[i].number, *next));
            log_.highest_sequence = std::max(log_.highest_sequence, view.header->sequence.get());
            if (view.header->durable_through > evidence.durable_through) {
                evidence.durable_through = view.header->durable_through;
                evidence.from =
                    fmt::format("batch {} ({} at offset {})", view.header->sequence.get(),
                                sources_[i].file->path(), uint64_t{*next} * kPageBytes);
            }
            at = view.end_page();
        }
    }
    return evidence;
}

Result<void> Recovery::end_log(size_t source, uint32_t page, const std::string& why) {
    if (sources_.empty()) {
        if (superblock_.durable_sequence > log_.last_sequence) {
            log_.damage.push_back(
                fmt::format("{}, but the superblock proves that batches up to {} were durable", why,
                            superblock_.durable_sequence.get()));
            log_.records_lost = true;
        }
        if (log_.records_lost) {
            log_.missing_before.emplace(RecoveredLog::kNoBatch, log_.damage.back());
        }
        return {};
    }
    // An empty last segment is not worth keeping: a new one is made for the next batch.
    const bool keep_segment = page > 1;
    if (keep_segment) {
        log_.tail_segment = sources_[source].number;
        log_.tail_page = page;
        log_.tail_first_sequence = sources_[source].first_sequence;
        log_.tail_file = sources_[source].file;
        if (sources_[source].segment == nullptr) {
            sources_[source].segment =
                &segments_.add_in_memory(sources_[source].number, sources_[source].file, {});
        }
    }
    const size_t first_behind = keep_segment ? source + 1 : source;
    if (salvage_) {
        // Nothing is cut off here either: the repair decides what is garbage.
        for (Source& unknown : sources_) {
            if (unknown.segment == nullptr) {
                unknown.segment = &segments_.add_in_memory(unknown.number, unknown.file, {});
            }
        }
        if (log_.missing_before.contains(RecoveredLog::kNoBatch)) {
            return {};
        }
    }
    if (!log_.damage.empty() && !salvage_) {
        // Nothing is cut off a damaged log; what lies behind its end may still be asked for.
        if (keep_segment) {
            STELLARIUM_TRY(add_entries_behind(source, page));
        }
        for (size_t i = first_behind; i < sources_.size(); ++i) {
            segments_.add(sources_[i].number);
        }
        return {};
    }
    if (proof_lost_) {
        uint64_t behind = 0;
        for (size_t i = source; i < sources_.size(); ++i) {
            STELLARIUM_ASSIGN(const uint64_t size, sources_[i].file->size_bytes());
            const uint64_t end = i == source ? uint64_t{page} * kPageBytes : kPageBytes;
            behind += size > end ? size - end : 0;
        }
        if (behind > 0) {
            log_.damage.push_back(
                fmt::format("{} bytes follow batch {}, the last that is whole, and without a "
                            "superblock nobody knows whether they were acknowledged ({})",
                            behind, log_.last_sequence, why));
            log_.records_lost = true;
            log_.missing_before.emplace(RecoveredLog::kNoBatch, log_.damage.back());
            return {};
        }
    }
    const char* cut = may_write_ && !salvage_ ? "are cut off" : "are ignored";
    if (keep_segment) {
        STELLARIUM_ASSIGN(const uint64_t size, log_.tail_file->size_bytes());
        const uint64_t end = uint64_t{page} * kPageBytes;
        log_.cut_tail = size != end;
        if (size > end) {
            log_.warnings.push_back(
                fmt::format("{}: {} bytes after batch {} were never "
                            "acknowledged and {} ({})",
                            log_.tail_file->path(), size - end, log_.last_sequence, cut, why));
        }
    }
    for (size_t i = first_behind; i < sources_.size(); ++i) {
        log_.drop_segments.push_back(sources_[i].number);
        log_.warnings.push_back(
            fmt::format("{}: its bytes after batch {} were never acknowledged "
                        "and {}",
                        sources_[i].file->path(), log_.last_sequence, cut));
    }
    return {};
}

}  // namespace

void Counters::add_batch(uint32_t pages, std::span<const Entry> entries,
                         uint64_t batch_duplicate_bytes) {
    add_pages(pages);
    duplicate_bytes += batch_duplicate_bytes;
    for (const Entry& entry : entries) {
        if (entry.entry_kind() != EntryKind::kPack) {
            ++chunks;
            unique_bytes += entry.length;
        }
    }
}

void Counters::add_pages(uint32_t pages) {
    stored_bytes += uint64_t{pages} * kPageBytes;
    appended_bytes += uint64_t{pages} * kPageBytes;
}

Result<RecoveredLog> recover_log(io::FileSystem& files, SegmentSet& segments,
                                 const StoreId& store_id, const SuperblockSlot& superblock,
                                 const std::vector<uint32_t>& numbers, bool may_write, bool salvage,
                                 bool proof_lost) {
    return Recovery(files, segments, store_id, superblock, may_write, salvage, proof_lost)
        .run(numbers);
}

}  // namespace stellarium::nebula
