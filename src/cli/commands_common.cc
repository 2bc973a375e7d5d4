#include "cli/commands_common.h"

#include <chrono>
#include <cstdio>
#include <future>

#include <fmt/format.h>
#include <fnmatch.h>

#include "cli/export_target.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "control/service.h"

namespace stellarium::cli {

using control::Json;

Result<control::ControlClient*> Context::client() {
    if (!session_) {
        STELLARIUM_ASSIGN(session_, Session::open(location_));
        STELLARIUM_ASSIGN(const std::string directory, store_directory(location_));
        for (const std::string& warning : session_->warnings()) {
            // Where the store lies was said when it was made, and `status` says it.
            if (!takes_warnings_ && !warning.starts_with(directory + " is on ")) {
                complain(fmt::format("stellarctl: warning: {}\n", warning));
            }
        }
    }
    return &session_->client();
}

Result<void> Context::close() {
    return session_ ? session_->close() : Result<void>();
}

Result<Json> ask(Context& context, std::string_view method, std::string target) {
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    return client->call(method, std::move(target));
}

Result<Json> ask(Context& context, std::string_view method, std::string target, const Json& body) {
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    return client->call(method, std::move(target), body);
}

std::string target_of(std::string_view prefix, std::string_view name) {
    return std::string(prefix) + control::percent_encode(name);
}

namespace {

/// How often a command looks at what it waits for.
constexpr std::chrono::milliseconds kWatchEvery{100};

}  // namespace

std::string plural(uint64_t count, std::string_view what) {
    const std::string_view ending = count == 1 ? "" : what.ends_with("ch") ? "es" : "s";
    return fmt::format("{} {}{}", count, what, ending);
}

Result<Json> call_and_watch(Context& context, Progress& progress, const std::string& target,
                            const Json& request, const std::function<void(const Json&)>& show) {
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    const std::unique_ptr<control::ControlClient> second = context.session()->second_client();
    std::future<Result<Json>> answer =
        std::async(std::launch::async, [&] { return client->call("POST", target, request); });
    while (second && answer.wait_for(kWatchEvery) != std::future_status::ready) {
        if (interrupted()) {
            // Again and again: the first may have come before what it should stop.
            [[maybe_unused]] const Result<Json> asked = second->call("DELETE", target);
        }
        if (const Result<Json> state = second->call("GET", target);
            state && bool_field(*state, "running")) {
            show(*state);
        }
    }
    Result<Json> report = answer.get();
    progress.finish();
    if (!report && report.error().code() == ErrorCode::kCancelled) {
        STELLARIUM_TRY(check_interrupt());
    }
    return report;
}

void print_entity(Context& context, const Json& entity) {
    Output& out = context.out();
    if (out.json()) {
        out.value(entity);
        return;
    }
    const auto row = [&](std::string_view title, const std::string& value) {
        if (!value.empty()) {
            out.line(fmt::format("{:<12} {}", title, value));
        }
    };
    const bool is_volume = text_field(entity, "kind") == "volume";
    row("name", text_field(entity, "name"));
    row("kind", text_field(entity, "kind"));
    row("size", out.size(number_field(entity, "size_bytes")));
    const bool intact = text_field(entity, "damage").empty();
    if (intact) {
        row("data", out.size(number_field(entity, "data_bytes")));
    }
    if (number_field(entity, "dirty_bytes") > 0) {
        row("dirty", out.size(number_field(entity, "dirty_bytes")));
    }
    if (intact) {
        row("extents", std::to_string(number_field(entity, "extents")));
        row("root", text_field(entity, "root"));
    }
    const std::string parent = text_field(entity, "parent");
    row("parent",
        bool_field(entity, "parent_removed") && !parent.empty() ? parent + " (removed)" : parent);
    if (const Json* const lineage = control::find_field(entity, "lineage");
        lineage != nullptr && lineage->is_array() && lineage->size() > 1) {
        std::string chain;
        for (const Json& ancestor : *lineage) {
            chain += chain.empty() ? "" : " < ";
            chain += ancestor.is_string() ? ancestor.get<std::string>() : "?";
        }
        row("lineage", chain);
    }
    if (is_volume) {
        row("snapshots", std::to_string(number_field(entity, "snapshots")));
    }
    row("created", text_field(entity, "created"));
    row("damaged", text_field(entity, "damage"));
    if (bool_field(entity, "attached")) {
        const std::string label = text_field(entity, "attachment");
        row("attached", label.empty() ? "yes" : label);
    }
}

Result<Json> matching(const Json& list, const std::vector<std::string>& patterns,
                      std::string_view kind) {
    if (patterns.empty() || !list.is_array()) {
        return list;
    }
    Json chosen = Json::array();
    std::vector<bool> used(patterns.size());
    for (const Json& item : list) {
        const std::string name = text_field(item, "name");
        bool is_chosen = false;
        for (size_t i = 0; i < patterns.size(); ++i) {
            if (fnmatch(patterns[i].c_str(), name.c_str(), 0) == 0) {
                used[i] = true;
                is_chosen = true;
            }
        }
        if (is_chosen) {
            chosen.push_back(item);
        }
    }
    for (size_t i = 0; i < patterns.size(); ++i) {
        if (!used[i] && patterns[i].find_first_of("*?[") == std::string::npos) {
            return fail(ErrorCode::kNotFound,
                        fmt::format("there is no {} named '{}'", kind, patterns[i]));
        }
    }
    return chosen;
}

bool print_list_plainly(Output& out, const Json& list, bool names_only) {
    if (names_only) {
        Json names = Json::array();
        for (const Json& item : list) {
            names.push_back(text_field(item, "name"));
            if (!out.json()) {
                out.line(text_field(item, "name"));
            }
        }
        if (out.json()) {
            out.value(names);
        }
        return true;
    }
    if (out.json()) {
        out.value(list);
    }
    return out.json();
}

void print_done(Context& context, const Json& json, std::string_view sentence) {
    if (context.out().json()) {
        context.out().value(json);
    } else {
        context.out().line(sentence);
    }
}

Result<void> export_source(Context& context, const Arguments& arguments, const std::string& source,
                           const Json& info) {
    const uint64_t size_bytes = number_field(info, "size_bytes");
    const uint64_t data_bytes = number_field(info, "data_bytes");
    STELLARIUM_ASSIGN(const std::unique_ptr<ExportTarget> target,
                      ExportTarget::open(arguments.path, {.size_bytes = size_bytes,
                                                          .data_bytes = data_bytes,
                                                          .force = arguments.force}));
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    STELLARIUM_ASSIGN(const std::unique_ptr<control::SparseSource> content,
                      client->download(target_of("/v1/content?source=", source)));
    Progress progress("exporting " + source, context.progress());
    ProgressSource watched(*content, progress);
    STELLARIUM_TRY(target->write_all(watched));
    progress.finish();
    if (arguments.path == "-") {
        return {};  // Standard output has the content.
    }
    print_done(context,
               Json{{"source", source},
                    {"path", arguments.path},
                    {"size_bytes", content->size_bytes()},
                    {"data_bytes", progress.data_bytes()}},
               fmt::format("exported '{}' to {}: {}, {} of data", source, arguments.path,
                           context.out().size(content->size_bytes()),
                           context.out().size(progress.data_bytes())));
    return {};
}

}  // namespace stellarium::cli
