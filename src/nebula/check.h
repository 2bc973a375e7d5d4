// A store that may be damaged: what is wrong with it, and making it whole again.
//
// open() works where Store::open gives up or stops: the log is followed behind what is damaged in
// it, content is looked for where no header or footer leads to it any more, and nothing is changed
// on disk: no torn end is cut off, no lock file is written with `read_only`. What is then read is
// checked against its id as always. docs/internals/fsck.md says what is looked at and how a repair
// goes; nova/check.h adds what images and volumes make of it.
//
//     STELLARIUM_ASSIGN(auto store, SalvagedStore::open(env, dir, {.read_only = true}, salvage));
//     STELLARIUM_ASSIGN(CheckCounts counts, store->check({}, [](Finding f) { print(f); }));
//     STELLARIUM_TRY(store->replay(sink));         // told where records are missing
//     STELLARIUM_TRY(store->repair(payload));      // only without read_only
//
// Thread rule: one thread; the functions of Store too, until repair() has returned.
// Durability: repair() is durable on return, and until it is, the state before it is whole.
// Errors: findings are no errors. kCorrupt: there is nothing to begin with (no valid superblock).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/hash.h"
#include "io/io.h"
#include "nebula/store.h"

namespace stellarium::nebula {

/// One thing that is not as it should be, in words for an operator.
struct Finding {
    enum class Kind : uint8_t {
        kSuperblock,
        kDeadMap,
        kLog,            ///< Batches that were durable are missing or damaged.
        kSegmentHeader,  ///< The first page of a segment file.
        kBatch,          ///< A stretch of a segment that holds no valid batch.
        kFooter,
        kIndex,
        kChunk,   ///< Bytes that do not match their id, or are not there.
        kObject,  ///< The same of a tree node, or a part of the catalog.
        kVolume,  ///< The content of a volume is not known.
    };
    Kind kind = Kind::kLog;
    /// Nothing has to be done: no damage, and no reason for an exit code.
    bool harmless = false;
    /// A repair ends it, or puts on record what it is. What is lost comes back by no repair.
    bool repairable = false;
    std::string what;                  ///< A sentence without full stop.
    std::string file;                  ///< "": no file in particular.
    std::optional<uint64_t> offset{};  ///< In the file.
    std::optional<ChunkId> id{};
    std::string consequence{};
    std::string advice{};
};
/// "superblock", "dead-map", "log" and so on: stable, for programs.
std::string_view to_string(Finding::Kind kind);

/// Where a check is; `done` of `total` segments.
struct CheckProgress {
    uint64_t done = 0;
    uint64_t total = 0;
    bool data = false;  ///< In the second round, which reads all content.
};

struct CheckOptions {
    bool data = false;  ///< Read all content and check it against its ids.
    std::function<void(const CheckProgress&)> progress{};
    /// Asked now and then; true: stop, with kCancelled.
    std::function<bool()> cancelled{};
};

struct CheckCounts {
    uint64_t segments = 0;
    uint64_t batches = 0;
    uint64_t entries = 0;     ///< Chunks, objects and packs.
    uint64_t data_bytes = 0;  ///< Read and hashed.
};

struct RepairReport {
    uint64_t copied = 0;        ///< Chunks and objects that were stored anew.
    uint64_t copied_bytes = 0;  ///< Their content.
    uint64_t dead_pages = 0;    ///< Given up: nothing in them can be read.
    uint64_t footers = 0;       ///< Written anew.
    uint64_t headers = 0;       ///< Of segments, written anew.
};

enum class Salvage : uint8_t {
    kNone,
    kNewestCheckpoint,
    kOlderCheckpoint,  ///< The one before the newest; kNotFound from open(): there is none.
    /// No checkpoint, but the log from the first batch on; no copy of the superblock is needed
    /// either. kNotFound from open(): it does not hold every batch any more. It takes 50 bytes of
    /// memory for each chunk.
    kWholeLog,
};

class SalvagedStore : public Store {
  public:
    static Result<std::unique_ptr<SalvagedStore>> open(const io::Env& env,
                                                       const std::string& directory,
                                                       const StoreOptions& options,
                                                       Salvage salvage);

    /// Looks at superblock, dead map, every segment, footer and the index. Once, before anything
    /// else. What it finds damaged is remembered (Store::damaged), in memory.
    virtual Result<CheckCounts> check(const CheckOptions& options,
                                      const std::function<void(Finding)>& report) = 0;
    /// Ends the salvage: what can be read of damaged stretches is stored again, what cannot is
    /// given up, and a checkpoint with `payload`, which holds the effect of all that was replayed,
    /// a whole index and both generations of the superblock are written; then headers and footers.
    /// Until the superblock is, nothing that was there before is touched. After check() and
    /// replay(), once; then only close().
    virtual Result<RepairReport> repair(Bytes payload) = 0;
};

}  // namespace stellarium::nebula
