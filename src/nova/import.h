// Import: a stream of bytes in ascending order becomes chunks and a tree.
//
// The caller's bytes are gathered in buffers of one leaf (2 MiB). Workers cut and hash full
// buffers; an appender takes them in order, appends their chunks, some leaves in one batch, and
// builds the tree. A leaf is cut without knowledge of its neighbours, so the result does not depend
// on how the caller divided the bytes, on zeros given or left out, or on the number of workers:
// equal content has an equal root.
//
//     LeafPipeline pipeline(store, {.workers = 2});
//     STELLARIUM_TRY(pipeline.append(0, bytes));
//     STELLARIUM_ASSIGN(const ImportedTree tree, pipeline.finish());
//
// Thread rule: append, finish and the destructor from one thread; progress() from any.
// Memory: a bounded number of leaf buffers; append() waits when all are in use.
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

class LeafPipeline {
  public:
    struct Options {
        unsigned workers = 0;  ///< Threads that cut and hash; 0: everything in append().
    };
    LeafPipeline(nebula::Store& store, Options options);
    ~LeafPipeline();
    LeafPipeline(const LeafPipeline&) = delete;
    LeafPipeline& operator=(const LeafPipeline&) = delete;

    Result<void> append(uint64_t offset_bytes, Bytes data);
    Result<ImportedTree> finish();
    ImageImport::Progress progress() const;

  private:
    /// One leaf on its way.
    struct Leaf {
        std::unique_ptr<std::byte[]> buffer;
        uint64_t number = 0;
        uint64_t filled_bytes = 0;
        std::vector<nebula::Cut> cuts;  ///< Page numbers are the leaf's own.
        std::vector<Hash256> ids;
        bool hashed = false;
    };
    using LeafPtr = std::unique_ptr<Leaf>;

    Result<void> submit();
    LeafPtr take_buffer();
    void cut_and_hash(Leaf& leaf) const;
    Result<void> append_leaves(std::vector<LeafPtr>& leaves);
    void run_worker();
    void run_appender();
    void stop();
    void set_error(const Error& error);

    nebula::Store& store_;
    const Options options_;
    TreeBuilder builder_;

    // The caller's side.
    LeafPtr current_;
    uint64_t end_bytes_ = 0;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<LeafPtr> spare_;  ///< Guarded by mutex_, as all below.
    std::deque<Leaf*> to_hash_;
    std::deque<LeafPtr> in_order_;  ///< Everything submitted and not appended yet.
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
