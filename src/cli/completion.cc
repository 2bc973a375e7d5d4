#include "cli/completion.h"

#include <algorithm>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli/app.h"

namespace stellarium::cli {
namespace {

constexpr std::string_view kBash =
    R"sh(# bash completion for stellarctl; made by `stellarctl completion bash`
_stellarctl() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ $line == :files ]]; then
            compopt -o default 2>/dev/null
        else
            COMPREPLY+=("$line")
        fi
    done < <(stellarctl __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _stellarctl stellarctl
)sh";

constexpr std::string_view kZsh = R"sh(#compdef stellarctl
# zsh completion for stellarctl; made by `stellarctl completion zsh`
_stellarctl() {
    local -a lines candidates
    lines=("${(@f)$(stellarctl __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    candidates=("${(@)lines:#:files}")
    candidates=("${(@)candidates:#}")
    (( ${#candidates} )) && compadd -a candidates
    (( ${lines[(Ie):files]} )) && _files
    return 0
}
if [[ $funcstack[1] == _stellarctl ]]; then
    _stellarctl "$@"
else
    compdef _stellarctl stellarctl
fi
)sh";

constexpr std::string_view kFish =
    R"sh(# fish completion for stellarctl; made by `stellarctl completion fish`
function __stellarctl_complete
    set -l words (commandline -opc)
    set -e words[1]
    for line in (stellarctl __complete $words (commandline -ct) 2>/dev/null)
        if test "$line" = ":files"
            __fish_complete_path (commandline -ct)
        else
            echo $line
        end
    end
end
complete -c stellarctl -f -a "(__stellarctl_complete)"
)sh";

std::vector<std::string> option_names(CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::Option* option : app.get_options()) {
        for (const std::string& name : option->get_lnames()) {
            names.push_back("--" + name);
        }
    }
    return names;
}

/// What an argument of this type can be.
std::vector<std::string> values_of(const std::string& type, const std::string& previous_word,
                                   const NameSource& names) {
    if (type == "FILE" || type == "DIR" || type == "PATH" || type == "SOCKET") {
        return {":files"};
    }
    if (type == "SHELL") {
        return {"bash", "zsh", "fish"};
    }
    if (type == "FORMAT") {
        return {"raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc"};
    }
    return names(type, previous_word);
}

}  // namespace

std::vector<std::string> complete(CLI::App& app, const std::vector<std::string>& words,
                                  const NameSource& names) {
    const std::string typed = words.empty() ? std::string() : words.back();
    CLI::App* at = &app;
    const CLI::Option* wants_value = nullptr;
    std::vector<std::string> positionals;
    for (size_t i = 0; i + 1 < words.size(); ++i) {
        const std::string& word = words[i];
        if (wants_value != nullptr) {
            wants_value = nullptr;
            continue;
        }
        if (word.starts_with("--")) {
            const CLI::Option* const option = at->get_option_no_throw(word);
            if (option != nullptr && option->get_items_expected_max() > 0) {
                wants_value = option;
            }
            continue;
        }
        if (CLI::App* const next = find_command(*at, word);
            next != nullptr && positionals.empty()) {
            at = next;
        } else {
            positionals.push_back(word);
        }
    }
    std::vector<std::string> candidates;
    const std::string previous = positionals.empty() ? std::string() : positionals.back();
    if (wants_value != nullptr) {
        candidates = values_of(wants_value->get_type_name(), previous, names);
    } else if (typed.starts_with('-')) {
        candidates = option_names(*at);
    } else {
        if (positionals.empty()) {
            for (const CLI::App* command : at->get_subcommands([](CLI::App*) { return true; })) {
                candidates.push_back(command->get_name());
            }
        }
        size_t index = 0;
        for (const CLI::Option* option : at->get_options()) {
            if (!option->get_positional()) {
                continue;
            }
            if (index == positionals.size() || option->get_items_expected_max() > 1) {
                candidates = values_of(option->get_type_name(), previous, names);
                break;
            }
            ++index;
        }
    }
    std::erase_if(candidates, [&](const std::string& candidate) {
        return candidate != ":files" && !candidate.starts_with(typed);
    });
    std::ranges::sort(candidates);
    return candidates;
}

std::optional<std::string_view> completion_script(std::string_view shell) {
    if (shell == "bash") {
        return kBash;
    }
    if (shell == "zsh") {
        return kZsh;
    }
    return shell == "fish" ? std::optional(kFish) : std::nullopt;
}

}  // namespace stellarium::cli
