// The client's side of the control interface: JSON in, JSON or an Error out, whatever carries it.
//
//     auto client = connect_in_process(service);            // no daemon
//     auto client = connect_unix("/run/.../control.sock");  // a daemon
//     STELLARIUM_ASSIGN(Json stats, (*client)->call("GET", "/v1/stats"));
//
// Thread rule: a client belongs to one thread at a time; make another for another thread.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include <sys/types.h>

#include "control/json.h"
#include "control/message.h"

namespace stellarium::control {

class ControlClient {
  public:
    virtual ~ControlClient() = default;

    /// Sends a request with a JSON body (or none) and gives the JSON answer; null for an empty one.
    Result<Json> call(std::string_view method, std::string target);
    Result<Json> call(std::string_view method, std::string target, const Json& body);
    /// Sends content. An error of `source` itself stops the operation and is returned.
    Result<Json> upload(std::string target, SparseSource& source);
    /// Gets content; its header has been read, so size_hint() is known. The client must outlive it
    /// and make no other call meanwhile.
    Result<std::unique_ptr<SparseSource>> download(std::string target);

  protected:
    /// Delivers one request. Errors are those of the transport; an error status is an answer.
    virtual Result<Response> exchange(const Request& request) = 0;
};

/// Calls the handler directly; it outlives the client.
std::unique_ptr<ControlClient> connect_in_process(RequestHandler& handler);

/// HTTP/1.1 over a unix socket. kUnavailable when nobody listens at `socket_path` (the file is
/// missing or stale), kPermissionDenied when it may not be opened, or when the listener is none of
/// `trusted_users` (empty: whoever it is, because a person named this socket).
Result<std::unique_ptr<ControlClient>> connect_unix(const std::string& socket_path,
                                                    std::span<const uid_t> trusted_users = {});

}  // namespace stellarium::control
