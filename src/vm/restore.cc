// Clones of a snapshot: many machines that go on from one moment.
//
//   1. The state is read and checked; the snapshots are those that it belongs to.
//   2. Disks are cloned, all at once; RAM is one volume that all of them map privately.
//   3. One QEMU each starts, stands still, and takes in the devices' state, while this command
//   reads
//      all of the RAM once. So every chunk of it is checked before a guest runs, and is in the page
//      cache that the guests share.
//   4. When everything is right, all of them go on. When anything is not, none does, and nothing is
//      left of them.
#include <algorithm>
#include <atomic>
#include <future>
#include <optional>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>

#include "control/service.h"
#include "vm/files.h"
#include "vm/machines.h"

namespace stellarium::vm {
namespace {

using control::number_field;
using control::text_field;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kLoadTimeout{120};
constexpr std::chrono::milliseconds kLoadPoll{2};
constexpr std::chrono::seconds kClonesTimeout{120};

/// A memory file with these bytes.
Result<UniqueFd> memory_file(Bytes bytes) {
    UniqueFd file(memfd_create("stellarium-vm-state", MFD_CLOEXEC));
    if (!file) {
        return std::unexpected(Error::from_errno(errno, "make a memory file"));
    }
    STELLARIUM_TRY(write_at(file.get(), "a memory file", 0, bytes));
    return file;
}

/// Another description of the same file, which has a position of its own.
Result<UniqueFd> reopen(const UniqueFd& file) {
    return open_file(fmt::format("/proc/self/fd/{}", file.get()), O_RDONLY);
}

/// Until QEMU has taken the state in and stands.
Result<void> wait_until_loaded(const MachineFolder& folder, const ProcessId& process, Qmp& qmp) {
    const Clock::time_point deadline = Clock::now() + kLoadTimeout;
    while (true) {
        const Result<std::string> state = run_state(qmp);
        if (!state) {
            if (state.error().code() == ErrorCode::kUnavailable &&
                wait_for_end(process, std::chrono::seconds(1))) {
                return fail(ErrorCode::kUnavailable,
                            fmt::format("QEMU does not take the state: {}", last_words(folder)));
            }
            return std::unexpected(state.error());
        }
        if (*state == "paused" || *state == "prelaunch" || *state == "running") {
            return {};
        }
        if (Clock::now() >= deadline) {
            return fail(ErrorCode::kBusy, fmt::format("QEMU does not take the state in within {} s",
                                                      kLoadTimeout.count()));
        }
        std::this_thread::sleep_for(kLoadPoll);
    }
}

/// What was read of the RAM, and where that stopped.
struct Checked {
    uint64_t bytes = 0;
    Unreadable bad;
    std::optional<Error> error;
};

}  // namespace

struct Machines::Starting {
    Open machine;
    std::unique_ptr<Qmp> qmp;
};

/// The volume that clones map. One that is there is right when it equals the snapshot.
Result<void> Machines::make_base(const std::string& name, const std::string& snapshot) {
    const std::string source = ram_volume(name) + "@" + snapshot;
    const std::string base = base_volume(name, snapshot);
    const Result<Json> made = client_.call(
        "POST", "/v1/clones", Json{{"source", source}, {"names", std::vector<std::string>{base}}});
    if (made) {
        return {};
    }
    if (made.error().code() != ErrorCode::kAlreadyExists) {
        return std::unexpected(made.error());
    }
    STELLARIUM_ASSIGN(const Json difference,
                      get(fmt::format("/v1/diff?a={}&b={}&from=0", control::percent_encode(source),
                                      control::percent_encode(base))));
    if (const auto ranges = difference.find("ranges");
        ranges == difference.end() || !ranges->empty()) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("volume '{}' is to hold the RAM of '{}' and differs from it: "
                                "rename or remove it",
                                base, source));
    }
    return {};
}

Result<RestoreFigures> Machines::restore(const std::string& name, const std::string& snapshot,
                                         const std::vector<std::string>& names) {
    STELLARIUM_TRY(check_machine_name(name));
    STELLARIUM_TRY(check_snapshot_name(snapshot));
    std::vector<std::string> sorted = names;
    std::ranges::sort(sorted);
    if (const auto twice = std::ranges::adjacent_find(sorted); twice != sorted.end()) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("'{}' is named twice", *twice));
    }
    // Locked in one order, so that two commands do not wait for each other.
    std::vector<Starting> clones;
    clones.reserve(names.size());
    const auto forget_folders = [&] {
        for (Starting& each : clones) {
            [[maybe_unused]] const Result<void> removed = each.machine.folder.remove();
        }
    };
    for (const std::string& each : sorted) {
        Result<MachineFolder> folder =
            MachineFolder::make(options_.root, each, options_.lock_timeout);
        if (folder && folder->read()) {
            folder = fail(ErrorCode::kAlreadyExists,
                          fmt::format("there is a machine '{}' already", each));
        }
        if (!folder) {
            forget_folders();
            return std::unexpected(folder.error());
        }
        clones.push_back(
            {.machine = {.folder = *std::move(folder), .record = {.name = each}}, .qmp = nullptr});
    }
    Result<RestoreFigures> figures = start_clones(name, snapshot, clones);
    if (!figures) {
        forget_folders();
    }
    return figures;
}

Result<SavedState> Machines::load_state(const std::string& name, const std::string& snapshot) {
    const std::string volume = state_volume(name);
    const Result<Json> info = get(snapshot_target(volume, snapshot));
    if (!info) {
        return fail(info.error().code(),
                    info.error().code() == ErrorCode::kNotFound
                        ? fmt::format("machine '{}' has no snapshot '{}'", name, snapshot)
                        : info.error().message());
    }
    const std::string path = snapshot_file(volume, snapshot);
    STELLARIUM_ASSIGN(const UniqueFd file, open_file(path, O_RDONLY));
    STELLARIUM_ASSIGN(const uint64_t size, size_of_file(file.get(), path));
    std::vector<std::byte> bytes(kStateHeaderBytes);
    const auto read = [&](uint64_t offset) -> Result<void> {
        const Result<void> done =
            read_at(file.get(), path, offset, MutableBytes(bytes).subspan(offset));
        if (!done && done.error().code() == ErrorCode::kIo) {
            return std::unexpected(explain_damage(done.error(),
                                                  fmt::format("{}@{}", volume, snapshot), offset,
                                                  bytes.size() - offset));
        }
        return done;
    };
    STELLARIUM_TRY(read(0));
    STELLARIUM_ASSIGN(const uint64_t needed, state_bytes(bytes));
    if (needed > size) {
        return fail(ErrorCode::kCorrupt, fmt::format("{} is cut short", path));
    }
    bytes.resize(needed);
    STELLARIUM_TRY(read(kStateHeaderBytes));
    STELLARIUM_ASSIGN(SavedState state, decode_state(bytes));
    for (const auto& [part, id] :
         {std::pair(disk_volume(name), state.disk_id), std::pair(ram_volume(name), state.ram_id)}) {
        STELLARIUM_ASSIGN(const Json found, get(snapshot_target(part, snapshot)));
        if (number_field(found, "id") != id) {
            return fail(ErrorCode::kCorrupt,
                        fmt::format("snapshot '{}@{}' is another one than the state of '{}@{}' "
                                    "belongs to",
                                    part, snapshot, name, snapshot));
        }
    }
    return state;
}

Result<RestoreFigures> Machines::start_clones(const std::string& name, const std::string& snapshot,
                                              std::vector<Starting>& clones) {
    const Clock::time_point started = Clock::now();
    STELLARIUM_ASSIGN(const SavedState state, load_state(name, snapshot));
    STELLARIUM_ASSIGN(const UniqueFd devices, memory_file(state.devices));
    std::vector<std::string> disks;
    disks.reserve(clones.size());
    for (const Starting& each : clones) {
        disks.push_back(disk_volume(each.machine.record.name));
    }
    const std::string base = base_volume(name, snapshot);
    // Written down first, so that no other command takes the base away meanwhile.
    for (Starting& each : clones) {
        MachineRecord& record = each.machine.record;
        record.config = state.config;
        record.restored_from = fmt::format("{}@{}", name, snapshot);
        record.base = base;
        STELLARIUM_TRY(each.machine.folder.write(record));
    }
    const auto give_up_base = [&] {
        for (Starting& each : clones) {
            each.machine.record.base.clear();
            [[maybe_unused]] const Result<void> written =
                each.machine.folder.write(each.machine.record);
        }
        drop_base(base);
    };
    STELLARIUM_TRY(make_base(name, snapshot));
    const std::string disk_source = disk_volume(name) + "@" + snapshot;
    if (const Result<Json> cloned =
            client_.call("POST", "/v1/clones", Json{{"source", disk_source}, {"names", disks}});
        !cloned) {
        give_up_base();
        return std::unexpected(cloned.error());
    }
    RestoreFigures figures;
    const auto start_all = [&]() -> Result<void> {
        // Open as QEMU has it: what is read through it is in the cache that QEMU maps.
        const std::string base_path = volume_file(base);
        const std::string ram_path = snapshot_file(ram_volume(name), snapshot);
        STELLARIUM_ASSIGN(const UniqueFd base_file, open_file(base_path, O_RDWR));
        STELLARIUM_ASSIGN(const UniqueFd ram_file, open_file(ram_path, O_RDONLY));
        std::atomic<bool> given_up{false};
        std::future<Checked> checking = std::async(std::launch::async, [&] {
            Checked checked;
            const Result<uint64_t> read =
                read_all_data(base_file.get(), ram_file.get(), base_path, checked.bad,
                              [&] { return given_up.load() || options_.cancelled(); });
            if (read) {
                checked.bytes = *read;
            } else {
                checked.error = read.error();
            }
            return checked;
        });
        const auto launch_all = [&]() -> Result<void> {
            for (Starting& each : clones) {
                MachineRecord& record = each.machine.record;
                const std::string disk = volume_file(disk_volume(record.name));
                STELLARIUM_TRY(open_file(disk, O_RDONLY));
                STELLARIUM_ASSIGN(const UniqueFd incoming, reopen(devices));
                STELLARIUM_ASSIGN(record.process,
                                  start_qemu(each.machine.folder, {.name = record.name,
                                                                   .config = record.config,
                                                                   .disk = disk,
                                                                   .ram_file = base_path,
                                                                   .incoming_fd = incoming.get()}));
                STELLARIUM_TRY(each.machine.folder.write(record));
            }
            for (Starting& each : clones) {
                STELLARIUM_ASSIGN(
                    each.qmp,
                    connect_qemu(each.machine.folder, each.machine.record.process, kClonesTimeout));
                STELLARIUM_TRY(
                    wait_until_loaded(each.machine.folder, each.machine.record.process, *each.qmp));
            }
            return {};
        };
        const Result<void> launched = launch_all();
        given_up = !launched;
        const Checked checked = checking.get();
        if (checked.error && checked.error->code() == ErrorCode::kCorrupt) {
            return std::unexpected(explain_damage(*checked.error, ram_volume(name) + "@" + snapshot,
                                                  checked.bad.offset_bytes,
                                                  checked.bad.length_bytes));
        }
        STELLARIUM_TRY(launched);
        if (checked.error) {
            return std::unexpected(*checked.error);
        }
        figures.checked_bytes = checked.bytes;
        for (const Starting& each : clones) {
            STELLARIUM_TRY(each.qmp->execute("cont"));
        }
        return {};
    };
    if (const Result<void> done = start_all(); !done) {
        for (const Starting& each : clones) {
            [[maybe_unused]] const Result<void> killed = kill_qemu(each.machine.record.process);
        }
        [[maybe_unused]] const Result<void> dropped = drop_volumes(disks, kVolumeReleaseTimeout);
        give_up_base();
        return std::unexpected(done.error());
    }
    figures.machines.reserve(clones.size());
    for (const Starting& each : clones) {
        figures.machines.push_back(each.machine.record);
    }
    figures.start_ms = std::chrono::duration<double, std::milli>(Clock::now() - started).count();
    return figures;
}

/// Says which chunk it is that makes a part of a snapshot unreadable.
Error Machines::explain_damage(const Error& error, const std::string& what, uint64_t offset_bytes,
                               uint64_t length_bytes) {
    const std::string where = fmt::format("{} cannot be read at {}: ", what, offset_bytes);
    const Result<Json> damage = get("/v1/damage");
    if (!damage || !damage->is_object()) {
        return {ErrorCode::kCorrupt, where + error.message()};
    }
    for (const Json& chunk : damage->value("damaged", Json::array())) {
        for (const Json& user : chunk.value("users", Json::array())) {
            if (text_field(user, "name") != what) {
                continue;
            }
            for (const Json& range : user.value("ranges", Json::array())) {
                const uint64_t start = range.value("offset_bytes", uint64_t{0});
                const uint64_t length = range.value("length_bytes", uint64_t{0});
                if (start < offset_bytes + length_bytes && offset_bytes < start + length) {
                    return {
                        ErrorCode::kCorrupt,
                        fmt::format("{} cannot be restored: chunk {} at {} of it is damaged "
                                    "({} at {}: {}); see stellarctl scrub --status",
                                    what, text_field(chunk, "id"), start, text_field(chunk, "file"),
                                    chunk.value("offset_bytes", uint64_t{0}),
                                    text_field(chunk, "reason"))};
                }
            }
        }
    }
    return {ErrorCode::kCorrupt, where + error.message() + "; see stellarctl scrub --status"};
}

}  // namespace stellarium::vm
