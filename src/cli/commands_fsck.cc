// fsck: a store that no daemon holds, checked and repaired.
#include <chrono>
#include <thread>

#include <fmt/format.h>

#include "cli/commands_common.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "io/posix.h"
#include "nova/check.h"

namespace stellarium::cli {

using control::Json;

namespace {

constexpr std::chrono::milliseconds kRetryEvery{100};

Json json_of(const std::vector<nebula::Finding>& findings) {
    Json list = Json::array();
    for (const nebula::Finding& finding : findings) {
        list.push_back(
            Json{{"kind", to_string(finding.kind)},
                 {"harmless", finding.harmless},
                 {"repairable", finding.repairable},
                 {"what", finding.what},
                 {"file", finding.file.empty() ? Json(nullptr) : Json(finding.file)},
                 {"offset_bytes", finding.offset ? Json(*finding.offset) : Json(nullptr)},
                 {"id", finding.id ? Json(finding.id->hex()) : Json(nullptr)},
                 {"consequence", finding.consequence},
                 {"advice", finding.advice}});
    }
    return list;
}

Json json_of(const nova::CheckReport& report, const std::string& directory) {
    Json lost = Json::array();
    for (const nova::LostRange& range : report.lost) {
        lost.push_back(Json{{"source", range.source},
                            {"kind", nova::kind_name(range.kind)},
                            {"offset_bytes", range.offset_bytes},
                            {"length_bytes", range.length_bytes}});
    }
    Json repair = nullptr;
    if (report.repair) {
        repair = Json{{"copied", report.repair->copied},
                      {"copied_bytes", report.repair->copied_bytes},
                      {"pages_given_up", report.repair->dead_pages},
                      {"footers", report.repair->footers},
                      {"segment_headers", report.repair->headers}};
    }
    return Json{{"store", directory},
                {"damaged", report.damaged()},
                {"repairable", report.repairable()},
                {"usable", report.usable},
                {"findings", json_of(report.findings)},
                {"lost", lost},
                {"unknown", report.unknown},
                {"repaired", json_of(report.repaired)},
                {"repair", repair},
                {"segments", report.counts.segments},
                {"batches", report.counts.batches},
                {"entries", report.counts.entries},
                {"data_bytes", report.counts.data_bytes},
                {"images", report.images},
                {"volumes", report.volumes},
                {"snapshots", report.snapshots},
                {"nodes", report.nodes},
                {"chunks", report.chunks}};
}

void print(Output& out, const nebula::Finding& finding, std::string_view heading) {
    out.line(fmt::format("{} ({}): {}", heading, to_string(finding.kind), finding.what));
    if (!finding.file.empty()) {
        out.line(finding.offset ? fmt::format("    where        {} at offset {}", finding.file,
                                              *finding.offset)
                                : fmt::format("    where        {}", finding.file));
    }
    if (finding.id) {
        out.line(fmt::format("    id           {}", finding.id->hex()));
    }
    if (!finding.consequence.empty()) {
        out.line(fmt::format("    consequence  {}", finding.consequence));
    }
    if (!finding.advice.empty() && !finding.harmless) {
        out.line(fmt::format("    what to do   {}", finding.advice));
    }
}

void print(Output& out, const nova::CheckReport& report) {
    for (const nebula::Finding& finding : report.repaired) {
        print(out, finding, finding.harmless ? "note" : "found");
    }
    if (report.repair) {
        out.line(fmt::format("repaired: {} of {} stored again, {} given up, {} and {} written",
                             plural(report.repair->copied, "chunk"),
                             out.size(report.repair->copied_bytes),
                             plural(report.repair->dead_pages, "page"),
                             plural(report.repair->headers, "segment header"),
                             plural(report.repair->footers, "footer")));
    }
    for (const nebula::Finding& finding : report.findings) {
        print(out, finding, finding.harmless ? "note" : "damage");
    }
    for (const nova::LostRange& range : report.lost) {
        out.line(fmt::format("lost: {} '{}', bytes {} to {}", nova::kind_name(range.kind),
                             range.source, range.offset_bytes,
                             range.offset_bytes + range.length_bytes - 1));
    }
    for (const std::string& name : report.unknown) {
        out.line(fmt::format("unknown: the content of '{}'", name));
    }
    std::string looked = fmt::format("checked {}, {}, {} chunks and objects",
                                     plural(report.counts.segments, "segment"),
                                     plural(report.counts.batches, "batch"), report.counts.entries);
    if (report.counts.data_bytes > 0) {
        looked += fmt::format(", {} of content", out.size(report.counts.data_bytes));
    }
    looked += fmt::format("; {}, {}, {}", plural(report.images, "image"),
                          plural(report.volumes, "volume"), plural(report.snapshots, "snapshot"));
    out.line(report.damaged() ? looked : looked + ": all is well");
}

}  // namespace

Result<void> check_store(Context& context, const Arguments& arguments) {
    const StoreLocation& location = context.location();
    if (!location.socket.empty()) {
        return fail(ErrorCode::kInvalidArgument,
                    "fsck reads the store directly: stop its daemon, and give --store");
    }
    STELLARIUM_ASSIGN(const std::string directory, store_directory(location));
    if (arguments.repair) {
        STELLARIUM_TRY(check_owner(directory));
    }
    Progress progress("checking", context.progress());
    nova::PoolCheckOptions options;
    options.repair = arguments.repair;
    // Looking needs no promise of durability.
    options.store.allow_unsafe_file_system = location.allow_unsafe_file_system || !arguments.repair;
    options.check.data = arguments.data;
    options.check.cancelled = [] { return interrupted(); };
    options.check.progress = [&progress](const nebula::CheckProgress& at) {
        progress.show(at.data ? "reading all content" : "checking segments", at.done, at.total);
    };
    const auto begin = std::chrono::steady_clock::now();
    Result<nova::CheckReport> checked = nova::check_pool(io::real_env(), directory, options);
    while (!checked && checked.error().code() == ErrorCode::kBusy &&
           !is_held_by_daemon(directory) &&
           std::chrono::steady_clock::now() - begin < location.lock_timeout) {
        STELLARIUM_TRY(check_interrupt());
        std::this_thread::sleep_for(kRetryEvery);
        checked = nova::check_pool(io::real_env(), directory, options);
    }
    progress.finish();
    if (!checked) {
        if (arguments.repair && checked.error().code() == ErrorCode::kBusy) {
            return std::unexpected(checked.error().with_context(
                fmt::format("{} is in use: stop its daemon, or repair a copy of it", directory)));
        }
        if (arguments.repair && (checked.error().code() == ErrorCode::kReadOnly ||
                                 checked.error().code() == ErrorCode::kPermissionDenied)) {
            return std::unexpected(checked.error().with_context(fmt::format(
                "{} cannot be repaired, because this process cannot write there (fsck without "
                "--repair can look all the same): mount its file system for writing, run this as "
                "the store's owner, or repair a copy of it",
                directory)));
        }
        return std::unexpected(checked.error());
    }
    Output& out = context.out();
    if (out.json()) {
        out.value(json_of(*checked, directory));
    } else {
        print(out, *checked);
    }
    STELLARIUM_TRY(out.flush());
    if (!checked->damaged()) {
        return {};
    }
    const std::string_view rest = checked->repairable() ? "; --repair repairs what can be"
                                  : arguments.repair    ? " left, which no repair ends"
                                                        : "; no repair ends that";
    uint64_t damages = 0;
    for (const nebula::Finding& finding : checked->findings) {
        damages += finding.harmless ? 0 : 1;
    }
    return fail(ErrorCode::kCorrupt,
                fmt::format("{} is damaged: {}{}", directory, plural(damages, "finding"), rest));
}

}  // namespace stellarium::cli
