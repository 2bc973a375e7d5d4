// Attachments, and the store as a whole.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <functional>
#include <future>
#include <memory>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rate_limits.h"
#include "base/unique_fd.h"
#include "base/units.h"
#include "cli/commands_common.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "control/attachment.h"
#include "control/locations.h"
#include "io/posix.h"
#include "nebula/dump.h"
#include "nova/limits.h"

namespace stellarium::cli {

using control::Json;

namespace {

/// Leaves most disks to those who need them.
constexpr uint64_t kDefaultScrubRate = 256 * kMiB;

/// The link's target, or "" when `path` is no link.
std::string link_target(const std::string& path) {
    std::array<char, 4096> buffer{};
    const ssize_t length = readlink(path.c_str(), buffer.data(), buffer.size());
    return length < 0 ? std::string() : std::string(buffer.data(), static_cast<size_t>(length));
}

/// What stands at `path` may be replaced by our link: nothing, or a link that leads nowhere, such
/// as one that an earlier attachment left.
Result<void> check_link_place(const std::string& path) {
    if (path.size() > control::kMaxSocketPathBytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} is {} bytes long, and a socket's path has at most {}", path,
                                path.size(), control::kMaxSocketPathBytes));
    }
    struct stat status{};
    if (lstat(path.c_str(), &status) != 0) {
        if (errno == ENOENT) {
            return {};
        }
        return std::unexpected(Error::from_errno(errno, "look at " + path));
    }
    if (S_ISLNK(status.st_mode) && stat(path.c_str(), &status) != 0) {
        return {};
    }
    return fail(ErrorCode::kAlreadyExists,
                fmt::format("{} exists; name another path for the socket, or remove it", path));
}

Result<void> make_link(const std::string& socket, const std::string& link) {
    if (!link_target(link).empty()) {
        unlink(link.c_str());
    }
    if (symlink(socket.c_str(), link.c_str()) != 0) {
        return std::unexpected(
            Error::from_errno(errno, fmt::format("make the link {} to {}", link, socket)));
    }
    return {};
}

/// Where the link will stand: its folder without links, its own name as given.
std::string link_place(const std::string& path) {
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) {
        return control::real_path(".") + "/" + path;
    }
    const std::string folder = control::real_path(slash == 0 ? "/" : path.substr(0, slash));
    return (folder == "/" ? "" : folder) + path.substr(slash);
}

std::string attachment_target(const std::string& source) {
    return target_of("/v1/attachments/", source);
}

/// A client's link is removed when it still leads to the daemon's socket, or to none any more, such
/// as that of a daemon with another runtime directory; whatever else stands there now is somebody
/// else's.
void remove_link(const Json& attachment) {
    const std::string link = text_field(attachment, "link");
    const std::string socket = text_field(attachment, "socket");
    if (link.empty()) {
        return;
    }
    const std::string target = link_target(link);
    struct stat status{};
    const bool leads_nowhere = !target.empty() && stat(link.c_str(), &status) != 0;
    if (!target.empty() && (target == socket || leads_nowhere)) {
        unlink(link.c_str());
    }
}

/// Of --iops, --bandwidth and their bursts.
Result<RateLimits> limits_of(const Arguments& arguments) {
    RateLimits limits{.iops = arguments.iops, .iops_burst = arguments.iops_burst};
    const auto size = [](const char* option, const std::string& text) -> Result<uint64_t> {
        if (text.empty()) {
            return 0;
        }
        Result<uint64_t> bytes = parse_size(text);
        if (!bytes) {
            return std::unexpected(bytes.error().with_context(option));
        }
        if (*bytes == 0) {
            return fail(ErrorCode::kInvalidArgument, fmt::format("{} must be more than 0", option));
        }
        return bytes;
    };
    STELLARIUM_ASSIGN(limits.bandwidth_bytes, size("--bandwidth", arguments.bandwidth));
    STELLARIUM_ASSIGN(limits.bandwidth_burst_bytes,
                      size("--bandwidth-burst", arguments.bandwidth_burst));
    return completed(limits);
}

/// Those of an attachment that a daemon told, as text.
Result<std::string> limits_text(const Json& attachment) {
    const auto limits = attachment.find("limits");
    if (limits == attachment.end()) {
        return std::string();
    }
    STELLARIUM_ASSIGN(const RateLimits read,
                      control::rate_limits_from_json(*limits, "answer of the daemon"));
    return format_rate_limits(read);
}

}  // namespace

Result<void> attach(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const RateLimits limits, limits_of(arguments));
    const std::string link = link_place(arguments.path);
    STELLARIUM_TRY(check_link_place(link));
    context.expect_daemon();
    Json request{{"frontend", "vhost-user"},   {"read_only", arguments.read_only},
                 {"queues", arguments.queues}, {"block_size", arguments.block_size},
                 {"serial", arguments.serial}, {"link", link}};
    if (limits.any()) {
        request["limits"] = control::to_json(limits);
    }
    STELLARIUM_ASSIGN(const Json attachment,
                      ask(context, "PUT", attachment_target(arguments.name), request));
    const std::string socket = text_field(attachment, "socket");
    if (socket != link) {
        if (const Result<void> linked = make_link(socket, link); !linked) {
            // All or nothing: without its name the socket is of no use to whoever asked.
            const Result<Json> undone = ask(context, "DELETE", attachment_target(arguments.name));
            return std::unexpected(undone
                                       ? linked.error()
                                       : linked.error().with_context(
                                             "attached, and neither linked nor detached again (" +
                                             undone.error().message() + ")"));
        }
    }
    print_done(context, attachment, fmt::format("attached '{}' at {}", arguments.name, link));
    return {};
}

Result<void> detach(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json attachment,
                      ask(context, "DELETE", attachment_target(arguments.name)));
    remove_link(attachment);
    print_done(context, attachment, fmt::format("detached '{}'", arguments.name));
    return {};
}

Result<void> limit(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const RateLimits limits, limits_of(arguments));
    if (limits.any() == arguments.no_limits) {
        return fail(ErrorCode::kInvalidArgument,
                    "say what to limit, with --iops or --bandwidth, or --none for no limits");
    }
    STELLARIUM_ASSIGN(const Json attachment,
                      ask(context, "PUT", attachment_target(arguments.name) + "/limits",
                          control::to_json(limits)));
    print_done(context, attachment,
               limits.any()
                   ? fmt::format("limited '{}' to {}", arguments.name, format_rate_limits(limits))
                   : fmt::format("took the limits of '{}' away", arguments.name));
    return {};
}

Result<void> list_attachments(Context& context, const Arguments&) {
    STELLARIUM_ASSIGN(const Json attachments, ask(context, "GET", "/v1/attachments"));
    Output& out = context.out();
    if (out.json()) {
        out.value(attachments);
        return {};
    }
    Table table({{"VOLUME"},
                 {"STATE"},
                 {"MODE"},
                 {"QUEUES", Align::kRight},
                 {"SOCKET"},
                 {"LIMITS"},
                 {"DETAIL"}});
    for (const Json& attachment : attachments) {
        const std::string link = text_field(attachment, "link");
        const std::string socket = text_field(attachment, "socket");
        const std::string target = link.empty() ? std::string() : link_target(link);
        // A daemon with another runtime directory serves other sockets, and leaves links alone.
        const bool is_stale = !socket.empty() && !target.empty() && target != socket;
        STELLARIUM_ASSIGN(const std::string limits, limits_text(attachment));
        std::string detail = text_field(attachment, "detail");
        if (is_stale) {
            detail += fmt::format("{}the link {} leads to {}: ln -sfn {} {}",
                                  detail.empty() ? "" : "; ", link, target, socket, link);
        }
        table.add({text_field(attachment, "source"), text_field(attachment, "state"),
                   bool_field(attachment, "read_only") ? "read-only" : "read-write",
                   std::to_string(number_field(attachment, "queues")),
                   link.empty() || is_stale ? socket : link, limits, detail});
    }
    out.table(table);
    return {};
}

namespace {

void show_collection(Progress& progress, const Json& state) {
    const std::string phase = text_field(state, "phase");
    progress.show(phase == "mark"   ? "collecting garbage: looking for what is needed"
                  : phase == "free" ? "collecting garbage: freeing"
                                    : "collecting garbage: rewriting",
                  number_field(state, "done"), number_field(state, "total"));
}

/// Of --rate: bytes a second, and not so few that the work would never end; 0: no limit.
Result<uint64_t> parse_rate(std::string_view text) {
    STELLARIUM_ASSIGN(const uint64_t rate, parse_size(text));
    if (rate != 0 && rate < nova::kMinRateBytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("--rate {} is too little: it must be at least {} a second", text,
                                format_size(nova::kMinRateBytes)));
    }
    return rate;
}

}  // namespace

Result<void> collect_garbage(Context& context, const Arguments& arguments) {
    Json request{{"dry_run", arguments.dry_run}};
    if (!arguments.rate.empty()) {
        STELLARIUM_ASSIGN(const uint64_t rate, parse_rate(arguments.rate));
        if (rate == 0) {
            return fail(ErrorCode::kInvalidArgument, "--rate must be more than 0");
        }
        request["rate_bytes_per_second"] = rate;
    }
    Progress progress("collecting garbage", context.progress());
    STELLARIUM_ASSIGN(const Json report,
                      call_and_watch(context, progress, "/v1/gc", request,
                                     [&](const Json& state) { show_collection(progress, state); }));
    Output& out = context.out();
    const auto size = [&](std::string_view key) { return out.size(number_field(report, key)); };
    const uint64_t dead_chunks = number_field(report, "dead_chunks");
    std::string_view verb = dead_chunks == 1 ? "was" : "were";
    if (arguments.dry_run) {
        verb = dead_chunks == 1 ? "is" : "are";
    }
    std::string sentence =
        fmt::format("{} {}: {} of {} {} dead, {} are needed",
                    arguments.dry_run ? "would free" : "freed", size("freed_bytes"),
                    plural(dead_chunks, "chunk"), size("dead_bytes"), verb, size("live_bytes"));
    if (!arguments.dry_run) {
        sentence += fmt::format(
            "; {} copied, in {} ms",
            out.size(number_field(report, "moved_bytes") + number_field(report, "rewritten_bytes")),
            number_field(report, "duration_ms"));
    }
    print_done(context, report, sentence);
    return {};
}

namespace {

/// Ranges of one user that a line of the report names.
constexpr size_t kRangesPerLine = 8;

void show_scrub(Progress& progress, const Json& state) {
    if (state.contains("present") && state.at("present").is_object()) {
        const uint64_t bytes = number_field(state.at("present"), "bytes");
        progress.show(fmt::format("checking, {} damaged", number_field(state, "damaged_chunks")),
                      bytes / kMiB, std::max(number_field(state, "total_bytes"), bytes) / kMiB);
    }
}

/// Says what is damaged and who uses it.
void print_damage(Output& out, const Json& damage) {
    for (const Json& chunk : damage.at("damaged")) {
        out.line(fmt::format("damaged: {}", text_field(chunk, "reason")));
        for (const Json& user : chunk.at("users")) {
            const std::string kind = text_field(user, "kind");
            if (kind == "catalog") {
                out.line("  the list of all images and volumes; the next checkpoint mends it");
                continue;
            }
            std::string ranges;
            size_t named = 0;
            for (const Json& range : user.at("ranges")) {
                if (++named > kRangesPerLine) {
                    ranges += ", ...";
                    break;
                }
                ranges += fmt::format("{}{}+{}", named == 1 ? "" : ", ",
                                      number_field(range, "offset_bytes"),
                                      number_field(range, "length_bytes"));
            }
            out.line(fmt::format("  {} '{}': {} bytes, at {}", kind, text_field(user, "name"),
                                 number_field(user, "bytes"), ranges));
        }
        if (chunk.at("users").empty()) {
            out.line("  nothing uses it: the next garbage collection frees it");
        }
    }
    if (!bool_field(damage, "complete")) {
        out.line("(there is more)");
    }
}

/// The end of a command that knows of damage: success only when nothing is damaged.
Result<void> verdict(Output& out, const Json& damage) {
    STELLARIUM_TRY(out.flush());
    const uint64_t chunks = number_field(damage, "damaged_chunks");
    if (chunks == 0) {
        return {};
    }
    return fail(ErrorCode::kCorrupt,
                fmt::format("{} chunk{} damaged; each heals when the same content is written or "
                            "imported again",
                            chunks, chunks == 1 ? " is" : "s are"));
}

Result<void> scrub_status(Context& context) {
    STELLARIUM_ASSIGN(Json state, ask(context, "GET", "/v1/scrub"));
    STELLARIUM_ASSIGN(const Json damage, ask(context, "GET", "/v1/damage"));
    Output& out = context.out();
    if (out.json()) {
        state["damage"] = damage;
        out.value(state);
        return verdict(out, damage);
    }
    const auto pass = [&](std::string_view key, std::string_view title, std::string_view none) {
        const Json& value = state.at(std::string(key));
        if (!value.is_object()) {
            out.line(fmt::format("{:<9} {}", title, none));
            return;
        }
        out.line(fmt::format(
            "{:<9} begun {}{}: {} in {} chunks, {} damaged", title, text_field(value, "started"),
            value.at("ended").is_string()
                ? ", ended " + text_field(value, "ended")
                : std::string(bool_field(state, "running") ? ", running" : ", stopped"),
            out.size(number_field(value, "bytes")), number_field(value, "chunks"),
            number_field(value, "damaged")));
    };
    pass("present", "present", "none runs");
    pass("last", "last", "none was completed");
    if (state.at("next_due").is_string()) {
        out.line(fmt::format("{:<9} {}", "next due", text_field(state, "next_due")));
    }
    if (const std::string error = text_field(state, "last_error"); !error.empty()) {
        out.line(fmt::format("{:<9} {}", "failed", error));
    }
    print_damage(out, damage);
    return verdict(out, damage);
}

}  // namespace

Result<void> scrub(Context& context, const Arguments& arguments) {
    context.take_warnings();
    if (arguments.only_status) {
        return scrub_status(context);
    }
    uint64_t rate = kDefaultScrubRate;
    if (!arguments.rate.empty()) {
        STELLARIUM_ASSIGN(rate, parse_rate(arguments.rate));
    }
    const Json request{{"restart", arguments.restart}, {"rate_bytes_per_second", rate}};
    Progress progress("checking", context.progress());
    STELLARIUM_ASSIGN(const Json report,
                      call_and_watch(context, progress, "/v1/scrub", request,
                                     [&](const Json& state) { show_scrub(progress, state); }));
    STELLARIUM_ASSIGN(const Json damage, ask(context, "GET", "/v1/damage"));
    Output& out = context.out();
    if (out.json()) {
        Json both = report;
        both["damage"] = damage;
        out.value(both);
        return verdict(out, damage);
    }
    out.line(fmt::format("checked {} in {} chunks, {} damaged",
                         out.size(number_field(report, "bytes")), number_field(report, "chunks"),
                         number_field(report, "damaged")));
    print_damage(out, damage);
    return verdict(out, damage);
}

namespace {

/// What a daemon says of its directory of files; an older one says nothing.
Json files_of(Context& context) {
    Result<Json> files = ask(context, "GET", "/v1/files");
    return files && bool_field(*files, "mounted") ? *std::move(files) : Json();
}

/// As lines of statistics.
void add_files(Json& stats, const Json& files) {
    stats["files_open"] = files.at("open_files");
    stats["files_in_flight"] = files.at("in_flight");
    for (const auto& [kind, totals] : files.at("requests").items()) {
        stats[fmt::format("files_{}_requests", kind)] = totals.at("requests");
        if (kind == "read" || kind == "write") {
            stats[fmt::format("files_{}_bytes", kind)] = totals.at("bytes");
        }
    }
}

/// How much of a file is in the page cache. mincore(2) tells that of files of one's own.
Result<uint64_t> resident_bytes_of(const std::string& path) {
    const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat status{};
    if (!file || fstat(file.get(), &status) != 0) {
        return std::unexpected(Error::from_errno(errno, "open " + path));
    }
    if (geteuid() != 0 && geteuid() != status.st_uid) {
        return fail(
            ErrorCode::kPermissionDenied,
            fmt::format("{}: only its owner and root can ask what of it is in memory", path));
    }
    const auto size = static_cast<size_t>(status.st_size);
    if (size == 0) {
        return uint64_t{0};
    }
    void* const mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), 0);
    if (mapped == MAP_FAILED) {
        return std::unexpected(Error::from_errno(errno, "map " + path));
    }
    const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> in_core((size + page_bytes - 1) / page_bytes);
    const int error = mincore(mapped, size, in_core.data()) == 0 ? 0 : errno;
    if (munmap(mapped, size) != 0 || error != 0) {
        return std::unexpected(Error::from_errno(error != 0 ? error : errno, "mincore " + path));
    }
    return page_bytes * static_cast<uint64_t>(std::ranges::count_if(
                            in_core, [](unsigned char page) { return (page & 1U) != 0; }));
}

/// Adds to each what of its file below the daemon's mounted directory is in memory. A volume's file
/// that something else has is left out.
Result<void> add_resident_files(Json& report, const std::string& directory) {
    for (Json& each : report["entities"]) {
        const std::string path =
            fmt::format("{}/{}s/{}", directory, text_field(each, "kind"), text_field(each, "name"));
        const auto bytes = resident_bytes_of(path);
        if (!bytes && bytes.error().code() != ErrorCode::kBusy) {
            return std::unexpected(bytes.error());
        }
        each["file_bytes"] = bytes.value_or(0);
    }
    return {};
}

Result<void> show_sharing(Context& context, const std::string& files) {
    STELLARIUM_ASSIGN(Json report, ask(context, "GET", "/v1/sharing"));
    Output& out = context.out();
    if (!report.contains("entities") || !report["entities"].is_array()) {
        return fail(ErrorCode::kProtocol, "the answer lists nothing");
    }
    if (!files.empty()) {
        STELLARIUM_TRY(add_resident_files(report, files));
    }
    if (out.json()) {
        out.value(report);
        return {};
    }
    Table table({{"KIND"},
                 {"NAME"},
                 {"STORED", Align::kRight},
                 {"RESIDENT", Align::kRight},
                 {"SHARED", Align::kRight},
                 {"PRIVATE", Align::kRight},
                 {"FILE", Align::kRight}});
    for (const Json& each : report["entities"]) {
        table.add({text_field(each, "kind"), text_field(each, "name"),
                   out.size(number_field(each, "stored_bytes")),
                   out.size(number_field(each, "resident_bytes")),
                   out.size(number_field(each, "shared_bytes")),
                   out.size(number_field(each, "private_bytes")),
                   files.empty() ? "-" : out.size(number_field(each, "file_bytes"))});
    }
    out.table(table);
    if (!bool_field(report, "complete")) {
        complain("stellarctl: what is damaged is left out (stellarctl scrub --status)\n");
    }
    return {};
}

}  // namespace

Result<void> stats(Context& context, const Arguments& arguments) {
    if (arguments.sharing) {
        return show_sharing(context, arguments.files);
    }
    STELLARIUM_ASSIGN(Json stats, ask(context, "GET", "/v1/stats"));
    if (const Json files = files_of(context); files.is_object()) {
        add_files(stats, files);
    }
    Output& out = context.out();
    if (out.json()) {
        out.value(stats);
        return {};
    }
    for (const auto& [key, value] : stats.items()) {
        std::string text;
        if (key.ends_with("_bytes") && value.is_number_unsigned()) {
            text = out.size(value.get<uint64_t>());
        } else if (value.is_number_float()) {
            text = fmt::format("{:.4f}", value.get<double>());
        } else {
            text = control::to_text(value);
        }
        out.line(fmt::format("{:<24} {}", key, text));
    }
    if (bool_field(stats, "space_low")) {
        complain(
            fmt::format("stellarctl: warning: the store's file system is almost full: {} of {} are "
                        "free, and garbage collection could free about {}\n",
                        out.size(number_field(stats, "file_system_free_bytes")),
                        out.size(number_field(stats, "file_system_bytes")),
                        out.size(number_field(stats, "reclaimable_bytes"))));
    }
    if (const uint64_t damaged = number_field(stats, "damaged_chunks"); damaged > 0) {
        complain(
            fmt::format("stellarctl: warning: {} chunk{} damaged; see stellarctl scrub "
                        "--status\n",
                        damaged, damaged == 1 ? " is" : "s are"));
    }
    return {};
}

Result<void> status(Context& context, const Arguments&) {
    context.take_warnings();
    STELLARIUM_ASSIGN(Json version, ask(context, "GET", "/v1/version"));
    STELLARIUM_ASSIGN(Json store, ask(context, "GET", "/v1/store"));
    STELLARIUM_ASSIGN(const Json stats, ask(context, "GET", "/v1/stats"));
    if (bool_field(stats, "space_low") && !bool_field(stats, "disk_full")) {
        store["warnings"].push_back(
            fmt::format("the file system is almost full: {} of {} are free",
                        context.out().size(number_field(stats, "file_system_free_bytes")),
                        context.out().size(number_field(stats, "file_system_bytes"))));
    }
    const bool daemon = context.session()->through_daemon();
    const Json files = files_of(context);
    Output& out = context.out();
    if (out.json()) {
        Json both = store;
        both["daemon"] = daemon;
        both["daemon_pid"] = daemon ? Json(number_field(version, "pid")) : Json(nullptr);
        both["daemon_version"] = daemon ? Json(text_field(version, "version")) : Json(nullptr);
        both["socket"] = daemon ? Json(text_field(version, "socket")) : Json(nullptr);
        both["files"] = files;
        out.value(both);
        return {};
    }
    out.line(fmt::format("store     {}", text_field(store, "directory")));
    out.line(fmt::format("uuid      {}", text_field(store, "uuid")));
    out.line(bool_field(store, "read_only")
                 ? fmt::format("state     read-only: {}", text_field(store, "read_only_reason"))
                 : "state     writable");
    out.line(daemon ? fmt::format("daemon    running, version {}, pid {}, socket {}",
                                  text_field(version, "version"), number_field(version, "pid"),
                                  text_field(version, "socket"))
                    : "daemon    not running");
    if (files.is_object()) {
        out.line(fmt::format("files     below {}, {} open", text_field(files, "directory"),
                             number_field(files, "open_files")));
    }
    if (store.contains("warnings") && store.at("warnings").is_array()) {
        for (const Json& warning : store.at("warnings")) {
            out.line(fmt::format("warning   {}",
                                 warning.is_string() ? warning.get<std::string>() : "?"));
        }
    }
    return {};
}

Result<void> dump(Context& context, const Arguments& arguments) {
    Output& out = context.out();
    Json lines = Json::array();
    Result<void> flushed;
    // Printed as it comes: a segment's dump is long, and a damaged file may end it early.
    constexpr uint64_t kFlushEvery = 1000;
    uint64_t printed = 0;
    const Result<uint64_t> damages =
        nebula::dump_file(io::real_env(), arguments.path, [&](std::string_view line) {
            if (out.json()) {
                lines.push_back(line);
                return;
            }
            out.line(line);
            if (++printed % kFlushEvery == 0 && flushed) {
                flushed = out.flush();
            }
        });
    if (!damages) {
        return std::unexpected(damages.error());
    }
    if (out.json()) {
        out.value(Json{{"file", arguments.path}, {"damages", *damages}, {"lines", lines}});
    }
    STELLARIUM_TRY(flushed);
    STELLARIUM_TRY(out.flush());
    if (*damages > 0) {
        return fail(ErrorCode::kCorrupt, fmt::format("{} is damaged in {} place{}", arguments.path,
                                                     *damages, *damages == 1 ? "" : "s"));
    }
    return {};
}

}  // namespace stellarium::cli
