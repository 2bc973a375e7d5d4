// stellarium-mount-holder: keeps a mounted directory over the death of stellariumd; see holder.h.
#include <charconv>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>
#include <unistd.h>

#include "frontend/fuse/holder.h"

namespace {

int run(int argc, char** argv) {
    CLI::App app(
        "Mounts a directory for stellariumd and keeps it mounted while no daemon runs. stellariumd "
        "starts it by itself; under systemd it can be a unit of its own.");
    stellarium::fuse::HolderOptions options;
    int report_descriptor = -1;
    uint32_t owner = 0;
    uint32_t group = 0;
    app.add_option("--directory", options.directory, "where to mount")->required();
    app.add_option("--socket", options.socket, "RUNTIME-DIR/mount.sock of the daemon")->required();
    options.store = "stellarium";
    app.add_option("--store", options.store, "shown as the source of the mount");
    const auto* const has_owner =
        app.add_option("--owner", owner, "user (a number) whose daemon may ask");
    const auto* const has_group = app.add_option("--group", group, "that user's group");
    app.add_flag("--allow-other", options.allow_other,
                 "let other users in, as far as modes allow; without root that needs "
                 "CAP_SYS_ADMIN, or user_allow_other in /etc/fuse.conf");
    app.add_flag("--stay", options.stay, "stay mounted when a daemon stops");
    app.add_option("--report-descriptor", report_descriptor,
                   "where to say 'mounted', or what went wrong");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
        return app.exit(error);
    }
    if (has_owner->count() > 0) {
        options.owner = owner;
    }
    if (has_group->count() > 0) {
        options.group = group;
    }
    return stellarium::fuse::run_holder(options, [&](const std::string& trouble) {
        const std::string text = trouble.empty() ? "mounted\n" : trouble;
        if (report_descriptor >= 0) {
            [[maybe_unused]] const ssize_t told =
                write(report_descriptor, text.data(), text.size());
            close(report_descriptor);
        } else if (!trouble.empty()) {
            std::fprintf(stderr, "stellarium-mount-holder: %s\n", trouble.c_str());
        }
    });
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "stellarium-mount-holder: unexpected: %s\n", error.what());
        return 1;
    }
}
