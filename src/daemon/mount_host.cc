#include "daemon/mount_host.h"

#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include "frontend/fuse/left_open.h"
#include "frontend/fuse/limits.h"

namespace stellarium::daemon {

MountHost::MountHost(nova::Pool& pool, MountHostOptions options, Log& log)
    : pool_(pool), options_(std::move(options)), log_(log) {}

MountHost::~MountHost() = default;

std::shared_ptr<fuse::Mount> MountHost::mount() const {
    const std::scoped_lock lock(mutex_);
    return mount_;
}

void MountHost::set_mount(std::shared_ptr<fuse::Mount> mount) {
    const std::scoped_lock lock(mutex_);
    mount_.swap(mount);
}

Result<std::shared_ptr<fuse::Mount>> MountHost::make_mount(fuse::HolderClient holder) {
    fuse::MountOptions options;
    options.group = options_.group;
    options.attached = options_.attached;
    options.boots = options_.boots;
    options.log = [this](fuse::LogLevel level, const std::string& message) {
        const std::initializer_list<LogField> fields = {{"message", message}};
        switch (level) {
            case fuse::LogLevel::kInfo:
                return log_.info("files", fields);
            case fuse::LogLevel::kWarning:
                return log_.warning("files", fields);
            case fuse::LogLevel::kError:
                return log_.error("files", fields);
        }
    };
    STELLARIUM_ASSIGN(std::shared_ptr<fuse::Mount> made,
                      fuse::Mount::adopt(pool_, std::move(holder), std::move(options)));
    const fuse::MountStatus status = made->status();
    log_.info("files", {{"directory", status.directory},
                        {"holder", std::to_string(status.holder_pid)},
                        {"open", std::to_string(status.open_files)}});
    return made;
}

Result<void> MountHost::adopt(fuse::HolderClient holder) {
    STELLARIUM_ASSIGN(auto made, make_mount(std::move(holder)));
    set_mount(std::move(made));
    return {};
}

Result<void> MountHost::serve() {
    const std::scoped_lock lock(changes_);
    const auto mounted = mount();
    return mounted ? mounted->serve() : Result<void>();
}

void MountHost::settle() {
    if (const auto mounted = mount()) {
        mounted->settle();
    }
}

bool MountHost::stop() {
    const std::scoped_lock lock(changes_);
    stopped_ = true;
    const auto mounted = mount();
    if (!mounted) {
        return false;
    }
    mounted->stop();
    const bool wait = mounted->status().connected;
    set_mount(nullptr);
    return wait;
}

std::optional<fuse::MountStatus> MountHost::status() const {
    const auto mounted = mount();
    const auto status = mounted ? std::optional(mounted->status()) : std::nullopt;
    return status && status->connected ? status : std::nullopt;
}

control::FilesStatus MountHost::files() const {
    control::FilesStatus files;
    files.holder_socket = fuse::holder_socket(options_.runtime_directory);
    files.uid = geteuid();
    files.gid = getegid();
    const auto mounted = mount();
    const auto status = mounted ? mounted->status() : fuse::MountStatus{};
    if (!status.connected) {
        return files;
    }
    files.mounted = true;
    files.directory = status.directory;
    files.holder_pid = status.holder_pid;
    files.open_files = status.open_files;
    files.open = mounted->open_names(fuse::kMaxOpenNames);
    files.repeats_requests = status.resends;
    files.adopted = status.adopted;
    files.repeated_requests = status.repeated;
    files.in_flight = status.in_flight;
    files.kept = status.kept;
    files.requests.reserve(fuse::kFileRequestKinds);
    for (size_t kind = 0; kind < fuse::kFileRequestKinds; ++kind) {
        const fuse::FileRequestTotals& totals = status.totals[kind];
        files.requests.push_back(
            {.kind = std::string(fuse::file_request_name(static_cast<fuse::FileRequest>(kind))),
             .requests = totals.requests,
             .bytes = totals.bytes,
             .errors = totals.errors});
    }
    return files;
}

void MountHost::put_away() {
    if (const auto mounted = mount()) {
        mounted->stop();
        set_mount(nullptr);
    }
}

Result<control::FilesStatus> MountHost::take_directory(std::string_view directory) {
    const std::scoped_lock lock(changes_);
    if (stopped_) {
        return fail(ErrorCode::kUnavailable, "the daemon is stopping");
    }
    if (const auto present = status()) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("the files are below {} already: unmount that first (stellarctl "
                                "unmount)",
                                present->directory));
    }
    put_away();
    STELLARIUM_ASSIGN(auto holder,
                      fuse::HolderClient::connect(fuse::holder_socket(options_.runtime_directory)));
    STELLARIUM_ASSIGN(const fuse::HolderStatus held, holder.status());
    if (held.directory != directory) {
        return fail(ErrorCode::kBusy, fmt::format("{} is mounted for this daemon, and not {}",
                                                  held.directory, directory));
    }
    STELLARIUM_ASSIGN(auto made, make_mount(std::move(holder)));
    STELLARIUM_TRY(made->serve());
    set_mount(std::move(made));
    return files();
}

Result<void> MountHost::unmount() {
    const std::scoped_lock lock(changes_);
    const auto mounted = mount();
    const auto status = mounted ? mounted->status() : fuse::MountStatus{};
    if (!status.connected) {
        return fail(ErrorCode::kNotFound, "no directory is mounted");
    }
    if (const Result<void> unmounted = mounted->unmount(); !unmounted) {
        if (unmounted.error().code() != ErrorCode::kBusy) {
            return unmounted;
        }
        const auto names = mounted->open_names(fuse::kMaxOpenNames);
        if (names.empty()) {
            // A folder that is listed, a working directory, a holder that stays.
            return std::unexpected(unmounted.error());
        }
        return fail(
            ErrorCode::kBusy,
            fmt::format("files below {} are open ({}{}): close them (fuser -vm {} says who "
                        "has them)",
                        status.directory, fmt::join(names, ", "),
                        names.size() == fuse::kMaxOpenNames ? ", ..." : "", status.directory));
    }
    log_.info("files", {{"directory", status.directory}, {"message", "unmounted by command"}});
    put_away();
    return {};
}

}  // namespace stellarium::daemon
