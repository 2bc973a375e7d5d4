// What Prometheus reads: the store, the volumes, every served device, files, NBD, the
// control requests.
//
// Names are stable: stellarium_<what>_<unit>[_total]. Store and pool figures are taken when asked;
// nothing is sampled in the background.
//
//     Metrics metrics(pool, host, version);
//     metrics.observe_request("GET", 200, 0.002);
//     std::string page = metrics.text();
//
// Thread rule: any thread.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "boot/boot.h"
#include "daemon/mount_host.h"
#include "daemon/nbd_host.h"
#include "daemon/vhost_host.h"
#include "nova/pool.h"

namespace stellarium::daemon {

class Metrics {
  public:
    /// Borrows pool, hosts and boot; `nbd` may be null.
    Metrics(const nova::Pool& pool, const VhostHost& host, const boot::Boot& boot,
            const MountHost& files, const NbdHost* nbd, std::string version);
    ~Metrics();

    void observe_request(std::string_view method, int status, double seconds);
    /// The text format, version 0.0.4.
    std::string text() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

inline constexpr const char* kMetricsContentType = "text/plain; version=0.0.4; charset=utf-8";

}  // namespace stellarium::daemon
