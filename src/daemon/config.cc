#include "daemon/config.h"

#include <array>

#include <fmt/format.h>
#include <grp.h>
#include <pwd.h>
#include <unistd.h>

#include "control/locations.h"
#include "daemon/http_server.h"
#include "nova/limits.h"

namespace stellarium::daemon {

std::vector<std::string> apply_settings(const control::Json& settings, DaemonConfig& config) {
    control::ObjectReader reader(settings, "configuration");
    const auto take_text = [&](std::string_view key, std::string& into) {
        if (auto value = reader.optional_string(key)) {
            if (value->empty()) {
                reader.complain(key, "must not be empty");
            }
            into = *std::move(value);
        }
    };
    take_text("store", config.store);
    take_text("socket", config.socket);
    take_text("runtime_dir", config.runtime_directory);
    if (const auto nbd = reader.optional_bool("nbd")) {
        config.nbd = *nbd;
    }
    take_text("nbd_socket", config.nbd_socket);
    take_text("socket_group", config.socket_group);
    take_text("user", config.user);
    take_text("mount", config.mount);
    take_text("metrics_listen", config.metrics_listen);
    if (!config.metrics_listen.empty() && reader.has("metrics_listen")) {
        if (const auto parsed = parse_host_port(config.metrics_listen); !parsed) {
            reader.complain("metrics_listen", "is wrong: " + parsed.error().message());
        }
    }
    if (const auto memory = reader.optional_size("memory")) {
        if (*memory < kMinMemoryBytes || *memory > kMaxMemoryBytes) {
            reader.complain(
                "memory", fmt::format("is {}, and must be from {} to {}", format_size(*memory),
                                      format_size(kMinMemoryBytes), format_size(kMaxMemoryBytes)));
        }
        config.memory_bytes = *memory;
        config.memory_given = true;
    }
    if (const auto age = reader.optional_number("writeback_age_ms", 10, 3'600'000)) {
        config.writeback_age_ms = *age;
    }
    if (const auto threads = reader.optional_number("threads", 0, 256)) {
        config.threads = *threads;
    }
    if (const auto verify = reader.optional_string("verify")) {
        if (*verify != "first" && *verify != "always") {
            reader.complain("verify",
                            fmt::format("is '{}', and must be 'first' or 'always'", *verify));
        }
        config.verify_always = *verify == "always";
    }
    if (const auto prefetch = reader.optional_bool("boot_prefetch")) {
        config.boot_prefetch = *prefetch;
    }
    if (const auto automatic = reader.optional_bool("gc")) {
        config.gc.automatic = *automatic;
    }
    if (const auto percent = reader.optional_number("gc_dead_percent", 1, 99)) {
        config.gc.dead_share = static_cast<double>(*percent) / 100;
    }
    if (const auto least = reader.optional_size("gc_min_dead")) {
        config.gc.min_dead_bytes = *least;
    }
    if (const auto percent = reader.optional_number("low_space_percent", 0, 99)) {
        config.gc.low_space_share = static_cast<double>(*percent) / 100;
    }
    if (const auto rate = reader.optional_rate("gc_rate", nova::kMinRateBytes)) {
        config.gc.rate_bytes_per_second = *rate;
    }
    if (const auto every = reader.optional_string("scrub_every")) {
        if (const auto duration = parse_duration(*every)) {
            config.scrub.every = *duration;
        } else {
            reader.complain("scrub_every", "is wrong: " + duration.error().message());
        }
    }
    if (const auto rate = reader.optional_size("scrub_rate")) {
        if (*rate < nova::ScrubPolicy{}.least_rate_bytes_per_second) {
            reader.complain(
                "scrub_rate",
                fmt::format("is {}, and must be at least {}", format_size(*rate),
                            format_size(nova::ScrubPolicy{}.least_rate_bytes_per_second)));
        }
        config.scrub.rate_bytes_per_second = *rate;
    }
    if (const auto allow = reader.optional_bool("allow_unsafe_file_system")) {
        config.allow_unsafe_file_system = *allow;
    }
    if (const auto mode = reader.optional_string("sandbox")) {
        if (const auto known = sandbox_mode_from(*mode)) {
            config.sandbox = *known;
        } else {
            reader.complain("sandbox", fmt::format("is '{}', and must be 'auto', 'require', "
                                                   "'strict' or 'off'",
                                                   *mode));
        }
    }
    if (const auto level = reader.optional_string("log_level")) {
        if (const auto known = log_level_from(*level)) {
            config.log_level = *known;
        } else {
            reader.complain("log_level", fmt::format("is '{}', and must be 'debug', 'info', "
                                                     "'warning' or 'error'",
                                                     *level));
        }
    }
    if (const auto format = reader.optional_string("log_format")) {
        if (const auto known = log_format_from(*format)) {
            config.log_format = *known;
        } else {
            reader.complain("log_format",
                            fmt::format("is '{}', and must be 'text' or 'json'", *format));
        }
    }
    return reader.complaints();
}

namespace {

/// A dot and the longest process id.
constexpr size_t kPidSuffixBytes = 11;

/// Whom --user names. Only root can become somebody else.
Result<std::optional<ServiceUser>> find_user(const std::string& name) {
    passwd entry{};
    passwd* found = nullptr;
    std::array<char, 16384> buffer{};
    if (getpwnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found) != 0 ||
        found == nullptr) {
        return fail(ErrorCode::kInvalidArgument, "there is no such user");
    }
    if (found->pw_uid == geteuid()) {
        return std::nullopt;
    }
    if (geteuid() != 0) {
        return fail(ErrorCode::kInvalidArgument,
                    "only root can become another user; start the daemon as that user, or as root");
    }
    return ServiceUser{.name = name, .uid = found->pw_uid, .gid = found->pw_gid};
}

}  // namespace

std::vector<std::string> finish_config(DaemonConfig& config) {
    std::vector<std::string> complaints;
    if (config.store.empty()) {
        if (auto store = control::default_store_directory()) {
            config.store = *std::move(store);
        } else {
            complaints.push_back("'store' is missing: " + store.error().message());
            return complaints;
        }
    }
    config.store = control::real_path(config.store);
    if (config.runtime_directory.empty()) {
        config.runtime_directory = control::default_runtime_directory(config.store);
    }
    // With its symbolic links: whose they are is checked.
    config.runtime_directory = control::absolute_path(config.runtime_directory);
    if (config.socket.empty()) {
        config.socket = config.runtime_directory + "/control.sock";
    }
    config.socket = control::real_path(config.socket);
    if (!config.mount.empty()) {
        // Not looked at: where an earlier daemon's files wait for us, a look would wait for us too.
        config.mount = control::absolute_path(config.mount);
        while (config.mount.size() > 1 && config.mount.ends_with('/')) {
            config.mount.pop_back();
        }
    }
    if (config.socket.size() > control::kMaxSocketPathBytes) {
        complaints.push_back(
            fmt::format("'socket' is {} bytes long, and a socket's path has at most {}: {}",
                        config.socket.size(), control::kMaxSocketPathBytes, config.socket));
    }
    // Sockets of guests are <runtime>/vhost/<20 digits>.sock.
    const size_t guest_socket_bytes = config.runtime_directory.size() + 32;
    if (guest_socket_bytes > control::kMaxSocketPathBytes) {
        complaints.push_back(
            fmt::format("'runtime_dir' is {} bytes long, and at most {} leave room for the names "
                        "of sockets: {}",
                        config.runtime_directory.size(), control::kMaxSocketPathBytes - 32,
                        config.runtime_directory));
    }
    if (config.nbd_socket.empty() && config.nbd) {
        config.nbd_socket = config.runtime_directory + "/nbd.sock";
    }
    if (!config.nbd_socket.empty()) {
        config.nbd_socket = control::real_path(config.nbd_socket);
        // It is made beside its place, under its name and our pid.
        if (config.nbd_socket.size() > control::kMaxSocketPathBytes - kPidSuffixBytes) {
            complaints.push_back(
                fmt::format("'nbd_socket' is {} bytes long, and may have at most {}: {}",
                            config.nbd_socket.size(),
                            control::kMaxSocketPathBytes - kPidSuffixBytes, config.nbd_socket));
        }
        if (config.nbd_socket == config.socket) {
            complaints.push_back("'nbd_socket' and 'socket' are the same: " + config.socket);
        }
    }
    if (!config.socket_group.empty()) {
        group entry{};
        group* found = nullptr;
        std::array<char, 16384> buffer{};
        if (getgrnam_r(config.socket_group.c_str(), &entry, buffer.data(), buffer.size(), &found) !=
                0 ||
            found == nullptr) {
            complaints.push_back(fmt::format("'socket_group' is '{}', and there is no such group",
                                             config.socket_group));
        } else {
            config.socket_gid = found->gr_gid;
        }
    }
    std::optional<uid_t> owner;
    if (!config.user.empty()) {
        if (auto user = find_user(config.user)) {
            config.service_user = *std::move(user);
            if (config.service_user) {
                owner = config.service_user->uid;
            }
        } else {
            complaints.push_back(
                fmt::format("'user' is '{}': {}", config.user, user.error().message()));
        }
    }
    if (const auto usable =
            control::check_private_directory(config.runtime_directory, config.socket_gid, owner);
        !usable) {
        complaints.push_back("'runtime_dir' cannot be used: " + usable.error().message());
    }
    return complaints;
}

}  // namespace stellarium::daemon
