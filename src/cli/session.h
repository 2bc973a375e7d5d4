// The way to a store: through the daemon that holds it, or directly when none does.
//
//     STELLARIUM_ASSIGN(auto session, Session::open({.store = "/srv/pool"}));
//     STELLARIUM_ASSIGN(Json stats, session->client().call("GET", "/v1/stats"));
//     STELLARIUM_TRY(session->close());
//
// The daemon is looked for where control/locations.h says; --socket names one and is then the only
// way. A store is held by one process at a time: another command is waited for, and so is a daemon
// that is just starting, as long as `lock_timeout` says; then it is kBusy, naming the holder.
//
// Thread rule: one thread.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "control/client.h"

namespace stellarium::cli {

inline constexpr std::chrono::seconds kDefaultLockTimeout{10};
/// How long a command that needs a daemon waits for one to show up: `stellariumd &` has just run.
inline constexpr std::chrono::seconds kDaemonTimeout{3};

struct StoreLocation {
    std::string store;   ///< "": $STELLARIUM_STORE, then the default.
    std::string socket;  ///< "": $STELLARIUM_SOCKET, then looked for.
    bool allow_unsafe_file_system = false;
    bool allow_stale = false;  ///< See nova::PoolOptions; refused with a daemon.
    std::chrono::milliseconds lock_timeout = kDefaultLockTimeout;  ///< 0: does not wait.
    /// Waits for a daemon, at most kDaemonTimeout, before it goes without one.
    bool needs_daemon = false;
};

/// Refuses (kPermissionDenied) that root makes files in another user's store.
Result<void> check_owner(const std::string& directory);
/// By what the lock file says; whoever wrote it may be gone.
bool is_held_by_daemon(const std::string& directory);

/// The store that `location` means.
Result<std::string> store_directory(const StoreLocation& location);

class Session {
  public:
    static Result<std::unique_ptr<Session>> open(const StoreLocation& location);
    virtual ~Session() = default;

    virtual control::ControlClient& client() = 0;
    /// A second client of the same store, for looking on while the first is busy; nullptr if none
    /// can be made.
    virtual std::unique_ptr<control::ControlClient> second_client() = 0;
    virtual bool through_daemon() const = 0;
    /// What opening the store had to say; a daemon says it in its own log.
    virtual std::vector<std::string> warnings() const = 0;
    /// Leaves the store in order. Without it, everything that succeeded is durable all the same.
    virtual Result<void> close() = 0;

  private:
    static Result<std::unique_ptr<Session>> open_any(const StoreLocation& location);
};

}  // namespace stellarium::cli
