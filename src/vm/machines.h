// Machines on a store: QEMU guests whose disk is a volume, and whose memory can be kept and cloned.
//
//     Machines machines(client, {.files = "/srv/disks", .root = runtime + "/vm"});
//     STELLARIUM_ASSIGN(auto made, machines.run("web", {.image = "debian", .config = config}));
//     STELLARIUM_ASSIGN(auto figures, machines.snapshot("web", "warm"));
//     STELLARIUM_ASSIGN(auto clones, machines.restore("web", "warm", {"web-1", "web-2"}));
//
// A machine NAME has these volumes:
//
//     NAME-disk     the guest's disk, open by QEMU as a file
//     NAME-ram      the RAM of the last snapshot; the next one writes what differs
//     NAME-state    the devices' state of the last snapshot, and the configuration (state_file.h)
//
// and a snapshot SNAP of it is a snapshot SNAP of each. NAME-state's is made last: without it there
// is no snapshot, and what is there of one goes with the next command on the machine.
//
// A clone maps the RAM privately. QEMU opens the file it maps for reading and writing, and
// snapshots are files to be read, so all clones map one volume, NAME-base.SNAP, a clone of the
// snapshot that nobody ever writes to; they share its pages. It goes with the last of them.
//
// Thread rule: one thread; other commands are kept out of a machine by its lock (records.h).
// Durability: a snapshot is durable when snapshot() returns. Machines themselves are processes.
// Errors: kNotFound, kAlreadyExists, kBusy (it runs, another command works on it), kUnavailable
// (QEMU), kCorrupt naming the damaged chunk, those of the store. What was begun is undone.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "control/client.h"
#include "vm/machine.h"
#include "vm/ram_writer.h"
#include "vm/records.h"

namespace stellarium::vm {

struct MachinesOptions {
    std::string files;  ///< Where the store's files are (files.h).
    std::string root;   ///< The folders of machines (records.h).
    std::chrono::milliseconds lock_timeout{10'000};
    /// Asked now and then while something takes long.
    std::function<bool()> cancelled = [] { return false; };
    /// Told what a person should see beside the answer.
    std::function<void(const std::string&)> notice = [](const std::string&) {};
    /// Told how far a snapshot is: bytes of RAM that have come, of all.
    std::function<void(uint64_t done, uint64_t total)> progress = [](uint64_t, uint64_t) {};
};

/// What is left out is as it was when the machine ran last, or as kDefaultMemoryBytes and the like
/// say; kernel, initrd and command line also come from the boot manifest of the image.
struct RunRequest {
    std::string
        image{};  ///< Image, volume or snapshot to clone the disk from; "": NAME-disk is there.
    std::optional<uint64_t> memory_bytes{};
    std::optional<uint64_t> cpus{};
    std::optional<std::string> accelerator{};  ///< "kvm", "tcg" or "auto".
    std::optional<std::string> kernel{};       ///< Paths, also relative ones.
    std::optional<std::string> initrd{};
    std::optional<std::string> append{};
    std::optional<std::vector<std::string>> nics{};
};
/// A volume stays attached for a moment after the process that had its file has ended.
inline constexpr std::chrono::seconds kVolumeReleaseTimeout{30};
inline constexpr uint64_t kDefaultMemoryBytes = uint64_t{256} << 20;

struct SnapshotFigures {
    RamFigures ram{};
    uint64_t memory_bytes = 0;
    uint64_t state_bytes = 0;
    uint64_t rounds = 0;
    double pause_ms = 0;  ///< From QEMU's stop to its going on, by QEMU's clock.
    double total_ms = 0;
};

struct RestoreFigures {
    uint64_t checked_bytes = 0;  ///< RAM that was read and checked.
    double start_ms = 0;         ///< Until the last one goes on.
    std::vector<MachineRecord> machines{};
};

/// One line of a list.
struct MachineStatus {
    MachineRecord record{};
    std::string state{};  ///< "running", "in snapshot", "stopped" or "died".
};
struct SavedSnapshot {
    std::string name{};  ///< "VM@SNAPSHOT".
    std::string created{};
    uint64_t memory_bytes = 0;
};
struct MachineList {
    std::vector<MachineStatus> machines;
    std::vector<SavedSnapshot> snapshots;
};

std::string disk_volume(const std::string& machine);
std::string ram_volume(const std::string& machine);
std::string state_volume(const std::string& machine);
std::string base_volume(const std::string& machine, const std::string& snapshot);

/// Where the control interface has them.
std::string volume_target(const std::string& volume);
std::string snapshot_target(const std::string& volume, const std::string& snapshot);

class Machines {
  public:
    Machines(control::ControlClient& client, MachinesOptions options);

    Result<MachineRecord> run(const std::string& name, const RunRequest& request);
    Result<SnapshotFigures> snapshot(const std::string& name, const std::string& snapshot);
    /// All or none.
    Result<RestoreFigures> restore(const std::string& name, const std::string& snapshot,
                                   const std::vector<std::string>& names);
    /// Asks the guest to power off and waits for it; `force`: ends QEMU at once.
    Result<void> stop(const std::string& name, bool force, std::chrono::milliseconds timeout);
    /// The machine with its volumes and snapshots; clones of them stay. kBusy when it runs, unless
    /// `force`.
    Result<void> remove(const std::string& name, bool force);
    Result<void> remove_snapshot(const std::string& name, const std::string& snapshot);
    Result<MachineList> list();
    /// Where its console is kept, whether it runs or not.
    Result<std::string> console_log(const std::string& name);

  private:
    struct Open {
        MachineFolder folder;
        MachineRecord record;
    };
    struct Starting;

    Result<Json> get(const std::string& target);
    Result<bool> exists(const std::string& target);
    Result<MachineConfig> make_config(const RunRequest& request, MachineConfig config);
    Result<bool> prepare_disk(const std::string& name, const std::string& image);
    Result<void> boot(Open& machine, const RunRequest& request);
    Result<Open> open(const std::string& name);
    Result<void> recover(Open& machine);
    Result<void> drop_partial(const std::string& name, const std::string& snapshot);
    Result<void> drop_volumes(const std::vector<std::string>& names,
                              std::chrono::milliseconds timeout);
    void drop_base(const std::string& base);
    Result<void> forget(Open& machine);
    Result<void> end_process(Open& machine);

    /// True when the RAM's volume is empty.
    Result<bool> prepare_snapshot(const Open& machine, const std::string& snapshot);
    Result<SnapshotFigures> take(Open& machine, Qmp& qmp, const std::string& snapshot, bool empty);
    Result<Json> snapshot_volume(const std::string& volume, const std::string& snapshot);
    Result<void> save_state(const std::string& name, const std::string& snapshot, Bytes saved);

    Result<SavedState> load_state(const std::string& name, const std::string& snapshot);
    Result<void> make_base(const std::string& name, const std::string& snapshot);
    Result<RestoreFigures> start_clones(const std::string& name, const std::string& snapshot,
                                        std::vector<Starting>& clones);
    Error explain_damage(const Error& error, const std::string& what, uint64_t offset_bytes,
                         uint64_t length_bytes);

    std::string volume_file(const std::string& volume) const;
    std::string snapshot_file(const std::string& volume, const std::string& snapshot) const;

    control::ControlClient& client_;
    MachinesOptions options_;
};

}  // namespace stellarium::vm
