// Open files: which volume is attached for whom, what the kernel may cache of it, and reads and
// writes of any offset and length on devices that take whole sectors.
//
// One frontend writes a volume at a time, and nobody sees pages that another one has made old:
//   - An image or snapshot never changes. Its pages stay cached from one opening to the next.
//   - The first opening of a volume for writing attaches it for writing (the hold); kBusy when
//     another frontend has it. While it is held, every opening may be cached. The hold ends with
//     the last file that was opened for writing or cached; what was written is flushed first.
//   - The first opening of a hold drops what the kernel has of the volume from before it.
//   - A volume that is opened for reading only, while nobody holds it, is read past the cache.
//   - An opening with O_DIRECT is never cached; its writes run beside each other.
//
//     Files files(pool, *table, {.directory = "/srv/disks"});
//     files.adopt();                                     // what an earlier daemon left open
//     STELLARIUM_ASSIGN(Opened opened, files.open(node, O_RDWR, unique, false));
//     STELLARIUM_ASSIGN(Bytes bytes, files.read(node, opened.handle, 0, 4096, scratch));
//     files.release(opened.handle);
//
// Thread rule: any thread; adopt() before anything else.
// Durability: base/block_device.h; flush() and the end of a hold make durable.
// Errors: kNotFound, kBusy, kReadOnly, kNoSpace (a write that begins at or beyond the end),
// kInvalidArgument; those of the device. What an earlier daemon left open and cannot be attached
// any more fails with the reason, each time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/block_device.h"
#include "base/bytes.h"
#include "base/error.h"
#include "base/io_mode.h"
#include "frontend/fuse/open_table.h"
#include "nova/pool.h"

namespace stellarium::fuse {

struct FilesOptions {
    std::string directory;  ///< Where it is mounted, for labels and messages.
    /// Told what an operator should see: a volume that is busy, a flush that failed.
    std::function<void(const std::string& sentence)> warn;
    /// The size of a node has changed.
    std::function<void(uint64_t node)> resized;
    /// Told what open() has attached, and not what adopt() has: a guest may be about to boot. Must
    /// not block, and not come back here.
    std::function<void(const std::string& source)> attached{};
};

struct Opened {
    uint64_t handle = 0;
    bool direct = false;      ///< Past the page cache.
    bool keep_cache = false;  ///< What the kernel has of it is right.
};

class Files {
  public:
    Files(nova::Pool& pool, OpenTable& table, FilesOptions options);
    ~Files();

    /// Attaches what the table names. What cannot be is said by `warn`, and its I/O fails.
    void adopt();

    /// `flags` as of open(2). `resent`: the request may have been done by an earlier daemon.
    Result<Opened> open(uint64_t node, int flags, uint64_t unique, bool resent);
    void release(uint64_t handle);

    /// Up to `length_bytes` from an offset, fewer at the end: a part of `scratch`, which has room
    /// for two sectors more.
    Result<Bytes> read(uint64_t node, uint64_t handle, uint64_t offset_bytes, size_t length_bytes,
                       MutableBytes scratch);
    /// Returns how much was written: less where the end cuts it off. With kNoWait it may be
    /// kWouldBlock, and is then to be done again, whole.
    Result<size_t> write(uint64_t node, uint64_t offset_bytes, Bytes data,
                         IoMode mode = IoMode::kMayBlock);
    /// The range reads as zeros afterwards. `discard`: what lies beyond the end is left out; else
    /// it is an error (kNoSpace). With kNoWait as write().
    Result<void> zero(uint64_t node, uint64_t offset_bytes, uint64_t length_bytes, bool discard,
                      IoMode mode = IoMode::kMayBlock);
    /// For fallocate(2) without a mode: everything within the size is there. kNoSpace beyond.
    Result<void> check_within(uint64_t node, uint64_t offset_bytes, uint64_t length_bytes);
    void flush_async(uint64_t node, std::function<void(Result<void>)> done);
    /// Where data (or a hole) begins at or after an offset; nullopt: not before the end. In volumes
    /// everything is data.
    Result<std::optional<uint64_t>> seek(uint64_t node, uint64_t offset_bytes, bool data);

    /// Flushes what is held; the table stays as it is, for the next daemon.
    void stop();

    size_t open_files() const { return table_.count(); }
    /// What is open, below the directory: "volumes/vm-1"; each once, at most so many.
    std::vector<std::string> open_names(size_t at_most) const;

  private:
    struct Node;
    using NodePtr = std::shared_ptr<Node>;

    Result<NodePtr> find(uint64_t node) const;
    NodePtr find_or_make(uint64_t node);
    Result<std::shared_ptr<BlockDevice>> device_of(Node& node, bool writing) const;
    Result<void> attach(Node& node, bool writing);
    Result<Opened> open_locked(Node& node, int flags, uint64_t unique, bool resent);
    Result<uint32_t> attach_for(Node& node, int flags);
    void let_go(Node& node);

    nova::Pool& pool_;
    OpenTable& table_;
    const FilesOptions options_;
    mutable std::shared_mutex mutex_;
    std::unordered_map<uint64_t, NodePtr> nodes_;  ///< That are open. Guarded by mutex_.
};

}  // namespace stellarium::fuse
