// Shows the store as files: joins frontend/fuse (a directory that is mounted, or adopted from an
// earlier daemon) with the control socket, by which it is mounted and unmounted.
//
//     MountHost files(pool, {.runtime_directory = dir, .attached = ...}, log);
//     STELLARIUM_TRY(files.adopt(std::move(holder)));   // before other frontends attach anything
//     STELLARIUM_TRY(files.serve());                    // after they did
//     ...
//     const bool wait = files.stop();                   // open files wait for the next daemon
//
// Thread rule: any thread, except adopt(), serve() and stop().
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include <sys/types.h>

#include "control/files_host.h"
#include "daemon/log.h"
#include "frontend/fuse/holder_protocol.h"
#include "frontend/fuse/mount.h"
#include "nova/pool.h"

namespace stellarium::daemon {

struct MountHostOptions {
    std::string runtime_directory;
    std::optional<gid_t> group;  ///< May read and write as the daemon's user may.
    /// Told what has been attached for a file that was opened: its guest may be about to boot.
    std::function<void(const std::string& source)> attached{};
    fuse::BootSource boots{};
};

class MountHost final : public control::FilesHost {
  public:
    MountHost(nova::Pool& pool, MountHostOptions options, Log& log);
    ~MountHost() override;

    /// Attaches what is open below the directory of this holder.
    Result<void> adopt(fuse::HolderClient holder);
    /// Answers requests of files from here on, if there is a directory.
    Result<void> serve();
    /// See fuse::Mount. Nothing when there is no directory.
    void settle();
    /// Unmounts the directory, or leaves open files to the next daemon (true).
    bool stop();
    /// nullopt when no directory is mounted.
    std::optional<fuse::MountStatus> status() const;

    control::FilesStatus files() const override;
    Result<control::FilesStatus> take_directory(std::string_view directory) override;
    Result<void> unmount() override;

  private:
    std::shared_ptr<fuse::Mount> mount() const;
    void set_mount(std::shared_ptr<fuse::Mount> mount);
    Result<std::shared_ptr<fuse::Mount>> make_mount(fuse::HolderClient holder);
    /// Of one that is not connected any more. `changes_` is held.
    void put_away();

    nova::Pool& pool_;
    const MountHostOptions options_;
    Log& log_;
    std::mutex changes_;    ///< One mounts, unmounts or stops at a time.
    bool stopped_ = false;  ///< Guarded by changes_.
    mutable std::mutex mutex_;
    std::shared_ptr<fuse::Mount> mount_;  ///< Guarded by mutex_.
};

}  // namespace stellarium::daemon
