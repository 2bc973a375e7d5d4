#include "daemon/nbd_host.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <utility>

#include <fmt/format.h>

#include "base/flush_device.h"
#include "base/units.h"
#include "daemon/socket_group.h"
#include "nova/limits.h"

namespace stellarium::daemon {
namespace {

/// How long a client waits for the flush of those that had the volume before.
constexpr std::chrono::seconds kReleaseTimeout{30};

class ReaderMap final : public nbd::AllocationMap {
  public:
    explicit ReaderMap(std::unique_ptr<nova::Reader> reader) : reader_(std::move(reader)) {}
    Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(uint64_t offset_bytes) override {
        return reader_->next_data(offset_bytes);
    }

  private:
    const std::unique_ptr<nova::Reader> reader_;
};

/// Always true: what is not known to be a hole is data.
class AllData final : public nbd::AllocationMap {
  public:
    explicit AllData(uint64_t size_bytes) : size_bytes_(size_bytes) {}
    Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(uint64_t offset_bytes) override {
        if (offset_bytes >= size_bytes_) {
            return std::nullopt;
        }
        return std::pair(offset_bytes, size_bytes_ - offset_bytes);
    }

  private:
    const uint64_t size_bytes_;
};

/// Passes everything on, and tells when the content has changed.
class WatchedDevice final : public BlockDevice {
  public:
    WatchedDevice(std::shared_ptr<BlockDevice> device, std::function<void()> changed)
        : device_(std::move(device)), changed_(std::move(changed)) {}

    uint64_t size_bytes() const override { return device_->size_bytes(); }
    bool read_only() const override { return device_->read_only(); }
    std::string serial() const override { return device_->serial(); }
    Result<void> read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode) override {
        return device_->read(offset_bytes, into, mode);
    }
    Result<void> write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode) override {
        return noted(device_->write(offset_bytes, from, mode));
    }
    Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) override {
        return noted(device_->discard(offset_bytes, length_bytes, mode));
    }
    Result<void> write_zeroes(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) override {
        return noted(device_->write_zeroes(offset_bytes, length_bytes, mode));
    }
    void flush_async(std::function<void(Result<void>)> done) override {
        device_->flush_async(std::move(done));
    }
    void set_resize_listener(std::function<void(uint64_t)> listener) override {
        device_->set_resize_listener(std::move(listener));
    }

  private:
    /// Also after a failure, which may come after a part of it was done.
    Result<void> noted(Result<void> result) {
        changed_();
        return result;
    }

    const std::shared_ptr<BlockDevice> device_;
    const std::function<void()> changed_;
};

}  // namespace

class NbdHost::PoolExport final : public nbd::Export {
  public:
    PoolExport(NbdHost& host, const nova::EntityInfo& info, std::shared_ptr<BlockDevice> device)
        : host_(host),
          id_(info.id),
          name_(info.name),
          device_(std::make_unique<WatchedDevice>(std::move(device), [this] { note_change(); })) {}

    ~PoolExport() override {
        if (!device_->read_only()) {
            if (const Result<void> flushed = flush_device(*device_); !flushed) {
                host_.log_.error("flush failed",
                                 {{"source", name_}, {"message", flushed.error().message()}});
            }
        }
        map_.reset();
        device_.reset();
        host_.log_.debug("NBD export closed", {{"source", name_}});
        host_.released(id_);
    }

    BlockDevice& device() override { return *device_; }

    /// The last map is good as long as nothing was written: it shows what had completed when it was
    /// made, and each write is counted when it completes.
    Result<std::shared_ptr<nbd::AllocationMap>> allocation() override {
        const uint64_t changes = changes_.load();
        {
            const std::scoped_lock lock(mutex_);
            if (map_ && map_changes_ == changes) {
                return map_;
            }
        }
        std::shared_ptr<nbd::AllocationMap> map;
        if (is_still_named()) {
            STELLARIUM_ASSIGN(auto reader, host_.pool_.open_reader(name_));
            map = std::make_shared<ReaderMap>(std::move(reader));
        }
        if (!map || !is_still_named()) {
            return std::make_shared<AllData>(device_->size_bytes());
        }
        const std::scoped_lock lock(mutex_);
        map_ = map;
        map_changes_ = changes;
        has_map_.store(true);
        return map;
    }

  private:
    /// Another one may have got the name since.
    bool is_still_named() const {
        const Result<nova::EntityInfo> info = host_.pool_.find(name_);
        return info && info->id == id_;
    }

    void note_change() {
        changes_.fetch_add(1);
        // An outdated map keeps space from being freed.
        if (has_map_.load(std::memory_order_relaxed)) {
            std::shared_ptr<nbd::AllocationMap> outdated;
            const std::scoped_lock lock(mutex_);
            has_map_.store(false);
            outdated.swap(map_);
        }
    }

    NbdHost& host_;
    const uint64_t id_;
    const std::string name_;
    std::atomic<uint64_t> changes_{0};
    std::atomic<bool> has_map_{false};
    std::mutex mutex_;
    std::shared_ptr<nbd::AllocationMap> map_;  ///< Guarded by mutex_, as is the next one.
    uint64_t map_changes_ = 0;
    std::unique_ptr<WatchedDevice> device_;
};

NbdHost::NbdHost(nova::Pool& pool, NbdHostOptions options, Log& log)
    : pool_(pool), options_(std::move(options)), log_(log) {}

NbdHost::~NbdHost() {
    stop();
}

Result<void> NbdHost::start() {
    const std::string what = "NBD socket " + options_.socket_path;
    auto listener = vhost::listen_at(options_.socket_path);
    if (!listener) {
        return std::unexpected(listener.error().with_context(what));
    }
    listener_ = *std::move(listener);
    if (auto given = give_to_group(options_.socket_path, options_.socket_gid, what); !given) {
        vhost::remove_socket_file(listener_);
        return given;
    }
    auto server = nbd::Server::start(
        *this, {.listen_fd = listener_.fd.release(),
                .threads = options_.threads,
                .logger = [this](std::string_view name, std::string_view message) {
                    log_.warning("NBD client", {{"source", std::string(name)},
                                                {"message", std::string(message)}});
                }});
    if (!server) {
        vhost::remove_socket_file(listener_);
        return std::unexpected(server.error().with_context(what));
    }
    server_ = *std::move(server);
    log_.info("NBD", {{"socket", options_.socket_path}});
    return {};
}

void NbdHost::flush() {
    std::vector<std::shared_ptr<PoolExport>> open;
    {
        const std::scoped_lock lock(mutex_);
        for (const auto& [id, entry] : exports_) {
            if (auto exported = entry.lock()) {
                open.push_back(std::move(exported));
            }
        }
    }
    for (const std::shared_ptr<PoolExport>& exported : open) {
        if (const Result<void> flushed = flush_device(exported->device()); !flushed) {
            log_.error("flush failed", {{"message", flushed.error().message()}});
        }
    }
}

void NbdHost::stop() {
    if (!server_) {
        return;
    }
    vhost::remove_socket_file(listener_);
    server_->stop();
    server_.reset();
}

nbd::ServerStatus NbdHost::status() const {
    return server_ ? server_->status() : nbd::ServerStatus{};
}

Result<std::vector<std::string>> NbdHost::list(std::string_view after, size_t at_most) {
    const std::scoped_lock one(list_mutex_);
    std::vector<std::string> names;
    const auto add = [&](std::vector<nova::EntityInfo> entities) {
        for (nova::EntityInfo& entity : entities) {
            if (entity.name > after) {
                names.push_back(std::move(entity.name));
            }
        }
    };
    add(pool_.images());
    add(pool_.volumes());
    STELLARIUM_ASSIGN(auto snapshots, pool_.snapshots(""));
    add(std::move(snapshots));
    const size_t count = std::min(at_most, names.size());
    std::partial_sort(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(count),
                      names.end());
    names.resize(count);
    return names;
}

Result<nbd::ExportInfo> NbdHost::find(std::string_view name) {
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(name));
    nbd::ExportInfo found;
    found.size_bytes = nova::round_up_to_sectors(info.size_bytes);
    found.read_only =
        info.kind != nova::EntityKind::kVolume || pool_.read_only_reason().has_value();
    found.description =
        fmt::format("{} of {}", nova::kind_name(info.kind), format_size(info.size_bytes));
    if (!info.parent.empty() && info.kind == nova::EntityKind::kVolume) {
        found.description += ", cloned from " + info.parent;
    }
    return found;
}

/// Writable, if it can ever be: while all of the store is read-only, so is a volume of it.
Result<std::shared_ptr<BlockDevice>> NbdHost::attach(const nova::EntityInfo& info) {
    nova::AttachOptions options{
        .read_only = info.kind != nova::EntityKind::kVolume,
        .label = "NBD clients of " + options_.socket_path,
        .id = info.id,
    };
    auto device = pool_.attach(info.name, options);
    if (!device && !options.read_only && device.error().code() == ErrorCode::kReadOnly) {
        options.read_only = true;
        device = pool_.attach(info.name, options);
    }
    return device;
}

Result<std::shared_ptr<nbd::Export>> NbdHost::open(std::string_view name) {
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(name));
    std::unique_lock lock(mutex_);
    std::shared_ptr<PoolExport> exported;
    // One that is being opened or released by other clients is waited for.
    const bool settled = changed_.wait_for(lock, kReleaseTimeout, [&] {
        const auto found = exports_.find(info.id);
        if (found == exports_.end()) {
            return true;
        }
        exported = found->second.lock();
        return exported != nullptr;
    });
    if (exported) {
        return exported;
    }
    if (!settled) {
        return fail(ErrorCode::kBusy,
                    fmt::format("'{}' is still being flushed for the NBD clients that had it: come "
                                "again in a while",
                                name));
    }
    exports_.emplace(info.id, std::weak_ptr<PoolExport>());
    lock.unlock();
    auto device = attach(info);
    if (!device) {
        released(info.id);
        return std::unexpected(device.error());
    }
    log_.debug("NBD export opened", {{"source", info.name}});
    exported = std::make_shared<PoolExport>(*this, info, *std::move(device));
    lock.lock();
    exports_[info.id] = exported;
    changed_.notify_all();
    lock.unlock();
    if (options_.attached) {
        options_.attached(info.name);
    }
    return exported;
}

void NbdHost::released(uint64_t id) {
    const std::scoped_lock lock(mutex_);
    exports_.erase(id);
    changed_.notify_all();
}

}  // namespace stellarium::daemon
