#include "nova/catalog.h"

#include <algorithm>
#include <cassert>

#include <absl/container/flat_hash_set.h>
#include <fmt/format.h>

#include "nova/format.h"
#include "nova/limits.h"

namespace stellarium::nova {
namespace {

std::unexpected<Error> misfit(RecordKind kind, std::string_view why) {
    return fail(ErrorCode::kCorrupt,
                fmt::format("{} record does not fit the catalog: {}",
                            record_kind_name(static_cast<uint16_t>(kind)), why));
}

/// What lay_over() did.
struct LaidOver {
    size_t extents = 0;         ///< Over the leaf now.
    uint64_t hidden_pages = 0;  ///< That the delta had mapped before.
};

/// Lays `top` over what the delta holds over `leaf`.
Result<LaidOver> lay_over(nebula::Store& store, Delta& delta, uint64_t leaf,
                          std::span<const Extent> top) {
    STELLARIUM_ASSIGN(const auto present, delta.find(store, leaf));
    const std::span<const Extent> below =
        present ? std::span<const Extent>(*present) : std::span<const Extent>{};
    Extents merged = overlay(below, top, /*keep_holes=*/true);
    const LaidOver done{.extents = merged.size(), .hidden_pages = hidden_pages(below, top)};
    STELLARIUM_TRY(delta.set(store, leaf, std::move(merged)));
    return done;
}

/// What a map record did.
struct Laid {
    uint64_t pages = 0;
    uint64_t hidden_pages = 0;
    std::vector<uint64_t> crowded_leaves;  ///< Worth a look whether they are to be folded.
};

/// Lays what a record maps over the delta of `state`.
Result<Laid> lay(nebula::Store& store, const MapRecord& record,
                 std::span<const nebula::ChunkLocation> locations, VolumeState& state) {
    assert(locations.empty() || locations.size() == record.entries.size());
    const uint64_t end_page = state.pages();
    Laid done;
    Extents top;
    for (size_t i = 0; i < record.entries.size();) {
        const uint64_t leaf = record.entries[i].page / kPagesPerLeaf;
        top.clear();
        for (; i < record.entries.size() && record.entries[i].page / kPagesPerLeaf == leaf; ++i) {
            const MapEntry& entry = record.entries[i];
            if (entry.page + entry.pages > end_page) {
                return misfit(RecordKind::kMap,
                              fmt::format("page {} lies beyond the end of volume id {}", entry.page,
                                          record.volume));
            }
            Extent extent{.first_page = static_cast<uint16_t>(entry.page % kPagesPerLeaf),
                          .pages = entry.pages,
                          .first_in_chunk = entry.first_in_chunk,
                          .hole = false,
                          .id = entry.id,
                          .chunk_address = std::nullopt};
            if (!locations.empty()) {
                extent.chunk_address = locations[i].address;
            }
            append_merged(top, extent);
            done.pages += entry.pages;
        }
        STELLARIUM_ASSIGN(const LaidOver laid, lay_over(store, state.delta, leaf, top));
        if (laid.extents >= kMinFoldExtents) {
            done.crowded_leaves.push_back(leaf);
        }
        done.hidden_pages += laid.hidden_pages;
    }
    return done;
}

/// Lays a record's holes over the delta of `state`. Returns the pages of them.
Result<uint64_t> lay(nebula::Store& store, NodeCache& cache, const HoleRecord& record,
                     VolumeState& state) {
    uint64_t discarded = 0;
    for (const PageRange& range : record.ranges) {
        const uint64_t end = range.page + range.pages;
        if (end > state.pages()) {
            return misfit(RecordKind::kHole,
                          fmt::format("page {} lies beyond the end of volume id {}", range.page,
                                      record.volume));
        }
        // Only leaves that hold something need a hole over it.
        std::vector<uint64_t> leaves;
        STELLARIUM_TRY(for_each_leaf(store, cache, state, range.page / kPagesPerLeaf,
                                     [&](uint64_t leaf) -> Result<bool> {
                                         if (leaf * kPagesPerLeaf >= end) {
                                             return false;
                                         }
                                         leaves.push_back(leaf);
                                         return true;
                                     }));
        for (const uint64_t leaf : leaves) {
            const uint64_t first = std::max(range.page, leaf * kPagesPerLeaf);
            const uint64_t last = std::min(end, (leaf + 1) * kPagesPerLeaf);
            const Extent hole{.first_page = static_cast<uint16_t>(first % kPagesPerLeaf),
                              .pages = static_cast<uint16_t>(last - first),
                              .first_in_chunk = 0,
                              .hole = true,
                              .id = {},
                              .chunk_address = std::nullopt};
            STELLARIUM_TRY(lay_over(store, state.delta, leaf, std::span(&hole, 1)));
            discarded += last - first;
        }
    }
    return discarded;
}

void add_own_pages(Entity& entity, uint64_t pages) {
    if (entity.own_bytes != Entity::kUnknownBytes) {
        entity.own_bytes += pages * kPageBytes;
    }
}

}  // namespace

void Entity::publish(VolumeState& next) {
    {
        const std::lock_guard lock(state_mutex_);
        std::swap(state_, next);
        size_bytes_.store(state_.size_bytes, std::memory_order_release);
        version_.fetch_add(1, std::memory_order_release);
    }
    // The previous state goes with `next`, outside the lock: destroying it may free many nodes.
}

// --- Look up -------------------------------------------------------------------------------------

EntityPtr Catalog::find_locked(uint64_t id) const {
    const auto it = entities_.find(id);
    return it == entities_.end() ? nullptr : it->second;
}

std::string Catalog::full_name_locked(const Entity& entity) const {
    if (entity.kind != EntityKind::kSnapshot) {
        return entity.name_;
    }
    const EntityPtr volume = find_locked(entity.parent);
    return fmt::format("{}@{}", volume ? volume->name_ : "?", entity.name_);
}

Result<EntityPtr> Catalog::find(std::string_view source) const {
    const std::shared_lock lock(mutex_);
    const size_t at = source.find('@');
    const auto it = names_.find(source.substr(0, at));
    if (it == names_.end()) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("no image or volume is named '{}'", source.substr(0, at)));
    }
    if (at == std::string_view::npos) {
        return it->second;
    }
    const auto snapshot =
        snapshots_.find(std::pair(it->second->id, std::string(source.substr(at + 1))));
    if (snapshot == snapshots_.end()) {
        return fail(ErrorCode::kNotFound, fmt::format("'{}' has no snapshot named '{}'", it->first,
                                                      source.substr(at + 1)));
    }
    return snapshot->second;
}

Result<EntityPtr> Catalog::find(std::string_view source, EntityKind kind) const {
    STELLARIUM_ASSIGN(EntityPtr entity, find(source));
    if (entity->kind != kind) {
        return fail(
            ErrorCode::kInvalidArgument,
            fmt::format("'{}' is {} {}, and this needs {} {}", source,
                        entity->kind == EntityKind::kImage ? "an" : "a", kind_name(entity->kind),
                        kind == EntityKind::kImage ? "an" : "a", kind_name(kind)));
    }
    return entity;
}

EntityPtr Catalog::find(uint64_t id) const {
    const std::shared_lock lock(mutex_);
    return find_locked(id);
}

bool Catalog::name_taken(std::string_view name) const {
    const std::shared_lock lock(mutex_);
    return names_.contains(name);
}

std::vector<EntityPtr> Catalog::list(EntityKind kind) const {
    const std::shared_lock lock(mutex_);
    std::vector<EntityPtr> found;
    if (kind != EntityKind::kSnapshot) {
        for (const auto& [name, entity] : names_) {
            if (entity->kind == kind) {
                found.push_back(entity);
            }
        }
        return found;
    }
    for (const auto& [name, volume] : names_) {
        for (auto it = snapshots_.lower_bound(std::pair(volume->id, std::string()));
             it != snapshots_.end() && it->first.first == volume->id; ++it) {
            found.push_back(it->second);
        }
    }
    return found;
}

std::vector<EntityPtr> Catalog::snapshots_of(uint64_t volume) const {
    const std::shared_lock lock(mutex_);
    std::vector<EntityPtr> found;
    for (auto it = snapshots_.lower_bound(std::pair(volume, std::string()));
         it != snapshots_.end() && it->first.first == volume; ++it) {
        found.push_back(it->second);
    }
    return found;
}

std::vector<EntityPtr> Catalog::all() const {
    const std::shared_lock lock(mutex_);
    std::vector<EntityPtr> found;
    found.reserve(entities_.size());
    for (const auto& [id, entity] : entities_) {
        found.push_back(entity);
    }
    return found;
}

Catalog::Description Catalog::describe(const Entity& entity) const {
    const std::shared_lock lock(mutex_);
    Description result{.name = full_name_locked(entity),
                       .parent = {},
                       .parent_removed = false,
                       .attachment = entity.attachment_,
                       .shareable = entity.shareable_,
                       .snapshots = entity.snapshots_};
    if (!entity.removed_parent_name_.empty()) {
        result.parent = entity.removed_parent_name_;
        result.parent_removed = true;
    } else if (const EntityPtr parent = find_locked(entity.parent)) {
        result.parent = full_name_locked(*parent);
    }
    return result;
}

std::string Catalog::full_name(const Entity& entity) const {
    const std::shared_lock lock(mutex_);
    return full_name_locked(entity);
}

std::vector<EntityPtr> Catalog::attached() const {
    std::vector<EntityPtr> found;
    {
        const std::shared_lock lock(mutex_);
        for (const auto& [id, entity] : entities_) {
            if (entity->attachment_) {
                found.push_back(entity);
            }
        }
        std::sort(found.begin(), found.end(), [this](const EntityPtr& a, const EntityPtr& b) {
            return full_name_locked(*a) < full_name_locked(*b);
        });
    }
    return found;
}

size_t Catalog::entity_count() const {
    const std::shared_lock lock(mutex_);
    return entities_.size();
}

uint64_t Catalog::next_id() const {
    const std::shared_lock lock(mutex_);
    return next_id_;
}

ArenaRecord Catalog::arena() const {
    const std::shared_lock lock(mutex_);
    return arena_;
}

Hash256 Catalog::origin(const Entity& entity) const {
    const std::shared_lock lock(mutex_);
    return entity.origin_;
}

std::optional<Pieces> Catalog::boot(const Hash256& root) const {
    const std::shared_lock lock(mutex_);
    const auto found = boots_.find(root);
    return found == boots_.end() ? std::nullopt : std::optional(found->second);
}

std::vector<std::pair<Hash256, Pieces>> Catalog::boots() const {
    const std::shared_lock lock(mutex_);
    return {boots_.begin(), boots_.end()};
}

Catalog::DeadEstimate Catalog::dead_estimate() const {
    return {.bytes = dead_bytes_, .unknown_entities = dead_entities_};
}

void Catalog::add_dead_pages(uint64_t pages) {
    dead_bytes_ += pages * kPageBytes;
}

void Catalog::subtract_dead(const DeadEstimate& collected) {
    dead_bytes_ -= collected.bytes;
    dead_entities_ -= collected.unknown_entities;
}

// --- Change --------------------------------------------------------------------------------------

Result<void> Catalog::apply(uint16_t kind, Bytes payload,
                            std::span<const nebula::ChunkLocation> locations) {
    const auto decoded = [&]<typename Record>(Record*) -> Result<void> {
        STELLARIUM_ASSIGN(const Record record, decode<Record>(payload));
        if constexpr (std::is_same_v<Record, MapRecord>) {
            return apply_record(record, locations);
        } else {
            return apply_record(record);
        }
    };
    switch (static_cast<RecordKind>(kind)) {
        case RecordKind::kCreate:
            return decoded(static_cast<CreateRecord*>(nullptr));
        case RecordKind::kClone:
            return decoded(static_cast<CloneRecord*>(nullptr));
        case RecordKind::kSnapshot:
            return decoded(static_cast<SnapshotRecord*>(nullptr));
        case RecordKind::kRollback:
            return decoded(static_cast<RollbackRecord*>(nullptr));
        case RecordKind::kResize:
            return decoded(static_cast<ResizeRecord*>(nullptr));
        case RecordKind::kRename:
            return decoded(static_cast<RenameRecord*>(nullptr));
        case RecordKind::kRemove:
            return decoded(static_cast<RemoveRecord*>(nullptr));
        case RecordKind::kAttachment:
            return decoded(static_cast<AttachmentChangeRecord*>(nullptr));
        case RecordKind::kMap:
            return decoded(static_cast<MapRecord*>(nullptr));
        case RecordKind::kHole:
            return decoded(static_cast<HoleRecord*>(nullptr));
        case RecordKind::kFold:
            return decoded(static_cast<FoldRecord*>(nullptr));
        case RecordKind::kArena:
            return decoded(static_cast<ArenaRecord*>(nullptr));
        case RecordKind::kBoot:
            return decoded(static_cast<BootRecord*>(nullptr));
        case RecordKind::kSharing:
            return decoded(static_cast<SharingRecord*>(nullptr));
    }
    return fail(ErrorCode::kUnsupported,
                fmt::format("the log holds a record of kind {:#06x}, which this version does not "
                            "know: use the version that wrote it",
                            kind));
}

Result<EntityPtr> Catalog::damage_target(uint16_t kind, Bytes payload, VolumeState& state) const {
    const auto decoded = [&]<typename Record>(Record*) -> Result<EntityPtr> {
        STELLARIUM_ASSIGN(const Record record, decode<Record>(payload));
        EntityPtr entity = find(record.volume);
        if (!entity || entity->kind != EntityKind::kVolume) {
            return EntityPtr();
        }
        state = entity->state();
        if constexpr (std::is_same_v<Record, ResizeRecord>) {
            state.size_bytes = record.size_bytes;
        }
        return entity;
    };
    switch (static_cast<RecordKind>(kind)) {
        case RecordKind::kResize:
            return decoded(static_cast<ResizeRecord*>(nullptr));
        case RecordKind::kMap:
            return decoded(static_cast<MapRecord*>(nullptr));
        case RecordKind::kHole:
            return decoded(static_cast<HoleRecord*>(nullptr));
        case RecordKind::kFold:
            return decoded(static_cast<FoldRecord*>(nullptr));
        default:
            return EntityPtr();
    }
}

Result<void> Catalog::replay(uint16_t kind, Bytes payload) {
    VolumeState state;
    STELLARIUM_ASSIGN(const EntityPtr volume, damage_target(kind, payload, state));
    if (!volume || !state.damage) {
        Result<void> applied = apply(kind, payload);
        if (applied || !volume ||
            (applied.error().code() != ErrorCode::kCorrupt &&
             applied.error().code() != ErrorCode::kNotFound)) {
            return applied;
        }
        state.damage = std::make_shared<const std::string>(applied.error().message());
    }
    // What it holds is unknown already, or from now on; what follows can only change its size.
    volume->publish(state);
    volume->fold_candidates.clear();
    return {};
}

void Catalog::mark_damaged(const std::string& why, const std::set<uint64_t>& which) {
    const auto shared_why = std::make_shared<const std::string>(why);
    for (const EntityPtr& entity : list(EntityKind::kVolume)) {
        VolumeState state = entity->state();
        if (!state.damage && (which.empty() || which.contains(entity->id))) {
            state.damage = shared_why;
            entity->publish(state);
        }
    }
}

Result<void> Catalog::insert_locked(const EntityPtr& entity, std::string name) {
    if (entity->id == 0 || entities_.contains(entity->id)) {
        return fail(ErrorCode::kCorrupt, fmt::format("entity id {} is used twice", entity->id));
    }
    if (entity->kind == EntityKind::kSnapshot) {
        if (!snapshots_.emplace(std::pair(entity->parent, name), entity).second) {
            return fail(ErrorCode::kCorrupt, fmt::format("snapshot name '{}' is used twice", name));
        }
    } else if (!names_.emplace(name, entity).second) {
        return fail(ErrorCode::kCorrupt, fmt::format("name '{}' is used twice", name));
    }
    entity->name_ = std::move(name);
    entities_.emplace(entity->id, entity);
    next_id_ = std::max(next_id_, entity->id + 1);
    return {};
}

Result<void> Catalog::apply_record(const CreateRecord& record) {
    auto entity = std::make_shared<Entity>(record.id, record.kind, 0, record.created_ns);
    VolumeState state{.root = record.root, .delta = {}, .size_bytes = record.size_bytes};
    entity->publish(state);
    entity->own_bytes = record.data_bytes;
    const std::lock_guard lock(mutex_);
    if (record.kind == EntityKind::kImage) {
        entity->origin_ = record.root.id;
    }
    STELLARIUM_TRY(insert_locked(entity, record.name));
    imported_bytes_ += record.data_bytes;
    return {};
}

Result<void> Catalog::apply_record(const CloneRecord& record) {
    const EntityPtr source = find(record.source);
    if (!source) {
        return misfit(RecordKind::kClone, fmt::format("no entity has id {}", record.source));
    }
    VolumeState state = source->state();
    if (record.size_bytes < state.size_bytes ||
        record.size_bytes - state.size_bytes >= kSectorBytes) {
        return misfit(RecordKind::kClone, "its size is not its source's");
    }
    state.size_bytes = record.size_bytes;
    const std::lock_guard lock(mutex_);
    uint64_t id = record.first_id;
    for (const std::string& name : record.names) {
        auto entity =
            std::make_shared<Entity>(id++, EntityKind::kVolume, record.source, record.created_ns);
        VolumeState copy = state;
        entity->publish(copy);
        entity->origin_ = source->origin_;
        STELLARIUM_TRY(insert_locked(entity, name));
    }
    return {};
}

Result<void> Catalog::apply_record(const SnapshotRecord& record) {
    STELLARIUM_ASSIGN(const EntityPtr volume, content_target(RecordKind::kSnapshot, record.volume));
    auto entity = std::make_shared<Entity>(record.id, EntityKind::kSnapshot, record.volume,
                                           record.created_ns);
    VolumeState state = volume->state();
    entity->publish(state);
    const std::lock_guard lock(mutex_);
    entity->origin_ = volume->origin_;
    STELLARIUM_TRY(insert_locked(entity, record.name));
    ++volume->snapshots_;
    return {};
}

Result<void> Catalog::apply_record(const RollbackRecord& record) {
    STELLARIUM_ASSIGN(const EntityPtr volume, content_target(RecordKind::kRollback, record.volume));
    const EntityPtr snapshot = find(record.snapshot);
    if (!snapshot || snapshot->kind != EntityKind::kSnapshot || snapshot->parent != volume->id) {
        return misfit(RecordKind::kRollback, fmt::format("id {} is no snapshot of volume id {}",
                                                         record.snapshot, record.volume));
    }
    VolumeState state = snapshot->state();
    volume->publish(state);
    volume->fold_candidates.clear();
    return {};
}

Result<void> Catalog::cut_delta(nebula::Store& store, VolumeState& state) {
    uint64_t leaf = state.pages() / kPagesPerLeaf;
    const auto pages_of_last = static_cast<uint32_t>(state.pages() % kPagesPerLeaf);
    if (pages_of_last != 0) {
        STELLARIUM_ASSIGN(const auto present, state.delta.find(store, leaf));
        if (present) {
            Extents cut = *present;
            truncate(cut, pages_of_last);
            STELLARIUM_TRY(state.delta.set(store, leaf, std::move(cut)));
        }
        ++leaf;
    }
    if (leaf < kMaxLeaves) {
        STELLARIUM_TRY(state.delta.erase_from(store, leaf));
    }
    return {};
}

Result<void> Catalog::apply_record(const ResizeRecord& record) {
    STELLARIUM_ASSIGN(const EntityPtr volume, content_target(RecordKind::kResize, record.volume));
    VolumeState next = volume->state();
    const bool shrinks = record.size_bytes < next.size_bytes;
    if (const uint64_t own = volume->own_bytes; shrinks && own != Entity::kUnknownBytes) {
        dead_bytes_ += std::min(own, next.size_bytes - record.size_bytes);
    }
    if (!shrinks && !(record.root == next.root)) {
        return misfit(RecordKind::kResize, "it changes the tree of a growing volume");
    }
    next.size_bytes = record.size_bytes;
    if (shrinks) {
        next.root = record.root;
        STELLARIUM_TRY(cut_delta(store_, next));
    }
    volume->publish(next);
    return {};
}

Result<void> Catalog::apply_record(const RenameRecord& record) {
    const std::lock_guard lock(mutex_);
    const EntityPtr entity = find_locked(record.id);
    if (!entity || entity->kind == EntityKind::kSnapshot) {
        return misfit(RecordKind::kRename, fmt::format("no image or volume has id {}", record.id));
    }
    if (names_.contains(record.name)) {
        return misfit(RecordKind::kRename, fmt::format("name '{}' is taken", record.name));
    }
    names_.erase(entity->name_);
    entity->name_ = record.name;
    names_.emplace(record.name, entity);
    return {};
}

Result<void> Catalog::apply_record(const RemoveRecord& record) {
    const std::lock_guard lock(mutex_);
    // What they were called, for those who descend from them.
    absl::flat_hash_map<uint64_t, std::string> removed;
    for (const uint64_t id : record.ids) {
        const EntityPtr entity = find_locked(id);
        if (!entity || !removed.emplace(id, full_name_locked(*entity)).second) {
            return misfit(RecordKind::kRemove, fmt::format("no entity has id {}", id));
        }
    }
    for (const auto& [id, entity] : entities_) {
        const auto it = removed.find(entity->parent);
        if (it != removed.end()) {
            entity->removed_parent_name_ = it->second;
        }
    }
    for (const uint64_t id : record.ids) {
        const EntityPtr entity = find_locked(id);
        if (entity->kind == EntityKind::kSnapshot) {
            snapshots_.erase(std::pair(entity->parent, entity->name_));
            if (const EntityPtr volume = find_locked(entity->parent)) {
                --volume->snapshots_;
            }
        } else {
            names_.erase(entity->name_);
        }
        entity->removed_.store(true, std::memory_order_release);
        if (const uint64_t own = entity->own_bytes; own == Entity::kUnknownBytes) {
            ++dead_entities_;
        } else {
            dead_bytes_ += own;
        }
        entities_.erase(id);
    }
    drop_orphaned_boots_locked();
    return {};
}

void Catalog::drop_orphaned_boots_locked() {
    if (boots_.empty()) {
        return;
    }
    absl::flat_hash_set<Hash256, Hash256Hasher> roots;
    for (const auto& [id, entity] : entities_) {
        roots.insert(entity->origin_);
    }
    std::erase_if(boots_, [&roots](const auto& boot) { return !roots.contains(boot.first); });
}

Result<void> Catalog::apply_record(const AttachmentChangeRecord& record) {
    const std::lock_guard lock(mutex_);
    const EntityPtr entity = find_locked(record.id);
    if (!entity) {
        return misfit(RecordKind::kAttachment, fmt::format("no entity has id {}", record.id));
    }
    entity->attachment_ = record.body;
    return {};
}

Result<EntityPtr> Catalog::content_target(RecordKind kind, uint64_t id) const {
    EntityPtr entity = find(id);
    if (!entity || entity->kind != EntityKind::kVolume) {
        return misfit(kind, fmt::format("no volume has id {}", id));
    }
    return entity;
}

Result<void> Catalog::apply_record(const MapRecord& record,
                                   std::span<const nebula::ChunkLocation> locations) {
    STELLARIUM_ASSIGN(const EntityPtr volume, content_target(RecordKind::kMap, record.volume));
    VolumeState next = volume->state();
    STELLARIUM_ASSIGN(const Laid laid, lay(store_, record, locations, next));
    for (const uint64_t leaf : laid.crowded_leaves) {
        volume->fold_candidates.insert(leaf);
    }
    volume->publish(next);
    written_bytes_ += laid.pages * kPageBytes;
    add_own_pages(*volume, laid.pages);
    add_dead_pages(laid.hidden_pages);
    return {};
}

Result<void> Catalog::apply_record(const HoleRecord& record) {
    STELLARIUM_ASSIGN(const EntityPtr volume, content_target(RecordKind::kHole, record.volume));
    VolumeState next = volume->state();
    STELLARIUM_ASSIGN(const uint64_t discarded, lay(store_, cache_, record, next));
    volume->publish(next);
    // At most: what of the leaf is a hole already is not looked up.
    add_dead_pages(discarded);
    return {};
}

Result<void> Catalog::try_out(nebula::Store& store, NodeCache& cache,
                              std::span<const MapRecord> maps, std::span<const HoleRecord> holes,
                              VolumeState state) {
    for (const MapRecord& record : maps) {
        STELLARIUM_TRY(lay(store, record, {}, state));
    }
    for (const HoleRecord& record : holes) {
        STELLARIUM_TRY(lay(store, cache, record, state));
    }
    return {};
}

Result<void> Catalog::apply_record(const FoldRecord& record) {
    STELLARIUM_ASSIGN(const EntityPtr volume, content_target(RecordKind::kFold, record.volume));
    VolumeState next = volume->state();
    next.root = record.root;
    for (const uint32_t leaf : record.leaves) {
        STELLARIUM_TRY(next.delta.set(store_, leaf, {}));
        volume->fold_candidates.erase(leaf);
    }
    volume->publish(next);
    return {};
}

Result<void> Catalog::apply_record(const ArenaRecord& record) {
    const std::lock_guard lock(mutex_);
    arena_ = record;
    return {};
}

Result<void> Catalog::apply_record(const BootRecord& record) {
    const std::lock_guard lock(mutex_);
    if (record.manifest) {
        boots_.insert_or_assign(record.root, *record.manifest);
    } else {
        boots_.erase(record.root);
    }
    return {};
}

Result<void> Catalog::apply_record(const SharingRecord& record) {
    const std::lock_guard lock(mutex_);
    const EntityPtr entity = find_locked(record.id);
    if (!entity || entity->kind != EntityKind::kImage) {
        return misfit(RecordKind::kSharing, fmt::format("no image has id {}", record.id));
    }
    entity->shareable_ = record.shareable;
    return {};
}

// --- Checkpoint ----------------------------------------------------------------------------------

Catalog::Frozen Catalog::freeze() const {
    Frozen frozen;
    const std::shared_lock lock(mutex_);
    frozen.next_id = next_id_;
    frozen.imported_bytes = imported_bytes_;
    frozen.written_bytes = written_bytes_;
    frozen.arena = arena_;
    frozen.boots.assign(boots_.begin(), boots_.end());
    frozen.items.reserve(entities_.size());
    for (const auto& [id, entity] : entities_) {
        frozen.items.push_back({.id = id,
                                .parent = entity->parent,
                                .created_ns = entity->created_ns,
                                .kind = entity->kind,
                                .name = entity->name_,
                                .removed_parent_name = entity->removed_parent_name_,
                                .state = entity->state(),
                                .attachment = entity->attachment_,
                                .shareable = entity->shareable_,
                                .origin = entity->origin_});
    }
    std::sort(frozen.items.begin(), frozen.items.end(),
              [](const Frozen::Item& a, const Frozen::Item& b) { return a.id < b.id; });
    return frozen;
}

namespace {

constexpr std::string_view kWhat = "catalog";

format::NodeName to_format(const NodeRef& node) {
    format::NodeName name{};
    name.id = node.id;
    name.hint = node.hint ? node.hint->value() : 0;
    return name;
}

template <typename Struct>
void put(std::vector<std::byte>& out, const Struct& value) {
    const Bytes bytes = bytes_of(value);
    out.insert(out.end(), bytes.begin(), bytes.end());
}
void put_text(std::vector<std::byte>& out, std::string_view text) {
    const Bytes bytes = bytes_of(text);
    out.insert(out.end(), bytes.begin(), bytes.end());
}

/// Takes structs and texts from the front of the catalog's bytes.
class Cursor {
  public:
    explicit Cursor(Bytes bytes) : rest_(bytes) {}

    template <typename Struct>
    Result<Struct> get() {
        STELLARIUM_ASSIGN(const Bytes bytes, take(sizeof(Struct)));
        return stellarium::load<Struct>(bytes);
    }
    Result<Bytes> take(size_t count) {
        if (rest_.size() < count) {
            return bad("it ends early");
        }
        const Bytes bytes = rest_.first(count);
        rest_ = rest_.subspan(count);
        return bytes;
    }
    Result<std::string> text(size_t count) {
        STELLARIUM_ASSIGN(const Bytes bytes, take(count));
        std::string text(count, '\0');
        std::transform(bytes.begin(), bytes.end(), text.begin(),
                       [](std::byte b) { return static_cast<char>(b); });
        return text;
    }
    Result<NodeRef> node(const format::NodeName& name) const {
        if (name.hint.get() >= nebula::PageAddress::kReserved) {
            return bad("a node's hint is out of range");
        }
        NodeRef node{.id = name.id, .hint = std::nullopt};
        if (name.hint.get() != 0) {
            node.hint = nebula::PageAddress(name.hint.get());
        }
        return node;
    }
    std::unexpected<Error> bad(std::string_view why) const {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("catalog, {} bytes before its end: {}", rest_.size(), why));
    }
    bool at_end() const { return rest_.empty(); }
    size_t remaining() const { return rest_.size(); }

  private:
    Bytes rest_;
};

/// What version 2 has more: the boot manifests, and the origins that parents do not tell any more.
void put_boots(std::vector<std::byte>& content, const Catalog::Frozen& frozen) {
    absl::flat_hash_set<uint64_t> ids;
    for (const Catalog::Frozen::Item& item : frozen.items) {
        ids.insert(item.id);
    }
    std::vector<std::byte> origins;
    uint32_t origin_count = 0;
    for (const Catalog::Frozen::Item& item : frozen.items) {
        if (item.kind != EntityKind::kImage && item.origin != Hash256{} &&
            !ids.contains(item.parent)) {
            format::CatalogOrigin origin{};
            origin.id = item.id;
            origin.root = item.origin;
            put(origins, origin);
            ++origin_count;
        }
    }
    format::CatalogBootHeader header{};
    header.boot_count = static_cast<uint32_t>(frozen.boots.size());
    header.origin_count = origin_count;
    put(content, header);
    for (const auto& [root, pieces] : frozen.boots) {
        const std::vector<std::byte> boot = encode(BootRecord{.root = root, .manifest = pieces});
        append_bytes(content, boot);
    }
    append_bytes(content, origins);
}

/// What version 3 has more: which images may be mapped where they lie.
void put_shareable(std::vector<std::byte>& content, const std::vector<uint64_t>& shareable) {
    format::CatalogSharingHeader header{};
    header.shareable_count = static_cast<uint32_t>(shareable.size());
    put(content, header);
    for (const uint64_t id : shareable) {
        put(content, U64Le(id));
    }
}

/// Their ids, ascending.
Result<std::vector<uint64_t>> get_shareable(Cursor& in) {
    STELLARIUM_ASSIGN(const auto header, in.get<format::CatalogSharingHeader>());
    if (header.reserved != std::array<uint8_t, 4>{} ||
        header.shareable_count > in.remaining() / sizeof(U64Le)) {
        return in.bad("the number of shareable images is out of range");
    }
    std::vector<uint64_t> ids;
    ids.reserve(header.shareable_count);
    for (uint32_t i = 0; i < header.shareable_count; ++i) {
        STELLARIUM_ASSIGN(const auto id, in.get<U64Le>());
        if (!ids.empty() && id <= ids.back()) {
            return in.bad("the ids of shareable images do not ascend");
        }
        ids.push_back(id);
    }
    return ids;
}

Result<std::map<Hash256, Pieces>> get_boots(Cursor& in,
                                            absl::flat_hash_map<uint64_t, Hash256>& origins) {
    STELLARIUM_ASSIGN(const auto header, in.get<format::CatalogBootHeader>());
    std::map<Hash256, Pieces> boots;
    for (uint32_t i = 0; i < header.boot_count; ++i) {
        STELLARIUM_ASSIGN(const Bytes bytes, in.take(sizeof(format::Boot)));
        STELLARIUM_ASSIGN(const BootRecord boot, decode<BootRecord>(bytes));
        if (!boot.manifest || !boots.emplace(boot.root, *boot.manifest).second) {
            return in.bad(fmt::format("the boot manifest of {} is named twice, or not there",
                                      boot.root.hex()));
        }
    }
    for (uint32_t i = 0; i < header.origin_count; ++i) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::CatalogOrigin>());
        if (!origins.emplace(packed.id, packed.root).second) {
            return in.bad(fmt::format("the origin of entity id {} is told twice", packed.id.get()));
        }
    }
    return boots;
}

}  // namespace

Result<std::vector<std::byte>> Catalog::save(nebula::Store& store, const Frozen& frozen) {
    // Clones that were not written share their state: it is listed once.
    std::map<std::pair<Hash256, Hash256>, uint32_t> state_numbers;
    std::vector<std::byte> states;
    std::vector<std::byte> entities;
    std::vector<std::byte> attachments;
    uint32_t attachment_count = 0;
    std::vector<const Delta*> in_memory;
    in_memory.reserve(frozen.items.size());
    for (const Frozen::Item& item : frozen.items) {
        in_memory.push_back(&item.state.delta);
    }
    STELLARIUM_ASSIGN(const std::vector<NodeRef> deltas, Delta::persist_all(store, in_memory));
    for (size_t i = 0; i < frozen.items.size(); ++i) {
        const Frozen::Item& item = frozen.items[i];
        const NodeRef& delta = deltas[i];
        const auto [it, is_new] = state_numbers.try_emplace(
            std::pair(item.state.root.id, delta.id), static_cast<uint32_t>(state_numbers.size()));
        if (is_new) {
            format::CatalogState state{};
            state.root = to_format(item.state.root);
            state.delta = to_format(delta);
            state.delta_leaves = item.state.delta.leaves();
            state.delta_extents = item.state.delta.extents();
            put(states, state);
        }
        format::CatalogEntity entity{};
        entity.id = item.id;
        entity.parent = item.parent;
        entity.size_bytes = item.state.size_bytes;
        entity.created_ns = item.created_ns;
        entity.state = it->second;
        entity.kind = static_cast<uint8_t>(item.kind);
        entity.name_bytes = static_cast<uint8_t>(item.name.size());
        entity.parent_name_bytes = static_cast<uint16_t>(item.removed_parent_name.size());
        put(entities, entity);
        put_text(entities, item.name);
        put_text(entities, item.removed_parent_name);
        if (item.attachment) {
            format::CatalogAttachment attachment{};
            attachment.id = item.id;
            attachment.label_bytes = static_cast<uint16_t>(item.attachment->label.size());
            attachment.options_bytes = static_cast<uint16_t>(item.attachment->options.size());
            put(attachments, attachment);
            put_text(attachments, item.attachment->label);
            attachments.insert(attachments.end(), item.attachment->options.begin(),
                               item.attachment->options.end());
            ++attachment_count;
        }
    }

    format::CatalogHeader header{};
    header.next_id = frozen.next_id;
    header.imported_bytes = frozen.imported_bytes;
    header.written_bytes = frozen.written_bytes;
    header.state_count = static_cast<uint32_t>(state_numbers.size());
    header.entity_count = static_cast<uint32_t>(frozen.items.size());
    header.attachment_count = attachment_count;
    header.arena_path_bytes = static_cast<uint16_t>(frozen.arena.path.size());
    header.arena_closed = static_cast<uint8_t>(frozen.arena.closed ? 1 : 0);
    header.arena_id = frozen.arena.id;
    std::vector<std::byte> content;
    content.reserve(sizeof(header) + frozen.arena.path.size() + states.size() + entities.size() +
                    attachments.size());
    put(content, header);
    put_text(content, frozen.arena.path);
    content.insert(content.end(), states.begin(), states.end());
    content.insert(content.end(), entities.begin(), entities.end());
    content.insert(content.end(), attachments.begin(), attachments.end());
    std::vector<uint64_t> shareable;
    for (const Frozen::Item& item : frozen.items) {
        if (item.shareable) {
            shareable.push_back(item.id);
        }
    }
    // Without what a later version has an older program may read and write it.
    const uint32_t version = !shareable.empty()      ? format::kCatalogVersionWithSharing
                             : !frozen.boots.empty() ? format::kCatalogVersionWithBoots
                                                     : format::kCatalogVersion;
    if (version >= format::kCatalogVersionWithBoots) {
        put_boots(content, frozen);
    }
    if (version >= format::kCatalogVersionWithSharing) {
        put_shareable(content, shareable);
    }
    for (const Frozen::Item& item : frozen.items) {
        if (item.state.damage) {
            const std::string_view why =
                std::string_view(*item.state.damage).substr(0, kMaxDamageReasonBytes);
            format::CatalogDamage damage{};
            damage.id = item.id;
            damage.reason_bytes = static_cast<uint16_t>(why.size());
            put(content, damage);
            put_text(content, why);
        }
    }

    format::CatalogRoot root{};
    root.magic = format::kCatalogMagic;
    root.read_version = static_cast<uint16_t>(version);
    root.write_version = static_cast<uint16_t>(version);
    root.catalog_bytes = content.size();
    STELLARIUM_ASSIGN(const Pieces pieces, store_pieces(store, std::move(content), kWhat));
    root.levels = pieces.levels;
    root.pieces = to_format(pieces.top);
    root.checksum = checksum64(bytes_of(root).first(offsetof(format::CatalogRoot, checksum)));
    std::vector<std::byte> payload;
    put(payload, root);
    return payload;
}

namespace {

/// What a checkpoint's payload says about the catalog's pieces.
struct CatalogPieces {
    Pieces pieces;
    uint32_t version = 0;
};

Result<CatalogPieces> decode_root(Bytes payload) {
    if (payload.size() != sizeof(format::CatalogRoot)) {
        return fail(ErrorCode::kCorrupt, fmt::format("checkpoint: its payload has {} bytes, not {}",
                                                     payload.size(), sizeof(format::CatalogRoot)));
    }
    const auto root = stellarium::load<format::CatalogRoot>(payload);
    if (root.magic != format::kCatalogMagic ||
        root.checksum !=
            checksum64(bytes_of(root).first(offsetof(format::CatalogRoot, checksum)))) {
        return fail(ErrorCode::kCorrupt, "checkpoint: its payload is not a catalog's root");
    }
    if (root.read_version > format::kCatalogVersionWithSharing) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("the catalog has format {}, and this version reads up to {}: use a "
                                "newer version",
                                root.read_version.get(), format::kCatalogVersionWithSharing));
    }
    if (root.levels > kMaxPieceLevels) {
        return fail(ErrorCode::kCorrupt, "checkpoint: too many levels of pieces");
    }
    STELLARIUM_ASSIGN(const NodeRef top, Cursor({}).node(root.pieces));
    return CatalogPieces{.pieces = {.top = top, .levels = root.levels, .bytes = root.catalog_bytes},
                         .version = root.read_version};
}

}  // namespace

Result<void> Catalog::for_each_piece(nebula::Store& store, Bytes payload,
                                     const std::function<Result<void>(const NodeRef&)>& visit) {
    if (payload.empty()) {
        return {};
    }
    STELLARIUM_ASSIGN(const CatalogPieces root, decode_root(payload));
    STELLARIUM_TRY(load_pieces(store, root.pieces, kWhat, visit));
    return {};
}

Result<void> Catalog::load(Bytes payload) {
    if (payload.empty()) {
        return {};
    }
    STELLARIUM_ASSIGN(const CatalogPieces root, decode_root(payload));
    STELLARIUM_ASSIGN(const std::vector<std::byte> content,
                      load_pieces(store_, root.pieces, kWhat));

    Cursor in(content);
    STELLARIUM_ASSIGN(const auto header, in.get<format::CatalogHeader>());
    if (header.entity_count > kMaxEntities ||
        header.entity_count > in.remaining() / sizeof(format::CatalogEntity) ||
        header.state_count > in.remaining() / sizeof(format::CatalogState) ||
        header.arena_closed > 1 || header.reserved != 0) {
        return in.bad("its counts are out of range");
    }
    const std::lock_guard lock(mutex_);
    assert(entities_.empty());
    arena_.id = header.arena_id;
    arena_.closed = header.arena_closed != 0;
    STELLARIUM_ASSIGN(arena_.path, in.text(header.arena_path_bytes));
    std::vector<VolumeState> states(header.state_count);
    for (VolumeState& state : states) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::CatalogState>());
        STELLARIUM_ASSIGN(state.root, in.node(packed.root));
        STELLARIUM_ASSIGN(const NodeRef delta, in.node(packed.delta));
        if (!delta.empty()) {
            state.delta =
                Delta::from_name(store_, delta, packed.delta_leaves, packed.delta_extents);
        }
    }
    std::vector<EntityPtr> entities;
    entities.reserve(header.entity_count);
    for (uint32_t i = 0; i < header.entity_count; ++i) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::CatalogEntity>());
        if (packed.kind > static_cast<uint8_t>(EntityKind::kSnapshot) ||
            packed.state >= states.size() || packed.size_bytes > kMaxVolumeBytes ||
            packed.id >= header.next_id) {
            return in.bad(fmt::format("entity id {} is out of range", packed.id.get()));
        }
        auto entity =
            std::make_shared<Entity>(packed.id, static_cast<EntityKind>(packed.kind.get()),
                                     packed.parent, packed.created_ns);
        STELLARIUM_ASSIGN(std::string name, in.text(packed.name_bytes));
        if (!check_name(name)) {
            return in.bad(fmt::format("the name of entity id {} is not valid", packed.id.get()));
        }
        STELLARIUM_ASSIGN(entity->removed_parent_name_, in.text(packed.parent_name_bytes));
        VolumeState state = states[packed.state];
        state.size_bytes = packed.size_bytes;
        entity->publish(state);
        entity->own_bytes = Entity::kUnknownBytes;
        STELLARIUM_TRY(insert_locked(entity, std::move(name)));
        entities.push_back(std::move(entity));
    }
    for (const EntityPtr& entity : entities) {
        if (entity->kind != EntityKind::kSnapshot) {
            continue;
        }
        const EntityPtr volume = find_locked(entity->parent);
        if (!volume || volume->kind != EntityKind::kVolume) {
            return in.bad(fmt::format("snapshot id {} has no volume", entity->id));
        }
        ++volume->snapshots_;
    }
    for (uint32_t i = 0; i < header.attachment_count; ++i) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::CatalogAttachment>());
        const EntityPtr entity = find_locked(packed.id);
        if (!entity) {
            return in.bad(
                fmt::format("an attachment of entity id {}, which is not there", packed.id.get()));
        }
        STELLARIUM_ASSIGN(std::string label, in.text(packed.label_bytes));
        STELLARIUM_ASSIGN(const Bytes options, in.take(packed.options_bytes));
        entity->attachment_ = AttachmentRecordBody{.label = std::move(label),
                                                   .options = {options.begin(), options.end()}};
    }
    absl::flat_hash_map<uint64_t, Hash256> origins;
    if (root.version >= format::kCatalogVersionWithBoots) {
        STELLARIUM_ASSIGN(boots_, get_boots(in, origins));
    }
    if (root.version >= format::kCatalogVersionWithSharing) {
        STELLARIUM_ASSIGN(const std::vector<uint64_t> shareable, get_shareable(in));
        for (const uint64_t id : shareable) {
            const EntityPtr image = find_locked(id);
            if (!image || image->kind != EntityKind::kImage) {
                return in.bad(fmt::format("a shareable image has id {}, which is none", id));
            }
            image->shareable_ = true;
        }
    }
    for (const EntityPtr& entity : entities) {
        if (entity->kind == EntityKind::kImage) {
            entity->origin_ = entity->state().root.id;
        } else if (const EntityPtr parent = find_locked(entity->parent);
                   parent && parent->id < entity->id) {
            entity->origin_ = parent->origin_;
        } else if (const auto kept = origins.find(entity->id); kept != origins.end()) {
            entity->origin_ = kept->second;
        }
    }
    while (!in.at_end()) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::CatalogDamage>());
        const EntityPtr entity = find_locked(packed.id);
        if (!entity || packed.reason_bytes > kMaxDamageReasonBytes ||
            packed.reserved != std::array<uint8_t, 6>{}) {
            return in.bad(fmt::format("the damage of entity id {} is not valid", packed.id.get()));
        }
        VolumeState state = entity->state();
        STELLARIUM_ASSIGN(std::string why, in.text(packed.reason_bytes));
        state.damage = std::make_shared<const std::string>(std::move(why));
        entity->publish(state);
    }
    next_id_ = std::max<uint64_t>(header.next_id, next_id_);
    imported_bytes_ = header.imported_bytes;
    written_bytes_ = header.written_bytes;
    return {};
}

}  // namespace stellarium::nova
