// What stellariumd is told: a JSON file, and the command line over it. Everything is checked before
// anything starts, and every fault is reported at once, with its key.
//
//     DaemonConfig config;
//     auto complaints = apply_settings(*parse_json(text, path), config);   // then the command line
//     if (complaints.empty()) complaints = finish_config(config);
//
// The file's keys are the options' names with '_' for '-': {"store": "...", "memory": "1GiB"}.
//
// Thread rule: values.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

#include "base/units.h"
#include "control/json.h"
#include "daemon/limits.h"
#include "daemon/log.h"
#include "daemon/sandbox.h"
#include "nova/pool.h"

namespace stellarium::daemon {

/// Whom the daemon becomes when root starts it.
struct ServiceUser {
    std::string name;
    uid_t uid = 0;
    gid_t gid = 0;
};

struct DaemonConfig {
    std::string store;              ///< "": the default store.
    std::string socket;             ///< "": in the runtime directory.
    std::string runtime_directory;  ///< "": derived from the store.
    bool nbd = false;               ///< Images, volumes and snapshots are served by NBD, too.
    std::string nbd_socket;         ///< "": in the runtime directory, if `nbd`.
    std::string metrics_listen;     ///< HOST:PORT; "": metrics on the control socket only.
    std::string mount;              ///< Directory for files; "": none.
    std::string socket_group;       ///< "": sockets are for the daemon's own user.
    std::optional<gid_t> socket_gid;
    std::string user;  ///< "": stays who it is.
    std::optional<ServiceUser> service_user;
    SandboxMode sandbox = SandboxMode::kAuto;
    uint64_t memory_bytes = kDefaultMemoryBytes;  ///< Dirty pages (four fifths), cached map nodes.
    bool memory_given = false;  ///< Nobody chose it: less is taken where there is no room for it.
    uint64_t writeback_age_ms = 5000;
    uint64_t threads = 0;  ///< Serving guests; 0: one for each processor.
    bool verify_always = false;
    bool boot_prefetch = true;  ///< Of what is attached and has a boot manifest.
    nova::GcPolicy gc{};
    nova::ScrubPolicy scrub{.every = std::chrono::days(30)};
    bool allow_unsafe_file_system = false;
    LogLevel log_level = LogLevel::kInfo;
    LogFormat log_format = LogFormat::kText;

    uint64_t dirty_budget_bytes() const { return memory_bytes / 5 * 4; }
    uint64_t node_cache_bytes() const { return memory_bytes - dirty_budget_bytes(); }
};

/// Takes what `settings` names into `config`. Returns every complaint; "" prefix-free, with key.
std::vector<std::string> apply_settings(const control::Json& settings, DaemonConfig& config);

/// Fills in defaults and checks what depends on several keys, or on this machine.
std::vector<std::string> finish_config(DaemonConfig& config);

}  // namespace stellarium::daemon
