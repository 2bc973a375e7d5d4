// Files of the store below a directory: mounted here, with this user's rights, and served by the
// daemon, which opens no path that it is told.
#include <cerrno>
#include <filesystem>
#include <optional>

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/commands_common.h"
#include "control/locations.h"
#include "frontend/fuse/holder.h"
#include "frontend/fuse/holder_protocol.h"

namespace stellarium::cli {

using control::Json;

namespace {

constexpr const char* kFuseDevice = "/dev/fuse";

/// What mounting needs, said here rather than as an errno of mount(2).
Result<void> check_place(const std::string& directory) {
    if (access(kFuseDevice, F_OK) != 0) {
        return fail(ErrorCode::kUnavailable,
                    fmt::format("there is no {}: load the module (modprobe fuse), or give this "
                                "container the device",
                                kFuseDevice));
    }
    struct stat status{};
    struct stat above{};
    if (stat(directory.c_str(), &status) != 0) {
        if (errno == ENOENT) {
            return fail(
                ErrorCode::kNotFound,
                fmt::format("there is no directory {0}: make it first (mkdir -p {0})", directory));
        }
        return std::unexpected(Error::from_errno(errno, "look at " + directory));
    }
    if (!S_ISDIR(status.st_mode)) {
        return fail(ErrorCode::kInvalidArgument, directory + " is not a directory");
    }
    if (stat((directory + "/..").c_str(), &above) == 0 && above.st_dev != status.st_dev) {
        return fail(ErrorCode::kBusy,
                    fmt::format("something is mounted on {} already: name another directory, or "
                                "unmount that",
                                directory));
    }
    std::error_code error;
    if (!std::filesystem::is_empty(directory, error) && !error) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} is not empty, and what it holds would be hidden: name an empty "
                                "directory",
                                directory));
    }
    return {};
}

/// Nobody but root and the daemon's user can give it a directory.
Result<void> check_user(const Json& files) {
    const auto uid = static_cast<uid_t>(number_field(files, "uid"));
    if (geteuid() == 0 || geteuid() == uid) {
        return {};
    }
    return fail(ErrorCode::kPermissionDenied,
                fmt::format("only root and user {}, whose the daemon is, can mount for it", uid));
}

}  // namespace

Result<void> mount_files(Context& context, const Arguments& arguments) {
    const std::string directory = control::real_path(arguments.path);
    context.expect_daemon();
    STELLARIUM_ASSIGN(const Json files, ask(context, "GET", "/v1/files"));
    if (bool_field(files, "mounted")) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("the files are below {} already: unmount that first (stellarctl "
                                "unmount)",
                                text_field(files, "directory")));
    }
    const std::string socket = text_field(files, "holder_socket");
    const auto uid = static_cast<uid_t>(number_field(files, "uid"));
    std::optional<fuse::HolderClient> started;
    if (context.session()->through_daemon()) {
        STELLARIUM_TRY(check_user(files));
        // One that another command, or a unit of systemd's, has started is taken as it is.
        if (auto present = fuse::HolderClient::connect(socket, uid); !present) {
            if (present.error().code() != ErrorCode::kUnavailable) {
                return std::unexpected(present.error());
            }
            STELLARIUM_TRY(check_place(directory));
            STELLARIUM_ASSIGN(const Json version, ask(context, "GET", "/v1/version"));
            fuse::HolderOptions options{.directory = directory,
                                        .socket = socket,
                                        .owner = std::nullopt,
                                        .group = std::nullopt,
                                        .store = text_field(version, "directory")};
            if (uid != geteuid()) {
                options.owner = uid;
                options.group = static_cast<gid_t>(number_field(files, "gid"));
            }
            STELLARIUM_TRY(fuse::start_holder(options));
            STELLARIUM_ASSIGN(started, fuse::HolderClient::connect(socket));
        }
    }
    const Result<Json> taken = ask(context, "PUT", "/v1/files", Json{{"directory", directory}});
    if (!taken) {
        if (started) {
            // Nobody would answer there.
            [[maybe_unused]] const auto unmounted = started->unmount();
        }
        return std::unexpected(taken.error());
    }
    print_done(context, *taken, fmt::format("mounted at {}", directory));
    return {};
}

Result<void> unmount_files(Context& context, const Arguments&) {
    context.expect_daemon();
    STELLARIUM_ASSIGN(const Json files, ask(context, "GET", "/v1/files"));
    STELLARIUM_TRY(ask(context, "DELETE", "/v1/files"));
    print_done(context, files, fmt::format("unmounted {}", text_field(files, "directory")));
    return {};
}

}  // namespace stellarium::cli
