// Gives images, volumes and snapshots to NBD clients: joins nova (what a disk holds) and
// frontend/nbd (how a client asks).
//
// An export is whatever Pool takes as a source, by that name. Images and snapshots are read-only.
// A volume is attached for writing by the first client that chooses it; all clients that do share
// the one device, and the last one to leave flushes and detaches it. While something else has it
// for writing, choosing it is refused with the pool's message, which says who. Nothing of this is
// on record: clients that want to outlive the daemon connect again.
//
//     NbdHost host(pool, {.socket_path = dir + "/nbd.sock"}, log);
//     STELLARIUM_TRY(host.start());
//     host.stop();
//
// Thread rule: any thread, except start() and stop().
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <sys/types.h>

#include "daemon/log.h"
#include "frontend/nbd/export.h"
#include "frontend/nbd/server.h"
#include "frontend/vhost/listener.h"
#include "nova/pool.h"

namespace stellarium::daemon {

struct NbdHostOptions {
    std::string socket_path;
    std::optional<gid_t> socket_gid;  ///< Mode 0660 for this group instead of 0600.
    unsigned threads = 0;             ///< 0: one for each processor.
    /// Told what has been attached for a client: its guest may be about to boot.
    std::function<void(const std::string& source)> attached{};
};

class NbdHost final : public nbd::ExportSource {
  public:
    NbdHost(nova::Pool& pool, NbdHostOptions options, Log& log);
    ~NbdHost() override;

    /// Listens when it returns.
    Result<void> start();
    /// Makes durable what clients have written so far; they go on.
    void flush();
    /// Answers what was asked, disconnects all clients, flushes and detaches what they had.
    void stop();
    nbd::ServerStatus status() const;

    Result<std::vector<std::string>> list(std::string_view after, size_t at_most) override;
    Result<nbd::ExportInfo> find(std::string_view name) override;
    Result<std::shared_ptr<nbd::Export>> open(std::string_view name) override;

  private:
    class PoolExport;

    Result<std::shared_ptr<BlockDevice>> attach(const nova::EntityInfo& info);
    void released(uint64_t id);

    nova::Pool& pool_;
    NbdHostOptions options_;
    Log& log_;
    vhost::Listener listener_;  ///< Its descriptor is the server's.
    std::unique_ptr<nbd::Server> server_;
    std::mutex list_mutex_;  ///< One list of everything in memory at a time.
    std::mutex mutex_;
    std::condition_variable changed_;
    /// What is open, being opened or being released, by entity id; the latter two have expired.
    /// Guarded by mutex_.
    std::map<uint64_t, std::weak_ptr<PoolExport>> exports_;
};

}  // namespace stellarium::daemon
