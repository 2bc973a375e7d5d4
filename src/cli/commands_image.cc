// init, and the image commands.
#include <fmt/format.h>

#include "cli/commands_common.h"
#include "cli/import_source.h"
#include "cli/progress.h"
#include "control/locations.h"
#include "io/posix.h"
#include "nova/pool.h"

namespace stellarium::cli {

using control::Json;

namespace {

std::string image_target(const std::string& name) {
    return target_of("/v1/images/", name);
}

/// Bytes given for each byte that had to be stored, of the import `name`, as far as it is.
std::optional<double> running_ratio(control::ControlClient& client, const std::string& name) {
    const Result<Json> imports = client.call("GET", "/v1/imports");
    if (!imports || !imports->is_array()) {
        return std::nullopt;
    }
    for (const Json& import : *imports) {
        if (text_field(import, "name") == name && import.contains("progress")) {
            const Json& progress = import.at("progress");
            const uint64_t fresh = number_field(progress, "new_bytes");
            const uint64_t all = fresh + number_field(progress, "duplicate_bytes");
            if (fresh > 0) {
                return static_cast<double>(all) / static_cast<double>(fresh);
            }
        }
    }
    return std::nullopt;
}

}  // namespace

Result<void> init(Context& context, const Arguments&) {
    STELLARIUM_ASSIGN(const std::string directory, store_directory(context.location()));
    const io::Env env = io::real_env();
    nova::PoolOptions options;
    options.store.allow_unsafe_file_system = context.location().allow_unsafe_file_system;
    // The default store lies in folders that a new user does not have yet.
    if (const size_t slash = directory.rfind('/'); slash != std::string::npos && slash > 0) {
        STELLARIUM_ASSIGN(const bool there, env.files->exists(directory.substr(0, slash)));
        if (!there) {
            if (!context.location().store.empty()) {
                return fail(ErrorCode::kNotFound, fmt::format("the folder {} does not exist",
                                                              directory.substr(0, slash)));
            }
            STELLARIUM_TRY(control::make_directories(directory.substr(0, slash)));
        }
    }
    STELLARIUM_TRY(nova::Pool::create(env, directory, options));
    STELLARIUM_ASSIGN(const io::FileSystemType type, env.files->type(directory));
    if (type.kind != io::FileSystemKind::kLocal) {
        complain(
            fmt::format("stellarctl: warning: {} is on {}; 'stellarctl status' says what that "
                        "means for the store\n",
                        directory, type.name));
    }
    print_done(context, Json{{"directory", directory}},
               fmt::format("made an empty store in {}", directory));
    return {};
}

Result<void> image_import(Context& context, const Arguments& arguments) {
    ImportSourceOptions options;
    options.allow_backing = arguments.allow_backing;
    options.allow_empty = arguments.allow_empty;
    if (!arguments.format.empty()) {
        options.format = format_from_name(arguments.format);
        if (!options.format) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is not a format; known: raw, qcow2, vmdk, vhdx, vdi, vpc",
                                    arguments.format));
        }
    }
    STELLARIUM_ASSIGN(const ImportSource source, open_import_source(arguments.path, options));
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    Progress progress("importing " + arguments.name, context.progress());
    const std::unique_ptr<control::ControlClient> second = context.session()->second_client();
    if (second) {
        progress.set_dedup_source([&] { return running_ratio(*second, arguments.name); });
    }
    ProgressSource watched(*source.content, progress);
    Result<Json> imported = client->upload(image_target(arguments.name), watched);
    progress.finish();
    if (!imported) {
        return std::unexpected(imported.error());
    }
    Json image = *std::move(imported);
    image["format"] = format_name(source.format);
    const Json counts = image.contains("import") ? image.at("import") : Json::object();
    const uint64_t fresh = number_field(counts, "new_bytes");
    const uint64_t duplicate = number_field(counts, "duplicate_bytes");
    print_done(context, image,
               fmt::format("imported '{}' ({}): {}, {} of data, {} of it new, {} known already",
                           arguments.name, format_name(source.format),
                           context.out().size(number_field(image, "size_bytes")),
                           context.out().size(fresh + duplicate), context.out().size(fresh),
                           context.out().size(duplicate)));
    return {};
}

Result<void> image_list(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json all, ask(context, "GET", "/v1/images"));
    STELLARIUM_ASSIGN(const Json images, matching(all, arguments.names, "image"));
    Output& out = context.out();
    if (print_list_plainly(out, images, arguments.quiet)) {
        return {};
    }
    Table table({{"NAME"}, {"SIZE", Align::kRight}, {"CREATED"}});
    for (const Json& image : images) {
        table.add({text_field(image, "name"), out.size(number_field(image, "size_bytes")),
                   text_field(image, "created")});
    }
    out.table(table);
    return {};
}

Result<void> image_info(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json image, ask(context, "GET", image_target(arguments.name)));
    print_entity(context, image);
    return {};
}

Result<void> image_remove(Context& context, const Arguments& arguments) {
    STELLARIUM_TRY(
        ask(context, "POST", "/v1/removals", Json{{"kind", "image"}, {"names", arguments.names}}));
    print_done(context, Json{{"removed", arguments.names}},
               fmt::format("removed {} image{}", arguments.names.size(),
                           arguments.names.size() == 1 ? "" : "s"));
    return {};
}

Result<void> image_rename(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json image,
                      ask(context, "POST", image_target(arguments.name) + "/rename",
                          Json{{"name", arguments.other_name}}));
    print_done(context, image,
               fmt::format("renamed '{}' to '{}'", arguments.name, arguments.other_name));
    return {};
}

Result<void> image_set(Context& context, const Arguments& arguments) {
    const bool shareable = arguments.shareable == "yes";
    STELLARIUM_ASSIGN(const Json image,
                      ask(context, "PUT", image_target(arguments.name) + "/sharing",
                          Json{{"shareable", shareable}}));
    print_done(context, image,
               fmt::format("'{}' {} be mapped by clients of the daemon", arguments.name,
                           shareable ? "can" : "cannot"));
    return {};
}

Result<void> image_export(Context& context, const Arguments& arguments) {
    STELLARIUM_ASSIGN(const Json image, ask(context, "GET", image_target(arguments.name)));
    return export_source(context, arguments, arguments.name, image);
}

}  // namespace stellarium::cli
