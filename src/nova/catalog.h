// What a pool holds: every image, volume and snapshot, with its name, lineage and content.
//
// The catalog changes in one way only: apply() of a record. The live path encodes a record, appends
// it and applies it; a restart loads the catalog of the last checkpoint and applies what the log
// holds after it. Both run the same code on the same bytes, so what a crash leaves is what a live
// pool had at that point of the log.
//
//     STELLARIUM_TRY(catalog.load(store.checkpoint_payload()));
//     store.replay(sink);                                     // sink calls catalog.apply()
//     auto entity = catalog.find("debian");
//     auto frozen = catalog.freeze();                         // O(entities), nothing is stored
//     auto payload = Catalog::save(store, frozen);            // while the catalog goes on changing
//
// Thread rule: everything may be called from any thread, with these exceptions, which the pool's
// locks ensure: records of one entity are applied one at a time, in log order (its commit_mutex);
// freeze() runs while nothing is applied (the commit gate); load() and replay come first.
// Errors: kCorrupt where a record does not fit what the catalog holds; those of nova/tree.h.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "base/error.h"
#include "nebula/store.h"
#include "nova/entity.h"
#include "nova/pieces.h"
#include "nova/records.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// One image, volume or snapshot. Alive as long as somebody holds it, also after removal.
class Entity {
  public:
    Entity(uint64_t id_in, EntityKind kind_in, uint64_t parent_in, uint64_t created_ns_in)
        : id(id_in), kind(kind_in), parent(parent_in), created_ns(created_ns_in) {}

    const uint64_t id;
    const EntityKind kind;
    const uint64_t parent;  ///< 0: none. Of a snapshot: its volume.
    const uint64_t created_ns;

    /// A copy of the content as of the last applied record. O(1).
    VolumeState state() const {
        const std::shared_lock lock(state_mutex_);
        return state_;
    }
    uint64_t size_bytes() const { return size_bytes_.load(std::memory_order_acquire); }
    bool removed() const { return removed_.load(std::memory_order_acquire); }

    /// Held around everything that appends and applies records of this entity's content. Ordered
    /// after the pool's operation lock; several are taken in ascending order of id.
    std::mutex commit_mutex;

    /// Leaves whose delta may be worth folding. Guarded by commit_mutex.
    std::set<uint64_t> fold_candidates;

    /// About how many bytes only this entity needs: what it wrote or imported, until a garbage
    /// collection has counted. kUnknownBytes when neither has happened since the pool was opened.
    std::atomic<uint64_t> own_bytes{0};
    static constexpr uint64_t kUnknownBytes = ~uint64_t{0};

    /// Grows whenever the state is replaced.
    uint64_t version() const { return version_.load(std::memory_order_acquire); }
    /// What Pool::mapped_bytes() found, and of which version.
    struct Mapped {
        uint64_t version = 0;
        uint64_t bytes = 0;
    };
    std::optional<Mapped> mapped;  ///< Guarded by the pool's mapped_mutex_.

  private:
    friend class Catalog;
    void publish(VolumeState& next);

    mutable std::shared_mutex state_mutex_;
    VolumeState state_;  ///< Guarded by state_mutex_.
    std::atomic<uint64_t> size_bytes_{0};
    std::atomic<uint64_t> version_{0};
    std::atomic<bool> removed_{false};
    // Guarded by the catalog's mutex.
    std::string name_;
    std::string removed_parent_name_;
    std::optional<AttachmentRecordBody> attachment_;
    bool shareable_ = false;
    uint64_t snapshots_ = 0;
    Hash256 origin_;  ///< See Catalog::origin().
};
using EntityPtr = std::shared_ptr<Entity>;

class Catalog {
  public:
    Catalog(nebula::Store& store, NodeCache& cache) : store_(store), cache_(cache) {}

    // --- Change ----------------------------------------------------------------------------------

    /// `locations`: of a live map record, where the chunk of each entry lies.
    Result<void> apply(uint16_t kind, Bytes payload,
                       std::span<const nebula::ChunkLocation> locations = {});

    /// apply() for records of the log. A volume whose record cannot be applied, because something
    /// that it needs has rotted (kCorrupt, kNotFound), is damaged from then on: its content is not
    /// known. The damage goes with clones and snapshots of it, is kept by checkpoints, and ends
    /// with a rollback to a snapshot that is not damaged. Other errors are returned.
    Result<void> replay(uint16_t kind, Bytes payload);

    /// After replay: what volumes hold is not known, all of them when `which` is empty. Of images
    /// and snapshots nothing could have changed.
    void mark_damaged(const std::string& why, const std::set<uint64_t>& which = {});

    // --- Look up ---------------------------------------------------------------------------------

    /// By "NAME" or "VOLUME@SNAPSHOT". kNotFound says what there is not.
    Result<EntityPtr> find(std::string_view source) const;
    /// The same, of one kind only. kInvalidArgument when it is of another kind.
    Result<EntityPtr> find(std::string_view source, EntityKind kind) const;
    /// nullptr: not there (any more).
    EntityPtr find(uint64_t id) const;
    bool name_taken(std::string_view name) const;

    std::vector<EntityPtr> list(EntityKind kind) const;  ///< Sorted by name.
    std::vector<EntityPtr> snapshots_of(uint64_t volume) const;
    std::vector<EntityPtr> all() const;

    struct Description {
        std::string name;    ///< Full: "VOLUME@SNAPSHOT".
        std::string parent;  ///< Full, or what it was called when it was removed; "": none.
        bool parent_removed = false;
        std::optional<AttachmentRecordBody> attachment;
        bool shareable = false;
        uint64_t snapshots = 0;
    };
    Description describe(const Entity& entity) const;
    std::string full_name(const Entity& entity) const;
    std::vector<EntityPtr> attached() const;  ///< With an attachment on record, by name.
    size_t entity_count() const;

    /// The root of the image that this is, or descends from, whatever of its ancestors has been
    /// removed or was written meanwhile. Zeros: it descends from none.
    Hash256 origin(const Entity& entity) const;
    /// Where the boot manifest of images with this root is stored.
    std::optional<Pieces> boot(const Hash256& root) const;
    std::vector<std::pair<Hash256, Pieces>> boots() const;  ///< Ascending by root.

    uint64_t next_id() const;
    uint64_t imported_bytes() const { return imported_bytes_.load(std::memory_order_relaxed); }
    uint64_t written_bytes() const { return written_bytes_.load(std::memory_order_relaxed); }
    ArenaRecord arena() const;  ///< Which arena may hold writes; empty path: none.

    /// What a garbage collection would probably free: an estimate from what was overwritten,
    /// discarded and removed. Too high where snapshots or clones still need it.
    struct DeadEstimate {
        uint64_t bytes = 0;
        uint64_t unknown_entities = 0;  ///< Removed, and nobody knows what they held.
    };
    DeadEstimate dead_estimate() const;
    void add_dead_pages(uint64_t pages);
    /// A collection has freed what there was when `collected` was asked for.
    void subtract_dead(const DeadEstimate& collected);

    /// What a shrinking resize to `state.size_bytes` does to the delta. Whoever logs the record
    /// tries this first: what is logged must apply.
    static Result<void> cut_delta(nebula::Store& store, VolumeState& state);
    /// What the records of a commit do to a state; for the same reason.
    static Result<void> try_out(nebula::Store& store, NodeCache& cache,
                                std::span<const MapRecord> maps, std::span<const HoleRecord> holes,
                                VolumeState state);

    // --- Checkpoint ------------------------------------------------------------------------------

    struct Frozen {
        struct Item {
            uint64_t id = 0;
            uint64_t parent = 0;
            uint64_t created_ns = 0;
            EntityKind kind = EntityKind::kVolume;
            std::string name;
            std::string removed_parent_name;
            VolumeState state;
            std::optional<AttachmentRecordBody> attachment;
            bool shareable = false;
            Hash256 origin;
        };
        std::vector<Item> items;                        ///< Ascending by id.
        std::vector<std::pair<Hash256, Pieces>> boots;  ///< Ascending by root.
        uint64_t next_id = 1;
        uint64_t imported_bytes = 0;
        uint64_t written_bytes = 0;
        ArenaRecord arena;
    };
    Frozen freeze() const;
    /// Appends what of `frozen` is not stored yet; returns the payload for Store::checkpoint.
    static Result<std::vector<std::byte>> save(nebula::Store& store, const Frozen& frozen);
    /// Calls `visit` for each object that the payload of a checkpoint names directly or through
    /// lists: the catalog itself, not the trees and deltas that it names in turn.
    static Result<void> for_each_piece(nebula::Store& store, Bytes payload,
                                       const std::function<Result<void>(const NodeRef&)>& visit);
    /// The inverse, into an empty catalog. An empty payload is an empty pool.
    Result<void> load(Bytes payload);

  private:
    Result<void> apply_record(const CreateRecord& record);
    Result<void> apply_record(const CloneRecord& record);
    Result<void> apply_record(const SnapshotRecord& record);
    Result<void> apply_record(const RollbackRecord& record);
    Result<void> apply_record(const ResizeRecord& record);
    Result<void> apply_record(const RenameRecord& record);
    Result<void> apply_record(const RemoveRecord& record);
    Result<void> apply_record(const AttachmentChangeRecord& record);
    Result<void> apply_record(const MapRecord& record,
                              std::span<const nebula::ChunkLocation> locations);
    Result<void> apply_record(const HoleRecord& record);
    Result<void> apply_record(const FoldRecord& record);
    Result<void> apply_record(const ArenaRecord& record);
    Result<void> apply_record(const BootRecord& record);
    Result<void> apply_record(const SharingRecord& record);

    // With mutex_ held.
    EntityPtr find_locked(uint64_t id) const;
    std::string full_name_locked(const Entity& entity) const;
    Result<void> insert_locked(const EntityPtr& entity, std::string name);
    /// Forgets the boot manifests of roots that nothing descends from any more.
    void drop_orphaned_boots_locked();

    /// The volume whose content a record changes; nullptr when it is a record of another kind.
    /// Damaged, it has the size that the record gives it.
    Result<EntityPtr> damage_target(uint16_t kind, Bytes payload, VolumeState& state) const;
    /// The volume that a content record names; kCorrupt when there is none.
    Result<EntityPtr> content_target(RecordKind kind, uint64_t id) const;

    nebula::Store& store_;
    NodeCache& cache_;

    mutable std::shared_mutex mutex_;
    absl::flat_hash_map<uint64_t, EntityPtr> entities_;
    std::map<std::string, EntityPtr, std::less<>> names_;  ///< Images and volumes.
    std::map<std::pair<uint64_t, std::string>, EntityPtr> snapshots_;
    std::map<Hash256, Pieces> boots_;  ///< By root.
    uint64_t next_id_ = 1;
    ArenaRecord arena_;
    std::atomic<uint64_t> imported_bytes_{0};
    std::atomic<uint64_t> written_bytes_{0};
    std::atomic<uint64_t> dead_bytes_{0};
    std::atomic<uint64_t> dead_entities_{0};
};

}  // namespace stellarium::nova
