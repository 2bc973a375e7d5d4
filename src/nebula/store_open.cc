#include <algorithm>
#include <charconv>
#include <utility>

#include "nebula/dead_map.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

std::string parent_of(const std::string& directory) {
    std::string path = directory;
    while (path.size() > 1 && path.back() == '/') {
        path.pop_back();
    }
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) {
        return ".";
    }
    return slash == 0 ? "/" : path.substr(0, slash);
}

/// Refuses what cannot keep the crash model's promises; adds a warning for what may not.
Result<void> check_file_system(const io::Env& env, const std::string& directory,
                               const StoreOptions& options, std::vector<std::string>& warnings) {
    STELLARIUM_ASSIGN(const io::FileSystemType type, env.files->type(directory));
    switch (type.kind) {
        case io::FileSystemKind::kLocal:
            return {};
        case io::FileSystemKind::kNetwork:
            if (!options.allow_unsafe_file_system) {
                return fail(ErrorCode::kUnsupported,
                            fmt::format("{} is on a network file system ({}), where locks and "
                                        "synced data are not sure to survive a crash: use a local "
                                        "disk, or allow unsafe file systems",
                                        directory, type.name));
            }
            warnings.push_back(
                fmt::format("{} is on a network file system ({}): after a crash of "
                            "this host or the server data may be lost",
                            directory, type.name));
            return {};
        case io::FileSystemKind::kMemory:
            warnings.push_back(
                fmt::format("{} is on a memory file system ({}): everything is lost "
                            "when this host restarts",
                            directory, type.name));
            return {};
        case io::FileSystemKind::kOverlay:
            warnings.push_back(
                fmt::format("{} is on {}, which is usually thrown away with its "
                            "container: use a volume or a local disk",
                            directory, type.name));
            return {};
        case io::FileSystemKind::kUnknown:
            warnings.push_back(
                fmt::format("{} is on a file system of unknown kind ({}): whether "
                            "synced data survives a crash there is not known",
                            directory, type.name));
            return {};
    }
    return {};
}

}  // namespace

Result<void> check_options(const StoreOptions& options) {
    if (options.segment_bytes < kMinSegmentBytes ||
        options.segment_bytes > uint64_t{kSegmentPages} * kPageBytes ||
        options.segment_bytes % kPageBytes != 0) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("segment size {} is not between {} and {} in whole pages",
                                options.segment_bytes, kMinSegmentBytes,
                                uint64_t{kSegmentPages} * kPageBytes));
    }
    return {};
}

Result<void> Store::create(const io::Env& env, const std::string& directory,
                           const StoreOptions& options) {
    STELLARIUM_TRY(check_options(options));
    io::FileSystem& files = *env.files;
    STELLARIUM_ASSIGN(const bool there, files.exists(directory));
    if (!there) {
        STELLARIUM_TRY(files.make_directory(directory));
    }
    std::vector<std::string> warnings;
    STELLARIUM_TRY(check_file_system(env, directory, options, warnings));
    STELLARIUM_ASSIGN(const auto entries, files.list(directory));
    if (std::ranges::find(entries, kSuperblockName, &io::DirectoryEntry::name) != entries.end()) {
        return fail(ErrorCode::kAlreadyExists, fmt::format("{} already holds a store", directory));
    }
    for (const io::DirectoryEntry& entry : entries) {
        // What an interrupted creation leaves behind; the superblock's name comes last.
        if (entry.name == kSegmentsName && entry.is_directory) {
            STELLARIUM_ASSIGN(const auto inside, files.list(join_path(directory, kSegmentsName)));
            if (inside.empty()) {
                continue;
            }
        }
        if (entry.name == kNewSuperblockName || entry.name == kLockName) {
            continue;
        }
        return fail(
            ErrorCode::kAlreadyExists,
            fmt::format("{} is not empty (it has '{}'): a store needs a directory of its own",
                        directory, entry.name));
    }
    STELLARIUM_ASSIGN(const auto lock, files.lock(join_path(directory, kLockName)));
    const std::string segments = join_path(directory, kSegmentsName);
    if (auto made = files.make_directory(segments);
        !made && made.error().code() != ErrorCode::kAlreadyExists) {
        return made;
    }

    SuperblockSlot slot{};
    env.random->fill(std::as_writable_bytes(std::span(slot.store_id)));
    slot.log_segment = 1;
    slot.log_page = 1;
    slot.index_segment = 1;
    std::vector<std::byte> bytes;
    for (size_t i = 0; i < kSuperblockSlots; ++i) {
        slot.generation = i / 2;
        seal(slot);
        const Bytes copy = bytes_of(slot);
        bytes.insert(bytes.end(), copy.begin(), copy.end());
    }
    const std::string new_superblock = join_path(directory, kNewSuperblockName);
    STELLARIUM_ASSIGN(const auto file, files.open(new_superblock, io::OpenMode::kCreate));
    STELLARIUM_TRY(file->truncate(0));
    STELLARIUM_TRY(io::write_all(*file, Bytes(bytes), 0));
    STELLARIUM_TRY(file->datasync());
    STELLARIUM_TRY(files.sync_directory(segments));
    STELLARIUM_TRY(files.rename(new_superblock, join_path(directory, kSuperblockName)));
    STELLARIUM_TRY(files.sync_directory(directory));
    return files.sync_directory(parent_of(directory));
}

Result<std::unique_ptr<Store>> Store::open(const io::Env& env, const std::string& directory,
                                           const StoreOptions& options) {
    STELLARIUM_TRY(check_options(options));
    auto store = std::make_unique<StoreImpl>(env, directory, options);
    if (auto opened = store->open(); !opened) {
        if (opened.error().code() != ErrorCode::kReadOnly || options.read_only) {
            return std::unexpected(std::move(opened).error());
        }
        // A file system that is mounted read-only: what is there can be read all the same.
        StoreOptions reading = options;
        reading.read_only = true;
        store = std::make_unique<StoreImpl>(env, directory, reading);
        STELLARIUM_TRY(store->open());
    }
    return store;
}

Result<void> StoreImpl::open() {
    STELLARIUM_ASSIGN(const bool there, files_.exists(join_path(directory_, kSuperblockName)));
    if (!there && salvage_ != Salvage::kWholeLog) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("{} holds no store (there is no superblock): create one with "
                                "'stellarctl init'",
                                directory_));
    }
    STELLARIUM_TRY(check_file_system(env_, directory_, options_, warnings_));
    if (options_.read_only) {
        set_read_only("it was opened read-only, or its file system is mounted so");
    } else {
        STELLARIUM_ASSIGN(lock_, files_.lock(join_path(directory_, kLockName)));
    }
    STELLARIUM_TRY(read_superblock());
    segments_ =
        std::make_unique<SegmentSet>(files_, directory_, store_id_, options_.mapped_footers);
    STELLARIUM_TRY(open_dead_map());
    STELLARIUM_TRY(open_segments());
    if (salvage_ == Salvage::kWholeLog) {
        STELLARIUM_TRY(check_whole_log());
    }
    STELLARIUM_TRY(open_index());
    STELLARIUM_TRY(finish_reclaim());
    if (salvage_ != Salvage::kNone) {
        return {};
    }
    if (superblock_copies_differ_ && writable_.load()) {
        // What a crash tore, or rot took, is whole again before the next trouble.
        const std::lock_guard guard(checkpoint_mutex_);
        for (int i = 0; i < 2 && writable_.load(); ++i) {
            SuperblockSlot slot = superblock_;
            if (auto written = publish(slot); !written) {
                warn(fmt::format("a damaged copy of the superblock could not be written anew: {}",
                                 written.error().message()));
                break;
            }
        }
    }
    STELLARIUM_TRY(remove_leftovers());
    if (writable_.load()) {
        reserve_.hold();
    }
    return {};
}

Result<void> StoreImpl::read_superblock() {
    const std::string path = join_path(directory_, kSuperblockName);
    STELLARIUM_ASSIGN(const bool there, files_.exists(path));
    if (!there) {
        return begin_at_first_batch(std::nullopt);
    }
    const auto mode = options_.read_only ? io::OpenMode::kReadOnly : io::OpenMode::kReadWrite;
    STELLARIUM_ASSIGN(superblock_file_, files_.open(path, mode));
    if (!options_.read_only) {
        // As for segments: after a failed sync the cache may show a generation that the disk lacks.
        STELLARIUM_TRY(superblock_file_->datasync());
        superblock_file_->drop_cache(0, kSuperblockSlots * kPageBytes);
    }
    std::vector<std::byte> page(kPageBytes);
    std::optional<SuperblockSlot> newest;
    std::optional<SuperblockSlot> older;
    std::vector<std::string> damage;
    std::array<uint64_t, kSuperblockSlots> generations{};
    for (size_t i = 0; i < kSuperblockSlots; ++i) {
        const uint64_t offset = i * kPageBytes;
        auto slot = [&]() -> Result<SuperblockSlot> {
            STELLARIUM_TRY(io::read_exact(*superblock_file_, page, offset));
            auto decoded = decode_superblock_slot(page);
            if (!decoded) {
                return std::unexpected(
                    decoded.error().with_context(fmt::format("{} at offset {}", path, offset)));
            }
            return decoded;
        }();
        if (!slot && slot.error().code() != ErrorCode::kCorrupt) {
            return std::unexpected(std::move(slot).error());
        }
        if (!slot) {
            damage.push_back(slot.error().message());
            superblock_copies_differ_ = true;
            note({.kind = Finding::Kind::kSuperblock,
                  .repairable = true,
                  .what = "a copy of the superblock is damaged: " + slot.error().message(),
                  .file = path,
                  .offset = offset,
                  .consequence = "none as long as another copy of it is whole",
                  .advice = "--repair, or opening the store for writing, writes it anew"});
            continue;
        }
        generations.at(i) = slot->generation;
        if (!newest || slot->generation > newest->generation) {
            older = std::exchange(newest, *slot);
        } else if (slot->generation < newest->generation &&
                   (!older || slot->generation > older->generation)) {
            older = *slot;
        }
    }
    for (size_t i = 0; i < kSuperblockSlots; i += 2) {
        superblock_copies_differ_ =
            superblock_copies_differ_ || generations.at(i) != generations.at(i + 1);
    }
    if (salvage_ == Salvage::kOlderCheckpoint && newest) {
        if (!older || older->sequence == newest->sequence) {
            return fail(ErrorCode::kNotFound, fmt::format("{} has no older checkpoint", path));
        }
        // The first generation that is written goes over the newest one, which is of no use, and
        // not over the one that is.
        const uint64_t generation = newest->generation + 1;
        note({.kind = Finding::Kind::kSuperblock,
              .repairable = true,
              .what = fmt::format("the newest checkpoint, at batch {}, cannot be used; the one "
                                  "before it, at batch {}, and the log behind that are",
                                  newest->sequence.get(), older->sequence.get()),
              .file = path,
              .offset = 2 * (newest->generation % 2) * kPageBytes,
              .consequence = "opening the store for writing fails",
              .advice = "--repair makes a new checkpoint"});
        newest = older;
        newest->generation = generation;
    }
    if (!newest && salvage_ != Salvage::kWholeLog) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("no copy of the superblock is valid: {}; if this is a store, "
                                "'stellarctl fsck --repair' makes it anew where the log still "
                                "holds every change; else restore the file from a backup",
                                damage.front()));
    }
    if (!newest) {
        return begin_at_first_batch(newest);
    }
    const auto why_not_writable =
        check_versions(newest->read_version, newest->write_version, newest->features_refuse,
                       newest->features_read_only);
    if (!why_not_writable) {
        return std::unexpected(why_not_writable.error().with_context(
            fmt::format("{} at offset {}", path, 2 * (newest->generation % 2) * kPageBytes)));
    }
    if (!why_not_writable->empty()) {
        set_read_only(fmt::format("{}: {}", path, *why_not_writable));
    }
    if (salvage_ == Salvage::kWholeLog) {
        return begin_at_first_batch(newest);
    }
    for (std::string& sentence : damage) {
        warn(fmt::format("{}; another copy is used", sentence));
    }
    superblock_ = *newest;
    store_id_ = newest->store_id;
    return {};
}

Result<StoreId> StoreImpl::store_of_segments() {
    const std::string directory = join_path(directory_, kSegmentsName);
    STELLARIUM_ASSIGN(const auto entries, files_.list(directory));
    std::map<StoreId, uint64_t> found;
    std::vector<std::byte> page(kPageBytes);
    for (const io::DirectoryEntry& entry : entries) {
        const auto number = parse_segment_file_name(entry.name);
        if (!number || entry.is_directory) {
            continue;
        }
        STELLARIUM_ASSIGN(const auto file,
                          files_.open(join_path(directory_, segment_file_name(*number)),
                                      io::OpenMode::kReadOnly));
        const auto read = [&](uint64_t offset) -> Result<bool> {
            auto got = io::read_exact(*file, page, offset);
            if (!got && got.error().code() != ErrorCode::kCorrupt) {
                return std::unexpected(std::move(got).error());
            }
            return got.has_value();
        };
        STELLARIUM_ASSIGN(const bool has_header, read(0));
        const StoreId claimed = load<SegmentHeader>(page).store_id;
        if (has_header && decode_segment_header(page, claimed, *number)) {
            ++found[claimed];
            continue;
        }
        STELLARIUM_ASSIGN(const bool has_batch, read(kPageBytes));
        const StoreId of_batch = load<BatchHeader>(page).store_id;
        if (has_batch && read_batch_header(*file, of_batch, *number, 1)) {
            ++found[of_batch];
        }
    }
    const auto most =
        std::ranges::max_element(found, {}, [](const auto& of_store) { return of_store.second; });
    if (most == found.end()) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("no file in {} begins as a segment of any store", directory));
    }
    return most->first;
}

Result<uint32_t> StoreImpl::newest_dead_map() {
    STELLARIUM_ASSIGN(const auto entries, files_.list(directory_));
    uint32_t newest = 0;
    for (const io::DirectoryEntry& entry : entries) {
        uint32_t generation = 0;
        const std::string_view name = entry.name;
        constexpr std::string_view kPrefix = "dead-";
        if (!name.starts_with(kPrefix)) {
            continue;
        }
        std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), generation);
        if (generation <= newest || name != dead_map_file_name(generation)) {
            continue;
        }
        STELLARIUM_ASSIGN(const auto file,
                          files_.open(join_path(directory_, name), io::OpenMode::kReadOnly));
        STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
        std::vector<std::byte> bytes(size);
        STELLARIUM_TRY(io::read_exact(*file, bytes, 0));
        if (decode_dead_map(bytes, store_id_, generation)) {
            newest = generation;
        }
    }
    return newest;
}

Result<void> StoreImpl::begin_at_first_batch(const std::optional<SuperblockSlot>& newest) {
    SuperblockSlot slot{};
    if (newest) {
        slot.store_id = newest->store_id;
        slot.generation = newest->generation;
        slot.durable_sequence = newest->durable_sequence;
        slot.highest_sequence = newest->highest_sequence;
        slot.last_segment = newest->last_segment;
        slot.features_refuse = newest->features_refuse;
        slot.dead_map_generation = newest->dead_map_generation;
        slot.dead_map_freed = newest->dead_map_freed;
        store_id_ = slot.store_id;
    } else {
        proof_lost_ = true;
        STELLARIUM_ASSIGN(store_id_, store_of_segments());
        slot.store_id = store_id_;
        STELLARIUM_ASSIGN(slot.dead_map_generation, newest_dead_map());
        slot.features_refuse = slot.dead_map_generation != 0 ? kFeatureDeadMap : 0;
    }
    slot.log_segment = 1;
    slot.log_page = 1;
    slot.index_segment = 1;
    superblock_ = slot;
    return {};
}

/// Where a batch is missing before others, what it changed is not known, and what follows may be
/// about something that it made.
Result<void> StoreImpl::check_whole_log() const {
    const auto missing = missing_before_.begin();
    if (batches_.empty() ||
        (missing != missing_before_.end() && missing->first != RecoveredLog::kNoBatch)) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("the log does not hold every batch from the first one on, as when "
                                "garbage collection has freed some{}{}",
                                batches_.empty() ? "" : ": ",
                                batches_.empty() ? std::string() : missing->second));
    }
    return {};
}

Result<void> StoreImpl::open_segments() {
    const std::string directory = join_path(directory_, kSegmentsName);
    STELLARIUM_ASSIGN(const bool there, files_.exists(directory));
    std::vector<io::DirectoryEntry> entries;
    if (there) {
        STELLARIUM_ASSIGN(entries, files_.list(directory));
    } else if (salvage_ == Salvage::kNone || superblock_.durable_sequence > 0) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("{} is missing, the folder of all content: put it back, or restore "
                                "the store from a backup",
                                directory));
    } else {
        segments_missing_ = true;
        note({.kind = Finding::Kind::kLog,
              .repairable = true,
              .what = "the folder of all content is missing",
              .file = directory,
              .consequence = "the store cannot be opened; nothing was in it yet",
              .advice = "--repair makes it anew"});
    }
    std::vector<uint32_t> numbers;
    for (const io::DirectoryEntry& entry : entries) {
        const auto number = parse_segment_file_name(entry.name);
        if (number && !entry.is_directory) {
            if (!std::ranges::binary_search(whole_dead_files_, *number)) {
                numbers.push_back(*number);
            }
        } else {
            warn(fmt::format("{}/{} is no segment, and is ignored", directory, entry.name));
        }
    }
    std::ranges::sort(numbers);
    for (const uint32_t number : numbers) {
        if (number < superblock_.log_segment) {
            segments_->add(number);
        }
    }
    const bool may_write = writable_.load();
    if (may_write && there) {
        STELLARIUM_TRY(files_.sync_directory(directory));
    }
    STELLARIUM_ASSIGN(RecoveredLog log,
                      recover_log(files_, *segments_, store_id_, superblock_, numbers, may_write,
                                  salvage_ != Salvage::kNone, proof_lost_));
    return apply_recovery(log);
}

Result<void> StoreImpl::apply_recovery(RecoveredLog& log) {
    for (std::string& sentence : log.warnings) {
        warn(std::move(sentence));
    }
    if (!log.not_writable.empty()) {
        set_read_only(log.not_writable);
    }
    records_lost_ = log.records_lost;
    missing_before_ = std::move(log.missing_before);
    log_end_segment_ = log.tail_segment;
    log_end_page_ = log.tail_page;
    last_found_segment_ = log.last_segment;
    sequence_.store(log.last_sequence);
    durable_sequence_ = log.last_sequence;
    highest_sequence_ = log.highest_sequence;
    last_segment_ = log.last_segment;
    counters_ = log.counters;
    batches_ = std::move(log.batches);
    checkpoint_appended_bytes_ = superblock_.appended_bytes;
    if (salvage_ != Salvage::kNone) {
        for (const std::string& sentence : log.damage) {
            note({.kind = Finding::Kind::kLog,
                  .repairable = true,
                  .what = sentence,
                  .file = join_path(directory_, kSegmentsName),
                  .consequence = log.records_lost
                                     ? "the store opens read-only, and changes that were "
                                       "acknowledged are missing: volumes are refused"
                                     : "the store opens read-only",
                  .advice = "--repair makes a checkpoint of what is left, and the store can be "
                            "written again"});
        }
        // The next batch goes into a new segment, so that nothing that is there is changed.
        return {};
    }
    if (!log.damage.empty()) {
        for (const std::string& sentence : log.damage) {
            warn(sentence);
        }
        set_read_only(fmt::format("it is damaged: {}{}; {}", log.damage.front(),
                                  log.damage.size() == 1
                                      ? std::string()
                                      : fmt::format(" (and {} more)", log.damage.size() - 1),
                                  kHowToRepair));
    }
    if (writable_.load()) {
        // What was never acknowledged must be gone for good before anything new is appended: a
        // stale batch that came back would look like a durable one.
        if (log.cut_tail) {
            STELLARIUM_TRY(log.tail_file->truncate(uint64_t{log.tail_page} * kPageBytes));
            STELLARIUM_TRY(log.tail_file->datasync());
        }
        for (const RecoveredLog::HeaderNeeded& needed : log.headers_needed) {
            const SegmentHeader header =
                make_segment_header(store_id_, needed.segment, needed.first_sequence);
            STELLARIUM_TRY(io::write_all(*needed.file, bytes_of(header), 0));
            STELLARIUM_TRY(needed.file->datasync());
        }
        for (const uint32_t number : log.drop_segments) {
            STELLARIUM_TRY(files_.remove(segments_->path(number)));
        }
        if (!log.drop_segments.empty()) {
            STELLARIUM_TRY(files_.sync_directory(join_path(directory_, kSegmentsName)));
        }
    }
    if (log.tail_segment != 0) {
        active_.segment = segments_->find(log.tail_segment);
        active_.file = log.tail_file;
        active_.end_page = log.tail_page;
        active_.first_sequence = log.tail_first_sequence;
        active_.last_sequence = log.last_sequence;
        STELLARIUM_TRY(segments_->visit_entries(
            *active_.segment,
            [this](std::span<const Entry> entries) { active_.entries = entries.size(); }));
    }
    for (const RecoveredLog::FooterNeeded& needed : log.footers_needed) {
        Segment* segment = segments_->find(needed.segment);
        if (segments_->use_footer(*segment, needed.end_page)) {
            continue;
        }
        pending_footers_.push_back({.file = needed.file,
                                    .segment = segment,
                                    .end_page = needed.end_page,
                                    .first_sequence = needed.first_sequence,
                                    .last_sequence = needed.last_sequence});
        if (writable_.load()) {
            [[maybe_unused]] const auto best_effort = write_footer(pending_footers_.back());
        }
    }
    return {};
}

Result<void> StoreImpl::open_index() {
    uint32_t first_missing = 1;
    if (superblock_.index_generation != 0) {
        const std::string path =
            join_path(directory_, index_file_name(superblock_.index_generation));
        auto opened = [&]() -> Result<ChunkIndex::Opened> {
            STELLARIUM_ASSIGN(const auto file, files_.open(path, io::OpenMode::kReadOnly));
            STELLARIUM_ASSIGN(index_bytes_written_, file->size_bytes());
            return ChunkIndex::open_checkpoint(*file, store_id_);
        }();
        if (opened) {
            index_ = std::move(opened->index);
            first_missing = superblock_.index_segment;
        } else {
            warn(fmt::format("{}; the index is rebuilt from the segments",
                             opened.error().message()));
            note({.kind = Finding::Kind::kIndex,
                  .repairable = true,
                  .what = "the index cannot be used: " + opened.error().message(),
                  .file = path,
                  .consequence = "opening the store takes longer; nothing is lost",
                  .advice = "--repair writes it anew"});
            index_bytes_written_ = 0;
        }
    }
    if (index_ == nullptr) {
        index_ = std::make_unique<ChunkIndex>();
    }
    for (Segment* segment : segments_->all()) {
        if (segment->number() < first_missing) {
            continue;
        }
        const auto insert = [&]() -> Result<void> {
            Result<void> inserted;
            STELLARIUM_TRY(segments_->visit_live(*segment, [&](std::span<const Entry> entries) {
                inserted = insert_entries(segment->number(), entries, nullptr);
            }));
            return inserted;
        };
        STELLARIUM_TRY(with_index(insert));
    }
    return {};
}

Result<void> StoreImpl::remove_leftovers() {
    if (!writable_.load()) {
        return {};
    }
    STELLARIUM_ASSIGN(const auto entries, files_.list(directory_));
    for (const io::DirectoryEntry& entry : entries) {
        const bool index_file = entry.name.starts_with("index-") && entry.name.ends_with(".ckpt") &&
                                entry.name != index_file_name(superblock_.index_generation);
        const bool dead_map = entry.name.starts_with("dead-") && entry.name.ends_with(".map") &&
                              entry.name != dead_map_file_name(superblock_.dead_map_generation);
        if (index_file || dead_map || entry.name == kNewSuperblockName) {
            STELLARIUM_TRY(files_.remove(join_path(directory_, entry.name)));
        }
    }
    return {};
}

}  // namespace stellarium::nebula
