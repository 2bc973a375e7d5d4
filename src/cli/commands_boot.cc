// Boot manifests and prefetch.
#include <chrono>
#include <functional>
#include <future>
#include <thread>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/commands_common.h"
#include "cli/interrupt.h"
#include "cli/progress.h"

namespace stellarium::cli {

using control::Json;

namespace {

/// Lines of the list that are printed for people.
constexpr size_t kRunsShown = 10;
constexpr std::chrono::milliseconds kBusyPause{100};

std::string boot_target(const std::string& source) {
    return target_of("/v1/boots/", source);
}

std::string images_of(const Json& boot) {
    std::vector<std::string> names;
    if (boot.contains("images") && boot.at("images").is_array()) {
        for (const Json& name : boot.at("images")) {
            names.push_back(name.is_string() ? name.get<std::string>() : "?");
        }
    }
    return names.empty() ? "(removed)" : fmt::format("{}", fmt::join(names, ", "));
}

std::string amount(Output& out, uint64_t bytes, uint64_t runs) {
    return fmt::format("{} in {}", out.size(bytes), plural(runs, "run"));
}

/// "", or why the recording took no more.
std::string cut_text(const Json& recording) {
    return bool_field(recording, "cut")
               ? "; a limit ended it before it was stopped (10 minutes, 512 MiB or 16384 runs)"
               : "";
}

}  // namespace

Result<void> boot_record(Context& context, const Arguments& arguments) {
    context.expect_daemon();
    STELLARIUM_ASSIGN(
        const Json recording,
        ask(context, "POST", boot_target(arguments.name) + "/recording", Json::object()));
    print_done(context, recording,
               fmt::format("recording what is read of '{0}'; boot the guest, then: stellarctl boot "
                           "stop {0}",
                           arguments.name));
    return {};
}

Result<void> boot_stop(Context& context, const Arguments& arguments) {
    context.expect_daemon();
    STELLARIUM_ASSIGN(const Json recording, ask(context, "DELETE",
                                                boot_target(arguments.name) + "/recording" +
                                                    (arguments.discard ? "?discard=true" : "")));
    print_done(context, recording,
               fmt::format("{} {}{}", arguments.discard ? "discarded" : "stored",
                           amount(context.out(), number_field(recording, "bytes"),
                                  number_field(recording, "runs")),
                           cut_text(recording)));
    return {};
}

Result<void> boot_list(Context& context, const Arguments&) {
    STELLARIUM_ASSIGN(const Json boots, ask(context, "GET", "/v1/boots"));
    STELLARIUM_ASSIGN(const Json recordings, ask(context, "GET", "/v1/recordings"));
    Output& out = context.out();
    if (out.json()) {
        out.value(Json{{"boots", boots}, {"recordings", recordings}});
        return {};
    }
    Table table({{"IMAGE"},
                 {"PREFETCH", Align::kRight},
                 {"RUNS", Align::kRight},
                 {"TRACES", Align::kRight},
                 {"UPDATED"}});
    for (const Json& boot : boots) {
        const bool intact = text_field(boot, "damage").empty();
        table.add({images_of(boot), intact ? out.size(number_field(boot, "prefetch_bytes")) : "",
                   intact ? std::to_string(number_field(boot, "prefetch_runs")) : "",
                   intact ? std::to_string(number_field(boot, "merged_traces")) : "",
                   intact ? text_field(boot, "updated") : "cannot be read: see boot show"});
    }
    out.table(table);
    for (const Json& recording : recordings) {
        out.line(fmt::format(
            "recording '{}' since {}: {}{}", text_field(recording, "source"),
            text_field(recording, "started"),
            amount(out, number_field(recording, "bytes"), number_field(recording, "runs")),
            cut_text(recording)));
    }
    return {};
}

namespace {

void print_boot(Context& context, const Json& boot) {
    Output& out = context.out();
    if (out.json()) {
        out.value(boot);
        return;
    }
    const auto row = [&](std::string_view title, const std::string& value) {
        if (!value.empty()) {
            out.line(fmt::format("{:<10} {}", title, value));
        }
    };
    row("image", images_of(boot));
    row("root", text_field(boot, "root"));
    row("size", out.size(number_field(boot, "size_bytes")));
    row("created", text_field(boot, "created"));
    row("updated", text_field(boot, "updated"));
    row("traces", fmt::format("{} recorded", number_field(boot, "merged_traces")));
    for (const Json& trace : boot.at("traces")) {
        row("  trace",
            fmt::format("{}, {}{}", text_field(trace, "recorded"),
                        amount(out, number_field(trace, "bytes"), number_field(trace, "runs")),
                        bool_field(trace, "cut") ? ", cut short by a limit" : ""));
    }
    for (const char* key : {"kernel", "initrd"}) {
        if (const Json& file = boot.at(key); file.is_object()) {
            const std::string image = text_field(file, "image");
            row(key, fmt::format("{}, {}", image.empty() ? "an image that was removed" : image,
                                 out.size(number_field(file, "size_bytes"))));
        }
    }
    row("hints", text_field(boot, "hints"));
    row("prefetch",
        amount(out, number_field(boot, "prefetch_bytes"), number_field(boot, "prefetch_runs")));
    const Json& runs = boot.at("runs");
    if (runs.empty()) {
        return;
    }
    Table table({{"OFFSET", Align::kRight}, {"LENGTH", Align::kRight}});
    for (size_t i = 0; i < std::min(runs.size(), kRunsShown); ++i) {
        table.add({std::to_string(number_field(runs.at(i), "offset_bytes")),
                   std::to_string(number_field(runs.at(i), "length_bytes"))});
    }
    out.table(table);
    if (runs.size() > kRunsShown) {
        out.line(fmt::format("... and {} more (--json lists all)", runs.size() - kRunsShown));
    }
}

}  // namespace

Result<void> boot_show(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json boot, ask(context, "GET", boot_target(arguments.name)));
    if (!boot.is_object() || !boot.contains("runs") || !boot.contains("traces") ||
        !boot.contains("kernel") || !boot.contains("initrd")) {
        return fail(ErrorCode::kProtocol, "the answer is no boot manifest");
    }
    print_boot(context, boot);
    return {};
}

Result<void> boot_set(Context& context, const Arguments& arguments) {
    Json request = Json::object();
    const auto add = [&](const char* key, const std::optional<std::string>& value) {
        if (value) {
            request[key] = *value;
        }
    };
    add("kernel", arguments.kernel);
    add("initrd", arguments.initrd);
    add("hints", arguments.hints);
    if (request.empty()) {
        return fail(ErrorCode::kInvalidArgument, "say what to set: --kernel, --initrd or --hints");
    }
    STELLARIUM_ASSIGN(const Json boot, ask(context, "PUT", boot_target(arguments.name), request));
    print_done(context, boot, fmt::format("set what a boot of '{}' needs", arguments.name));
    return {};
}

Result<void> boot_remove(Context& context, const Arguments& arguments) {
    STELLARIUM_TRY(ask(context, "DELETE", boot_target(arguments.name)));
    print_done(context, Json{{"removed", Json::array({arguments.name})}},
               fmt::format("removed the boot manifest of '{}'", arguments.name));
    return {};
}

Result<void> prefetch(Context& context, const Arguments& arguments) {
    const Json request{{"source", arguments.name}, {"all", arguments.all}};
    Progress progress("staging", context.progress());
    Result<Json> report = Json();
    while (true) {
        report = call_and_watch(context, progress, "/v1/prefetch", request, [&](const Json& state) {
            progress.show("staging '" + text_field(state, "source") + "'",
                          number_field(state, "done_bytes") >> 20,
                          number_field(state, "total_bytes") >> 20);
        });
        // Others wait for theirs: it will be our turn.
        if (report || report.error().code() != ErrorCode::kBusy) {
            break;
        }
        STELLARIUM_TRY(check_interrupt());
        std::this_thread::sleep_for(kBusyPause);
    }
    if (!report) {
        return std::unexpected(report.error());
    }
    Output& out = context.out();
    std::string sentence =
        fmt::format("staged {} for '{}' with {} in {:.3f} s",
                    out.size(number_field(*report, "staged_bytes")), arguments.name,
                    plural(number_field(*report, "reads"), "read"), report->value("seconds", 0.0));
    if (const uint64_t damaged = number_field(*report, "damaged_bytes"); damaged > 0) {
        sentence +=
            fmt::format("; {} could not be read (stellarctl scrub --status)", out.size(damaged));
    }
    if (bool_field(*report, "short_of_memory")) {
        sentence += "; stopped there, because the system has little memory to give";
    }
    print_done(context, *report, sentence);
    return {};
}

}  // namespace stellarium::cli
