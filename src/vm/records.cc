#include "vm/records.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/locations.h"

namespace stellarium::vm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kRecordName = "machine.json";
constexpr std::chrono::milliseconds kLockPoll{20};

Result<std::string> read_text(const std::string& path) {
    std::ifstream file(path);
    if (!file) {
        return fail(ErrorCode::kNotFound, fmt::format("{} is not there", path));
    }
    std::ostringstream text;
    text << file.rdbuf();
    return std::move(text).str();
}

Result<void> check_name(const std::string& name, size_t longest, std::string_view what) {
    const bool valid = std::ranges::all_of(name, [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '.' || c == '_' || c == '-';
    });
    if (name.empty() || name.size() > longest || !valid || name == "." || name == "..") {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("'{}' is no name for a {}: 1 to {} of A-Z a-z 0-9 . _ -", name,
                                what, longest));
    }
    return {};
}

}  // namespace

Result<ProcessId> identify(int64_t pid) {
    const Result<std::string> stat = read_text(fmt::format("/proc/{}/stat", pid));
    const size_t end = stat ? stat->rfind(')') : std::string::npos;
    if (end == std::string::npos) {
        return fail(ErrorCode::kNotFound, fmt::format("there is no process {}", pid));
    }
    // After the name: the state is field 3, the start is field 22.
    std::istringstream fields(stat->substr(end + 1));
    std::string state;
    std::string field;
    fields >> state;
    for (int i = 4; i <= 22; ++i) {
        fields >> field;
    }
    ProcessId process{.pid = pid, .start_ticks = 0};
    const auto [stop, code] =
        std::from_chars(field.c_str(), field.c_str() + field.size(), process.start_ticks);
    if (state == "Z" || state == "X" || code != std::errc()) {
        return fail(ErrorCode::kNotFound, fmt::format("process {} has ended", pid));
    }
    return process;
}

bool is_alive(const ProcessId& process) {
    if (process.pid <= 0) {
        return false;
    }
    const Result<ProcessId> present = identify(process.pid);
    return present && *present == process;
}

Json to_json(const MachineRecord& record) {
    return Json{{"name", record.name},
                {"config", to_json(record.config)},
                {"pid", static_cast<uint64_t>(record.process.pid)},
                {"pid_start", record.process.start_ticks},
                {"restored_from", record.restored_from},
                {"base", record.base},
                {"pending", record.pending},
                {"resume", record.resume}};
}

Result<MachineRecord> record_from_json(const Json& json, const std::string& what) {
    control::ObjectReader reader(json, what);
    MachineRecord record;
    record.name = reader.required_string("name");
    const Json* const config = reader.optional_value("config");
    record.process.pid = static_cast<int64_t>(reader.required_size("pid"));
    record.process.start_ticks = reader.required_size("pid_start");
    record.restored_from = reader.required_string("restored_from");
    record.base = reader.required_string("base");
    record.pending = reader.required_string("pending");
    record.resume = reader.optional_bool("resume").value_or(false);
    STELLARIUM_TRY(reader.finish());
    if (config == nullptr) {
        return fail(ErrorCode::kInvalidArgument, what + ": it has no configuration");
    }
    STELLARIUM_ASSIGN(record.config, config_from_json(*config, what));
    return record;
}

Result<void> check_machine_name(const std::string& name) {
    return check_name(name, kMaxMachineName, "machine");
}

Result<void> check_snapshot_name(const std::string& name) {
    return check_name(name, kMaxMachineSnapshotName, "machine's snapshot");
}

Result<MachineFolder> MachineFolder::open_locked(const std::string& root, const std::string& name,
                                                 std::chrono::milliseconds timeout) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    MachineFolder folder;
    folder.path_ = root + "/" + name;
    while (true) {
        folder.directory_ =
            UniqueFd(::open(folder.path_.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
        if (!folder.directory_) {
            return fail(ErrorCode::kNotFound, fmt::format("there is no machine '{}'", name));
        }
        folder.lock_ =
            UniqueFd(::openat(folder.directory_.get(), "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        if (folder.lock_ && flock(folder.lock_.get(), LOCK_EX | LOCK_NB) == 0) {
            // Another command may have removed the folder, and a third made it again, meanwhile.
            struct stat ours{};
            struct stat present{};
            if (fstat(folder.lock_.get(), &ours) == 0 &&
                stat((folder.path_ + "/lock").c_str(), &present) == 0 &&
                ours.st_ino == present.st_ino && ours.st_dev == present.st_dev) {
                return folder;
            }
        } else if (folder.lock_ && errno != EWOULDBLOCK && errno != EINTR) {
            return std::unexpected(Error::from_errno(errno, "lock " + folder.path_));
        }
        if (std::chrono::steady_clock::now() >= deadline) {
            return fail(ErrorCode::kBusy,
                        fmt::format("another command works on machine '{}': try again", name));
        }
        std::this_thread::sleep_for(kLockPoll);
    }
}

Result<MachineFolder> MachineFolder::make(const std::string& root, const std::string& name,
                                          std::chrono::milliseconds timeout) {
    STELLARIUM_TRY(check_machine_name(name));
    STELLARIUM_TRY(control::make_private_directory(root));
    STELLARIUM_TRY(control::make_private_directory(root + "/" + name));
    return open_locked(root, name, timeout);
}

Result<MachineFolder> MachineFolder::open(const std::string& root, const std::string& name,
                                          std::chrono::milliseconds timeout) {
    STELLARIUM_TRY(check_machine_name(name));
    STELLARIUM_ASSIGN(MachineFolder folder, open_locked(root, name, timeout));
    if (!fs::exists(folder.path_ + "/" + kRecordName)) {
        return fail(ErrorCode::kNotFound, fmt::format("there is no machine '{}'", name));
    }
    return folder;
}

std::string MachineFolder::short_path(const std::string& file) const {
    return fmt::format("/proc/self/fd/{}/{}", directory_.get(), file);
}

Result<MachineRecord> MachineFolder::read() const {
    const std::string path = path_ + "/" + kRecordName;
    STELLARIUM_ASSIGN(const std::string text, read_text(path));
    const Result<Json> json = control::parse_json(text, path);
    Result<MachineRecord> record =
        json ? record_from_json(*json, path) : std::unexpected(json.error());
    if (!record) {
        return fail(ErrorCode::kCorrupt, record.error().message());
    }
    return record;
}

Result<void> MachineFolder::write(const MachineRecord& record) const {
    const std::string path = path_ + "/" + kRecordName;
    {
        std::ofstream file(path + ".new", std::ios::trunc);
        file << control::to_pretty_text(to_json(record)) << '\n';
        file.close();
        if (!file) {
            return fail(ErrorCode::kIo, fmt::format("{}.new cannot be written", path));
        }
    }
    if (::rename((path + ".new").c_str(), path.c_str()) != 0) {
        return std::unexpected(Error::from_errno(errno, "rename to " + path));
    }
    return {};
}

Result<void> MachineFolder::remove() {
    std::error_code failed;
    fs::remove_all(path_, failed);
    if (failed) {
        return std::unexpected(Error::from_errno(failed.value(), "remove " + path_));
    }
    return {};
}

Result<std::vector<std::string>> machine_names(const std::string& root) {
    std::vector<std::string> names;
    std::error_code failed;
    for (fs::directory_iterator at(root, failed), end; !failed && at != end; at.increment(failed)) {
        if (fs::exists(at->path() / kRecordName)) {
            names.push_back(at->path().filename().string());
        }
    }
    if (failed && failed.value() != ENOENT) {
        return std::unexpected(Error::from_errno(failed.value(), "list " + root));
    }
    std::ranges::sort(names);
    return names;
}

Result<MachineRecord> peek_record(const std::string& root, const std::string& name) {
    const std::string path = root + "/" + name + "/" + kRecordName;
    STELLARIUM_ASSIGN(const std::string text, read_text(path));
    STELLARIUM_ASSIGN(const Json json, control::parse_json(text, path));
    return record_from_json(json, path);
}

}  // namespace stellarium::vm
