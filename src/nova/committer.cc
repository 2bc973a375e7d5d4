#include "nova/committer.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <map>

#include <fmt/format.h>

#include "nebula/chunker.h"
#include "nova/chunk_hashing.h"
#include "nova/limits.h"

namespace stellarium::nova {
namespace {

void add_hole(std::vector<PageRange>& holes, uint64_t page, uint64_t pages) {
    if (!holes.empty() && holes.back().page + holes.back().pages == page) {
        holes.back().pages += pages;
    } else {
        holes.push_back({.page = page, .pages = pages});
    }
}

/// How long write-back rests after a failure. Flushes and stalled writers try at once.
constexpr std::chrono::seconds kRetryAfter{1};

std::unique_lock<std::mutex> lock_entity(const Volume& volume) {
    return std::unique_lock(volume.entity()->commit_mutex);
}

}  // namespace

/// One batch in the making: the dirty pages of some leaves of some volumes, and their records.
class Committer::Assembly {
  public:
    /// `capacity_bytes`: room for pages; at least those of a leaf, or all that will ever be added.
    Assembly(Committer& committer, uint64_t capacity_bytes)
        : committer_(committer),
          staging_(std::make_unique_for_overwrite<std::byte[]>(capacity_bytes)),
          capacity_bytes_(capacity_bytes) {}
    ~Assembly() {
        // What was not committed stays dirty.
        for (const Part& part : parts_) {
            part.volume->settle(part.runs, /*committed=*/false);
        }
    }
    Assembly(const Assembly&) = delete;
    Assembly& operator=(const Assembly&) = delete;

    bool has_room(size_t runs) const {
        return used_bytes_ + runs * kPageBytes <= capacity_bytes_ &&
               runs_ + runs <= kMaxRunsPerBatch;
    }

    /// Adds the dirty pages of one leaf; they stay valid until the batch is finished.
    void add_leaf(Volume& volume, std::span<const DirtyRun> runs) {
        runs_ += runs.size();
        if (parts_.empty() || parts_.back().volume != &volume) {
            parts_.push_back({.volume = &volume,
                              .runs = runs.first(0),
                              .first_chunk = chunks_.size(),
                              .holes = {}});
        }
        Part& part = parts_.back();
        // Leaves of a volume come in order, so its runs are one span that grows.
        part.runs =
            part.runs.empty() ? runs : std::span(part.runs.data(), part.runs.size() + runs.size());
        for (size_t i = 0; i < runs.size();) {
            if (runs[i].zero) {
                add_hole(part.holes, runs[i].page, runs[i].pages);
                ++i;
                continue;
            }
            const uint64_t first_page = runs[i].page;
            const uint64_t start = used_bytes_;
            for (; i < runs.size() && !runs[i].zero &&
                   runs[i].page == first_page + (used_bytes_ - start) / kPageBytes;
                 ++i) {
                const Bytes data = std::as_const(committer_.arena_).data(runs[i].slot);
                assert(used_bytes_ + data.size() <= capacity_bytes_);
                std::memcpy(staging_.get() + used_bytes_, data.data(), data.size());
                used_bytes_ += data.size();
            }
            add_run(part, first_page, Bytes(staging_.get() + start, used_bytes_ - start));
        }
    }

    /// Appends and applies everything, with `records` at the end. Returns the sequence number.
    Result<uint64_t> finish(std::span<const PendingRecord> records) {
        std::vector<Bytes> contents;
        contents.reserve(chunks_.size());
        for (const Chunk& chunk : chunks_) {
            contents.push_back(chunk.pages);
        }
        std::vector<Hash256> ids(contents.size());
        hash_chunks(contents, ids);

        nebula::WriteBatch batch;
        struct Placed {
            PendingRecord record;
            size_t first_chunk = 0;
            size_t chunks = 0;
        };
        std::vector<Placed> placed;
        for (size_t p = 0; p < parts_.size(); ++p) {
            const Part& part = parts_[p];
            const uint64_t volume = part.volume->entity()->id;
            const size_t end_chunk =
                p + 1 < parts_.size() ? parts_[p + 1].first_chunk : chunks_.size();
            std::vector<MapRecord> maps;
            std::vector<HoleRecord> holes;
            for (size_t i = part.first_chunk; i < end_chunk;) {
                const size_t count = std::min(end_chunk - i, kMaxMapEntriesPerRecord);
                MapRecord& record = maps.emplace_back(MapRecord{.volume = volume, .entries = {}});
                for (size_t k = i; k < i + count; ++k) {
                    record.entries.push_back(
                        {.page = chunks_[k].first_page,
                         .pages = static_cast<uint8_t>(chunks_[k].pages.size() / kPageBytes),
                         .first_in_chunk = 0,
                         .id = ids[k]});
                    batch.add_chunk(ids[k], chunks_[k].pages);
                }
                placed.push_back({PendingRecord::of(record), i, count});
                i += count;
            }
            for (size_t i = 0; i < part.holes.size(); i += kMaxHoleEntriesPerRecord) {
                const size_t count = std::min(part.holes.size() - i, kMaxHoleEntriesPerRecord);
                HoleRecord& record = holes.emplace_back(HoleRecord{.volume = volume, .ranges = {}});
                record.ranges.assign(part.holes.begin() + static_cast<ptrdiff_t>(i),
                                     part.holes.begin() + static_cast<ptrdiff_t>(i + count));
                placed.push_back({PendingRecord::of(record), 0, 0});
            }
            STELLARIUM_TRY(committer_.warm(volume, maps, holes));
        }
        for (const PendingRecord& record : records) {
            placed.push_back({record, 0, 0});
        }
        for (const Placed& item : placed) {
            batch.add_record(item.record.kind, item.record.payload);
        }
        STELLARIUM_ASSIGN(
            const uint64_t sequence,
            committer_.append_and_apply(
                batch, [&](const nebula::Appended& appended) -> Result<void> {
                    const std::span<const nebula::ChunkLocation> locations(appended.locations);
                    for (const Placed& item : placed) {
                        if (auto applied = committer_.catalog_.apply(
                                item.record.kind, item.record.payload,
                                locations.subspan(item.first_chunk, item.chunks));
                            !applied) {
                            return applied;
                        }
                    }
                    return {};
                }));
        // Only now, that the new state can be seen, may the dirty pages go.
        for (const Part& part : parts_) {
            part.volume->set_last_sequence(sequence);
            part.volume->settle(part.runs, /*committed=*/true);
        }
        parts_.clear();
        chunks_.clear();
        used_bytes_ = 0;
        runs_ = 0;
        return sequence;
    }

  private:
    struct Chunk {
        uint64_t first_page = 0;
        Bytes pages;
    };
    /// Of one volume.
    struct Part {
        Volume* volume = nullptr;
        std::span<const DirtyRun> runs;
        size_t first_chunk = 0;
        std::vector<PageRange> holes;
    };

    /// Cuts consecutive pages of one leaf into chunks; pages of zeros become holes.
    void add_run(Part& part, uint64_t first_page, Bytes run) {
        cuts_.clear();
        nebula::cut_block_data(run, first_page, cuts_);
        uint64_t page = first_page;
        for (const nebula::Cut& cut : cuts_) {
            if (cut.first_page > page) {
                add_hole(part.holes, page, cut.first_page - page);
            }
            chunks_.push_back({.first_page = cut.first_page,
                               .pages = run.subspan((cut.first_page - first_page) * kPageBytes,
                                                    cut.pages * kPageBytes)});
            page = cut.first_page + cut.pages;
        }
        const uint64_t end_page = first_page + run.size() / kPageBytes;
        if (end_page > page) {
            add_hole(part.holes, page, end_page - page);
        }
    }

    Committer& committer_;
    std::unique_ptr<std::byte[]> staging_;
    uint64_t capacity_bytes_;
    uint64_t used_bytes_ = 0;
    uint64_t runs_ = 0;
    std::vector<Chunk> chunks_;
    std::vector<Part> parts_;
    std::vector<nebula::Cut> cuts_;
};

Committer::Committer(const io::Env& env, nebula::Store& store, NodeCache& cache, Catalog& catalog,
                     Arena& arena, CommitterOptions options)
    : env_(env),
      store_(store),
      cache_(cache),
      catalog_(catalog),
      arena_(arena),
      options_(std::move(options)) {}

Committer::~Committer() {
    stop();
}

void Committer::start() {
    if (options_.background) {
        commit_thread_ = std::thread([this] { run_commits(); });
        sync_thread_ = std::thread([this] { run_syncs(); });
    }
}

void Committer::stop() {
    std::vector<FlushRequest> left;
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        left.swap(requests_);
        work_.notify_all();
    }
    if (commit_thread_.joinable()) {
        commit_thread_.join();
    }
    {
        const std::lock_guard lock(sync_mutex_);
        sync_stopping_ = true;
        sync_work_.notify_all();
    }
    if (sync_thread_.joinable()) {
        sync_thread_.join();
    }
    const Error cancelled(ErrorCode::kCancelled, "the pool was closed before this flush");
    for (const FlushRequest& request : left) {
        if (request.done) {
            request.done(std::unexpected(cancelled));
        } else {
            request.volume->fail_writers(cancelled);
        }
    }
    const std::lock_guard lock(mutex_);
    dirty_.clear();
}

std::optional<Error> Committer::broken() const {
    const std::lock_guard lock(broken_mutex_);
    return broken_;
}

void Committer::break_with(const Error& error) {
    const std::lock_guard lock(broken_mutex_);
    if (!broken_) {
        broken_ = Error(ErrorCode::kReadOnly,
                        fmt::format("an earlier change is in the log but could not be applied, so "
                                    "nothing more is written until the pool is opened again: {}",
                                    error.message()));
        is_broken_.store(true);
    }
}

Result<uint64_t> Committer::append_and_apply(
    nebula::WriteBatch& batch, const std::function<Result<void>(const nebula::Appended&)>& apply) {
    if (auto error = broken()) {
        return std::unexpected(*std::move(error));
    }
    std::shared_ptr<const PendingRecord> announced;
    {
        const std::lock_guard lock(announced_mutex_);
        announced = announced_;
    }
    if (announced) {
        batch.add_record(announced->kind, announced->payload);
    }
    const std::shared_lock gate(gate_);
    STELLARIUM_ASSIGN(const nebula::Appended appended, store_.append(batch));
    auto applied = apply(appended);
    if (applied && announced) {
        applied = catalog_.apply(announced->kind, announced->payload);
    }
    if (!applied) {
        break_with(applied.error());
        return std::unexpected(std::move(applied).error());
    }
    if (announced) {
        const std::lock_guard lock(announced_mutex_);
        if (announced_ == announced) {
            announced_ = nullptr;
        }
    }
    return appended.sequence;
}

void Committer::announce(PendingRecord record) {
    const std::lock_guard lock(announced_mutex_);
    announced_ = std::make_shared<const PendingRecord>(std::move(record));
}

Result<uint64_t> Committer::commit_announced() {
    {
        const std::lock_guard lock(announced_mutex_);
        if (!announced_) {
            return store_.sequence();
        }
    }
    nebula::WriteBatch batch;
    return append_and_apply(batch, [](const nebula::Appended&) { return Result<void>(); });
}

/// Reads whatever applying the records will need, so that a failing read fails the commit before
/// anything is in the log.
Result<void> Committer::warm(uint64_t volume, std::span<const MapRecord> maps,
                             std::span<const HoleRecord> holes) {
    const EntityPtr entity = catalog_.find(volume);
    if (!entity) {
        return fail(ErrorCode::kNotFound, "the volume was removed");
    }
    const VolumeState state = entity->state();
    std::vector<uint64_t> leaves;
    uint64_t replaced_extents = 0;
    const auto look = [&](uint64_t leaf) -> Result<void> {
        STELLARIUM_ASSIGN(const auto present, state.delta.find(store_, leaf));
        if (present) {
            leaves.push_back(leaf);
            replaced_extents += present->size();
        }
        return {};
    };
    for (const MapRecord& record : maps) {
        const std::vector<MapEntry>& entries = record.entries;
        for (size_t i = 0; i < entries.size(); ++i) {
            const uint64_t leaf = entries[i].page / kPagesPerLeaf;
            if (i == 0 || entries[i - 1].page / kPagesPerLeaf != leaf) {
                STELLARIUM_TRY(look(leaf));
            }
        }
    }
    for (const HoleRecord& record : holes) {
        for (const PageRange& range : record.ranges) {
            const auto visit = [&](uint64_t leaf) -> Result<bool> {
                if (leaf * kPagesPerLeaf >= range.page + range.pages) {
                    return false;
                }
                STELLARIUM_TRY(look(leaf));
                return true;
            };
            STELLARIUM_TRY(for_each_leaf(store_, cache_, state, range.page / kPagesPerLeaf, visit));
        }
    }
    const bool reads_more = std::ranges::any_of(leaves, [&](uint64_t leaf) {
        return state.delta.reads_neighbours(leaf, replaced_extents);
    });
    return reads_more ? Catalog::try_out(store_, cache_, maps, holes, state) : Result<void>();
}

Result<uint64_t> Committer::commit(std::span<const std::shared_ptr<Volume>> volumes,
                                   std::span<const PendingRecord> records) {
    // What was cut and is not in a batch yet. Whatever an error leaves here stays dirty.
    struct Cuts {
        std::span<const std::shared_ptr<Volume>> volumes;
        std::vector<std::vector<DirtyRun>> runs;
        std::vector<std::span<const DirtyRun>> rest;
        ~Cuts() {
            for (size_t v = 0; v < rest.size(); ++v) {
                if (!rest[v].empty()) {
                    volumes[v]->settle(rest[v], /*committed=*/false);
                }
            }
        }
    } cuts{.volumes = volumes, .runs = {}, .rest = {}};
    uint64_t dirty_runs = 0;
    for (const auto& volume : volumes) {
        if (volume->entity()->removed()) {
            volume->drop(0, kMaxPages);
        }
        cuts.runs.push_back(volume->cut());
        dirty_runs += cuts.runs.back().size();
    }
    for (const auto& runs : cuts.runs) {
        cuts.rest.emplace_back(runs);
    }
    if (dirty_runs == 0 && records.empty()) {
        return 0;
    }
    Assembly assembly(*this, std::min(kCommitBytes, dirty_runs * kPageBytes));
    for (size_t v = 0; v < volumes.size(); ++v) {
        std::span<const DirtyRun>& rest = cuts.rest[v];
        while (!rest.empty()) {
            const uint64_t leaf = rest.front().page / kPagesPerLeaf;
            size_t count = 1;
            while (count < rest.size() && rest[count].page / kPagesPerLeaf == leaf) {
                ++count;
            }
            if (!assembly.has_room(count)) {
                STELLARIUM_TRY(assembly.finish({}));
            }
            assembly.add_leaf(*volumes[v], rest.first(count));
            rest = rest.subspan(count);
        }
    }
    return assembly.finish(records);
}

Result<uint64_t> Committer::commit_page(const Entity& entity, uint64_t page, Bytes content,
                                        std::span<const PendingRecord> records) {
    nebula::WriteBatch batch;
    PendingRecord first;
    if (nebula::is_zero_page(content)) {
        const HoleRecord record{.volume = entity.id, .ranges = {{.page = page, .pages = 1}}};
        STELLARIUM_TRY(warm(entity.id, {}, std::span(&record, 1)));
        first = PendingRecord::of(record);
    } else {
        const MapRecord record{
            .volume = entity.id,
            .entries = {{.page = page, .pages = 1, .first_in_chunk = 0, .id = hash(content)}}};
        STELLARIUM_TRY(warm(entity.id, std::span(&record, 1), {}));
        batch.add_chunk(record.entries.front().id, content);
        first = PendingRecord::of(record);
    }
    batch.add_record(first.kind, first.payload);
    for (const PendingRecord& record : records) {
        batch.add_record(record.kind, record.payload);
    }
    return append_and_apply(batch, [&](const nebula::Appended& appended) -> Result<void> {
        STELLARIUM_TRY(catalog_.apply(first.kind, first.payload, appended.locations));
        for (const PendingRecord& record : records) {
            STELLARIUM_TRY(catalog_.apply(record.kind, record.payload));
        }
        return {};
    });
}

// --- Requests ------------------------------------------------------------------------------------

void Committer::flush_async(const std::shared_ptr<Volume>& volume,
                            std::function<void(Result<void>)> done) {
    if (!options_.background) {
        done(flush(volume));
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        if (!stopping_) {
            requests_.push_back({volume, std::move(done)});
            work_.notify_one();
            return;
        }
    }
    done(fail(ErrorCode::kCancelled, "the pool is being closed"));
}

Result<void> Committer::flush(const std::shared_ptr<Volume>& volume) {
    {
        const std::lock_guard lock(mutex_);
        if (stopping_) {
            return fail(ErrorCode::kCancelled, "the pool is being closed");
        }
    }
    {
        const auto lock = lock_entity(*volume);
        STELLARIUM_TRY(commit(std::span(&volume, 1), {}));
    }
    STELLARIUM_TRY(store_.sync(volume->last_sequence()));
    if (options_.after_commit) {
        options_.after_commit();
    }
    return {};
}

void Committer::note_dirty(const std::shared_ptr<Volume>& volume) {
    const std::lock_guard lock(mutex_);
    if (stopping_) {
        return;
    }
    dirty_.push_back({volume, env_.clock->monotonic()});
    if (dirty_.size() == 1) {
        work_.notify_one();
    }
}

void Committer::note_pressure() {
    if (options_.background && !pressure_.exchange(true)) {
        const std::lock_guard lock(mutex_);
        work_.notify_one();
    }
}

Result<void> Committer::make_room(const std::shared_ptr<Volume>& volume) {
    if (options_.background) {
        const std::lock_guard lock(mutex_);
        if (stopping_) {
            return fail(ErrorCode::kCancelled, "the pool is being closed");
        }
        // Without a completion: the writer waits for the room itself.
        requests_.push_back({volume, nullptr});
        work_.notify_one();
        return {};
    }
    std::vector<std::shared_ptr<Volume>> dirty;
    {
        const std::lock_guard lock(mutex_);
        for (DirtyVolume& item : dirty_) {
            dirty.push_back(std::move(item.volume));
        }
        dirty_.clear();
    }
    std::optional<Error> error;
    for (const auto& each : dirty) {
        each->taken_off_list();
        const auto lock = lock_entity(*each);
        if (auto done = commit(std::span(&each, 1), {}); !done) {
            error = done.error();
        }
    }
    if (error) {
        return std::unexpected(
            error->with_context("the buffer for writes is full and cannot be written back"));
    }
    return {};
}

Result<void> Committer::discard_leaves(Volume& volume, uint64_t first_page, uint64_t pages) {
    const auto lock = lock_entity(volume);
    const HoleRecord record{.volume = volume.entity()->id,
                            .ranges = {{.page = first_page, .pages = pages}}};
    STELLARIUM_TRY(warm(record.volume, {}, std::span(&record, 1)));
    const PendingRecord pending = PendingRecord::of(record);
    nebula::WriteBatch batch;
    batch.add_record(pending.kind, pending.payload);
    STELLARIUM_ASSIGN(const uint64_t sequence,
                      append_and_apply(batch, [&](const nebula::Appended&) {
                          return catalog_.apply(pending.kind, pending.payload);
                      }));
    volume.set_last_sequence(sequence);
    volume.drop(first_page, pages);
    return {};
}

// --- Threads -------------------------------------------------------------------------------------

std::shared_ptr<Volume> Committer::next_due(std::chrono::nanoseconds& wait) {
    wait = std::chrono::hours(1);
    std::erase_if(dirty_, [](const DirtyVolume& item) {
        if (item.volume->dirty()) {
            return false;
        }
        // A writer marks its page first and asks whether the volume is listed second; here it is
        // the other way round, so that one of the two sees the other.
        item.volume->taken_off_list();
        return !item.volume->put_back_on_list();
    });
    if (dirty_.empty()) {
        pressure_.store(false);
        return nullptr;
    }
    const auto now = env_.clock->monotonic();
    if (now < retry_at_) {
        wait = retry_at_ - now;
        return nullptr;
    }
    auto due = dirty_.end();
    if (arena_.free_slots() < arena_.slot_count() / 2) {
        due = std::max_element(dirty_.begin(), dirty_.end(),
                               [](const DirtyVolume& a, const DirtyVolume& b) {
                                   return a.volume->dirty_bytes() < b.volume->dirty_bytes();
                               });
    } else {
        pressure_.store(false);
        const auto age = now - dirty_.front().since;
        if (age >= options_.writeback_age) {
            due = dirty_.begin();
        } else {
            wait = options_.writeback_age - age;
        }
    }
    if (due == dirty_.end()) {
        return nullptr;
    }
    auto volume = std::move(due->volume);
    dirty_.erase(due);
    volume->taken_off_list();
    return volume;
}

void Committer::run_commits() {
    bool flush_turn = true;
    std::unique_lock lock(mutex_);
    while (!stopping_) {
        if (!requests_.empty() && flush_turn) {
            std::vector<FlushRequest> group;
            group.swap(requests_);
            lock.unlock();
            commit_group(std::move(group));
            lock.lock();
            flush_turn = false;  // Write-back has its turn between groups.
            continue;
        }
        flush_turn = true;
        std::chrono::nanoseconds wait{};
        if (const auto volume = next_due(wait)) {
            lock.unlock();
            write_back(volume);
            lock.lock();
            continue;
        }
        if (requests_.empty() && !stopping_) {
            work_.wait_for(lock, wait);
        }
    }
}

void Committer::commit_group(std::vector<FlushRequest> requests) {
    std::vector<std::shared_ptr<Volume>> volumes;
    volumes.reserve(requests.size());
    for (const FlushRequest& request : requests) {
        volumes.push_back(request.volume);
    }
    std::sort(volumes.begin(), volumes.end(),
              [](const auto& a, const auto& b) { return a->entity()->id < b->entity()->id; });
    volumes.erase(std::unique(volumes.begin(), volumes.end()), volumes.end());

    std::vector<std::unique_lock<std::mutex>> locks;
    locks.reserve(volumes.size());
    for (const auto& volume : volumes) {
        locks.push_back(lock_entity(*volume));
    }
    const auto committed = commit(volumes, {});
    std::map<const Volume*, Error> failed;
    if (!committed) {
        // One volume's trouble is not another's: each by itself.
        for (const auto& volume : volumes) {
            auto alone = volumes.size() == 1 ? committed : commit(std::span(&volume, 1), {});
            if (!alone) {
                volume->fail_writers(alone.error());
                failed.emplace(volume.get(), alone.error());
            }
        }
    }
    SyncGroup group;
    for (const auto& volume : volumes) {
        group.sequence = std::max(group.sequence, volume->last_sequence());
    }
    locks.clear();

    for (FlushRequest& request : requests) {
        if (!request.done) {
            continue;
        }
        const auto error = failed.find(request.volume.get());
        if (error != failed.end()) {
            request.done(std::unexpected(error->second));
        } else {
            group.done.push_back(std::move(request.done));
        }
    }
    if (!group.done.empty()) {
        const std::lock_guard lock(sync_mutex_);
        sync_groups_.push_back(std::move(group));
        sync_work_.notify_one();
    }
    if (options_.after_commit) {
        options_.after_commit();
    }
}

void Committer::write_back(const std::shared_ptr<Volume>& volume) {
    Result<uint64_t> committed = 0;
    {
        const auto lock = lock_entity(*volume);
        committed = commit(std::span(&volume, 1), {});
    }
    if (!committed) {
        volume->fail_writers(committed.error());
        // Most likely the disk is full, and will be for a while.
        const std::lock_guard lock(mutex_);
        retry_at_ = env_.clock->monotonic() + kRetryAfter;
        return;
    }
    if (options_.after_commit) {
        options_.after_commit();
    }
}

void Committer::run_syncs() {
    std::unique_lock lock(sync_mutex_);
    while (true) {
        if (sync_groups_.empty()) {
            if (sync_stopping_) {
                return;
            }
            sync_work_.wait(lock);
            continue;
        }
        std::vector<SyncGroup> groups;
        groups.swap(sync_groups_);
        lock.unlock();
        uint64_t sequence = 0;
        for (const SyncGroup& group : groups) {
            sequence = std::max(sequence, group.sequence);
        }
        const Result<void> synced = store_.sync(sequence);
        for (const SyncGroup& group : groups) {
            for (const auto& done : group.done) {
                done(synced);
            }
        }
        groups.clear();  // A completion may hold the last reference to a device, which flushes.
        lock.lock();
    }
}

}  // namespace stellarium::nova
