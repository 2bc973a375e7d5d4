#include "nova/pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include <absl/container/flat_hash_map.h>
#include <fmt/format.h>

#include "nebula/reserve.h"
#include "nova/arena.h"
#include "nova/catalog.h"
#include "nova/chunk_users.h"
#include "nova/collector.h"
#include "nova/committer.h"
#include "nova/device.h"
#include "nova/folder.h"
#include "nova/format.h"
#include "nova/import.h"
#include "nova/leased_range.h"
#include "nova/leases.h"
#include "nova/limits.h"
#include "nova/reader.h"
#include "nova/records.h"
#include "nova/scrubber.h"
#include "nova/sharing.h"
#include "nova/tree.h"
#include "nova/volume.h"

namespace stellarium::nova {
namespace {

bool is_damaged_volume(const EntityPtr& entity) {
    return entity && entity->kind == EntityKind::kVolume && entity->state().damage;
}

std::string hex(const Identity& identity) {
    std::string text;
    for (const uint8_t byte : identity) {
        text += fmt::format("{:02x}", byte);
    }
    return text;
}

unsigned worker_count(unsigned asked) {
    return asked != 0 ? asked : std::clamp(std::thread::hardware_concurrency(), 1U, 8U);
}

/// Reads a leased state.
class StateReader final : public Reader {
  public:
    StateReader(nebula::Store& store, NodeCache& cache, StateLease lease)
        : store_(store), cache_(cache), lease_(std::move(lease)), state_(lease_.state()) {}

    uint64_t size_bytes() const override { return state_.size_bytes; }

    Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(uint64_t offset_bytes) override {
        return nova::next_data(store_, cache_, state_, offset_bytes);
    }

    Result<void> read(uint64_t offset_bytes, MutableBytes into) override {
        if (offset_bytes > state_.size_bytes || into.size() > state_.size_bytes - offset_bytes) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("{} bytes at offset {} reach beyond the end at {}", into.size(),
                                    offset_bytes, state_.size_bytes));
        }
        const iovec whole = to_iovec(into);
        IovecCursor cursor(std::span(&whole, 1));
        return read_state(store_, cache_, state_, offset_bytes, cursor, into.size(),
                          IoMode::kMayBlock);
    }

    Result<void> locate(uint64_t first_page, uint64_t pages,
                        const std::function<void(const StoredRun&)>& visit) override {
        return locate_state(store_, cache_, state_, first_page, pages,
                            [&](uint64_t page, nebula::PageAddress address, uint32_t count) {
                                visit({.page = page, .address = address, .pages = count});
                            });
    }

    Result<void> stage(nebula::PageAddress address, MutableBytes into) override {
        const iovec whole = to_iovec(into);
        return store_.read(address, std::span(&whole, 1), IoMode::kMayBlock);
    }

    void read_ahead(nebula::PageAddress address, uint32_t pages) override {
        store_.prefetch(address, pages);
    }

    Result<LeasedRange> lease(uint64_t first_page, uint64_t pages, size_t max_files) override {
        return lease_range(store_, cache_, state_, first_page, pages, max_files);
    }

  private:
    nebula::Store& store_;
    NodeCache& cache_;
    const StateLease lease_;
    const VolumeState& state_;
};

/// How often the collecting thread looks whether space is short.
constexpr std::chrono::seconds kSpaceCheckInterval{10};

class PoolImpl final : public Pool, public DeviceOwner {
  public:
    PoolImpl(const io::Env& env, const PoolOptions& options, std::unique_ptr<nebula::Store> store)
        : env_(env),
          options_(options),
          store_(std::move(store)),
          cache_(options.node_cache_bytes),
          catalog_(*store_, cache_),
          scrubber_(env_, *store_) {}
    ~PoolImpl() override { stop_threads(); }

    Result<void> recover();
    Result<void> close() override;

    Result<std::unique_ptr<ImageImport>> begin_import(std::string_view name) override;
    Result<EntityInfo> set_shareable(std::string_view image, bool shareable) override;
    Result<EntityInfo> create_volume(std::string_view name, uint64_t size_bytes) override;
    Result<void> clone(std::string_view source, const std::vector<std::string>& names) override;
    Result<EntityInfo> resize(std::string_view volume, uint64_t size_bytes) override;
    Result<void> rename(std::string_view from, std::string_view to) override;
    Result<void> remove(const std::vector<std::string>& names) override;

    Result<EntityInfo> create_snapshot(std::string_view volume, std::string_view snapshot) override;
    Result<void> rollback(std::string_view volume, std::string_view snapshot) override;
    Result<void> remove_snapshot(std::string_view volume, std::string_view snapshot) override;

    std::vector<EntityInfo> images() const override { return infos(EntityKind::kImage); }
    std::vector<EntityInfo> volumes() const override { return infos(EntityKind::kVolume); }
    Result<std::vector<EntityInfo>> snapshots(std::string_view volume) const override;
    Result<EntityInfo> find(std::string_view source) const override;
    Result<EntityInfo> find(uint64_t id) const override;
    Result<uint64_t> mapped_bytes(uint64_t id) override;
    Result<EntityDetail> detail(std::string_view source) override;
    Result<std::unique_ptr<Reader>> open_reader(std::string_view source) override;
    Result<void> diff(std::string_view a, std::string_view b,
                      const std::function<Result<void>(DiffRange)>& visit) override;

    Result<void> chunk_users(std::span<const ChunkId> chunks,
                             const std::function<Result<void>(const ChunkUser&)>& visit,
                             const std::function<bool()>& cancelled) override;

    Result<SharingReport> sharing(const std::function<bool()>& cancelled) override;

    Result<std::shared_ptr<BlockDevice>> attach(std::string_view source,
                                                const AttachOptions& options) override;
    Result<void> set_attachment(std::string_view source,
                                std::optional<AttachmentRecord> record) override {
        return record_attachment([this, source] { return catalog_.find(source); },
                                 std::move(record));
    }
    Result<void> set_attachment(uint64_t id, std::optional<AttachmentRecord> record) override {
        return record_attachment([this, id] { return find_by_id(id); }, std::move(record));
    }
    std::vector<AttachmentRecord> attachments() const override;

    Result<void> observe_reads(uint64_t id, std::shared_ptr<ReadObserver> observer) override;
    uint32_t waiting_reads() const override { return DeviceOwner::waiting_reads(); }
    Result<Hash256> boot_root(std::string_view source) const override;
    std::vector<std::string> images_of(const Hash256& root) const override;
    Result<std::optional<std::vector<std::byte>>> boot_manifest(const Hash256& root) override;
    Result<void> set_boot_manifest(const Hash256& root,
                                   std::optional<std::vector<std::byte>> manifest) override;
    bool has_boot_manifest(const Hash256& root) const override {
        return catalog_.boot(root).has_value();
    }
    std::vector<Hash256> boot_manifests() const override;

    PoolStats stats() const override;
    Result<void> checkpoint() override;
    Result<GcReport> gc(const GcOptions& options) override;
    Result<ScrubPass> scrub(const ScrubOptions& options) override;
    Result<DamageReport> damage(const std::function<bool()>& cancelled) override;
    std::optional<std::string> read_only_reason() const override;
    std::vector<std::string> warnings() const override;
    std::array<uint8_t, 16> uuid() const override { return store_->uuid(); }

  private:
    friend class PoolImport;

    /// A device in use. `device` is valid as long as it is listed, `owner` may have gone already.
    struct OpenDevice {
        Device* device = nullptr;
        std::weak_ptr<Device> owner;
    };

    // Recovery.
    Result<void> open_arena();
    /// `slots`: what adopt() gave.
    Result<void> adopt_foreign_arena(std::unique_ptr<Arena> arena,
                                     std::span<const Arena::Found> slots);
    void use_arena(std::unique_ptr<Arena> arena, std::span<const Arena::Found> slots,
                   const ArenaRecord& named);
    void warn_of_damage();
    Result<void> refuse_stale(const ArenaRecord& arena);
    std::unique_ptr<Committer> make_committer(Arena& arena, bool background);
    Result<ArenaOwner> arena_owner() const;
    void announce_arena();
    void stop_threads();

    Result<EntityPtr> find_by_id(uint64_t id) const;
    /// `find` is called with the operation lock held.
    Result<void> record_attachment(const std::function<Result<EntityPtr>()>& find,
                                   std::optional<AttachmentRecord> record);

    // Running volumes.
    std::shared_ptr<Volume> running(const EntityPtr& entity) const;
    std::shared_ptr<Volume> run(const EntityPtr& entity);
    std::shared_ptr<Volume> run_locked(const EntityPtr& entity);
    void close_device(const std::shared_ptr<Volume>& volume, const Device& device) override;
    void flush_device(const std::shared_ptr<Volume>& volume,
                      std::function<void(Result<void>)> done) override {
        committer_->flush_async(volume, std::move(done));
    }

    // Changes. The operation lock is held.
    Result<uint64_t> commit_on(const EntityPtr& entity, std::span<const PendingRecord> records);
    Result<uint64_t> commit_alone(std::span<const PendingRecord> records) {
        return committer_->commit({}, records);
    }
    Result<void> check_free(std::string_view name) const;
    Result<void> check_room(size_t more) const;
    Result<void> check_not_attached(const Entity& entity, std::string_view what) const;
    Result<void> check_intact(const Entity& entity) const;
    void drop_withheld(uint64_t id);
    Result<void> remove_entities(const std::vector<EntityPtr>& entities);
    uint64_t now_ns() const { return static_cast<uint64_t>(env_.clock->wall().count()); }

    /// Ends an operation: makes it durable.
    Result<void> settle(uint64_t sequence);

    // Looking.
    std::vector<EntityInfo> infos(EntityKind kind) const;
    EntityInfo info(const Entity& entity) const;
    std::vector<std::string> lineage(const Entity& entity) const;
    std::optional<std::string> attachment_label(const Entity& entity) const;
    /// The content as of now, with what is dirty. `use` says for what, for messages.
    Result<StateLease> lease_present_state(const EntityPtr& entity, std::string_view use);

    // Maintenance.
    void after_commit();
    void run_maintenance();
    Result<void> fold_where_due();
    /// What a checkpoint has made durable.
    struct Checkpoint {
        Catalog::Frozen frozen;
        std::vector<std::byte> payload;
    };
    /// checkpoint_mutex_ is held.
    Result<Checkpoint> make_checkpoint();
    Result<Collector::Published> begin_collection();
    uint64_t reclaimable_bytes(const nebula::StoreStats& store) const;
    bool is_space_low(const io::FileSystemSpace& space) const;
    void run_collections();
    bool is_collection_due();
    uint64_t damaged_chunks() const;
    Result<ScrubPass> scrub_locked(const ScrubOptions& options, double share_of_time);
    void notice_damage();
    bool is_scrub_due();
    void run_scrubs();
    void notice(const std::string& sentence) const {
        if (options_.notice) {
            options_.notice(sentence);
        }
    }
    void note_unfoldable(const Entity& entity, const Error& error);

    const io::Env env_;
    const PoolOptions options_;
    std::unique_ptr<nebula::Store> store_;
    NodeCache cache_;
    Catalog catalog_;
    StateLeases leases_;
    std::unique_ptr<Arena> arena_;
    ArenaRecord arena_record_;  ///< What the log says of it, or will with the next batch.
    std::unique_ptr<Committer> committer_;

    mutable std::mutex warnings_mutex_;
    std::vector<std::string> own_warnings_;  ///< Guarded by warnings_mutex_, but for recovery.
    std::set<uint64_t> unfoldable_;          ///< Ids that were warned of. Guarded by it.

    /// Serialises everything that changes names: checks and change are one step.
    std::mutex operations_;
    std::set<std::string, std::less<>> importing_;  ///< Names promised to imports. Guarded by it.
    /// Slots that the last process left of volumes that are damaged. Guarded by it.
    std::map<uint64_t, std::vector<Slot>> withheld_;
    /// A checkpoint says which volumes are damaged: they are from now on, whatever is repaired.
    std::atomic<bool> damage_is_recorded_ = false;

    mutable std::mutex running_mutex_;
    // Guarded by running_mutex_:
    absl::flat_hash_map<uint64_t, std::shared_ptr<Volume>> running_;
    absl::flat_hash_map<uint64_t, std::vector<OpenDevice>> devices_;

    struct MappedState {
        VolumeState state;
        uint64_t bytes = 0;
    };
    std::mutex mapped_mutex_;
    std::optional<MappedState> last_mapped_;  ///< What mapped_bytes() found last. Guarded by it.

    std::mutex checkpoint_mutex_;  ///< One checkpoint at a time.
    /// Of the newest checkpoint. Guarded by it.
    std::vector<std::byte> published_payload_;

    std::thread maintenance_;
    std::mutex maintenance_mutex_;
    std::condition_variable maintenance_work_;
    bool maintenance_due_ = false;       ///< Guarded by maintenance_mutex_.
    bool maintenance_stopping_ = false;  ///< Guarded by maintenance_mutex_.

    std::mutex collecting_;  ///< One collection at a time.
    std::thread collections_;
    mutable std::mutex gc_mutex_;
    std::condition_variable gc_work_;
    GcStats gc_stats_;            ///< Guarded by gc_mutex_.
    bool gc_stopping_ = false;    ///< Guarded by gc_mutex_.
    bool space_was_low_ = false;  ///< Of the collecting thread.
    // Of the collecting thread, monotonic: no collection before. Far past: at once.
    std::chrono::nanoseconds collect_not_before_ = std::chrono::nanoseconds::min();
    std::chrono::nanoseconds collect_for_space_not_before_ = std::chrono::nanoseconds::min();

    Scrubber scrubber_;
    std::mutex scrubbing_;  ///< One pass at a time.
    std::thread scrubs_;
    mutable std::mutex scrub_mutex_;
    std::condition_variable scrub_work_;
    bool scrub_stopping_ = false;   ///< Guarded by scrub_mutex_.
    bool scrub_scheduled_ = false;  ///< The one that runs is, and gives way. Guarded by it.
    unsigned scrubs_waiting_ = 0;   ///< For the scheduled one to stop. Guarded by it.
    // Of the scheduling thread, monotonic: no pass before.
    std::chrono::nanoseconds scrub_not_before_ = std::chrono::nanoseconds::min();

    /// Dead bytes after which the collecting thread looks again; commits wake it.
    std::atomic<uint64_t> gc_wake_bytes_{0};
};

// --- Imports -------------------------------------------------------------------------------------

class PoolImport final : public ImageImport {
  public:
    PoolImport(PoolImpl& pool, std::string name, unsigned workers)
        : pool_(pool),
          name_(std::move(name)),
          protection_(pool.store_->protect()),
          pipeline_(*protection_, {.workers = workers}) {}
    ~PoolImport() override {
        const std::lock_guard lock(pool_.operations_);
        pool_.importing_.erase(name_);
    }
    PoolImport(const PoolImport&) = delete;
    PoolImport& operator=(const PoolImport&) = delete;

    Result<void> append(uint64_t offset_bytes, Bytes data) override {
        if (finished_) {
            return fail(ErrorCode::kInvalidArgument, "import: it is finished");
        }
        STELLARIUM_TRY(pipeline_.append(offset_bytes, data));
        pool_.after_commit();
        return {};
    }

    Result<EntityInfo> finish(uint64_t size_bytes) override {
        if (finished_) {
            return fail(ErrorCode::kInvalidArgument, "import: it is finished");
        }
        if (size_bytes > kMaxVolumeBytes) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("import: a size of {} bytes is above the largest of {}",
                                    size_bytes, kMaxVolumeBytes));
        }
        finished_ = true;
        STELLARIUM_ASSIGN(const ImportedTree tree, pipeline_.finish());
        if (tree.end_bytes > size_bytes) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("import: {} bytes were given for an image of {} bytes",
                                    tree.end_bytes, size_bytes));
        }
        uint64_t sequence = 0;
        uint64_t id = 0;
        {
            const std::lock_guard lock(pool_.operations_);
            STELLARIUM_TRY(pool_.check_room(1));
            id = pool_.catalog_.next_id();
            const CreateRecord record{.id = id,
                                      .kind = EntityKind::kImage,
                                      .size_bytes = size_bytes,
                                      .created_ns = pool_.now_ns(),
                                      .data_bytes = tree.data_bytes,
                                      .root = tree.root,
                                      .name = name_};
            const PendingRecord pending = PendingRecord::of(record);
            STELLARIUM_ASSIGN(sequence, pool_.commit_alone(std::span(&pending, 1)));
        }
        STELLARIUM_TRY(pool_.settle(sequence));
        const EntityPtr entity = pool_.catalog_.find(id);
        if (!entity) {
            return fail(ErrorCode::kNotFound, fmt::format("image '{}' was removed", name_));
        }
        return pool_.info(*entity);
    }

    Progress progress() const override { return pipeline_.progress(); }

  private:
    PoolImpl& pool_;
    const std::string name_;
    /// Keeps what is appended until the record that names it is in the log.
    const std::unique_ptr<nebula::Store> protection_;
    ImportPipeline pipeline_;
    bool finished_ = false;
};

Result<std::unique_ptr<ImageImport>> PoolImpl::begin_import(std::string_view name) {
    STELLARIUM_TRY(check_name(name));
    if (const auto reason = read_only_reason()) {
        return fail(ErrorCode::kReadOnly, fmt::format("cannot import '{}': {}", name, *reason));
    }
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_TRY(check_free(name));
        importing_.emplace(name);
    }
    return std::make_unique<PoolImport>(
        *this, std::string(name), options_.background ? worker_count(options_.hash_threads) : 0);
}

// --- Opening -------------------------------------------------------------------------------------

std::unique_ptr<Committer> PoolImpl::make_committer(Arena& arena, bool background) {
    return std::make_unique<Committer>(
        env_, *store_, cache_, catalog_, arena,
        CommitterOptions{.writeback_age = options_.writeback_age,
                         .background = background,
                         .after_commit = [this] { after_commit(); }});
}

Result<void> PoolImpl::recover() {
    const Bytes payload = store_->checkpoint_payload();
    published_payload_.assign(payload.begin(), payload.end());
    if (auto loaded = catalog_.load(store_->checkpoint_payload()); !loaded) {
        const Error& error = loaded.error();
        if (error.code() == ErrorCode::kNotFound) {
            // It is not the pool that is missing.
            return fail(
                ErrorCode::kCorrupt,
                fmt::format("the list of all volumes and images is damaged: {}{}", error.message(),
                            read_only_reason()
                                .transform([](const std::string& reason) {
                                    return fmt::format("; the store is read-only: {}", reason);
                                })
                                .value_or("")));
        }
        return std::unexpected(error.with_context("the list of all volumes and images"));
    }
    class Sink final : public nebula::ReplaySink {
      public:
        explicit Sink(Catalog& catalog) : catalog_(catalog) {}
        Result<void> replay(uint64_t sequence, uint16_t kind, Bytes payload) override {
            auto applied = catalog_.replay(kind, payload);
            if (!applied) {
                return std::unexpected(
                    applied.error().with_context(fmt::format("replay of batch {}", sequence)));
            }
            return {};
        }

      private:
        Catalog& catalog_;
    };
    Sink sink(catalog_);
    STELLARIUM_TRY(store_->replay(sink));
    STELLARIUM_TRY(open_arena());
    warn_of_damage();
    scrubber_.load();
    committer_->start();
    if (options_.background && !read_only_reason()) {
        maintenance_ = std::thread([this] { run_maintenance(); });
        collections_ = std::thread([this] { run_collections(); });
        if (options_.scrub.every.count() > 0) {
            scrubber_.begin_schedule();
            scrubs_ = std::thread([this] { run_scrubs(); });
        }
    }
    return {};
}

Result<ArenaOwner> PoolImpl::arena_owner() const {
    const std::string path = fmt::format("{}/{}", store_->directory(), nebula::kSuperblockName);
    STELLARIUM_ASSIGN(const auto superblock, env_.files->open(path, io::OpenMode::kReadOnly));
    STELLARIUM_ASSIGN(const io::FileIdentity identity, superblock->identity());
    return ArenaOwner{.store = store_->uuid(), .superblock = identity};
}

/// Finds the acknowledged writes that the last process left, and makes room for new ones.
///
/// The log names the arena, so that whoever opens the pool next finds it, whatever its options say.
/// An arena is adopted only while nothing newer is in the log: one that is not adopted now, perhaps
/// because it cannot be seen from here, must not come back later. So a new arena has a new
/// identity, which is in the log before, or with, the first batch that this process appends. On a
/// full disk it waits for that batch, and opening works.
Result<void> PoolImpl::open_arena() {
    const ArenaRecord named = catalog_.arena();
    if (read_only_reason()) {
        if (!named.path.empty() && !named.closed) {
            own_warnings_.push_back(
                fmt::format("the pool is read-only: acknowledged writes that may be in {} are not "
                            "shown, and stay there",
                            named.path));
        }
        STELLARIUM_TRY(refuse_stale(named));
        arena_ = Arena::make_private(options_.dirty_budget_bytes);
        committer_ = make_committer(*arena_, /*background=*/false);
        return {};
    }
    STELLARIUM_ASSIGN(const ArenaOwner owner, arena_owner());
    // A copy of the store has a name of its own, and never replaces the original's file.
    const std::string own_path =
        options_.runtime_directory.empty()
            ? std::string()
            : fmt::format("{}/{}-{:x}-{:x}.arena", options_.runtime_directory, hex(owner.store),
                          owner.superblock.device, owner.superblock.inode);
    if (!named.path.empty()) {
        std::string why;
        auto found = Arena::open_file(env_, named.path, owner, named.id, why);
        if (!found) {
            return std::unexpected(found.error().with_context(fmt::format(
                "{} may hold acknowledged writes of this pool and cannot be opened", named.path)));
        }
        if (*found == nullptr) {
            if (!named.closed) {
                own_warnings_.push_back(
                    fmt::format("the pool was not closed cleanly, and writes "
                                "that were not flushed are not in it: {}",
                                why));
            }
        } else if (const std::vector<Arena::Found> slots = (*found)->adopt();
                   named.path == own_path || std::ranges::any_of(slots, [this](const auto& slot) {
                       return is_damaged_volume(catalog_.find(slot.volume));
                   })) {
            // Those of damaged volumes cannot be appended, and what is damaged now may be whole for
            // the next one who opens the pool: they stay where they are.
            use_arena(*std::move(found), slots, named);
            return {};
        } else if (auto adopted = adopt_foreign_arena(*std::move(found), slots); !adopted) {
            if (adopted.error().code() != ErrorCode::kNoSpace) {
                return adopted;
            }
            // What it holds has no room in the log yet: it stays where it is, and is read there.
            STELLARIUM_ASSIGN(found, Arena::open_file(env_, named.path, owner, named.id, why));
            if (*found == nullptr) {
                return adopted;
            }
            own_warnings_.push_back(
                fmt::format("the disk is full, and acknowledged writes stay in {}: remove volumes "
                            "and collect garbage, or make room",
                            named.path));
            const std::vector<Arena::Found> again = (*found)->adopt();
            use_arena(*std::move(found), again, named);
            return {};
        }
    }
    env_.random->fill(std::as_writable_bytes(std::span(arena_record_.id)));
    if (own_path.empty()) {
        arena_ = Arena::make_private(options_.dirty_budget_bytes);
        committer_ = make_committer(*arena_, options_.background);
        if (!named.path.empty()) {
            arena_record_.closed = true;
            arena_record_.path = named.path;
            committer_->announce(PendingRecord::of(arena_record_));
            if (!named.closed) {
                announce_arena();
            }
        }
        return {};
    }
    STELLARIUM_ASSIGN(const io::FileSystemType type, env_.files->type(options_.runtime_directory));
    if (type.kind != io::FileSystemKind::kMemory) {
        own_warnings_.push_back(
            fmt::format("the runtime directory {} is on {}, not on a memory file system: guest "
                        "writes cause needless disk writes there",
                        options_.runtime_directory, type.name));
    }
    arena_record_.closed = false;
    arena_record_.path = own_path;
    const bool same_place = named.path == own_path;
    STELLARIUM_ASSIGN(arena_,
                      Arena::make_file(env_, own_path, options_.dirty_budget_bytes, owner,
                                       arena_record_.id, same_place ? named.id : Identity{}));
    committer_ = make_committer(*arena_, options_.background);
    committer_->announce(PendingRecord::of(arena_record_));
    const nebula::ReserveScope reserve;
    const auto logged = committer_->commit_announced();
    if (!logged) {
        // Whoever comes next finds it at the place that the log names, as the successor of the one
        // that the log names.
        if (same_place && logged.error().code() == ErrorCode::kNoSpace) {
            return {};
        }
        return std::unexpected(logged.error());
    }
    return store_->sync(*logged);
}

/// Goes on with an arena that the last process left, where it is.
void PoolImpl::use_arena(std::unique_ptr<Arena> arena, std::span<const Arena::Found> slots,
                         const ArenaRecord& named) {
    arena_ = std::move(arena);
    committer_ = make_committer(*arena_, options_.background);
    for (const Arena::Found& slot : slots) {
        const EntityPtr entity = catalog_.find(slot.volume);
        if (is_damaged_volume(entity)) {
            withheld_[entity->id].push_back(slot.slot);
        } else if (entity && entity->kind == EntityKind::kVolume) {
            run(entity)->adopt(slot);
        } else {
            arena_->retire(slot.slot);
            arena_->release(slot.slot);
        }
    }
    arena_record_ = {.id = arena_->identity(), .closed = false, .path = named.path};
    if (named.closed || named.id != arena_record_.id) {
        announce_arena();
    }
}

/// Says in the log what `arena_record_` says, now if there is room, else with the next batch.
void PoolImpl::announce_arena() {
    const nebula::ReserveScope reserve;
    committer_->announce(PendingRecord::of(arena_record_));
    const auto ignored = committer_->commit_announced();
    static_cast<void>(ignored);
}

/// Appends everything that an arena at another place holds, and removes it.
Result<void> PoolImpl::adopt_foreign_arena(std::unique_ptr<Arena> arena,
                                           std::span<const Arena::Found> slots) {
    const auto committer = make_committer(*arena, /*background=*/false);
    std::map<uint64_t, std::shared_ptr<Volume>> volumes;
    for (const Arena::Found& slot : slots) {
        const EntityPtr entity = catalog_.find(slot.volume);
        if (entity && entity->kind == EntityKind::kVolume) {
            auto& volume = volumes[entity->id];
            if (!volume) {
                volume = std::make_shared<Volume>(*store_, cache_, *arena, *committer, entity);
            }
            volume->adopt(slot);
        }
    }
    for (const auto& [id, volume] : volumes) {
        const std::lock_guard lock(volume->entity()->commit_mutex);
        auto committed = committer->commit(std::span(&volume, 1), {});
        if (!committed) {
            return std::unexpected(committed.error().with_context(fmt::format(
                "acknowledged writes in {} cannot be written to the store", arena->path())));
        }
    }
    STELLARIUM_TRY(store_->sync(store_->sequence()));
    return arena->remove_file();
}

/// The store is read-only. Where it is so because of damage, volumes that lack something that was
/// acknowledged are not served: what they hold is another version than the last one.
Result<void> PoolImpl::refuse_stale(const ArenaRecord& arena) {
    if (options_.store.read_only) {
        return {};  // Somebody else may be writing: no promise is made of being up to date.
    }
    const std::string reason = read_only_reason().value_or("the pool is read-only");
    const bool lost = store_->stats().records_lost;
    std::set<uint64_t> in_arena;
    if (!arena.path.empty()) {
        std::string why;
        STELLARIUM_ASSIGN(const ArenaOwner owner, arena_owner());
        STELLARIUM_ASSIGN(const auto found,
                          Arena::open_file(env_, arena.path, owner, arena.id, why));
        if (found) {
            for (const Arena::Found& slot : found->adopt()) {
                in_arena.insert(slot.volume);
            }
        }
    }
    if (!lost && in_arena.empty()) {
        return {};
    }
    const std::string_view what = options_.allow_stale
                                      ? "are shown as they were before that"
                                      : "are not shown (--allow-stale shows what they held before)";
    if (lost) {
        own_warnings_.push_back(fmt::format(
            "acknowledged changes are missing: volumes {}; a name may since have been given to "
            "another image or volume: {}",
            what, reason));
    }
    if (options_.allow_stale) {
        return {};
    }
    if (lost) {
        catalog_.mark_damaged(fmt::format(
            "acknowledged changes may be missing, because the log is damaged: {}", reason));
    } else {
        catalog_.mark_damaged(
            fmt::format("acknowledged writes in {} cannot be added, because the store is damaged "
                        "and read-only: {}",
                        arena.path, reason),
            in_arena);
    }
    return {};
}

void PoolImpl::warn_of_damage() {
    if (read_only_reason()) {
        return;  // That is said once, not for each volume.
    }
    for (const EntityPtr& entity : catalog_.all()) {
        if (const auto damage = entity->state().damage) {
            const auto withheld = withheld_.find(entity->id);
            own_warnings_.push_back(fmt::format(
                "{} '{}' is damaged and not shown: {}{}", kind_name(entity->kind),
                catalog_.full_name(*entity), *damage,
                withheld == withheld_.end()
                    ? std::string()
                    : fmt::format(" ({} acknowledged writes of it are in the buffer, and are "
                                  "dropped with the next checkpoint, when the pool is closed)",
                                  withheld->second.size())));
        }
    }
}

/// Frees what the arena holds of a damaged volume, whose content is something else now.
void PoolImpl::drop_withheld(uint64_t id) {
    const auto it = withheld_.find(id);
    if (it != withheld_.end()) {
        for (const Slot slot : it->second) {
            arena_->retire(slot);
            arena_->release(slot);
        }
        withheld_.erase(it);
    }
}

void PoolImpl::stop_threads() {
    {
        const std::lock_guard lock(scrub_mutex_);
        scrub_stopping_ = true;
        scrub_work_.notify_all();
    }
    if (scrubs_.joinable()) {
        scrubs_.join();
    }
    {
        const std::lock_guard lock(gc_mutex_);
        gc_stopping_ = true;
        gc_work_.notify_all();
    }
    if (collections_.joinable()) {
        collections_.join();
    }
    {
        const std::lock_guard lock(maintenance_mutex_);
        maintenance_stopping_ = true;
        maintenance_work_.notify_all();
    }
    if (maintenance_.joinable()) {
        maintenance_.join();
    }
    if (committer_) {
        committer_->stop();
    }
}

Result<void> PoolImpl::close() {
    std::vector<std::shared_ptr<Volume>> volumes;
    {
        const std::lock_guard lock(running_mutex_);
        for (const auto& [id, open] : devices_) {
            if (!open.empty()) {
                return fail(
                    ErrorCode::kBusy,
                    fmt::format("the pool cannot be closed: '{}' is attached ({})",
                                catalog_.full_name(*open.front().device->volume()->entity()),
                                open.front().device->label()));
            }
        }
        for (const auto& [id, volume] : running_) {
            volumes.push_back(volume);
        }
    }
    if (read_only_reason()) {
        stop_threads();
        return store_->close();
    }
    // On a full disk what is dirty stays in the arena, for the next process, if it can.
    bool left_dirty = false;
    for (const auto& volume : volumes) {
        const std::lock_guard lock(volume->entity()->commit_mutex);
        if (auto committed = committer_->commit(std::span(&volume, 1), {}); !committed) {
            if (committed.error().code() != ErrorCode::kNoSpace || arena_->path().empty()) {
                return std::unexpected(std::move(committed).error());
            }
            left_dirty = true;
        }
    }
    stop_threads();
    if (store_->bytes_since_checkpoint() > kCloseCheckpointBytes) {
        if (auto made = checkpoint(); !made && made.error().code() != ErrorCode::kNoSpace) {
            return made;
        }
    }
    STELLARIUM_TRY(store_->sync(store_->sequence()));
    if (left_dirty) {
        notice(
            fmt::format("the disk is full: {} bytes of acknowledged writes stay in {} for the "
                        "next start, as long as this system is not booted again",
                        arena_->used_bytes(), arena_->path()));
    } else if (!withheld_.empty() && !damage_is_recorded_) {
        // Not known for damaged by the log: whoever opens the pool next may find these volumes
        // whole, and what was acknowledged of them with it.
        notice(
            fmt::format("acknowledged writes of damaged volumes stay in {} for the next start, "
                        "as long as this system is not booted again",
                        arena_->path()));
    } else if (!arena_->path().empty()) {
        // Everything is in the log and durable. A file that is left over all the same holds
        // nothing.
        arena_record_.closed = true;
        announce_arena();
        STELLARIUM_TRY(arena_->remove_file());
    }
    STELLARIUM_TRY(store_->sync(store_->sequence()));
    return store_->close();
}

// --- Running volumes -----------------------------------------------------------------------------

std::shared_ptr<Volume> PoolImpl::running(const EntityPtr& entity) const {
    const std::lock_guard lock(running_mutex_);
    const auto it = running_.find(entity->id);
    return it == running_.end() ? nullptr : it->second;
}

std::shared_ptr<Volume> PoolImpl::run(const EntityPtr& entity) {
    const std::lock_guard lock(running_mutex_);
    return run_locked(entity);
}

/// running_mutex_ is held. A volume without devices stays in running_ only until the mutex is
/// given up: whoever makes a device lists it before that.
std::shared_ptr<Volume> PoolImpl::run_locked(const EntityPtr& entity) {
    auto& volume = running_[entity->id];
    if (!volume) {
        volume = std::make_shared<Volume>(*store_, cache_, *arena_, *committer_, entity);
    }
    return volume;
}

void PoolImpl::close_device(const std::shared_ptr<Volume>& volume, const Device& device) {
    if (!device.read_only()) {
        // A failure leaves the pages in the arena, where write-back tries again.
        // Not flush_async: the last reference may have been that of a completion, on its thread.
        if (auto flushed = committer_->flush(volume); !flushed) {
            volume->fail_writers(flushed.error());
        }
    }
    const std::lock_guard lock(running_mutex_);
    auto& open = devices_[volume->entity()->id];
    std::erase_if(open, [&](const OpenDevice& item) { return item.device == &device; });
    if (open.empty()) {
        devices_.erase(volume->entity()->id);
        if (!volume->dirty()) {
            running_.erase(volume->entity()->id);
        }
    }
}

Result<std::shared_ptr<BlockDevice>> PoolImpl::attach(std::string_view source,
                                                      const AttachOptions& options) {
    const std::lock_guard operation(operations_);
    STELLARIUM_ASSIGN(const EntityPtr entity,
                      options.id == 0 ? catalog_.find(source) : find_by_id(options.id));
    STELLARIUM_TRY(check_intact(*entity));
    if (!options.read_only) {
        if (entity->kind != EntityKind::kVolume) {
            return fail(ErrorCode::kReadOnly,
                        fmt::format("'{}' is {} {}: attach it read-only, or clone it", source,
                                    entity->kind == EntityKind::kImage ? "an" : "a",
                                    kind_name(entity->kind)));
        }
        if (const auto reason = read_only_reason()) {
            return fail(ErrorCode::kReadOnly,
                        fmt::format("'{}' can be attached read-only only: {}", source, *reason));
        }
    }
    std::string serial = options.serial.empty() ? catalog_.full_name(*entity) : options.serial;
    if (serial.size() > kMaxSerialBytes) {
        serial.resize(kMaxSerialBytes);
    }
    const std::lock_guard lock(running_mutex_);
    auto& open = devices_[entity->id];
    if (!options.read_only) {
        const auto writer = std::find_if(
            open.begin(), open.end(), [](const OpenDevice& d) { return !d.device->read_only(); });
        if (writer != open.end()) {
            return fail(ErrorCode::kBusy, fmt::format("'{}' is attached for writing already ({})",
                                                      source, writer->device->label()));
        }
    }
    auto device = std::make_shared<Device>(
        *this, run_locked(entity), options.read_only,
        options.label.empty() ? std::string("a device") : options.label, std::move(serial));
    open.push_back({.device = device.get(), .owner = device});
    return device;
}

// --- Changes -------------------------------------------------------------------------------------

Result<uint64_t> PoolImpl::commit_on(const EntityPtr& entity,
                                     std::span<const PendingRecord> records) {
    const std::lock_guard lock(entity->commit_mutex);
    if (entity->removed()) {
        return fail(ErrorCode::kNotFound, "it has just been removed");
    }
    if (const auto volume = running(entity)) {
        return committer_->commit(std::span(&volume, 1), records);
    }
    return committer_->commit({}, records);
}

Result<void> PoolImpl::settle(uint64_t sequence) {
    STELLARIUM_TRY(store_->sync(sequence));
    after_commit();
    return {};
}

Result<void> PoolImpl::check_free(std::string_view name) const {
    if (importing_.contains(name)) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("an image named '{}' is being imported", name));
    }
    if (catalog_.name_taken(name)) {
        STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(name));
        return fail(
            ErrorCode::kAlreadyExists,
            fmt::format("{} {} named '{}' exists", entity->kind == EntityKind::kImage ? "an" : "a",
                        kind_name(entity->kind), name));
    }
    return {};
}

Result<void> PoolImpl::check_room(size_t more) const {
    if (catalog_.entity_count() + more > kMaxEntities) {
        return fail(
            ErrorCode::kLimitExceeded,
            fmt::format("a pool holds at most {} images, volumes and snapshots", kMaxEntities));
    }
    return {};
}

std::optional<std::string> PoolImpl::attachment_label(const Entity& entity) const {
    {
        const std::lock_guard lock(running_mutex_);
        const auto it = devices_.find(entity.id);
        if (it != devices_.end() && !it->second.empty()) {
            const auto writer =
                std::find_if(it->second.begin(), it->second.end(),
                             [](const OpenDevice& open) { return !open.device->read_only(); });
            return writer != it->second.end() ? writer->device->label()
                                              : it->second.front().device->label();
        }
    }
    if (const auto attachment = catalog_.describe(entity).attachment) {
        return attachment->label;
    }
    return std::nullopt;
}

Result<void> PoolImpl::check_not_attached(const Entity& entity, std::string_view what) const {
    if (const auto label = attachment_label(entity)) {
        return fail(ErrorCode::kBusy, fmt::format("'{}' cannot be {} while it is attached ({})",
                                                  catalog_.full_name(entity), what, *label));
    }
    return {};
}

Result<void> PoolImpl::check_intact(const Entity& entity) const {
    if (const auto damage = entity.state().damage) {
        const std::string_view advice =
            read_only_reason() ? "Its snapshots can be exported, and what it held earlier with "
                                 "--allow-stale"
            : entity.kind == EntityKind::kVolume ? "Roll it back to a snapshot, or remove it"
                                                 : "Remove it";
        return fail(ErrorCode::kCorrupt,
                    fmt::format("'{}' is damaged, and what it held last is not known: {}. {}",
                                catalog_.full_name(entity), *damage, advice));
    }
    return {};
}

Result<EntityInfo> PoolImpl::create_volume(std::string_view name, uint64_t size_bytes) {
    STELLARIUM_TRY(check_name(name));
    if (size_bytes % kSectorBytes != 0 || size_bytes > kMaxVolumeBytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a volume's size is a multiple of {} bytes, at most {}; {} is not",
                                kSectorBytes, kMaxVolumeBytes, size_bytes));
    }
    uint64_t sequence = 0;
    EntityPtr entity;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_TRY(check_free(name));
        STELLARIUM_TRY(check_room(1));
        const CreateRecord record{.id = catalog_.next_id(),
                                  .kind = EntityKind::kVolume,
                                  .size_bytes = size_bytes,
                                  .created_ns = now_ns(),
                                  .data_bytes = 0,
                                  .root = {},
                                  .name = std::string(name)};
        const PendingRecord pending = PendingRecord::of(record);
        STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
        entity = catalog_.find(record.id);
    }
    STELLARIUM_TRY(settle(sequence));
    return info(*entity);
}

Result<void> PoolImpl::clone(std::string_view source, const std::vector<std::string>& names) {
    if (names.empty() || names.size() > kMaxClonesPerCall) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("1 to {} clones can be made at once, not {}", kMaxClonesPerCall,
                                names.size()));
    }
    std::set<std::string_view> distinct;
    size_t record_bytes = 0;
    for (const std::string& name : names) {
        STELLARIUM_TRY(check_name(name));
        record_bytes += name.size() + 1;
        if (!distinct.insert(name).second) {
            return fail(ErrorCode::kInvalidArgument, fmt::format("'{}' is asked for twice", name));
        }
    }
    if (record_bytes > kMaxCloneNamesBytes) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("the names of clones made at once may take {} bytes, not {}: make "
                                "them in several calls",
                                kMaxCloneNamesBytes, record_bytes));
    }
    uint64_t sequence = 0;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(source));
        STELLARIUM_TRY(check_intact(*entity));
        for (const std::string& name : names) {
            STELLARIUM_TRY(check_free(name));
        }
        STELLARIUM_TRY(check_room(names.size()));
        std::vector<PendingRecord> records;
        uint64_t next_id = catalog_.next_id();
        const uint64_t created_ns = now_ns();
        for (size_t i = 0; i < names.size();) {
            CloneRecord record{.source = entity->id,
                               .first_id = next_id,
                               .size_bytes = round_up_to_sectors(entity->size_bytes()),
                               .created_ns = created_ns,
                               .names = {}};
            size_t bytes = sizeof(format::Clone);
            while (i < names.size() && bytes + names[i].size() + 1 <= kMaxRecordBytes) {
                bytes += names[i].size() + 1;
                record.names.push_back(names[i++]);
            }
            next_id += record.names.size();
            records.push_back(PendingRecord::of(record));
        }
        STELLARIUM_ASSIGN(sequence, commit_on(entity, records));
    }
    return settle(sequence);
}

Result<EntityInfo> PoolImpl::resize(std::string_view name, uint64_t size_bytes) {
    if (size_bytes % kSectorBytes != 0 || size_bytes > kMaxVolumeBytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a volume's size is a multiple of {} bytes, at most {}; {} is not",
                                kSectorBytes, kMaxVolumeBytes, size_bytes));
    }
    uint64_t sequence = 0;
    EntityPtr entity;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(entity, catalog_.find(name, EntityKind::kVolume));
        STELLARIUM_TRY(check_intact(*entity));
        const bool shrinks = size_bytes < entity->size_bytes();
        if (shrinks) {
            STELLARIUM_TRY(check_not_attached(*entity, "shrunk"));
            STELLARIUM_TRY(commit_on(entity, {}));
        }
        const std::lock_guard commit_lock(entity->commit_mutex);
        VolumeState state = entity->state();
        ResizeRecord record{.volume = entity->id, .size_bytes = size_bytes, .root = state.root};
        if (!shrinks) {
            const PendingRecord pending = PendingRecord::of(record);
            STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
        } else {
            // The tree without what lies beyond. Its delta follows from the record.
            const auto protection = store_->protect();
            VolumeState tree_only{.root = state.root, .delta = {}, .size_bytes = state.size_bytes};
            STELLARIUM_ASSIGN(const VolumeState cut,
                              resized(*protection, cache_, tree_only, size_bytes));
            record.root = cut.root;
            // What is logged must apply, now and whenever the log is replayed.
            VolumeState trial = state;
            trial.size_bytes = size_bytes;
            STELLARIUM_TRY(Catalog::cut_delta(*store_, trial));
            const PendingRecord pending = PendingRecord::of(record);
            const uint64_t within = size_bytes % kPageBytes;
            if (within == 0) {
                STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
            } else {
                // Growing again must show zeros in the rest of the last page.
                std::array<std::byte, kPageBytes> last{};
                const iovec part = to_iovec(MutableBytes(last).first(within));
                IovecCursor cursor(std::span(&part, 1));
                STELLARIUM_TRY(read_state(*store_, cache_, state, size_bytes - within, cursor,
                                          within, IoMode::kMayBlock));
                STELLARIUM_ASSIGN(sequence,
                                  committer_->commit_page(*entity, size_bytes / kPageBytes, last,
                                                          std::span(&pending, 1)));
            }
        }
    }
    STELLARIUM_TRY(settle(sequence));
    std::vector<std::shared_ptr<Device>> open;
    {
        const std::lock_guard lock(running_mutex_);
        const auto it = devices_.find(entity->id);
        if (it != devices_.end()) {
            for (const OpenDevice& item : it->second) {
                if (auto device = item.owner.lock()) {
                    open.push_back(std::move(device));
                }
            }
        }
    }
    // Without a lock: a listener may ask the pool.
    for (const auto& device : open) {
        device->size_changed(size_bytes);
    }
    return info(*entity);
}

Result<void> PoolImpl::rename(std::string_view from, std::string_view to) {
    STELLARIUM_TRY(check_name(to));
    uint64_t sequence = 0;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(from));
        if (entity->kind == EntityKind::kSnapshot) {
            return fail(ErrorCode::kInvalidArgument, "a snapshot keeps its name");
        }
        STELLARIUM_TRY(check_free(to));
        const PendingRecord pending =
            PendingRecord::of(RenameRecord{.id = entity->id, .name = std::string(to)});
        STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
    }
    return settle(sequence);
}

Result<EntityInfo> PoolImpl::set_shareable(std::string_view image, bool shareable) {
    uint64_t sequence = 0;
    EntityPtr entity;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(entity, catalog_.find(image, EntityKind::kImage));
        if (catalog_.describe(*entity).shareable == shareable) {
            return info(*entity);
        }
        const PendingRecord pending =
            PendingRecord::of(SharingRecord{.id = entity->id, .shareable = shareable});
        STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
    }
    STELLARIUM_TRY(settle(sequence));
    return info(*entity);
}

Result<void> PoolImpl::remove(const std::vector<std::string>& names) {
    const std::lock_guard lock(operations_);
    std::vector<EntityPtr> entities;
    std::set<uint64_t> chosen;
    for (const std::string& name : names) {
        STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(name));
        if (entity->kind == EntityKind::kSnapshot) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is a snapshot: remove it as one", name));
        }
        if (!chosen.insert(entity->id).second) {
            continue;
        }
        for (EntityPtr& snapshot : catalog_.snapshots_of(entity->id)) {
            entities.push_back(std::move(snapshot));
        }
        entities.push_back(entity);
    }
    return remove_entities(entities);
}

Result<void> PoolImpl::remove_snapshot(std::string_view volume, std::string_view snapshot) {
    const std::lock_guard lock(operations_);
    STELLARIUM_ASSIGN(const EntityPtr entity,
                      catalog_.find(fmt::format("{}@{}", volume, snapshot)));
    return remove_entities({entity});
}

/// The operation lock is held. Snapshots come before their volume.
Result<void> PoolImpl::remove_entities(const std::vector<EntityPtr>& entities) {
    for (const EntityPtr& entity : entities) {
        STELLARIUM_TRY(check_not_attached(*entity, "removed"));
    }
    std::vector<PendingRecord> records;
    for (size_t i = 0; i < entities.size(); i += kMaxIdsPerRecord) {
        RemoveRecord record;
        for (size_t k = i; k < std::min(entities.size(), i + kMaxIdsPerRecord); ++k) {
            record.ids.push_back(entities[k]->id);
        }
        records.push_back(PendingRecord::of(record));
    }
    if (records.empty()) {
        return {};
    }
    uint64_t sequence = 0;
    {
        std::vector<EntityPtr> ordered = entities;
        std::sort(ordered.begin(), ordered.end(),
                  [](const EntityPtr& a, const EntityPtr& b) { return a->id < b->id; });
        std::vector<std::unique_lock<std::mutex>> locks;
        locks.reserve(ordered.size());
        for (const EntityPtr& entity : ordered) {
            locks.emplace_back(entity->commit_mutex);
        }
        // What makes room must work where there is none.
        const nebula::ReserveScope reserve;
        STELLARIUM_ASSIGN(sequence, commit_alone(records));
        for (const EntityPtr& entity : entities) {
            if (const auto volume = running(entity)) {
                volume->drop(0, kMaxPages);
                const std::lock_guard lock(running_mutex_);
                running_.erase(entity->id);
            }
            drop_withheld(entity->id);
        }
    }
    return settle(sequence);
}

// --- Snapshots -----------------------------------------------------------------------------------

Result<EntityInfo> PoolImpl::create_snapshot(std::string_view name, std::string_view snapshot) {
    STELLARIUM_TRY(check_name(snapshot));
    uint64_t sequence = 0;
    EntityPtr made;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(const EntityPtr volume, catalog_.find(name, EntityKind::kVolume));
        STELLARIUM_TRY(check_intact(*volume));
        const std::string full_name = fmt::format("{}@{}", name, snapshot);
        if (catalog_.find(full_name)) {
            return fail(ErrorCode::kAlreadyExists,
                        fmt::format("a snapshot named '{}' exists", full_name));
        }
        STELLARIUM_TRY(check_room(1));
        const SnapshotRecord record{.id = catalog_.next_id(),
                                    .volume = volume->id,
                                    .created_ns = now_ns(),
                                    .name = std::string(snapshot)};
        const PendingRecord pending = PendingRecord::of(record);
        STELLARIUM_ASSIGN(sequence, commit_on(volume, std::span(&pending, 1)));
        made = catalog_.find(record.id);
    }
    STELLARIUM_TRY(settle(sequence));
    return info(*made);
}

Result<void> PoolImpl::rollback(std::string_view name, std::string_view snapshot) {
    uint64_t sequence = 0;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(const EntityPtr volume, catalog_.find(name, EntityKind::kVolume));
        STELLARIUM_ASSIGN(const EntityPtr target,
                          catalog_.find(fmt::format("{}@{}", name, snapshot)));
        STELLARIUM_TRY(check_not_attached(*volume, "rolled back"));
        STELLARIUM_TRY(check_intact(*target));
        const PendingRecord pending =
            PendingRecord::of(RollbackRecord{.volume = volume->id, .snapshot = target->id});
        // What is dirty goes into a batch of its own, and out of the arena: after the death of the
        // process it would be laid over the state of the snapshot.
        STELLARIUM_TRY(commit_on(volume, {}));
        drop_withheld(volume->id);
        STELLARIUM_ASSIGN(sequence, commit_on(volume, std::span(&pending, 1)));
    }
    return settle(sequence);
}

// --- Looking -------------------------------------------------------------------------------------

EntityInfo PoolImpl::info(const Entity& entity) const {
    const Catalog::Description description = catalog_.describe(entity);
    EntityInfo result{.kind = entity.kind,
                      .id = entity.id,
                      .name = description.name,
                      .size_bytes = entity.size_bytes(),
                      .parent = description.parent,
                      .parent_removed = description.parent_removed,
                      .created = std::chrono::nanoseconds(entity.created_ns),
                      .attached = false,
                      .attachment = {},
                      .dirty_bytes = 0,
                      .snapshots = description.snapshots,
                      .shareable = description.shareable,
                      .damage = {}};
    if (const auto damage = entity.state().damage) {
        result.damage = *damage;
    }
    if (auto label = attachment_label(entity)) {
        result.attached = true;
        result.attachment = *std::move(label);
    }
    const std::lock_guard lock(running_mutex_);
    const auto it = running_.find(entity.id);
    if (it != running_.end()) {
        result.dirty_bytes = it->second->dirty_bytes();
    }
    return result;
}

std::vector<EntityInfo> PoolImpl::infos(EntityKind kind) const {
    std::vector<EntityInfo> result;
    for (const EntityPtr& entity : catalog_.list(kind)) {
        result.push_back(info(*entity));
    }
    return result;
}

Result<std::vector<EntityInfo>> PoolImpl::snapshots(std::string_view name) const {
    if (name.empty()) {
        return infos(EntityKind::kSnapshot);
    }
    STELLARIUM_ASSIGN(const EntityPtr volume, catalog_.find(name, EntityKind::kVolume));
    std::vector<EntityInfo> result;
    for (const EntityPtr& entity : catalog_.snapshots_of(volume->id)) {
        result.push_back(info(*entity));
    }
    return result;
}

Result<EntityInfo> PoolImpl::find(std::string_view source) const {
    STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(source));
    return info(*entity);
}

Result<EntityInfo> PoolImpl::find(uint64_t id) const {
    STELLARIUM_ASSIGN(const EntityPtr entity, find_by_id(id));
    return info(*entity);
}

Result<uint64_t> PoolImpl::mapped_bytes(uint64_t id) {
    STELLARIUM_ASSIGN(const EntityPtr entity, find_by_id(id));
    STELLARIUM_TRY(check_intact(*entity));
    const uint64_t version = entity->version();
    {
        const std::lock_guard lock(mapped_mutex_);
        if (entity->mapped && entity->mapped->version == version) {
            return entity->mapped->bytes;
        }
    }
    const StateLease lease =
        leases_.take(fmt::format("a look at the size of '{}'", catalog_.full_name(*entity)),
                     [&] { return entity->state(); });
    // See lease_present_state().
    if (entity->removed()) {
        return fail(ErrorCode::kNotFound, "it has just been removed");
    }
    const VolumeState& state = lease.state();
    const auto note = [&](uint64_t bytes) {
        entity->mapped = Entity::Mapped{.version = version, .bytes = bytes};
        last_mapped_ = MappedState{.state = state, .bytes = bytes};
        return bytes;
    };
    {
        // Clones that nobody has written to are alike, and are asked for one after the other.
        const std::lock_guard lock(mapped_mutex_);
        if (last_mapped_ && last_mapped_->state.root == state.root &&
            last_mapped_->state.size_bytes == state.size_bytes &&
            last_mapped_->state.delta.same_version(state.delta)) {
            return note(last_mapped_->bytes);
        }
    }
    uint64_t bytes = 0;
    STELLARIUM_TRY(for_each_leaf(*store_, cache_, state, 0, [&](uint64_t leaf) -> Result<bool> {
        STELLARIUM_ASSIGN(const Extents extents, effective_leaf(*store_, cache_, state, leaf));
        for (const Extent& extent : extents) {
            bytes += extent.pages * kPageBytes;
        }
        return true;
    }));
    const std::lock_guard lock(mapped_mutex_);
    return note(bytes);
}

Result<StateLease> PoolImpl::lease_present_state(const EntityPtr& entity, std::string_view use) {
    STELLARIUM_TRY(check_intact(*entity));
    const auto volume = running(entity);
    // A commit that is under way has not published everything that it cut.
    const std::lock_guard lock(entity->commit_mutex);
    if (volume && volume->dirty()) {
        STELLARIUM_TRY(committer_->commit(std::span(&volume, 1), {}));
    }
    const std::string name = catalog_.full_name(*entity);
    StateLease lease =
        leases_.take(fmt::format("{} of '{}'", use, name), [&] { return entity->state(); });
    // Asked when the lease is listed: a collection that froze the catalog without the entity, and
    // without seeing the lease, may free what it holds.
    if (entity->removed()) {
        return fail(ErrorCode::kNotFound, fmt::format("'{}' has just been removed", name));
    }
    return lease;
}

Result<EntityDetail> PoolImpl::detail(std::string_view source) {
    STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(source));
    EntityDetail result;
    if (entity->state().damage) {
        result.info = info(*entity);
        result.lineage = lineage(*entity);
        return result;
    }
    STELLARIUM_ASSIGN(const StateLease lease, lease_present_state(entity, "a look at the content"));
    const VolumeState& state = lease.state();
    result.info = info(*entity);
    STELLARIUM_TRY(for_each_leaf(*store_, cache_, state, 0, [&](uint64_t leaf) -> Result<bool> {
        STELLARIUM_ASSIGN(const Extents extents, effective_leaf(*store_, cache_, state, leaf));
        result.extents += extents.size();
        for (const Extent& extent : extents) {
            result.data_bytes += extent.pages * kPageBytes;
        }
        return true;
    }));
    if (state.delta.empty()) {
        result.root = state.root.id;
    } else {
        // Nothing will refer to these nodes, but they are read again on the way.
        const auto protection = store_->protect();
        STELLARIUM_ASSIGN(const NodeRef root, fold_all(*protection, cache_, state));
        result.root = root.id;
    }
    result.lineage = lineage(*entity);
    return result;
}

std::vector<std::string> PoolImpl::lineage(const Entity& entity) const {
    std::vector<std::string> result;
    const Entity* each = &entity;
    EntityPtr keep;
    while (each != nullptr && result.size() < kMaxLineage) {
        const Catalog::Description description = catalog_.describe(*each);
        if (description.parent.empty()) {
            break;
        }
        result.push_back(description.parent);
        keep = description.parent_removed ? nullptr : catalog_.find(each->parent);
        each = keep.get();
    }
    return result;
}

Result<std::unique_ptr<Reader>> PoolImpl::open_reader(std::string_view source) {
    STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(source));
    STELLARIUM_ASSIGN(StateLease lease, lease_present_state(entity, "an export"));
    return std::make_unique<StateReader>(*store_, cache_, std::move(lease));
}

Result<void> PoolImpl::diff(std::string_view a, std::string_view b,
                            const std::function<Result<void>(DiffRange)>& visit) {
    STELLARIUM_ASSIGN(const EntityPtr first, catalog_.find(a));
    STELLARIUM_ASSIGN(const EntityPtr second, catalog_.find(b));
    STELLARIUM_ASSIGN(const StateLease first_lease, lease_present_state(first, "a difference"));
    STELLARIUM_ASSIGN(const StateLease second_lease, lease_present_state(second, "a difference"));
    const VolumeState& first_state = first_lease.state();
    const VolumeState& second_state = second_lease.state();
    const uint64_t end_bytes = std::max(first_state.size_bytes, second_state.size_bytes);
    return nova::diff(*store_, cache_, first_state, second_state, /*compare_content=*/true,
                      [&](uint64_t first_page, uint64_t pages) -> Result<void> {
                          const uint64_t start = first_page * kPageBytes;
                          const uint64_t stop =
                              std::min(end_bytes, (first_page + pages) * kPageBytes);
                          if (start >= stop) {
                              return {};
                          }
                          return visit({.offset_bytes = start, .length_bytes = stop - start});
                      });
}

Result<void> PoolImpl::chunk_users(std::span<const ChunkId> chunks,
                                   const std::function<Result<void>(const ChunkUser&)>& visit,
                                   const std::function<bool()>& cancelled) {
    ChunkUserFinder finder(*store_, chunks);
    ChunkUser list;
    {
        const std::lock_guard one(checkpoint_mutex_);
        const auto looked = Catalog::for_each_piece(
            *store_, published_payload_, [&](const NodeRef& piece) -> Result<void> {
                if (finder.is_bad(piece.id)) {
                    list.bad.ranges.push_back({.cause = piece.id});
                }
                return {};
            });
        // Which pieces lie below one that cannot be read, nobody knows.
        list.bad.complete = looked.has_value();
    }
    if (!list.bad.ranges.empty()) {
        STELLARIUM_TRY(visit(list));
    }
    std::vector<EntityPtr> entities = catalog_.all();
    std::ranges::sort(entities, {}, [](const EntityPtr& entity) { return entity->id; });
    for (const EntityPtr& entity : entities) {
        const std::string name = catalog_.full_name(*entity);
        const StateLease lease = leases_.take(fmt::format("a search for damage in '{}'", name),
                                              [&] { return entity->state(); });
        if (lease.state().damage) {
            continue;
        }
        STELLARIUM_ASSIGN(BadRanges bad, finder.ranges_of(lease.state(), cancelled));
        // What was removed before it was leased may have been collected, and is nobody's loss.
        if (!bad.ranges.empty() && catalog_.find(entity->id)) {
            STELLARIUM_TRY(visit(
                {.kind = entity->kind, .id = entity->id, .name = name, .bad = std::move(bad)}));
        }
    }
    return {};
}

Result<SharingReport> PoolImpl::sharing(const std::function<bool()>& cancelled) {
    std::vector<EntityPtr> entities;
    for (const EntityKind kind : {EntityKind::kImage, EntityKind::kVolume}) {
        for (EntityPtr& entity : catalog_.list(kind)) {
            entities.push_back(std::move(entity));
        }
    }
    const size_t named_apart = entities.size();
    for (size_t i = 0; i < named_apart; ++i) {
        for (EntityPtr& snapshot : catalog_.snapshots_of(entities[i]->id)) {
            entities.push_back(std::move(snapshot));
        }
    }
    SharingReport report;
    std::vector<StateLease> leases;
    for (const EntityPtr& entity : entities) {
        StateLease lease =
            leases_.take("a look at what is shared", [&] { return entity->state(); });
        // See lease_present_state().
        if (entity->removed()) {
            continue;
        }
        if (lease.state().damage) {
            report.complete = false;
            continue;
        }
        report.entities.push_back(
            {.kind = entity->kind, .id = entity->id, .name = catalog_.full_name(*entity)});
        leases.push_back(std::move(lease));
    }
    const auto check_cancelled = [&]() -> Result<void> {
        return cancelled && cancelled()
                   ? fail(ErrorCode::kCancelled, "the look at what is shared was cancelled")
                   : Result<void>();
    };
    SharingFinder finder(*store_,
                         [this](uint32_t segment) { return resident_pages(*store_, segment); });
    for (const StateLease& lease : leases) {
        STELLARIUM_TRY(check_cancelled());
        STELLARIUM_TRY(finder.add(lease.state()));
    }
    for (size_t i = 0; i < leases.size(); ++i) {
        STELLARIUM_TRY(check_cancelled());
        STELLARIUM_ASSIGN(const SharingFinder::Counts counts, finder.count(leases[i].state()));
        Sharing& sharing = report.entities[i];
        sharing.stored_bytes = counts.stored * kPageBytes;
        sharing.resident_bytes = counts.resident * kPageBytes;
        sharing.private_bytes = counts.own * kPageBytes;
        sharing.shared_bytes = sharing.resident_bytes - sharing.private_bytes;
    }
    report.resident_bytes = finder.resident_pages_in_all() * kPageBytes;
    report.complete = report.complete && finder.complete();
    return report;
}

// --- Attachments ---------------------------------------------------------------------------------

Result<EntityPtr> PoolImpl::find_by_id(uint64_t id) const {
    if (EntityPtr entity = catalog_.find(id)) {
        return entity;
    }
    return fail(ErrorCode::kNotFound, "it has just been removed");
}

Result<void> PoolImpl::record_attachment(const std::function<Result<EntityPtr>()>& find,
                                         std::optional<AttachmentRecord> record) {
    if (record && (record->label.size() > kMaxLabelBytes ||
                   record->options.size() > kMaxAttachmentOptionsBytes)) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("an attachment's label may take {} bytes and its options {}",
                                kMaxLabelBytes, kMaxAttachmentOptionsBytes));
    }
    uint64_t sequence = 0;
    {
        const std::lock_guard lock(operations_);
        STELLARIUM_ASSIGN(const EntityPtr entity, find());
        std::optional<nebula::ReserveScope> reserve;
        if (!record) {
            reserve.emplace();  // It comes before a removal.
        }
        AttachmentChangeRecord change{.id = entity->id, .body = std::nullopt};
        if (record) {
            change.body = AttachmentRecordBody{.label = std::move(record->label),
                                               .options = std::move(record->options)};
        }
        const PendingRecord pending = PendingRecord::of(change);
        STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
    }
    return settle(sequence);
}

std::vector<Pool::AttachmentRecord> PoolImpl::attachments() const {
    std::vector<AttachmentRecord> result;
    for (const EntityPtr& entity : catalog_.attached()) {
        Catalog::Description description = catalog_.describe(*entity);
        if (description.attachment) {
            result.push_back({.source = std::move(description.name),
                              .label = std::move(description.attachment->label),
                              .options = std::move(description.attachment->options)});
        }
    }
    return result;
}

// --- Boots ---------------------------------------------------------------------------------------

Result<void> PoolImpl::observe_reads(uint64_t id, std::shared_ptr<ReadObserver> observer) {
    const std::lock_guard lock(running_mutex_);
    const auto volume = running_.find(id);
    if (!devices_.contains(id) || volume == running_.end()) {
        return observer ? fail(ErrorCode::kNotFound, "it is not attached") : Result<void>();
    }
    if (observer && volume->second->observer()) {
        return fail(ErrorCode::kBusy, "what is read of it is being recorded already");
    }
    volume->second->set_observer(std::move(observer));
    return {};
}

Result<Hash256> PoolImpl::boot_root(std::string_view source) const {
    STELLARIUM_ASSIGN(const EntityPtr entity, catalog_.find(source));
    const Hash256 root = catalog_.origin(*entity);
    if (root == Hash256{}) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("'{}' descends from no image, and a boot manifest belongs to one: "
                                "export the volume, import that as an image, and clone it",
                                source));
    }
    return root;
}

std::vector<std::string> PoolImpl::images_of(const Hash256& root) const {
    std::vector<std::string> names;
    for (const EntityPtr& image : catalog_.list(EntityKind::kImage)) {
        if (catalog_.origin(*image) == root) {
            names.push_back(catalog_.full_name(*image));
        }
    }
    return names;
}

Result<std::optional<std::vector<std::byte>>> PoolImpl::boot_manifest(const Hash256& root) {
    std::optional<Pieces> pieces = catalog_.boot(root);
    while (pieces) {
        auto content = load_pieces(*store_, *pieces, "boot manifest");
        // Replaced, and collected, while it was read: the new one is what was asked for.
        if (std::optional<Pieces> now = catalog_.boot(root); !content && now != pieces) {
            pieces = now;
            continue;
        }
        if (!content) {
            return std::unexpected(
                content.error().with_context("the boot manifest cannot be read: remove it "
                                             "(stellarctl boot rm) and record again"));
        }
        return *std::move(content);
    }
    return std::nullopt;
}

Result<void> PoolImpl::set_boot_manifest(const Hash256& root,
                                         std::optional<std::vector<std::byte>> manifest) {
    if (root == Hash256{} ||
        (manifest && (manifest->empty() || manifest->size() > kMaxBootManifestBytes))) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a boot manifest takes 1 to {} bytes and belongs to an image",
                                kMaxBootManifestBytes));
    }
    if (const auto reason = read_only_reason()) {
        return fail(ErrorCode::kReadOnly,
                    fmt::format("boot manifests cannot be changed: {}", *reason));
    }
    // Keeps what is appended until the record that names it is in the log.
    const auto protection = store_->protect();
    BootRecord record{.root = root, .manifest = std::nullopt};
    if (manifest) {
        STELLARIUM_ASSIGN(record.manifest,
                          store_pieces(*protection, *std::move(manifest), "boot manifest"));
    }
    uint64_t sequence = 0;
    {
        const std::lock_guard lock(operations_);
        if (record.manifest && !catalog_.boot(root)) {
            if (catalog_.boots().size() >= kMaxBootManifests) {
                return fail(ErrorCode::kLimitExceeded,
                            fmt::format("a pool holds at most {} boot manifests: remove some "
                                        "(stellarctl boot rm)",
                                        kMaxBootManifests));
            }
            // One that nothing descends from would stay for ever.
            if (!std::ranges::any_of(catalog_.all(), [&](const EntityPtr& entity) {
                    return catalog_.origin(*entity) == root;
                })) {
                return fail(ErrorCode::kNotFound, "the image has just been removed");
            }
        }
        std::optional<nebula::ReserveScope> reserve;
        if (!record.manifest) {
            reserve.emplace();  // It makes room.
        }
        const PendingRecord pending = PendingRecord::of(record);
        STELLARIUM_ASSIGN(sequence, commit_alone(std::span(&pending, 1)));
    }
    return settle(sequence);
}

std::vector<Hash256> PoolImpl::boot_manifests() const {
    std::vector<Hash256> roots;
    for (const auto& [root, pieces] : catalog_.boots()) {
        roots.push_back(root);
    }
    return roots;
}

// --- The whole -----------------------------------------------------------------------------------

PoolStats PoolImpl::stats() const {
    PoolStats stats;
    stats.store = store_->stats();
    for (const EntityPtr& entity : catalog_.all()) {
        switch (entity->kind) {
            case EntityKind::kImage:
                ++stats.images;
                stats.logical_bytes += entity->size_bytes();
                break;
            case EntityKind::kVolume:
                ++stats.volumes;
                stats.logical_bytes += entity->size_bytes();
                stats.delta_extents += entity->state().delta.extents();
                break;
            case EntityKind::kSnapshot:
                ++stats.snapshots;
                break;
        }
    }
    stats.attachments = catalog_.attached().size();
    stats.imported_bytes = catalog_.imported_bytes();
    stats.written_bytes = catalog_.written_bytes();
    stats.dirty_bytes = arena_->used_bytes();
    stats.node_cache_bytes = cache_.memory_bytes();
    if (const auto space = env_.files->space(store_->directory())) {
        stats.space = *space;
        stats.space_low = is_space_low(*space);
    }
    {
        const std::lock_guard lock(gc_mutex_);
        stats.gc = gc_stats_;
    }
    stats.gc.reclaimable_bytes = reclaimable_bytes(stats.store);
    stats.scrub = scrubber_.stats();
    stats.scrub.total_bytes = stats.store.unique_bytes;
    stats.scrub.damaged_chunks = damaged_chunks();
    if (options_.background && options_.scrub.every.count() > 0) {
        stats.scrub.next_due = scrubber_.due(options_.scrub.every);
    }
    return stats;
}

std::optional<std::string> PoolImpl::read_only_reason() const {
    if (auto reason = store_->read_only_reason()) {
        return reason;
    }
    if (committer_) {
        if (const auto broken = committer_->broken()) {
            return broken->message();
        }
    }
    return std::nullopt;
}

std::vector<std::string> PoolImpl::warnings() const {
    std::vector<std::string> all = store_->warnings();
    const std::lock_guard lock(warnings_mutex_);
    all.insert(all.end(), own_warnings_.begin(), own_warnings_.end());
    if (store_->stats().disk_full) {
        all.emplace_back(
            "the disk is full, and writes fail: remove volumes and collect garbage, or make room; "
            "writing goes on then");
    }
    if (const uint64_t damaged = damaged_chunks(); damaged > 0) {
        all.push_back(
            fmt::format("{} chunk{} damaged: `stellarctl scrub --status` says where, and "
                        "which images, volumes and snapshots that concerns",
                        damaged, damaged == 1 ? " is" : "s are"));
    }
    return all;
}

// --- Maintenance ---------------------------------------------------------------------------------

/// Once for each volume: it will be so at every checkpoint.
void PoolImpl::note_unfoldable(const Entity& entity, const Error& error) {
    const std::string name = catalog_.full_name(entity);
    const std::lock_guard lock(warnings_mutex_);
    if (unfoldable_.insert(entity.id).second) {
        own_warnings_.push_back(fmt::format(
            "a part of volume '{}' is damaged, so that its changes are not merged with what it was "
            "cloned from: {}",
            name, error.message()));
    }
}

Result<void> PoolImpl::fold_where_due() {
    const Folder folder(
        *store_, cache_, catalog_, *committer_,
        [this](const Entity& entity, const Error& error) { note_unfoldable(entity, error); });
    return folder.fold_where_due();
}

Result<void> PoolImpl::checkpoint() {
    const std::lock_guard one(checkpoint_mutex_);
    // On a full disk a shorter replay is worth the reserve, and folding is not.
    if (auto folded = fold_where_due(); !folded && folded.error().code() != ErrorCode::kNoSpace) {
        return folded;
    }
    STELLARIUM_TRY(make_checkpoint());
    return {};
}

Result<PoolImpl::Checkpoint> PoolImpl::make_checkpoint() {
    uint64_t sequence = 0;
    Checkpoint made;
    {
        const auto gate = committer_->close_gate();
        if (const auto broken = committer_->broken()) {
            return std::unexpected(*broken);
        }
        sequence = store_->sequence();
        made.frozen = catalog_.freeze();
    }
    const nebula::ReserveScope reserve;
    STELLARIUM_ASSIGN(made.payload, Catalog::save(*store_, made.frozen));
    STELLARIUM_TRY(store_->checkpoint(sequence, made.payload));
    published_payload_ = made.payload;
    damage_is_recorded_ = true;
    return made;
}

// --- Garbage collection --------------------------------------------------------------------------

/// No checkpoint may run between the barrier and the position: see Collection::fix_position().
Result<Collector::Published> PoolImpl::begin_collection() {
    const std::lock_guard one(checkpoint_mutex_);
    // On a full disk a collection is what is needed most, and folding is not.
    if (auto folded = fold_where_due(); !folded && folded.error().code() != ErrorCode::kNoSpace) {
        return std::unexpected(std::move(folded).error());
    }
    Collector::Published published;
    STELLARIUM_ASSIGN(published.collection, store_->begin_collection());
    STELLARIUM_ASSIGN(Checkpoint made, make_checkpoint());
    published.frozen = std::move(made.frozen);
    published.payload = std::move(made.payload);
    const nebula::ReserveScope reserve;
    // Whoever leases from here on has what was frozen, or what is newer and kept by the barrier.
    published.leased = leases_.all();
    for (const auto& [what, state] : published.leased) {
        STELLARIUM_TRY(state.delta.persist(*store_));
    }
    STELLARIUM_TRY(published.collection->fix_position());
    return published;
}

Result<GcReport> PoolImpl::gc(const GcOptions& options) {
    const std::unique_lock one(collecting_, std::try_to_lock);
    if (!one.owns_lock()) {
        return fail(ErrorCode::kBusy, "a garbage collection is running already");
    }
    if (const auto reason = read_only_reason()) {
        return fail(ErrorCode::kReadOnly, fmt::format("garbage cannot be collected: {}", *reason));
    }
    {
        const std::lock_guard lock(gc_mutex_);
        gc_stats_.running = true;
        gc_stats_.progress = {};
    }
    const auto started = env_.clock->monotonic();
    const Catalog::DeadEstimate estimate = catalog_.dead_estimate();
    GcOptions with_stop = options;
    with_stop.cancelled = [this, &options] {
        if (options.cancelled && options.cancelled()) {
            return true;
        }
        const std::lock_guard lock(gc_mutex_);
        return gc_stopping_;
    };
    with_stop.progress = [this, &options](const GcProgress& progress) {
        {
            const std::lock_guard lock(gc_mutex_);
            gc_stats_.progress = progress;
        }
        if (options.progress) {
            options.progress(progress);
        }
    };
    const Folder folder(*store_, cache_, catalog_, *committer_);
    const Collector collector(*store_, cache_, catalog_, folder,
                              [this] { return begin_collection(); });
    auto report = collector.run(with_stop);

    const std::lock_guard lock(gc_mutex_);
    gc_stats_.running = false;
    if (report) {
        report->duration = env_.clock->monotonic() - started;
        if (!options.dry_run) {
            catalog_.subtract_dead(estimate);
            ++gc_stats_.collections;
            gc_stats_.freed_bytes += report->freed_bytes;
            gc_stats_.last = *report;
            gc_stats_.last_ended = env_.clock->wall();
            gc_stats_.last_error.clear();
        }
    } else if (report.error().code() != ErrorCode::kCancelled) {
        ++gc_stats_.failures;
        gc_stats_.last_error = report.error().message();
    }
    return report;
}

uint64_t PoolImpl::reclaimable_bytes(const nebula::StoreStats& store) const {
    const Catalog::DeadEstimate dead = catalog_.dead_estimate();
    uint64_t bytes = dead.bytes;
    if (dead.unknown_entities > 0) {
        // Removed before anybody knew what they held: taken for the average.
        bytes += store.unique_bytes / (catalog_.entity_count() + dead.unknown_entities) *
                 dead.unknown_entities;
    }
    // What the last collection or dry run saw and left is known for sure, and part of the estimate.
    return std::min(std::max(bytes, store.dead_bytes), store.stored_bytes);
}

bool PoolImpl::is_space_low(const io::FileSystemSpace& space) const {
    return static_cast<double>(space.free_bytes) <
           options_.gc.low_space_share * static_cast<double>(space.total_bytes);
}

bool PoolImpl::is_collection_due() {
    const nebula::StoreStats store = store_->stats();
    const uint64_t dead = reclaimable_bytes(store);
    const auto space = env_.files->space(store_->directory());
    const bool low = space && is_space_low(*space);
    if (low && !space_was_low_) {
        notice(
            fmt::format("the file system of {} is almost full: {} of {} bytes are free, and "
                        "about {} can be reclaimed by garbage collection; remove volumes, or "
                        "make room, before writes fail",
                        store_->directory(), space->free_bytes, space->total_bytes, dead));
    }
    space_was_low_ = low;
    const auto now = env_.clock->monotonic();
    if (!options_.gc.automatic || now < collect_not_before_) {
        return false;
    }
    if (dead >= options_.gc.min_dead_bytes &&
        static_cast<double>(dead) >=
            options_.gc.dead_share * static_cast<double>(store.stored_bytes)) {
        return true;
    }
    if (low && dead > 0 && now >= collect_for_space_not_before_) {
        collect_for_space_not_before_ = now + options_.gc.low_space_interval;
        return true;
    }
    return false;
}

void PoolImpl::run_collections() {
    std::unique_lock lock(gc_mutex_);
    while (!gc_stopping_) {
        lock.unlock();
        const bool due = is_collection_due();
        if (due) {
            const auto report = gc({.rate_bytes_per_second = options_.gc.rate_bytes_per_second});
            if (report) {
                notice(fmt::format("garbage collection: {} bytes freed, {} are needed, in {} ms",
                                   report->freed_bytes, report->live_bytes,
                                   report->duration / std::chrono::milliseconds(1)));
            } else if (report.error().code() != ErrorCode::kCancelled &&
                       report.error().code() != ErrorCode::kBusy) {
                // Most likely something is damaged, and will be for a while.
                collect_not_before_ = env_.clock->monotonic() + options_.gc.low_space_interval;
                notice(fmt::format("garbage collection failed: {}", report.error().message()));
            }
        }
        // A commit wakes this thread when that much more has died.
        gc_wake_bytes_.store(catalog_.dead_estimate().bytes + options_.gc.min_dead_bytes / 4 + 1);
        lock.lock();
        if (!gc_stopping_) {
            gc_work_.wait_for(lock, kSpaceCheckInterval);
        }
    }
}

// --- Scrub ---------------------------------------------------------------------------------------

uint64_t PoolImpl::damaged_chunks() const {
    if (store_->stats().damaged_chunks == 0) {
        return 0;
    }
    // Some may have another copy by now.
    const auto damaged = store_->damaged();
    return damaged ? damaged->size() : store_->stats().damaged_chunks;
}

Result<ScrubPass> PoolImpl::scrub(const ScrubOptions& options) {
    std::unique_lock one(scrubbing_, std::try_to_lock);
    if (!one.owns_lock()) {
        // The scheduled one gives way: this one goes on where it stops.
        {
            const std::lock_guard lock(scrub_mutex_);
            if (!scrub_scheduled_ || scrubs_waiting_ > 0) {
                return fail(ErrorCode::kBusy, "a scrub is running already");
            }
            ++scrubs_waiting_;
        }
        one.lock();
        const std::lock_guard lock(scrub_mutex_);
        --scrubs_waiting_;
    }
    return scrub_locked(options, /*share_of_time=*/1);
}

/// scrubbing_ is held.
Result<ScrubPass> PoolImpl::scrub_locked(const ScrubOptions& options, double share_of_time) {
    ScrubOptions with_stop = options;
    with_stop.cancelled = [this, &options] {
        if (options.cancelled && options.cancelled()) {
            return true;
        }
        const std::lock_guard lock(scrub_mutex_);
        return scrub_stopping_;
    };
    uint64_t found = 0;
    auto pass = scrubber_.run(with_stop, share_of_time, [&](const nebula::DamagedChunk& bad) {
        if (++found <= kMaxDamageListed) {
            notice(fmt::format("scrub: {}", bad.reason));
        }
    });
    if (found > 0 && !read_only_reason()) {
        // So that it is remembered. On a full disk the next checkpoint has to do it.
        [[maybe_unused]] const auto best_effort = checkpoint();
    }
    if (found > 0) {
        notice_damage();
    }
    if (pass) {
        notice(fmt::format("scrub: {} chunks of {} bytes were read and checked, {} damaged",
                           pass->entries, pass->bytes,
                           pass->damaged == 0 ? "none is" : fmt::format("{} are", pass->damaged)));
    }
    return pass;
}

/// Says in the log who suffers.
void PoolImpl::notice_damage() {
    if (!options_.notice) {
        return;
    }
    const auto report = damage([this] {
        const std::lock_guard lock(scrub_mutex_);
        return scrub_stopping_;
    });
    if (!report) {
        return;
    }
    std::map<std::string, uint64_t> bytes;
    for (const ChunkDamage& each : report->listed) {
        for (const ChunkUser& user : each.users) {
            const std::string name = user.kind
                                         ? fmt::format("{} '{}'", kind_name(*user.kind), user.name)
                                         : std::string("the list of all volumes and images");
            for (const BadRange& range : user.bad.ranges) {
                bytes[name] += range.length_bytes;
            }
        }
    }
    for (const auto& [name, count] : bytes) {
        notice(
            fmt::format("damage: {} bytes of {} cannot be read; `stellarctl scrub --status` "
                        "names the ranges",
                        count, name));
    }
}

Result<DamageReport> PoolImpl::damage(const std::function<bool()>& cancelled) {
    STELLARIUM_ASSIGN(std::vector<nebula::DamagedChunk> damaged, store_->damaged());
    DamageReport report{.chunks = damaged.size(), .listed = {}};
    if (damaged.empty()) {
        return report;
    }
    std::vector<ChunkId> ids;
    absl::flat_hash_map<ChunkId, size_t, Hash256Hasher> places;
    for (nebula::DamagedChunk& chunk : damaged) {
        ids.push_back(chunk.id);
        if (report.listed.size() < kMaxDamageListed &&
            places.try_emplace(chunk.id, report.listed.size()).second) {
            report.listed.push_back({.chunk = std::move(chunk), .users = {}});
        }
    }
    std::ranges::sort(ids);
    STELLARIUM_TRY(chunk_users(
        ids,
        [&](const ChunkUser& user) -> Result<void> {
            std::map<size_t, ChunkUser> parts;
            for (const BadRange& range : user.bad.ranges) {
                const auto place = places.find(range.cause);
                if (place != places.end()) {
                    auto& part = parts[place->second];
                    part.bad.ranges.push_back(range);
                } else if (!std::ranges::binary_search(ids, range.cause) &&
                           report.listed.size() < kMaxDamageListed) {
                    // A node that turned out to be unreadable on the way.
                    places.emplace(range.cause, report.listed.size());
                    parts[report.listed.size()].bad.ranges.push_back(range);
                    ChunkDamage node;
                    node.chunk.id = range.cause;
                    node.chunk.reason =
                        fmt::format("node {} of a tree cannot be read", range.cause.hex());
                    report.listed.push_back(std::move(node));
                    ++report.chunks;
                }
            }
            for (auto& [place, part] : parts) {
                part.kind = user.kind;
                part.id = user.id;
                part.name = user.name;
                part.bad.complete = user.bad.complete;
                report.listed[place].users.push_back(std::move(part));
            }
            return {};
        },
        cancelled));
    return report;
}

bool PoolImpl::is_scrub_due() {
    return env_.clock->monotonic() >= scrub_not_before_ &&
           env_.clock->wall() >= scrubber_.due(options_.scrub.every);
}

void PoolImpl::run_scrubs() {
    std::unique_lock lock(scrub_mutex_);
    while (!scrub_stopping_) {
        lock.unlock();
        const bool due = is_scrub_due();
        if (due) {
            if (const std::unique_lock one(scrubbing_, std::try_to_lock); one.owns_lock()) {
                lock.lock();
                scrub_scheduled_ = true;
                lock.unlock();
                // Spread over half of the time that there is.
                const ScrubPolicy& policy = options_.scrub;
                const uint64_t spread =
                    store_->stats().stored_bytes /
                    std::max<uint64_t>(1, static_cast<uint64_t>(policy.every.count()) / 2);
                ScrubOptions options;
                options.rate_bytes_per_second =
                    std::min(std::max(spread, policy.least_rate_bytes_per_second),
                             policy.rate_bytes_per_second);
                options.cancelled = [this] {
                    const std::lock_guard inner(scrub_mutex_);
                    return scrubs_waiting_ > 0;
                };
                const auto pass = scrub_locked(options, policy.share_of_time);
                if (!pass && pass.error().code() != ErrorCode::kCancelled) {
                    scrub_not_before_ = env_.clock->monotonic() + std::chrono::hours(1);
                    notice(fmt::format("scrub stopped: {}", pass.error().message()));
                }
                lock.lock();
                scrub_scheduled_ = false;
                lock.unlock();
            }
        }
        lock.lock();
        if (!scrub_stopping_) {
            scrub_work_.wait_for(lock, kScrubCheckInterval);
        }
    }
}

void PoolImpl::after_commit() {
    if (options_.background && catalog_.dead_estimate().bytes >= gc_wake_bytes_.load()) {
        const std::lock_guard lock(gc_mutex_);
        gc_wake_bytes_.store(~uint64_t{0});
        gc_work_.notify_one();
    }
    if (store_->bytes_since_checkpoint() <= options_.checkpoint_bytes) {
        return;
    }
    if (!options_.background) {
        // Nobody waits for it: the next one will say what is wrong.
        const auto ignored = checkpoint();
        static_cast<void>(ignored);
        return;
    }
    const std::lock_guard lock(maintenance_mutex_);
    maintenance_due_ = true;
    maintenance_work_.notify_one();
}

void PoolImpl::run_maintenance() {
    std::unique_lock lock(maintenance_mutex_);
    while (!maintenance_stopping_) {
        if (!maintenance_due_) {
            maintenance_work_.wait_for(lock, kProofInterval);
        }
        if (maintenance_stopping_) {
            return;
        }
        const bool due = std::exchange(maintenance_due_, false);
        lock.unlock();
        // A failed checkpoint costs a longer replay, and is tried again after the next commit; a
        // failed proof is tried again at the next turn.
        [[maybe_unused]] const auto done = due ? checkpoint() : store_->prove_durable();
        lock.lock();
    }
}

}  // namespace

// --- Pool ----------------------------------------------------------------------------------------

void GcReport::add(const nebula::CollectionReport& next) {
    live_bytes = next.live_bytes;
    live_chunks = next.live_chunks;
    dead_bytes += next.dead_bytes;
    dead_chunks += next.dead_chunks;
    freed_bytes += next.freed_bytes;
    moved_bytes += next.moved_bytes;
    segments_freed += next.segments_freed;
}

Result<void> Pool::create(const io::Env& env, const std::string& directory,
                          const PoolOptions& options) {
    return nebula::Store::create(env, directory, options.store);
}

Result<std::unique_ptr<Pool>> Pool::open(const io::Env& env, const std::string& directory,
                                         const PoolOptions& options) {
    STELLARIUM_ASSIGN(auto store, nebula::Store::open(env, directory, options.store));
    auto pool = std::make_unique<PoolImpl>(env, options, std::move(store));
    STELLARIUM_TRY(pool->recover());
    return std::unique_ptr<Pool>(std::move(pool));
}

}  // namespace stellarium::nova
