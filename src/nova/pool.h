// NOVA: images, volumes, snapshots and clones in one store.
//
//     auto pool = Pool::open(env, "/srv/pool", {.runtime_directory = "/run/stellarium"});
//     auto import = (*pool)->begin_import("debian");      // feed it, then import->finish(size)
//     (*pool)->clone("debian", {"vm-1", "vm-2"});         // O(1) each, one batch, durable
//     auto device = (*pool)->attach("vm-1", {});          // a BlockDevice for a frontend
//
// Names are [A-Za-z0-9._-]{1,128}, not "." or ".."; images and volumes share one name space; a
// snapshot is written VOLUME@SNAPSHOT. Where a function takes a `source` it accepts all three.
//
// Thread rule: every function may be called from any thread at the same time.
// Durability: what changes something is durable when it returns success, and has then happened
// wholly; on error it has not, or the pool is read-only, and open() tells. Device writes: see
// base/block_device.h.
// Damage: a volume that something has rotted of that was needed to recover it is damaged, see
// EntityInfo::damage; the pool opens with all others. Where the log itself is damaged so that
// records are missing, that is every volume, and the pool is read-only.
// Errors: kNotFound, kAlreadyExists, kInvalidArgument (names, sizes), kBusy (names the attachment),
// and those of nebula/store.h.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/block_device.h"
#include "base/error.h"
#include "base/hash.h"
#include "io/io.h"
#include "nebula/store.h"
#include "nova/entity.h"
#include "nova/limits.h"

namespace stellarium::nova {

/// What is known of an image, volume or snapshot.
struct EntityInfo {
    EntityKind kind = EntityKind::kVolume;
    uint64_t id = 0;   ///< Never used again after removal.
    std::string name;  ///< For a snapshot: "VOLUME@SNAPSHOT".
    uint64_t size_bytes = 0;
    std::string parent;           ///< What it was cloned from or is a snapshot of; "" for none.
    bool parent_removed = false;  ///< `parent` is the name it had.
    std::chrono::nanoseconds created{};  ///< Since 1970, UTC.
    bool attached = false;               ///< A device of it is open, or an attachment is on record.
    std::string attachment;              ///< Label of the attachment; "" for none.
    uint64_t dirty_bytes = 0;            ///< Acknowledged, not yet in the log.
    uint64_t snapshots = 0;              ///< Of a volume.
    bool shareable = false;              ///< Of an image; see Pool::set_shareable.
    /// Why its content is not known, so that it can only be renamed, removed and, if it has a
    /// snapshot that is not damaged, rolled back; "": it is intact as far as is known.
    std::string damage;
};

/// Costs a walk of the tree: what info() adds for one entity. Of a damaged one only `info` and
/// `lineage` are given.
struct EntityDetail {
    EntityInfo info;
    uint64_t data_bytes = 0;  ///< Mapped, in whole pages: not holes.
    uint64_t extents = 0;
    Hash256 root;  ///< Canonical root (the delta folded), computed now for volumes.
    std::vector<std::string> lineage;  ///< Parent, its parent, ... as far as known.
};

/// When the pool collects garbage by itself. Only with PoolOptions::background.
struct GcPolicy {
    bool automatic = true;
    /// Collect when this share of the stored bytes is dead, as far as known.
    double dead_share = 0.25;
    /// Less dead than this is not worth a collection, unless space is short.
    uint64_t min_dead_bytes = uint64_t{256} << 20;
    /// Space is short, and every bit counts, when less than this share of the file system is free.
    double low_space_share = 0.10;
    /// A collection for want of space follows another not sooner than this.
    std::chrono::seconds low_space_interval{600};
    /// Bytes copied and freed per second by automatic collections; 0: as fast as it goes.
    uint64_t rate_bytes_per_second = uint64_t{256} << 20;
};

/// How far a collection is. `done` of `total`, which is an estimate; 0: unknown.
struct GcProgress {
    enum class Phase : uint8_t {
        kMark,     ///< Objects found to be needed.
        kFree,     ///< Not counted.
        kRewrite,  ///< Leaves of volumes written anew.
    };
    Phase phase = Phase::kMark;
    uint64_t done = 0;
    uint64_t total = 0;
};

struct GcOptions {
    bool dry_run = false;                ///< Only says what would be freed.
    uint64_t rate_bytes_per_second = 0;  ///< Copied and freed; 0: as fast as it goes.
    /// Called now and then by the thread that collects.
    std::function<void(const GcProgress&)> progress{};
    /// Asked now and then; true: stop, with kCancelled.
    std::function<bool()> cancelled{};
};

/// What a collection did, or with dry_run would do.
struct GcReport {
    uint64_t live_bytes = 0;       ///< Content of the chunks and objects that are needed.
    uint64_t live_chunks = 0;      ///< How many those are.
    uint64_t dead_bytes = 0;       ///< Content of those that are not, and were freed.
    uint64_t dead_chunks = 0;      ///< How many those are.
    uint64_t freed_bytes = 0;      ///< Given back to the file system.
    uint64_t moved_bytes = 0;      ///< Needed, and copied so that the rest could go.
    uint64_t rewritten_bytes = 0;  ///< Live parts of chunks, stored anew without the dead parts.
    uint64_t segments_freed = 0;   ///< Files.
    std::chrono::nanoseconds duration{};

    /// Adds a collection that followed.
    void add(const nebula::CollectionReport& next);
};

/// Garbage and collections, as of now.
struct GcStats {
    bool running = false;
    GcProgress progress{};           ///< Of the one that runs.
    uint64_t collections = 0;        ///< Completed since the pool was opened; no dry runs.
    uint64_t failures = 0;           ///< That ended with an error; not those that were cancelled.
    uint64_t freed_bytes = 0;        ///< By all of those.
    uint64_t reclaimable_bytes = 0;  ///< Dead now: an estimate, see Catalog::DeadEstimate.
    std::optional<GcReport> last;    ///< The last one that completed.
    std::chrono::nanoseconds last_ended{};  ///< Since 1970, UTC; 0: none has.
    std::string last_error;                 ///< Of the last one, if it failed.
};

/// When the pool is scrubbed by itself. Only with PoolOptions::background.
struct ScrubPolicy {
    /// A pass begins this long after the last one did, the first one so long after the pool was
    /// first opened with a schedule; it is spread over half of that time. 0: never.
    std::chrono::seconds every{0};
    /// Read by it per second at most.
    uint64_t rate_bytes_per_second = uint64_t{64} << 20;
    /// At least this much a second, however long the pass may take.
    uint64_t least_rate_bytes_per_second = uint64_t{4} << 20;
    /// It reads during this share of the time at most, so that it leaves a disk that is slow,
    /// because guests use it, to them.
    double share_of_time = 0.2;
};

/// One pass over everything that is stored, as far as it has come.
struct ScrubPass {
    std::chrono::nanoseconds started{};  ///< Since 1970, UTC.
    std::chrono::nanoseconds ended{};    ///< 0: it is not complete.
    uint64_t bytes = 0;                  ///< Read and checked.
    uint64_t entries = 0;                ///< Chunks and objects checked.
    uint64_t damaged = 0;                ///< Of those, found damaged without another copy.
};

struct ScrubOptions {
    bool restart = false;                ///< From the start, and not where the last one stopped.
    uint64_t rate_bytes_per_second = 0;  ///< Read; 0: as fast as it goes.
    /// Called now and then by the thread that scrubs, with the pass and what it may come to.
    std::function<void(const ScrubPass&, uint64_t total_bytes)> progress{};
    /// Asked now and then; true: stop, with kCancelled. The next one goes on there.
    std::function<bool()> cancelled{};
};

/// Scrubbing, as of now.
struct ScrubStats {
    bool running = false;
    std::optional<ScrubPass> present;  ///< Running, or interrupted.
    uint64_t total_bytes = 0;          ///< What a pass reads, about.
    std::optional<ScrubPass> last;     ///< The last one that was completed, of any process.
    uint64_t checked_bytes = 0;        ///< Since the pool was opened.
    uint64_t passes = 0;               ///< Completed since then.
    /// Chunks and objects known to be damaged, found by whomever, that have no other copy.
    uint64_t damaged_chunks = 0;
    std::chrono::nanoseconds next_due{};  ///< By schedule, since 1970, UTC; 0: there is none.
    std::string last_error;               ///< Why the last one stopped, if it failed.
};

struct PoolStats {
    nebula::StoreStats store;
    GcStats gc;
    ScrubStats scrub;
    io::FileSystemSpace space;  ///< Of the file system that the store is on; zeros: not known.
    bool space_low = false;     ///< See GcPolicy::low_space_share.
    uint64_t images = 0;
    uint64_t volumes = 0;
    uint64_t snapshots = 0;
    uint64_t attachments = 0;
    uint64_t logical_bytes = 0;   ///< Sum of the sizes of all images and volumes.
    uint64_t imported_bytes = 0;  ///< Non-hole bytes given to imports since creation.
    uint64_t written_bytes = 0;   ///< Bytes written by devices and appended, since creation.
    uint64_t dirty_bytes = 0;     ///< In the arena now.
    uint64_t delta_extents = 0;   ///< In memory, of live volumes.
    uint64_t node_cache_bytes = 0;
};

struct PoolOptions {
    nebula::StoreOptions store{};
    /// Where the dirty arena lives: a directory on a memory file system, so that acknowledged
    /// writes outlive the process. Empty: private memory (a command that opens the pool for
    /// itself).
    std::string runtime_directory{};
    uint64_t dirty_budget_bytes = uint64_t{256} << 20;
    uint64_t node_cache_bytes = uint64_t{64} << 20;
    std::chrono::milliseconds writeback_age{5000};  ///< Dirty longer than this: appended.
    /// Log bytes after which a checkpoint is made in the background.
    uint64_t checkpoint_bytes = uint64_t{512} << 20;
    unsigned hash_threads = 0;  ///< For imports; 0: one a core, at most 8.
    GcPolicy gc{};
    ScrubPolicy scrub{};
    /// Told what an operator should see in a log: warnings of a full disk, collections that were
    /// made or failed. Called from background threads.
    std::function<void(const std::string& sentence)> notice{};
    /// Of a damaged store that is read-only, show volumes of which acknowledged writes are missing,
    /// as they were before those. Otherwise such volumes are refused, as damaged. Images and
    /// snapshots never change and are shown either way.
    bool allow_stale = false;
    /// Background threads. false (model tests): nothing happens but in calls; flush_async completes
    /// before it returns.
    bool background = true;
};

/// Feeds one new image. Destroyed without finish(): nothing is left but unreferenced chunks.
/// Thread rule: one thread.
class ImageImport {
  public:
    virtual ~ImageImport() = default;
    /// Bytes at an offset. Offsets ascend and do not overlap; gaps are holes. Copied.
    virtual Result<void> append(uint64_t offset_bytes, Bytes data) = 0;
    /// The image is `size_bytes` long, from the end of what was appended on holes; on return it is
    /// durable and has its name.
    virtual Result<EntityInfo> finish(uint64_t size_bytes) = 0;

    /// So far, for progress bars.
    struct Progress {
        uint64_t bytes = 0;            ///< Appended.
        uint64_t new_bytes = 0;        ///< Stored because nothing equal was there.
        uint64_t duplicate_bytes = 0;  ///< Already there.
        uint64_t zero_bytes = 0;       ///< Zero pages, which cost nothing.
    };
    virtual Progress progress() const = 0;
};

/// Pages of a state that lie one after another in the store.
struct StoredRun {
    uint64_t page = 0;  ///< Of the state: the first one.
    nebula::PageAddress address;
    uint32_t pages = 0;
};

/// Pages of a state that lie one after another in a leased file.
struct LeasedRun {
    uint64_t page = 0;  ///< Of the state: the first one.
    uint32_t pages = 0;
    uint32_t file = 0;  ///< Which of LeasedRange::files.
    uint64_t file_offset_bytes = 0;
};
/// Content where it lies in the store, to be mapped. What no run names is a hole.
struct LeasedRange {
    std::vector<std::shared_ptr<io::File>> files;
    std::vector<LeasedRun> runs;  ///< Ascending by page.
};

/// A fixed state of an image, volume or snapshot, to read from (export). Holds what completed
/// before it was made. Thread rule: any thread.
class Reader {
  public:
    virtual ~Reader() = default;
    virtual uint64_t size_bytes() const = 0;
    /// First range of data at or after `offset_bytes`, as (offset, length), merged, at most to the
    /// end; nullopt when only holes follow.
    virtual Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(
        uint64_t offset_bytes) = 0;
    /// Any offset and length within the size.
    virtual Result<void> read(uint64_t offset_bytes, MutableBytes into) = 0;

    // For whoever brings content into memory before it is asked for.

    /// Calls `visit` for the runs of pages that hold [first_page, first_page + pages), in this
    /// order, without holes. An address may go stale.
    virtual Result<void> locate(uint64_t first_page, uint64_t pages,
                                const std::function<void(const StoredRun&)>& visit) = 0;
    /// Reads these pages of the store, which locate() named, so that they are checked and in the
    /// page cache; `into`, as long as they are, is scratch. kStale: something has moved.
    virtual Result<void> stage(nebula::PageAddress address, MutableBytes into) = 0;
    /// Has the system read them soon. Does not block.
    virtual void read_ahead(nebula::PageAddress address, uint32_t pages) = 0;

    /// Leases the segments that hold [first_page, first_page + pages), for as long as the files
    /// that are returned, copies of their descriptors or mappings of them live, in whatever
    /// process (nebula/store.h). Each page has been read and checked when this returns.
    /// kLimitExceeded: there are more than `max_files`.
    virtual Result<LeasedRange> lease(uint64_t first_page, uint64_t pages, size_t max_files) = 0;
};

/// A part of an image, volume or snapshot that cannot be read.
struct BadRange {
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
    /// The damaged chunk, or the damaged node of the tree or delta that would tell what lies there.
    ChunkId cause;
};
struct BadRanges {
    std::vector<BadRange> ranges;  ///< Ascending.
    /// False: there are more (kMaxBadRanges), or newer writes hide parts of these.
    bool complete = true;
};

/// What uses damaged chunks.
struct ChunkUser {
    /// nullopt: the list of all images, volumes and snapshots, as the last checkpoint wrote it; it
    /// has no ranges but one of no length for each cause. The next checkpoint mends it.
    std::optional<EntityKind> kind;
    uint64_t id = 0;
    std::string name;  ///< For a snapshot: "VOLUME@SNAPSHOT".
    BadRanges bad;
};

/// A damaged chunk, object or node, and what cannot be read for it.
struct ChunkDamage {
    nebula::DamagedChunk chunk;
    /// With the ranges that this one is the cause of. Empty: nothing needs it, and the next garbage
    /// collection frees it.
    std::vector<ChunkUser> users;
};
/// All damage that is known.
struct DamageReport {
    uint64_t chunks = 0;              ///< How many there are; see ScrubStats::damaged_chunks.
    std::vector<ChunkDamage> listed;  ///< At most kMaxDamageListed of them.
};

/// What of an image, volume or snapshot is in the page cache of the store's files, counted where it
/// refers to: a page that it refers to twice counts twice. See sharing.h.
struct Sharing {
    EntityKind kind = EntityKind::kVolume;
    uint64_t id = 0;
    std::string name;             ///< For a snapshot: "VOLUME@SNAPSHOT".
    uint64_t stored_bytes = 0;    ///< All that its tree and its delta refer to.
    uint64_t resident_bytes = 0;  ///< Of those, in memory now.
    uint64_t shared_bytes = 0;    ///< Of the latter, what something else refers to as well.
    uint64_t private_bytes = 0;   ///< The others.
};
struct SharingReport {
    std::vector<Sharing> entities;  ///< Images, volumes, snapshots; by name within each kind.
    uint64_t resident_bytes = 0;    ///< What they refer to and is in memory, each page once.
    bool complete = true;           ///< False: something damaged was left out.
};

struct AttachOptions {
    bool read_only = false;
    std::string label{};  ///< Who holds it, for messages: "vhost-user socket vm-1.sock".
    std::string
        serial{};  ///< For BlockDevice::serial; "" takes the volume's name, cut to 20 bytes.
    /// Only what has this id (EntityInfo::id), whatever has the name meanwhile. 0: by the name.
    uint64_t id = 0;
};

struct DiffRange {
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
};

class ReadObserver;

class Pool {
  public:
    /// Without close() the destructor behaves as if the process had died: nothing acknowledged is
    /// lost (with a runtime directory), and the next open replays.
    virtual ~Pool() = default;

    static Result<void> create(const io::Env& env, const std::string& directory,
                               const PoolOptions& options);
    static Result<std::unique_ptr<Pool>> open(const io::Env& env, const std::string& directory,
                                              const PoolOptions& options);
    /// Flushes everything, checkpoints, releases the store. All devices, readers and imports must
    /// be gone. On a full disk, what was never flushed stays in the runtime directory for the next
    /// open, and PoolOptions::notice says so: it outlives the process, and not the system.
    virtual Result<void> close() = 0;

    // Images.
    virtual Result<std::unique_ptr<ImageImport>> begin_import(std::string_view name) = 0;

    /// Whether clients of a daemon may map this image's content where it lies in the store: who
    /// does can read whatever else is in the same segments.
    virtual Result<EntityInfo> set_shareable(std::string_view image, bool shareable) = 0;

    // Volumes.
    virtual Result<EntityInfo> create_volume(std::string_view name, uint64_t size_bytes) = 0;
    /// Clones `source` to each of `names`, all in one batch. Size: the source's, rounded up to
    /// sectors. At most kMaxClonesPerCall names.
    virtual Result<void> clone(std::string_view source, const std::vector<std::string>& names) = 0;
    /// Shrinking is refused while attached.
    virtual Result<EntityInfo> resize(std::string_view volume, uint64_t size_bytes) = 0;
    virtual Result<void> rename(std::string_view from, std::string_view to) = 0;
    /// Images and volumes (with their snapshots); all or none; refused while attached.
    virtual Result<void> remove(const std::vector<std::string>& names) = 0;

    // Snapshots.
    virtual Result<EntityInfo> create_snapshot(std::string_view volume,
                                               std::string_view snapshot) = 0;
    virtual Result<void> rollback(std::string_view volume, std::string_view snapshot) = 0;
    virtual Result<void> remove_snapshot(std::string_view volume, std::string_view snapshot) = 0;

    // Looking.
    /// Sorted by name. Snapshots: of one volume, or of all when `volume` is empty.
    virtual std::vector<EntityInfo> images() const = 0;
    virtual std::vector<EntityInfo> volumes() const = 0;
    virtual Result<std::vector<EntityInfo>> snapshots(std::string_view volume) const = 0;
    virtual Result<EntityInfo> find(std::string_view source) const = 0;
    /// What has this id, whatever its name is by now.
    virtual Result<EntityInfo> find(uint64_t id) const = 0;
    virtual Result<EntityDetail> detail(std::string_view source) = 0;
    /// EntityDetail::data_bytes of what has this id, without what is dirty. Walks the tree when the
    /// content has changed since the last call for it (never, of images and snapshots) and is not
    /// what the last call for anything found.
    virtual Result<uint64_t> mapped_bytes(uint64_t id) = 0;
    virtual Result<std::unique_ptr<Reader>> open_reader(std::string_view source) = 0;
    /// Ranges that differ, ascending, page-granular, clipped to the larger size.
    virtual Result<void> diff(std::string_view a, std::string_view b,
                              const std::function<Result<void>(DiffRange)>& visit) = 0;

    /// Calls `visit` for each image, volume (its delta included) and snapshot that uses one of
    /// `chunks`, and names the parts that it uses them for; in the order of their ids. Volumes are
    /// looked at as they were last written to the log, without what is dirty; what is damaged as a
    /// whole (EntityInfo::damage) is left out. `cancelled` is asked now and then. See
    /// chunk_users.h.
    virtual Result<void> chunk_users(std::span<const ChunkId> chunks,
                                     const std::function<Result<void>(const ChunkUser&)>& visit,
                                     const std::function<bool()>& cancelled) = 0;

    /// What is in memory of everything that has a name, and who shares it. Reads each node of the
    /// trees and deltas at most three times, however many refer to it. `cancelled` is asked now and
    /// then.
    virtual Result<SharingReport> sharing(const std::function<bool()>& cancelled) = 0;

    // Devices.
    /// Opens a volume, or with read_only also an image or snapshot. A second writable device is
    /// refused with kBusy naming the first. Releasing the pointer detaches: it flushes first.
    virtual Result<std::shared_ptr<BlockDevice>> attach(std::string_view source,
                                                        const AttachOptions& options) = 0;
    /// What a frontend must remember of an attachment across restarts: opaque bytes (at most 4 KiB)
    /// and the label shown in messages. An entity with one counts as attached. nullopt removes it.
    struct AttachmentRecord {
        std::string source;
        std::string label;
        std::vector<std::byte> options;
    };
    virtual Result<void> set_attachment(std::string_view source,
                                        std::optional<AttachmentRecord> record) = 0;
    /// The same of what has this id, whatever its name is by now.
    virtual Result<void> set_attachment(uint64_t id, std::optional<AttachmentRecord> record) = 0;
    virtual std::vector<AttachmentRecord> attachments() const = 0;

    // Boots (src/boot).
    /// Tells `observer` (volume.h) what is read through the devices of the attached volume, image
    /// or snapshot with this id, until it is detached; nullptr ends it. kNotFound: it is not
    /// attached. kBusy: another one observes.
    virtual Result<void> observe_reads(uint64_t id, std::shared_ptr<ReadObserver> observer) = 0;
    /// Reads of guests that wait for the disk now.
    virtual uint32_t waiting_reads() const = 0;
    /// The root of the image that `source` is or descends from, through whatever has been removed
    /// since. kNotFound when it descends from none, or from an empty one.
    virtual Result<Hash256> boot_root(std::string_view source) const = 0;
    /// Names of the images with this root; none: they were removed, and clones are left.
    virtual std::vector<std::string> images_of(const Hash256& root) const = 0;
    /// The boot manifest of images with this root, as it was given; nullopt: there is none.
    virtual Result<std::optional<std::vector<std::byte>>> boot_manifest(const Hash256& root) = 0;
    /// Replaces it (1 to kMaxBootManifestBytes bytes), or removes it. It goes by itself with the
    /// last image, volume and snapshot that descends from the root.
    virtual Result<void> set_boot_manifest(const Hash256& root,
                                           std::optional<std::vector<std::byte>> manifest) = 0;
    virtual bool has_boot_manifest(const Hash256& root) const = 0;
    virtual std::vector<Hash256> boot_manifests() const = 0;  ///< Ascending.

    // The whole.
    virtual PoolStats stats() const = 0;
    virtual Result<void> checkpoint() = 0;
    /// Frees what nothing refers to any more; see docs/internals/garbage-collection.md. Everything
    /// else goes on meanwhile. kBusy: another one is running. kCorrupt names what is damaged; then
    /// nothing was freed.
    virtual Result<GcReport> gc(const GcOptions& options) = 0;
    /// Reads everything that is stored at the time from the disk and checks it, beside everything
    /// else; goes on where the last pass, of any process, was stopped. Returns the pass when it is
    /// complete. What is damaged is remembered, is not used for deduplication, and heals when the
    /// same content is written or imported again; see damage(). kBusy: another one is running, and
    /// not by schedule. Works on a read-only pool, which remembers nothing.
    virtual Result<ScrubPass> scrub(const ScrubOptions& options) = 0;
    /// What is known to be damaged, and who uses it. Walks all trees when anything is.
    virtual Result<DamageReport> damage(const std::function<bool()>& cancelled) = 0;
    virtual std::optional<std::string> read_only_reason() const = 0;
    virtual std::vector<std::string> warnings() const = 0;
    virtual std::array<uint8_t, 16> uuid() const = 0;
};

}  // namespace stellarium::nova
