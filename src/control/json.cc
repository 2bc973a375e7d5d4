#include "control/json.h"

#include <algorithm>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/units.h"
#include "control/suggest.h"

namespace stellarium::control {

std::string to_text(const Json& value) {
    return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string to_pretty_text(const Json& value) {
    return value.dump(2, ' ', false, Json::error_handler_t::replace);
}

namespace {

/// What parsing would have to build, counted without building it. Of text that is no JSON at least
/// as much as the parser would build before it sees that.
Result<void> check_shape(std::string_view text, std::string_view what, size_t max_values) {
    size_t depth = 0;
    size_t values = 1;
    bool in_string = false;
    for (size_t at = 0; at < text.size(); ++at) {
        const char c = text[at];
        if (in_string) {
            if (c == '\\') {
                ++at;
            } else if (c == '"') {
                in_string = false;
            }
            continue;
        }
        switch (c) {
            case '"':
                in_string = true;
                break;
            case '[':
            case '{':
                ++depth;
                ++values;
                break;
            case ']':
            case '}':
                depth -= depth == 0 ? 0 : 1;
                break;
            case ',':
                ++values;
                break;
            default:
                break;
        }
        if (depth > kMaxJsonDepth) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("the {} nests deeper than {} levels at byte {}", what,
                                    kMaxJsonDepth, at));
        }
        if (values > max_values) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("the {} has more than {} values", what, max_values));
        }
    }
    return {};
}

}  // namespace

Result<Json> parse_json(std::string_view text, std::string_view what, size_t max_values) {
    STELLARIUM_TRY(check_shape(text, what, max_values));
    try {
        return Json::parse(text);
    } catch (const Json::parse_error& error) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("the {} is not valid JSON: wrong at byte {} of {}", what,
                                error.byte, text.size()));
    } catch (const Json::exception&) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("the {} is not valid JSON: a value is out of range", what));
    }
}

Result<void> refuse_repeated_keys(std::string_view text, std::string_view what) {
    std::vector<std::set<std::string>> objects;
    std::optional<std::string> repeated;
    const auto see = [&](int, Json::parse_event_t event, Json& parsed) {
        if (event == Json::parse_event_t::object_start) {
            objects.emplace_back();
        } else if (event == Json::parse_event_t::object_end) {
            objects.pop_back();
        } else if (event == Json::parse_event_t::key &&
                   !objects.back().insert(parsed.get<std::string>()).second) {
            repeated = parsed.get<std::string>();
        }
        return true;
    };
    try {
        const Json ignored = Json::parse(text, see);
    } catch (const Json::exception&) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("the {} is not valid JSON: a value is out of range", what));
    }
    if (repeated) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("the {} gives '{}' more than once", what, *repeated));
    }
    return {};
}

ObjectReader::ObjectReader(const Json& object, std::string what)
    : object_(object), what_(std::move(what)) {
    if (!object_.is_object()) {
        complaints_.push_back(
            fmt::format("it must be a JSON object, and is {}", object_.type_name()));
    }
}

const Json* ObjectReader::take(std::string_view key) {
    known_keys_.emplace_back(key);
    if (!object_.is_object()) {
        return nullptr;
    }
    const auto found = object_.find(std::string(key));
    // null means "not given", as if the key were absent.
    return found == object_.end() || found->is_null() ? nullptr : &*found;
}

const Json* ObjectReader::require(std::string_view key) {
    const Json* value = take(key);
    if (value == nullptr && object_.is_object()) {
        complain(key, "is missing");
    }
    return value;
}

bool ObjectReader::has(std::string_view key) const {
    return object_.is_object() && object_.contains(std::string(key));
}

void ObjectReader::complain(std::string_view key, std::string_view why) {
    complaints_.push_back(fmt::format("'{}' {}", key, why));
}

std::string ObjectReader::required_string(std::string_view key) {
    const Json* value = require(key);
    if (value == nullptr) {
        return {};
    }
    if (!value->is_string()) {
        complain(key, fmt::format("must be text, and is {}", value->type_name()));
        return {};
    }
    return value->get<std::string>();
}

std::optional<std::string> ObjectReader::optional_string(std::string_view key) {
    const Json* value = take(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_string()) {
        complain(key, fmt::format("must be text, and is {}", value->type_name()));
        return std::nullopt;
    }
    return value->get<std::string>();
}

std::vector<std::string> ObjectReader::required_strings(std::string_view key) {
    const Json* value = require(key);
    if (value == nullptr) {
        return {};
    }
    std::vector<std::string> strings;
    if (!value->is_array() ||
        !std::ranges::all_of(*value, [](const Json& item) { return item.is_string(); })) {
        complain(key, "must be an array of texts");
        return {};
    }
    strings.reserve(value->size());
    for (const Json& item : *value) {
        strings.push_back(item.get<std::string>());
    }
    return strings;
}

std::optional<bool> ObjectReader::optional_bool(std::string_view key) {
    const Json* value = take(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_boolean()) {
        complain(key, fmt::format("must be true or false, and is {}", value->type_name()));
        return std::nullopt;
    }
    return value->get<bool>();
}

std::optional<uint64_t> ObjectReader::optional_number(std::string_view key, uint64_t least,
                                                      uint64_t most) {
    const Json* value = take(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_number_unsigned()) {
        complain(key, fmt::format("must be a whole number from {} to {}", least, most));
        return std::nullopt;
    }
    const auto number = value->get<uint64_t>();
    if (number < least || number > most) {
        complain(key, fmt::format("is {}, and must be from {} to {}", number, least, most));
        return std::nullopt;
    }
    return number;
}

std::optional<uint64_t> ObjectReader::optional_size(std::string_view key) {
    const Json* value = take(key);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (value->is_number_unsigned()) {
        return value->get<uint64_t>();
    }
    if (!value->is_string()) {
        complain(key, "must be a number of bytes, or a size such as \"10GiB\"");
        return std::nullopt;
    }
    Result<uint64_t> size = parse_size(value->get<std::string>());
    if (!size) {
        complain(key, size.error().message());
        return std::nullopt;
    }
    return *size;
}

std::optional<uint64_t> ObjectReader::optional_rate(std::string_view key, uint64_t least) {
    const std::optional<uint64_t> rate = optional_size(key);
    if (rate && *rate != 0 && *rate < least) {
        complain(key, fmt::format("is {}, and must be 0 (no limit) or at least {}",
                                  format_size(*rate), format_size(least)));
    }
    return rate;
}

uint64_t ObjectReader::required_size(std::string_view key) {
    if (object_.is_object() && !has(key)) {
        known_keys_.emplace_back(key);
        complain(key, "is missing");
        return 0;
    }
    return optional_size(key).value_or(0);
}

std::vector<std::string> ObjectReader::complaints() {
    std::vector<std::string> all = complaints_;
    if (object_.is_object()) {
        for (const auto& [key, value] : object_.items()) {
            if (std::ranges::find(known_keys_, key) == known_keys_.end()) {
                all.push_back(
                    fmt::format("'{}' is not a known key{}", key, did_you_mean(key, known_keys_)));
            }
        }
    }
    return all;
}

Result<void> ObjectReader::finish() {
    const std::vector<std::string> all = complaints();
    if (all.empty()) {
        return {};
    }
    return fail(ErrorCode::kInvalidArgument,
                fmt::format("the {} is wrong: {}", what_, fmt::join(all, "; ")));
}

const Json* find_field(const Json& json, std::string_view key) {
    if (!json.is_object()) {
        return nullptr;
    }
    const auto found = json.find(std::string(key));
    return found == json.end() ? nullptr : &*found;
}

std::string text_field(const Json& json, std::string_view key) {
    const Json* const value = find_field(json, key);
    return value != nullptr && value->is_string() ? value->get<std::string>() : std::string();
}

uint64_t number_field(const Json& json, std::string_view key) {
    const Json* const value = find_field(json, key);
    return value != nullptr && value->is_number_unsigned() ? value->get<uint64_t>() : 0;
}

bool bool_field(const Json& json, std::string_view key) {
    const Json* const value = find_field(json, key);
    return value != nullptr && value->is_boolean() && value->get<bool>();
}

Json error_to_json(const Error& error) {
    const ErrorMapping& mapping = error_mapping(error.code());
    return Json{{"code", mapping.name}, {"message", error.message()}, {"advice", mapping.advice}};
}

Error error_from_json(std::string_view text, int http_status) {
    const Result<Json> parsed = parse_json(text, "error");
    if (parsed && parsed->is_object()) {
        const auto code = parsed->find("code");
        const auto message = parsed->find("message");
        if (code != parsed->end() && code->is_string() && message != parsed->end() &&
            message->is_string()) {
            const auto name = code->get<std::string>();
            for (int i = 0; i < kErrorCodeCount; ++i) {
                const auto candidate = static_cast<ErrorCode>(i);
                if (error_mapping(candidate).name == name) {
                    return {candidate, message->get<std::string>()};
                }
            }
        }
    }
    return {ErrorCode::kProtocol,
            fmt::format("the other side answered with HTTP status {} and no error that this "
                        "version understands",
                        http_status)};
}

}  // namespace stellarium::control
