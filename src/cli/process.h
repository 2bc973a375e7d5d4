// Runs a tool and gives what it printed.
//
//     STELLARIUM_ASSIGN(auto info, run_tool({"qemu-img", "info", "--output=json", path},
//                                           "qemu-utils"));
//
// Thread rule: any thread.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "base/error.h"

namespace stellarium::cli {

/// Runs arguments[0] from PATH without a shell, standard input empty, and returns its standard
/// output (at most 16 MiB). kUnavailable, naming `debian_package`, when the tool is not installed;
/// kCancelled when the user interrupts it, which kills the tool; kInvalidArgument with the tool's
/// own words when it exits with a code that is not among `good_codes`.
Result<std::string> run_tool(const std::vector<std::string>& arguments,
                             const std::string& debian_package,
                             std::initializer_list<int> good_codes = {0});

/// The error for a tool that is not there.
Error missing_tool(const std::string& tool, const std::string& debian_package);

/// Is `tool` an executable file in a folder of PATH?
bool tool_exists(const std::string& tool);

/// The last lines of a tool's messages as one: blank ends cut, newlines become "; ".
std::string one_line(std::string text);

}  // namespace stellarium::cli
