// Small things that several command files share.
//
// Thread rule: one thread.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/commands.h"
#include "cli/progress.h"
#include "control/json.h"

namespace stellarium::cli {

/// Asks the control interface.
Result<control::Json> ask(Context& context, std::string_view method, std::string target);
Result<control::Json> ask(Context& context, std::string_view method, std::string target,
                          const control::Json& body);

/// Does at `target` what takes long. Meanwhile asks how far it is, for `show`, and passes an
/// interruption on.
Result<control::Json> call_and_watch(Context& context, Progress& progress,
                                     const std::string& target, const control::Json& request,
                                     const std::function<void(const control::Json&)>& show);

/// "/v1/images/" + the encoded name.
std::string target_of(std::string_view prefix, std::string_view name);

/// Where machines of the store are kept while they run (vm/records.h).
std::string vm_directory(const std::string& store);

using control::bool_field;
using control::number_field;
using control::text_field;

/// "1 range", "2 ranges", "3 batches".
std::string plural(uint64_t count, std::string_view what);

/// Prints one object: JSON as it is, or "Key  value" lines for people.
void print_entity(Context& context, const control::Json& entity);
/// Prints the object for programs and the sentence for people.
void print_done(Context& context, const control::Json& json, std::string_view sentence);

/// The items of `list` whose names are in `patterns`, names or shell patterns; all for none.
/// kNotFound for a name, not a pattern, that no item has; `kind` says what was looked for.
Result<control::Json> matching(const control::Json& list, const std::vector<std::string>& patterns,
                               std::string_view kind);
/// Prints a list as JSON, or only the names; false when a table is wanted.
bool print_list_plainly(Output& out, const control::Json& list, bool names_only);

/// Exports `source`, an image, volume or snapshot that `info` describes, to `arguments.path`.
Result<void> export_source(Context& context, const Arguments& arguments, const std::string& source,
                           const control::Json& info);

}  // namespace stellarium::cli
