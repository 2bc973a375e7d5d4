#include "daemon/daemon.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <ctime>
#include <optional>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <grp.h>
#include <malloc.h>
#include <sys/wait.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "boot/boot.h"
#include "control/client.h"
#include "control/locations.h"
#include "control/service.h"
#include "daemon/handlers.h"
#include "daemon/http_server.h"
#include "daemon/limits.h"
#include "daemon/map_host.h"
#include "daemon/metrics.h"
#include "daemon/mount_host.h"
#include "daemon/nbd_host.h"
#include "daemon/sandbox.h"
#include "daemon/vhost_host.h"
#include "frontend/fuse/holder.h"
#include "frontend/fuse/holder_protocol.h"
#include "frontend/fuse/left_open.h"
#include "io/posix.h"
#include "nebula/reserve.h"
#include "nova/pool.h"

namespace stellarium::daemon {
namespace {

sigset_t stop_signals() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);  // The terminal that it was started from is gone.
    return set;
}

/// What can still be allocated in `directory`, the buffer of an earlier daemon included: it is
/// adopted, or replaced. nullopt when the system does not say.
std::optional<uint64_t> room_for_buffer(io::FileSystem& files, const std::string& directory) {
    const auto space = files.space(directory);
    const auto entries = files.list(directory);
    if (!space || !entries) {
        return std::nullopt;
    }
    uint64_t room = space->free_bytes;
    for (const io::DirectoryEntry& entry : *entries) {
        if (entry.name.ends_with(".arena")) {
            const auto file = files.open(directory + "/" + entry.name, io::OpenMode::kReadOnly);
            const auto size = file ? (*file)->size_bytes() : Result<uint64_t>(0);
            room += size ? *size : 0;
        }
    }
    return room;
}

/// Takes less than the default where there is no room for it. What was asked for is not changed.
uint64_t memory_to_use(const DaemonConfig& config, io::FileSystem& files, Log& log) {
    const auto room = room_for_buffer(files, config.runtime_directory);
    if (config.memory_given || !room) {
        return config.memory_bytes;
    }
    const uint64_t fits = memory_that_fits(config.memory_bytes, *room);
    if (fits < config.memory_bytes) {
        log.warning("memory",
                    {{"message",
                      fmt::format("{} has room for {}, so {} are used for unflushed writes and "
                                  "cached maps instead of {}: give it more room, or say how much "
                                  "to use (--memory)",
                                  config.runtime_directory, format_size(*room), format_size(fits),
                                  format_size(config.memory_bytes))}});
    }
    return fits;
}

/// For good: root's identity is not kept aside.
Result<void> become(const ServiceUser& user) {
    if (initgroups(user.name.c_str(), user.gid) != 0 ||
        setresgid(user.gid, user.gid, user.gid) != 0 ||
        setresuid(user.uid, user.uid, user.uid) != 0) {
        return std::unexpected(Error::from_errno(errno, "become user " + user.name));
    }
    return {};
}

/// Asked before anything is made for that user, by a child that becomes them. Before any thread is
/// made.
Result<void> check_access_of(const ServiceUser& user, const std::string& store) {
    const pid_t child = fork();
    if (child < 0) {
        return std::unexpected(Error::from_errno(errno, "start a process as user " + user.name));
    }
    if (child == 0) {
        // That they cannot be become is for the parent to find and to say.
        const bool denied =
            become(user) && access(store.c_str(), R_OK | W_OK | X_OK) != 0 && errno == EACCES;
        _exit(denied ? 1 : 0);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR) {
            return std::unexpected(
                Error::from_errno(errno, "wait for a process of user " + user.name));
        }
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        return {};
    }
    return fail(ErrorCode::kPermissionDenied,
                fmt::format("user {} cannot use the store {}: give it to that user (chown -R {} "
                            "{}), who must be able to enter the folders above it",
                            user.name, store, user.name, store));
}

/// Whoever keeps the mounted directory. One that we have started goes again when we do not come to
/// show anything in it.
class MountHolder {
  public:
    MountHolder() = default;
    MountHolder(fuse::HolderClient client, bool started)
        : client_(std::move(client)), started_(started) {}
    MountHolder(MountHolder&& other) noexcept
        : client_(std::exchange(other.client_, std::nullopt)), started_(other.started_) {}
    MountHolder& operator=(MountHolder&& other) noexcept {
        client_.swap(other.client_);
        std::swap(started_, other.started_);
        return *this;
    }
    ~MountHolder() {
        if (client_ && started_) {
            [[maybe_unused]] const auto unmounted = client_->unmount();
        }
    }
    /// nullopt when there is none, or it was taken.
    std::optional<fuse::HolderClient> take() { return std::exchange(client_, std::nullopt); }

  private:
    std::optional<fuse::HolderClient> client_;
    bool started_ = false;
};

/// The holder that an earlier daemon has left, or a new one. As root, if we are: nobody else mounts
/// by themselves.
Result<MountHolder> find_holder(const DaemonConfig& config, Log& log) {
    const std::string socket = fuse::holder_socket(config.runtime_directory);
    auto client = fuse::HolderClient::connect(
        socket, config.service_user ? std::optional(config.service_user->uid) : std::nullopt);
    if (client) {
        STELLARIUM_ASSIGN(const fuse::HolderStatus status, client->status());
        if (!config.mount.empty() && status.directory != config.mount) {
            return fail(ErrorCode::kBusy,
                        fmt::format("--mount is {}, and this daemon's files are below {} already: "
                                    "start it with --mount {}, or unmount that first",
                                    config.mount, status.directory, status.directory));
        }
        log.info("mount", {{"directory", status.directory},
                           {"holder", std::to_string(status.pid)},
                           {"message", "kept by the holder of an earlier daemon"}});
        return MountHolder(*std::move(client), false);
    }
    if (client.error().code() != ErrorCode::kUnavailable) {
        return std::unexpected(client.error());
    }
    if (config.mount.empty()) {
        return MountHolder();
    }
    fuse::HolderOptions options{.directory = config.mount,
                                .socket = socket,
                                .owner = std::nullopt,
                                .group = std::nullopt,
                                .store = config.store};
    if (config.service_user) {
        options.owner = config.service_user->uid;
        options.group = config.service_user->gid;
    }
    STELLARIUM_TRY(fuse::start_holder(options));
    STELLARIUM_ASSIGN(auto started, fuse::HolderClient::connect(socket));
    return MountHolder(std::move(started), true);
}

/// The runtime directory, the holder of a mounted directory, the user, and the files that are
/// within reach from here on.
Result<MountHolder> give_up_privileges(const DaemonConfig& config, Log& log) {
    MountHolder holder;
    if (config.service_user) {
        const ServiceUser& user = *config.service_user;
        STELLARIUM_TRY(check_access_of(user, config.store));
        STELLARIUM_TRY(
            control::make_private_directory(config.runtime_directory, config.socket_gid, user.uid));
        STELLARIUM_ASSIGN(holder, find_holder(config, log));
        STELLARIUM_TRY(become(user));
    } else if (geteuid() == 0) {
        log.warning("running as root",
                    {{"advice",
                      "start it with --user NAME, or as a user of its own; the store "
                      "must belong to that user"}});
    }
    STELLARIUM_TRY(control::make_private_directory(config.runtime_directory, config.socket_gid));
    if (!config.service_user) {
        STELLARIUM_ASSIGN(holder, find_holder(config, log));
    }
    return holder;
}

/// Before any thread is made. The port of the metrics, which is bound later, stays allowed.
Result<Confinement> confine_to_files_of(const DaemonConfig& config) {
    if (access(config.store.c_str(), F_OK) != 0) {
        return Confinement{.in_force = true, .detail = "no store"};  // Opening it says so.
    }
    ReachableFiles reachable{.store = config.store,
                             .runtime = config.runtime_directory,
                             .socket = config.socket,
                             .nbd_socket = config.nbd_socket,
                             .tcp_port = {}};
    if (!config.metrics_listen.empty()) {
        STELLARIUM_ASSIGN(const auto host_port, parse_host_port(config.metrics_listen));
        reachable.tcp_port = host_port.second;
    }
    return confine_files(config.sandbox, reachable);
}

/// Says what the process is confined to; loudly where that is less than was asked for.
void tell(const Confinement& files, const Confinement& calls, SandboxMode mode, Log& log) {
    const std::initializer_list<LogField> fields = {{"files", files.detail},
                                                    {"calls", calls.detail}};
    if ((files.in_force && calls.in_force) || mode == SandboxMode::kOff) {
        log.info("sandbox", fields);
    } else {
        log.warning("sandbox is incomplete", fields);
    }
}

/// Waits for a signal to stop, telling systemd's watchdog now and then that we live.
void wait_for_stop(Log& log) {
    const sigset_t set = stop_signals();
    uint64_t watchdog_us = 0;
    const bool watched = sd_watchdog_enabled(0, &watchdog_us) > 0;
    while (true) {
        siginfo_t info{};
        int signal_number = 0;
        if (watched) {
            const auto half = std::chrono::microseconds(watchdog_us / 2);
            const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(half);
            timespec timeout{};
            timeout.tv_sec = static_cast<time_t>(seconds.count());
            timeout.tv_nsec = static_cast<long>(std::chrono::nanoseconds(half - seconds).count());
            signal_number = sigtimedwait(&set, &info, &timeout);
            sd_notify(0, "WATCHDOG=1");
        } else {
            signal_number = sigwaitinfo(&set, &info);
        }
        if (sigismember(&set, signal_number) == 1) {
            log.info("stopping", {{"signal", std::to_string(signal_number)},
                                  {"sender_pid", std::to_string(info.si_pid)}});
            return;
        }
    }
}

/// A command may have the store for a moment, also one of the script that started us.
constexpr std::chrono::seconds kStoreTimeout{10};
constexpr std::chrono::milliseconds kStorePause{50};

bool another_daemon_answers(const io::Env& env, const std::string& store) {
    return std::ranges::any_of(
        control::control_socket_candidates(*env.files, store),
        [](const std::string& socket) { return control::connect_unix(socket).has_value(); });
}

/// Opens the store, waiting for a command that has it. nullptr when a signal to stop came first.
Result<std::unique_ptr<nova::Pool>> open_pool(const io::Env& env, const std::string& store,
                                              const nova::PoolOptions& options, Log& log) {
    const auto end = std::chrono::steady_clock::now() + kStoreTimeout;
    bool told = false;
    while (true) {
        auto pool = nova::Pool::open(env, store, options);
        if (pool || pool.error().code() != ErrorCode::kBusy ||
            std::chrono::steady_clock::now() >= end || another_daemon_answers(env, store)) {
            return pool;
        }
        if (!told) {
            told = true;
            log.info("waiting", {{"message", pool.error().message()}});
        }
        const sigset_t set = stop_signals();
        const timespec pause{.tv_sec = 0, .tv_nsec = std::chrono::nanoseconds(kStorePause).count()};
        if (const int signal_number = sigtimedwait(&set, nullptr, &pause); signal_number > 0) {
            log.info("stopping", {{"signal", std::to_string(signal_number)}});
            return nullptr;
        }
    }
}

/// Allocations above this are mappings of their own, and malloc() keeps few pools besides.
constexpr int kMmapThresholdBytes = 4 << 20;
constexpr int kMallocArenas = 8;

fuse::BootSource boot_source(boot::Boot& boot) {
    return {.images = [&boot](std::string_view source) -> Result<fuse::BootImages> {
                STELLARIUM_ASSIGN(boot::FileImages images, boot.file_images(source));
                return fuse::BootImages{.kernel = std::move(images.kernel),
                                        .initrd = std::move(images.initrd)};
            },
            .all = [&boot] { return boot.with_files(); }};
}

void set_status(const std::string& status) {
    sd_notify(0, ("STATUS=" + status).c_str());
}

/// A directory that nobody asked us for, and that is another store's, is left alone.
Result<void> adopt_mount(const DaemonConfig& config, MountHost& files, MountHolder holder,
                         Log& log) {
    std::optional<fuse::HolderClient> client = holder.take();
    if (!client) {
        return {};
    }
    Result<void> adopted = files.adopt(*std::move(client));
    if (!adopted && config.mount.empty() && adopted.error().code() == ErrorCode::kBusy) {
        log.warning("mount", {{"message", adopted.error().message()}});
        return {};
    }
    return adopted;
}

/// Everything between the store being open and being closed again.
Result<void> serve(const DaemonConfig& config, const std::string& version, nova::Pool& pool,
                   io::FileSystem& files, MountHolder holder, const Confinement& reach,
                   uint64_t max_descriptors, Log& log) {
    boot::Boot boot(pool, *io::real_env().clock,
                    {.background = true,
                     .prefetch_attached = config.boot_prefetch,
                     .notice = [&log](const std::string& sentence) {
                         log.warning("boot", {{"message", sentence}});
                     }});
    const auto attached = [&boot](const std::string& source) { boot.attached(source); };
    // First of all: what is open is attached before anybody else can be given it.
    MountHost mount(pool,
                    {.runtime_directory = config.runtime_directory,
                     .group = config.socket_gid,
                     .attached = attached,
                     .boots = boot_source(boot)},
                    log);
    STELLARIUM_TRY(adopt_mount(config, mount, std::move(holder), log));
    std::optional<NbdHost> nbd;
    uint64_t descriptors = descriptors_without_attachments(config.threads);
    if (!config.nbd_socket.empty()) {
        descriptors += kNbdDescriptors;
        if (descriptors > max_descriptors) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("this process may have {} descriptors, and needs {} with NBD: "
                                    "raise the hard limit (LimitNOFILE= in the systemd unit, or "
                                    "ulimit -Hn as root), or leave --nbd away",
                                    max_descriptors, descriptors));
        }
        nbd.emplace(pool,
                    NbdHostOptions{.socket_path = config.nbd_socket,
                                   .socket_gid = config.socket_gid,
                                   .threads = static_cast<unsigned>(config.threads),
                                   .attached = attached},
                    log);
    }
    MapHost maps(pool, config.runtime_directory + "/map.sock", config.socket_gid, log);
    VhostHost host(pool,
                   {.runtime_directory = config.runtime_directory,
                    .socket_gid = config.socket_gid,
                    .data_threads = static_cast<unsigned>(config.threads),
                    .descriptors = std::make_shared<Budget>(max_descriptors - descriptors),
                    .attached = attached},
                   log);
    Metrics metrics(pool, host, boot, mount, nbd ? &*nbd : nullptr, version);
    control::ControlService service(pool, {.host = &host,
                                           .files = &mount,
                                           .boot = &boot,
                                           .version = version,
                                           .directory = config.store,
                                           .socket = config.socket,
                                           .nbd_socket = config.nbd_socket,
                                           .map_socket = maps.socket_path()});
    DaemonHandler handler(service, metrics, log, [&mount] { mount.settle(); });
    MetricsHandler public_handler(metrics);
    HttpServer server({.max_held_bytes = held_bytes_of(config.memory_bytes)});

    STELLARIUM_TRY(host.start());
    STELLARIUM_TRY(mount.serve());
    if (nbd) {
        STELLARIUM_TRY(nbd->start());
    }
    STELLARIUM_TRY(maps.start());
    STELLARIUM_TRY(server.listen_unix(config.socket, {.group = config.socket_gid}, handler));
    if (!config.metrics_listen.empty()) {
        STELLARIUM_ASSIGN(const uint16_t port,
                          server.listen_tcp(config.metrics_listen, public_handler));
        log.info("metrics", {{"listen", config.metrics_listen}, {"port", std::to_string(port)}});
    }
    const auto recorded = control::write_daemon_record(
        files, config.store,
        {.pid = getpid(), .socket = config.socket, .runtime_directory = config.runtime_directory});
    if (!recorded && recorded.error().code() == ErrorCode::kNoSpace) {
        // Clients find the usual socket all the same.
        log.warning("store", {{"message", recorded.error().message()}});
    } else {
        STELLARIUM_TRY(recorded);
    }
    STELLARIUM_ASSIGN(const Confinement calls, confine_calls(config.sandbox));
    tell(reach, calls, config.sandbox, log);
    const nova::PoolStats stats = pool.stats();
    log.info("ready", {{"store", config.store},
                       {"socket", config.socket},
                       {"images", std::to_string(stats.images)},
                       {"volumes", std::to_string(stats.volumes)},
                       {"attachments", std::to_string(stats.attachments)}});
    sd_notify(0, "READY=1");
    set_status("serving " + config.store);

    wait_for_stop(log);
    sd_notify(0, "STOPPING=1");
    set_status("answering what was asked");
    service.stop_long_work();
    server.stop();
    // What takes long is done while guests are still served; without them little is left to do, and
    // their pause is short where another daemon follows.
    set_status("checkpointing");
    host.flush();
    if (nbd) {
        nbd->flush();
    }
    if (!pool.read_only_reason()) {
        if (const Result<void> result = pool.checkpoint(); !result) {
            log.error("checkpoint failed", {{"message", result.error().message()}});
        }
    }
    set_status("flushing guests' writes");
    maps.stop();
    if (nbd) {
        nbd->stop();
    }
    const bool files_wait = mount.stop();
    host.stop();
    if (!files_wait) {
        // Else it says where their holder is, to commands that have the store meanwhile.
        STELLARIUM_TRY(control::remove_daemon_record(files, config.store));
    }
    return {};
}

}  // namespace

Result<void> run_daemon(const DaemonConfig& given, const std::string& version, Log& log) {
    DaemonConfig config = given;
    // Every later thread inherits the mask; only wait_for_stop takes these signals.
    const sigset_t set = stop_signals();
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    signal(SIGPIPE, SIG_IGN);
    if (config.threads == 0) {
        config.threads = std::max(std::thread::hardware_concurrency(), 1U);
    }
    STELLARIUM_ASSIGN(const uint64_t max_descriptors,
                      check_process_limits(read_max_map_count(), config.threads));
    // Memory of large requests goes back to the system when they are done.
    mallopt(M_MMAP_THRESHOLD, kMmapThresholdBytes);
    mallopt(M_ARENA_MAX, kMallocArenas);

    const io::Env env = io::real_env();
    STELLARIUM_ASSIGN(MountHolder holder, give_up_privileges(config, log));
    STELLARIUM_ASSIGN(const Confinement reach, confine_to_files_of(config));
    set_status("opening " + config.store);
    log.info("starting", {{"version", version},
                          {"pid", std::to_string(getpid())},
                          {"store", config.store},
                          {"runtime_dir", config.runtime_directory}});
    config.memory_bytes = memory_to_use(config, *env.files, log);
    nova::PoolOptions options;
    options.store.verify_always = config.verify_always;
    options.store.allow_unsafe_file_system = config.allow_unsafe_file_system;
    options.runtime_directory = config.runtime_directory;
    options.dirty_budget_bytes = config.dirty_budget_bytes();
    options.node_cache_bytes = config.node_cache_bytes();
    options.writeback_age = std::chrono::milliseconds(config.writeback_age_ms);
    options.gc = config.gc;
    options.scrub = config.scrub;
    options.store.reserve_bytes = nebula::kReserveBytes;
    options.notice = [&log](const std::string& sentence) {
        log.warning("store", {{"message", sentence}});
    };
    STELLARIUM_ASSIGN(const std::unique_ptr<nova::Pool> pool,
                      open_pool(env, config.store, options, log));
    if (!pool) {
        return {};
    }
    for (const std::string& warning : pool->warnings()) {
        log.warning("store", {{"message", warning}});
    }
    if (const auto reason = pool->read_only_reason()) {
        log.error("store is read-only", {{"message", *reason}});
    }
    const Result<void> served =
        serve(config, version, *pool, *env.files, std::move(holder), reach, max_descriptors, log);
    set_status("checkpointing");
    // Also after a failed start: what recovery adopted must not wait for the next one.
    const Result<void> closed = pool->close();
    if (!served) {
        return served;
    }
    STELLARIUM_TRY(closed);
    log.info("stopped");
    return {};
}

}  // namespace stellarium::daemon
