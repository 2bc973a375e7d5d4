// stellariumd: reads what it is told, checks all of it, and runs the daemon.
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <fmt/format.h>

#include "control/json.h"
#include "daemon/config.h"
#include "daemon/daemon.h"
#include "daemon/log.h"

namespace stellarium::daemon {
namespace {

using control::Json;

constexpr int kUsageExit = 2;

constexpr const char* kFooter =
    R"(Every option can stand in the config file, a JSON object whose keys are the options' names with
'_' for '-'; the command line wins. All of it is checked before anything starts.

Examples:
  stellariumd --store /var/lib/stellarium
  stellariumd --config /etc/stellarium.json --log-format json
  stellariumd --store ./pool --memory 1GiB --metrics-listen 127.0.0.1:9464

Exit codes: 0 stopped on request, 2 wrong options or config, others as stellarctl(1).)";

void complain(std::string_view where, const std::vector<std::string>& complaints) {
    for (const std::string& complaint : complaints) {
        fmt::print(stderr, "stellariumd: {}{}\n", where, complaint);
    }
}

Result<Json> read_config_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        return std::unexpected(Error::from_errno(errno, "config file " + path));
    }
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) {
        return fail(ErrorCode::kInvalidArgument, "config file " + path + " is a directory");
    }
    const std::string text(std::istreambuf_iterator<char>(file), {});
    if (file.bad()) {
        return fail(ErrorCode::kIo, "config file " + path + " cannot be read");
    }
    if (text.empty()) {
        return fail(
            ErrorCode::kInvalidArgument,
            "config file " + path + " is empty; it must hold a JSON object: {} says nothing");
    }
    STELLARIUM_ASSIGN(Json settings, control::parse_json(text, "config file " + path));
    STELLARIUM_TRY(control::refuse_repeated_keys(text, "config file " + path));
    return settings;
}

int run(int argc, char** argv) {
    CLI::App app("stellariumd: owns a Stellarium store and serves its volumes to virtual machines.",
                 "stellariumd");
    app.footer(kFooter);
    app.set_version_flag("--version", "stellariumd " STELLARIUM_VERSION);

    Json given = Json::object();
    const auto text_option = [&](const std::string& name, const std::string& key,
                                 const std::string& help, const std::string& type) {
        app.add_option_function<std::string>(
               name, [&given, key](const std::string& value) { given[key] = value; }, help)
            ->type_name(type);
    };
    const auto number_option = [&](const std::string& name, const std::string& key,
                                   const std::string& help) {
        app.add_option_function<std::string>(
               name,
               [&given, key](const std::string& text) {
                   uint64_t value = 0;
                   const char* const end = text.data() + text.size();
                   const auto [stop, code] = std::from_chars(text.data(), end, value);
                   // What is no number is complained about with all the rest, with its range.
                   given[key] = code == std::errc() && stop == end ? Json(value) : Json(text);
               },
               help)
            ->type_name("N");
    };
    std::string config_path;
    bool check_only = false;
    app.add_option("--config", config_path, "JSON file with further options")->type_name("FILE");
    app.add_flag("--check-config", check_only, "check all options, start nothing");
    text_option("--store", "store",
                "the store to serve (default: $STELLARIUM_STORE, then "
                "/var/lib/stellarium for root, ~/.local/share/stellarium)",
                "DIR");
    text_option("--socket", "socket",
                "control socket (default: control.sock in the runtime directory)", "PATH");
    text_option("--socket-group", "socket_group",
                "members of this group may use the control socket, guests' sockets and that of NBD",
                "GROUP");
    app.add_flag_function(
        "--nbd", [&given](int64_t) { given["nbd"] = true; },
        "serve images, volumes and snapshots by NBD too, on nbd.sock in the runtime directory");
    text_option("--nbd-socket", "nbd_socket", "the same, on this socket", "PATH");
    text_option("--user", "user",
                "become this user, when started by root; the store must be theirs", "NAME");
    text_option(
        "--sandbox", "sandbox",
        "confine the process to the store's files and few system calls: 'auto' (default) as "
        "far as the kernel can, 'require', 'strict': a forbidden call ends it, or 'off'",
        "MODE");
    text_option("--runtime-dir", "runtime_dir",
                "for sockets and unflushed writes, on a tmpfs (default: derived from the store)",
                "DIR");
    text_option("--mount", "mount",
                "show images, volumes and snapshots as files below this directory (needs root, or "
                "fusermount3)",
                "DIR");
    text_option("--metrics-listen", "metrics_listen", "serve GET /metrics on TCP too", "HOST:PORT");
    text_option("--memory", "memory",
                "for unflushed writes and cached maps, besides the page cache, 16MiB to 1TiB "
                "(default: 320MiB)",
                "SIZE");
    number_option("--writeback-age-ms", "writeback_age_ms",
                  "unflushed writes older than this are written to the log, 10 to 3600000 "
                  "(default: 5000)");
    number_option("--threads", "threads",
                  "threads that serve guests, 1 to 256; 0: one for each processor (default)");
    text_option("--verify", "verify",
                "check chunks against their ids at the 'first' read (default) or 'always'", "WHEN");
    app.add_flag_function(
        "--no-boot-prefetch", [&given](int64_t) { given["boot_prefetch"] = false; },
        "do not stage what a boot will read when a volume is attached");
    app.add_flag_function(
        "--no-gc", [&given](int64_t) { given["gc"] = false; },
        "collect garbage only when asked to");
    number_option("--gc-dead-percent", "gc_dead_percent",
                  "collect garbage when this much of the store is dead, 1 to 99 (default: 25)");
    text_option("--gc-min-dead", "gc_min_dead",
                "less dead than this is not worth a collection (default: 256MiB)", "SIZE");
    text_option("--gc-rate", "gc_rate",
                "collections copy and free at most this much a second, from 1MiB; 0: no limit "
                "(default: 256MiB)",
                "SIZE");
    number_option("--low-space-percent", "low_space_percent",
                  "warn, and collect whatever is dead, when less of the file system is free, "
                  "0 to 99 (default: 10)");
    text_option("--scrub-every", "scrub_every",
                "read and check everything that is stored so often, 30d or 12h; 0: only when asked "
                "to (default: 30d)",
                "TIME");
    text_option("--scrub-rate", "scrub_rate",
                "scrubs by schedule read at most this much a second, from 4MiB (default: 64MiB)",
                "SIZE");
    app.add_flag_function(
        "--allow-unsafe-file-system",
        [&given](int64_t) { given["allow_unsafe_file_system"] = true; },
        "open a store on a network file system all the same");
    text_option("--log-level", "log_level", "debug, info (default), warning or error", "LEVEL");
    text_option("--log-format", "log_format", "text (default: logfmt) or json", "FORMAT");

    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& success) {
        return app.exit(success);
    } catch (const CLI::ParseError& error) {
        fmt::print(stderr, "stellariumd: {}\nTry 'stellariumd --help'.\n", error.what());
        return kUsageExit;
    }

    DaemonConfig config;
    bool wrong = false;
    if (!config_path.empty()) {
        const Result<Json> settings = read_config_file(config_path);
        if (!settings) {
            complain("", {settings.error().message()});
            return kUsageExit;
        }
        const std::vector<std::string> complaints = apply_settings(*settings, config);
        complain("config file " + config_path + ": ", complaints);
        wrong = !complaints.empty();
    }
    std::vector<std::string> complaints = apply_settings(given, config);
    complain("command line: ", complaints);
    wrong = wrong || !complaints.empty();
    complaints = finish_config(config);
    complain("", complaints);
    if (wrong || !complaints.empty()) {
        return kUsageExit;
    }
    if (check_only) {
        // Starting says more of what is wrong with a store; this one is not even there.
        std::error_code error;
        if (!std::filesystem::exists(config.store + "/superblock", error)) {
            complain("", {"'store' is " + config.store +
                          ", and there is no store: create one with stellarctl init"});
            return kUsageExit;
        }
        return 0;
    }
    Log log(config.log_level, config.log_format);
    if (const Result<void> result = run_daemon(config, STELLARIUM_VERSION, log); !result) {
        const ErrorMapping& mapping = error_mapping(result.error().code());
        log.error("failed", {{"code", std::string(mapping.name)},
                             {"message", result.error().message()},
                             {"advice", std::string(mapping.advice)}});
        return mapping.exit_code;
    }
    return 0;
}

}  // namespace
}  // namespace stellarium::daemon

int main(int argc, char** argv) {
    try {
        return stellarium::daemon::run(argc, argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "stellariumd: unexpected: %s\n", error.what());
        return 1;
    }
}
