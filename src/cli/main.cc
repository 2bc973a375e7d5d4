// stellarctl: understands the words, runs the command, prints its answer or its error.
#include <cstdio>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <fmt/format.h>

#include "cli/app.h"
#include "cli/commands_common.h"
#include "cli/completion.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "control/json.h"
#include "control/suggest.h"
#include "vm/records.h"

namespace stellarium::cli {
namespace {

using control::Json;

constexpr int kUsageExit = 2;

/// Says what went wrong on standard error, as JSON when JSON was asked for.
int report(const Error& error, bool json) {
    const ErrorMapping& mapping = error_mapping(error.code());
    if (json) {
        complain(fmt::format("{}\n", control::to_text(control::error_to_json(error))));
    } else {
        complain(fmt::format("stellarctl: {}\n", error.message()));
        // The other messages say what to do themselves; these are often the system's alone.
        if (error.code() == ErrorCode::kIo || error.code() == ErrorCode::kNoSpace) {
            complain(fmt::format("stellarctl: advice: {}\n", mapping.advice));
        }
    }
    return mapping.exit_code;
}

int usage_error(const std::string& message, bool json) {
    if (json) {
        return report(Error(ErrorCode::kInvalidArgument, message), true);
    }
    complain(fmt::format("stellarctl: {}\nTry 'stellarctl --help', or --help after a command.\n",
                         message));
    return kUsageExit;
}

/// The store's names for completion; whatever fails means no names.
std::vector<std::string> names_of_kind(const StoreLocation& location, const std::string& kind,
                                       const std::string& previous_word) {
    std::vector<std::string> targets;
    if (kind == "IMAGE" || kind == "SOURCE") {
        targets.emplace_back("/v1/images");
    }
    if (kind == "VOLUME" || kind == "SOURCE") {
        targets.emplace_back("/v1/volumes");
    }
    if (kind == "SOURCE") {
        targets.emplace_back("/v1/snapshots");
    }
    if (kind == "SNAPSHOT") {
        targets.push_back(target_of("/v1/snapshots?volume=", previous_word));
    }
    if (kind == "ATTACHMENT") {
        targets.emplace_back("/v1/attachments");
    }
    if (kind == "MACHINE") {
        const Result<std::string> store = store_directory(location);
        const auto names =
            store ? vm::machine_names(vm_directory(*store)) : Result<std::vector<std::string>>();
        return names.value_or(std::vector<std::string>());
    }
    if (kind == "MACHINE@SNAPSHOT") {
        targets.emplace_back("/v1/snapshots");
    }
    if (targets.empty()) {
        return {};
    }
    const auto session = Session::open(location);
    if (!session) {
        return {};
    }
    std::vector<std::string> names;
    for (const std::string& target : targets) {
        const Result<Json> list = (*session)->client().call("GET", target);
        if (!list || !list->is_array()) {
            continue;
        }
        for (const Json& item : *list) {
            std::string name = text_field(item, kind == "ATTACHMENT" ? "source" : "name");
            if (kind == "SNAPSHOT") {
                name = name.substr(name.find('@') + 1);
            }
            if (kind == "MACHINE@SNAPSHOT") {
                constexpr std::string_view kStatePart = "-state@";
                const size_t part = name.find(kStatePart);
                if (part == std::string::npos) {
                    continue;
                }
                name.replace(part, kStatePart.size(), "@");
            }
            names.push_back(std::move(name));
        }
    }
    return names;
}

int print_completions(const std::vector<std::string>& words) {
    CLI::App app;
    Invocation invocation;
    build_app(app, invocation);
    Output out(false, false);
    invocation.location.lock_timeout = {};  // Whoever types does not wait for names.
    for (size_t i = 0; i + 1 < words.size(); ++i) {
        if (words[i] == "--store") {
            invocation.location.store = words[i + 1];
        } else if (words[i] == "--socket") {
            invocation.location.socket = words[i + 1];
        }
    }
    for (const std::string& candidate :
         complete(app, words, [&](const std::string& kind, const std::string& previous) {
             return names_of_kind(invocation.location, kind, previous);
         })) {
        out.line(candidate);
    }
    return out.flush() ? 0 : 1;
}

Result<void> print_version(Output& out) {
    if (out.json()) {
        out.value(Json{{"version", STELLARIUM_VERSION}});
    } else {
        out.line("stellarctl " STELLARIUM_VERSION);
    }
    return out.flush();
}

/// Runs the command and prints its answer.
Result<void> run_command(const Invocation& invocation, Output& out) {
    if (invocation.command_path == "completion") {
        const auto script = completion_script(invocation.shell);
        if (!script) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is not a shell with completion; known: bash, zsh, fish",
                                    invocation.shell));
        }
        if (out.json()) {
            out.value(Json{{"shell", invocation.shell}, {"script", *script}});
        } else {
            out.raw(*script);
        }
        return out.flush();
    }
    if (invocation.command_path == "version") {
        return print_version(out);
    }
    Context context(invocation.location, out, !invocation.no_progress);
    STELLARIUM_TRY(invocation.command(context, invocation.arguments));
    STELLARIUM_TRY(context.close());
    return out.flush();
}

int run(int argc, char** argv) {
    std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
    if (!words.empty() && words.front() == "__complete") {
        return print_completions({words.begin() + 1, words.end()});
    }
    CLI::App app;
    Invocation invocation;
    build_app(app, invocation);
    if (words.empty()) {
        complain(fmt::format("{}", app.help()));
        return kUsageExit;
    }
    const bool json = std::ranges::find(words, "--json") != words.end();
    if (words.front() == "help" && (words.size() == 1 || !words[1].starts_with('-'))) {
        words.erase(words.begin());
        if (const std::string unknown = unknown_command(app, words); !unknown.empty()) {
            return usage_error(unknown, json);
        }
        words.emplace_back("--help");
    }
    try {
        app.parse(std::vector<std::string>(words.rbegin(), words.rend()));  // From the end.
    } catch (const CLI::CallForVersion&) {
        Output out(json, false);
        const Result<void> printed = print_version(out);
        return printed ? 0 : report(printed.error(), json);
    } catch (const CLI::Success& success) {
        return app.exit(success);  // --help.
    } catch (const CLI::ParseError& error) {
        if (const std::string unknown = unknown_command(app, words); !unknown.empty()) {
            return usage_error(unknown, json);
        }
        return usage_error(error.what(), json);
    }
    install_interrupt_handler();
    Output out(invocation.json, invocation.exact_bytes);
    Result<void> result = run_command(invocation, out);
    if (!result && interrupted()) {
        // Whatever failed, failed because of that.
        result = check_interrupt();
    }
    return result ? 0 : report(result.error(), invocation.json);
}

}  // namespace
}  // namespace stellarium::cli

int main(int argc, char** argv) {
    try {
        return stellarium::cli::run(argc, argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "stellarctl: unexpected: %s\n", error.what());
        return 1;
    }
}
