#include "nebula/store.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>

#include "base/units.h"
#include "nebula/format.h"
#include "nebula/index.h"
#include "nebula/recovery.h"
#include "nebula/segment.h"

namespace stellarium::nebula {
namespace {

constexpr std::string_view kSuperblockName = "superblock";
constexpr std::string_view kNewSuperblockName = "superblock.new";
constexpr std::string_view kLockName = "lock";
constexpr std::string_view kSegmentsName = "segments";
/// However small the index is compared with the log, opening inserts no more than this adds.
constexpr uint64_t kMaxLogBytesBeyondIndex = 16 * kGiB;
constexpr size_t kMaxWarnings = 256;

std::string join(const std::string& directory, std::string_view name) {
    return fmt::format("{}/{}", directory, name);
}

std::string index_file_name(uint32_t generation) {
    return fmt::format("index-{}.ckpt", generation);
}

uint32_t pages_for(size_t bytes) {
    return static_cast<uint32_t>((bytes + kPageBytes - 1) / kPageBytes);
}

iovec iovec_of(Bytes bytes) {
    // pwritev takes the iovec of preadv, and does not write through it.
    return {const_cast<std::byte*>(bytes.data()), bytes.size()};
}

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

/// A place of the append plan: one distinct id of a batch.
struct Item {
    ChunkId id;
    Bytes content;
    Bytes aux{};
    EntryKind kind = EntryKind::kChunk;
    bool stored = false;    ///< Found, or written by now.
    PageAddress address{};  ///< Where, once stored.
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

}  // namespace

// ---- WriteBatch -------------------------------------------------------------------------------

size_t WriteBatch::add_chunk(const ChunkId& id, Bytes pages) {
    assert(!pages.empty() && pages.size() % kPageBytes == 0 && pages.size() <= kMaxChunkBytes);
    assert(hash(pages) == id);
    data_bytes_ += pages.size();
    chunks_.push_back({id, pages});
    return chunks_.size() - 1;
}

void WriteBatch::add_object(const ChunkId& id, Bytes content, Bytes aux) {
    assert(content.size() + aux.size() <= kMaxObjectBytes);
    assert(hash(content) == id);
    data_bytes_ += content.size() + aux.size();
    objects_.push_back({id, content, aux});
}

void WriteBatch::add_record(uint16_t kind, Bytes payload) {
    records_.push_back({kind, {payload.begin(), payload.end()}});
}

void WriteBatch::clear() {
    chunks_.clear();
    objects_.clear();
    records_.clear();
    data_bytes_ = 0;
}

// ---- StoreImpl --------------------------------------------------------------------------------

/// Lock order: checkpoint_mutex_, append_mutex_, repair_mutex_, state_mutex_; those inside
/// SegmentSet and ChunkIndex come last.
class StoreImpl final : public Store {
  public:
    StoreImpl(const io::Env& env, std::string directory, const StoreOptions& options)
        : env_(env),
          files_(*env.files),
          directory_(std::move(directory)),
          options_(options),
          segment_pages_(static_cast<uint32_t>(options.segment_bytes / kPageBytes)) {}

    Result<void> open();

    Bytes checkpoint_payload() const override {
        return std::as_bytes(std::span(superblock_.payload)).first(superblock_.payload_bytes);
    }
    Result<void> replay(ReplaySink& sink) override;
    Result<Appended> append(WriteBatch& batch) override;
    Result<void> sync(uint64_t sequence) override;
    uint64_t sequence() const override { return sequence_.load(std::memory_order_acquire); }
    Result<void> contains(std::span<const ChunkId> ids, std::span<bool> out) override;
    Result<ChunkLocation> resolve(const ChunkId& id, std::optional<PageAddress> hint) override;
    Result<void> read(PageAddress address, std::span<const iovec> into, bool no_wait) override;
    Result<ObjectBytes> get_object(const ChunkId& id, std::optional<PageAddress> hint) override;
    std::optional<PageAddress> object_address(const ChunkId& id) override;
    void prefetch(PageAddress address, uint32_t pages) override;
    Result<void> checkpoint(uint64_t sequence, Bytes payload) override;
    uint64_t bytes_since_checkpoint() const override;
    StoreStats stats() const override;
    const std::string& directory() const override { return directory_; }
    std::array<uint8_t, 16> uuid() const override { return store_id_; }
    std::optional<std::string> read_only_reason() const override;
    std::vector<std::string> warnings() const override;
    Result<void> close() override;

  private:
    struct Found {
        Segment* segment = nullptr;
        Entry entry;
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
    };

    // Opening.
    Result<void> read_superblock();
    Result<void> open_segments();
    Result<void> apply_recovery(RecoveredLog& log);
    Result<void> open_index();
    Result<void> remove_leftovers();

    // Finding.
    Result<std::optional<Found>> confirm(const ChunkId& id, PageAddress address, Want want);
    Result<std::optional<Found>> probe(const ChunkId& id, Want want);
    Result<Found> find(const ChunkId& id, std::optional<PageAddress> hint, Want want);
    Result<void> probe_items(Plan& plan);
    Result<void> audit_index();
    Result<void> repair_index();
    template <typename Call>
    auto with_index(Call&& call) -> decltype(call());
    Result<void> insert_entries(uint32_t segment, std::span<const Entry> entries,
                                const std::vector<bool>* only_shards);

    // Appending; append_mutex_ is held.
    Result<void> check_batch(const WriteBatch& batch, size_t& record_bytes) const;
    static Plan make_plan(const WriteBatch& batch);
    void make_units(Plan& plan) const;
    bool fits_empty_segment(uint32_t batch_pages, size_t footer_entries) const;
    bool fits_active(uint32_t batch_pages, size_t footer_entries) const;
    Result<void> write_plan(Plan& plan, const WriteBatch& batch, size_t record_bytes,
                            uint64_t duplicate_bytes);
    Result<void> write_batch(Plan& plan, std::span<const Unit> units, const WriteBatch* records,
                             size_t record_bytes, uint64_t duplicate_bytes);
    Result<void> start_segment();
    Result<void> write_footer(const PendingFooter& footer);

    Result<void> check_usable() const;
    Result<void> check_writable() const;
    void poison(const Error& error, std::string_view what);
    void set_read_only(std::string reason);
    void warn(std::string sentence) const;

    const io::Env env_;
    io::FileSystem& files_;
    const std::string directory_;
    const StoreOptions options_;
    const uint32_t segment_pages_;
    std::unique_ptr<io::FileLock> lock_;
    std::shared_ptr<io::File> superblock_file_;
    StoreId store_id_{};
    std::unique_ptr<SegmentSet> segments_;
    std::unique_ptr<ChunkIndex> index_;
    std::atomic<bool> replayed_ = false;
    std::atomic<bool> closed_ = false;
    std::atomic<bool> writable_ = true;

    std::mutex checkpoint_mutex_;  ///< One checkpoint at a time; guards superblock_ after open.
    SuperblockSlot superblock_{};
    uint64_t index_bytes_written_ = 0;
    uint64_t appended_at_index_ = 0;  ///< appended_bytes when the index file was written.

    std::mutex append_mutex_;  ///< Layout and write of batches: one at a time, in sequence order.
    Active active_;
    uint32_t last_segment_ = 0;

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
    Counters checkpoint_counters_;
    uint64_t pending_duplicate_bytes_ = 0;  ///< Not yet written into a batch header.
    std::deque<BatchPosition> batches_;     ///< Those after the checkpoint.
    std::vector<Unsynced> unsynced_;
    uint64_t segments_created_ = 0;
    uint64_t segments_created_synced_ = 0;
    std::vector<PendingFooter> pending_footers_;  ///< Not yet written, or not yet synced.
    std::optional<std::string> read_only_reason_;
    mutable std::vector<std::string> warnings_;
};

// ---- Creating and opening ---------------------------------------------------------------------

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
    for (const io::DirectoryEntry& entry : entries) {
        // What an interrupted creation leaves behind; the superblock's name comes last.
        if (entry.name == kSegmentsName && entry.is_directory) {
            STELLARIUM_ASSIGN(const auto inside, files.list(join(directory, kSegmentsName)));
            if (inside.empty()) {
                continue;
            }
        }
        if (entry.name == kNewSuperblockName || entry.name == kLockName) {
            continue;
        }
        return fail(ErrorCode::kAlreadyExists,
                    entry.name == kSuperblockName
                        ? fmt::format("{} already holds a store", directory)
                        : fmt::format("{} is not empty (it has '{}'): a store needs a directory of "
                                      "its own",
                                      directory, entry.name));
    }
    STELLARIUM_ASSIGN(const auto lock, files.lock(join(directory, kLockName)));
    const std::string segments = join(directory, kSegmentsName);
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
    const std::string new_superblock = join(directory, kNewSuperblockName);
    STELLARIUM_ASSIGN(const auto file, files.open(new_superblock, io::OpenMode::kCreate));
    STELLARIUM_TRY(file->truncate(0));
    STELLARIUM_TRY(io::write_all(*file, Bytes(bytes), 0));
    STELLARIUM_TRY(file->datasync());
    STELLARIUM_TRY(files.sync_directory(segments));
    STELLARIUM_TRY(files.rename(new_superblock, join(directory, kSuperblockName)));
    STELLARIUM_TRY(files.sync_directory(directory));
    return files.sync_directory(parent_of(directory));
}

Result<std::unique_ptr<Store>> Store::open(const io::Env& env, const std::string& directory,
                                           const StoreOptions& options) {
    STELLARIUM_TRY(check_options(options));
    auto store = std::make_unique<StoreImpl>(env, directory, options);
    STELLARIUM_TRY(store->open());
    return store;
}

Result<void> StoreImpl::open() {
    STELLARIUM_ASSIGN(const bool there, files_.exists(join(directory_, kSuperblockName)));
    if (!there) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("{} holds no store (there is no superblock): create one with "
                                "'stellarctl init'",
                                directory_));
    }
    STELLARIUM_TRY(check_file_system(env_, directory_, options_, warnings_));
    if (options_.read_only) {
        set_read_only("it was opened read-only");
    } else {
        STELLARIUM_ASSIGN(lock_, files_.lock(join(directory_, kLockName)));
    }
    STELLARIUM_TRY(read_superblock());
    segments_ = std::make_unique<SegmentSet>(files_, directory_, store_id_);
    STELLARIUM_TRY(open_segments());
    STELLARIUM_TRY(open_index());
    return remove_leftovers();
}

Result<void> StoreImpl::read_superblock() {
    const std::string path = join(directory_, kSuperblockName);
    const auto mode = options_.read_only ? io::OpenMode::kReadOnly : io::OpenMode::kReadWrite;
    STELLARIUM_ASSIGN(superblock_file_, files_.open(path, mode));
    std::vector<std::byte> page(kPageBytes);
    std::optional<SuperblockSlot> newest;
    std::vector<std::string> damage;
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
        } else if (!newest || slot->generation > newest->generation) {
            newest = *slot;
        }
    }
    if (!newest) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("no copy of the superblock is valid: {}; if this is a store, "
                                "restore the file from a backup",
                                damage.front()));
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
    for (std::string& sentence : damage) {
        warn(fmt::format("{}; another copy is used", sentence));
    }
    superblock_ = *newest;
    store_id_ = newest->store_id;
    return {};
}

Result<void> StoreImpl::open_segments() {
    const std::string directory = join(directory_, kSegmentsName);
    STELLARIUM_ASSIGN(const auto entries, files_.list(directory));
    std::vector<uint32_t> numbers;
    for (const io::DirectoryEntry& entry : entries) {
        const auto number = parse_segment_file_name(entry.name);
        if (number && !entry.is_directory) {
            numbers.push_back(*number);
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
    if (may_write) {
        STELLARIUM_TRY(files_.sync_directory(directory));
    }
    STELLARIUM_ASSIGN(RecoveredLog log,
                      recover_log(files_, *segments_, store_id_, superblock_, numbers, may_write));
    return apply_recovery(log);
}

Result<void> StoreImpl::apply_recovery(RecoveredLog& log) {
    for (std::string& sentence : log.warnings) {
        warn(std::move(sentence));
    }
    if (!log.damage.empty()) {
        for (const std::string& sentence : log.damage) {
            warn(sentence);
        }
        set_read_only(fmt::format("it is damaged: {}{}", log.damage.front(),
                                  log.damage.size() == 1
                                      ? std::string()
                                      : fmt::format(" (and {} more)", log.damage.size() - 1)));
    }
    if (writable_.load()) {
        // What was never acknowledged must be gone for good before anything new is appended: a
        // stale batch that came back would look like a durable one.
        if (log.cut_tail) {
            STELLARIUM_TRY(log.tail_file->truncate(uint64_t{log.tail_page} * kPageBytes));
            STELLARIUM_TRY(log.tail_file->datasync());
        }
        for (const uint32_t number : log.drop_segments) {
            STELLARIUM_TRY(files_.remove(segments_->path(number)));
        }
        if (!log.drop_segments.empty()) {
            STELLARIUM_TRY(files_.sync_directory(join(directory_, kSegmentsName)));
        }
    }
    sequence_.store(log.last_sequence);
    durable_sequence_ = log.last_sequence;
    highest_sequence_ = log.highest_sequence;
    last_segment_ = log.last_segment;
    counters_ = log.counters;
    batches_ = std::move(log.batches);
    checkpoint_counters_.appended_bytes = superblock_.appended_bytes;
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
            static_cast<void>(write_footer(pending_footers_.back()));
        }
    }
    return {};
}

Result<void> StoreImpl::open_index() {
    uint32_t first_missing = 1;
    if (superblock_.index_generation != 0) {
        const std::string path = join(directory_, index_file_name(superblock_.index_generation));
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
            index_bytes_written_ = 0;
        }
    }
    if (index_ == nullptr) {
        index_ = std::make_unique<ChunkIndex>();
    }
    appended_at_index_ = superblock_.appended_bytes;
    for (Segment* segment : segments_->all()) {
        if (segment->number() < first_missing) {
            continue;
        }
        const auto insert = [&]() -> Result<void> {
            Result<void> inserted;
            STELLARIUM_TRY(segments_->visit_entries(*segment, [&](std::span<const Entry> entries) {
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
        if (index_file || entry.name == kNewSuperblockName) {
            STELLARIUM_TRY(files_.remove(join(directory_, entry.name)));
        }
    }
    return {};
}

// ---- State ------------------------------------------------------------------------------------

Result<void> StoreImpl::check_usable() const {
    if (closed_.load()) {
        return fail(ErrorCode::kUnavailable, fmt::format("the store {} was closed", directory_));
    }
    return {};
}

Result<void> StoreImpl::check_writable() const {
    STELLARIUM_TRY(check_usable());
    if (!writable_.load()) {
        return fail(ErrorCode::kReadOnly,
                    fmt::format("the store {} cannot be written: {}", directory_,
                                read_only_reason().value_or("unknown reason")));
    }
    if (!replayed_.load()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("the store {} must be replayed before it is written", directory_));
    }
    return {};
}

void StoreImpl::set_read_only(std::string reason) {
    const std::lock_guard guard(state_mutex_);
    writable_.store(false);
    if (!read_only_reason_) {
        read_only_reason_ = std::move(reason);
    }
}

void StoreImpl::poison(const Error& error, std::string_view what) {
    set_read_only(
        fmt::format("{} failed, so what was written since may be lost: {}; open the "
                    "store again to see what the disk holds",
                    what, error.message()));
}

void StoreImpl::warn(std::string sentence) const {
    const std::lock_guard guard(state_mutex_);
    if (warnings_.size() < kMaxWarnings) {
        warnings_.push_back(std::move(sentence));
    }
}

std::optional<std::string> StoreImpl::read_only_reason() const {
    const std::lock_guard guard(state_mutex_);
    return read_only_reason_;
}

std::vector<std::string> StoreImpl::warnings() const {
    for (std::string& sentence : segments_->take_warnings()) {
        warn(std::move(sentence));
    }
    const std::lock_guard guard(state_mutex_);
    return warnings_;
}

StoreStats StoreImpl::stats() const {
    StoreStats stats;
    {
        const std::lock_guard guard(state_mutex_);
        stats.chunks = counters_.chunks;
        stats.unique_bytes = counters_.unique_bytes;
        stats.stored_bytes = counters_.stored_bytes;
        stats.appended_bytes = counters_.appended_bytes;
        stats.duplicate_bytes = counters_.duplicate_bytes + pending_duplicate_bytes_;
        stats.sequence = sequence_.load();
        stats.durable_sequence = durable_sequence_;
    }
    stats.index_bytes = index_->memory_bytes() + index_->mapped_bytes();
    stats.segments = segments_->count();
    stats.index_misses_recovered = index_misses_recovered_.load();
    stats.chunks_verified = segments_->chunks_verified();
    return stats;
}

uint64_t StoreImpl::bytes_since_checkpoint() const {
    const std::lock_guard guard(state_mutex_);
    return counters_.appended_bytes - checkpoint_counters_.appended_bytes;
}

Result<void> StoreImpl::replay(ReplaySink& sink) {
    STELLARIUM_TRY(check_usable());
    assert(!replayed_.load());
    for (const BatchPosition& position : batches_) {
        if (position.records == 0) {
            continue;
        }
        Segment* segment = segments_->find(position.segment);
        STELLARIUM_ASSIGN(const auto file, segments_->file(*segment));
        STELLARIUM_ASSIGN(const auto bytes,
                          read_batch_header(*file, store_id_, position.segment, position.page));
        STELLARIUM_ASSIGN(const BatchView view,
                          decode_batch(bytes, store_id_, position.segment, position.page));
        STELLARIUM_TRY(view.for_each_record([&](uint16_t kind, Bytes payload) {
            return sink.replay(position.sequence, kind, payload);
        }));
    }
    replayed_.store(true);
    return {};
}

Result<void> StoreImpl::close() {
    STELLARIUM_TRY(check_usable());
    Result<void> synced;
    if (writable_.load()) {
        synced = sync(sequence());
    }
    const std::lock_guard append_guard(append_mutex_);
    closed_.store(true);
    lock_.reset();
    return synced;
}

// ---- Finding ----------------------------------------------------------------------------------

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

Result<void> StoreImpl::insert_entries(uint32_t segment, std::span<const Entry> entries,
                                       const std::vector<bool>* only_shards) {
    std::vector<ChunkIndex::Entry> pairs;
    pairs.reserve(entries.size());
    for (const Entry& entry : entries) {
        if (entry.entry_kind() == EntryKind::kPack ||
            (only_shards != nullptr && !(*only_shards)[ChunkIndex::shard_of(entry.id)])) {
            continue;
        }
        pairs.push_back({entry.id, PageAddress::make(segment, entry.page.get())});
    }
    return index_->insert_many(pairs);
}

Result<void> StoreImpl::repair_index() {
    const std::lock_guard guard(repair_mutex_);
    while (true) {
        const std::vector<uint32_t> damaged = index_->clear_damaged();
        if (damaged.empty()) {
            return {};
        }
        warn(
            fmt::format("{}: {} damaged shards of the index (the first is {}) are rebuilt from the "
                        "segments",
                        directory_, damaged.size(), damaged.front()));
        std::vector<bool> shards(kIndexShards, false);
        for (const uint32_t shard : damaged) {
            shards[shard] = true;
        }
        for (Segment* segment : segments_->all()) {
            Result<void> inserted;
            STELLARIUM_TRY(segments_->visit_entries(*segment, [&](std::span<const Entry> entries) {
                inserted = insert_entries(segment->number(), entries, &shards);
            }));
            STELLARIUM_TRY(std::move(inserted));
        }
    }
}

Result<std::optional<StoreImpl::Found>> StoreImpl::confirm(const ChunkId& id, PageAddress address,
                                                           Want want) {
    Segment* segment = address ? segments_->find(address.segment()) : nullptr;
    if (segment == nullptr) {
        return std::nullopt;
    }
    STELLARIUM_ASSIGN(const auto entry, segments_->entry_at(*segment, address.page(), id));
    if (!entry || (want == Want::kPages && !entry->page_addressable())) {
        return std::nullopt;
    }
    return Found{segment, *entry};
}

Result<std::optional<StoreImpl::Found>> StoreImpl::probe(const ChunkId& id, Want want) {
    std::vector<PageAddress> candidates;
    STELLARIUM_TRY(with_index([&]() -> Result<void> {
        candidates.clear();
        return index_->candidates(id, candidates);
    }));
    for (const PageAddress address : candidates) {
        STELLARIUM_ASSIGN(auto found, confirm(id, address, want));
        if (found) {
            return found;
        }
    }
    return std::nullopt;
}

Result<StoreImpl::Found> StoreImpl::find(const ChunkId& id, std::optional<PageAddress> hint,
                                         Want want) {
    if (hint) {
        STELLARIUM_ASSIGN(auto found, confirm(id, *hint, want));
        if (found) {
            return *found;
        }
    }
    STELLARIUM_ASSIGN(auto found, probe(id, want));
    if (!found && !index_audited_.load()) {
        STELLARIUM_TRY(with_index([&] { return audit_index(); }));
        STELLARIUM_ASSIGN(found, probe(id, want));
    }
    if (found) {
        return *found;
    }
    // A segment whose entries could not all be read may have held it.
    for (Segment* segment : segments_->all()) {
        if (const std::string damage = segments_->metadata_damage(*segment); !damage.empty()) {
            return fail(ErrorCode::kCorrupt,
                        fmt::format("chunk {} is not stored, or was lost in a damaged segment: {}",
                                    id.hex(), damage));
        }
    }
    return fail(ErrorCode::kNotFound, fmt::format("chunk {} is not stored", id.hex()));
}

/// The index should have every entry of every segment. A miss makes us look once, through all of
/// them, and put in what is missing; afterwards a miss is an answer.
Result<void> StoreImpl::audit_index() {
    const std::lock_guard guard(repair_mutex_);
    if (index_audited_.load()) {
        return {};
    }
    uint64_t recovered = 0;
    for (Segment* segment : segments_->all()) {
        Result<void> inserted;
        STELLARIUM_TRY(segments_->visit_entries(*segment, [&](std::span<const Entry> entries) {
            for (const Entry& entry : entries) {
                if (entry.entry_kind() == EntryKind::kPack) {
                    continue;
                }
                const auto added = index_->insert(
                    entry.id, PageAddress::make(segment->number(), entry.page.get()));
                if (!added) {
                    inserted = std::unexpected(added.error());
                    return;
                }
                recovered += *added ? 1 : 0;
            }
        }));
        STELLARIUM_TRY(std::move(inserted));
    }
    if (recovered > 0) {
        index_misses_recovered_.fetch_add(recovered);
        warn(fmt::format("{} chunks were missing in the index and were found in the segments",
                         recovered));
    }
    index_audited_.store(true);
    return {};
}

Result<void> StoreImpl::contains(std::span<const ChunkId> ids, std::span<bool> out) {
    assert(ids.size() == out.size());
    STELLARIUM_TRY(check_usable());
    std::ranges::fill(out, false);
    std::vector<ChunkIndex::Match> matches;
    STELLARIUM_TRY(with_index([&]() -> Result<void> {
        matches.clear();
        return index_->find_many(ids, matches);
    }));
    for (const ChunkIndex::Match& match : matches) {
        if (!out[match.id_index]) {
            STELLARIUM_ASSIGN(const auto found,
                              confirm(ids[match.id_index], match.address, Want::kAny));
            out[match.id_index] = found.has_value();
        }
    }
    return {};
}

Result<ChunkLocation> StoreImpl::resolve(const ChunkId& id, std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_usable());
    STELLARIUM_ASSIGN(const Found found, find(id, hint, Want::kPages));
    return ChunkLocation{found.address(), static_cast<uint8_t>(found.entry.pages())};
}

Result<void> StoreImpl::read(PageAddress address, std::span<const iovec> into, bool no_wait) {
    STELLARIUM_TRY(check_usable());
    Segment* segment = segments_->find(address.segment());
    if (segment == nullptr) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("there is no segment {}", address.segment()));
    }
    return segments_->read_pages(*segment, address.page(), into,
                                 options_.verify_always ? ReadCheck::kAlways : ReadCheck::kFirst,
                                 no_wait);
}

Result<ObjectBytes> StoreImpl::get_object(const ChunkId& id, std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_usable());
    STELLARIUM_ASSIGN(const Found found, find(id, hint, Want::kAny));
    ObjectBytes out;
    STELLARIUM_TRY(segments_->read_object(*found.segment, found.entry, out.content, out.aux));
    return out;
}

std::optional<PageAddress> StoreImpl::object_address(const ChunkId& id) {
    if (!check_usable()) {
        return std::nullopt;
    }
    const auto found = probe(id, Want::kAny);
    return found && *found ? std::optional((*found)->address()) : std::nullopt;
}

void StoreImpl::prefetch(PageAddress address, uint32_t pages) {
    Segment* segment = closed_.load() ? nullptr : segments_->find(address.segment());
    if (segment == nullptr) {
        return;
    }
    if (const auto file = segments_->file(*segment)) {
        (*file)->read_ahead(address.offset_bytes(), uint64_t{pages} * kPageBytes);
    }
}

// ---- Appending --------------------------------------------------------------------------------

Result<void> StoreImpl::check_batch(const WriteBatch& batch, size_t& record_bytes) const {
    record_bytes = 0;
    for (const WriteBatch::Record& record : batch.records_) {
        record_bytes += sizeof(RecordHeader) + record.payload.size();
    }
    if (record_bytes > kMaxRecordBytes ||
        !fits_empty_segment(batch_header_pages(0, record_bytes), 0)) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("{} bytes of records in one append are more than {} or more than "
                                "fits into a segment: use several",
                                record_bytes, kMaxRecordBytes));
    }
    for (const WriteBatch::Chunk& chunk : batch.chunks_) {
        if (chunk.pages.empty() || chunk.pages.size() % kPageBytes != 0 ||
            chunk.pages.size() > kMaxChunkBytes) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("chunk {} of {} bytes is not 1 to {} whole pages",
                                    chunk.id.hex(), chunk.pages.size(), kMaxChunkPages));
        }
    }
    for (const WriteBatch::Object& object : batch.objects_) {
        if (object.content.size() + object.aux.size() > kMaxObjectBytes) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("object {} of {} + {} bytes is longer than {}", object.id.hex(),
                                    object.content.size(), object.aux.size(), kMaxObjectBytes));
        }
    }
    return {};
}

Plan StoreImpl::make_plan(const WriteBatch& batch) {
    // An object alone wastes half a page on average; below this length packing pays.
    constexpr size_t kMinLoneObjectBytes = kMaxChunkBytes / 2;
    Plan plan;
    plan.items.reserve(batch.chunks_.size() + batch.objects_.size());
    plan.chunk_items.reserve(batch.chunks_.size());
    std::unordered_map<ChunkId, size_t, Hash256Hasher> known;
    known.reserve(batch.chunks_.size() + batch.objects_.size());
    for (const WriteBatch::Chunk& chunk : batch.chunks_) {
        const auto [it, is_new] = known.try_emplace(chunk.id, plan.items.size());
        if (is_new) {
            plan.items.push_back({.id = chunk.id, .content = chunk.pages});
        }
        plan.chunk_items.push_back(it->second);
    }
    for (const WriteBatch::Object& object : batch.objects_) {
        if (known.try_emplace(object.id, plan.items.size()).second) {
            const bool alone = object.aux.empty() && object.content.size() >= kMinLoneObjectBytes;
            plan.items.push_back({.id = object.id,
                                  .content = object.content,
                                  .aux = object.aux,
                                  .kind = alone ? EntryKind::kObject : EntryKind::kMember});
        }
    }
    return plan;
}

Result<void> StoreImpl::probe_items(Plan& plan) {
    std::vector<ChunkId> ids;
    std::vector<size_t> items;
    for (size_t i = 0; i < plan.items.size(); ++i) {
        if (!plan.items[i].stored) {
            ids.push_back(plan.items[i].id);
            items.push_back(i);
        }
    }
    std::vector<ChunkIndex::Match> matches;
    STELLARIUM_TRY(with_index([&]() -> Result<void> {
        matches.clear();
        return index_->find_many(ids, matches);
    }));
    for (const ChunkIndex::Match& match : matches) {
        Item& item = plan.items[items[match.id_index]];
        if (item.stored) {
            continue;
        }
        const Want want = item.kind == EntryKind::kChunk ? Want::kPages : Want::kAny;
        STELLARIUM_ASSIGN(const auto found, confirm(item.id, match.address, want));
        if (found) {
            item.stored = true;
            item.address = found->address();
        }
    }
    return {};
}

void StoreImpl::make_units(Plan& plan) const {
    plan.units.clear();
    plan.packs.clear();
    PackBuilder builder;
    std::vector<size_t> members;
    const auto finish_pack = [&] {
        if (builder.empty()) {
            return;
        }
        plan.packs.push_back(builder.finish());
        const Bytes bytes(plan.packs.back());
        plan.units.push_back({.kind = EntryKind::kPack,
                              .id = hash(bytes),
                              .bytes = bytes,
                              .members = std::exchange(members, {})});
    };
    for (size_t i = 0; i < plan.items.size(); ++i) {
        const Item& item = plan.items[i];
        if (item.stored) {
            continue;
        }
        if (item.kind != EntryKind::kMember) {
            plan.units.push_back(
                {.kind = item.kind, .id = item.id, .bytes = item.content, .item = i});
            continue;
        }
        if (!builder.add(item.id, item.content, item.aux)) {
            finish_pack();
            [[maybe_unused]] const bool fits = builder.add(item.id, item.content, item.aux);
            assert(fits);
        }
        members.push_back(i);
    }
    finish_pack();
}

bool StoreImpl::fits_empty_segment(uint32_t batch_pages, size_t footer_entries) const {
    return 1 + batch_pages + footer_pages(footer_entries) <= segment_pages_;
}

bool StoreImpl::fits_active(uint32_t batch_pages, size_t footer_entries) const {
    return active_.segment != nullptr &&
           active_.end_page + batch_pages + footer_pages(active_.entries + footer_entries) <=
               segment_pages_;
}

Result<Appended> StoreImpl::append(WriteBatch& batch) {
    STELLARIUM_TRY(check_writable());
    size_t record_bytes = 0;
    STELLARIUM_TRY(check_batch(batch, record_bytes));
    Plan plan = make_plan(batch);
    const uint64_t probed_at = sequence();
    STELLARIUM_TRY(probe_items(plan));
    make_units(plan);

    const std::lock_guard guard(append_mutex_);
    STELLARIUM_TRY(check_writable());
    if (sequence() != probed_at && !plan.units.empty()) {
        // Somebody appended in between, perhaps the same chunks.
        const auto missing = std::ranges::count(plan.items, false, &Item::stored);
        STELLARIUM_TRY(probe_items(plan));
        if (std::ranges::count(plan.items, false, &Item::stored) != missing) {
            make_units(plan);
        }
    }
    Appended out;
    for (const Item& item : plan.items) {
        if (!item.stored) {
            out.new_bytes += item.content.size();
        }
    }
    uint64_t chunk_bytes = 0;
    for (const WriteBatch::Chunk& chunk : batch.chunks_) {
        chunk_bytes += chunk.pages.size();
    }
    for (const Item& item : plan.items) {
        if (item.kind == EntryKind::kChunk && !item.stored) {
            chunk_bytes -= item.content.size();
        }
    }
    out.duplicate_bytes = chunk_bytes;
    if (!plan.units.empty() || !batch.records_.empty()) {
        STELLARIUM_TRY(write_plan(plan, batch, record_bytes, out.duplicate_bytes));
    } else {
        const std::lock_guard state_guard(state_mutex_);
        pending_duplicate_bytes_ += out.duplicate_bytes;
    }
    out.sequence = sequence();
    out.locations.reserve(plan.chunk_items.size());
    for (size_t i = 0; i < plan.chunk_items.size(); ++i) {
        const Item& item = plan.items[plan.chunk_items[i]];
        out.locations.push_back(
            {item.address, static_cast<uint8_t>(pages_for(item.content.size()))});
    }
    return out;
}

Result<void> StoreImpl::write_plan(Plan& plan, const WriteBatch& batch, size_t record_bytes,
                                   uint64_t duplicate_bytes) {
    std::span<const Unit> rest(plan.units);
    bool records_written = batch.records_.empty();
    while (!rest.empty() || !records_written) {
        size_t take = 0;
        uint32_t data_pages = 0;
        size_t footer_entries = 0;
        for (; take < rest.size(); ++take) {
            const uint32_t more_pages = data_pages + rest[take].pages();
            const size_t more_entries = footer_entries + rest[take].footer_entries();
            if (more_pages > kMaxBatchDataPages ||
                !fits_empty_segment(batch_header_pages(take + 1, 0) + more_pages, more_entries)) {
                break;
            }
            data_pages = more_pages;
            footer_entries = more_entries;
        }
        if (take == 0 && !rest.empty()) {
            return fail(
                ErrorCode::kLimitExceeded,
                fmt::format("a pack with {} objects does not fit into a segment of {}",
                            rest.front().members.size(), format_size(options_.segment_bytes)));
        }
        const bool with_records =
            take == rest.size() && !records_written &&
            fits_empty_segment(batch_header_pages(take, record_bytes) + data_pages, footer_entries);
        const uint32_t pages =
            batch_header_pages(take, with_records ? record_bytes : 0) + data_pages;
        if (!fits_active(pages, footer_entries)) {
            STELLARIUM_TRY(start_segment());
        }
        STELLARIUM_TRY(write_batch(plan, rest.first(take), with_records ? &batch : nullptr,
                                   with_records ? record_bytes : 0, duplicate_bytes));
        duplicate_bytes = 0;
        rest = rest.subspan(take);
        records_written = records_written || with_records;
    }
    return {};
}

Result<void> StoreImpl::write_batch(Plan& plan, std::span<const Unit> units,
                                    const WriteBatch* records, size_t record_bytes,
                                    uint64_t duplicate_bytes) {
    static constexpr std::array<std::byte, kPageBytes> kZeroPage{};
    const uint32_t header_pages = batch_header_pages(units.size(), record_bytes);
    std::vector<std::byte> header_bytes(header_pages * kPageBytes);
    BatchHeader header{};
    header.store_id = store_id_;
    header.segment = active_.segment->number();
    header.page = active_.end_page;
    header.header_pages = header_pages;
    header.entries = static_cast<uint32_t>(units.size());
    header.record_bytes = static_cast<uint32_t>(record_bytes);
    {
        const std::lock_guard guard(state_mutex_);
        header.previous_sequence = sequence_.load();
        header.sequence = highest_sequence_ + 1;
        header.durable_through = durable_sequence_;
        header.duplicate_bytes = pending_duplicate_bytes_ + duplicate_bytes;
    }

    std::vector<iovec> buffers{iovec_of(header_bytes)};
    std::vector<Entry> entries;       // With members, for the segment's table and the index.
    std::vector<PageAddress> placed;  // Of the units.
    uint32_t page = active_.end_page + header_pages;
    size_t at = sizeof(BatchHeader);
    for (const Unit& unit : units) {
        Entry entry{};
        entry.id = unit.id;
        entry.page = static_cast<uint16_t>(page);
        entry.length = static_cast<uint32_t>(unit.bytes.size());
        entry.kind = static_cast<uint8_t>(unit.kind);
        std::memcpy(header_bytes.data() + at, &entry, sizeof(entry));
        at += sizeof(entry);
        entries.push_back(entry);
        if (unit.kind == EntryKind::kPack) {
            const auto pack = decode_pack(unit.bytes);
            assert(pack && pack->entries.size() == unit.members.size());
            append_member_entries(*pack, page, entries);
        }
        placed.push_back(PageAddress::make(active_.segment->number(), page));
        buffers.push_back(iovec_of(unit.bytes));
        const size_t padding = unit.pages() * kPageBytes - unit.bytes.size();
        if (padding > 0) {
            buffers.push_back(iovec_of(Bytes(kZeroPage).first(padding)));
        }
        page += unit.pages();
    }
    const uint32_t end_page = page;
    header.data_pages = end_page - active_.end_page - header_pages;
    if (records != nullptr) {
        header.records = static_cast<uint32_t>(records->records_.size());
        for (const WriteBatch::Record& record : records->records_) {
            RecordHeader record_header{};
            record_header.kind = record.kind;
            record_header.length = static_cast<uint32_t>(record.payload.size());
            std::memcpy(header_bytes.data() + at, &record_header, sizeof(record_header));
            at += sizeof(record_header);
            if (!record.payload.empty()) {
                std::memcpy(header_bytes.data() + at, record.payload.data(), record.payload.size());
            }
            at += record.payload.size();
        }
    }
    std::memcpy(header_bytes.data(), &header, sizeof(header));
    seal_batch(header_bytes);

    const uint64_t offset = uint64_t{active_.end_page} * kPageBytes;
    if (auto written = io::write_all(*active_.file, std::move(buffers), offset); !written) {
        // The batch is not there. Its bytes go now if they can; else the next batch goes over them,
        // and a footer cuts off the rest.
        static_cast<void>(active_.file->truncate(offset));
        return written;
    }

    // Visible from here on: entries first, then the index that leads to them.
    segments_->append_entries(*active_.segment, entries);
    for (const Entry& entry : entries) {
        if (entry.entry_kind() != EntryKind::kMember) {
            active_.segment->set_verified(entry.page, entry.pages());
        }
    }
    STELLARIUM_TRY(
        with_index([&] { return insert_entries(active_.segment->number(), entries, nullptr); }));
    for (size_t i = 0; i < units.size(); ++i) {
        if (units[i].kind != EntryKind::kPack) {
            plan.items[units[i].item].stored = true;
            plan.items[units[i].item].address = placed[i];
        }
    }
    active_.entries += entries.size();
    if (active_.first_sequence == 0) {
        active_.first_sequence = header.sequence;
    }
    active_.last_sequence = header.sequence;

    const std::lock_guard guard(state_mutex_);
    batches_.push_back({.sequence = header.sequence,
                        .segment = active_.segment->number(),
                        .page = active_.end_page,
                        .records = header.records,
                        .before = counters_});
    if (active_.end_page == 1) {
        counters_.add_pages(1);
    }
    counters_.add_batch(end_page - active_.end_page, entries, header.duplicate_bytes);
    pending_duplicate_bytes_ = 0;
    if (unsynced_.empty() || unsynced_.back().segment != active_.segment->number()) {
        unsynced_.push_back({.file = active_.file, .segment = active_.segment->number()});
    }
    unsynced_.back().last_sequence = header.sequence;
    active_.end_page = end_page;
    highest_sequence_ = header.sequence;
    sequence_.store(header.sequence, std::memory_order_release);
    return {};
}

Result<void> StoreImpl::start_segment() {
    if (last_segment_ >= PageAddress::kMaxSegment) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("the store {} has used all {} segment numbers", directory_,
                                PageAddress::kMaxSegment));
    }
    const uint32_t number = last_segment_ + 1;
    const std::string path = segments_->path(number);
    // kCreate: the remains of an attempt that failed may be there.
    STELLARIUM_ASSIGN(std::shared_ptr<io::File> file, files_.open(path, io::OpenMode::kCreate));
    STELLARIUM_TRY(file->truncate(0));
    const SegmentHeader header = make_segment_header(store_id_, number, highest_sequence_ + 1);
    if (auto written = io::write_all(*file, bytes_of(header), 0); !written) {
        // Best effort: an empty segment file is removed by the next open otherwise.
        static_cast<void>(files_.remove(path));
        return written;
    }
    last_segment_ = number;

    std::optional<PendingFooter> footer;
    if (active_.segment != nullptr && active_.first_sequence != 0) {
        footer = {.file = active_.file,
                  .segment = active_.segment,
                  .end_page = active_.end_page,
                  .first_sequence = active_.first_sequence,
                  .last_sequence = active_.last_sequence};
        // Derived data: when the disk is full it stays in memory, and is tried again later.
        static_cast<void>(write_footer(*footer));
    }
    const size_t closed_entries = active_.entries;
    active_ = {.segment = &segments_->add_in_memory(number, file, {}), .file = file, .end_page = 1};

    const std::lock_guard guard(state_mutex_);
    ++segments_created_;
    if (footer) {
        pending_footers_.push_back(*footer);
        counters_.add_pages(footer_pages(closed_entries));
    }
    return {};
}

Result<void> StoreImpl::write_footer(const PendingFooter& footer) {
    if (segments_->use_footer(*footer.segment, footer.end_page)) {
        return {};
    }
    const std::vector<Entry> entries = segments_->entries_in_memory(*footer.segment);
    const std::vector<std::byte> bytes =
        encode_footer(store_id_, footer.segment->number(), footer.end_page, entries,
                      footer.first_sequence, footer.last_sequence);
    const uint64_t offset = uint64_t{footer.end_page} * kPageBytes;
    // A footer is found from the file's end, so nothing may lie behind it.
    STELLARIUM_TRY(footer.file->truncate(offset));
    if (auto written = io::write_all(*footer.file, Bytes(bytes), offset); !written) {
        static_cast<void>(footer.file->truncate(offset));
        return written;
    }
    static_cast<void>(segments_->use_footer(*footer.segment, footer.end_page));
    return {};
}

// ---- Syncing ----------------------------------------------------------------------------------

Result<void> StoreImpl::sync(uint64_t sequence) {
    STELLARIUM_TRY(check_usable());
    std::unique_lock lock(state_mutex_);
    if (sequence > sequence_.load()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("batch {} was never appended: the last one is {}", sequence,
                                sequence_.load()));
    }
    while (durable_sequence_ < sequence) {
        if (!writable_.load()) {
            return fail(ErrorCode::kReadOnly,
                        fmt::format("batch {} cannot be made durable: {}", sequence,
                                    read_only_reason_.value_or("the store is read-only")));
        }
        if (sync_running_) {
            sync_done_.wait(lock);
            continue;
        }
        // This thread syncs for everybody who waits by now.
        sync_running_ = true;
        const uint64_t through = sequence_.load();
        const uint64_t created = segments_created_;
        const bool sync_names = created != segments_created_synced_;
        const std::vector<Unsynced> unsynced = unsynced_;
        lock.unlock();
        Result<void> done;
        for (const Unsynced& segment : unsynced) {
            done = segment.file->datasync();
            if (!done) {
                break;
            }
        }
        if (done && sync_names) {
            done = files_.sync_directory(join(directory_, kSegmentsName));
        }
        if (!done) {
            poison(done.error(), "a sync of the log");
        }
        lock.lock();
        sync_running_ = false;
        if (done) {
            durable_sequence_ = through;
            segments_created_synced_ = created;
            std::erase_if(unsynced_, [through](const Unsynced& segment) {
                return segment.last_sequence <= through;
            });
        }
        sync_done_.notify_all();
        if (!done) {
            return std::unexpected(done.error().with_context(
                fmt::format("batch {} cannot be made durable", sequence)));
        }
    }
    return {};
}

Result<void> StoreImpl::checkpoint(uint64_t sequence, Bytes payload) {
    STELLARIUM_TRY(check_writable());
    if (payload.size() > kMaxCheckpointPayload) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("a checkpoint payload of {} bytes is longer than {}",
                                payload.size(), kMaxCheckpointPayload));
    }
    const std::lock_guard checkpoint_guard(checkpoint_mutex_);
    if (sequence > this->sequence() || sequence < superblock_.sequence) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a checkpoint at batch {} is not between the last checkpoint ({}) "
                                "and the last batch ({})",
                                sequence, superblock_.sequence.get(), this->sequence()));
    }
    STELLARIUM_TRY(sync(this->sequence()));

    std::vector<PendingFooter> footers;
    {
        const std::lock_guard guard(state_mutex_);
        footers = pending_footers_;
    }
    for (const PendingFooter& footer : footers) {
        STELLARIUM_TRY(write_footer(footer));
        if (auto synced = footer.file->datasync(); !synced) {
            poison(synced.error(), "a sync of the log");
            return synced;
        }
    }
    {
        const std::lock_guard guard(state_mutex_);
        pending_footers_.erase(
            pending_footers_.begin(),
            pending_footers_.begin() + static_cast<std::ptrdiff_t>(footers.size()));
    }

    SuperblockSlot slot = superblock_;
    uint64_t appended = 0;
    uint32_t position_segment = 0;
    {
        const std::lock_guard append_guard(append_mutex_);
        const std::lock_guard guard(state_mutex_);
        appended = counters_.appended_bytes;
        // The entries of all segments below the active one are in the index by now.
        position_segment =
            active_.segment != nullptr ? active_.segment->number() : last_segment_ + 1;
    }
    const uint64_t grown = appended - appended_at_index_;
    const bool write_index =
        slot.index_generation == 0
            ? grown > 0
            : grown >= std::min(kMaxLogBytesBeyondIndex,
                                index_bytes_written_ * options_.index_rewrite_factor);
    std::string new_index;
    uint64_t new_index_bytes = index_bytes_written_;
    if (write_index) {
        slot.index_generation = slot.index_generation + 1;
        slot.index_segment = position_segment;
        new_index = join(directory_, index_file_name(slot.index_generation));
        auto written = with_index([&]() -> Result<void> {
            STELLARIUM_ASSIGN(const auto file, files_.open(new_index, io::OpenMode::kCreate));
            STELLARIUM_TRY(
                index_->write_checkpoint(*file, {.store_uuid = store_id_, .sequence = sequence}));
            STELLARIUM_ASSIGN(new_index_bytes, file->size_bytes());
            return files_.sync_directory(directory_);
        });
        if (!written) {
            static_cast<void>(files_.remove(new_index));
            return written;
        }
    }

    {
        const std::lock_guard append_guard(append_mutex_);
        const std::lock_guard guard(state_mutex_);
        // The first batch that the next open has to read, and the counters before it.
        const auto after = std::ranges::find_if(
            batches_, [sequence](const BatchPosition& batch) { return batch.sequence > sequence; });
        if (after != batches_.begin()) {
            slot.sequence = (after - 1)->sequence;
        }
        if (after == batches_.end()) {
            counters_.duplicate_bytes += std::exchange(pending_duplicate_bytes_, 0);
        }
        const Counters& counters = after == batches_.end() ? counters_ : after->before;
        slot.chunks = counters.chunks;
        slot.unique_bytes = counters.unique_bytes;
        slot.stored_bytes = counters.stored_bytes;
        slot.appended_bytes = counters.appended_bytes;
        slot.duplicate_bytes = counters.duplicate_bytes;
        if (after != batches_.end()) {
            slot.log_segment = after->segment;
            slot.log_page = after->page;
        } else if (active_.segment != nullptr) {
            slot.log_segment = active_.segment->number();
            slot.log_page = active_.end_page;
        } else {
            slot.log_segment = last_segment_ + 1;
            slot.log_page = 1;
        }
        slot.durable_sequence = durable_sequence_;
        slot.highest_sequence = highest_sequence_;
        slot.last_segment = last_segment_;
    }
    slot.generation = slot.generation + 1;
    slot.payload = {};
    slot.payload_bytes = static_cast<uint32_t>(payload.size());
    if (!payload.empty()) {
        std::memcpy(slot.payload.data(), payload.data(), payload.size());
    }
    seal(slot);
    std::vector<std::byte> pair;
    for (int copy = 0; copy < 2; ++copy) {
        const Bytes bytes = bytes_of(slot);
        pair.insert(pair.end(), bytes.begin(), bytes.end());
    }
    const uint64_t offset = 2 * (slot.generation % 2) * kPageBytes;
    STELLARIUM_TRY(io::write_all(*superblock_file_, Bytes(pair), offset));
    if (auto synced = superblock_file_->datasync(); !synced) {
        poison(synced.error(), "a sync of the superblock");
        return synced;
    }

    const uint32_t old_index = superblock_.index_generation;
    superblock_ = slot;
    if (write_index) {
        index_bytes_written_ = new_index_bytes;
        appended_at_index_ = appended;
        if (old_index != 0) {
            // Left behind, it costs space until the next open.
            static_cast<void>(files_.remove(join(directory_, index_file_name(old_index))));
        }
    }
    const std::lock_guard guard(state_mutex_);
    checkpoint_counters_.appended_bytes = slot.appended_bytes;
    while (!batches_.empty() && batches_.front().sequence <= sequence) {
        batches_.pop_front();
    }
    return {};
}

}  // namespace stellarium::nebula
