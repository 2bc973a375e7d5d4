// One control request and its answer, as values: what HTTP carries, without HTTP.
//
// Thread rule: values.
#pragma once

#include <memory>
#include <string>

#include "base/error.h"
#include "control/sparse_stream.h"

namespace stellarium::control {

/// What most requests may take.
inline constexpr size_t kUsualJsonBytes = size_t{1} << 20;

struct Request {
    std::string method;  ///< "GET", "HEAD", "POST", "PUT", "DELETE".
    std::string target;  ///< Path and query, percent-encoded: "/v1/images/debian".
    std::string body;    ///< JSON text, or empty.
    /// Content for requests that upload; borrowed for the call. nullptr for all others.
    SparseSource* upload = nullptr;
};

struct Response {
    int status = 200;
    std::string content_type = "application/json";
    std::string body;
    std::string allow;  ///< With status 405: the methods that are possible.
    /// Content of answers that download: `body` is empty then.
    std::unique_ptr<SparseSource> download;
};

/// The answer for a failed request: the status of the one table, and the error as JSON.
Response error_response(const Error& error);

/// What answers requests: a ControlService, or a stand-in.
/// Thread rule: every function may be called from any thread at the same time.
class RequestHandler {
  public:
    virtual ~RequestHandler() = default;
    /// True when a request of this method and target carries content rather than JSON. Asked
    /// before a body is read.
    virtual bool wants_upload(const std::string& method, const std::string& target) const = 0;
    /// How long the body of such a request may be. Asked before it is read.
    virtual size_t max_json_bytes(const std::string& method, const std::string& target) const;
    /// Never throws; errors are answers. May block as long as the operation takes.
    virtual Response handle(const Request& request) = 0;
};

}  // namespace stellarium::control
