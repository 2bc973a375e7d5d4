// What the daemon's sockets answer with: the control service, measured and logged, and the metrics.
//
// Thread rule: any thread. Everything is borrowed.
#pragma once

#include <functional>
#include <utility>

#include "control/message.h"
#include "daemon/log.h"
#include "daemon/metrics.h"

namespace stellarium::daemon {

/// GET /metrics and nothing else: for the TCP port, where anybody may ask.
class MetricsHandler final : public control::RequestHandler {
  public:
    explicit MetricsHandler(const Metrics& metrics) : metrics_(metrics) {}
    bool wants_upload(const std::string&, const std::string&) const override { return false; }
    control::Response handle(const control::Request& request) override;

  private:
    const Metrics& metrics_;
};

/// The control socket: every operation of `service`, and GET /metrics.
class DaemonHandler final : public control::RequestHandler {
  public:
    /// `before_change` is called before whatever is not a GET.
    DaemonHandler(control::RequestHandler& service, Metrics& metrics, Log& log,
                  std::function<void()> before_change = {})
        : service_(service),
          metrics_(metrics),
          metrics_page_(metrics),
          log_(log),
          before_change_(std::move(before_change)) {}
    size_t max_json_bytes(const std::string& method, const std::string& target) const override {
        return service_.max_json_bytes(method, target);
    }
    bool wants_upload(const std::string& method, const std::string& target) const override {
        return service_.wants_upload(method, target);
    }
    control::Response handle(const control::Request& request) override;

  private:
    control::RequestHandler& service_;
    Metrics& metrics_;
    MetricsHandler metrics_page_;
    Log& log_;
    const std::function<void()> before_change_;
};

}  // namespace stellarium::daemon
