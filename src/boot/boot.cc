#include "boot/boot.h"

#include <algorithm>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "boot/limits.h"

namespace stellarium::boot {
namespace {

Error no_manifest(std::string_view source) {
    return {ErrorCode::kNotFound,
            fmt::format("there is no boot manifest for '{0}': attach a clone, run 'stellarctl boot "
                        "record' on it, boot a guest, and run 'stellarctl boot stop'",
                        source)};
}

std::string first_or_empty(const std::vector<std::string>& names) {
    return names.empty() ? std::string() : names.front();
}

}  // namespace

Boot::Boot(nova::Pool& pool, io::Clock& clock, BootOptions options)
    : pool_(pool), clock_(clock), options_(std::move(options)) {
    if (options_.background) {
        // Its priority is set when this returns: a sandbox may forbid it later.
        std::promise<void> ready;
        thread_ = std::thread([this, &ready] {
            make_lowly();
            ready.set_value();
            run_jobs();
        });
        ready.get_future().wait();
    }
}

Boot::~Boot() {
    stop_staging();
    if (thread_.joinable()) {
        thread_.join();
    }
    for (const auto& [id, recording] : recordings_) {
        [[maybe_unused]] const auto ended = pool_.observe_reads(id, nullptr);
    }
}

void Boot::stop_staging() {
    const std::lock_guard lock(jobs_mutex_);
    stopping_ = true;
    jobs_work_.notify_all();
}

// --- Recording -----------------------------------------------------------------------------------

RecordingStatus Boot::status_of(const Recording& recording) {
    return {.source = recording.source,
            .root = recording.root,
            .started = recording.started,
            .progress = recording.recorder->progress()};
}

Result<RecordingStatus> Boot::record(std::string_view source) {
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(source));
    STELLARIUM_ASSIGN(const Hash256 root, pool_.boot_root(source));
    if (const auto reason = pool_.read_only_reason()) {
        return fail(ErrorCode::kReadOnly,
                    fmt::format("a manifest could not be stored: {}", *reason));
    }
    const std::lock_guard lock(recordings_mutex_);
    if (recordings_.contains(info.id)) {
        return fail(ErrorCode::kBusy,
                    fmt::format("'{0}' is being recorded already: 'stellarctl boot stop {0}' ends "
                                "it",
                                source));
    }
    if (recordings_.size() >= kMaxRecordings) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("{} boots are being recorded, and no more can be at once: end one "
                                "with 'stellarctl boot stop' ('{}' is the first)",
                                kMaxRecordings, recordings_.begin()->second.source));
    }
    Recording recording{.source = std::string(source),
                        .root = root,
                        .size_bytes = info.size_bytes,
                        .started = clock_.wall(),
                        .recorder = std::make_shared<Recorder>(clock_, info.size_bytes)};
    if (auto observed = pool_.observe_reads(info.id, recording.recorder); !observed) {
        if (observed.error().code() == ErrorCode::kNotFound) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is not attached, so that there is nothing to record: "
                                    "attach it, start recording, and start the guest",
                                    source));
        }
        return std::unexpected(observed.error());
    }
    const auto [it, inserted] = recordings_.emplace(info.id, std::move(recording));
    return status_of(it->second);
}

std::map<uint64_t, Boot::Recording>::iterator Boot::find_recording(std::string_view source) {
    if (const auto info = pool_.find(source)) {
        return recordings_.find(info->id);
    }
    return std::ranges::find_if(recordings_,
                                [&](const auto& each) { return each.second.source == source; });
}

Result<RecordingStatus> Boot::stop(std::string_view source, bool discard) {
    std::optional<Recording> ended;
    {
        const std::lock_guard lock(recordings_mutex_);
        const auto found = find_recording(source);
        if (found == recordings_.end()) {
            return fail(ErrorCode::kNotFound,
                        fmt::format("'{0}' is not being recorded: 'stellarctl boot record {0}' "
                                    "begins it",
                                    source));
        }
        STELLARIUM_TRY(pool_.observe_reads(found->first, nullptr));
        ended = std::move(found->second);
        recordings_.erase(found);
    }
    RecordingStatus status = status_of(*ended);
    if (discard) {
        return status;
    }
    BootTrace trace = ended->recorder->trace(clock_.wall());
    if (trace.runs.empty()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("nothing was read of '{}' since the recording began, and nothing "
                                "is stored: record again, and boot a guest before the stop",
                                source));
    }
    const std::lock_guard lock(manifests_mutex_);
    STELLARIUM_ASSIGN(std::optional<BootManifest> manifest, load(ended->root));
    if (!manifest) {
        manifest.emplace();
        manifest->root = ended->root;
    }
    manifest->size_bytes = ended->size_bytes;
    add_trace(*manifest, std::move(trace), static_cast<uint64_t>(clock_.wall().count()));
    STELLARIUM_TRY(store(*manifest));
    return status;
}

std::vector<RecordingStatus> Boot::recordings() const {
    std::vector<RecordingStatus> all;
    const std::lock_guard lock(recordings_mutex_);
    all.reserve(recordings_.size());
    for (const auto& [id, recording] : recordings_) {
        all.push_back(status_of(recording));
    }
    return all;
}

// --- Manifests -----------------------------------------------------------------------------------

Result<std::optional<BootManifest>> Boot::load(const Hash256& root) {
    STELLARIUM_ASSIGN(const auto content, pool_.boot_manifest(root));
    if (!content) {
        return std::nullopt;
    }
    STELLARIUM_ASSIGN(BootManifest manifest, decode(*content));
    return manifest;
}

Result<void> Boot::store(const BootManifest& manifest) {
    STELLARIUM_TRY(pool_.set_boot_manifest(manifest.root, encode(manifest)));
    const std::lock_guard lock(jobs_mutex_);
    fresh_.erase(manifest.root);
    return {};
}

Result<ManifestView> Boot::view(BootManifest manifest) const {
    ManifestView view;
    view.images = pool_.images_of(manifest.root);
    if (manifest.kernel) {
        view.kernel_image = first_or_empty(pool_.images_of(manifest.kernel->root));
    }
    if (manifest.initrd) {
        view.initrd_image = first_or_empty(pool_.images_of(manifest.initrd->root));
    }
    view.manifest = std::move(manifest);
    return view;
}

Result<ManifestView> Boot::show(std::string_view source) {
    STELLARIUM_ASSIGN(const Hash256 root, pool_.boot_root(source));
    STELLARIUM_ASSIGN(std::optional<BootManifest> manifest, load(root));
    if (!manifest) {
        return std::unexpected(no_manifest(source));
    }
    return view(*std::move(manifest));
}

std::vector<ManifestEntry> Boot::list() {
    std::vector<ManifestEntry> entries;
    for (const Hash256& root : pool_.boot_manifests()) {
        ManifestEntry entry{
            .root = root, .images = pool_.images_of(root), .damage = {}, .manifest = {}};
        if (Result<std::optional<BootManifest>> manifest = load(root); !manifest) {
            entry.damage = manifest.error().message();
        } else if (*manifest) {
            entry.manifest = **std::move(manifest);
        } else {
            continue;  // Removed meanwhile.
        }
        entries.push_back(std::move(entry));
    }
    std::ranges::sort(entries, {}, &ManifestEntry::images);
    return entries;
}

Result<FileImages> Boot::file_images(std::string_view source) {
    STELLARIUM_ASSIGN(ManifestView found, show(source));
    return FileImages{.kernel = std::move(found.kernel_image),
                      .initrd = std::move(found.initrd_image)};
}

std::vector<nova::EntityInfo> Boot::with_files() {
    std::set<Hash256> roots;
    for (const ManifestEntry& entry : list()) {
        const auto there = [this](const std::optional<BootFile>& file) {
            return file && !pool_.images_of(file->root).empty();
        };
        if (there(entry.manifest.kernel) || there(entry.manifest.initrd)) {
            roots.insert(entry.root);
        }
    }
    std::vector<nova::EntityInfo> found;
    if (roots.empty()) {
        return found;
    }
    for (std::vector<nova::EntityInfo> infos : {pool_.images(), pool_.volumes()}) {
        for (nova::EntityInfo& info : infos) {
            if (const auto root = pool_.boot_root(info.name); root && roots.contains(*root)) {
                found.push_back(std::move(info));
            }
        }
    }
    return found;
}

Result<ManifestView> Boot::set_files(std::string_view source, const BootFiles& files) {
    const auto file_of = [this](const std::string& name) -> Result<std::optional<BootFile>> {
        if (name.empty()) {
            return std::nullopt;
        }
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(name));
        if (info.kind != nova::EntityKind::kImage) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("'{}' is no image: import the file with 'stellarctl image "
                                    "import'",
                                    name));
        }
        STELLARIUM_ASSIGN(const Hash256 root, pool_.boot_root(name));
        return BootFile{.root = root, .size_bytes = info.size_bytes};
    };
    if (files.hints && files.hints->size() > kMaxHintsBytes) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("hints may take {} bytes, not {}",
                                                             kMaxHintsBytes, files.hints->size()));
    }
    STELLARIUM_ASSIGN(const Hash256 root, pool_.boot_root(source));
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(source));
    const std::lock_guard lock(manifests_mutex_);
    STELLARIUM_ASSIGN(std::optional<BootManifest> manifest, load(root));
    const auto now = static_cast<uint64_t>(clock_.wall().count());
    if (!manifest) {
        manifest.emplace();
        manifest->root = root;
        manifest->size_bytes = info.size_bytes;
        manifest->created_ns = now;
    }
    if (files.kernel) {
        STELLARIUM_ASSIGN(manifest->kernel, file_of(*files.kernel));
    }
    if (files.initrd) {
        STELLARIUM_ASSIGN(manifest->initrd, file_of(*files.initrd));
    }
    if (files.hints) {
        manifest->hints = *files.hints;
    }
    manifest->updated_ns = now;
    STELLARIUM_TRY(store(*manifest));
    return view(*std::move(manifest));
}

Result<void> Boot::remove(std::string_view source) {
    STELLARIUM_ASSIGN(const Hash256 root, pool_.boot_root(source));
    const std::lock_guard lock(manifests_mutex_);
    if (!pool_.has_boot_manifest(root)) {
        return std::unexpected(no_manifest(source));
    }
    return pool_.set_boot_manifest(root, std::nullopt);
}

// --- Staging -------------------------------------------------------------------------------------

Result<StageReport> Boot::stage_job(const Job& job) {
    std::vector<PageRange> ranges;
    if (!job.options.all) {
        STELLARIUM_ASSIGN(const Hash256 root,
                          job.root ? Result<Hash256>(*job.root) : pool_.boot_root(job.source));
        STELLARIUM_ASSIGN(std::optional<BootManifest> manifest, load(root));
        if (!manifest || manifest->prefetch.empty()) {
            return std::unexpected(
                no_manifest(job.source)
                    .with_context("nothing says what to stage (--all stages everything)"));
        }
        ranges = std::move(manifest->prefetch);
    }
    STELLARIUM_ASSIGN(const auto reader, pool_.open_reader(job.source));
    {
        const std::lock_guard lock(jobs_mutex_);
        stats_.done_bytes = 0;
        stats_.total_bytes = job.options.all ? 0 : pages_of(ranges) * nova::kPageBytes;
    }
    const StageOptions options{
        .cancelled =
            [&] { return stopping_ || (job.options.cancelled && job.options.cancelled()); },
        .progress =
            [this](uint64_t done_bytes) {
                const std::lock_guard lock(jobs_mutex_);
                stats_.done_bytes = done_bytes;
            },
        .waiting_reads = [this] { return pool_.waiting_reads(); },
        .available_bytes = options_.available_bytes};
    return job.options.all ? stage_all(*reader, options) : stage(*reader, ranges, options);
}

Result<StageReport> Boot::run_job(const Job& job) {
    {
        const std::lock_guard lock(jobs_mutex_);
        stats_.staging = true;
        stats_.staging_source = job.source;
    }
    Result<StageReport> report = stage_job(job);
    const std::lock_guard lock(jobs_mutex_);
    stats_.staging = false;
    stats_.staging_source.clear();
    if (report) {
        ++stats_.prefetches;
        stats_.staged_bytes += report->staged_bytes;
        stats_.reads += report->reads;
        stats_.duration += report->duration;
        if (job.root) {
            fresh_[*job.root] = clock_.monotonic();
        }
    } else if (report.error().code() != ErrorCode::kCancelled) {
        ++stats_.failures;
    }
    return report;
}

void Boot::run_jobs() {
    std::unique_lock lock(jobs_mutex_);
    while (true) {
        jobs_work_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
        if (jobs_.empty()) {
            return;
        }
        Job job = std::move(jobs_.front());
        jobs_.pop_front();
        running_root_ = job.root;
        lock.unlock();
        Result<StageReport> report =
            stopping_ ? fail(ErrorCode::kCancelled, "the daemon is stopping") : run_job(job);
        if (!job.done && options_.notice) {
            if (!report && report.error().code() != ErrorCode::kCancelled &&
                report.error().code() != ErrorCode::kNotFound) {
                options_.notice(fmt::format("what a boot of '{}' reads is not staged: {}",
                                            job.source, report.error().message()));
            } else if (report && report->damaged_bytes > 0) {
                options_.notice(fmt::format("{} bytes that a boot of '{}' reads are damaged",
                                            report->damaged_bytes, job.source));
            }
        }
        if (job.done) {
            job.done->set_value(std::move(report));
        }
        lock.lock();
        running_root_.reset();
    }
}

void Boot::attached(std::string_view source) {
    if (!options_.background || !options_.prefetch_attached) {
        return;
    }
    const Result<Hash256> root = pool_.boot_root(source);
    if (!root || !pool_.has_boot_manifest(*root)) {
        return;
    }
    const std::lock_guard lock(jobs_mutex_);
    const auto now = clock_.monotonic();
    std::erase_if(fresh_, [now](const auto& each) { return now - each.second > kFreshFor; });
    if (stopping_ || running_root_ == *root || fresh_.contains(*root) ||
        std::ranges::any_of(jobs_, [&](const Job& job) { return job.root == *root; })) {
        ++stats_.joined;
        return;
    }
    jobs_.push_back(
        {.source = std::string(source), .root = *root, .options = {}, .done = std::nullopt});
    jobs_work_.notify_all();
}

Result<StageReport> Boot::prefetch(std::string_view source, const PrefetchOptions& options) {
    STELLARIUM_TRY(pool_.find(source));
    Job job{.source = std::string(source),
            .root = std::nullopt,
            .options = options,
            .done = std::nullopt};
    if (!options_.background) {
        return run_job(job);
    }
    std::future<Result<StageReport>> report;
    {
        const std::lock_guard lock(jobs_mutex_);
        if (stopping_) {
            return fail(ErrorCode::kCancelled, "the daemon is stopping");
        }
        if (callers_ >= kMaxWaitingPrefetches) {
            return fail(ErrorCode::kBusy,
                        fmt::format("{} others wait for a prefetch: try again", callers_));
        }
        ++callers_;
        job.done.emplace();
        report = job.done->get_future();
        jobs_.push_back(std::move(job));
        jobs_work_.notify_all();
    }
    Result<StageReport> result = report.get();
    const std::lock_guard lock(jobs_mutex_);
    --callers_;
    return result;
}

BootStats Boot::stats() const {
    BootStats stats;
    {
        const std::lock_guard lock(jobs_mutex_);
        stats = stats_;
        stats.waiting = jobs_.size();
    }
    const std::lock_guard lock(recordings_mutex_);
    stats.recordings = recordings_.size();
    return stats;
}

}  // namespace stellarium::boot
