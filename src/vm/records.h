// What is known of machines while this host is up: a folder for each in the runtime directory.
//
//     RUNTIME/vm/NAME/machine.json   the record: configuration, process, a snapshot under way
//                     lock           held by the command that works on the machine
//                     qmp.sock       QEMU's control socket
//                     console.sock   the serial console, for one client at a time
//                     console.log    all that the console ever said, since the machine was started
//                     qemu.log       what QEMU itself says
//
//     STELLARIUM_ASSIGN(auto folder, MachineFolder::make(runtime + "/vm", "web-1", timeout));
//     STELLARIUM_TRY(folder.write(record));
//
// Thread rule: one thread; other processes are kept out by the lock.
// Durability: none. A snapshot is in the store (machines.h); this is gone with the host.
// Errors: kNotFound (no such machine), kBusy (another command works on it), those of the system.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "vm/state_file.h"

namespace stellarium::vm {

/// A process: its number is used again one day, its number and start together are not.
struct ProcessId {
    int64_t pid = 0;           ///< 0: none.
    uint64_t start_ticks = 0;  ///< Field 22 of /proc/PID/stat.
    friend bool operator==(const ProcessId&, const ProcessId&) = default;
};

/// Is it still there, and no zombie?
bool is_alive(const ProcessId& process);
/// Of a process that is there; kNotFound.
Result<ProcessId> identify(int64_t pid);

struct MachineRecord {
    std::string name{};
    MachineConfig config{};
    ProcessId process{};
    std::string restored_from{};  ///< "VM@SNAPSHOT" whose RAM is mapped; "": booted.
    std::string base{};           ///< The volume that is mapped as RAM; "": none.
    /// The snapshot that is being made, or was when its command died; "": none.
    std::string pending{};
    bool resume = false;  ///< The guest ran before the pending snapshot.

    friend bool operator==(const MachineRecord&, const MachineRecord&) = default;
};

Json to_json(const MachineRecord& record);
Result<MachineRecord> record_from_json(const Json& json, const std::string& what);

/// Names are parts of names of volumes: [A-Za-z0-9._-]{1,100}, not "." or "..".
inline constexpr size_t kMaxMachineName = 100;
Result<void> check_machine_name(const std::string& name);
/// Of snapshots: short, so that the name of a base volume fits.
inline constexpr size_t kMaxMachineSnapshotName = 20;
Result<void> check_snapshot_name(const std::string& name);

class MachineFolder {
  public:
    /// Makes the folder where it is missing, and locks it. Waits for others at most `timeout`.
    static Result<MachineFolder> make(const std::string& root, const std::string& name,
                                      std::chrono::milliseconds timeout);
    /// kNotFound when it is not there or has no record.
    static Result<MachineFolder> open(const std::string& root, const std::string& name,
                                      std::chrono::milliseconds timeout);

    const std::string& path() const { return path_; }
    /// A path of any length by a short name, good in this process while the folder is open: the
    /// addresses of sockets are short.
    std::string short_path(const std::string& file) const;

    /// kNotFound when there is none, kCorrupt for one that cannot be read.
    Result<MachineRecord> read() const;
    /// Whole or not at all.
    Result<void> write(const MachineRecord& record) const;
    /// Takes the folder away with all that is in it.
    Result<void> remove();

  private:
    static Result<MachineFolder> open_locked(const std::string& root, const std::string& name,
                                             std::chrono::milliseconds timeout);
    std::string path_;
    UniqueFd directory_;
    UniqueFd lock_;
};

/// The names of all machines that have a record, ascending.
Result<std::vector<std::string>> machine_names(const std::string& root);
/// Without a lock: it may be old the moment it is read.
Result<MachineRecord> peek_record(const std::string& root, const std::string& name);

}  // namespace stellarium::vm
