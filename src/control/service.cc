#include "control/service.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include "control/boot_json.h"
#include "control/entity_json.h"
#include "control/json.h"
#include "control/suggest.h"
#include "nova/limits.h"

namespace stellarium::control {
namespace {

/// A target taken apart. Decoding comes after splitting, so that an encoded '/' stays in its name.
struct ParsedTarget {
    std::vector<std::string> segments;
    std::map<std::string, std::string, std::less<>> query;
};

/// How fast a collection or a scrub may be; 0: no limit.
uint64_t rate_of(ObjectReader& reader) {
    return reader.optional_rate("rate_bytes_per_second", nova::kMinRateBytes).value_or(0);
}

std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    while (true) {
        const size_t at = text.find(separator);
        parts.push_back(text.substr(0, at));
        if (at == std::string_view::npos) {
            return parts;
        }
        text.remove_prefix(at + 1);
    }
}

Result<ParsedTarget> parse_target(std::string_view target) {
    ParsedTarget parsed;
    const size_t question = target.find('?');
    std::string_view path = target.substr(0, question);
    if (!path.starts_with('/')) {
        return fail(ErrorCode::kInvalidArgument, "the request's path must start with '/'");
    }
    path.remove_prefix(1);
    for (const std::string_view segment : split(path, '/')) {
        STELLARIUM_ASSIGN(std::string decoded, percent_decode(segment));
        parsed.segments.push_back(std::move(decoded));
    }
    if (question == std::string_view::npos) {
        return parsed;
    }
    for (const std::string_view pair : split(target.substr(question + 1), '&')) {
        const size_t equals = pair.find('=');
        STELLARIUM_ASSIGN(std::string key, percent_decode(pair.substr(0, equals)));
        std::string value;
        if (equals != std::string_view::npos) {
            STELLARIUM_ASSIGN(value, percent_decode(pair.substr(equals + 1)));
        }
        if (key.empty()) {
            continue;
        }
        if (!parsed.query.emplace(key, value).second) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("the parameter '{}' is given twice", key));
        }
    }
    return parsed;
}

/// The values of the placeholders when `segments` match `pattern`.
std::optional<std::vector<std::string>> match(std::string_view pattern,
                                              const std::vector<std::string>& segments) {
    const std::vector<std::string_view> wanted = split(pattern.substr(1), '/');
    if (wanted.size() != segments.size()) {
        return std::nullopt;
    }
    std::vector<std::string> values;
    for (size_t i = 0; i < wanted.size(); ++i) {
        if (wanted[i].starts_with('{')) {
            if (segments[i].empty()) {
                return std::nullopt;
            }
            values.push_back(segments[i]);
        } else if (wanted[i] != segments[i]) {
            return std::nullopt;
        }
    }
    return values;
}

/// The parameters that operations take; all others take none.
struct QueryKeys {
    std::string_view operation;
    std::vector<std::string> keys;
};

/// A mistyped parameter must not be as good as none.
Result<void> check_query(const std::map<std::string, std::string, std::less<>>& query,
                         std::string_view operation) {
    static const std::vector<QueryKeys> kTaken{{"diff", {"a", "b", "from", "limit"}},
                                               {"getContent", {"source"}},
                                               {"listSnapshots", {"volume"}},
                                               {"stopRecording", {"discard"}}};
    const auto found = std::ranges::find(kTaken, operation, &QueryKeys::operation);
    static const std::vector<std::string> kNone;
    const std::vector<std::string>& keys = found == kTaken.end() ? kNone : found->keys;
    for (const auto& [key, value] : query) {
        if (std::ranges::find(keys, key) == keys.end()) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is not a known parameter{}", key,
                                    keys.empty() ? std::string("; this operation takes none")
                                                 : did_you_mean(key, keys)));
        }
    }
    return {};
}

Response json_response(int status, const Json& body) {
    Response response;
    response.status = status;
    response.body = to_text(body);
    return response;
}

Response empty_response() {
    Response response;
    response.status = 204;
    return response;
}

std::vector<std::string> names_of(const std::vector<nova::EntityInfo>& infos) {
    std::vector<std::string> names;
    names.reserve(infos.size());
    for (const nova::EntityInfo& info : infos) {
        names.push_back(info.name);
    }
    return names;
}

/// Content of an entity, for a download.
class ReaderSource final : public SparseSource {
  public:
    explicit ReaderSource(std::unique_ptr<nova::Reader> reader) : reader_(std::move(reader)) {}

    std::optional<uint64_t> size_hint() const override { return reader_->size_bytes(); }
    uint64_t size_bytes() const override { return reader_->size_bytes(); }

    Result<std::optional<SparseExtent>> next() override {
        if (position_ == extent_end_) {
            STELLARIUM_ASSIGN(const auto extent, reader_->next_data(position_));
            if (!extent) {
                return std::nullopt;
            }
            position_ = extent->first;
            extent_end_ = extent->first + extent->second;
        }
        const auto length =
            static_cast<size_t>(std::min<uint64_t>(extent_end_ - position_, kMaxFrameBytes));
        buffer_.resize(kMaxFrameBytes);
        const MutableBytes data = MutableBytes(buffer_).first(length);
        STELLARIUM_TRY(reader_->read(position_, data));
        const SparseExtent extent{position_, data};
        position_ += length;
        return extent;
    }

  private:
    std::unique_ptr<nova::Reader> reader_;
    std::vector<std::byte> buffer_;
    uint64_t position_ = 0;
    uint64_t extent_end_ = 0;
};

/// An import that runs now, as others may look at it.
struct RunningImport {
    std::optional<uint64_t> size_bytes;
    std::mutex mutex;
    uint64_t position_bytes = 0;           ///< End of the last extent taken. Guarded by mutex.
    nova::ImageImport::Progress progress;  ///< Guarded by mutex.
};

}  // namespace

std::string percent_encode(std::string_view text) {
    std::string encoded;
    for (const char c : text) {
        const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                           (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_' || c == '~';
        if (plain) {
            encoded += c;
        } else {
            encoded += fmt::format("%{:02X}", static_cast<unsigned char>(c));
        }
    }
    return encoded;
}

Result<std::string> percent_decode(std::string_view text) {
    const auto digit = [](char c) -> int {
        if (c >= '0' && c <= '9') {
            return c - '0';
        }
        if (c >= 'a' && c <= 'f') {
            return c - 'a' + 10;
        }
        return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    };
    std::string decoded;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '%') {
            decoded += text[i];
            continue;
        }
        const int high = i + 2 < text.size() ? digit(text[i + 1]) : -1;
        const int low = i + 2 < text.size() ? digit(text[i + 2]) : -1;
        if (high < 0 || low < 0 || high * 16 + low == 0) {
            return fail(ErrorCode::kInvalidArgument,
                        "a malformed %XX escape in the request's path");
        }
        decoded += static_cast<char>(high * 16 + low);
        i += 2;
    }
    return decoded;
}

size_t RequestHandler::max_json_bytes(const std::string&, const std::string&) const {
    return kUsualJsonBytes;
}

Response error_response(const Error& error) {
    return json_response(error_mapping(error.code()).http_status, error_to_json(error));
}

struct ControlService::Impl {
    nova::Pool& pool;
    ServiceOptions options;
    std::unique_ptr<boot::Boot> own_boot;  ///< Where the options have none.
    boot::Boot& boot;

    /// Held from looking up what kind of thing a name is until the change to it is made, so that
    /// "remove the image x" cannot remove a volume that took the name in between.
    std::mutex names_mutex;

    std::atomic<bool> gc_cancelled{false};
    std::atomic<bool> scrub_cancelled{false};
    std::atomic<uint64_t> prefetches_cancelled{0};  ///< How often all that wait were.
    std::atomic<bool> stopping{false};

    std::mutex imports_mutex;
    std::map<std::string, std::shared_ptr<RunningImport>> imports;  ///< Guarded by imports_mutex.

    struct Call {
        const Request& request;
        std::vector<std::string> values;  ///< Of the path's placeholders.
        std::map<std::string, std::string, std::less<>> query;

        /// Takes a query parameter; "" when it is not there.
        std::string parameter(std::string_view key) {
            const auto found = query.find(key);
            if (found == query.end()) {
                return {};
            }
            std::string value = std::move(found->second);
            query.erase(found);
            return value;
        }
        /// Takes a query parameter that must be there.
        Result<std::string> required_parameter(std::string_view key) {
            std::string value = parameter(key);
            if (value.empty()) {
                return fail(ErrorCode::kInvalidArgument,
                            fmt::format("the parameter '{}' is missing", key));
            }
            return value;
        }
        Result<uint64_t> number_parameter(std::string_view key, uint64_t otherwise) {
            const std::string text = parameter(key);
            if (text.empty()) {
                return otherwise;
            }
            uint64_t number = 0;
            const auto [end, code] =
                std::from_chars(text.data(), text.data() + text.size(), number);
            if (code != std::errc() || end != text.data() + text.size()) {
                return fail(ErrorCode::kInvalidArgument,
                            fmt::format("the parameter '{}' must be a whole number", key));
            }
            return number;
        }
    };
    struct Row {
        RouteInfo info;
        Result<Response> (Impl::*handler)(Call&);
    };
    static const std::array<Row, 51> kRows;

    // --- Looking names up -----------------------------------------------------------------------

    /// The names that could have been meant instead of `source`.
    std::vector<std::string> candidates(std::string_view source,
                                        std::optional<nova::EntityKind> kind) const {
        const size_t at = source.find('@');
        if (at != std::string_view::npos) {
            const auto snapshots = pool.snapshots(source.substr(0, at));
            return names_of(snapshots ? *snapshots : pool.volumes());
        }
        std::vector<std::string> names;
        if (kind != nova::EntityKind::kVolume) {
            names = names_of(pool.images());
        }
        if (kind != nova::EntityKind::kImage) {
            std::ranges::move(names_of(pool.volumes()), std::back_inserter(names));
        }
        return names;
    }

    /// Adds what may have been meant to a kNotFound about `source`.
    Error with_suggestion(const Error& error, std::string_view source,
                          std::optional<nova::EntityKind> kind = {}) const {
        if (error.code() != ErrorCode::kNotFound) {
            return error;
        }
        return {error.code(), error.message() + did_you_mean(source, candidates(source, kind))};
    }

    template <typename T>
    Result<T> suggest(Result<T> result, std::string_view source) const {
        if (!result) {
            return std::unexpected(with_suggestion(result.error(), source));
        }
        return result;
    }

    /// Finds an image or a volume, and nothing else of that name.
    Result<nova::EntityInfo> find_kind(const std::string& name, nova::EntityKind kind) const {
        STELLARIUM_TRY(nova::check_name(name));
        Result<nova::EntityInfo> info = pool.find(name);
        if (!info) {
            if (info.error().code() == ErrorCode::kNotFound) {
                const Error missing(ErrorCode::kNotFound, fmt::format("there is no {} named '{}'",
                                                                      to_string(kind), name));
                return std::unexpected(with_suggestion(missing, name, kind));
            }
            return info;
        }
        if (info->kind != kind) {
            return fail(
                ErrorCode::kNotFound,
                fmt::format("there is no {0} named '{1}'; '{1}' is {2}", to_string(kind), name,
                            info->kind == nova::EntityKind::kImage ? "an image" : "a volume"));
        }
        return info;
    }

    /// "VOLUME@SNAPSHOT", both names checked.
    Result<std::string> snapshot_source(const Call& call) const {
        STELLARIUM_TRY(find_kind(call.values[0], nova::EntityKind::kVolume));
        STELLARIUM_TRY(nova::check_name(call.values[1]));
        return call.values[0] + '@' + call.values[1];
    }

    /// The request's JSON body.
    static Result<Json> body_of(const Call& call) {
        constexpr std::string_view kWhat = "request body";
        STELLARIUM_ASSIGN(Json body, parse_json(call.request.body, kWhat, kMaxJsonValues));
        STELLARIUM_TRY(refuse_repeated_keys(call.request.body, kWhat));
        return body;
    }

    // --- The store ------------------------------------------------------------------------------

    Result<Response> get_version(Call&) {
        return json_response(200, Json{{"version", options.version},
                                       {"api_version", kApiVersion},
                                       {"directory", options.directory},
                                       {"daemon", options.host != nullptr},
                                       {"pid", static_cast<uint64_t>(getpid())},
                                       {"socket", options.socket},
                                       {"nbd_socket", options.nbd_socket},
                                       {"map_socket", options.map_socket}});
    }

    Result<Response> get_store(Call&) {
        const std::optional<std::string> reason = pool.read_only_reason();
        return json_response(200, Json{{"directory", options.directory},
                                       {"uuid", format_uuid(pool.uuid())},
                                       {"read_only", reason.has_value()},
                                       {"read_only_reason", reason.value_or("")},
                                       {"warnings", pool.warnings()}});
    }

    Result<Response> get_stats(Call&) { return json_response(200, to_json(pool.stats())); }

    Result<Response> get_sharing(Call&) {
        STELLARIUM_ASSIGN(const nova::SharingReport report,
                          pool.sharing([this] { return stopping.load(); }));
        return json_response(200, to_json(report));
    }

    Result<Response> checkpoint(Call&) {
        STELLARIUM_TRY(pool.checkpoint());
        return empty_response();
    }

    Result<Response> get_gc(Call&) { return json_response(200, to_json(pool.stats().gc)); }

    Result<Response> start_gc(Call& call) {
        nova::GcOptions wanted;
        if (!call.request.body.empty()) {
            STELLARIUM_ASSIGN(const Json body, body_of(call));
            ObjectReader reader(body, "request body");
            wanted.dry_run = reader.optional_bool("dry_run").value_or(false);
            wanted.rate_bytes_per_second = rate_of(reader);
            STELLARIUM_TRY(reader.finish());
        }
        gc_cancelled = false;
        wanted.cancelled = [this] { return gc_cancelled || stopping; };
        STELLARIUM_ASSIGN(const nova::GcReport report, pool.gc(wanted));
        Json body = to_json(report);
        body["dry_run"] = wanted.dry_run;
        return json_response(200, body);
    }

    Result<Response> cancel_gc(Call&) {
        gc_cancelled = true;
        return empty_response();
    }

    Result<Response> get_scrub(Call&) { return json_response(200, to_json(pool.stats().scrub)); }

    Result<Response> start_scrub(Call& call) {
        nova::ScrubOptions wanted;
        if (!call.request.body.empty()) {
            STELLARIUM_ASSIGN(const Json body, body_of(call));
            ObjectReader reader(body, "request body");
            wanted.restart = reader.optional_bool("restart").value_or(false);
            wanted.rate_bytes_per_second = rate_of(reader);
            STELLARIUM_TRY(reader.finish());
        }
        scrub_cancelled = false;
        wanted.cancelled = [this] { return scrub_cancelled || stopping; };
        STELLARIUM_ASSIGN(const nova::ScrubPass pass, pool.scrub(wanted));
        Json body = to_json(pass);
        body["damaged_chunks"] = pool.stats().scrub.damaged_chunks;
        return json_response(200, body);
    }

    Result<Response> stop_scrub(Call&) {
        scrub_cancelled = true;
        return empty_response();
    }

    Result<Response> get_damage(Call&) {
        STELLARIUM_ASSIGN(const nova::DamageReport report,
                          pool.damage([this] { return stopping.load(); }));
        return json_response(200, to_json(report));
    }

    // --- Images ---------------------------------------------------------------------------------

    Result<Response> list_images(Call&) { return json_response(200, to_json(pool.images())); }

    Result<Response> get_entity(Call& call, nova::EntityKind kind) {
        STELLARIUM_TRY(find_kind(call.values[0], kind));
        STELLARIUM_ASSIGN(const nova::EntityDetail detail, pool.detail(call.values[0]));
        return json_response(200, to_json(detail));
    }
    Result<Response> get_image(Call& call) { return get_entity(call, nova::EntityKind::kImage); }
    Result<Response> get_volume(Call& call) { return get_entity(call, nova::EntityKind::kVolume); }

    Result<Response> remove_kind(const std::vector<std::string>& names, nova::EntityKind kind) {
        const std::scoped_lock lock(names_mutex);
        std::set<std::string> seen;
        for (const std::string& name : names) {
            if (!seen.insert(name).second) {
                return fail(ErrorCode::kInvalidArgument, fmt::format("'{}' is named twice", name));
            }
            STELLARIUM_TRY(find_kind(name, kind));
        }
        STELLARIUM_TRY(pool.remove(names));
        return empty_response();
    }
    Result<Response> remove_image(Call& call) {
        return remove_kind({call.values[0]}, nova::EntityKind::kImage);
    }
    Result<Response> remove_volume(Call& call) {
        return remove_kind({call.values[0]}, nova::EntityKind::kVolume);
    }
    Result<Response> remove_many(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string kind = reader.required_string("kind");
        const std::vector<std::string> names = reader.required_strings("names");
        if (reader.has("kind") && kind != "image" && kind != "volume") {
            reader.complain("kind", "must be 'image' or 'volume'");
        }
        STELLARIUM_TRY(reader.finish());
        if (names.empty()) {
            return fail(ErrorCode::kInvalidArgument, "no names to remove were given");
        }
        return remove_kind(names,
                           kind == "image" ? nova::EntityKind::kImage : nova::EntityKind::kVolume);
    }

    Result<Response> rename_kind(Call& call, nova::EntityKind kind) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string name = reader.required_string("name");
        STELLARIUM_TRY(reader.finish());
        const std::scoped_lock lock(names_mutex);
        STELLARIUM_TRY(find_kind(call.values[0], kind));
        if (name != call.values[0]) {
            STELLARIUM_TRY(pool.rename(call.values[0], name));
        }
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool.find(name));
        return json_response(200, to_json(info));
    }
    Result<Response> rename_image(Call& call) {
        return rename_kind(call, nova::EntityKind::kImage);
    }
    Result<Response> rename_volume(Call& call) {
        return rename_kind(call, nova::EntityKind::kVolume);
    }

    Result<Response> set_sharing(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::optional<bool> shareable = reader.optional_bool("shareable");
        if (!shareable && !reader.has("shareable")) {
            reader.complain("shareable", "is missing");
        }
        STELLARIUM_TRY(reader.finish());
        const std::scoped_lock lock(names_mutex);
        STELLARIUM_TRY(find_kind(call.values[0], nova::EntityKind::kImage));
        STELLARIUM_ASSIGN(const nova::EntityInfo info,
                          pool.set_shareable(call.values[0], shareable.value_or(false)));
        return json_response(200, to_json(info));
    }

    Result<Response> import_image(Call& call) {
        const std::string& name = call.values[0];
        if (call.request.upload == nullptr) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("an import needs a body of type {}", kSparseContentType));
        }
        STELLARIUM_TRY(nova::check_name(name));
        const auto running = std::make_shared<RunningImport>();
        {
            const std::scoped_lock lock(imports_mutex);
            if (!imports.emplace(name, running).second) {
                return fail(ErrorCode::kBusy,
                            fmt::format("an import of '{}' is running already", name));
            }
        }
        Result<Response> response = feed_import(name, *call.request.upload, *running);
        const std::scoped_lock lock(imports_mutex);
        imports.erase(name);
        return response;
    }

    Result<Response> feed_import(const std::string& name, SparseSource& source,
                                 RunningImport& running) {
        // Told before the first byte is read: the client has sent nothing yet.
        if (pool.find(name)) {
            return fail(ErrorCode::kAlreadyExists, fmt::format("the name '{}' is taken", name));
        }
        STELLARIUM_ASSIGN(const std::unique_ptr<nova::ImageImport> import, pool.begin_import(name));
        while (true) {
            STELLARIUM_ASSIGN(const std::optional<SparseExtent> extent, source.next());
            if (!extent) {
                break;
            }
            STELLARIUM_TRY(import->append(extent->offset_bytes, extent->data));
            const std::scoped_lock lock(running.mutex);
            running.size_bytes = source.size_hint();
            running.position_bytes = extent->offset_bytes + extent->data.size();
            running.progress = import->progress();
        }
        STELLARIUM_ASSIGN(const nova::EntityInfo info, import->finish(source.size_bytes()));
        Json body = to_json(info);
        body["import"] = to_json(import->progress());
        return json_response(201, body);
    }

    Result<Response> list_imports(Call&) {
        Json array = Json::array();
        const std::scoped_lock lock(imports_mutex);
        for (const auto& [name, running] : imports) {
            const std::scoped_lock import_lock(running->mutex);
            Json item{{"name", name},
                      {"size_bytes", nullptr},
                      {"position_bytes", running->position_bytes},
                      {"progress", to_json(running->progress)}};
            if (running->size_bytes) {
                item["size_bytes"] = *running->size_bytes;
            }
            array.push_back(std::move(item));
        }
        return json_response(200, array);
    }

    // --- Volumes --------------------------------------------------------------------------------

    Result<Response> list_volumes(Call&) { return json_response(200, to_json(pool.volumes())); }

    Result<Response> create_volume(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string name = reader.required_string("name");
        const uint64_t size_bytes = reader.required_size("size_bytes");
        STELLARIUM_TRY(reader.finish());
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool.create_volume(name, size_bytes));
        return json_response(201, to_json(info));
    }

    Result<Response> resize_volume(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const uint64_t size_bytes = reader.required_size("size_bytes");
        const bool shrink = reader.optional_bool("shrink").value_or(false);
        STELLARIUM_TRY(reader.finish());
        const std::scoped_lock lock(names_mutex);
        STELLARIUM_ASSIGN(const nova::EntityInfo before,
                          find_kind(call.values[0], nova::EntityKind::kVolume));
        if (size_bytes < before.size_bytes && !shrink) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' has {} bytes, and what lies beyond {} would be "
                                    "discarded: to shrink it, say so (--shrink, or \"shrink\": "
                                    "true)",
                                    call.values[0], before.size_bytes, size_bytes));
        }
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool.resize(call.values[0], size_bytes));
        return json_response(200, to_json(info));
    }

    Result<Response> clone(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string source = reader.required_string("source");
        const std::vector<std::string> names = reader.required_strings("names");
        STELLARIUM_TRY(reader.finish());
        if (names.empty() || names.size() > nova::kMaxClonesPerCall) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("{} clones are asked for; from 1 to {} can be made at once",
                                    names.size(), nova::kMaxClonesPerCall));
        }
        STELLARIUM_TRY(suggest(pool.clone(source, names), source));
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool.find(names.front()));
        return json_response(201, Json{{"source", source},
                                       {"size_bytes", info.size_bytes},
                                       {"clones", names.size()},
                                       {"first", names.front()},
                                       {"last", names.back()}});
    }

    Result<Response> diff(Call& call) {
        STELLARIUM_ASSIGN(const std::string a, call.required_parameter("a"));
        STELLARIUM_ASSIGN(const std::string b, call.required_parameter("b"));
        STELLARIUM_ASSIGN(const uint64_t from, call.number_parameter("from", 0));
        STELLARIUM_ASSIGN(const uint64_t limit, call.number_parameter("limit", kMaxDiffRanges));
        if (limit == 0 || limit > kMaxDiffRanges) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'limit' must be from 1 to {}", kMaxDiffRanges));
        }
        STELLARIUM_ASSIGN(const nova::EntityInfo first, suggest(pool.find(a), a));
        STELLARIUM_ASSIGN(const nova::EntityInfo second, suggest(pool.find(b), b));
        Json ranges = Json::array();
        std::optional<uint64_t> next_offset;
        const Result<void> walked = pool.diff(a, b, [&](nova::DiffRange range) -> Result<void> {
            if (range.offset_bytes < from) {
                return {};
            }
            if (ranges.size() == limit) {
                next_offset = range.offset_bytes;
                return fail(ErrorCode::kCancelled, "the answer is full");
            }
            ranges.push_back(
                Json{{"offset_bytes", range.offset_bytes}, {"length_bytes", range.length_bytes}});
            return {};
        });
        if (!walked && !next_offset) {
            return std::unexpected(walked.error());
        }
        Json body{{"a", a},
                  {"b", b},
                  {"a_size_bytes", first.size_bytes},
                  {"b_size_bytes", second.size_bytes},
                  {"ranges", std::move(ranges)},
                  {"next_offset_bytes", nullptr}};
        if (next_offset) {
            body["next_offset_bytes"] = *next_offset;
        }
        return json_response(200, body);
    }

    Result<Response> get_content(Call& call) {
        STELLARIUM_ASSIGN(const std::string source, call.required_parameter("source"));
        STELLARIUM_ASSIGN(std::unique_ptr<nova::Reader> reader,
                          suggest(pool.open_reader(source), source));
        Response response;
        response.content_type = kSparseContentType;
        response.download = std::make_unique<ReaderSource>(std::move(reader));
        return response;
    }

    // --- Snapshots ------------------------------------------------------------------------------

    Result<Response> list_snapshots(Call& call) {
        const std::string volume = call.parameter("volume");
        if (!volume.empty()) {
            STELLARIUM_TRY(find_kind(volume, nova::EntityKind::kVolume));
        }
        STELLARIUM_ASSIGN(const std::vector<nova::EntityInfo> infos, pool.snapshots(volume));
        return json_response(200, to_json(infos));
    }

    Result<Response> create_snapshot(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string name = reader.required_string("name");
        STELLARIUM_TRY(reader.finish());
        STELLARIUM_TRY(find_kind(call.values[0], nova::EntityKind::kVolume));
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool.create_snapshot(call.values[0], name));
        return json_response(201, to_json(info));
    }

    Result<Response> get_snapshot(Call& call) {
        STELLARIUM_ASSIGN(const std::string source, snapshot_source(call));
        STELLARIUM_ASSIGN(const nova::EntityDetail detail, suggest(pool.detail(source), source));
        return json_response(200, to_json(detail));
    }

    Result<Response> remove_snapshot(Call& call) {
        STELLARIUM_ASSIGN(const std::string source, snapshot_source(call));
        STELLARIUM_TRY(suggest(pool.remove_snapshot(call.values[0], call.values[1]), source));
        return empty_response();
    }

    Result<Response> rollback(Call& call) {
        const std::scoped_lock lock(names_mutex);
        STELLARIUM_ASSIGN(const std::string source, snapshot_source(call));
        STELLARIUM_TRY(suggest(pool.rollback(call.values[0], call.values[1]), source));
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool.find(call.values[0]));
        return json_response(200, to_json(info));
    }

    // --- Attachments ----------------------------------------------------------------------------

    Result<Response> list_attachments(Call&) {
        Json array = Json::array();
        for (const AttachmentStatus& status :
             options.host != nullptr ? options.host->attachments() : offline_attachments()) {
            array.push_back(to_json(status));
        }
        return json_response(200, array);
    }

    std::vector<AttachmentStatus> offline_attachments() const {
        std::vector<AttachmentStatus> statuses;
        for (const nova::Pool::AttachmentRecord& record : pool.attachments()) {
            AttachmentStatus status;
            status.source = record.source;
            if (Result<AttachmentOptions> decoded = decode_attachment(record); decoded) {
                status.options = *std::move(decoded);
            } else {
                status.state = AttachmentState::kFailed;
                status.detail = decoded.error().message();
            }
            statuses.push_back(std::move(status));
        }
        return statuses;
    }

    Result<Response> attach(Call& call) {
        const std::string& source = call.values[0];
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        STELLARIUM_ASSIGN(const AttachmentOptions wanted,
                          attachment_options_from_json(body, "request body"));
        STELLARIUM_ASSIGN(const nova::EntityInfo info, suggest(pool.find(source), source));
        if (info.kind != nova::EntityKind::kVolume && !wanted.read_only) {
            return fail(
                ErrorCode::kReadOnly,
                fmt::format("'{}' is {} and cannot be written: attach it read-only, or "
                            "clone it and attach the clone",
                            source,
                            info.kind == nova::EntityKind::kImage ? "an image" : "a snapshot"));
        }
        // A size that is no multiple of a sector is rounded up to one.
        if (wanted.block_size_bytes > nova::kSectorBytes &&
            info.size_bytes % wanted.block_size_bytes != 0) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' has {} bytes, which is no multiple of the block size {}: "
                                    "attach it with block size 512, or resize it",
                                    source, info.size_bytes, wanted.block_size_bytes));
        }
        if (options.host == nullptr) {
            return fail(ErrorCode::kUnavailable,
                        fmt::format("no daemon serves this store, and only a daemon can attach; "
                                    "start one with: stellariumd --store {}",
                                    options.directory));
        }
        STELLARIUM_ASSIGN(const AttachmentStatus status, options.host->attach(source, wanted));
        return json_response(201, to_json(status));
    }

    Result<Response> set_limits(Call& call) {
        const std::string& source = call.values[0];
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        STELLARIUM_ASSIGN(const RateLimits limits, rate_limits_from_json(body, "request body"));
        STELLARIUM_TRY(suggest(pool.find(source), source));
        if (options.host != nullptr) {
            STELLARIUM_ASSIGN(const AttachmentStatus status,
                              options.host->set_limits(source, limits));
            return json_response(200, to_json(status));
        }
        for (nova::Pool::AttachmentRecord& record : pool.attachments()) {
            if (record.source == source) {
                AttachmentStatus status;
                status.source = source;
                STELLARIUM_ASSIGN(status.options, decode_attachment(record));
                status.options.limits = limits;
                record.options = encode_attachment(status.options);
                STELLARIUM_TRY(pool.set_attachment(source, std::move(record)));
                return json_response(200, to_json(status));
            }
        }
        return fail(ErrorCode::kNotFound, fmt::format("'{}' is not attached", source));
    }

    Result<Response> detach(Call& call) {
        const std::string& source = call.values[0];
        STELLARIUM_TRY(suggest(pool.find(source), source));
        if (options.host != nullptr) {
            STELLARIUM_ASSIGN(const AttachmentStatus status, options.host->detach(source));
            return json_response(200, to_json(status));
        }
        for (const AttachmentStatus& status : offline_attachments()) {
            if (status.source == source) {
                STELLARIUM_TRY(pool.set_attachment(source, std::nullopt));
                return json_response(200, to_json(status));
            }
        }
        return fail(ErrorCode::kNotFound, fmt::format("'{}' is not attached", source));
    }

    // --- Files ----------------------------------------------------------------------------------

    Result<FilesHost*> files_host() const {
        if (options.files != nullptr) {
            return options.files;
        }
        return fail(ErrorCode::kUnavailable,
                    fmt::format("no daemon serves this store, and only a daemon can show it as "
                                "files; start one with: stellariumd --store {}",
                                options.directory));
    }

    Result<Response> get_files(Call&) {
        return json_response(
            200, to_json(options.files != nullptr ? options.files->files() : FilesStatus{}));
    }

    Result<Response> take_directory(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string directory = reader.required_string("directory");
        STELLARIUM_TRY(reader.finish());
        STELLARIUM_ASSIGN(FilesHost* const files, files_host());
        STELLARIUM_ASSIGN(const FilesStatus status, files->take_directory(directory));
        return json_response(201, to_json(status));
    }

    Result<Response> unmount(Call&) {
        STELLARIUM_ASSIGN(FilesHost* const files, files_host());
        STELLARIUM_TRY(files->unmount());
        return empty_response();
    }

    // --- Boots ----------------------------------------------------------------------------------

    Result<Response> list_boots(Call&) {
        Json array = Json::array();
        for (const boot::ManifestEntry& entry : boot.list()) {
            array.push_back(to_json(entry));
        }
        return json_response(200, array);
    }

    Result<Response> get_boot(Call& call) {
        STELLARIUM_TRY(suggest(pool.find(call.values[0]), call.values[0]));
        STELLARIUM_ASSIGN(const boot::ManifestView view, boot.show(call.values[0]));
        return json_response(200, to_json(view));
    }

    Result<Response> set_boot(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const boot::BootFiles files{.kernel = reader.optional_string("kernel"),
                                    .initrd = reader.optional_string("initrd"),
                                    .hints = reader.optional_string("hints")};
        STELLARIUM_TRY(reader.finish());
        STELLARIUM_TRY(suggest(pool.find(call.values[0]), call.values[0]));
        STELLARIUM_ASSIGN(const boot::ManifestView view, boot.set_files(call.values[0], files));
        return json_response(200, to_json(view));
    }

    Result<Response> remove_boot(Call& call) {
        STELLARIUM_TRY(suggest(pool.find(call.values[0]), call.values[0]));
        STELLARIUM_TRY(boot.remove(call.values[0]));
        return empty_response();
    }

    Result<Response> list_recordings(Call&) {
        Json array = Json::array();
        for (const boot::RecordingStatus& status : boot.recordings()) {
            array.push_back(to_json(status));
        }
        return json_response(200, array);
    }

    Result<void> need_daemon_to_record() const {
        if (options.host != nullptr) {
            return {};
        }
        return fail(ErrorCode::kUnavailable,
                    fmt::format("no daemon serves this store, and only a daemon sees what guests "
                                "read; start one with: stellariumd --store {}",
                                options.directory));
    }

    Result<Response> start_recording(Call& call) {
        STELLARIUM_TRY(suggest(pool.find(call.values[0]), call.values[0]));
        STELLARIUM_TRY(need_daemon_to_record());
        STELLARIUM_ASSIGN(const boot::RecordingStatus status, boot.record(call.values[0]));
        return json_response(201, to_json(status));
    }

    Result<Response> stop_recording(Call& call) {
        const std::string discard = call.parameter("discard");
        if (!discard.empty() && discard != "true" && discard != "false") {
            return fail(ErrorCode::kInvalidArgument,
                        "the parameter 'discard' must be true or false");
        }
        STELLARIUM_TRY(need_daemon_to_record());
        STELLARIUM_ASSIGN(const boot::RecordingStatus status,
                          boot.stop(call.values[0], discard == "true"));
        return json_response(200, to_json(status));
    }

    Result<Response> get_prefetch(Call&) { return json_response(200, to_json(boot.stats())); }

    Result<Response> start_prefetch(Call& call) {
        STELLARIUM_ASSIGN(const Json body, body_of(call));
        ObjectReader reader(body, "request body");
        const std::string source = reader.required_string("source");
        const bool all = reader.optional_bool("all").value_or(false);
        STELLARIUM_TRY(reader.finish());
        STELLARIUM_TRY(suggest(pool.find(source), source));
        const uint64_t cancelled = prefetches_cancelled;
        STELLARIUM_ASSIGN(const boot::StageReport report,
                          boot.prefetch(source, {.all = all, .cancelled = [this, cancelled] {
                                                     return stopping ||
                                                            prefetches_cancelled != cancelled;
                                                 }}));
        Json answer{{"source", source}};
        answer.update(to_json(report));
        return json_response(200, answer);
    }

    Result<Response> cancel_prefetch(Call&) {
        ++prefetches_cancelled;
        return empty_response();
    }
};

const std::array<ControlService::Impl::Row, 51> ControlService::Impl::kRows{{
    {{"GET", "/v1/version", "getVersion", 200}, &Impl::get_version},
    {{"GET", "/v1/store", "getStore", 200}, &Impl::get_store},
    {{"GET", "/v1/stats", "getStats", 200}, &Impl::get_stats},
    {{"GET", "/v1/sharing", "getSharing", 200}, &Impl::get_sharing},
    {{"POST", "/v1/checkpoint", "checkpoint", 204}, &Impl::checkpoint},
    {{"GET", "/v1/gc", "getGc", 200}, &Impl::get_gc},
    {{"POST", "/v1/gc", "collectGarbage", 200}, &Impl::start_gc},
    {{"DELETE", "/v1/gc", "cancelGc", 204}, &Impl::cancel_gc},
    {{"GET", "/v1/scrub", "getScrub", 200}, &Impl::get_scrub},
    {{"POST", "/v1/scrub", "scrub", 200}, &Impl::start_scrub},
    {{"DELETE", "/v1/scrub", "stopScrub", 204}, &Impl::stop_scrub},
    {{"GET", "/v1/damage", "getDamage", 200}, &Impl::get_damage},
    {{"GET", "/v1/images", "listImages", 200}, &Impl::list_images},
    {{"GET", "/v1/images/{name}", "getImage", 200}, &Impl::get_image},
    {{"PUT", "/v1/images/{name}", "importImage", 201, true, false}, &Impl::import_image},
    {{"DELETE", "/v1/images/{name}", "removeImage", 204}, &Impl::remove_image},
    {{"POST", "/v1/images/{name}/rename", "renameImage", 200}, &Impl::rename_image},
    {{"PUT", "/v1/images/{name}/sharing", "setSharing", 200}, &Impl::set_sharing},
    {{"GET", "/v1/imports", "listImports", 200}, &Impl::list_imports},
    {{"GET", "/v1/volumes", "listVolumes", 200}, &Impl::list_volumes},
    {{"POST", "/v1/volumes", "createVolume", 201}, &Impl::create_volume},
    {{"GET", "/v1/volumes/{name}", "getVolume", 200}, &Impl::get_volume},
    {{"DELETE", "/v1/volumes/{name}", "removeVolume", 204}, &Impl::remove_volume},
    {{"POST", "/v1/volumes/{name}/resize", "resizeVolume", 200}, &Impl::resize_volume},
    {{"POST", "/v1/volumes/{name}/rename", "renameVolume", 200}, &Impl::rename_volume},
    {{"POST", "/v1/clones", "clone", 201, false, false, true}, &Impl::clone},
    {{"POST", "/v1/removals", "removeMany", 204, false, false, true}, &Impl::remove_many},
    {{"GET", "/v1/diff", "diff", 200}, &Impl::diff},
    {{"GET", "/v1/content", "getContent", 200, false, true}, &Impl::get_content},
    {{"GET", "/v1/snapshots", "listSnapshots", 200}, &Impl::list_snapshots},
    {{"POST", "/v1/volumes/{name}/snapshots", "createSnapshot", 201}, &Impl::create_snapshot},
    {{"GET", "/v1/volumes/{name}/snapshots/{snapshot}", "getSnapshot", 200}, &Impl::get_snapshot},
    {{"DELETE", "/v1/volumes/{name}/snapshots/{snapshot}", "removeSnapshot", 204},
     &Impl::remove_snapshot},
    {{"POST", "/v1/volumes/{name}/snapshots/{snapshot}/rollback", "rollback", 200},
     &Impl::rollback},
    {{"GET", "/v1/attachments", "listAttachments", 200}, &Impl::list_attachments},
    {{"PUT", "/v1/attachments/{source}", "attach", 201}, &Impl::attach},
    {{"DELETE", "/v1/attachments/{source}", "detach", 200}, &Impl::detach},
    {{"PUT", "/v1/attachments/{source}/limits", "setLimits", 200}, &Impl::set_limits},
    {{"GET", "/v1/files", "getFiles", 200}, &Impl::get_files},
    {{"PUT", "/v1/files", "takeDirectory", 201}, &Impl::take_directory},
    {{"DELETE", "/v1/files", "unmount", 204}, &Impl::unmount},
    {{"GET", "/v1/boots", "listBoots", 200}, &Impl::list_boots},
    {{"GET", "/v1/boots/{source}", "getBoot", 200}, &Impl::get_boot},
    {{"PUT", "/v1/boots/{source}", "setBoot", 200}, &Impl::set_boot},
    {{"DELETE", "/v1/boots/{source}", "removeBoot", 204}, &Impl::remove_boot},
    {{"POST", "/v1/boots/{source}/recording", "startRecording", 201}, &Impl::start_recording},
    {{"DELETE", "/v1/boots/{source}/recording", "stopRecording", 200}, &Impl::stop_recording},
    {{"GET", "/v1/recordings", "listRecordings", 200}, &Impl::list_recordings},
    {{"GET", "/v1/prefetch", "getPrefetch", 200}, &Impl::get_prefetch},
    {{"POST", "/v1/prefetch", "prefetch", 200}, &Impl::start_prefetch},
    {{"DELETE", "/v1/prefetch", "cancelPrefetch", 204}, &Impl::cancel_prefetch},
}};

ControlService::ControlService(nova::Pool& pool, ServiceOptions options) {
    std::unique_ptr<boot::Boot> own_boot;
    if (options.boot == nullptr) {
        own_boot = std::make_unique<boot::Boot>(pool, *io::real_env().clock, boot::BootOptions{});
        options.boot = own_boot.get();
    }
    boot::Boot& boot = *options.boot;
    // It has no constructor. NOLINTNEXTLINE(modernize-make-unique)
    impl_.reset(new Impl{.pool = pool,
                         .options = std::move(options),
                         .own_boot = std::move(own_boot),
                         .boot = boot,
                         .names_mutex = {},
                         .gc_cancelled = false,
                         .scrub_cancelled = false,
                         .prefetches_cancelled = 0,
                         .stopping = false,
                         .imports_mutex = {},
                         .imports = {}});
}

ControlService::~ControlService() = default;

void ControlService::stop_long_work() {
    impl_->stopping = true;
    impl_->boot.stop_staging();
}

std::span<const RouteInfo> ControlService::routes() {
    static const std::vector<RouteInfo> kRoutes = [] {
        std::vector<RouteInfo> routes;
        routes.reserve(Impl::kRows.size());
        for (const Impl::Row& row : Impl::kRows) {
            routes.push_back(row.info);
        }
        return routes;
    }();
    return kRoutes;
}

bool ControlService::wants_upload(const std::string& method, const std::string& target) const {
    const Result<ParsedTarget> parsed = parse_target(target);
    return parsed && std::ranges::any_of(Impl::kRows, [&](const Impl::Row& row) {
               return row.info.upload && row.info.method == method &&
                      match(row.info.path, parsed->segments);
           });
}

size_t ControlService::max_json_bytes(const std::string& method, const std::string& target) const {
    const Result<ParsedTarget> parsed = parse_target(target);
    const bool long_body = parsed && std::ranges::any_of(Impl::kRows, [&](const Impl::Row& row) {
                               return row.info.long_body && row.info.method == method &&
                                      match(row.info.path, parsed->segments);
                           });
    return long_body ? kMaxJsonBytes : kUsualJsonBytes;
}

Response ControlService::handle(const Request& request) {
    Result<ParsedTarget> parsed = parse_target(request.target);
    if (!parsed) {
        return error_response(parsed.error());
    }
    // HEAD is GET; whoever carries the answer leaves its content out.
    std::string_view method = request.method;
    if (method == "HEAD") {
        method = "GET";
    }
    std::vector<std::string_view> other_methods;
    for (const Impl::Row& row : Impl::kRows) {
        std::optional<std::vector<std::string>> values = match(row.info.path, parsed->segments);
        if (!values) {
            continue;
        }
        if (row.info.method != method) {
            other_methods.push_back(row.info.method);
            continue;
        }
        if (const Result<void> known = check_query(parsed->query, row.info.operation); !known) {
            return error_response(known.error());
        }
        Impl::Call call{request, *std::move(values), std::move(parsed->query)};
        Result<Response> response = (impl_.get()->*row.handler)(call);
        return response ? *std::move(response) : error_response(response.error());
    }
    if (!other_methods.empty()) {
        if (std::ranges::find(other_methods, "GET") != other_methods.end()) {
            other_methods.emplace_back("HEAD");
        }
        Response response =
            error_response(Error(ErrorCode::kInvalidArgument,
                                 fmt::format("{} is not possible on this path; possible: {}",
                                             request.method, fmt::join(other_methods, ", "))));
        response.status = 405;
        response.allow = fmt::format("{}", fmt::join(other_methods, ", "));
        return response;
    }
    return error_response(
        Error(ErrorCode::kNotFound, "there is no such operation; docs/api/openapi.json lists all"));
}

}  // namespace stellarium::control
