// The words of stellarctl: its tree of nouns and verbs, their options, help and examples.
//
//     Invocation invocation;
//     CLI::App app;
//     build_app(app, invocation);
//     app.parse(...);                       // throws CLI::ParseError
//     invocation.command(context, invocation.arguments);
//
// Completion reads the same tree, so it cannot know other words than the parser.
//
// Thread rule: one thread.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cli/commands.h"

namespace CLI {  // NOLINT(readability-identifier-naming): the library's
class App;
}

namespace stellarium::cli {

struct Invocation {
    StoreLocation location;
    bool json = false;
    bool exact_bytes = false;
    bool no_progress = false;
    Arguments arguments;
    Command command = nullptr;
    std::string command_path;  ///< "volume clone".
    std::string shell;         ///< Of `completion`.
};

void build_app(CLI::App& app, Invocation& invocation);

/// The command `name` directly below `app`; nullptr when there is none.
CLI::App* find_command(CLI::App& app, std::string_view name);

/// What is wrong with words that name no command, with a suggestion: "there is no command 'volum';
/// did you mean 'volume'?". "" when the words lead to a command.
std::string unknown_command(CLI::App& app, std::span<const std::string> words);

}  // namespace stellarium::cli
