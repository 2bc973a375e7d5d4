// Lends shareable images to clients that map them: joins share (what is lent, and how) and the
// daemon's runtime directory.
//
//     MapHost maps(pool, runtime_directory + "/map.sock", gid, log);
//     STELLARIUM_TRY(maps.start());
//     maps.stop();
//
// Thread rule: one thread; status() any.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include <sys/types.h>

#include "daemon/log.h"
#include "frontend/vhost/listener.h"
#include "nova/pool.h"
#include "share/lender.h"

namespace stellarium::daemon {

class MapHost {
  public:
    MapHost(nova::Pool& pool, std::string socket_path, std::optional<gid_t> socket_gid, Log& log)
        : pool_(pool), socket_path_(std::move(socket_path)), socket_gid_(socket_gid), log_(log) {}
    ~MapHost() { stop(); }
    MapHost(const MapHost&) = delete;
    MapHost& operator=(const MapHost&) = delete;

    /// Listens when it returns. Mode 0660 for the group, else 0600.
    Result<void> start();
    /// Hangs up. What clients have mapped stays theirs.
    void stop();
    const std::string& socket_path() const { return socket_path_; }

  private:
    nova::Pool& pool_;
    const std::string socket_path_;
    const std::optional<gid_t> socket_gid_;
    Log& log_;
    vhost::Listener listener_;  ///< Its descriptor is the lender's.
    std::unique_ptr<share::Lender> lender_;
};

}  // namespace stellarium::daemon
