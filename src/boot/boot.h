// Stellar Boot: records boots, keeps their manifests in the store, and stages what they will read.
//
//     Boot boot(pool, *env.clock, {.background = true});
//     boot.record("vm-1");                     // the guest boots ...
//     boot.stop("vm-1", /*discard=*/false);    // ... and the manifest of its image has the trace
//     boot.attached("vm-2");                   // a clone: staged beside the start of its machine
//     STELLARIUM_ASSIGN(StageReport report, boot.prefetch("vm-3", {}));
//
// With a background thread everything is staged by it, one after another, at a low priority; a
// hundred clones of one image that are attached at once are staged once. Without, prefetch() does
// it itself, and attached() nothing.
//
// Thread rule: every function from any thread at the same time. The pool and the clock outlive it.
// Durability: what stop(), set_files() and remove() change is durable when they return.
// Errors: kNotFound with what to do; kBusy; kInvalidArgument; kLimitExceeded; those of nova/pool.h.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/hash.h"
#include "boot/manifest.h"
#include "boot/prefetch.h"
#include "boot/recorder.h"
#include "io/io.h"
#include "nova/pool.h"

namespace stellarium::boot {

struct BootOptions {
    bool background = false;        ///< A thread that stages.
    bool prefetch_attached = true;  ///< Whether attached() does anything.
    /// For what goes wrong where nobody waits.
    std::function<void(const std::string& sentence)> notice{};
    /// See StageOptions.
    std::function<uint64_t()> available_bytes = available_memory_bytes;
};

/// A recording that runs, or has reached a limit and waits to be stopped.
struct RecordingStatus {
    std::string source;
    Hash256 root;
    std::chrono::nanoseconds started{};  ///< Since 1970, UTC.
    Recorder::Progress progress;
};

/// A manifest with the names of the images that it belongs to.
struct ManifestView {
    BootManifest manifest;
    std::vector<std::string> images;  ///< Empty: they were removed, and clones are left.
    std::string kernel_image;         ///< "": there is none, or it was removed.
    std::string initrd_image;
};

/// One of list(). `damage`: why it cannot be read; "": it can.
struct ManifestEntry {
    Hash256 root;
    std::vector<std::string> images;
    std::string damage;
    BootManifest manifest;
};

/// What set_files() changes: nullopt leaves it, "" takes it away.
struct BootFiles {
    std::optional<std::string> kernel{};  ///< Name of an image.
    std::optional<std::string> initrd{};
    std::optional<std::string> hints{};
};

/// Names of the images that hold kernel and initrd; "": there is none, or it was removed.
struct FileImages {
    std::string kernel;
    std::string initrd;
};

struct PrefetchOptions {
    bool all = false;  ///< Everything that it holds, and not what the manifest says.
    std::function<bool()> cancelled{};
};

struct BootStats {
    uint64_t recordings = 0;     ///< That run.
    bool staging = false;        ///< Something is.
    std::string staging_source;  ///< What; "" when nothing is.
    uint64_t done_bytes = 0;     ///< Of that.
    uint64_t total_bytes = 0;    ///< Of that; 0: not known.
    uint64_t waiting = 0;        ///< To be staged after it.
    uint64_t prefetches = 0;     ///< Completed since the start, of every kind.
    uint64_t joined = 0;         ///< Attachments for which another one's was enough.
    uint64_t failures = 0;
    uint64_t staged_bytes = 0;
    uint64_t reads = 0;
    std::chrono::nanoseconds duration{};  ///< Of all of them.
};

class Boot {
  public:
    Boot(nova::Pool& pool, io::Clock& clock, BootOptions options);
    ~Boot();
    Boot(const Boot&) = delete;
    Boot& operator=(const Boot&) = delete;

    /// Begins to record what is read of an attached volume.
    Result<RecordingStatus> record(std::string_view source);
    /// Ends it, and merges the trace into the manifest of the image, unless `discard`. Returns what
    /// was recorded. kInvalidArgument when nothing was read: nothing is stored then.
    Result<RecordingStatus> stop(std::string_view source, bool discard);
    std::vector<RecordingStatus> recordings() const;

    /// The manifest that `source` has or inherits. kNotFound says how to make one.
    Result<ManifestView> show(std::string_view source);
    std::vector<ManifestEntry> list();
    /// Kernel and initrd of the manifest that `source` has or inherits. kNotFound as show().
    Result<FileImages> file_images(std::string_view source);
    /// The images and volumes whose manifests name a kernel or an initrd that is there.
    std::vector<nova::EntityInfo> with_files();
    Result<ManifestView> set_files(std::string_view source, const BootFiles& files);
    /// Removes the manifest of the image that `source` is or descends from.
    Result<void> remove(std::string_view source);

    /// Stages it, and returns when that is done.
    Result<StageReport> prefetch(std::string_view source, const PrefetchOptions& options);
    /// Has it staged soon if it has a manifest. Never blocks for long.
    void attached(std::string_view source);
    BootStats stats() const;
    /// Ends everything that is being staged, and refuses more.
    void stop_staging();

  private:
    struct Recording {
        std::string source;
        Hash256 root;
        uint64_t size_bytes = 0;
        std::chrono::nanoseconds started{};
        std::shared_ptr<Recorder> recorder;
    };
    struct Job {
        std::string source;
        std::optional<Hash256> root;  ///< Of one that nobody waits for.
        PrefetchOptions options;
        std::optional<std::promise<Result<StageReport>>> done;
    };

    static RecordingStatus status_of(const Recording& recording);
    /// recordings_mutex_ is held. By id, or by the name that it had.
    std::map<uint64_t, Recording>::iterator find_recording(std::string_view source);
    Result<std::optional<BootManifest>> load(const Hash256& root);
    Result<ManifestView> view(BootManifest manifest) const;
    Result<void> store(const BootManifest& manifest);
    Result<StageReport> run_job(const Job& job);
    Result<StageReport> stage_job(const Job& job);
    void run_jobs();

    nova::Pool& pool_;
    io::Clock& clock_;
    const BootOptions options_;

    mutable std::mutex recordings_mutex_;
    std::map<uint64_t, Recording> recordings_;  ///< By entity id. Guarded by recordings_mutex_.
    std::mutex manifests_mutex_;  ///< From the reading of a manifest to its replacement.

    mutable std::mutex jobs_mutex_;
    std::condition_variable jobs_work_;
    std::deque<Job> jobs_;  ///< Guarded by jobs_mutex_, like all that follows.
    std::map<Hash256, std::chrono::nanoseconds> fresh_;  ///< When its staging ended, monotonic.
    std::optional<Hash256> running_root_;
    unsigned callers_ = 0;
    BootStats stats_;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

}  // namespace stellarium::boot
