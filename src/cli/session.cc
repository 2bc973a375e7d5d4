#include "cli/session.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <thread>

#include <fmt/format.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/block_device.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "control/locations.h"
#include "control/service.h"
#include "frontend/fuse/left_open.h"
#include "io/posix.h"
#include "nebula/reserve.h"
#include "nova/pool.h"

namespace stellarium::cli {
namespace {

class DaemonSession final : public Session {
  public:
    DaemonSession(std::string socket, std::vector<uid_t> trusted_users,
                  std::unique_ptr<control::ControlClient> client)
        : socket_(std::move(socket)),
          trusted_users_(std::move(trusted_users)),
          client_(std::move(client)) {}

    control::ControlClient& client() override { return *client_; }
    std::unique_ptr<control::ControlClient> second_client() override {
        auto second = control::connect_unix(socket_, trusted_users_);
        return second ? *std::move(second) : nullptr;
    }
    bool through_daemon() const override { return true; }
    std::vector<std::string> warnings() const override { return {}; }
    Result<void> close() override { return {}; }

  private:
    std::string socket_;
    std::vector<uid_t> trusted_users_;
    std::unique_ptr<control::ControlClient> client_;
};

using OpenFiles = std::vector<std::shared_ptr<BlockDevice>>;

class DirectSession final : public Session {
  public:
    DirectSession(std::unique_ptr<nova::Pool> pool, OpenFiles open_files,
                  const std::string& directory)
        : pool_(std::move(pool)),
          open_files_(std::move(open_files)),
          service_(*pool_, {.host = nullptr,
                            .version = STELLARIUM_VERSION,
                            .directory = directory,
                            .socket = {}}),
          client_(control::connect_in_process(service_)) {}

    control::ControlClient& client() override { return *client_; }
    std::unique_ptr<control::ControlClient> second_client() override {
        return control::connect_in_process(service_);
    }
    bool through_daemon() const override { return false; }
    std::vector<std::string> warnings() const override { return pool_->warnings(); }
    Result<void> close() override {
        open_files_.clear();
        return pool_->close();
    }

  private:
    std::unique_ptr<nova::Pool> pool_;
    OpenFiles open_files_;  ///< Attached, so that nothing happens to them meanwhile.
    control::ControlService service_;
    std::unique_ptr<control::ControlClient> client_;
};

std::string user_name(uid_t user) {
    passwd entry{};
    passwd* found = nullptr;
    std::array<char, 16384> buffer{};
    if (getpwuid_r(user, &entry, buffer.data(), buffer.size(), &found) == 0 && found != nullptr) {
        return entry.pw_name;
    }
    return std::to_string(user);
}

std::unique_ptr<Session> daemon_session(const std::string& socket,
                                        const std::vector<uid_t>& trusted_users,
                                        std::unique_ptr<control::ControlClient> client) {
    return std::make_unique<DaemonSession>(socket, trusted_users, std::move(client));
}

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kFirstPause{5};
constexpr std::chrono::milliseconds kLongestPause{100};
/// A person who waits longer is told for what.
constexpr std::chrono::seconds kSilentWait{1};

/// Who holds a store, as far as can be seen.
struct Holder {
    std::string pid;      ///< "" when it is not known.
    std::string program;  ///< "stellarctl"; "" when it is not known.

    std::string text() const {
        if (pid.empty()) {
            return "another process";
        }
        return program.empty() ? "process " + pid : fmt::format("process {} ({})", pid, program);
    }
};

Holder holder_of(const std::string& directory) {
    Holder holder;
    std::ifstream(directory + "/lock") >> holder.pid;
    if (holder.pid.empty() || holder.pid.find_first_not_of("0123456789") != std::string::npos) {
        return {};
    }
    std::ifstream(fmt::format("/proc/{}/comm", holder.pid)) >> holder.program;
    return holder;
}

Error busy_error(const Holder& holder, const StoreLocation& location,
                 const std::string& directory) {
    const std::string waited =
        location.lock_timeout.count() == 0
            ? std::string()
            : fmt::format(" (waited {} s)",
                          std::chrono::duration<double>(location.lock_timeout).count());
    const std::string held =
        fmt::format("the store {} is held by {}{}", directory, holder.text(), waited);
    if (holder.program == "stellariumd") {
        return {ErrorCode::kBusy,
                held +
                    ", a daemon that does not answer: if it is just starting or stopping, try "
                    "again; if its socket is elsewhere, give --socket"};
    }
    if (holder.program == "stellarctl") {
        return {ErrorCode::kBusy, held +
                                      ", another command: try again when it has ended, wait "
                                      "longer with --lock-timeout, or start a daemon, which "
                                      "serves many commands at the same time"};
    }
    return {ErrorCode::kBusy, held +
                                  ", which does not answer as a daemon: end it, or if it is a "
                                  "daemon whose socket is elsewhere, give --socket"};
}

/// The daemon of the store, or nothing when none answers.
/// kPermissionDenied when there may be one that this user is not to talk to.
Result<std::unique_ptr<Session>> find_daemon(const std::string& directory,
                                             const std::vector<uid_t>& trusted) {
    std::optional<Error> denied;
    for (const std::string& candidate :
         control::control_socket_candidates(*io::real_env().files, directory)) {
        auto client = control::connect_unix(candidate, trusted);
        if (client) {
            return daemon_session(candidate, trusted, *std::move(client));
        }
        if (client.error().code() == ErrorCode::kPermissionDenied) {
            denied = client.error();
        }
    }
    if (denied) {
        return std::unexpected(*denied);
    }
    return nullptr;
}

Result<std::unique_ptr<Session>> open_direct(const std::string& directory,
                                             const StoreLocation& location) {
    STELLARIUM_TRY(check_owner(directory));
    nova::PoolOptions options;
    options.allow_stale = location.allow_stale;
    options.store.allow_unsafe_file_system = location.allow_unsafe_file_system;
    // A command does what it was asked for.
    options.gc.automatic = false;
    options.store.reserve_bytes = nebula::kReserveBytes;
    STELLARIUM_ASSIGN(std::unique_ptr<nova::Pool> pool,
                      nova::Pool::open(io::real_env(), directory, options));
    STELLARIUM_ASSIGN(OpenFiles open_files,
                      fuse::hold_open_files(*pool, control::runtime_directory_candidates(
                                                       *io::real_env().files, directory)));
    return std::make_unique<DirectSession>(std::move(pool), std::move(open_files), directory);
}

}  // namespace

/// Files that root would make in another user's store would shut its daemon out.
Result<void> check_owner(const std::string& directory) {
    struct stat status{};
    if (stat(directory.c_str(), &status) != 0 || status.st_uid == geteuid() || geteuid() != 0) {
        return {};
    }
    const std::string owner = user_name(status.st_uid);
    return fail(ErrorCode::kPermissionDenied,
                fmt::format("no daemon serves the store {}, and it belongs to user {}: start its "
                            "daemon, or run this command as that user (sudo -u {} stellarctl ...)",
                            directory, owner, owner));
}

bool is_held_by_daemon(const std::string& directory) {
    return holder_of(directory).program == "stellariumd";
}

Result<std::string> store_directory(const StoreLocation& location) {
    if (!location.store.empty()) {
        return control::real_path(location.store);
    }
    STELLARIUM_ASSIGN(const std::string directory, control::default_store_directory());
    return control::real_path(directory);
}

Result<std::unique_ptr<Session>> Session::open(const StoreLocation& location) {
    STELLARIUM_ASSIGN(std::unique_ptr<Session> session, open_any(location));
    if (location.allow_stale && session->through_daemon()) {
        return fail(ErrorCode::kInvalidArgument,
                    "--allow-stale reads the store directly: stop its daemon first");
    }
    return session;
}

Result<std::unique_ptr<Session>> Session::open_any(const StoreLocation& location) {
    std::string socket = location.socket;
    if (const char* const given = std::getenv("STELLARIUM_SOCKET");
        socket.empty() && location.store.empty() && given != nullptr) {
        socket = given;
    }
    if (!socket.empty()) {
        STELLARIUM_ASSIGN(auto client, control::connect_unix(socket));
        if (!location.store.empty()) {
            STELLARIUM_ASSIGN(const control::Json version, client->call("GET", "/v1/version"));
            const std::string served = version.value("directory", std::string());
            if (served != control::real_path(location.store)) {
                return fail(ErrorCode::kInvalidArgument,
                            fmt::format("the daemon at {} serves {}, not {}", socket, served,
                                        location.store));
            }
        }
        return daemon_session(socket, {}, std::move(client));
    }

    STELLARIUM_ASSIGN(const std::string directory, store_directory(location));
    // Some places of sockets lie in folders where others may write, too.
    std::vector<uid_t> trusted{geteuid(), 0};
    if (struct stat status{}; stat(directory.c_str(), &status) == 0) {
        trusted.push_back(status.st_uid);
    }
    const Clock::time_point begin = Clock::now();
    const auto daemon_timeout =
        std::min<std::chrono::milliseconds>(location.lock_timeout, kDaemonTimeout);
    std::chrono::milliseconds pause = kFirstPause;
    bool told = false;
    while (true) {
        STELLARIUM_TRY(check_interrupt());
        Result<std::unique_ptr<Session>> session = find_daemon(directory, trusted);
        if (session && *session) {
            return session;
        }
        const auto waited = Clock::now() - begin;
        // The store is left alone meanwhile, or the daemon could not have it.
        if (!session || !location.needs_daemon || waited >= daemon_timeout) {
            const std::optional<Error> denied =
                session ? std::nullopt : std::optional(session.error());
            session = open_direct(directory, location);
            if (session || session.error().code() != ErrorCode::kBusy) {
                // Perhaps a daemon is there after all, and not for us.
                return !session && denied && session.error().code() == ErrorCode::kPermissionDenied
                           ? std::unexpected(*denied)
                           : std::move(session);
            }
            if (denied) {
                return std::unexpected(*denied);
            }
            if (waited >= location.lock_timeout) {
                return std::unexpected(busy_error(holder_of(directory), location, directory));
            }
            if (!told && waited >= kSilentWait && isatty(STDERR_FILENO) == 1) {
                told = true;
                complain(fmt::format("stellarctl: waiting for {}, which holds the store\n",
                                     holder_of(directory).text()));
            }
        }
        std::this_thread::sleep_for(pause);
        pause = std::min(pause * 2, kLongestPause);
    }
}

}  // namespace stellarium::cli
