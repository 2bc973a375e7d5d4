// Every command of stellarctl, after its words were understood (app.h) and before anything is
// printed (output.h): each asks the control interface and puts the answer into the output.
//
// Thread rule: one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "cli/output.h"
#include "cli/session.h"

namespace stellarium::cli {

/// What a command works with.
class Context {
  public:
    Context(StoreLocation location, Output& out, bool progress)
        : location_(std::move(location)), out_(out), progress_(progress) {}

    /// Opened at the first use.
    Result<control::ControlClient*> client();
    Session* session() { return session_.get(); }
    const StoreLocation& location() const { return location_; }
    /// Before the first use: the command is of no use without a daemon.
    void expect_daemon() { location_.needs_daemon = true; }
    /// Before the first use: the command prints the store's warnings itself.
    void take_warnings() { takes_warnings_ = true; }
    Output& out() { return out_; }
    bool progress() const { return progress_; }
    Result<void> close();

  private:
    StoreLocation location_;
    Output& out_;
    bool progress_;
    bool takes_warnings_ = false;
    std::unique_ptr<Session> session_;
};

/// All that any command can be given; each uses its own.
struct Arguments {
    std::string name;
    bool allow_empty = false;
    bool shrink = false;
    bool quiet = false;
    std::string other_name;
    std::string path;
    std::string size;
    std::string rate;
    std::string source;
    std::vector<std::string> names;
    std::string format;
    std::string serial;
    uint64_t count = 1;
    uint64_t queues = 1;
    uint64_t block_size = 512;
    uint64_t iops = 0;
    uint64_t iops_burst = 0;
    std::string bandwidth;
    std::string bandwidth_burst;
    bool no_limits = false;
    bool force = false;
    bool read_only = false;
    bool dry_run = false;
    bool restart = false;
    bool only_status = false;
    bool repair = false;
    bool data = false;
    bool allow_backing = false;
    bool discard = false;
    bool all = false;
    std::optional<std::string> kernel;
    std::optional<std::string> initrd;
    std::optional<std::string> hints;
    std::string shareable;
    bool sharing = false;
    std::string files;
    // Of machines.
    std::string image;
    std::optional<std::string> memory;
    std::optional<uint64_t> cpus;
    std::optional<std::string> accelerator;
    std::optional<std::string> append;
    std::vector<std::string> nics;
    uint64_t timeout_s = 60;
};

using Command = Result<void> (*)(Context&, const Arguments&);

Result<void> init(Context& context, const Arguments& arguments);
Result<void> image_import(Context& context, const Arguments& arguments);
Result<void> image_list(Context& context, const Arguments& arguments);
Result<void> image_info(Context& context, const Arguments& arguments);
Result<void> image_remove(Context& context, const Arguments& arguments);
Result<void> image_rename(Context& context, const Arguments& arguments);
Result<void> image_set(Context& context, const Arguments& arguments);
Result<void> image_export(Context& context, const Arguments& arguments);
Result<void> volume_create(Context& context, const Arguments& arguments);
Result<void> volume_clone(Context& context, const Arguments& arguments);
Result<void> volume_list(Context& context, const Arguments& arguments);
Result<void> volume_info(Context& context, const Arguments& arguments);
Result<void> volume_resize(Context& context, const Arguments& arguments);
Result<void> volume_rename(Context& context, const Arguments& arguments);
Result<void> volume_remove(Context& context, const Arguments& arguments);
Result<void> volume_export(Context& context, const Arguments& arguments);
Result<void> volume_diff(Context& context, const Arguments& arguments);
Result<void> snapshot_create(Context& context, const Arguments& arguments);
Result<void> snapshot_list(Context& context, const Arguments& arguments);
Result<void> snapshot_info(Context& context, const Arguments& arguments);
Result<void> snapshot_rollback(Context& context, const Arguments& arguments);
Result<void> snapshot_remove(Context& context, const Arguments& arguments);
Result<void> attach(Context& context, const Arguments& arguments);
Result<void> detach(Context& context, const Arguments& arguments);
Result<void> limit(Context& context, const Arguments& arguments);
Result<void> list_attachments(Context& context, const Arguments& arguments);
Result<void> mount_files(Context& context, const Arguments& arguments);
Result<void> unmount_files(Context& context, const Arguments& arguments);
Result<void> boot_record(Context& context, const Arguments& arguments);
Result<void> boot_stop(Context& context, const Arguments& arguments);
Result<void> boot_list(Context& context, const Arguments& arguments);
Result<void> boot_show(Context& context, const Arguments& arguments);
Result<void> boot_set(Context& context, const Arguments& arguments);
Result<void> boot_extract(Context& context, const Arguments& arguments);
Result<void> boot_remove(Context& context, const Arguments& arguments);
Result<void> prefetch(Context& context, const Arguments& arguments);
Result<void> vm_run(Context& context, const Arguments& arguments);
Result<void> vm_snapshot(Context& context, const Arguments& arguments);
Result<void> vm_restore(Context& context, const Arguments& arguments);
Result<void> vm_list(Context& context, const Arguments& arguments);
Result<void> vm_logs(Context& context, const Arguments& arguments);
Result<void> vm_stop(Context& context, const Arguments& arguments);
Result<void> vm_remove(Context& context, const Arguments& arguments);
Result<void> collect_garbage(Context& context, const Arguments& arguments);
Result<void> scrub(Context& context, const Arguments& arguments);
Result<void> stats(Context& context, const Arguments& arguments);
Result<void> status(Context& context, const Arguments& arguments);
Result<void> dump(Context& context, const Arguments& arguments);
Result<void> check_store(Context& context, const Arguments& arguments);

/// The names for `volume clone --count`: {n} in `pattern` becomes 1, 2, ... count.
/// kInvalidArgument when several names would be the same.
Result<std::vector<std::string>> expand_names(const std::string& pattern, uint64_t count);

}  // namespace stellarium::cli
