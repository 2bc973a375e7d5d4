// Serves block devices to guests by vhost-user-blk: one unix socket for each device.
//
// A VMM (the protocol's front-end) connects to the socket, shares the guest's memory and
// virtqueues, and this server (the back-end) does the guest's requests on the BlockDevice. One
// front-end at a time: a further one waits until the first is gone and its requests are finished,
// and a front-end that lost its connection may connect again (QEMU `reconnect=1`).
//
// Threads: `data_threads` threads serve all devices; each device, with its socket and all its
// virtqueues, is pinned to one of them. What a device cannot do without waiting is done by a pool
// of `blocking_threads`, in turn between devices, so that a stalled device stalls only itself.
// Guests are hostile: whoever breaks the protocol, or shares memory that vanishes, is disconnected
// with a logged reason, and may connect again.
//
// Thread rule: all functions may be called from any thread; attach and detach of one name not at
// the same time. The logger is called from any thread and must not call back.
// Ownership: a BlockDevice is shared until detach() has returned.
// Durability: that of BlockDevice. A guest's flush is answered when flush_async is; a guest that
// did not negotiate flushes, or switched the write cache off, gets every write flushed.
//
//     auto server = VhostServer::create({.data_threads = 2, .logger = log});
//     (*server)->attach("vm1", volume, {.socket_path = "/run/stellarium/vm1.sock"});
//     ...
//     (*server)->detach("vm1");
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/block_device.h"
#include "base/budget.h"
#include "base/error.h"
#include "base/rate_limits.h"
#include "frontend/vhost/request.h"

namespace stellarium::vhost {

enum class LogLevel : uint8_t { kInfo, kWarning, kError };
using Logger = std::function<void(LogLevel, std::string_view device, std::string_view message)>;

/// Every member has an initialiser, so that designated ones may name a few.
struct ServerOptions {
    unsigned data_threads = 0;  ///< 0: one for each processor.
    unsigned blocking_threads = 4;
    Logger logger = {};  ///< Empty: nothing is logged.
    /// For what connected front-ends take: their sockets, and the descriptors that they send. One
    /// that would need more is disconnected. Empty: no bound. Beside it each data thread may hold
    /// kMaxFdsPerMessage for a moment.
    std::shared_ptr<Budget> descriptors = {};
    /// Nanoseconds of a clock that does not go back, for limits of rate; called from any data
    /// thread. Empty: the system's. For tests.
    std::function<uint64_t()> clock = {};
};

struct AttachOptions {
    /// Where to listen; created with mode 0600. A stale socket there is replaced, a live one or
    /// another kind of file refused.
    std::string socket_path = {};
    /// Alternatively a listening unix stream socket, which this takes over even when it fails.
    int listen_fd = -1;
    uint16_t queues = 1;
    uint32_t block_size_bytes = 512;  ///< 512 or 4096; what the guest sees as logical block.
    bool read_only = false;           ///< Also when the device itself could be written.
    std::string serial = {};          ///< At most 20 bytes; empty: the device's own.
    RateLimits limits = {};           ///< Over all of its queues.
};

/// Totals since attach.
struct RequestTotals {
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t errors = 0;      ///< Answered with anything but OK.
    uint64_t latency_ns = 0;  ///< Summed from taking the request to completing it.
};

struct AttachmentStatus {
    std::string name;
    std::string socket_path;  ///< Empty when a descriptor was given.
    uint16_t queues = 0;
    uint32_t block_size_bytes = 0;
    bool read_only = false;
    bool connected = false;
    int peer_pid = 0;  ///< Of the connected front-end.
    uint64_t in_flight = 0;
    uint64_t connections = 0;         ///< Front-ends that connected since attach.
    uint64_t forced_disconnects = 0;  ///< Of those, disconnected for breaking the protocol.
    std::string last_fault;           ///< Why the last of those was.
    RateLimits limits;
    uint64_t throttled_requests = 0;  ///< Taken later than they could have been, for a limit.
    uint64_t throttled_ns = 0;        ///< In which such requests waited; in steps, after each wait.
    std::array<RequestTotals, kRequestKinds> totals;  ///< By RequestKind.

    const RequestTotals& of(RequestKind kind) const { return totals[static_cast<size_t>(kind)]; }
};

/// "read", "write", "flush", "discard", "write_zeroes", "get_id", "unknown": for metrics.
std::string_view request_kind_name(RequestKind kind);

class VhostServer {
  public:
    static Result<std::unique_ptr<VhostServer>> create(ServerOptions options);
    /// shutdown().
    ~VhostServer();
    VhostServer(const VhostServer&) = delete;
    VhostServer& operator=(const VhostServer&) = delete;

    /// Listens when it returns. Errors: kInvalidArgument, kAlreadyExists (name or path taken),
    /// kBusy (something listens on that path), kIo.
    Result<void> attach(std::string name, std::shared_ptr<BlockDevice> device,
                        AttachOptions options);
    /// Takes no more requests, finishes those that the device has begun, disconnects the guest,
    /// removes the socket. Requests that wait for a thread are given up without an answer: the
    /// front-end finds them in its in-flight region when it connects again. Waits as long as the
    /// device takes for what it has begun. kNotFound.
    Result<void> detach(std::string_view name);
    /// Limits the requests of an attached device, from the next turn of its thread on; without any
    /// limit, no more. Requests that wait for the present ones are looked at again. What is owed
    /// under the present ones remains so. kInvalidArgument, kNotFound.
    Result<void> set_limits(std::string_view name, const RateLimits& limits);
    std::vector<AttachmentStatus> status() const;
    Result<AttachmentStatus> status(std::string_view name) const;
    /// Detaches everything and stops the threads. Further attaches fail with kUnavailable.
    void shutdown();

  private:
    struct Impl;
    explicit VhostServer(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace stellarium::vhost
