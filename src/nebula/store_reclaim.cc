#include <algorithm>
#include <utility>

#include "nebula/dead_map.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

uint32_t pages_in(const std::vector<PageRun>& runs) {
    uint32_t pages = 0;
    for (const PageRun& run : runs) {
        pages += run.pages;
    }
    return pages;
}

}  // namespace

// ---- Opening ----------------------------------------------------------------------------------

/// Without its map the store can be read, because everything is checked against its id, but not
/// written: what is gone would be found as a duplicate.
Result<void> StoreImpl::open_dead_map() {
    if (superblock_.dead_map_generation == 0) {
        return {};
    }
    const std::string path =
        join_path(directory_, dead_map_file_name(superblock_.dead_map_generation));
    auto read = [&]() -> Result<DeadMap> {
        STELLARIUM_ASSIGN(const auto file, files_.open(path, io::OpenMode::kReadOnly));
        STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
        std::vector<std::byte> bytes(size);
        STELLARIUM_TRY(io::read_exact(*file, bytes, 0));
        auto map = decode_dead_map(bytes, store_id_, superblock_.dead_map_generation);
        if (!map) {
            return std::unexpected(map.error().with_context(path));
        }
        return map;
    }();
    if (!read) {
        if (read.error().code() != ErrorCode::kCorrupt &&
            read.error().code() != ErrorCode::kNotFound &&
            read.error().code() != ErrorCode::kUnsupported) {
            return std::unexpected(std::move(read).error());
        }
        const std::string reason =
            fmt::format("the map of what garbage collection has freed cannot be used: {}",
                        read.error().message());
        warn(reason);
        if (salvage_ != Salvage::kNone) {
            dead_map_lost_ = true;
            note({.kind = Finding::Kind::kDeadMap,
                  .repairable = true,
                  .what = reason,
                  .file = path,
                  .consequence = "the store opens read-only: what was freed would be taken for "
                                 "content",
                  .advice = "--repair reads all data and makes a new map of what does not match "
                            "its id"});
            return {};
        }
        set_read_only(fmt::format("{}; {}", reason, kHowToRepair));
        return {};
    }
    for (const auto& [number, segment] : read->segments) {
        if (segment.whole) {
            whole_dead_files_.push_back(number);
        }
    }
    segments_->set_dead_map(*std::move(read));
    return {};
}

/// A process that died within a collection may have left what its map names.
Result<void> StoreImpl::finish_reclaim() {
    const bool all_freed = superblock_.dead_map_freed != 0;
    for (Segment* segment : segments_->all()) {
        segment->reclaim.recorded = segments_->dead_parts(*segment).runs;
        segment->reclaim.recorded_pages = pages_in(segment->reclaim.recorded);
        if (all_freed) {
            segment->reclaim.punched = segment->reclaim.recorded;
        }
    }
    segments_->set_dead_map({});
    recorded_damage_version_ = segments_->damage_version();
    if (all_freed || superblock_.dead_map_generation == 0 || !writable_.load() ||
        salvage_ != Salvage::kNone) {
        return {};
    }
    const std::lock_guard guard(checkpoint_mutex_);
    // Nobody knows how far that process came.
    uint64_t unfreed_bytes = 0;
    for (Segment* segment : segments_->all()) {
        segment->reclaim.unfreed_bytes = uint64_t{segment->reclaim.recorded_pages} * kPageBytes;
        unfreed_bytes += segment->reclaim.unfreed_bytes;
    }
    {
        const std::lock_guard state_guard(state_mutex_);
        unfreed_bytes_ += unfreed_bytes;
    }
    // The older generation may name an older map, or none.
    SuperblockSlot slot = superblock_;
    STELLARIUM_TRY(publish(slot));
    uint64_t segments_freed = 0;
    uint64_t segments_leased = 0;
    auto freed =
        free_recorded([](uint64_t) -> Result<void> { return {}; }, segments_freed, segments_leased);
    if (!freed) {
        // The next collection tries again; until then it costs space.
        warn(fmt::format("what garbage collection freed before could not all be given back: {}",
                         freed.error().message()));
        return {};
    }
    if (segments_leased > 0) {
        return {};  // Of clients of the process that had the store before; the next collection's.
    }
    slot = superblock_;
    slot.dead_map_freed = 1;
    return publish(slot);
}

Result<void> StoreImpl::record_freed() {
    const std::lock_guard guard(checkpoint_mutex_);
    STELLARIUM_TRY(check_writable());
    SuperblockSlot slot = superblock_;
    slot.dead_map_freed = 1;
    return publish(slot);
}

// ---- Recording --------------------------------------------------------------------------------

void StoreImpl::subtract_from_counters(uint64_t chunks, uint64_t unique_bytes,
                                       uint64_t stored_bytes) {
    const auto subtract = [&](Counters& counters) {
        counters.chunks -= chunks;
        counters.unique_bytes -= unique_bytes;
        counters.stored_bytes -= stored_bytes;
    };
    const std::lock_guard guard(state_mutex_);
    subtract(counters_);
    // All of it lies before the newest checkpoint, so it was counted in each of these.
    for (BatchPosition& batch : batches_) {
        subtract(batch.before);
    }
}

bool StoreImpl::has_unrecorded() const {
    const std::lock_guard guard(state_mutex_);
    return condemned_chunks_ > 0 || segments_->damage_version() != recorded_damage_version_;
}

Result<StoreImpl::DeadRecord> StoreImpl::write_dead_map(SuperblockSlot& slot) {
    DeadRecord record;
    record.damage_version = segments_->damage_version();
    // No number twice: a superblock whose writing failed may name the last one all the same.
    last_dead_map_ = std::max(last_dead_map_, superblock_.dead_map_generation.get()) + 1;
    DeadMap map{.generation = last_dead_map_, .segments = {}};
    for (const uint32_t number : whole_dead_files_) {
        map.segments[number].whole = true;
    }
    bool all_freed = whole_dead_files_.empty();
    for (Segment* segment : segments_->all()) {
        DeadSegment parts;
        uint32_t dead_pages = 0;
        if (segment->reclaim.whole) {
            parts.whole = true;
            all_freed = false;
            STELLARIUM_ASSIGN(dead_pages, file_pages(*segment));
        } else {
            parts = segments_->dead_parts(*segment);
            all_freed = all_freed && parts.runs == segment->reclaim.punched;
            dead_pages = pages_in(parts.runs);
        }
        if (!parts.empty()) {
            record.segments.push_back({.segment = segment,
                                       .whole = parts.whole,
                                       .dead_pages = dead_pages,
                                       .runs = parts.runs});
            record.stored_bytes +=
                uint64_t{dead_pages - segment->reclaim.recorded_pages} * kPageBytes;
            map.segments.emplace(segment->number(), std::move(parts));
        }
    }
    const std::vector<std::byte> bytes = encode_dead_map(store_id_, map);
    const std::string path = join_path(directory_, dead_map_file_name(map.generation));
    // Nothing is freed without it.
    const ReserveScope scope;
    auto written = with_reserve([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const auto file, files_.open(path, io::OpenMode::kCreate));
        STELLARIUM_TRY(file->truncate(0));
        STELLARIUM_TRY(io::write_all(*file, Bytes(bytes), 0));
        STELLARIUM_TRY(file->datasync());
        return files_.sync_directory(directory_);
    });
    if (!written) {
        [[maybe_unused]] const auto best_effort = files_.remove(path);
        return std::unexpected(std::move(written).error());
    }
    slot.features_refuse = slot.features_refuse | kFeatureDeadMap;
    slot.dead_map_generation = map.generation;
    slot.dead_map_freed = all_freed ? 1 : 0;
    const std::lock_guard guard(state_mutex_);
    record.chunks = condemned_chunks_;
    record.unique_bytes = condemned_bytes_;
    return record;
}

void StoreImpl::DeadRecord::take_off(SuperblockSlot& slot) const {
    slot.chunks = slot.chunks - chunks;
    slot.unique_bytes = slot.unique_bytes - unique_bytes;
    slot.stored_bytes = slot.stored_bytes - stored_bytes;
}

void StoreImpl::apply(const DeadRecord& record) {
    recorded_damage_version_ = record.damage_version;
    condemning_ = false;
    for (const DeadRecord::Part& part : record.segments) {
        Segment::Reclaim& reclaim = part.segment->reclaim;
        reclaim.unfreed_bytes += uint64_t{part.dead_pages - reclaim.recorded_pages} * kPageBytes;
        reclaim.recorded_pages = part.dead_pages;
        reclaim.recorded = part.runs;
        reclaim.recorded_whole = part.whole;
    }
    {
        const std::lock_guard guard(state_mutex_);
        condemned_chunks_ -= record.chunks;
        condemned_bytes_ -= record.unique_bytes;
        unfreed_bytes_ += record.stored_bytes;
    }
    subtract_from_counters(record.chunks, record.unique_bytes, record.stored_bytes);
}

Result<void> StoreImpl::record_dead(uint64_t dead_pairs) {
    const std::lock_guard guard(checkpoint_mutex_);
    STELLARIUM_TRY(check_writable());
    SuperblockSlot slot = superblock_;
    STELLARIUM_TRY(sync(sequence()));
    STELLARIUM_TRY(sync_footers());
    STELLARIUM_ASSIGN(const DeadRecord record, write_dead_map(slot));
    STELLARIUM_TRY(write_index(slot, /*all_is_recorded=*/true, dead_pairs));
    fill_position(slot, slot.sequence);
    record.take_off(slot);
    return publish(slot, &record);
}

Result<uint32_t> StoreImpl::file_pages(Segment& segment) {
    STELLARIUM_ASSIGN(const auto file, segments_->file(segment));
    STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
    return pages_for(size);
}

// ---- Freeing ----------------------------------------------------------------------------------

Result<void> StoreImpl::unlink_segment(Segment& segment) {
    {
        // Derived data of a segment that goes.
        const std::lock_guard guard(state_mutex_);
        std::erase_if(pending_footers_, [&segment](const PendingFooter& footer) {
            return footer.segment == &segment;
        });
    }
    STELLARIUM_TRY(files_.remove(segments_->path(segment.number())));
    segments_->set_gone(segment);
    return {};
}

/// Who leases a segment takes its lock before looking whether what he wants is dead. What is freed
/// under this lock was declared dead before: so either he finds that, or we find him.
Result<std::unique_ptr<io::File>> StoreImpl::lock_unleased(uint32_t segment) {
    STELLARIUM_ASSIGN(auto file, files_.open(segments_->path(segment), io::OpenMode::kReadWrite));
    if (auto locked = file->lock(); !locked) {
        if (locked.error().code() == ErrorCode::kBusy) {
            return nullptr;
        }
        return std::unexpected(std::move(locked).error());
    }
    return file;
}

Result<std::shared_ptr<io::File>> StoreImpl::lease_segment(uint32_t number) {
    STELLARIUM_TRY(check_usable());
    const ReaderGate::Pin pin = gate_.enter();
    const Segment* segment = segments_->find(number);
    if (segment == nullptr || segment->is_gone()) {
        return fail(
            ErrorCode::kStale,
            fmt::format("there is no segment {} (any more): look the chunk up by its id", number));
    }
    STELLARIUM_ASSIGN(std::shared_ptr<io::File> file,
                      files_.open(segments_->path(number), io::OpenMode::kReadOnly));
    STELLARIUM_TRY(file->lock_shared());
    return file;
}

/// A punched hole is durable before the superblock says so.
Result<bool> StoreImpl::punch_segment(Segment& segment, io::File& file) {
    const std::vector<PageRun>& recorded = segment.reclaim.recorded;
    // A header that says nothing, because it is damaged, forbids nothing.
    std::vector<std::byte> page(kPageBytes);
    if (io::read_exact(file, page, 0)) {
        const auto header = decode_segment_header(page, store_id_, segment.number());
        const auto why_not =
            header ? check_versions(header->read_version, header->write_version,
                                    header->features_refuse, header->features_read_only)
                   : Result<std::string>(std::string());
        if (!why_not || !why_not->empty()) {
            warn(fmt::format("{}: {}; its space comes back only when all of it is dead",
                             file.path(), why_not ? *why_not : why_not.error().message()));
            segment.reclaim.punched = recorded;
            return false;
        }
    }
    for (const PageRun& run : recorded) {
        const auto done =
            std::ranges::lower_bound(segment.reclaim.punched, run.page, {}, &PageRun::page);
        if (done != segment.reclaim.punched.end() && *done == run) {
            continue;
        }
        auto punched =
            file.punch_hole(uint64_t{run.page} * kPageBytes, uint64_t{run.pages} * kPageBytes);
        if (!punched && punched.error().code() == ErrorCode::kUnsupported) {
            if (!holes_unsupported_.exchange(true)) {
                warn(fmt::format("{}; space comes back only where a whole segment is dead",
                                 punched.error().message()));
            }
            segment.reclaim.punched = recorded;
            return false;
        }
        STELLARIUM_TRY(std::move(punched));
    }
    if (auto synced = file.datasync(); !synced) {
        poison(synced.error(), "a sync of the log");
        return std::unexpected(std::move(synced).error());
    }
    segment.reclaim.punched = recorded;
    return true;
}

/// On a full disk there may be no room for a map. Segments that are dead as a whole can go without
/// one: no name of theirs is left to be found, and a missing segment is no fault.
Result<bool> StoreImpl::free_unrecorded(uint64_t& segments_freed, uint64_t& freed_bytes) {
    gate_.wait();
    bool unlinked = false;
    for (Segment* segment : segments_->all()) {
        Segment::Reclaim& reclaim = segment->reclaim;
        if (!reclaim.whole || reclaim.recorded_whole) {
            continue;
        }
        STELLARIUM_ASSIGN(const auto unleased, lock_unleased(segment->number()));
        if (!unleased) {
            continue;
        }
        STELLARIUM_ASSIGN(const uint32_t pages, file_pages(*segment));
        STELLARIUM_TRY(unlink_segment(*segment));
        unlinked = true;
        ++segments_freed;
        const uint64_t uncounted = uint64_t{pages - reclaim.recorded_pages} * kPageBytes;
        const uint64_t unfreed = std::exchange(reclaim.unfreed_bytes, 0);
        subtract_from_counters(0, 0, uncounted);
        freed_bytes += uncounted + unfreed;
        const std::lock_guard guard(state_mutex_);
        unfreed_bytes_ -= unfreed;
    }
    if (unlinked) {
        if (auto synced = files_.sync_directory(join_path(directory_, kSegmentsName)); !synced) {
            poison(synced.error(), "a sync of the segments' directory");
            return std::unexpected(std::move(synced).error());
        }
    }
    return unlinked;
}

Result<void> StoreImpl::free_recorded(const std::function<Result<void>(uint64_t bytes)>& freed,
                                      uint64_t& segments_freed, uint64_t& segments_leased) {
    gate_.wait();
    bool unlinked = false;
    const auto free_all = [&]() -> Result<void> {
        for (size_t i = whole_dead_files_.size(); i-- > 0;) {
            const std::string path = segments_->path(whole_dead_files_[i]);
            STELLARIUM_ASSIGN(const bool there, files_.exists(path));
            if (there) {
                STELLARIUM_ASSIGN(const auto unleased, lock_unleased(whole_dead_files_[i]));
                if (!unleased) {
                    ++segments_leased;
                    continue;
                }
                STELLARIUM_TRY(files_.remove(path));
                unlinked = true;
            }
            whole_dead_files_.erase(whole_dead_files_.begin() + static_cast<std::ptrdiff_t>(i));
        }
        for (Segment* segment : segments_->all()) {
            Segment::Reclaim& reclaim = segment->reclaim;
            if (!reclaim.recorded_whole && reclaim.recorded == reclaim.punched) {
                continue;
            }
            STELLARIUM_ASSIGN(auto unleased, lock_unleased(segment->number()));
            if (!unleased) {
                ++segments_leased;
                continue;
            }
            if (reclaim.recorded_whole) {
                STELLARIUM_TRY(unlink_segment(*segment));
                unlinked = true;
                ++segments_freed;
            } else {
                STELLARIUM_ASSIGN(const bool punched, punch_segment(*segment, *unleased));
                if (!punched) {
                    continue;
                }
            }
            unleased.reset();
            const uint64_t bytes = std::exchange(reclaim.unfreed_bytes, 0);
            {
                const std::lock_guard guard(state_mutex_);
                unfreed_bytes_ -= bytes;
            }
            STELLARIUM_TRY(freed(bytes));
        }
        return {};
    };
    const auto done = free_all();
    if (unlinked) {
        if (auto synced = files_.sync_directory(join_path(directory_, kSegmentsName)); !synced) {
            poison(synced.error(), "a sync of the segments' directory");
            return synced;
        }
    }
    return done;
}

}  // namespace stellarium::nebula
