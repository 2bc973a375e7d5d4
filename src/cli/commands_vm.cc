// Machines on the store: QEMU guests with memory snapshots (src/vm).
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include "base/units.h"
#include "cli/commands_common.h"
#include "cli/file_handle.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "control/locations.h"
#include "vm/files.h"
#include "vm/machines.h"

namespace stellarium::cli {

using control::Json;

namespace {

constexpr double kMillisecondsPerSecond = 1000;

struct MachineSnapshot {
    std::string machine;
    std::string snapshot;
};

Result<MachineSnapshot> machine_snapshot(const std::string& text) {
    const size_t at = text.find('@');
    if (at == std::string::npos || at == 0 || at + 1 == text.size()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("'{}' names no snapshot of a machine: MACHINE@SNAPSHOT", text));
    }
    return MachineSnapshot{text.substr(0, at), text.substr(at + 1)};
}

/// The machines of the store that the daemon serves. `options` has what is particular.
Result<vm::Machines> machines_of(Context& context, vm::MachinesOptions options) {
    context.expect_daemon();
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    if (!context.session()->through_daemon()) {
        return fail(
            ErrorCode::kUnavailable,
            "machines need a daemon that shows its files: start stellariumd, then stellarctl "
            "mount DIR");
    }
    STELLARIUM_ASSIGN(const Json version, client->call("GET", "/v1/version"));
    const std::string store = text_field(version, "directory");
    STELLARIUM_ASSIGN(options.files, vm::find_files(store));
    options.root = vm_directory(store);
    options.lock_timeout = context.location().lock_timeout;
    options.cancelled = interrupted;
    options.notice = [](const std::string& sentence) {
        complain(fmt::format("stellarctl: {}\n", sentence));
    };
    return vm::Machines(*client, std::move(options));
}

Json machine_json(const vm::MachineRecord& record) {
    return Json{{"name", record.name},
                {"pid", static_cast<uint64_t>(record.process.pid)},
                {"memory_bytes", record.config.memory_bytes},
                {"cpus", record.config.cpus},
                {"accelerator", record.config.accelerator},
                {"restored_from", record.restored_from},
                {"disk", vm::disk_volume(record.name)}};
}

/// With what only this host has: where its sockets and logs are.
Json machine_json(const vm::MachineRecord& record, const std::string& store) {
    Json json = machine_json(record);
    json["folder"] = vm_directory(store) + "/" + record.name;
    return json;
}

std::string seconds_text(double milliseconds) {
    return fmt::format("{:.2f} s", milliseconds / kMillisecondsPerSecond);
}

Result<std::string> served_store(Context& context) {
    STELLARIUM_ASSIGN(const Json version, ask(context, "GET", "/v1/version"));
    return text_field(version, "directory");
}

}  // namespace

std::string vm_directory(const std::string& store) {
    return control::default_runtime_directory(store) + "/vm";
}

Result<void> vm_run(Context& context, const Arguments& arguments) {
    vm::RunRequest request{.image = arguments.image,
                           .memory_bytes = std::nullopt,
                           .cpus = arguments.cpus,
                           .accelerator = arguments.accelerator,
                           .kernel = arguments.kernel,
                           .initrd = arguments.initrd,
                           .append = arguments.append,
                           .nics = std::nullopt};
    if (arguments.memory) {
        STELLARIUM_ASSIGN(request.memory_bytes, parse_size(*arguments.memory));
    }
    if (!arguments.nics.empty()) {
        request.nics = arguments.nics;
    }
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, {}));
    STELLARIUM_ASSIGN(const vm::MachineRecord record, machines.run(arguments.name, request));
    STELLARIUM_ASSIGN(const std::string store, served_store(context));
    print_done(
        context, machine_json(record, store),
        fmt::format("machine '{}' runs (process {}, {} of RAM, {}); its console: stellarctl "
                    "vm logs {}",
                    record.name, record.process.pid, context.out().size(record.config.memory_bytes),
                    record.config.accelerator, record.name));
    return {};
}

Result<void> vm_snapshot(Context& context, const Arguments& arguments) {
    Progress progress("keeping the memory of '" + arguments.name + "'", context.progress());
    vm::MachinesOptions options;
    options.progress = [&](uint64_t done, uint64_t total) {
        progress.show("keeping the memory of '" + arguments.name + "'", done >> 20, total >> 20);
    };
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, std::move(options)));
    STELLARIUM_ASSIGN(const vm::SnapshotFigures figures,
                      machines.snapshot(arguments.name, arguments.other_name));
    progress.finish();
    const std::string name = arguments.name + "@" + arguments.other_name;
    print_done(context,
               Json{{"name", name},
                    {"memory_bytes", figures.memory_bytes},
                    {"changed_bytes", figures.ram.changed_bytes},
                    {"zeroed_bytes", figures.ram.zeroed_bytes},
                    {"state_bytes", figures.state_bytes},
                    {"rounds", figures.rounds},
                    {"pause_ms", figures.pause_ms},
                    {"total_ms", figures.total_ms}},
               fmt::format("made '{}': {} of {} of RAM differ from the last one; the guest stood "
                           "for {:.1f} ms of {}",
                           name, context.out().size(figures.ram.changed_bytes),
                           context.out().size(figures.memory_bytes), figures.pause_ms,
                           seconds_text(figures.total_ms)));
    return {};
}

Result<void> vm_restore(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const MachineSnapshot source, machine_snapshot(arguments.source));
    std::vector<std::string> names = arguments.names;
    if (names.size() == 1) {
        STELLARIUM_ASSIGN(names, expand_names(names.front(), arguments.count));
    } else if (arguments.count > 1) {
        return fail(ErrorCode::kInvalidArgument,
                    "--count is for one name with {n} in it, and there are several");
    }
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, {}));
    STELLARIUM_ASSIGN(const vm::RestoreFigures figures,
                      machines.restore(source.machine, source.snapshot, names));
    STELLARIUM_ASSIGN(const std::string store, served_store(context));
    Json list = Json::array();
    for (const vm::MachineRecord& record : figures.machines) {
        list.push_back(machine_json(record, store));
    }
    print_done(
        context,
        Json{{"source", arguments.source},
             {"checked_bytes", figures.checked_bytes},
             {"start_ms", figures.start_ms},
             {"machines", std::move(list)}},
        fmt::format("{} from '{}' in {}: {}",
                    plural(names.size(), "machine") + (names.size() == 1 ? " goes on" : " go on"),
                    arguments.source, seconds_text(figures.start_ms), fmt::join(names, ", ")));
    return {};
}

Result<void> vm_list(Context& context, const Arguments&) {
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, {}));
    STELLARIUM_ASSIGN(const vm::MachineList list, machines.list());
    STELLARIUM_ASSIGN(const std::string store, served_store(context));
    Output& out = context.out();
    if (out.json()) {
        Json json{{"machines", Json::array()}, {"snapshots", Json::array()}};
        for (const vm::MachineStatus& each : list.machines) {
            Json machine = machine_json(each.record, store);
            machine["state"] = each.state;
            json["machines"].push_back(std::move(machine));
        }
        for (const vm::SavedSnapshot& each : list.snapshots) {
            json["snapshots"].push_back(Json{{"name", each.name},
                                             {"created", each.created},
                                             {"memory_bytes", each.memory_bytes}});
        }
        out.value(json);
        return {};
    }
    Table table(
        {{"MACHINE"}, {"STATE"}, {"PROCESS", Align::kRight}, {"RAM", Align::kRight}, {"FROM"}});
    for (const vm::MachineStatus& each : list.machines) {
        table.add({each.record.name, each.state,
                   each.record.process.pid == 0 ? "" : std::to_string(each.record.process.pid),
                   out.size(each.record.config.memory_bytes), each.record.restored_from});
    }
    out.table(table);
    if (!list.snapshots.empty()) {
        Table snapshots({{"SNAPSHOT"}, {"RAM", Align::kRight}, {"CREATED"}});
        for (const vm::SavedSnapshot& each : list.snapshots) {
            snapshots.add({each.name, out.size(each.memory_bytes), each.created});
        }
        out.line("");
        out.table(snapshots);
    }
    return {};
}

Result<void> vm_logs(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, {}));
    STELLARIUM_ASSIGN(const std::string path, machines.console_log(arguments.name));
    const FileHandle file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) {
        return std::unexpected(Error::from_errno(errno, "open " + path));
    }
    std::string text;
    std::vector<std::byte> buffer(size_t{1} << 20);
    while (true) {
        STELLARIUM_ASSIGN(const size_t got, read_fully(file.get(), buffer, -1, path));
        text.append(reinterpret_cast<const char*>(buffer.data()), got);
        if (got < buffer.size()) {
            break;
        }
    }
    if (context.out().json()) {
        context.out().value(Json{{"name", arguments.name}, {"path", path}, {"text", text}});
    } else {
        context.out().raw(text);
    }
    return {};
}

Result<void> vm_stop(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, {}));
    STELLARIUM_TRY(
        machines.stop(arguments.name, arguments.force, std::chrono::seconds(arguments.timeout_s)));
    print_done(context, Json{{"stopped", Json::array({arguments.name})}},
               fmt::format("machine '{}' has stopped", arguments.name));
    return {};
}

Result<void> vm_remove(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(vm::Machines machines, machines_of(context, {}));
    for (const std::string& name : arguments.names) {
        if (name.find('@') == std::string::npos) {
            STELLARIUM_TRY(machines.remove(name, arguments.force));
            continue;
        }
        STELLARIUM_ASSIGN(const MachineSnapshot snapshot, machine_snapshot(name));
        STELLARIUM_TRY(machines.remove_snapshot(snapshot.machine, snapshot.snapshot));
    }
    print_done(context, Json{{"removed", arguments.names}},
               fmt::format("removed {}", fmt::join(arguments.names, ", ")));
    return {};
}

}  // namespace stellarium::cli
