// Serves exports to NBD clients on one unix socket.
//
//     auto server = Server::start(volumes, {.listen_fd = fd, .logger = log});
//     ...
//     (*server)->stop();     // answers what was asked, closes what is open
//
// Fixed newstyle handshake; structured replies, base:allocation, several connections to an export.
// README.md says what of the protocol is there.
//
// Threads: `threads` threads serve all clients, each client pinned to one of them; what the device
// cannot do without waiting is done by threads of a pool, in turns between exports. Requests of a
// client run at the same time, and are answered in the order in which they are done.
// Bounds: limits.h. A client that breaks the protocol, takes no answers or stops in the middle of
// what it sends is disconnected.
//
// Thread rule: start and stop from one thread, status from any. The logger is called from any
// thread.
// Ownership: the source outlives the server.
// Durability: that of BlockDevice. FLUSH, and writes with FUA, are answered when flush_async is.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "base/error.h"
#include "frontend/nbd/export.h"
#include "frontend/nbd/limits.h"

namespace stellarium::nbd {

/// Every member has an initialiser, so that designated ones may name a few.
struct ServerOptions {
    /// A listening unix stream socket, which the server takes over even when it fails.
    int listen_fd = -1;
    unsigned threads = 0;  ///< 0: one for each processor, at most kMaxThreads.
    unsigned max_clients = kMaxClients;
    std::chrono::milliseconds handshake_timeout = kHandshakeTimeout;
    std::chrono::milliseconds stall_timeout = kStallTimeout;
    /// Told what an operator should see: requests that failed, clients that broke the protocol.
    std::function<void(std::string_view export_name, std::string_view message)> logger = {};
};

/// The kinds of requests that are counted; the same order as command_name().
inline constexpr size_t kCommandKinds = 7;
/// "read", "write", "flush", "trim", "cache", "write_zeroes", "block_status": for metrics.
std::string_view command_name(size_t kind);

struct CommandTotals {
    uint64_t requests = 0;
    uint64_t bytes = 0;   ///< Of those that succeeded.
    uint64_t errors = 0;  ///< Answered with one.
};

struct ServerStatus {
    uint64_t clients = 0;             ///< Connected now.
    uint64_t connections = 0;         ///< Ever.
    uint64_t forced_disconnects = 0;  ///< For breaking the protocol, or taking too long.
    uint64_t pending_bytes = 0;       ///< Of pieces beyond clients' reserves.
    std::array<CommandTotals, kCommandKinds> totals{};
};

class Server {
  public:
    static Result<std::unique_ptr<Server>> start(ExportSource& source, ServerOptions options);
    ~Server();  ///< stop().
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    ServerStatus status() const;
    /// Takes no more, answers what was asked (a client that does not take its answers is cut off
    /// after kDrainTimeout), releases all exports, joins all threads. Waits as long as the devices
    /// take for what they have begun.
    void stop();

  private:
    struct Impl;
    explicit Server(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace stellarium::nbd
