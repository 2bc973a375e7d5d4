#include "control/boot_json.h"

#include "control/entity_json.h"
#include "nova/limits.h"

namespace stellarium::control {
namespace {

std::string time_of(uint64_t since_1970_ns) {
    return format_time(std::chrono::nanoseconds(since_1970_ns));
}

uint64_t bytes_of_runs(const std::vector<boot::PageRange>& runs) {
    return boot::pages_of(runs) * nova::kPageBytes;
}

double seconds_of(std::chrono::nanoseconds duration) {
    return std::chrono::duration<double>(duration).count();
}

Json summary(const Hash256& root, const std::vector<std::string>& images,
             const boot::BootManifest& manifest) {
    return {{"root", root.hex()},
            {"images", images},
            {"size_bytes", manifest.size_bytes},
            {"created", time_of(manifest.created_ns)},
            {"updated", time_of(manifest.updated_ns)},
            {"merged_traces", manifest.merged_traces},
            {"prefetch_bytes", bytes_of_runs(manifest.prefetch)},
            {"prefetch_runs", manifest.prefetch.size()}};
}

Json file_of(const std::optional<boot::BootFile>& file, const std::string& image) {
    if (!file) {
        return nullptr;
    }
    return {{"image", image.empty() ? Json(nullptr) : Json(image)},
            {"root", file->root.hex()},
            {"size_bytes", file->size_bytes}};
}

}  // namespace

Json to_json(const boot::ManifestEntry& entry) {
    Json json = summary(entry.root, entry.images, entry.manifest);
    json["damage"] = entry.damage;
    return json;
}

Json to_json(const boot::ManifestView& view) {
    const boot::BootManifest& manifest = view.manifest;
    Json json = summary(manifest.root, view.images, manifest);
    json["kernel"] = file_of(manifest.kernel, view.kernel_image);
    json["initrd"] = file_of(manifest.initrd, view.initrd_image);
    json["hints"] = manifest.hints;
    json["traces"] = Json::array();
    for (const boot::BootTrace& trace : manifest.traces) {
        json["traces"].push_back(Json{{"recorded", time_of(trace.recorded_ns)},
                                      {"bytes", bytes_of_runs(trace.runs)},
                                      {"runs", trace.runs.size()},
                                      {"cut", trace.cut}});
    }
    json["runs"] = Json::array();
    for (const boot::PageRange& run : manifest.prefetch) {
        json["runs"].push_back(Json{{"offset_bytes", run.page * nova::kPageBytes},
                                    {"length_bytes", run.pages * nova::kPageBytes}});
    }
    return json;
}

Json to_json(const boot::RecordingStatus& status) {
    return {{"source", status.source},
            {"root", status.root.hex()},
            {"started", format_time(status.started)},
            {"bytes", status.progress.pages * nova::kPageBytes},
            {"runs", status.progress.runs},
            {"cut", status.progress.cut}};
}

Json to_json(const boot::StageReport& report) {
    return {{"wanted_bytes", report.wanted_bytes},       {"staged_bytes", report.staged_bytes},
            {"damaged_bytes", report.damaged_bytes},     {"reads", report.reads},
            {"short_of_memory", report.short_of_memory}, {"seconds", seconds_of(report.duration)}};
}

Json to_json(const boot::BootStats& stats) {
    return {{"running", stats.staging},
            {"source", stats.staging_source},
            {"done_bytes", stats.done_bytes},
            {"total_bytes", stats.total_bytes},
            {"waiting", stats.waiting},
            {"prefetches", stats.prefetches},
            {"joined", stats.joined},
            {"failures", stats.failures},
            {"staged_bytes", stats.staged_bytes},
            {"reads", stats.reads},
            {"seconds", seconds_of(stats.duration)}};
}

}  // namespace stellarium::control
