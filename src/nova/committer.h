// From dirty pages to the log: the one pipeline that all volumes of a pool share.
//
// commit() cuts the dirty set of some volumes, chunks and hashes it, appends chunks and records
// batch by batch, applies the records to the catalog and settles the dirty pages. Everything that
// changes the catalog goes through it, also where nothing is dirty.
//
// Two threads give group commit: the first commits all volumes that wait for a flush, and hands the
// group to the second, which syncs once for all groups that have arrived and completes them. So the
// next group is hashed while the previous one is being synced. Between groups the first thread
// writes back volumes that have been dirty for too long, or the dirtiest ones when the arena is
// half full.
//
// The commit gate is held shared around each append and its application, and exclusively by a
// checkpoint while it freezes the catalog, so that a checkpoint's state is that of one log
// position.
//
// Lock order: the pool's operation lock, commit_mutex of entities by ascending id, the gate, then
// the locks inside of catalog and volumes.
//
// Thread rule: any function from any thread.
// Durability: commit() appends; what must be durable is synced by the caller or by flush_async().
// Errors: those of nebula/store.h. After a failed append nothing was lost and the dirty pages are
// still dirty. Should a record that was appended not apply, then log and memory disagree: the
// committer refuses everything from then on (kReadOnly), and the next open replays the log.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/error.h"
#include "io/io.h"
#include "nebula/store.h"
#include "nova/catalog.h"
#include "nova/records.h"
#include "nova/volume.h"

namespace stellarium::nova {

/// A record on its way into a batch.
struct PendingRecord {
    uint16_t kind = 0;
    std::vector<std::byte> payload;

    template <typename Record>
    static PendingRecord of(const Record& record) {
        return {.kind = static_cast<uint16_t>(Record::kKind), .payload = encode(record)};
    }
};

struct CommitterOptions {
    std::chrono::nanoseconds writeback_age{std::chrono::seconds(5)};
    bool background = true;
    /// Called after commits, from any thread, without locks; must not block.
    std::function<void()> after_commit;
};

class Committer final : public Writeback {
  public:
    Committer(const io::Env& env, nebula::Store& store, NodeCache& cache, Catalog& catalog,
              Arena& arena, CommitterOptions options);
    /// Stops the threads without flushing; waiting flushes complete with kCancelled.
    ~Committer() override;
    Committer(const Committer&) = delete;
    Committer& operator=(const Committer&) = delete;

    void start();
    void stop();

    /// Appends what is dirty in `volumes` and then `records`, which end up in one batch with the
    /// last of it. The commit_mutex of every entity whose content is involved is held by the
    /// caller. Returns the last sequence number; 0 when there was nothing to do.
    Result<uint64_t> commit(std::span<const std::shared_ptr<Volume>> volumes,
                            std::span<const PendingRecord> records);

    /// Appends one page of a volume together with `records`, past the dirty map. The commit_mutex
    /// is held by the caller, and the page is not dirty.
    Result<uint64_t> commit_page(const Entity& entity, uint64_t page, Bytes content,
                                 std::span<const PendingRecord> records);

    /// This record goes with the next batch, whatever that holds; it replaces the one before that
    /// has not gone yet. Content that the arena it names does not know is never in the log without
    /// it.
    void announce(PendingRecord record);
    /// Appends what was announced and has not gone yet. Returns the last sequence number.
    Result<uint64_t> commit_announced();

    /// `done` is called, and destroyed, on any thread and without locks. It may call flush(), but
    /// must not wait for another flush_async().
    void flush_async(const std::shared_ptr<Volume>& volume, std::function<void(Result<void>)> done);
    /// The same on the calling thread alone, so that it also works in `done` of a flush.
    Result<void> flush(const std::shared_ptr<Volume>& volume);

    void note_dirty(const std::shared_ptr<Volume>& volume) override;
    void note_pressure() override;
    Result<void> make_room(const std::shared_ptr<Volume>& volume) override;
    Result<void> discard_leaves(Volume& volume, uint64_t first_page, uint64_t pages) override;

    /// Holds commits off while the returned lock lives.
    std::unique_lock<std::shared_mutex> close_gate() { return std::unique_lock(gate_); }
    /// Why nothing is committed any more.
    std::optional<Error> broken() const;

  private:
    class Assembly;
    struct FlushRequest {
        std::shared_ptr<Volume> volume;
        std::function<void(Result<void>)> done;
    };
    struct DirtyVolume {
        std::shared_ptr<Volume> volume;
        std::chrono::nanoseconds since{};
    };
    struct SyncGroup {
        uint64_t sequence = 0;
        std::vector<std::function<void(Result<void>)>> done;
    };

    Result<uint64_t> append_and_apply(
        nebula::WriteBatch& batch,
        const std::function<Result<void>(const nebula::Appended&)>& apply);
    Result<void> warm(uint64_t volume, std::span<const MapRecord> maps,
                      std::span<const HoleRecord> holes);
    void break_with(const Error& error);

    void run_commits();
    void run_syncs();
    void commit_group(std::vector<FlushRequest> requests);
    void write_back(const std::shared_ptr<Volume>& volume);
    /// The next volume to write back, if any is due; else how long nothing will be.
    std::shared_ptr<Volume> next_due(std::chrono::nanoseconds& wait);

    io::Env env_;
    nebula::Store& store_;
    NodeCache& cache_;
    Catalog& catalog_;
    Arena& arena_;
    const CommitterOptions options_;

    std::mutex announced_mutex_;
    std::shared_ptr<const PendingRecord> announced_;  ///< Guarded by announced_mutex_.

    std::shared_mutex gate_;
    mutable std::mutex broken_mutex_;
    std::optional<Error> broken_;
    std::atomic<bool> is_broken_{false};

    std::mutex mutex_;
    std::condition_variable work_;
    std::vector<FlushRequest> requests_;   ///< Guarded by mutex_.
    std::vector<DirtyVolume> dirty_;       ///< Guarded by mutex_; oldest first.
    std::chrono::nanoseconds retry_at_{};  ///< No write-back before. Guarded by mutex_.
    bool stopping_ = false;                ///< Guarded by mutex_.
    std::atomic<bool> pressure_{false};

    std::mutex sync_mutex_;
    std::condition_variable sync_work_;
    std::vector<SyncGroup> sync_groups_;  ///< Guarded by sync_mutex_.
    bool sync_stopping_ = false;          ///< Guarded by sync_mutex_.

    std::thread commit_thread_;
    std::thread sync_thread_;
};

}  // namespace stellarium::nova
