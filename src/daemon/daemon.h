// The daemon as a whole: owns a store, serves its volumes to guests, answers the control socket.
//
//     DaemonConfig config = ...;           // checked: finish_config() had no complaints
//     Log log(config.log_level, config.log_format);
//     auto result = run_daemon(config, version, log);   // returns after SIGTERM, SIGINT or SIGHUP
//
// Order of start: runtime directory made, root's identity given up (--user), files out of reach
// (Landlock), store opened (recovered, arena adopted), attachments restored, control socket
// answers, system calls out of reach (seccomp), systemd told READY. Order of stop: control requests
// answered and streams broken off, a flush and a checkpoint while guests are still served, guests
// disconnected and the rest of their writes flushed, store released.
//
// Thread rule: call from the main thread, before any other thread exists (it masks signals).
#pragma once

#include <string>

#include "base/error.h"
#include "daemon/config.h"
#include "daemon/log.h"

namespace stellarium::daemon {

Result<void> run_daemon(const DaemonConfig& config, const std::string& version, Log& log);

}  // namespace stellarium::daemon
