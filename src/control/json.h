// JSON as the control interface speaks it: strict reading of what strangers sent, writing that
// cannot fail.
//
// nlohmann's library throws; nothing that calls it through these functions sees an exception.
//
//     STELLARIUM_ASSIGN(const Json request, parse_json(body, "request body"));
//     ObjectReader reader(request, "request body");
//     std::string name = reader.required_string("name");
//     uint64_t size = reader.required_size("size_bytes");
//     STELLARIUM_TRY(reader.finish());  // every missing, mistyped and unknown key in one message
//
// Thread rule: values; an ObjectReader belongs to one thread.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace stellarium::control {

/// Keeps the order of keys, so that output reads as it was written.
using Json = nlohmann::ordered_json;

/// Compact text. Bytes that are not UTF-8 come out as U+FFFD.
std::string to_text(const Json& value);
/// The same over several lines, for people and files.
std::string to_pretty_text(const Json& value);

/// Arrays and objects within each other.
inline constexpr size_t kMaxJsonDepth = 64;

/// kInvalidArgument naming `what` and the byte where parsing stopped; kLimitExceeded, before memory
/// is taken, for text that nests deeper than kMaxJsonDepth or has more than `max_values` values.
Result<Json> parse_json(std::string_view text, std::string_view what,
                        size_t max_values = std::numeric_limits<size_t>::max());

/// kInvalidArgument naming a key that an object of the text, which parses, has twice: the parser
/// takes one of them and says nothing.
Result<void> refuse_repeated_keys(std::string_view text, std::string_view what);

/// Reads one object key by key and collects everything that is wrong with it.
/// The getters return a default after an error; call finish() before using what they gave.
class ObjectReader {
  public:
    /// Borrows `object`, which need not be an object: then finish() says so.
    ObjectReader(const Json& object, std::string what);

    std::string required_string(std::string_view key);
    uint64_t required_size(std::string_view key);
    std::vector<std::string> required_strings(std::string_view key);

    std::optional<std::string> optional_string(std::string_view key);
    std::optional<bool> optional_bool(std::string_view key);
    std::optional<uint64_t> optional_number(std::string_view key, uint64_t least = 0,
                                            uint64_t most = std::numeric_limits<uint64_t>::max());
    /// A number of bytes, or text such as "10GiB".
    std::optional<uint64_t> optional_size(std::string_view key);
    /// The same a second: 0 for no limit, or at least `least`.
    std::optional<uint64_t> optional_rate(std::string_view key, uint64_t least);

    /// nullptr when it is not there; whether it is an object is for its own reader to say.
    const Json* optional_value(std::string_view key) { return take(key); }

    bool has(std::string_view key) const;
    /// Adds a complaint about `key` found by the caller.
    void complain(std::string_view key, std::string_view why);

    /// kInvalidArgument listing every complaint, unknown keys included, separated by "; ".
    Result<void> finish();
    /// The complaints of finish(), one by one, each with its key.
    std::vector<std::string> complaints();

  private:
    const Json* take(std::string_view key);
    const Json* require(std::string_view key);

    const Json& object_;
    std::string what_;
    std::vector<std::string> known_keys_;
    std::vector<std::string> complaints_;
};

/// A field of an object; nullptr where it is not there, or this is no object.
const Json* find_field(const Json& json, std::string_view key);
/// Fields of an answer; "", 0 or false where the other side left them out or sent something else.
std::string text_field(const Json& json, std::string_view key);
uint64_t number_field(const Json& json, std::string_view key);
bool bool_field(const Json& json, std::string_view key);

/// The wire form of an error: {"code", "message", "advice"}.
Json error_to_json(const Error& error);
/// The inverse. Anything that is not such an object becomes kProtocol, with the HTTP status named.
Error error_from_json(std::string_view text, int http_status);

}  // namespace stellarium::control
