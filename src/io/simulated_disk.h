// What is on the simulated machine's disks, and what a crash makes of it. Behind simulated.h; not
// for use outside src/io.
//
// Thread rule: none here; the machine's lock covers everything.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "io/io.h"
#include "io/simulated.h"
#include "io/sparse_pages.h"

namespace stellarium::io {

inline constexpr uint64_t kSectorBytes = 512;
inline constexpr uint64_t kPageBytes = SparsePages::kPageBytes;

/// SplitMix64 (Steele, Lea, Flood 2014): small, and any two seeds give unrelated sequences.
class SplitMix64 {
  public:
    explicit SplitMix64(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
        z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
        z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
        return z ^ (z >> 31U);
    }
    /// Less than `bound`, which is not 0. The bias of the remainder does not matter here.
    uint64_t below(uint64_t bound) { return next() % bound; }
    bool one_in(uint64_t n) { return below(n) == 0; }

  private:
    uint64_t state_;
};

/// The bytes of a file that was mapped shared: a memfd, so that mappings and transfers agree and
/// a process may die with stores in flight. Running out of descriptors or memory stops the test.
class SharedMemory {
  public:
    SharedMemory();
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    int descriptor() const { return descriptor_; }
    void read(MutableBytes into, uint64_t offset_bytes) const;
    void write(Bytes from, uint64_t offset_bytes);
    void resize(uint64_t size_bytes);
    void zero(uint64_t offset_bytes, uint64_t length_bytes);
    std::optional<std::pair<uint64_t, uint64_t>> next_data(uint64_t offset_bytes) const;
    std::shared_ptr<SharedMemory> copy(uint64_t size_bytes) const;

  private:
    int descriptor_;
};

/// One change of a file's bytes or size that is not durable yet.
struct Effect {
    enum class Kind : uint8_t { kWrite, kPunch, kTruncate };
    Kind kind = Kind::kWrite;
    uint64_t offset_bytes = 0;  ///< kTruncate: the new size.
    uint64_t length_bytes = 0;
    uint64_t size_after_bytes = 0;
    /// kWrite: the pages that the range lies in, as they were right after it.
    std::vector<SparsePages::PageRef> pages;
};

struct Inode;
using InodeRef = std::shared_ptr<Inode>;

/// One change of a directory that is not durable yet: all of its names change, or none.
struct NameChange {
    uint64_t sequence = 0;                               ///< Machine-wide order.
    std::vector<std::pair<std::string, InodeRef>> sets;  ///< Null: the name is gone.
    /// The target of a rename out of this directory, which is made durable with it, so that a
    /// crash never loses the file from both.
    std::weak_ptr<Inode> target_directory;
};

/// A file or a directory; `is_directory` says which members are in use.
struct Inode {
    uint64_t id = 0;              ///< Order of creation; seeds this inode's fate in a crash.
    uint64_t file_system_id = 0;  ///< The inode that is its file system's root.
    bool is_directory = false;
    bool in_memory = false;  ///< On a memory file system: nothing is queued, a crash forgets it.

    // Files. With `shared`, the bytes seen are there and `seen` is empty; no effects are queued,
    // a crash compares it with `durable`.
    SparsePages seen;
    SparsePages durable;
    uint64_t seen_size_bytes = 0;
    uint64_t durable_size_bytes = 0;
    std::vector<Effect> effects;
    std::shared_ptr<SharedMemory> shared;

    // Directories.
    std::map<std::string, InodeRef> entries;
    std::map<std::string, InodeRef> durable_entries;
    std::vector<NameChange> name_changes;
    std::optional<FileSystemType> mounted;  ///< Set on the root of a file system.

    void read(MutableBytes into, uint64_t offset_bytes) const;
    void write(Bytes from, uint64_t offset_bytes);
    void truncate(uint64_t size_bytes);
    void punch(uint64_t offset_bytes, uint64_t length_bytes);
    void sync_data();
    /// Forgets what was written since the last sync, as a failed fsync may.
    void lose_unsynced();
    std::optional<std::pair<uint64_t, uint64_t>> next_data(uint64_t offset_bytes) const;
    /// Moves the bytes to `shared`.
    void make_shared();

    /// Applies a change to what is seen and queues it.
    void change_names(NameChange change);
    void sync_names();
};

/// The same tree with the same unsynced effects, sharing pages; open but removed files are gone.
InodeRef copy_tree(const Inode& root);
/// What a loss of power leaves of it, all of it durable.
InodeRef crash_tree(const Inode& root, uint64_t seed, CrashStyle style);

/// Effects and name changes that a crash could still undo.
uint64_t unsynced_in_tree(const Inode& root);
/// What the files seen in the tree take, without memory file systems.
uint64_t allocated_pages_in_tree(const Inode& root);

}  // namespace stellarium::io
