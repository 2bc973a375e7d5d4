#include "control/locations.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
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

std::string default_runtime_directory(const std::string& store_directory) {
    return runtime_base() + "/" + store_tag(store_directory);
}

Result<void> make_private_directory(const std::string& path) {
    const std::filesystem::path target(path);
    if (const std::filesystem::path parent = target.parent_path();
        !parent.empty() && parent != target) {
        struct stat status{};
        if (stat(parent.c_str(), &status) != 0) {
            STELLARIUM_TRY(make_private_directory(parent.string()));
        }
    }
    if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
        return std::unexpected(Error::from_errno(errno, "make directory " + path));
    }
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) {
        return std::unexpected(Error::from_errno(errno, "look at directory " + path));
    }
    if (!S_ISDIR(status.st_mode)) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("{} is not a directory", path));
    }
    if (status.st_uid != geteuid() || (status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("directory {} must belong to user {} and be writable by nobody "
                                "else; it belongs to user {} with mode {:o}",
                                path, geteuid(), status.st_uid, status.st_mode & 07777));
    }
    return {};
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

std::vector<std::string> control_socket_candidates(io::FileSystem& files,
                                                   const std::string& store_directory) {
    std::vector<std::string> candidates;
    const auto add = [&](const std::string& path) {
        if (std::ranges::find(candidates, path) == candidates.end()) {
            candidates.push_back(path);
        }
    };
    if (const auto record = read_daemon_record(files, store_directory)) {
        add(record->socket);
    }
    add(default_runtime_directory(store_directory) + "/control.sock");
    // A system-wide daemon, looked for by somebody who may not read its store.
    add("/run/stellarium/" + store_tag(store_directory) + "/control.sock");
    return candidates;
}

}  // namespace stellarium::control
