// Machines as a whole: their start and end, their lists, and what a broken off snapshot left.
#include "vm/machines.h"

#include <algorithm>
#include <map>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>

#include "control/locations.h"
#include "control/service.h"
#include "vm/files.h"

namespace stellarium::vm {
namespace {

using control::percent_encode;
using control::text_field;

/// A volume stays attached for a moment after its last file was closed.
constexpr std::chrono::seconds kBaseTimeout{2};
constexpr std::chrono::milliseconds kReleasePoll{20};
constexpr std::chrono::seconds kConnectTimeout{60};
constexpr const char* kDefaultAppend = "root=/dev/vda rw console=ttyS0";
constexpr std::chrono::seconds kCancelTimeout{60};
constexpr std::chrono::seconds kQuitTimeout{10};

/// Tells QEMU to give a migration up, and waits until it has.
Result<void> end_migration(Qmp& qmp) {
    const auto deadline = std::chrono::steady_clock::now() + kCancelTimeout;
    while (true) {
        STELLARIUM_ASSIGN(const Json migration, qmp.execute("query-migrate"));
        const std::string status = text_field(migration, "status");
        if (status.empty() || status == "none" || status == "completed" || status == "failed" ||
            status == "cancelled") {
            return {};
        }
        if (std::chrono::steady_clock::now() >= deadline) {
            return fail(ErrorCode::kBusy, "QEMU does not give its migration up");
        }
        STELLARIUM_TRY(qmp.execute("migrate_cancel"));
        std::this_thread::sleep_for(kReleasePoll);
    }
}

}  // namespace

std::string disk_volume(const std::string& machine) {
    return machine + "-disk";
}
std::string ram_volume(const std::string& machine) {
    return machine + "-ram";
}
std::string state_volume(const std::string& machine) {
    return machine + "-state";
}
std::string base_volume(const std::string& machine, const std::string& snapshot) {
    return machine + "-base." + snapshot;
}

Machines::Machines(control::ControlClient& client, MachinesOptions options)
    : client_(client), options_(std::move(options)) {}

std::string volume_target(const std::string& volume) {
    return "/v1/volumes/" + percent_encode(volume);
}

std::string snapshot_target(const std::string& volume, const std::string& snapshot) {
    return volume_target(volume) + "/snapshots/" + percent_encode(snapshot);
}

Result<Json> Machines::get(const std::string& target) {
    return client_.call("GET", target);
}

Result<bool> Machines::exists(const std::string& target) {
    const Result<Json> found = get(target);
    if (!found && found.error().code() != ErrorCode::kNotFound) {
        return std::unexpected(found.error());
    }
    return found.has_value();
}

std::string Machines::volume_file(const std::string& volume) const {
    return options_.files + "/volumes/" + volume;
}

std::string Machines::snapshot_file(const std::string& volume, const std::string& snapshot) const {
    return options_.files + "/snapshots/" + volume + "@" + snapshot;
}

// --- One machine ---------------------------------------------------------------------------------

Result<Machines::Open> Machines::open(const std::string& name) {
    STELLARIUM_ASSIGN(MachineFolder folder,
                      MachineFolder::open(options_.root, name, options_.lock_timeout));
    STELLARIUM_ASSIGN(MachineRecord record, folder.read());
    Open machine{.folder = std::move(folder), .record = std::move(record)};
    STELLARIUM_TRY(recover(machine));
    return machine;
}

/// A command that made a snapshot died: the guest goes on, and what there is of the snapshot goes.
Result<void> Machines::recover(Open& machine) {
    MachineRecord& record = machine.record;
    if (record.pending.empty()) {
        return {};
    }
    if (is_alive(record.process)) {
        STELLARIUM_ASSIGN(const auto qmp,
                          connect_qemu(machine.folder, record.process, kConnectTimeout));
        STELLARIUM_TRY(end_migration(*qmp));
        STELLARIUM_ASSIGN(const std::string state, run_state(*qmp));
        if (record.resume && state != "running") {
            STELLARIUM_TRY(qmp->execute("cont"));
        }
    }
    STELLARIUM_ASSIGN(const bool complete,
                      exists(snapshot_target(state_volume(record.name), record.pending)));
    if (!complete) {
        STELLARIUM_TRY(drop_partial(record.name, record.pending));
        options_.notice(fmt::format(
            "the command that made snapshot '{}' of '{}' was broken off; there is no such "
            "snapshot, and the machine goes on",
            record.pending, record.name));
    }
    record.pending.clear();
    record.resume = false;
    return machine.folder.write(record);
}

Result<void> Machines::drop_partial(const std::string& name, const std::string& snapshot) {
    for (const std::string& volume : {state_volume(name), ram_volume(name), disk_volume(name)}) {
        const Result<Json> removed = client_.call("DELETE", snapshot_target(volume, snapshot));
        if (!removed && removed.error().code() != ErrorCode::kNotFound) {
            return std::unexpected(removed.error());
        }
    }
    return {};
}

/// Removes those that are there.
Result<void> Machines::drop_volumes(const std::vector<std::string>& names,
                                    std::chrono::milliseconds timeout) {
    std::vector<std::string> present;
    for (const std::string& name : names) {
        STELLARIUM_ASSIGN(const bool is_there, exists(volume_target(name)));
        if (is_there) {
            present.push_back(name);
        }
    }
    if (present.empty()) {
        return {};
    }
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    while (true) {
        const Result<Json> removed =
            client_.call("POST", "/v1/removals", Json{{"kind", "volume"}, {"names", present}});
        if (removed || removed.error().code() == ErrorCode::kNotFound) {
            return {};
        }
        if (removed.error().code() != ErrorCode::kBusy ||
            std::chrono::steady_clock::now() >= deadline) {
            return std::unexpected(removed.error());
        }
        std::this_thread::sleep_for(kReleasePoll);
    }
}

/// Removes a base volume that no machine maps any more. What cannot be removed now is removed with
/// the next machine that mapped it, or the snapshot.
void Machines::drop_base(const std::string& base) {
    if (base.empty()) {
        return;
    }
    const Result<std::vector<std::string>> names = machine_names(options_.root);
    if (!names) {
        return;
    }
    for (const std::string& name : *names) {
        const Result<MachineRecord> record = peek_record(options_.root, name);
        if (!record || record->base == base) {
            return;
        }
    }
    if (const Result<void> dropped = drop_volumes({base}, kBaseTimeout); !dropped) {
        options_.notice(fmt::format("volume '{}' is of no more use and stays: {}", base,
                                    dropped.error().message()));
    }
}

/// The process has ended: so it is written down, and nobody maps the base for it.
Result<void> Machines::forget(Open& machine) {
    const std::string base = std::exchange(machine.record.base, {});
    machine.record.process = {};
    machine.record.restored_from.clear();
    machine.record.pending.clear();
    STELLARIUM_TRY(machine.folder.write(machine.record));
    drop_base(base);
    return {};
}

Result<void> Machines::end_process(Open& machine) {
    const ProcessId process = machine.record.process;
    if (!is_alive(process)) {
        return {};
    }
    // In order, so that QEMU flushes and closes its disk; or else at once.
    if (const auto qmp = connect_qemu(machine.folder, process, kQuitTimeout); qmp) {
        [[maybe_unused]] const Result<Json> asked =
            (*qmp)->execute("quit", Json::object(), kQuitTimeout);
        if (wait_for_end(process, kQuitTimeout)) {
            return {};
        }
    }
    return kill_qemu(process);
}

/// `config`: what the machine was started with before; all zeros when it is new.
Result<MachineConfig> Machines::make_config(const RunRequest& request, MachineConfig config) {
    const bool is_new = config.memory_bytes == 0;
    if (is_new) {
        config = {.memory_bytes = kDefaultMemoryBytes, .accelerator = best_accelerator()};
    }
    config.memory_bytes = request.memory_bytes.value_or(config.memory_bytes);
    config.cpus = request.cpus.value_or(config.cpus);
    config.nics = request.nics.value_or(config.nics);
    if (request.accelerator) {
        config.accelerator =
            *request.accelerator == "auto" ? best_accelerator() : *request.accelerator;
    }
    if (is_new && !request.image.empty() && !request.kernel) {
        const Result<Json> boot = get("/v1/boots/" + percent_encode(request.image));
        if (boot && boot->is_object()) {
            const auto file_of = [&](const char* key) {
                const std::string image = text_field(boot->value(key, Json::object()), "image");
                return image.empty() ? image : options_.files + "/images/" + image;
            };
            config.kernel = file_of("kernel");
            config.initrd = config.kernel.empty() ? "" : file_of("initrd");
            config.append = config.kernel.empty() ? "" : text_field(*boot, "hints");
        }
    }
    if (request.kernel) {
        config.kernel = request.kernel->empty() ? "" : control::absolute_path(*request.kernel);
    }
    if (request.initrd) {
        config.initrd = request.initrd->empty() ? "" : control::absolute_path(*request.initrd);
    }
    config.append = request.append.value_or(config.append);
    if (config.kernel.empty() && !(config.initrd.empty() && config.append.empty())) {
        return fail(ErrorCode::kInvalidArgument,
                    "an initrd or a kernel command line is of no use without a kernel: say "
                    "--kernel, or extract one (stellarctl boot extract)");
    }
    if (!config.kernel.empty() && config.append.empty()) {
        config.append = kDefaultAppend;
    }
    // Read as it will be read from a snapshot, so that what is wrong is wrong now.
    return config_from_json(to_json(config), "the machine's configuration");
}

/// The disk as it is asked for; true when it was made.
Result<bool> Machines::prepare_disk(const std::string& name, const std::string& image) {
    const std::string disk = disk_volume(name);
    if (image.empty()) {
        STELLARIUM_ASSIGN(const bool has_disk, exists(volume_target(disk)));
        if (!has_disk) {
            return fail(ErrorCode::kNotFound,
                        fmt::format("machine '{}' has no disk yet: say --image", name));
        }
        return false;
    }
    const Result<Json> cloned = client_.call(
        "POST", "/v1/clones", Json{{"source", image}, {"names", std::vector<std::string>{disk}}});
    if (!cloned && cloned.error().code() == ErrorCode::kAlreadyExists) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("volume '{}' is there already: leave --image out to start machine "
                                "'{}' from it, or remove it first",
                                disk, name));
    }
    STELLARIUM_TRY(cloned);
    return true;
}

/// Starts QEMU on the disk, which is there.
Result<void> Machines::boot(Open& machine, const RunRequest& request) {
    const std::string disk = volume_file(disk_volume(machine.record.name));
    STELLARIUM_ASSIGN(machine.record.config, make_config(request, machine.record.config));
    STELLARIUM_TRY(open_file(disk, O_RDONLY));  // It may take its name a moment.
    STELLARIUM_ASSIGN(machine.record.process,
                      start_qemu(machine.folder, {.name = machine.record.name,
                                                  .config = machine.record.config,
                                                  .disk = disk,
                                                  .ram_file = {}}));
    STELLARIUM_TRY(machine.folder.write(machine.record));
    STELLARIUM_TRY(connect_qemu(machine.folder, machine.record.process, kConnectTimeout));
    return {};
}

Result<MachineRecord> Machines::run(const std::string& name, const RunRequest& request) {
    STELLARIUM_ASSIGN(MachineFolder folder,
                      MachineFolder::make(options_.root, name, options_.lock_timeout));
    Open machine{.folder = std::move(folder), .record = {}};
    Result<MachineRecord> before = machine.folder.read();
    const bool is_known = before.has_value();
    if (before) {
        machine.record = *std::move(before);
        STELLARIUM_TRY(recover(machine));
        if (is_alive(machine.record.process)) {
            return fail(ErrorCode::kBusy, fmt::format("machine '{}' runs (process {})", name,
                                                      machine.record.process.pid));
        }
        STELLARIUM_TRY(forget(machine));
    }
    machine.record.name = name;
    const Result<bool> makes_disk = prepare_disk(name, request.image);
    const Result<void> started =
        makes_disk ? boot(machine, request) : std::unexpected(makes_disk.error());
    if (started) {
        return machine.record;
    }
    [[maybe_unused]] const Result<void> ended = kill_qemu(machine.record.process);
    if (makes_disk.value_or(false)) {
        [[maybe_unused]] const Result<void> dropped =
            drop_volumes({disk_volume(name)}, kVolumeReleaseTimeout);
    }
    [[maybe_unused]] const Result<void> forgotten =
        is_known ? forget(machine) : machine.folder.remove();
    return std::unexpected(started.error());
}

Result<void> Machines::stop(const std::string& name, bool force,
                            std::chrono::milliseconds timeout) {
    STELLARIUM_ASSIGN(Open machine, open(name));
    const ProcessId process = machine.record.process;
    if (is_alive(process) && !force) {
        STELLARIUM_ASSIGN(const auto qmp, connect_qemu(machine.folder, process, kConnectTimeout));
        STELLARIUM_TRY(qmp->execute("system_powerdown"));
        const auto deadline = std::chrono::steady_clock::now() + timeout;
        while (!wait_for_end(process, kReleasePoll)) {
            if (options_.cancelled()) {
                return fail(ErrorCode::kCancelled, "interrupted");
            }
            if (std::chrono::steady_clock::now() >= deadline) {
                return fail(ErrorCode::kBusy,
                            fmt::format("machine '{}' was asked to power off and still runs: wait "
                                        "longer (--timeout), or end it at once (--force)",
                                        name));
            }
        }
    }
    STELLARIUM_TRY(end_process(machine));
    return forget(machine);
}

Result<void> Machines::remove(const std::string& name, bool force) {
    STELLARIUM_TRY(check_machine_name(name));
    Result<Open> machine = open(name);
    if (!machine) {
        if (machine.error().code() != ErrorCode::kNotFound) {
            return std::unexpected(machine.error());
        }
        // Its host went down since: what is left of it is in the store.
        STELLARIUM_ASSIGN(const bool has_state, exists(volume_target(state_volume(name))));
        if (!has_state) {
            return std::unexpected(machine.error());
        }
        return drop_volumes({disk_volume(name), ram_volume(name), state_volume(name)},
                            kVolumeReleaseTimeout);
    }
    if (is_alive(machine->record.process)) {
        if (!force) {
            return fail(ErrorCode::kBusy,
                        fmt::format("machine '{}' runs: stop it first, or use --force", name));
        }
        STELLARIUM_TRY(end_process(*machine));
    }
    STELLARIUM_TRY(forget(*machine));
    STELLARIUM_TRY(drop_volumes({disk_volume(name), ram_volume(name), state_volume(name)},
                                kVolumeReleaseTimeout));
    return machine->folder.remove();
}

Result<void> Machines::remove_snapshot(const std::string& name, const std::string& snapshot) {
    STELLARIUM_TRY(check_machine_name(name));
    STELLARIUM_TRY(check_snapshot_name(snapshot));
    // A machine whose host went down since has no folder, and nobody works on it.
    Result<Open> machine = open(name);
    if (!machine && machine.error().code() != ErrorCode::kNotFound) {
        return std::unexpected(machine.error());
    }
    STELLARIUM_ASSIGN(const bool is_there, exists(snapshot_target(state_volume(name), snapshot)));
    if (!is_there) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("machine '{}' has no snapshot '{}'", name, snapshot));
    }
    STELLARIUM_TRY(drop_partial(name, snapshot));
    drop_base(base_volume(name, snapshot));
    return {};
}

// --- Lists ---------------------------------------------------------------------------------------

Result<MachineList> Machines::list() {
    MachineList list;
    STELLARIUM_ASSIGN(const std::vector<std::string> names, machine_names(options_.root));
    for (const std::string& name : names) {
        Result<MachineRecord> record = peek_record(options_.root, name);
        if (!record) {
            continue;  // Removed meanwhile.
        }
        if (!record->pending.empty()) {
            // Either a snapshot is being made, and the machine is locked, or its command died.
            if (Result<MachineFolder> folder =
                    MachineFolder::open(options_.root, name, std::chrono::milliseconds(0));
                folder) {
                Open machine{.folder = *std::move(folder), .record = *record};
                STELLARIUM_TRY(recover(machine));
                record = machine.record;
            }
        }
        std::string state = "stopped";
        if (is_alive(record->process)) {
            state = record->pending.empty() ? "running" : "in snapshot";
        } else if (record->process.pid != 0) {
            state = "died";
        }
        list.machines.push_back({.record = *std::move(record), .state = std::move(state)});
    }
    STELLARIUM_ASSIGN(const Json snapshots, get("/v1/snapshots"));
    if (!snapshots.is_array()) {
        return fail(ErrorCode::kProtocol, "the list of snapshots is no list");
    }
    std::map<std::string, uint64_t> memory_bytes;
    for (const Json& snapshot : snapshots) {
        memory_bytes[text_field(snapshot, "name")] = snapshot.value("size_bytes", uint64_t{0});
    }
    constexpr std::string_view kStateSuffix = "-state";
    for (const Json& snapshot : snapshots) {
        const std::string name = text_field(snapshot, "name");
        const size_t at = name.find('@');
        const std::string volume = name.substr(0, at);
        if (at == std::string::npos || !volume.ends_with(kStateSuffix)) {
            continue;
        }
        const std::string machine = volume.substr(0, volume.size() - kStateSuffix.size());
        const std::string tail = name.substr(at);
        const auto ram = memory_bytes.find(ram_volume(machine) + tail);
        if (ram != memory_bytes.end() && memory_bytes.contains(disk_volume(machine) + tail)) {
            list.snapshots.push_back({.name = machine + tail,
                                      .created = text_field(snapshot, "created"),
                                      .memory_bytes = ram->second});
        }
    }
    return list;
}

Result<std::string> Machines::console_log(const std::string& name) {
    STELLARIUM_TRY(check_machine_name(name));
    if (!peek_record(options_.root, name)) {
        return fail(ErrorCode::kNotFound, fmt::format("there is no machine '{}'", name));
    }
    return options_.root + "/" + name + "/console.log";
}

}  // namespace stellarium::vm
