// What of a mounted directory outlives the daemon: the kernel's INIT request, and which files are
// open. It lies in a memory file that the holder (holder.h) keeps, and the next daemon maps.
//
//     OpenTable table = ...create();                       // in the holder; table.descriptor()
//     STELLARIUM_ASSIGN(auto table, OpenTable::map(fd));   // in each daemon
//     for (const OpenFile& file : table->files()) ...      // what the last daemon left open
//     STELLARIUM_ASSIGN(uint64_t handle, table->add({.unique = u, .node = n, .flags = f}));
//     table->remove(handle);
//
// A handle is what the kernel gives back with every request of an open file: the slot in the table
// and the slot's generation. A RELEASE that was done, but not answered, before a daemon died comes
// again; by then the slot may be another file's, and the generation tells. An OPEN that comes again
// is found by `unique`, and gets the handle that it has.
//
// Order: a file is in the table before the kernel hears that it is open, and out of it before the
// kernel hears that it is closed. The fields of a slot are written before its state, with release
// order; a process that dies in between leaves a free slot. One thing stays behind: when whoever
// opened a file is killed between the moment in which the kernel queues its unanswered OPEN again
// and that in which we read it, it never comes, and neither does its RELEASE. The file counts as
// open until the directory is unmounted. (docs/internals/files-over-restarts.md, "What remains")
//
// Thread rule: any thread. One process at a time.
// Errors: kLimitExceeded when kMaxOpenFiles are open; kProtocol for a table of another version.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"
#include "frontend/fuse/limits.h"

namespace stellarium::fuse {

struct OpenFile {
    uint64_t unique = 0;  ///< Of the OPEN request, without the mark of a resent one.
    uint64_t node = 0;
    uint32_t flags = 0;  ///< OpenFlag.
    uint64_t handle = 0;
};

enum OpenFlag : uint32_t {
    kOpenWriting = 1,  ///< May write.
    kOpenCached = 2,   ///< The kernel keeps pages of it.
    kOpenHolds = 4,    ///< Keeps the volume attached for writing.
};

class OpenTable {
  public:
    /// A new, empty memory file of kTableBytes.
    static Result<UniqueFd> create();
    static Result<std::unique_ptr<OpenTable>> map(UniqueFd memory);
    ~OpenTable();
    OpenTable(const OpenTable&) = delete;
    OpenTable& operator=(const OpenTable&) = delete;

    /// The INIT request as the kernel sent it; empty: it has not been saved.
    Bytes init_request() const;
    /// Once. kProtocol when it does not fit.
    Result<void> save_init(Bytes request);

    /// All that are open.
    std::vector<OpenFile> files() const;
    size_t count() const;
    /// Returns the handle.
    Result<uint64_t> add(const OpenFile& file);
    /// By the unique of its OPEN, of files that were open when the table was mapped.
    std::optional<OpenFile> find_left(uint64_t unique) const;
    std::optional<OpenFile> find(uint64_t handle) const;
    /// false: it is not (any more).
    bool remove(uint64_t handle);

  private:
    struct Slot;
    struct Header;
    OpenTable(UniqueFd memory, void* mapped);
    Slot* slot_of(uint64_t handle) const;

    const UniqueFd memory_;
    Header* const header_;
    Slot* const slots_;
    mutable std::mutex mutex_;
    std::vector<uint32_t> free_;                   ///< Slots; the last is taken. Guarded by mutex_.
    std::unordered_map<uint64_t, uint64_t> left_;  ///< Unique to handle. Guarded by mutex_.
};

}  // namespace stellarium::fuse
