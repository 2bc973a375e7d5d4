#include "daemon/vhost_host.h"

#include <algorithm>
#include <charconv>
#include <future>
#include <memory>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "base/flush_device.h"
#include "control/locations.h"
#include "daemon/limits.h"
#include "daemon/socket_group.h"

namespace stellarium::daemon {
namespace {

using control::AttachmentOptions;
using control::AttachmentState;
using control::AttachmentStatus;

std::string device_name(uint64_t id) {
    return std::to_string(id);
}

}  // namespace

VhostHost::VhostHost(nova::Pool& pool, VhostHostOptions options, Log& log)
    : pool_(pool), options_(std::move(options)), log_(log) {}

VhostHost::~VhostHost() {
    stop();
}

Result<void> VhostHost::start() {
    const std::string directory = options_.runtime_directory + "/vhost";
    STELLARIUM_TRY(control::make_private_directory(directory, options_.socket_gid));
    vhost::ServerOptions server_options;
    server_options.data_threads = options_.data_threads;
    server_options.descriptors = options_.descriptors;
    server_options.logger = [this](vhost::LogLevel level, std::string_view device,
                                   std::string_view message) {
        const std::initializer_list<LogField> fields = {{"device", std::string(device)},
                                                        {"source", source_of(device)},
                                                        {"message", std::string(message)}};
        switch (level) {
            case vhost::LogLevel::kInfo:
                return log_.info("guest", fields);
            case vhost::LogLevel::kWarning:
                return log_.warning("guest", fields);
            case vhost::LogLevel::kError:
                return log_.error("guest", fields);
        }
    };
    STELLARIUM_ASSIGN(server_, vhost::VhostServer::create(std::move(server_options)));
    for (const nova::Pool::AttachmentRecord& record : pool_.attachments()) {
        const Result<nova::EntityInfo> info = pool_.find(record.source);
        if (!info) {
            log_.error("attachment of nothing",
                       {{"source", record.source}, {"message", info.error().message()}});
            continue;
        }
        Entry entry;
        Result<void> served;
        if (Result<AttachmentOptions> options = control::decode_attachment(record); options) {
            entry.options = *std::move(options);
            served = serve(info->id, record.source, entry);
        } else {
            served = std::unexpected(options.error());
            entry.unreadable = true;
        }
        if (served) {
            log_.info("attachment restored", {{"source", record.source}, {"socket", entry.socket}});
        } else {
            entry.failure = served.error().message();
            log_.error("attachment not restored",
                       {{"source", record.source}, {"message", entry.failure}});
        }
        release(info->id, std::move(entry));
    }
    return {};
}

void VhostHost::flush_entry(const Entry& entry) {
    if (!entry.device) {
        return;
    }
    if (const Result<void> flushed = flush_device(*entry.device); !flushed) {
        log_.error("flush failed",
                   {{"source", entry.source}, {"message", flushed.error().message()}});
    }
}

void VhostHost::flush() {
    std::map<uint64_t, Entry> entries;
    {
        const std::scoped_lock lock(mutex_);
        entries = entries_;
    }
    for (const auto& [id, entry] : entries) {
        flush_entry(entry);
    }
}

void VhostHost::stop() {
    if (!server_) {
        return;
    }
    server_->shutdown();
    std::map<uint64_t, Entry> entries;
    {
        const std::scoped_lock lock(mutex_);
        entries = std::exchange(entries_, {});
    }
    for (auto& [id, entry] : entries) {
        flush_entry(entry);
        entry.device.reset();
    }
    server_.reset();
}

/// Opens the device and its socket. On error nothing is left of them.
Result<void> VhostHost::serve(uint64_t id, std::string_view source, Entry& entry) {
    entry.source = source;
    entry.socket = fmt::format("{}/vhost/{}.sock", options_.runtime_directory, id);
    STELLARIUM_ASSIGN(auto device, pool_.attach(source, {.read_only = entry.options.read_only,
                                                         .label = label_of(entry),
                                                         .serial = entry.options.serial,
                                                         .id = id}));
    BudgetShare descriptors(options_.descriptors);
    if (!descriptors.resize(kDescriptorsOfAttachment)) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("'{}' cannot be attached: attachments and guests take all {} "
                                "descriptors that this process may have for them; give the daemon "
                                "more (LimitNOFILE= in the systemd unit, ulimit -Hn), or detach "
                                "others",
                                source, options_.descriptors->total()));
    }
    vhost::AttachOptions options;
    options.socket_path = entry.socket;
    options.queues = static_cast<uint16_t>(entry.options.queues);
    options.block_size_bytes = entry.options.block_size_bytes;
    options.read_only = entry.options.read_only;
    options.serial = entry.options.serial;
    options.limits = entry.options.limits;
    // The server's threads may hold a device a moment longer than detach() takes, and the volume is
    // open as long as they do. This handle tells when the last of them let go.
    const auto released = std::make_shared<std::promise<void>>();
    entry.released = released->get_future().share();
    const std::shared_ptr<BlockDevice> lent(
        device.get(),
        [inner = device, released,
         held = std::make_shared<BudgetShare>(std::move(descriptors))](BlockDevice*) mutable {
            inner.reset();
            held.reset();
            released->set_value();
        });
    STELLARIUM_TRY(server_->attach(device_name(id), lent, options));
    if (auto given = give_to_group(entry.socket, options_.socket_gid, "socket " + entry.socket);
        !given) {
        STELLARIUM_TRY(server_->detach(device_name(id)));
        return given;
    }
    entry.device = std::move(device);
    return {};
}

/// Finds the id of `source` and makes this call the only one that changes its attachment.
Result<uint64_t> VhostHost::reserve(std::string_view source, Change change) {
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(source));
    const std::scoped_lock lock(mutex_);
    const auto found = entries_.find(info.id);
    if (found != entries_.end() && found->second.change != Change::kNone) {
        return fail(ErrorCode::kBusy,
                    fmt::format("'{}' is just being attached, detached or limited", source));
    }
    if (change == Change::kAttach && found != entries_.end()) {
        return fail(ErrorCode::kBusy, fmt::format("'{}' is attached already: vhost-user socket {}",
                                                  source, found->second.socket));
    }
    if (change != Change::kAttach && found == entries_.end()) {
        return fail(ErrorCode::kNotFound, fmt::format("'{}' is not attached", source));
    }
    entries_[info.id].change = change;
    return info.id;
}

void VhostHost::release(uint64_t id, std::optional<Entry> entry) {
    const std::scoped_lock lock(mutex_);
    if (entry) {
        entry->change = Change::kNone;
        entries_[id] = *std::move(entry);
    } else {
        entries_.erase(id);
    }
}

std::string VhostHost::label_of(const Entry& entry) {
    return "vhost-user socket " + entry.socket;
}

nova::Pool::AttachmentRecord VhostHost::record_of(std::string_view source, const Entry& entry) {
    return {.source = std::string(source),
            .label = label_of(entry),
            .options = control::encode_attachment(entry.options)};
}

Result<AttachmentStatus> VhostHost::attach(std::string_view source,
                                           const AttachmentOptions& options) {
    STELLARIUM_ASSIGN(const uint64_t id, reserve(source, Change::kAttach));
    Entry entry;
    entry.options = options;
    Result<void> attached = serve(id, source, entry);
    if (attached) {
        attached = pool_.set_attachment(id, record_of(source, entry));
        if (!attached) {
            // Not on record, so it must not be there either.
            if (const auto undone = server_->detach(device_name(id)); !undone) {
                log_.error("detach failed", {{"source", std::string(source)},
                                             {"message", undone.error().message()}});
            } else {
                entry.released.wait();
            }
            entry.device.reset();
        }
    }
    if (!attached) {
        release(id, std::nullopt);
        return std::unexpected(attached.error());
    }
    log_.info("attached", {{"source", std::string(source)}, {"socket", entry.socket}});
    AttachmentStatus status = status_of(id, std::string(source), entry);
    release(id, std::move(entry));
    if (options_.attached) {
        options_.attached(std::string(source));
    }
    return status;
}

Result<AttachmentStatus> VhostHost::detach(std::string_view source) {
    STELLARIUM_ASSIGN(const uint64_t id, reserve(source, Change::kDetach));
    Entry entry;
    {
        const std::scoped_lock lock(mutex_);
        entry = entries_[id];
    }
    AttachmentStatus status = status_of(id, std::string(source), entry);
    const auto undo = [&](const Error& error) {
        entry.failure = error.message();
        release(id, std::move(entry));
        return std::unexpected(error);
    };
    if (entry.device) {
        if (entry.failure.empty()) {
            if (const Result<void> detached = server_->detach(device_name(id)); !detached) {
                return undo(detached.error());
            }
            entry.released.wait();
        }
        if (const Result<void> flushed = flush_device(*entry.device); !flushed) {
            return undo(flushed.error().with_context(
                fmt::format("'{}' is disconnected, but not all that it wrote is durable", source)));
        }
        // The map's copy goes too, or the device would live on and keep the volume open.
        const std::scoped_lock lock(mutex_);
        entries_[id].device.reset();
    }
    entry.device.reset();
    if (const Result<void> forgotten = pool_.set_attachment(id, std::nullopt); !forgotten) {
        return undo(forgotten.error());
    }
    release(id, std::nullopt);
    log_.info("detached", {{"source", std::string(source)}});
    return status;
}

Result<AttachmentStatus> VhostHost::set_limits(std::string_view source, const RateLimits& limits) {
    STELLARIUM_ASSIGN(const uint64_t id, reserve(source, Change::kLimits));
    Entry entry;
    {
        const std::scoped_lock lock(mutex_);
        entry = entries_[id];
    }
    const control::AttachmentOptions before = entry.options;
    entry.options.limits = limits;
    Result<void> set;
    if (entry.unreadable) {
        set = fail(ErrorCode::kUnsupported,
                   fmt::format("'{}' cannot be limited: {}; detach and attach it again", source,
                               entry.failure));
    }
    if (set) {
        set = pool_.set_attachment(id, record_of(source, entry));
    }
    if (!set) {
        entry.options = before;
        release(id, std::move(entry));
        return std::unexpected(set.error());
    }
    // On record first: limits that cannot be kept are not begun with either.
    if (entry.failure.empty()) {
        set = server_->set_limits(device_name(id), limits);
    }
    AttachmentStatus status = status_of(id, std::string(source), entry);
    release(id, std::move(entry));
    if (!set) {
        return std::unexpected(set.error());
    }
    log_.info("limited", {{"source", std::string(source)},
                          {"limits", limits.any() ? format_rate_limits(limits) : "none"}});
    return status;
}

AttachmentStatus VhostHost::status_of(uint64_t id, const std::string& source,
                                      const Entry& entry) const {
    AttachmentStatus status;
    status.source = source;
    status.socket = entry.socket;
    status.options = entry.options;
    status.detail = entry.failure;
    if (!entry.failure.empty()) {
        status.state = AttachmentState::kFailed;
        return status;
    }
    const Result<vhost::AttachmentStatus> device = server_->status(device_name(id));
    if (!device) {
        status.state = AttachmentState::kFailed;
        status.detail = device.error().message();
        return status;
    }
    status.state = device->connected ? AttachmentState::kConnected : AttachmentState::kListening;
    if (device->connected) {
        status.detail = fmt::format("pid {}", device->peer_pid);
    } else if (!device->last_fault.empty()) {
        status.detail = "last guest was disconnected: " + device->last_fault;
    }
    return status;
}

std::vector<AttachmentStatus> VhostHost::attachments() const {
    std::vector<AttachmentStatus> statuses;
    for (const nova::Pool::AttachmentRecord& record : pool_.attachments()) {
        const Result<nova::EntityInfo> info = pool_.find(record.source);
        std::optional<Entry> entry;
        if (info) {
            const std::scoped_lock lock(mutex_);
            if (const auto found = entries_.find(info->id);
                found != entries_.end() && (found->second.change == Change::kNone ||
                                            found->second.change == Change::kLimits)) {
                entry = found->second;
                entry->device.reset();  // Only the owner keeps the volume open.
            }
        }
        if (entry) {
            statuses.push_back(status_of(info->id, record.source, *entry));
        }
    }
    return statuses;
}

std::vector<vhost::AttachmentStatus> VhostHost::device_status() const {
    return server_ ? server_->status() : std::vector<vhost::AttachmentStatus>();
}

std::string VhostHost::source_of(std::string_view device) const {
    uint64_t id = 0;
    std::ignore =
        std::from_chars(std::to_address(device.begin()), std::to_address(device.end()), id);
    const std::scoped_lock lock(mutex_);
    const auto entry = entries_.find(id);
    return entry != entries_.end() ? entry->second.source : std::string();
}

}  // namespace stellarium::daemon
