#include "daemon/metrics.h"

#include <chrono>
#include <utility>
#include <vector>

#include <prometheus/family.h>
#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include "control/entity_json.h"

namespace stellarium::daemon {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

const prometheus::Histogram::BucketBoundaries kRequestBuckets{0.001, 0.003, 0.01, 0.03, 0.1,
                                                              0.3,   1,     3,    10,   60};

/// Collects families and gives each its samples.
class Page {
  public:
    void gauge(const char* name, const char* help, double value) {
        start(name, help, MetricType::Gauge);
        sample({}, value);
    }
    void counter(const char* name, const char* help, uint64_t value) {
        start(name, help, MetricType::Counter);
        sample({}, static_cast<double>(value));
    }
    void start(const char* name, const char* help, MetricType type) {
        families_.emplace_back();
        families_.back().name = name;
        families_.back().help = help;
        families_.back().type = type;
    }
    void sample(std::vector<ClientMetric::Label> labels, double value) {
        MetricFamily& family = families_.back();
        ClientMetric metric;
        metric.label = std::move(labels);
        if (family.type == MetricType::Counter) {
            metric.counter.value = value;
        } else {
            metric.gauge.value = value;
        }
        family.metric.push_back(std::move(metric));
    }
    void summary(std::vector<ClientMetric::Label> labels, uint64_t count, double sum) {
        ClientMetric metric;
        metric.label = std::move(labels);
        metric.summary.sample_count = count;
        metric.summary.sample_sum = sum;
        families_.back().metric.push_back(std::move(metric));
    }
    std::vector<MetricFamily> take() { return std::move(families_); }

  private:
    std::vector<MetricFamily> families_;
};

double real(uint64_t value) {
    return static_cast<double>(value);
}

void add_store(Page& page, const nova::PoolStats& stats, bool read_only) {
    page.gauge("stellarium_store_read_only", "1 when nothing can be written.", read_only ? 1 : 0);
    page.gauge("stellarium_store_chunks", "Distinct chunks and objects.", real(stats.store.chunks));
    page.gauge("stellarium_store_unique_bytes", "Plain content of the distinct chunks.",
               real(stats.store.unique_bytes));
    page.gauge("stellarium_store_stored_bytes", "Bytes that the segment files take on disk.",
               real(stats.store.stored_bytes));
    page.gauge("stellarium_store_segments", "Segment files.", real(stats.store.segments));
    page.gauge("stellarium_store_index_bytes", "Memory of the index.",
               real(stats.store.index_bytes));
    page.gauge("stellarium_store_dedup_ratio",
               "Bytes given to the store for each unique byte that it keeps.",
               control::dedup_ratio(stats));
    page.counter("stellarium_store_appended_bytes_total", "Bytes appended to the log.",
                 stats.store.appended_bytes);
    page.counter("stellarium_store_duplicate_bytes_total",
                 "Chunk bytes that were already there and not written.",
                 stats.store.duplicate_bytes);
    page.counter("stellarium_store_batches_total", "Batches appended to the log.",
                 stats.store.sequence);
    page.counter("stellarium_store_index_misses_recovered_total",
                 "Index misses that footers answered; anything but 0 is worth a look.",
                 stats.store.index_misses_recovered);
    page.counter("stellarium_store_chunks_verified_total", "Chunks checked against their ids.",
                 stats.store.chunks_verified);
}

void add_pool(Page& page, const nova::PoolStats& stats) {
    page.gauge("stellarium_images", "Images.", real(stats.images));
    page.gauge("stellarium_volumes", "Volumes.", real(stats.volumes));
    page.gauge("stellarium_snapshots", "Snapshots.", real(stats.snapshots));
    page.gauge("stellarium_attachments", "Attachments on record.", real(stats.attachments));
    page.gauge("stellarium_logical_bytes", "Sizes of all images and volumes.",
               real(stats.logical_bytes));
    page.gauge("stellarium_dirty_bytes", "Acknowledged writes that the log does not hold yet.",
               real(stats.dirty_bytes));
    page.gauge("stellarium_delta_extents", "Extents of volumes' deltas in memory.",
               real(stats.delta_extents));
    page.gauge("stellarium_node_cache_bytes", "Memory of decoded map nodes.",
               real(stats.node_cache_bytes));
    page.counter("stellarium_imported_bytes_total", "Bytes given to imports, holes left out.",
                 stats.imported_bytes);
    page.counter("stellarium_written_bytes_total", "Bytes written by guests.", stats.written_bytes);
}

void add_collections(Page& page, const nova::PoolStats& stats) {
    page.gauge("stellarium_gc_running", "1 while garbage is collected.", stats.gc.running ? 1 : 0);
    page.gauge("stellarium_gc_reclaimable_bytes",
               "What a garbage collection would free, an estimate.",
               real(stats.gc.reclaimable_bytes));
    page.counter("stellarium_gc_collections_total", "Garbage collections that were completed.",
                 stats.gc.collections);
    page.counter("stellarium_gc_failures_total", "Garbage collections that failed.",
                 stats.gc.failures);
    page.counter("stellarium_gc_freed_bytes_total",
                 "Bytes that garbage collections gave back to the file system.",
                 stats.gc.freed_bytes);
    page.gauge("stellarium_gc_last_end_seconds",
               "When the last garbage collection was completed, since 1970; 0: none was.",
               std::chrono::duration<double>(stats.gc.last_ended).count());
    if (stats.gc.last) {
        page.gauge("stellarium_gc_last_duration_seconds", "How long it took.",
                   std::chrono::duration<double>(stats.gc.last->duration).count());
    }
    page.gauge("stellarium_file_system_bytes", "Size of the file system that the store is on.",
               real(stats.space.total_bytes));
    page.gauge("stellarium_file_system_free_bytes", "What of it is free.",
               real(stats.space.free_bytes));
    page.gauge("stellarium_space_low", "1 when little of it is free: see low_space_percent.",
               stats.space_low ? 1 : 0);
    page.gauge("stellarium_disk_full", "1 while writes fail for want of space.",
               stats.store.disk_full ? 1 : 0);
    page.counter("stellarium_full_appends_total", "Appends that failed for want of space.",
                 stats.store.full_appends);
    page.gauge("stellarium_reserve_bytes",
               "Room kept for removals and garbage collection on a full disk.",
               real(stats.store.reserve_bytes));
}

void add_scrubs(Page& page, const nova::PoolStats& stats) {
    const nova::ScrubStats& scrub = stats.scrub;
    const auto seconds = [](std::chrono::nanoseconds time) {
        return std::chrono::duration<double>(time).count();
    };
    page.gauge("stellarium_damaged_chunks",
               "Chunks and objects known to be damaged, without another copy; anything but 0 needs "
               "a look: stellarctl scrub --status.",
               real(scrub.damaged_chunks));
    page.gauge("stellarium_scrub_running", "1 while a scrub runs.", scrub.running ? 1 : 0);
    page.counter("stellarium_scrub_bytes_total", "Bytes that scrubs read and checked.",
                 scrub.checked_bytes);
    page.counter("stellarium_scrub_passes_total", "Scrubs that were completed.", scrub.passes);
    page.gauge("stellarium_scrub_last_end_seconds",
               "When the last scrub, of any process, was completed, since 1970; 0: none was.",
               scrub.last ? seconds(scrub.last->ended) : 0);
    page.gauge("stellarium_scrub_pass_bytes", "Bytes checked by the present scrub; 0: none.",
               scrub.present ? real(scrub.present->bytes) : 0);
    page.gauge("stellarium_scrub_next_due_seconds",
               "When the next one begins by schedule, since 1970; 0: there is none.",
               seconds(scrub.next_due));
}

void add_boots(Page& page, const boot::BootStats& stats) {
    page.gauge("stellarium_boot_recordings", "Boots that are being recorded.",
               real(stats.recordings));
    page.gauge("stellarium_prefetch_running", "1 while something is staged.",
               stats.staging ? 1 : 0);
    page.gauge("stellarium_prefetch_waiting", "What is to be staged after it.",
               real(stats.waiting));
    page.counter("stellarium_prefetches_total", "Prefetches that were completed.",
                 stats.prefetches);
    page.counter("stellarium_prefetches_joined_total",
                 "Attachments for which the prefetch of another clone was enough.", stats.joined);
    page.counter("stellarium_prefetch_failures_total", "Prefetches that failed.", stats.failures);
    page.counter("stellarium_prefetch_bytes_total", "Bytes staged and checked by prefetches.",
                 stats.staged_bytes);
    page.counter("stellarium_prefetch_reads_total", "Reads that they took.", stats.reads);
    page.start("stellarium_prefetch_seconds_total", "Time that prefetches took.",
               MetricType::Counter);
    page.sample({}, std::chrono::duration<double>(stats.duration).count());
}

void add_devices(Page& page, const VhostHost& host) {
    const std::vector<vhost::AttachmentStatus> devices = host.device_status();
    std::vector<std::string> sources;
    sources.reserve(devices.size());
    for (const vhost::AttachmentStatus& device : devices) {
        sources.push_back(host.source_of(device.name));
    }
    const auto each_device = [&](const char* name, const char* help, MetricType type, auto value) {
        page.start(name, help, type);
        for (size_t i = 0; i < devices.size(); ++i) {
            page.sample({{"volume", sources[i]}}, value(devices[i]));
        }
    };
    each_device("stellarium_device_connected", "1 when a guest is connected.", MetricType::Gauge,
                [](const auto& device) { return device.connected ? 1.0 : 0.0; });
    each_device("stellarium_device_in_flight", "Requests taken and not yet completed.",
                MetricType::Gauge, [](const auto& device) { return real(device.in_flight); });
    each_device("stellarium_device_connections_total", "Guests that connected.",
                MetricType::Counter, [](const auto& device) { return real(device.connections); });
    each_device("stellarium_device_forced_disconnects_total",
                "Guests that were disconnected for breaking the protocol.", MetricType::Counter,
                [](const auto& device) { return real(device.forced_disconnects); });
    each_device("stellarium_device_throttled_requests_total",
                "Requests that a limit of the attachment made wait.", MetricType::Counter,
                [](const auto& device) { return real(device.throttled_requests); });
    each_device("stellarium_device_throttled_seconds_total",
                "Time in which requests waited for a limit; counted when they go on.",
                MetricType::Counter,
                [](const auto& device) { return real(device.throttled_ns) / 1e9; });
    const auto each_kind = [&](auto emit) {
        for (size_t i = 0; i < devices.size(); ++i) {
            for (size_t kind = 0; kind < vhost::kRequestKinds; ++kind) {
                const vhost::RequestTotals& totals = devices[i].totals[kind];
                const auto name = vhost::request_kind_name(static_cast<vhost::RequestKind>(kind));
                emit(std::vector<ClientMetric::Label>{{"volume", sources[i]},
                                                      {"request", std::string(name)}},
                     totals);
            }
        }
    };
    page.start("stellarium_device_bytes_total", "Bytes moved by guests' requests.",
               MetricType::Counter);
    each_kind([&](auto labels, const vhost::RequestTotals& totals) {
        page.sample(std::move(labels), real(totals.bytes));
    });
    page.start("stellarium_device_errors_total", "Requests answered with an error.",
               MetricType::Counter);
    each_kind([&](auto labels, const vhost::RequestTotals& totals) {
        page.sample(std::move(labels), real(totals.errors));
    });
    page.start("stellarium_device_request_seconds", "Guests' requests, from taking to completing.",
               MetricType::Summary);
    each_kind([&](auto labels, const vhost::RequestTotals& totals) {
        page.summary(std::move(labels), totals.requests, real(totals.latency_ns) / 1e9);
    });
}

void add_files(Page& page, const MountHost& host) {
    const auto status = host.status();
    page.gauge("stellarium_files_mounted", "1 while a directory shows the store as files.",
               status ? 1 : 0);
    if (!status) {
        return;
    }
    page.gauge("stellarium_files_open", "Open files.", real(status->open_files));
    page.gauge("stellarium_files_in_flight", "Requests taken and not yet answered.",
               real(status->in_flight));
    page.gauge("stellarium_files_kept",
               "Of these, those that wait for room and have no thread to wait with.",
               real(status->kept));
    page.gauge("stellarium_files_adopted",
               "1 when the connection with the kernel is that of an earlier daemon.",
               status->adopted ? 1 : 0);
    page.counter("stellarium_files_repeated_requests_total",
                 "Requests that an earlier daemon had taken, and the kernel repeated.",
                 status->repeated);
    const auto each = [&](const char* name, const char* help, auto value) {
        page.start(name, help, MetricType::Counter);
        for (size_t kind = 0; kind < fuse::kFileRequestKinds; ++kind) {
            page.sample(
                {{"request",
                  std::string(fuse::file_request_name(static_cast<fuse::FileRequest>(kind)))}},
                real(value(status->totals[kind])));
        }
    };
    each("stellarium_files_requests_total", "Requests of the kernel, for files.",
         [](const fuse::FileRequestTotals& totals) { return totals.requests; });
    each("stellarium_files_bytes_total", "Bytes read and written by those.",
         [](const fuse::FileRequestTotals& totals) { return totals.bytes; });
    each("stellarium_files_errors_total",
         "Those that failed; a name that is not there is no failure.",
         [](const fuse::FileRequestTotals& totals) { return totals.errors; });
}

void add_nbd(Page& page, const NbdHost& host) {
    const nbd::ServerStatus status = host.status();
    page.gauge("stellarium_nbd_clients", "NBD clients that are connected.", real(status.clients));
    page.counter("stellarium_nbd_connections_total", "NBD clients that ever connected.",
                 status.connections);
    page.counter("stellarium_nbd_forced_disconnects_total",
                 "NBD clients disconnected for breaking the protocol or taking too long.",
                 status.forced_disconnects);
    const auto each = [&](const char* name, const char* help, auto value) {
        page.start(name, help, MetricType::Counter);
        for (size_t kind = 0; kind < nbd::kCommandKinds; ++kind) {
            page.sample({{"request", std::string(nbd::command_name(kind))}},
                        real(value(status.totals[kind])));
        }
    };
    each("stellarium_nbd_requests_total", "Requests of NBD clients.",
         [](const nbd::CommandTotals& totals) { return totals.requests; });
    each("stellarium_nbd_bytes_total", "Bytes that those asked for, where they succeeded.",
         [](const nbd::CommandTotals& totals) { return totals.bytes; });
    each("stellarium_nbd_errors_total", "Those answered with an error.",
         [](const nbd::CommandTotals& totals) { return totals.errors; });
}

}  // namespace

struct Metrics::Impl {
    Impl(const nova::Pool& pool_in, const VhostHost& host_in, const boot::Boot& boot_in,
         const MountHost& files_in, const NbdHost* nbd_in, std::string version_in)
        : pool(pool_in),
          host(host_in),
          boot(boot_in),
          files(files_in),
          nbd(nbd_in),
          version(std::move(version_in)) {}

    const nova::Pool& pool;
    const VhostHost& host;
    const boot::Boot& boot;
    const MountHost& files;
    const NbdHost* nbd;
    std::string version;
    prometheus::Registry registry;
    prometheus::Family<prometheus::Histogram>& requests =
        prometheus::BuildHistogram()
            .Name("stellarium_control_request_seconds")
            .Help("Control requests, by method and HTTP status.")
            .Register(registry);
};

Metrics::Metrics(const nova::Pool& pool, const VhostHost& host, const boot::Boot& boot,
                 const MountHost& files, const NbdHost* nbd, std::string version)
    : impl_(std::make_unique<Impl>(pool, host, boot, files, nbd, std::move(version))) {}

Metrics::~Metrics() = default;

void Metrics::observe_request(std::string_view method, int status, double seconds) {
    // A stranger's method is not worth a time series of its own.
    const bool known = method == "GET" || method == "POST" || method == "PUT" || method == "DELETE";
    impl_->requests
        .Add(
            {{"method", known ? std::string(method) : "other"}, {"status", std::to_string(status)}},
            kRequestBuckets)
        .Observe(seconds);
}

std::string Metrics::text() const {
    Page page;
    page.start("stellarium_build_info", "The daemon's version.", MetricType::Gauge);
    page.sample({{"version", impl_->version}}, 1);
    const nova::PoolStats stats = impl_->pool.stats();
    add_store(page, stats, impl_->pool.read_only_reason().has_value());
    add_pool(page, stats);
    add_collections(page, stats);
    add_scrubs(page, stats);
    add_boots(page, impl_->boot.stats());
    add_devices(page, impl_->host);
    add_files(page, impl_->files);
    if (impl_->nbd != nullptr) {
        add_nbd(page, *impl_->nbd);
    }
    std::vector<MetricFamily> families = page.take();
    for (MetricFamily& family : impl_->registry.Collect()) {
        families.push_back(std::move(family));
    }
    return prometheus::TextSerializer().Serialize(families);
}

}  // namespace stellarium::daemon
