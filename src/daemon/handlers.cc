#include "daemon/handlers.h"

#include <chrono>

#include <fmt/format.h>

#include "base/error.h"

namespace stellarium::daemon {
namespace {

constexpr const char* kMetricsTarget = "/metrics";

}  // namespace

control::Response MetricsHandler::handle(const control::Request& request) {
    if (request.target != kMetricsTarget) {
        return control::error_response(
            Error(ErrorCode::kNotFound, "only GET /metrics is answered here"));
    }
    if (request.method != "GET" && request.method != "HEAD") {
        control::Response refused = control::error_response(Error(
            ErrorCode::kInvalidArgument,
            fmt::format("{} is not possible on /metrics; possible: GET, HEAD", request.method)));
        refused.status = 405;
        refused.allow = "GET, HEAD";
        return refused;
    }
    control::Response response;
    response.content_type = kMetricsContentType;
    response.body = metrics_.text();
    return response;
}

control::Response DaemonHandler::handle(const control::Request& request) {
    if (request.target == kMetricsTarget) {
        return metrics_page_.handle(request);
    }
    const auto begin = std::chrono::steady_clock::now();
    if (before_change_ && request.method != "GET") {
        before_change_();
    }
    control::Response response = service_.handle(request);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    metrics_.observe_request(request.method, response.status, took.count());
    const std::initializer_list<LogField> fields = {
        {"method", request.method},
        {"target", request.target},
        {"status", std::to_string(response.status)},
        {"ms", fmt::format("{:.3f}", took.count() * 1e3)}};
    if (response.status >= 500) {
        log_.warning("request", {{"method", request.method},
                                 {"target", request.target},
                                 {"status", std::to_string(response.status)},
                                 {"error", response.body}});
    } else if (request.method == "GET") {
        log_.debug("request", fields);
    } else {
        log_.info("request", fields);
    }
    return response;
}

}  // namespace stellarium::daemon
