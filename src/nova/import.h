// Import: a stream of bytes in ascending order becomes chunks and a tree.
//
// The caller's bytes are gathered in pieces of about 2 MiB. A full piece is cut at once (one cache
// line a page); the pages of a chunk that the next page may still join are carried over to the next
// piece. Workers hash the chunks of full pieces; an appender takes the pieces in order, appends
// their chunks, some pieces in one batch, and builds the tree. So the result does not depend on how
// the caller divided the bytes, on zeros given or left out, or on the number of workers: equal
// content has an equal root.
//
//     ImportPipeline pipeline(store, {.workers = 2});
//     STELLARIUM_TRY(pipeline.append(0, bytes));
//     STELLARIUM_ASSIGN(const ImportedTree tree, pipeline.finish());
//
// Thread rule: append, finish and the destructor from one thread; progress() from any.
// Memory: a bounded number of buffers; append() waits when all are in use.
// Durability: everything is appended when finish() returns; nothing is synced.
// Errors: kInvalidArgument for offsets that do not ascend or reach beyond kMaxVolumeBytes; a failed
// append of the store is returned by the next call, and by every call after it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "nebula/chunker.h"
#include "nebula/store.h"
#include "nova/limits.h"
#include "nova/pool.h"
#include "nova/tree.h"

namespace stellarium::nova {

struct ImportedTree {
    NodeRef root;
    uint64_t end_bytes = 0;   ///< Where the last byte given ended.
    uint64_t data_bytes = 0;  ///< In chunks.
};

class ImportPipeline {
  public:
    struct Options {
        unsigned workers = 0;  ///< Threads that cut and hash; 0: everything in append().
    };
    ImportPipeline(nebula::Store& store, Options options);
    ~ImportPipeline();
    ImportPipeline(const ImportPipeline&) = delete;
    ImportPipeline& operator=(const ImportPipeline&) = delete;

    Result<void> append(uint64_t offset_bytes, Bytes data);
    Result<ImportedTree> finish();
    ImageImport::Progress progress() const;

  private:
    /// Consecutive pages on their way.
    struct Piece {
        std::unique_ptr<std::byte[]> buffer;  ///< kPieceBytes.
        uint64_t first_page = 0;
        uint64_t filled_bytes = 0;
        std::vector<nebula::Cut> cuts;
        std::vector<Hash256> ids;
        bool hashed = false;

        uint64_t start_bytes() const { return first_page * kPageBytes; }
        Bytes pages_of(const nebula::Cut& cut) const {
            return {buffer.get() + (cut.first_page - first_page) * kPageBytes,
                    cut.pages * kPageBytes};
        }
    };
    using PiecePtr = std::unique_ptr<Piece>;

    Result<PiecePtr> start_piece(uint64_t page);
    Result<void> submit(bool next_page_follows);
    Result<void> hand_on(PiecePtr piece);
    static void hash(Piece& piece);
    Result<void> append_pieces(std::vector<PiecePtr>& pieces);
    Result<void> add_extent(uint64_t leaf, const Extent& extent);
    void run_worker();
    void run_appender();
    void stop();
    void set_error(const Error& error);

    nebula::Store& store_;
    const Options options_;
    // Of the appender, and of finish() when it is gone.
    TreeBuilder builder_;
    uint64_t leaf_ = 0;
    Extents leaf_extents_;

    // The caller's side.
    PiecePtr current_;
    uint64_t end_bytes_ = 0;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<PiecePtr> spare_;  ///< Guarded by mutex_, as all below.
    std::deque<Piece*> to_hash_;
    std::deque<PiecePtr> in_order_;  ///< Everything submitted and not appended yet.
    bool appending_ = false;
    bool stopping_ = false;
    std::optional<Error> error_;
    std::vector<std::thread> threads_;

    std::atomic<uint64_t> bytes_{0};
    std::atomic<uint64_t> new_bytes_{0};
    std::atomic<uint64_t> duplicate_bytes_{0};
    std::atomic<uint64_t> zero_bytes_{0};
    std::atomic<uint64_t> data_bytes_{0};
};

}  // namespace stellarium::nova
