#include "frontend/vhost/server.h"

#include <algorithm>
#include <future>
#include <map>
#include <mutex>
#include <thread>

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/socket.h>

#include "frontend/vhost/blocking_pool.h"
#include "frontend/vhost/device.h"
#include "frontend/vhost/guest_memory.h"
#include "frontend/vhost/limits.h"
#include "frontend/vhost/watchdog.h"
#include "frontend/vhost/worker.h"

namespace stellarium::vhost {

namespace {

Result<void> check(const std::string& name, const BlockDevice& device,
                   const AttachOptions& options) {
    auto refuse = [&](const std::string& why) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("cannot attach '{}': {}", name, why));
    };
    if (options.queues == 0 || options.queues > kMaxQueues) {
        return refuse(fmt::format("{} queues; 1 to {} are possible", options.queues, kMaxQueues));
    }
    uint32_t block = options.block_size_bytes;
    if (block != 512 && block != 4096) {
        return refuse(fmt::format("block size {}; 512 and 4096 are possible", block));
    }
    if (device.size_bytes() % block != 0) {
        return refuse(fmt::format("its size of {} bytes is no multiple of the block size {}",
                                  device.size_bytes(), block));
    }
    if (options.serial.size() > kSerialBytes) {
        return refuse(
            fmt::format("serial '{}' is longer than {} bytes", options.serial, kSerialBytes));
    }
    if (options.socket_path.empty() == (options.listen_fd < 0)) {
        return refuse("it needs a socket path or a listening descriptor, one of them");
    }
    return {};
}

Result<Listener> adopt(UniqueFd fd) {
    int listening = 0;
    socklen_t length = sizeof(listening);
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) != 0 ||
        listening == 0) {
        return fail(ErrorCode::kInvalidArgument, "the descriptor is not a listening socket");
    }
    // A front-end that goes away between the event and accept() must not make us wait.
    int flags = ::fcntl(fd.get(), F_GETFL);
    if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) != 0) {
        return std::unexpected(Error::from_errno(errno, "fcntl of the listening descriptor"));
    }
    Listener listener;
    listener.fd = std::move(fd);
    return listener;
}

AttachmentStatus status_of(const Device& device) {
    AttachmentStatus status;
    status.name = device.name;
    status.socket_path = device.options.socket_path;
    status.queues = device.options.queues;
    status.block_size_bytes = device.options.block_size_bytes;
    status.read_only = device.read_only;
    status.limits = device.options.limits;
    status.throttled_requests = device.throttled_requests.load();
    status.throttled_ns = device.throttled_ns.load();
    status.connected = device.connected.load();
    status.peer_pid = device.peer_pid.load();
    status.in_flight = device.in_flight.load();
    status.connections = device.connections.load();
    status.forced_disconnects = device.forced_disconnects.load();
    {
        std::lock_guard lock(device.fault_mutex);
        status.last_fault = device.last_fault;
    }
    for (size_t i = 0; i < kRequestKinds; ++i) {
        const LiveTotals& live = device.totals[i];
        status.totals[i] = RequestTotals{live.requests.load(), live.bytes.load(),
                                         live.errors.load(), live.latency_ns.load()};
    }
    return status;
}

}  // namespace

std::string_view request_kind_name(RequestKind kind) {
    switch (kind) {
        case RequestKind::kRead:
            return "read";
        case RequestKind::kWrite:
            return "write";
        case RequestKind::kFlush:
            return "flush";
        case RequestKind::kDiscard:
            return "discard";
        case RequestKind::kWriteZeroes:
            return "write_zeroes";
        case RequestKind::kGetId:
            return "get_id";
        case RequestKind::kUnknown:
            break;
    }
    return "unknown";
}

struct VhostServer::Impl {
    Logger logger;
    std::shared_ptr<Budget> descriptors;
    std::vector<std::unique_ptr<Worker>> workers;
    std::unique_ptr<Watchdog> watchdog;
    std::unique_ptr<BlockingPool> pool;

    mutable std::mutex mutex;  ///< Guards the next two.
    std::map<std::string, std::shared_ptr<Device>, std::less<>> devices;
    bool stopped = false;

    Worker& least_loaded() {
        auto less = [](const auto& a, const auto& b) {
            return a->device_count().load() < b->device_count().load();
        };
        return **std::ranges::min_element(workers, less);
    }
};

VhostServer::VhostServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

VhostServer::~VhostServer() {
    shutdown();
}

Result<std::unique_ptr<VhostServer>> VhostServer::create(ServerOptions options) {
    install_fault_guard();
    auto impl = std::make_unique<Impl>();
    impl->logger = std::move(options.logger);
    impl->descriptors = std::move(options.descriptors);
    unsigned threads = options.data_threads != 0
                           ? options.data_threads
                           : std::max(std::thread::hardware_concurrency(), 1U);
    for (unsigned i = 0; i < threads; ++i) {
        STELLARIUM_ASSIGN(auto worker, Worker::create(i, options.clock));
        impl->workers.push_back(std::move(worker));
    }
    std::vector<Worker*> watched;
    for (const auto& worker : impl->workers) {
        watched.push_back(worker.get());
    }
    impl->watchdog = std::make_unique<Watchdog>(std::move(watched));
    impl->pool = std::make_unique<BlockingPool>(options.blocking_threads);
    return std::unique_ptr<VhostServer>(new VhostServer(std::move(impl)));
}

Result<void> VhostServer::attach(std::string name, std::shared_ptr<BlockDevice> disk,
                                 AttachOptions options) {
    UniqueFd given(options.listen_fd);
    STELLARIUM_TRY(check(name, *disk, options));
    STELLARIUM_ASSIGN(options.limits, completed(options.limits));
    auto device = std::make_shared<Device>();
    device->name = name;
    device->serial = options.serial.empty() ? disk->serial() : options.serial;
    device->serial.resize(std::min(device->serial.size(), kSerialBytes));
    device->read_only = options.read_only || disk->read_only();
    device->logger = impl_->logger;
    device->descriptors = impl_->descriptors;
    device->pool = impl_->pool.get();
    device->disk = std::move(disk);

    std::lock_guard lock(impl_->mutex);
    if (impl_->stopped) {
        return fail(ErrorCode::kUnavailable, "the vhost-user server has been shut down");
    }
    if (impl_->devices.contains(name)) {
        return fail(ErrorCode::kAlreadyExists, fmt::format("'{}' is attached already", name));
    }
    STELLARIUM_ASSIGN(device->listener,
                      given ? adopt(std::move(given)) : listen_at(options.socket_path));
    device->options = std::move(options);
    device->worker = &impl_->least_loaded();
    device->throttle.set(device->options.limits, device->worker->now_ns());
    device->worker->device_count().fetch_add(1);
    std::weak_ptr<Device> weak = device;
    device->disk->set_resize_listener([weak](uint64_t) {
        if (std::shared_ptr<Device> strong = weak.lock()) {
            strong->worker->post([strong] { strong->on_resize(); });
        }
    });
    device->worker->post([device] { device->start_listening(); });
    impl_->devices.emplace(std::move(name), std::move(device));
    return {};
}

Result<void> VhostServer::detach(std::string_view name) {
    std::shared_ptr<Device> device;
    {
        std::lock_guard lock(impl_->mutex);
        auto found = impl_->devices.find(name);
        if (found == impl_->devices.end()) {
            return fail(ErrorCode::kNotFound, fmt::format("'{}' is not attached", name));
        }
        device = std::move(found->second);
        impl_->devices.erase(found);
    }
    device->disk->set_resize_listener({});
    // Shared, because the data thread may still be inside set_value when this one goes on.
    auto detached = std::make_shared<std::promise<void>>();
    std::future<void> done = detached->get_future();
    device->worker->post(
        [device, detached] { device->begin_detach([detached] { detached->set_value(); }); });
    done.wait();
    // The data thread may keep the Device to the end of its turn, but nobody uses the disk again.
    device->disk.reset();
    device->worker->device_count().fetch_sub(1);
    return {};
}

Result<void> VhostServer::set_limits(std::string_view name, const RateLimits& limits) {
    STELLARIUM_ASSIGN(const RateLimits wanted, completed(limits));
    std::lock_guard lock(impl_->mutex);
    auto found = impl_->devices.find(name);
    if (found == impl_->devices.end()) {
        return fail(ErrorCode::kNotFound, fmt::format("'{}' is not attached", name));
    }
    const std::shared_ptr<Device>& device = found->second;
    device->options.limits = wanted;
    device->worker->post([device, wanted] { device->set_limits(wanted); });
    return {};
}

std::vector<AttachmentStatus> VhostServer::status() const {
    std::vector<AttachmentStatus> all;
    std::lock_guard lock(impl_->mutex);
    all.reserve(impl_->devices.size());
    for (const auto& [name, device] : impl_->devices) {
        all.push_back(status_of(*device));
    }
    return all;
}

Result<AttachmentStatus> VhostServer::status(std::string_view name) const {
    std::lock_guard lock(impl_->mutex);
    auto found = impl_->devices.find(name);
    if (found == impl_->devices.end()) {
        return fail(ErrorCode::kNotFound, fmt::format("'{}' is not attached", name));
    }
    return status_of(*found->second);
}

void VhostServer::shutdown() {
    std::vector<std::string> names;
    {
        std::lock_guard lock(impl_->mutex);
        impl_->stopped = true;
        for (const auto& [name, device] : impl_->devices) {
            names.push_back(name);
        }
    }
    for (const std::string& name : names) {
        // Already gone when someone else detached it meanwhile.
        [[maybe_unused]] Result<void> detached = detach(name);
    }
    impl_->watchdog.reset();
    impl_->pool.reset();
    impl_->workers.clear();
}

}  // namespace stellarium::vhost
