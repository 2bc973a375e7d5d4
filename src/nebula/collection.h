// A garbage collection of the content store: the layer above marks what it needs, the rest goes.
//
// docs/internals/garbage-collection.md has the whole of it, and why it loses nothing. In short:
//
//     STELLARIUM_ASSIGN(auto collection, store.begin_collection());  // the barrier is on
//     ... freeze and publish a checkpoint ...
//     STELLARIUM_TRY(collection->fix_position());                    // what is newer is not
//     touched collection->mark_object(root_id, hint);                        // true: visit its
//     children collection->mark_pages(chunk_id, hint, mask);              // bit i: page i of the
//     chunk STELLARIUM_ASSIGN(const CollectionReport report, collection->sweep(options));
//
// Destroyed before sweep(): nothing is freed. One collection at a time (kBusy).
// Thread rule: marking from several threads at once; everything else from one. Appends, reads and
// checkpoints go on beside it.
// Durability: what sweep() freed stays freed; a crash at any point loses nothing that was marked.
// Errors: kNotFound and kCorrupt from marking name the id: the caller must not sweep then, because
// it cannot know what lies below. kReadOnly, kNoSpace, kIo from sweep(): what was not freed yet is
// freed by the next one.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/error.h"
#include "base/hash.h"
#include "nebula/types.h"

namespace stellarium::nebula {

struct SweepOptions {
    bool dry_run = false;  ///< Count, and free nothing.
    /// Bytes of live data read and written again, and of dead data punched, per second; 0: as fast
    /// as it goes.
    uint64_t rate_bytes_per_second = 0;
    /// A segment with less than this share of its pages alive is emptied and unlinked; a pack, too.
    /// So is a segment of which less than half is alive when what is dead lies in many short runs,
    /// because each hole costs time to punch. 0: nothing is moved.
    double move_below = 0.25;
    /// Asked now and then; true: stop as soon as the store is consistent (kCancelled).
    std::function<bool()> cancelled{};
};

struct CollectionReport {
    uint64_t live_chunks = 0;      ///< Chunks and objects kept, of those before the position.
    uint64_t live_bytes = 0;       ///< Their content.
    uint64_t dead_chunks = 0;      ///< Freed by this collection.
    uint64_t dead_bytes = 0;       ///< Their content.
    uint64_t freed_bytes = 0;      ///< Given back to the file system: unlinked and punched.
    uint64_t moved_bytes = 0;      ///< Live content written again.
    uint64_t segments_freed = 0;   ///< Unlinked.
    uint64_t segments = 0;         ///< Looked at.
    uint64_t segments_leased = 0;  ///< Left alone, because somebody has them mapped.
};

/// A chunk that is mostly dead, and that one node only refers to.
struct SparseChunk {
    ChunkId id;
    uint16_t live_pages = 0;  ///< One bit a page.
    uint8_t pages = 0;        ///< Of the chunk.
};

class Collection {
  public:
    virtual ~Collection() = default;

    /// After the caller's checkpoint: considers only what lies before the log position of the
    /// newest one. Before marking.
    virtual Result<void> fix_position() = 0;

    /// What a mark found.
    enum class Mark : uint8_t {
        kNew,    ///< Alive now, and was not: visit what it refers to.
        kAgain,  ///< Marked before.
    };
    /// Marks an object. kNotFound: it is not stored.
    virtual Result<Mark> mark_object(const ChunkId& id, std::optional<PageAddress> hint) = 0;
    /// Marks the pages of a chunk that one node refers to, bit i for page i, all in one call: a
    /// second call counts as a second user of the chunk. At least one bit is set.
    virtual Result<Mark> mark_pages(const ChunkId& id, std::optional<PageAddress> hint,
                                    uint16_t pages) = 0;
    /// True when the object was marked more than once: what lies below it is shared.
    virtual Result<bool> is_shared(const ChunkId& id, std::optional<PageAddress> hint) = 0;
    /// The live pages of a chunk, when less than half of it is alive, one mark only was made, and
    /// no append found it meanwhile; nullopt otherwise.
    virtual Result<std::optional<SparseChunk>> sparse(const ChunkId& id,
                                                      std::optional<PageAddress> hint) = 0;

    /// Frees what is not marked. Once.
    virtual Result<CollectionReport> sweep(const SweepOptions& options) = 0;
};

}  // namespace stellarium::nebula
