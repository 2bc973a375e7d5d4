#include "control/locations.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <deque>
#include <filesystem>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "control/json.h"

namespace stellarium::control {
namespace {

/// "" when unset or empty.
std::string environment(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? std::string() : std::string(value);
}

std::string runtime_base() {
    if (std::string base = environment("STELLARIUM_RUNTIME_DIR"); !base.empty()) {
        return base;
    }
    const uid_t user = geteuid();
    if (user == 0) {
        return "/run/stellarium";
    }
    if (const std::string base = environment("XDG_RUNTIME_DIR"); !base.empty()) {
        return base + "/stellarium";
    }
    const std::string base = fmt::format("/run/user/{}", user);
    struct stat status{};
    if (stat(base.c_str(), &status) == 0 && status.st_uid == user) {
        return base + "/stellarium";
    }
    return fmt::format("/tmp/stellarium-{}", user);
}

std::string store_tag(const std::string& store_directory) {
    const std::string path = real_path(store_directory);
    return hash(bytes_of(std::string_view(path))).hex().substr(0, 16);
}

std::string record_path(const std::string& store_directory) {
    return store_directory + "/" + kDaemonRecordName;
}

/// A record is a few hundred bytes.
constexpr uint64_t kMaxRecordBytes = uint64_t{64} << 10;

}  // namespace

Result<std::string> default_store_directory() {
    if (std::string store = environment("STELLARIUM_STORE"); !store.empty()) {
        return store;
    }
    if (geteuid() == 0) {
        return "/var/lib/stellarium";
    }
    if (const std::string data = environment("XDG_DATA_HOME"); !data.empty()) {
        return data + "/stellarium";
    }
    if (const std::string home = environment("HOME"); !home.empty()) {
        return home + "/.local/share/stellarium";
    }
    return fail(ErrorCode::kInvalidArgument,
                "which store? Give --store DIR, or set STELLARIUM_STORE (HOME is not set either)");
}

std::string real_path(const std::string& path) {
    std::error_code error;
    const std::filesystem::path real = std::filesystem::weakly_canonical(path, error);
    if (error) {
        return path;
    }
    // "/a/b/" has an empty last part.
    return real.has_filename() || real == real.root_path() ? real.string()
                                                           : real.parent_path().string();
}

std::string absolute_path(const std::string& path) {
    std::error_code failed;
    const std::filesystem::path absolute =
        std::filesystem::absolute(path, failed).lexically_normal();
    if (failed) {
        return path;
    }
    return absolute.has_filename() || absolute == absolute.root_path()
               ? absolute.string()
               : absolute.parent_path().string();
}

std::string default_runtime_directory(const std::string& store_directory) {
    return runtime_base() + "/" + store_tag(store_directory);
}

Result<void> make_directories(const std::string& path) {
    const std::filesystem::path target(path);
    if (mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) {
        return {};
    }
    if (errno == ENOENT && target.has_relative_path() && target.parent_path() != target) {
        STELLARIUM_TRY(make_directories(target.parent_path().string()));
        if (mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) {
            return {};
        }
    }
    return std::unexpected(Error::from_errno(errno, "make directory " + path));
}

namespace {

/// Nobody but `owner`, root and, for the last one, nobody at all could have put something else in
/// its place or into it.
Result<void> check_component(const std::string& path, const struct stat& status, bool last,
                             std::optional<gid_t> group, uid_t owner) {
    if (!S_ISDIR(status.st_mode)) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("{} is not a directory", path));
    }
    const bool others_write = (status.st_mode & (S_IWGRP | S_IWOTH)) != 0;
    if (!last) {
        // In a sticky directory others cannot touch what is ours.
        const bool safe = !others_write || (status.st_mode & S_ISVTX) != 0;
        if (safe && (status.st_uid == 0 || status.st_uid == owner)) {
            return {};
        }
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("directory {} belongs to user {} with mode {:o}: others could put "
                                "directories and sockets of their own there; choose another place "
                                "(STELLARIUM_RUNTIME_DIR, --runtime-dir), or remove it",
                                path, status.st_uid, status.st_mode & 07777));
    }
    if (status.st_uid != owner || others_write) {
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("directory {} must belong to user {} and be writable by nobody "
                                "else; it belongs to user {} with mode {:o}: make it so (chown -R, "
                                "chmod), or choose another place (STELLARIUM_RUNTIME_DIR, "
                                "--runtime-dir)",
                                path, owner, status.st_uid, status.st_mode & 07777));
    }
    if (group && (status.st_gid != *group || (status.st_mode & S_IXGRP) == 0)) {
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("group {} cannot enter the directory {}, which was not made by "
                                "this start: remove it, or chgrp {} and chmod 710 it",
                                *group, path, *group));
    }
    return {};
}

/// Sets owner, group and mode of a directory that was just made, which nobody else could have put
/// something in the place of: what is above it is root's or ours.
Result<void> hand_over(const std::string& path, bool last, std::optional<gid_t> group,
                       std::optional<uid_t> given_to) {
    const mode_t mode = group ? 0710 : 0700;
    // Those on the way to somebody else's stay root's, and are only passed through.
    const mode_t mode_on_the_way = given_to ? 0711 : mode;
    const uid_t owner = last && given_to ? *given_to : static_cast<uid_t>(-1);
    const int directory = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (directory < 0 || fchown(directory, owner, group.value_or(static_cast<gid_t>(-1))) != 0 ||
        fchmod(directory, last ? mode : mode_on_the_way) != 0) {
        const int failed = errno;
        if (directory >= 0) {
            close(directory);
        }
        return std::unexpected(
            Error::from_errno(failed, "set owner, group and mode of directory " + path));
    }
    close(directory);
    return {};
}

/// Walks along `path`, also through symbolic links of trusted owners, checks every directory on the
/// way and, with `make`, makes those that are missing.
Result<void> walk(const std::string& path, std::optional<gid_t> group,
                  std::optional<uid_t> given_to, bool make) {
    const uid_t owner = given_to.value_or(geteuid());
    constexpr int kMaxLinks = 40;
    std::deque<std::string> todo;
    for (const auto& part : std::filesystem::path(absolute_path(path)).relative_path()) {
        todo.push_back(part.string());
    }
    if (todo.size() < 2) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} is a directory of the whole system: name one of its own, such "
                                "as /run/stellarium/a",
                                path));
    }
    int links = 0;
    std::string at;  // A checked directory; "" is the root.
    struct stat status{};
    if (lstat("/", &status) != 0) {
        return std::unexpected(Error::from_errno(errno, "look at directory /"));
    }
    STELLARIUM_TRY(check_component("/", status, false, group, owner));
    while (!todo.empty()) {
        const std::string part = std::move(todo.front());
        todo.pop_front();
        if (part == "..") {
            at.resize(at.empty() ? 0 : at.rfind('/'));
            continue;
        }
        std::string next = at;
        next += '/';
        next += part;
        bool made = false;
        if (lstat(next.c_str(), &status) != 0) {
            if (errno != ENOENT) {
                return std::unexpected(Error::from_errno(errno, "look at directory " + next));
            }
            if (!make) {
                return {};
            }
            made = mkdir(next.c_str(), 0700) == 0;
            if (!made && errno != EEXIST) {
                return std::unexpected(Error::from_errno(errno, "make directory " + next));
            }
            if (lstat(next.c_str(), &status) != 0) {
                return std::unexpected(Error::from_errno(errno, "look at directory " + next));
            }
        }
        if (S_ISLNK(status.st_mode)) {
            std::array<char, PATH_MAX> target{};
            const ssize_t length = readlink(next.c_str(), target.data(), target.size());
            if ((status.st_uid != 0 && status.st_uid != owner) || length <= 0 ||
                ++links > kMaxLinks) {
                return fail(ErrorCode::kPermissionDenied,
                            fmt::format("{} is a symbolic link of user {}: remove it, or choose "
                                        "another place",
                                        next, status.st_uid));
            }
            const std::filesystem::path to(
                std::string_view(target.data(), static_cast<size_t>(length)));
            if (to.is_absolute()) {
                at.clear();
            }
            std::vector<std::string> parts;
            for (const auto& step : to.relative_path()) {
                if (!step.empty() && step != ".") {
                    parts.push_back(step.string());
                }
            }
            todo.insert(todo.begin(), parts.begin(), parts.end());
            continue;
        }
        if (made && (group || given_to)) {
            STELLARIUM_TRY(hand_over(next, todo.empty(), group, given_to));
        } else {
            STELLARIUM_TRY(check_component(next, status, todo.empty(), group, owner));
        }
        if (given_to && (status.st_uid == owner || (made && todo.empty()))) {
            return {};  // From here on it is theirs, and no place for root to make anything.
        }
        at = next;
    }
    return {};
}

}  // namespace

Result<void> make_private_directory(const std::string& path, std::optional<gid_t> group,
                                    std::optional<uid_t> owner) {
    return walk(path, group, owner, /*make=*/true);
}

Result<void> check_private_directory(const std::string& path, std::optional<gid_t> group,
                                     std::optional<uid_t> owner) {
    return walk(path, group, owner, /*make=*/false);
}

std::optional<DaemonRecord> read_daemon_record(io::FileSystem& files,
                                               const std::string& store_directory) {
    const auto file = files.open(record_path(store_directory), io::OpenMode::kReadOnly);
    if (!file) {
        return std::nullopt;
    }
    const Result<uint64_t> size = (*file)->size_bytes();
    if (!size || *size > kMaxRecordBytes) {
        return std::nullopt;
    }
    std::string text(*size, '\0');
    if (!io::read_exact(**file, std::as_writable_bytes(std::span(text)), 0)) {
        return std::nullopt;
    }
    const Result<Json> json = parse_json(text, "daemon record");
    if (!json) {
        return std::nullopt;
    }
    DaemonRecord record;
    ObjectReader reader(*json, "daemon record");
    record.pid = static_cast<int64_t>(reader.optional_number("pid").value_or(0));
    record.socket = reader.required_string("socket");
    record.runtime_directory = reader.required_string("runtime_directory");
    if (!reader.finish()) {
        return std::nullopt;
    }
    return record;
}

Result<void> write_daemon_record(io::FileSystem& files, const std::string& store_directory,
                                 const DaemonRecord& record) {
    const std::string path = record_path(store_directory);
    const std::string temporary = path + ".new";
    const std::string text = to_text(Json{{"pid", static_cast<uint64_t>(record.pid)},
                                          {"socket", record.socket},
                                          {"runtime_directory", record.runtime_directory}}) +
                             "\n";
    {
        STELLARIUM_ASSIGN(const std::unique_ptr<io::File> file,
                          files.open(temporary, io::OpenMode::kCreate));
        STELLARIUM_TRY(file->truncate(0));
        STELLARIUM_TRY(io::write_all(*file, bytes_of(std::string_view(text)), 0));
    }
    // Not synced: after a host crash there is no daemon and no runtime directory to find.
    return files.rename(temporary, path);
}

Result<void> remove_daemon_record(io::FileSystem& files, const std::string& store_directory) {
    Result<void> removed = files.remove(record_path(store_directory));
    if (!removed && removed.error().code() != ErrorCode::kNotFound) {
        return removed;
    }
    return {};
}

namespace {

void add_new(std::vector<std::string>& paths, const std::string& path) {
    if (std::ranges::find(paths, path) == paths.end()) {
        paths.push_back(path);
    }
}

/// Those that a daemon takes when it is not told.
std::vector<std::string> usual_runtime_directories(const std::string& store_directory) {
    std::vector<std::string> directories{default_runtime_directory(store_directory)};
    // A system-wide daemon, looked for by somebody who may not read its store.
    add_new(directories, "/run/stellarium/" + store_tag(store_directory));
    return directories;
}

}  // namespace

std::vector<std::string> runtime_directory_candidates(io::FileSystem& files,
                                                      const std::string& store_directory) {
    std::vector<std::string> candidates;
    if (const auto record = read_daemon_record(files, store_directory)) {
        candidates.push_back(record->runtime_directory);
    }
    for (const std::string& directory : usual_runtime_directories(store_directory)) {
        add_new(candidates, directory);
    }
    return candidates;
}

std::vector<std::string> control_socket_candidates(io::FileSystem& files,
                                                   const std::string& store_directory) {
    std::vector<std::string> candidates;
    if (const auto record = read_daemon_record(files, store_directory)) {
        candidates.push_back(record->socket);
    }
    for (const std::string& directory : usual_runtime_directories(store_directory)) {
        add_new(candidates, directory + "/control.sock");
    }
    return candidates;
}

}  // namespace stellarium::control
