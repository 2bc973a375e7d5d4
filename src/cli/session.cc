#include "cli/session.h"

#include <array>
#include <cerrno>
#include <cstdlib>

#include <fmt/format.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/locations.h"
#include "control/service.h"
#include "io/posix.h"
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

class DirectSession final : public Session {
  public:
    DirectSession(std::unique_ptr<nova::Pool> pool, const std::string& directory)
        : pool_(std::move(pool)),
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
    Result<void> close() override { return pool_->close(); }

  private:
    std::unique_ptr<nova::Pool> pool_;
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

std::unique_ptr<Session> daemon_session(const std::string& socket,
                                        const std::vector<uid_t>& trusted_users,
                                        std::unique_ptr<control::ControlClient> client) {
    return std::make_unique<DaemonSession>(socket, trusted_users, std::move(client));
}

}  // namespace

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
    const io::Env env = io::real_env();
    // Some of these places lie in folders where others may write, too.
    std::vector<uid_t> trusted{geteuid(), 0};
    if (struct stat status{}; stat(directory.c_str(), &status) == 0) {
        trusted.push_back(status.st_uid);
    }
    std::optional<Error> denied;
    for (const std::string& candidate : control::control_socket_candidates(*env.files, directory)) {
        auto client = control::connect_unix(candidate, trusted);
        if (client) {
            return daemon_session(candidate, trusted, *std::move(client));
        }
        if (client.error().code() == ErrorCode::kPermissionDenied) {
            denied = client.error();
        }
    }
    Result<void> owner = check_owner(directory);
    if (!owner) {
        return std::unexpected(owner.error());
    }
    nova::PoolOptions options;
    options.allow_stale = location.allow_stale;
    options.store.allow_unsafe_file_system = location.allow_unsafe_file_system;
    // A command does what it was asked for.
    options.gc.automatic = false;
    Result<std::unique_ptr<nova::Pool>> pool = nova::Pool::open(env, directory, options);
    if (!pool) {
        // Perhaps a daemon is there after all, and not for us.
        if (denied && (pool.error().code() == ErrorCode::kBusy ||
                       pool.error().code() == ErrorCode::kPermissionDenied)) {
            return std::unexpected(*denied);
        }
        if (pool.error().code() == ErrorCode::kBusy) {
            return std::unexpected(
                Error(ErrorCode::kBusy,
                      pool.error().message() +
                          "; it does not answer as a daemon (if it is one that is just starting or "
                          "stopping, try again; if its socket is elsewhere, give --socket)"));
        }
        return std::unexpected(pool.error());
    }
    return std::make_unique<DirectSession>(*std::move(pool), directory);
}

}  // namespace stellarium::cli
