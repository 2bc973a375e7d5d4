// Answers HTTP/1.1 on unix sockets and TCP with a RequestHandler.
//
//     HttpServer server({});
//     STELLARIUM_TRY(server.listen_unix("/run/.../control.sock", {}, service));
//     ...
//     server.stop();  // takes no more, answers what it took, ends streams
//
// Threads: one thread does all socket work and never blocks. JSON requests run on `workers`
// threads. Uploads and downloads, which last as long as the content is long, run on threads of
// their own (at most max_streams), so they delay nobody else.
// Bounds: header 16 KiB, JSON body what the handler takes; each listening socket has its own
// number of connections, beyond which the longest idle one is closed, and further ones wait in the
// backlog while none is idle; bodies and answers that are held at once have a bound over all
// connections, beyond which a request is told to come again (409); idle and slow clients are cut
// off after header_timeout, a content stream of which no byte has moved after stall_timeout.
// Strangers: everything is parsed by Boost.Beast within these bounds; a malformed request gets a
// 400 and is disconnected.
//
// Thread rule: listen_* and stop() from one thread; the handler is called from many.
// Ownership: handlers outlive the server.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <sys/types.h>

#include "base/error.h"
#include "control/message.h"
#include "daemon/limits.h"

namespace stellarium::daemon {

struct HttpServerOptions {
    unsigned workers = kHttpWorkers;
    unsigned max_streams = kMaxStreams;
    unsigned max_streams_per_user = kMaxStreamsPerUser;  ///< Of the user behind a unix socket.
    unsigned max_connections = kMaxConnections;          ///< Of each unix socket.
    unsigned max_tcp_connections = kMaxTcpConnections;   ///< Of each TCP port.
    size_t max_held_bytes = kMaxHeldBytes;  ///< Of bodies and answers, over all connections.
    std::chrono::milliseconds header_timeout{30'000};  ///< For a header, a JSON body, an answer.
    std::chrono::milliseconds stall_timeout{60'000};   ///< For the next byte of a stream.
};

struct UnixListenOptions {
    std::optional<gid_t> group;  ///< Mode 0660 for this group instead of 0600.
};

class HttpServer {
  public:
    explicit HttpServer(HttpServerOptions options);
    ~HttpServer();  ///< stop().
    HttpServer(const HttpServer&) = delete;
    HttpServer& operator=(const HttpServer&) = delete;

    /// Listens when it returns. A stale socket file is replaced; kBusy when somebody answers there,
    /// kAlreadyExists for any other kind of file.
    Result<void> listen_unix(const std::string& path, const UnixListenOptions& options,
                             control::RequestHandler& handler);
    /// "HOST:PORT", "[V6]:PORT"; port 0 takes a free one. Returns the port.
    Result<uint16_t> listen_tcp(const std::string& address, control::RequestHandler& handler);

    /// Stops listening, removes the socket files, lets running JSON requests finish and answers
    /// them, breaks streams off, joins all threads. Afterwards nothing can be listened on.
    void stop();

  private:
    struct Impl;
    std::shared_ptr<Impl> impl_;
};

/// Takes "IP:PORT", "[V6]:PORT" or "localhost:PORT" apart. kInvalidArgument with an example.
Result<std::pair<std::string, uint16_t>> parse_host_port(const std::string& address);

}  // namespace stellarium::daemon
