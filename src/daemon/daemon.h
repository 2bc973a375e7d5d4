// The daemon as a whole: owns a store, serves its volumes to guests, answers the control socket.
//
//     DaemonConfig config = ...;           // checked: finish_config() had no complaints
//     Log log(config.log_level, config.log_format);
//     auto result = run_daemon(config, version, log);   // returns after SIGTERM, SIGINT or SIGHUP
//
// Order of start: store opened (recovered, arena adopted), attachments restored, control socket
// answers, systemd told READY. Order of stop, the reverse: control requests answered and streams
// broken off, guests disconnected and their writes flushed, store checkpointed and released.
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
