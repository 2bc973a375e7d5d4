// Completion: the shells' scripts are a few lines that ask `stellarctl __complete WORDS...`, and
// this answers from the tree of commands and from the store's names.
//
// The last word is the one being typed. The answer is one candidate a line; the line ":files" asks
// the shell to complete file names. Nothing is ever an error: no candidates are the worst.
//
// Thread rule: one thread.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace CLI {  // NOLINT(readability-identifier-naming): the library's
class App;
}

namespace stellarium::cli {

/// Names for a kind of argument: "IMAGE", "VOLUME", "SOURCE", "SNAPSHOT" (of the volume
/// `previous_word`), "ATTACHMENT".
using NameSource = std::function<std::vector<std::string>(const std::string& kind,
                                                          const std::string& previous_word)>;

std::vector<std::string> complete(CLI::App& app, const std::vector<std::string>& words,
                                  const NameSource& names);

/// The script for "bash", "zsh" or "fish"; nullopt for others.
std::optional<std::string_view> completion_script(std::string_view shell);

}  // namespace stellarium::cli
