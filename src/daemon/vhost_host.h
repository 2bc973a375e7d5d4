// Gives volumes to guests: joins nova (what a disk holds) and vhost-user-blk (how a guest asks).
//
// Each attachment has a socket <runtime>/vhost/<entity id>.sock, a device of the pool behind it,
// and a record in the store. The record outlives the daemon: restore() makes the same sockets
// again. Sockets are named by id, so they survive a rename.
//
//     VhostHost host(pool, *server, {.runtime_directory = dir}, log);
//     STELLARIUM_TRY(host.start());      // restores, before anybody may ask
//     host.attach("vm-1", {});
//     host.stop();                       // disconnects guests, flushes; records stay
//
// Thread rule: any thread, except start() and stop().
#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <sys/types.h>

#include "base/budget.h"
#include "control/attachment.h"
#include "daemon/log.h"
#include "frontend/vhost/server.h"
#include "nova/pool.h"

namespace stellarium::daemon {

struct VhostHostOptions {
    std::string runtime_directory;
    std::optional<gid_t> socket_gid;  ///< May connect to the guests' sockets too.
    unsigned data_threads = 0;
    /// Descriptors for attachments and their guests; one that would need more is refused. Shared
    /// with other frontends. Empty: no bound.
    std::shared_ptr<Budget> descriptors{};
    /// Told what has been attached by attach(), not by start(): its guest is about to boot.
    std::function<void(const std::string& source)> attached{};
};

class VhostHost final : public control::AttachmentHost {
  public:
    VhostHost(nova::Pool& pool, VhostHostOptions options, Log& log);
    ~VhostHost() override;

    /// Starts serving and restores every attachment on record. One that cannot be restored is
    /// logged and reported as failed; its record stays.
    Result<void> start();
    /// Makes durable what guests have written so far; they go on. Nothing may be attached or
    /// detached meanwhile.
    void flush();
    /// Disconnects all guests; what they wrote is flushed. Attachments stay on record.
    void stop();

    Result<control::AttachmentStatus> attach(std::string_view source,
                                             const control::AttachmentOptions& options) override;
    Result<control::AttachmentStatus> detach(std::string_view source) override;
    Result<control::AttachmentStatus> set_limits(std::string_view source,
                                                 const RateLimits& limits) override;
    std::vector<control::AttachmentStatus> attachments() const override;

    /// Of every served device, named by entity id; and the present name of one.
    std::vector<vhost::AttachmentStatus> device_status() const;
    std::string source_of(std::string_view device) const;

  private:
    /// What a call that runs now does to an attachment; one at a time.
    enum class Change : uint8_t { kNone, kAttach, kDetach, kLimits };

    struct Entry {
        std::string source;  ///< When it was attached; the pool knows the present name.
        std::string socket;
        control::AttachmentOptions options;
        std::shared_ptr<BlockDevice> device;
        std::shared_future<void> released;  ///< Ready when the server holds the device no more.
        std::string failure;                ///< Why it is not served; "" when it is.
        bool unreadable = false;            ///< Its record is: the options are not what it says.
        Change change = Change::kNone;
    };

    Result<void> serve(uint64_t id, std::string_view source, Entry& entry);
    Result<uint64_t> reserve(std::string_view source, Change change);
    void release(uint64_t id, std::optional<Entry> entry);
    static std::string label_of(const Entry& entry);
    static nova::Pool::AttachmentRecord record_of(std::string_view source, const Entry& entry);
    void flush_entry(const Entry& entry);
    control::AttachmentStatus status_of(uint64_t id, const std::string& source,
                                        const Entry& entry) const;

    nova::Pool& pool_;
    VhostHostOptions options_;
    Log& log_;
    std::unique_ptr<vhost::VhostServer> server_;
    mutable std::mutex mutex_;
    std::map<uint64_t, Entry> entries_;  ///< By entity id. Guarded by mutex_.
};

}  // namespace stellarium::daemon
