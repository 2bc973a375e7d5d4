// NEBULA, the content store: every unique chunk once, in an append-only log of batches.
//
// Use it through nova (volumes); use it directly for content-addressed objects. The formats are in
// docs/formats/, the order of durability in docs/internals/crash-model.md.
//
//     auto store = Store::open(env, "/srv/pool", {});
//     STELLARIUM_TRY((*store)->replay(sink));            // exactly once, before anything else
//     WriteBatch batch;
//     batch.add_chunk(id, pages);                        // id == hash(pages)
//     batch.add_record(kind, payload);                   // given back to replay() after a crash
//     auto appended = (*store)->append(batch);           // visible; survives process death
//     STELLARIUM_TRY((*store)->sync(appended->sequence)); // durable; shared with all who wait
//
// Thread rule: after replay() every function may be called from any thread at the same time. Calls
// may block on the disk except where they say otherwise.
// Ownership: bytes given to a WriteBatch are borrowed until append() returns.
// Errors: kReadOnly once the store is poisoned or was opened read-only; kNoSpace leaves the store
// consistent and usable; kCorrupt names file, offset, id and reason.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/hash.h"
#include "io/io.h"
#include "nebula/collection.h"
#include "nebula/types.h"

namespace stellarium::nebula {

/// Where a chunk of whole pages lies. Valid until garbage collection frees or moves it; read() says
/// kStale then, and never gives other bytes.
struct ChunkLocation {
    PageAddress address;  ///< Of its first page.
    uint8_t pages = 0;    ///< 1 to kMaxChunkPages.
};

/// What one append will write: chunks, objects, and records of the layers above.
/// Belongs to one thread until given to append(). Duplicates, within the batch or of stored
/// chunks, are found by append() and not written.
class WriteBatch {
  public:
    /// Adds a chunk of 1 to kMaxChunkPages whole pages; `id` must be their hash (asserted in debug
    /// builds). Returns its ordinal among the chunks of this batch.
    size_t add_chunk(const ChunkId& id, Bytes pages);

    /// Adds an object of 0 to kMaxObjectBytes bytes; `id` must be the hash of `content`. `aux` are
    /// bytes stored beside it and not covered by the id (location hints); they come back unverified
    /// from get_object, and are those of the first store of this content. Objects that fit are
    /// packed together (Cosmic Packs).
    void add_object(const ChunkId& id, Bytes content, Bytes aux = {});

    /// Adds a record for replay. Copied. Records of one batch are replayed together or not at all,
    /// in this order, and after every record of earlier batches.
    void add_record(uint16_t kind, Bytes payload);

    bool empty() const { return chunks_.empty() && objects_.empty() && records_.empty(); }
    uint64_t data_bytes() const { return data_bytes_; }
    void clear();

  private:
    friend class StoreImpl;
    struct Chunk {
        ChunkId id;
        Bytes pages;
    };
    struct Object {
        ChunkId id;
        Bytes content;
        Bytes aux;
    };
    struct Record {
        uint16_t kind;
        std::vector<std::byte> payload;
    };
    std::vector<Chunk> chunks_;
    std::vector<Object> objects_;
    std::vector<Record> records_;
    uint64_t data_bytes_ = 0;
};

/// What an append did.
struct Appended {
    uint64_t sequence = 0;                 ///< Of the last batch written; give it to sync().
    std::vector<ChunkLocation> locations;  ///< One for each add_chunk, in order.
    uint64_t new_bytes = 0;                ///< Chunk and object content written.
    uint64_t duplicate_bytes = 0;          ///< Chunk content that was already there.
};

struct ObjectBytes {
    std::vector<std::byte> content;  ///< Verified against its id.
    std::vector<std::byte> aux;      ///< Not verified: hints.
};

/// A chunk or object whose stored bytes fail their check, or cannot be read.
struct DamagedChunk {
    ChunkId id;
    PageAddress address;        ///< Where it starts.
    std::string file;           ///< With its path.
    uint64_t offset_bytes = 0;  ///< Of its bytes, in the file.
    std::string reason;         ///< In words, with file and offset.
};

/// How far a call to scrub() came.
struct ScrubStep {
    PageAddress next{};    ///< Where to go on; "nowhere": the end was reached.
    uint64_t bytes = 0;    ///< Read.
    uint64_t entries = 0;  ///< Chunks and objects checked.
    uint64_t damaged = 0;  ///< Of those.
};

/// Receives the records after the last checkpoint, in commit order.
class ReplaySink {
  public:
    virtual ~ReplaySink() = default;
    /// An error stops the replay and is returned from Store::replay.
    virtual Result<void> replay(uint64_t sequence, uint16_t kind, Bytes payload) = 0;
    /// Of a store opened for salvage (check.h): here, before what follows, durable records may be
    /// missing, for the reason `why`.
    virtual Result<void> records_missing(const std::string& why);
};

struct StoreOptions {
    bool read_only = false;      ///< Take no lock for writing, change nothing.
    bool verify_always = false;  ///< Check every read against its id, not only the first.
    /// Open on file systems that cannot keep the promises (network) all the same.
    bool allow_unsafe_file_system = false;
    /// 256 KiB to 64 MiB, whole pages; smaller than the default in tests only.
    uint64_t segment_bytes = uint64_t{64} << 20;
    /// A checkpoint writes the index anew when the log has grown by this many times the index since
    /// the last time (or by 16 GiB); until then opening reads the footers of what is newer. 0: each
    /// time.
    uint32_t index_rewrite_factor = 64;
    /// Footers kept mapped at once; fewer in tests only.
    size_t mapped_footers = 16384;
    /// Room that is kept on the disk for what frees room, see reserve.h; 0: none. Programs ask for
    /// kReserveBytes.
    uint64_t reserve_bytes = 0;
};
/// In the store's directory, written in place for as long as the store lives.
inline constexpr std::string_view kSuperblockName = "superblock";
inline constexpr uint64_t kMinSegmentBytes = uint64_t{256} << 10;

struct StoreStats {
    uint64_t chunks = 0;           ///< Distinct chunks and objects.
    uint64_t unique_bytes = 0;     ///< Their plain content.
    uint64_t stored_bytes = 0;     ///< Bytes the segment files take on disk.
    uint64_t appended_bytes = 0;   ///< Bytes ever appended to the log, headers included.
    uint64_t duplicate_bytes = 0;  ///< Chunk bytes given to append() that were already there.
    uint64_t index_bytes = 0;      ///< Memory of the index.
    uint64_t segments = 0;
    uint32_t last_segment = 0;            ///< Highest number; appends go there, or to later ones.
    uint64_t sequence = 0;                ///< Last appended batch.
    uint64_t durable_sequence = 0;        ///< Last durable batch.
    uint64_t index_misses_recovered = 0;  ///< Index misses that footers answered; should be 0.
    uint64_t chunks_verified = 0;
    /// Dead by the last collection or dry run since open, and still taking room on the disk.
    uint64_t dead_bytes = 0;
    uint64_t damaged_chunks = 0;  ///< Known to be damaged, and not yet dead.
    uint64_t reserve_bytes = 0;   ///< Held now; see reserve.h.
    uint64_t full_appends = 0;    ///< That failed because the disk is full, since open.
    bool disk_full = false;       ///< The last append did, unless it was for freeing room.
    /// The log is damaged (read_only_reason() says where), and records that were durable were not
    /// replayed for it: what was replayed is the state of some earlier moment.
    bool records_lost = false;
};

class Store {
  public:
    virtual ~Store() = default;  ///< Drops the lock; does not checkpoint: call close() for that.

    /// Makes an empty store in `directory`, which must be missing or empty. Durable on return.
    static Result<void> create(const io::Env& env, const std::string& directory,
                               const StoreOptions& options);
    /// Locks and recovers. kBusy names the pid of a holder; kNotFound says how to create a store;
    /// kUnsupported for a newer format, unknown features or an unsafe file system; kCorrupt.
    static Result<std::unique_ptr<Store>> open(const io::Env& env, const std::string& directory,
                                               const StoreOptions& options);

    /// The payload of the newest checkpoint; empty when there was none. Valid until replay().
    virtual Bytes checkpoint_payload() const = 0;
    /// Gives `sink` every record after the checkpoint. Call once, before any other function except
    /// checkpoint_payload, get_object, resolve and read.
    virtual Result<void> replay(ReplaySink& sink) = 0;

    /// Dedups and appends. On return it is visible, and survives process death. Large batches are
    /// written as several, records in the last. On error no record of it will be replayed.
    virtual Result<Appended> append(WriteBatch& batch) = 0;
    /// Waits until every batch up to `sequence` is durable. Concurrent callers share one sync.
    virtual Result<void> sync(uint64_t sequence) = 0;
    /// The last appended sequence number.
    virtual uint64_t sequence() const = 0;

    /// Which of `ids` are stored; batched probe, each hit confirmed against the full id.
    virtual Result<void> contains(std::span<const ChunkId> ids, std::span<bool> out) = 0;
    /// Where chunk `id` lies. `hint`, when given, is checked first and saves the index probe.
    /// kNotFound: not stored (after falling back to the footers).
    virtual Result<ChunkLocation> resolve(const ChunkId& id,
                                          std::optional<PageAddress> hint = {}) = 0;
    /// Fills `into` with consecutive pages from `address`; all must belong to stored chunks that
    /// resolve() gave (a run may span several chunks). The total length must be whole pages. Each
    /// chunk is verified before its first byte is served. kWouldBlock with kNoWait when the pages
    /// are not in memory or not verified yet; `into` may be partly overwritten then.
    /// kStale: what was there has been freed or moved, or is damaged and stored elsewhere too: look
    /// it up by its id.
    virtual Result<void> read(PageAddress address, std::span<const iovec> into, IoMode mode) = 0;
    /// Reads an object (or a chunk as bytes) by its id. kNotFound, kCorrupt.
    virtual Result<ObjectBytes> get_object(const ChunkId& id,
                                           std::optional<PageAddress> hint = {}) = 0;
    /// Where object `id` starts, as a hint for get_object later; nullopt when not stored.
    virtual std::optional<PageAddress> object_address(const ChunkId& id) = 0;
    /// Opens a segment's file for somebody who maps it. While that file, a copy of its descriptor
    /// in whatever process, or a mapping of it lives, no collection moves, punches or unlinks the
    /// segment, also those of the processes that have the store later. What a collection declared
    /// dead before may be punched all the same: read() what will be used afterwards, and when that
    /// is kStale, begin again. kStale: there is no such segment (any more). kBusy: it is being
    /// freed.
    virtual Result<std::shared_ptr<io::File>> lease_segment(uint32_t segment) = 0;
    /// Hints the pages to be read into the page cache soon. Never blocks.
    virtual void prefetch(PageAddress address, uint32_t pages) = 0;

    /// Publishes a checkpoint: `payload` (at most kMaxCheckpointPayload bytes) holds the effect of
    /// every record up to `sequence` and names only objects already appended. Syncs.
    virtual Result<void> checkpoint(uint64_t sequence, Bytes payload) = 0;
    /// Bytes appended since the last checkpoint: what a restart would have to replay.
    virtual uint64_t bytes_since_checkpoint() const = 0;
    /// Writes into the superblock how far the log is durable, so that later damage at its end is
    /// not taken for a torn end. Two pages and a sync, or nothing when it stands there already.
    /// close() does it; do it now and then when nothing is appended any more.
    virtual Result<void> prove_durable() = 0;

    /// Begins a garbage collection, see collection.h. kBusy: one is running. The store outlives it.
    virtual Result<std::unique_ptr<Collection>> begin_collection() = 0;
    /// A handle on this store for work of several appends whose last one makes the rest reachable
    /// (an import): until it is destroyed, every collection keeps whatever append() wrote, or found
    /// as a duplicate, through it, and whatever contains() found. Everything else is passed on, so
    /// ids and addresses are the same, and closing it closes the store. The store outlives it.
    virtual std::unique_ptr<Store> protect() = 0;

    /// Reads live chunks and objects from the disk (past the page cache) and checks them against
    /// their ids, in the order of addresses from `from` on (the default: from the start), until
    /// `budget_bytes` have been read or the end is reached; at least one. What is damaged is given
    /// to `report` and remembered, durably with the next checkpoint: it is not used for
    /// deduplication, and when its content is appended again, that copy is found from then on, and
    /// the damaged one is passed over until a collection frees it.
    /// Errors are those of the store, not of single chunks. How fast is up to the caller.
    virtual Result<ScrubStep> scrub(PageAddress from, uint64_t budget_bytes,
                                    const std::function<void(const DamagedChunk&)>& report) = 0;
    /// What is known to be damaged, and has no other copy.
    virtual Result<std::vector<DamagedChunk>> damaged() = 0;

    virtual StoreStats stats() const = 0;
    virtual const std::string& directory() const = 0;
    /// Random, made at creation; names this store in arenas, checkpoints and segments.
    virtual std::array<uint8_t, 16> uuid() const = 0;
    /// Why nothing can be written; nullopt when it can.
    virtual std::optional<std::string> read_only_reason() const = 0;
    /// What the operator should know (file system kind, rebuilt index, a cut-off tail), as
    /// sentences. Filled by open().
    virtual std::vector<std::string> warnings() const = 0;
    /// Syncs, proves it, and releases the lock. Further calls fail.
    virtual Result<void> close() = 0;
};

}  // namespace stellarium::nebula
