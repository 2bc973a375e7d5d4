// The one seam between the engine and the operating system: files, directories, clock, randomness.
//
// Everything that the engine persists goes through a FileSystem and its Files. There are two
// implementations: PosixFileSystem (posix.h) and SimulatedFileSystem (simulated.h), which keeps
// synced state and a queue of unsynced effects and can crash, and fail, by a seed.
//
// What a caller may rely on (the promises of a POSIX file system, no more):
//   - pwrite is visible to later preads at once and survives the death of the process;
//   - it is durable after datasync() returned success, and only then; before that, a crash may
//     keep, drop, reorder or tear it at 512-byte sectors, independently of other writes;
//   - a file's size is made durable by datasync when it is needed to read the data;
//   - a created, renamed or removed name is durable after sync_directory() of its directory;
//   - rename replaces atomically: after a crash the name shows the old or the new file;
//   - a failed datasync or sync means that written data may be lost for ever: the file is poisoned,
//     every later write, truncate, punch, allocation and sync on it fails (kIo), whatever the
//     kernel would say.
//
// Raw transfers (pread, preadv, pwrite, pwritev) may be short, and may fail with kInterrupted;
// write_all, read_exact and read_up_to loop. No other call reports kInterrupted: they retry by
// themselves.
//
// Paths are absolute or relative to the process, '/'-separated. Files are created with mode 0600.
//
// Thread rule: everything here may be called from any thread at the same time.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <sys/uio.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/io_mode.h"

namespace stellarium::io {

/// Read-only bytes of a file, mapped (or, on the simulated disk, copied). Unmapped when destroyed.
/// Later writes to the file may or may not be seen.
class MappedBytes {
  public:
    virtual ~MappedBytes() = default;
    virtual Bytes bytes() const = 0;
    /// Has a range of them read now, so that what cannot be read is an error (kIo) and not the end
    /// of the process at the first access (SIGBUS). What is dropped from memory afterwards is read
    /// again by the next access.
    virtual Result<void> fetch(uint64_t offset_bytes, uint64_t length_bytes) const = 0;
};

/// What tells files of one running system apart; after a restart of the host it may be another.
struct FileIdentity {
    uint64_t device = 0;
    uint64_t inode = 0;
    friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

/// What becomes of written data in the page cache.
enum class Caching : uint8_t {
    kKeep,    ///< It stays for readers until the system needs the memory.
    kStream,  ///< On its way to the device at once, and dropped when it is there. A hint.
};

/// An open file, closed when destroyed.
class File {
  public:
    virtual ~File() = default;

    /// The path it was opened by, for messages.
    virtual const std::string& path() const = 0;

    /// Reads up to `into.size()` bytes at an offset; fewer at the end of the file, or for no reason
    /// at all (short read); 0 only at or past the end.
    virtual Result<size_t> pread(MutableBytes into, uint64_t offset_bytes) = 0;
    /// Scattered pread. kNoWait: kWouldBlock when the bytes are not in memory.
    virtual Result<size_t> preadv(std::span<const iovec> into, uint64_t offset_bytes,
                                  IoMode mode) = 0;
    /// Writes up to from.size() bytes, extending the file; may be short.
    virtual Result<size_t> pwrite(Bytes from, uint64_t offset_bytes) = 0;
    virtual Result<size_t> pwritev(std::span<const iovec> from, uint64_t offset_bytes,
                                   Caching caching) = 0;
    /// Makes the data, and the size needed to read it, durable.
    virtual Result<void> datasync() = 0;

    virtual Result<uint64_t> size_bytes() = 0;
    /// Sets the size; a longer file reads as zeros there.
    virtual Result<void> truncate(uint64_t size_bytes) = 0;
    /// Frees the range, which reads as zeros afterwards; the size stays.
    virtual Result<void> punch_hole(uint64_t offset_bytes, uint64_t length_bytes) = 0;
    /// Reserves space so that writes inside the range do not run out of it; the size stays.
    virtual Result<void> allocate(uint64_t offset_bytes, uint64_t length_bytes) = 0;
    /// The first extent of data at or after `offset`: (offset, length); nullopt when only a hole
    /// follows. File systems without hole tracking report everything as data.
    virtual Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(
        uint64_t offset_bytes) = 0;
    /// Drops the range from the page cache where the system can; a hint.
    virtual void drop_cache(uint64_t offset_bytes, uint64_t length_bytes) = 0;
    /// Asks for the range to be read ahead; a hint that returns at once.
    virtual void read_ahead(uint64_t offset_bytes, uint64_t length_bytes) = 0;

    /// Maps [offset, offset + length), which must lie within the file; offset is page-aligned.
    virtual Result<std::unique_ptr<MappedBytes>> map(uint64_t offset_bytes,
                                                     uint64_t length_bytes) = 0;
    /// Maps the range shared and writable: stores are visible to others at once, survive the death
    /// of the process and are never durable against power loss (for files on memory file systems).
    /// The memory stays valid until the File is destroyed.
    virtual Result<MutableBytes> map_shared(uint64_t offset_bytes, uint64_t length_bytes) = 0;
    /// Which file this is, whatever it is called. A copy is another one.
    virtual Result<FileIdentity> identity() = 0;
    /// Takes an exclusive lock on the file, held until this File is destroyed or the process dies.
    /// kBusy when another File of the same file holds one, of this process or not.
    virtual Result<void> lock() = 0;
    /// Takes a shared lock on the file, beside those of others. It belongs to what was opened, and
    /// so lasts as long as this File, any copy of its descriptor (also in another process that was
    /// given one) or any mapping made of these. kBusy while another File holds an exclusive one.
    virtual Result<void> lock_shared() = 0;
    /// A descriptor for calls that need one (io_uring, splice), or -1 on the simulated disk.
    virtual int descriptor() const = 0;
};

enum class OpenMode : uint8_t {
    kReadOnly,   ///< Must exist.
    kReadWrite,  ///< Must exist.
    kCreateNew,  ///< Read and write; must not exist (kAlreadyExists).
    kCreate,     ///< Read and write; created when missing, kept when there.
};

struct DirectoryEntry {
    std::string name;
    bool is_directory = false;
};

struct FileSystemSpace {
    uint64_t total_bytes = 0;
    uint64_t free_bytes = 0;  ///< Available to this user.
};

/// What kind of file system a path is on, as far as durability cares.
enum class FileSystemKind : uint8_t { kLocal, kMemory, kNetwork, kOverlay, kUnknown };
struct FileSystemType {
    FileSystemKind kind = FileSystemKind::kUnknown;
    std::string name;  ///< "ext4", "tmpfs", "nfs", "overlayfs", or "0x1234".
};

/// An exclusive lock on a file, held until destroyed or the process dies.
class FileLock {
  public:
    virtual ~FileLock() = default;
};

class FileSystem {
  public:
    virtual ~FileSystem() = default;

    virtual Result<std::unique_ptr<File>> open(const std::string& path, OpenMode mode) = 0;
    /// Creates one directory, mode 0700. kAlreadyExists when it is there.
    virtual Result<void> make_directory(const std::string& path) = 0;
    virtual Result<void> rename(const std::string& from, const std::string& to) = 0;
    virtual Result<void> remove(const std::string& path) = 0;
    virtual Result<std::vector<DirectoryEntry>> list(const std::string& directory) = 0;
    virtual Result<bool> exists(const std::string& path) = 0;
    virtual Result<void> sync_directory(const std::string& directory) = 0;
    virtual Result<FileSystemSpace> space(const std::string& path) = 0;
    virtual Result<FileSystemType> type(const std::string& path) = 0;
    /// Takes an exclusive lock on `path` (created when missing) and writes this process's id into
    /// it. kBusy names the holder's pid.
    virtual Result<std::unique_ptr<FileLock>> lock(const std::string& path) = 0;
};

class Clock {
  public:
    virtual ~Clock() = default;
    /// Never goes back; no meaning across processes.
    virtual std::chrono::nanoseconds monotonic() = 0;
    /// Since 1970, UTC; for people to read, never for order.
    virtual std::chrono::nanoseconds wall() = 0;
};

class Random {
  public:
    virtual ~Random() = default;
    virtual void fill(MutableBytes into) = 0;
};

/// What a component is given of the outside world. Borrowed: it outlives the component.
struct Env {
    FileSystem* files = nullptr;
    Clock* clock = nullptr;
    Random* random = nullptr;
};

/// The real operating system; one instance a process.
Env real_env();

/// Loops over short reads and interruptions, to the end of `into` or of the file; returns how much.
Result<size_t> read_up_to(File& file, MutableBytes into, uint64_t offset_bytes);
/// Loops over short reads and interruptions. kCorrupt naming file and offset when the file ends
/// before `into` is full.
Result<void> read_exact(File& file, MutableBytes into, uint64_t offset_bytes);
/// Loops over short writes and interruptions until all is written.
Result<void> write_all(File& file, Bytes from, uint64_t offset_bytes);
/// The same for gathered buffers; `from` is consumed as scratch.
Result<void> write_all(File& file, std::vector<iovec> from, uint64_t offset_bytes,
                       Caching caching = Caching::kKeep);

}  // namespace stellarium::io
