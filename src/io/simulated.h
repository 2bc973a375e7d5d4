// The seam's twin for tests: one simulated machine that can lose power, lose its process, run out
// of space and fail any operation, all by a seed.
//
// The model. A file has durable bytes and a size, what a reader sees now, and the queue of effects
// (writes, truncations, punched holes) since its last datasync. A directory has durable entries,
// the entries seen now, and the queue of name changes since its last sync_directory. Nothing but
// those two syncs makes anything durable: in particular, datasync of a new file does not make its
// name durable.
//
// crash(seed), the loss of power, decides each queued effect:
//   - writes are kept, dropped, applied out of order, or torn at 512-byte sectors; a sector of an
//     unsynced write may hold garbage, or the front of the one version and the back of the other,
//     and that is the whole sector, also its bytes that the write did not touch;
//   - the size is any that the file had since its last sync, or lies between two of them, and need
//     not agree with the data: a kept size over dropped data reads as zeros;
//   - truncations and holes happened or did not, holes page by page;
//   - name changes happened up to some point, or each independently of the others. A rename is one
//     change: the new name shows the old file or the new one, never neither. A rename into another
//     directory needs a sync of both; with only the target synced, the file may show under both
//     names after a crash;
//   - one seed in eight keeps everything, one in eight drops everything, files choose their own
//     style otherwise, so that pure and mixed outcomes are all common.
// The same seed on the same history gives the same outcome.
//
// kill_process() is the death of the process: whatever was written stays, synced or not, also what
// was stored through map_shared; open files and locks are gone. Directories on a memory file system
// (mount()) keep their content through that and are empty after a crash.
//
// After either, Files and FileLocks from before are dead: their calls fail with kIo and change
// nothing; their mapped memory stays valid but is no longer part of the machine. The same holds for
// what was given a process_env() before. env() itself knows no processes.
//
// /proc/sys/kernel/random/boot_id is there, and another one after each crash().
//
// Limits. Files reach 16 TiB and are sparse in pages of 4 KiB; copies of a machine share pages. A
// file that was mapped shared lives in a memfd from then on, one descriptor a file, and copies of
// the machine copy its bytes. Stores through the mapping of a file that is not on a memory file
// system become durable by datasync and may be lost before.
// No hard links, symbolic links or permissions. Read-only maps are copies.
//
//     SimulatedMachine machine(seed);
//     machine.files().halt_at_mutation(17);
//     run_workload(machine.env());           // Fails with kIo somewhere inside.
//     machine.crash(seed);
//     check_what_was_acknowledged(machine.env());
//
// Or, without stopping the workload: take files().crashed_copy(seed) at any point, many times.
//
// Thread rule: everything may be called from any thread at the same time; one lock a machine.
#pragma once

#include <array>
#include <atomic>
#include <cerrno>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/io.h"

namespace stellarium::io {

enum class OperationKind : uint8_t {
    kOpen,
    kRead,        ///< pread, and preadv that may wait.
    kReadNoWait,  ///< preadv with IoMode::kNoWait.
    kWrite,       ///< pwrite, pwritev.
    kDatasync,
    kTruncate,
    kPunchHole,
    kAllocate,
    kMap,
    kMapShared,
    kMakeDirectory,
    kRename,
    kRemove,
    kList,
    kSyncDirectory,
    kLock,
    kQuery,  ///< size_bytes, next_data, exists, space, type.
};
inline constexpr size_t kOperationKindCount = 17;

/// Counts since the machine was made (or reset_counts), successful or not.
struct OperationCounts {
    uint64_t total = 0;
    /// Operations that can change what a crash leaves: creating opens, writes, syncs, truncations,
    /// punched holes, allocations, make_directory, rename, remove.
    uint64_t mutating = 0;
    std::array<uint64_t, kOperationKindCount> by_kind{};

    uint64_t of(OperationKind kind) const { return by_kind[static_cast<size_t>(kind)]; }
};

/// What to fail, when and how. EINTR on anything but a transfer is retried inside, as io.h
/// promises, so there it only adds to the counts.
struct Fault {
    std::optional<OperationKind> kind;  ///< Any when empty.
    std::string path_part;              ///< Only operations whose path contains this.
    uint64_t nth = 1;                   ///< The Nth match from now on, counted from 1.
    bool for_ever = false;              ///< And every match after it.
    int errno_value = EIO;
    /// Reads and writes succeed with half of the bytes (at least one) instead of failing.
    bool short_transfer = false;
    /// A failing datasync also throws the unsynced data away: the file reads as it was when last
    /// synced, with its present size.
    bool lose_unsynced = false;
};

/// What the machine was doing when it stopped at a mutating operation.
enum class HaltSide : uint8_t {
    kBefore,    ///< The operation has not begun.
    kInFlight,  ///< Its effects are queued, unsynced; a sync has synced nothing.
    kPartial,   ///< As kInFlight, but of a write only the first half: a process killed within it.
    kAfter,     ///< It is complete, but nobody was told.
};

enum class CrashStyle : uint8_t {
    kSeeded,   ///< As described above.
    kLoseAll,  ///< Exactly what was synced survives.
    kKeepAll,  ///< Every effect happened.
};

class SimulatedFileSystem final : public FileSystem {
  public:
    /// An empty root directory "/", on a local file system.
    SimulatedFileSystem();
    ~SimulatedFileSystem() override;
    SimulatedFileSystem(const SimulatedFileSystem&) = delete;
    SimulatedFileSystem& operator=(const SimulatedFileSystem&) = delete;

    // The seam. Relative paths start at the root.
    Result<std::unique_ptr<File>> open(const std::string& path, OpenMode mode) override;
    Result<void> make_directory(const std::string& path) override;
    Result<void> rename(const std::string& from, const std::string& to) override;
    Result<void> remove(const std::string& path) override;
    Result<std::vector<DirectoryEntry>> list(const std::string& directory) override;
    Result<bool> exists(const std::string& path) override;
    Result<void> sync_directory(const std::string& directory) override;
    Result<FileSystemSpace> space(const std::string& path) override;
    Result<FileSystemType> type(const std::string& path) override;
    Result<std::unique_ptr<FileLock>> lock(const std::string& path) override;

    /// The same file system as the process sees it that runs now: when that has died, every call
    /// fails with kIo, as those of its files do.
    std::unique_ptr<SimulatedFileSystem> process_view() const;

    // Set-up. These are not operations: they are not counted and cannot fail by injection.

    /// Creates a directory, and those above it, durably.
    void make_directories(const std::string& path);
    /// The same, as the root of another file system: type() reports it, and kMemory means that its
    /// content does not survive a crash. Renames across its border fail.
    void mount(const std::string& path, FileSystemType type);
    /// Space for everything outside memory file systems; writes beyond it are short or kNoSpace.
    void set_space_limit(uint64_t total_bytes);
    /// What lock() writes from now on; a killed or crashed machine counts on from there.
    void set_process_id(int pid);

    // Disasters.

    /// Power fails and comes back. Clears faults and the halt point.
    void crash(uint64_t seed, CrashStyle style = CrashStyle::kSeeded);
    /// The process dies and a new one starts. Clears faults and the halt point.
    void kill_process();
    /// The machine as kill_process() would leave it, unsynced effects still queued; this one goes
    /// on.
    std::unique_ptr<SimulatedFileSystem> fork() const;
    /// The machine as crash() would leave it; this one goes on.
    std::unique_ptr<SimulatedFileSystem> crashed_copy(uint64_t seed,
                                                      CrashStyle style = CrashStyle::kSeeded) const;
    /// Flips bits in every byte of a range, durably and unnoticed: bit rot. The file must exist.
    void damage(const std::string& path, uint64_t offset_bytes, uint64_t length_bytes,
                uint64_t seed);

    // Faults.

    void inject(Fault fault);
    void clear_faults();
    /// How many operations an injected fault has hit.
    uint64_t faults_fired() const;
    /// At the Nth mutating operation from now (counted from 1), and on everything after it, calls
    /// fail with kIo, until crash() or kill_process(). 0 takes the point away.
    void halt_at_mutation(uint64_t nth, HaltSide side = HaltSide::kInFlight);
    bool halted() const;

    // Observation.

    OperationCounts counts() const;
    void reset_counts();
    /// Called before each operation on the calling thread, with no lock held: it may take copies,
    /// and must not change the observer. Empty takes it away.
    void set_observer(std::function<void(OperationKind, std::string_view path)> observer);
    /// Effects and name changes that a crash could still undo.
    uint64_t unsynced_effects() const;

  private:
    struct State;
    friend class SimulatedFile;
    friend class SimulatedLock;
    explicit SimulatedFileSystem(std::shared_ptr<State> state);
    /// With the state's mutex held.
    Result<void> check_process(std::string_view path) const;

    std::shared_ptr<State> state_;
    std::optional<uint64_t> epoch_;  ///< Of a process_view().
};

/// Stands still until told otherwise.
class SimulatedClock final : public Clock {
  public:
    std::chrono::nanoseconds monotonic() override;
    std::chrono::nanoseconds wall() override;

    void advance(std::chrono::nanoseconds by);
    /// Every monotonic() call moves the clock by this first.
    void set_auto_step(std::chrono::nanoseconds step);
    /// Moves the wall clock alone, also backwards.
    void set_wall(std::chrono::nanoseconds since_1970);

  private:
    std::atomic<int64_t> monotonic_ns_{1'000'000'000};
    std::atomic<int64_t> wall_minus_monotonic_ns_{1'700'000'000'000'000'000};
    std::atomic<int64_t> auto_step_ns_{0};
};

/// The same seed gives the same bytes, in the order of the calls.
class SeededRandom final : public Random {
  public:
    explicit SeededRandom(uint64_t seed) : state_(seed) {}
    void fill(MutableBytes into) override;

  private:
    std::mutex mutex_;
    uint64_t state_;
};

/// Files, clock and randomness of one machine.
class SimulatedMachine {
  public:
    explicit SimulatedMachine(uint64_t seed);
    /// A machine around files taken by fork() or crashed_copy().
    SimulatedMachine(std::unique_ptr<SimulatedFileSystem> files, uint64_t seed);

    /// For whatever process runs.
    Env env();
    /// For the process that runs now: its code can do nothing to the machine after its death,
    /// whatever it still calls. Lives as long as the machine.
    Env process_env();
    SimulatedFileSystem& files() { return *files_; }
    SimulatedClock& clock() { return clock_; }
    SeededRandom& random() { return random_; }

    void crash(uint64_t seed) { files_->crash(seed); }
    void kill_process() { files_->kill_process(); }

  private:
    std::unique_ptr<SimulatedFileSystem> files_;
    std::mutex processes_mutex_;
    std::vector<std::unique_ptr<SimulatedFileSystem>> processes_;  ///< Guarded by processes_mutex_.
    SimulatedClock clock_;
    SeededRandom random_;
};

}  // namespace stellarium::io
