// The volume and snapshot commands.
#include <fmt/format.h>

#include "base/units.h"
#include "cli/commands_common.h"
#include "control/service.h"
#include "nova/pool.h"

namespace stellarium::cli {

using control::Json;
using control::percent_encode;

namespace {

std::string volume_target(const std::string& name) {
    return target_of("/v1/volumes/", name);
}

std::string snapshot_target(const std::string& volume, const std::string& snapshot) {
    return target_of(volume_target(volume) + "/snapshots/", snapshot);
}

/// What VOLUME, or VOLUME@SNAPSHOT, is asked for at.
std::string source_target(const std::string& source) {
    const size_t at = source.find('@');
    return at == std::string::npos || at == 0 || at + 1 == source.size()
               ? volume_target(source)
               : snapshot_target(source.substr(0, at), source.substr(at + 1));
}

struct SnapshotName {
    std::string volume;
    std::string snapshot;
    std::string target() const { return snapshot_target(volume, snapshot); }
    std::string text() const { return volume + '@' + snapshot; }
};

/// A snapshot is named as VOLUME NAME or VOLUME@NAME.
Result<SnapshotName> snapshot_name(const Arguments& arguments) {
    const size_t at = arguments.name.find('@');
    if (at == std::string::npos && !arguments.other_name.empty()) {
        return SnapshotName{arguments.name, arguments.other_name};
    }
    if (at != std::string::npos && at > 0 && at + 1 < arguments.name.size() &&
        arguments.other_name.empty()) {
        return SnapshotName{arguments.name.substr(0, at), arguments.name.substr(at + 1)};
    }
    return fail(ErrorCode::kInvalidArgument,
                "name the volume and the snapshot: VOLUME NAME or VOLUME@NAME");
}

}  // namespace

Result<std::vector<std::string>> expand_names(const std::string& pattern, uint64_t count) {
    constexpr std::string_view kPlace = "{n}";
    if (count == 0 || count > nova::kMaxClonesPerCall) {
        return fail(
            ErrorCode::kInvalidArgument,
            fmt::format("--count is {}, and must be from 1 to {}", count, nova::kMaxClonesPerCall));
    }
    if (pattern.find(kPlace) == std::string::npos && count > 1) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("--count {} needs {{n}} in the name, for example '{}-{{n}}'", count,
                                pattern));
    }
    std::vector<std::string> names;
    names.reserve(count);
    for (uint64_t n = 1; n <= count; ++n) {
        std::string name = pattern;
        const std::string number = std::to_string(n);
        for (size_t at = name.find(kPlace); at != std::string::npos;
             at = name.find(kPlace, at + number.size())) {
            name.replace(at, kPlace.size(), number);
        }
        names.push_back(std::move(name));
    }
    return names;
}

Result<void> volume_create(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const uint64_t size_bytes, parse_size(arguments.size));
    STELLARIUM_ASSIGN(const Json volume,
                      ask(context, "POST", "/v1/volumes",
                          Json{{"name", arguments.name}, {"size_bytes", size_bytes}}));
    print_done(context, volume,
               fmt::format("made volume '{}', {}", arguments.name, context.out().size(size_bytes)));
    return {};
}

Result<void> volume_clone(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const std::vector<std::string> names,
                      expand_names(arguments.name, arguments.count));
    STELLARIUM_ASSIGN(const Json clones, ask(context, "POST", "/v1/clones",
                                             Json{{"source", arguments.source}, {"names", names}}));
    print_done(context, clones,
               names.size() == 1
                   ? fmt::format("cloned '{}' to '{}'", arguments.source, names.front())
                   : fmt::format("cloned '{}' {} times, '{}' to '{}'", arguments.source,
                                 names.size(), names.front(), names.back()));
    return {};
}

Result<void> volume_list(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json all, ask(context, "GET", "/v1/volumes"));
    STELLARIUM_ASSIGN(const Json volumes, matching(all, arguments.names, "volume"));
    Output& out = context.out();
    if (print_list_plainly(out, volumes, arguments.quiet)) {
        return {};
    }
    Table table({{"NAME"},
                 {"SIZE", Align::kRight},
                 {"PARENT"},
                 {"SNAPSHOTS", Align::kRight},
                 {"CREATED"},
                 {"ATTACHED"}});
    for (const Json& volume : volumes) {
        table.add({text_field(volume, "name"), out.size(number_field(volume, "size_bytes")),
                   text_field(volume, "parent"), std::to_string(number_field(volume, "snapshots")),
                   text_field(volume, "created"),
                   !text_field(volume, "damage").empty() ? "no, it is damaged"
                   : bool_field(volume, "attached")      ? "yes"
                                                         : ""});
    }
    out.table(table);
    return {};
}

Result<void> volume_info(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json volume, ask(context, "GET", source_target(arguments.name)));
    print_entity(context, volume);
    return {};
}

Result<void> volume_resize(Context& context, const Arguments& arguments) {
    const bool is_growth = arguments.size.starts_with('+');
    STELLARIUM_ASSIGN(uint64_t size_bytes,
                      parse_size(std::string_view(arguments.size).substr(is_growth ? 1 : 0)));
    if (is_growth) {
        STELLARIUM_ASSIGN(const Json before, ask(context, "GET", volume_target(arguments.name)));
        if (__builtin_add_overflow(size_bytes, number_field(before, "size_bytes"), &size_bytes)) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is too large", arguments.size));
        }
    }
    STELLARIUM_ASSIGN(const Json volume,
                      ask(context, "POST", volume_target(arguments.name) + "/resize",
                          Json{{"size_bytes", size_bytes}, {"shrink", arguments.shrink}}));
    print_done(context, volume,
               fmt::format("resized '{}' to {}", arguments.name, context.out().size(size_bytes)));
    return {};
}

Result<void> volume_rename(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json volume,
                      ask(context, "POST", volume_target(arguments.name) + "/rename",
                          Json{{"name", arguments.other_name}}));
    print_done(context, volume,
               fmt::format("renamed '{}' to '{}'", arguments.name, arguments.other_name));
    return {};
}

Result<void> volume_remove(Context& context, const Arguments& arguments) {
    STELLARIUM_TRY(
        ask(context, "POST", "/v1/removals", Json{{"kind", "volume"}, {"names", arguments.names}}));
    print_done(context, Json{{"removed", arguments.names}},
               fmt::format("removed {}", plural(arguments.names.size(), "volume")));
    return {};
}

Result<void> volume_export(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json volume, ask(context, "GET", source_target(arguments.name)));
    return export_source(context, arguments, arguments.name, volume);
}

Result<void> volume_diff(Context& context, const Arguments& arguments) {
    const std::string target =
        fmt::format("/v1/diff?a={}&b={}&from=", percent_encode(arguments.source),
                    percent_encode(arguments.other_name));
    Output& out = context.out();
    Json ranges = Json::array();
    uint64_t from = 0;
    uint64_t differing_bytes = 0;
    uint64_t a_size_bytes = 0;
    uint64_t b_size_bytes = 0;
    while (true) {
        STELLARIUM_ASSIGN(const Json page, ask(context, "GET", target + std::to_string(from)));
        if (!page.is_object() || !page.contains("ranges")) {
            return fail(ErrorCode::kProtocol, "the answer lacks its ranges");
        }
        a_size_bytes = number_field(page, "a_size_bytes");
        b_size_bytes = number_field(page, "b_size_bytes");
        for (const Json& range : page.at("ranges")) {
            differing_bytes += number_field(range, "length_bytes");
            ranges.push_back(range);
        }
        const uint64_t next = number_field(page, "next_offset_bytes");
        if (next <= from) {
            break;
        }
        from = next;
    }
    if (out.json()) {
        out.value(Json{{"a", arguments.source},
                       {"b", arguments.other_name},
                       {"a_size_bytes", a_size_bytes},
                       {"b_size_bytes", b_size_bytes},
                       {"differing_bytes", differing_bytes},
                       {"ranges", ranges}});
        return {};
    }
    Table table({{"OFFSET", Align::kRight}, {"LENGTH", Align::kRight}});
    for (const Json& range : ranges) {
        table.add({std::to_string(number_field(range, "offset_bytes")),
                   std::to_string(number_field(range, "length_bytes"))});
    }
    if (!ranges.empty()) {
        out.table(table);
    }
    out.line(fmt::format("{} in {}", out.size(differing_bytes), plural(ranges.size(), "range")));
    if (a_size_bytes != b_size_bytes) {
        const bool a_ends_first = a_size_bytes < b_size_bytes;
        out.line(fmt::format(
            "the sizes differ: '{}' has {}, '{}' has {}; what only '{}' has is compared with zeros",
            arguments.source, out.size(a_size_bytes), arguments.other_name, out.size(b_size_bytes),
            a_ends_first ? arguments.other_name : arguments.source));
    }
    return {};
}

Result<void> snapshot_create(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const SnapshotName name, snapshot_name(arguments));
    STELLARIUM_ASSIGN(const Json snapshot,
                      ask(context, "POST", volume_target(name.volume) + "/snapshots",
                          Json{{"name", name.snapshot}}));
    print_done(context, snapshot, fmt::format("made snapshot '{}'", name.text()));
    return {};
}

Result<void> snapshot_list(Context& context, const Arguments& arguments) {
    const std::string target = arguments.name.empty()
                                   ? std::string("/v1/snapshots")
                                   : target_of("/v1/snapshots?volume=", arguments.name);
    STELLARIUM_ASSIGN(const Json snapshots, ask(context, "GET", target));
    Output& out = context.out();
    if (print_list_plainly(out, snapshots, arguments.quiet)) {
        return {};
    }
    Table table({{"NAME"}, {"SIZE", Align::kRight}, {"CREATED"}});
    for (const Json& snapshot : snapshots) {
        table.add({text_field(snapshot, "name"), out.size(number_field(snapshot, "size_bytes")),
                   text_field(snapshot, "created")});
    }
    out.table(table);
    return {};
}

Result<void> snapshot_info(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const SnapshotName name, snapshot_name(arguments));
    STELLARIUM_ASSIGN(const Json snapshot, ask(context, "GET", name.target()));
    print_entity(context, snapshot);
    return {};
}

Result<void> snapshot_rollback(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const SnapshotName name, snapshot_name(arguments));
    STELLARIUM_ASSIGN(const Json volume,
                      ask(context, "POST", name.target() + "/rollback", Json::object()));
    print_done(context, volume,
               fmt::format("rolled '{}' back to snapshot '{}'", name.volume, name.snapshot));
    return {};
}

Result<void> snapshot_remove(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const SnapshotName name, snapshot_name(arguments));
    STELLARIUM_TRY(ask(context, "DELETE", name.target()));
    print_done(context, Json{{"removed", Json::array({name.text()})}},
               fmt::format("removed snapshot '{}'", name.text()));
    return {};
}

}  // namespace stellarium::cli
