#include "frontend/vhost/session.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <tuple>

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "frontend/vhost/blocking_pool.h"
#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

namespace {

uint64_t now_ns() {
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                     std::chrono::steady_clock::now().time_since_epoch())
                                     .count());
}

/// The data thread is the only writer, so no read-modify-write is needed.
void add(std::atomic<uint64_t>& total, uint64_t value) {
    total.store(total.load(std::memory_order_relaxed) + value, std::memory_order_relaxed);
}

uint64_t u64_payload(const Message& message) {
    return load<U64Le>(message.payload);
}

constexpr std::string_view kStuckCall =
    "its call descriptor makes us wait: it was set to block, and filled";

/// Kick, call and error descriptors: an eventfd or a socket, made not to wait. Anything else could
/// be a file that our write has more right to than the sender's.
Result<EventFd> take_event_fd(UniqueFd fd) {
    struct stat st = {};
    if (::fstat(fd.get(), &st) != 0) {
        return std::unexpected(Error::from_errno(errno, "fstat of an event descriptor"));
    }
    bool is_socket = S_ISSOCK(st.st_mode);
    // Anonymous inodes, eventfds among them, have no file type.
    if (!is_socket && (st.st_mode & S_IFMT) != 0) {
        return fail(ErrorCode::kProtocol, "event descriptor is neither an eventfd nor a socket");
    }
    int flags = ::fcntl(fd.get(), F_GETFL);
    if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) != 0) {
        return std::unexpected(Error::from_errno(errno, "fcntl of an event descriptor"));
    }
    return EventFd{std::move(fd), is_socket};
}

}  // namespace

bool EventFd::signal(Worker& worker) const {
    if (!fd) {
        return true;
    }
    if (is_socket) {
        uint64_t one = 1;
        // When it is full, it already tells the front-end what there is to tell.
        [[maybe_unused]] ssize_t sent =
            ::send(fd.get(), &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL);
        return true;
    }
    return worker.write_event(fd.get());
}

uint64_t offered_features(bool read_only) {
    uint64_t features = 0;
    for (unsigned number :
         {kBlkFeatureSizeMax, kBlkFeatureSegMax, kBlkFeatureBlkSize, kBlkFeatureFlush,
          kBlkFeatureTopology, kBlkFeatureMultiQueue, kFeatureIndirectDesc, kFeatureEventIdx,
          kFeatureProtocolFeatures, kFeatureVersion1}) {
        features |= feature_bit(number);
    }
    if (read_only) {
        features |= feature_bit(kBlkFeatureReadOnly);
    } else {
        features |= feature_bit(kBlkFeatureDiscard) | feature_bit(kBlkFeatureWriteZeroes);
    }
    return features;
}

uint64_t offered_protocol_features() {
    return bit(ProtocolFeature::kMultiQueue) | bit(ProtocolFeature::kReplyAck) |
           bit(ProtocolFeature::kBackendReq) | bit(ProtocolFeature::kConfig) |
           bit(ProtocolFeature::kInflightShmfd) | bit(ProtocolFeature::kResetDevice) |
           bit(ProtocolFeature::kConfigureMemSlots) | bit(ProtocolFeature::kStatus);
}

/// What a message must look like before its handler runs.
struct MessageRule {
    MessageType type;
    const char* name;
    size_t min_payload;
    size_t max_payload;
    size_t min_fds;
    size_t max_fds;
    uint64_t needs;  ///< Protocol features, all of them.
    Result<void> (Session::*handler)(Message&);

    static const MessageRule* find(uint32_t type);
};

const MessageRule* MessageRule::find(uint32_t type) {
    constexpr size_t kState = sizeof(VringState);
    constexpr size_t kAnyConfig = sizeof(ConfigHeader) + kMaxConfigBytes;
    constexpr uint64_t kMq = bit(ProtocolFeature::kMultiQueue);
    constexpr uint64_t kConf = bit(ProtocolFeature::kConfig);
    constexpr uint64_t kInfl = bit(ProtocolFeature::kInflightShmfd);
    constexpr uint64_t kSlots = bit(ProtocolFeature::kConfigureMemSlots);
    using S = Session;
    using enum MessageType;
    // SET_MEM_TABLE may be padded to the size for the most regions (User-mode Linux does).
    static constexpr std::array kRules = {
        MessageRule{kGetFeatures, "GET_FEATURES", 0, 8, 0, 0, 0, &S::get_features},
        MessageRule{kSetFeatures, "SET_FEATURES", 8, 8, 0, 0, 0, &S::set_features},
        MessageRule{kSetOwner, "SET_OWNER", 0, 8, 0, 0, 0, &S::set_owner},
        MessageRule{kResetOwner, "RESET_OWNER", 0, 8, 0, 0, 0, &S::reset_owner},
        MessageRule{kSetMemTable, "SET_MEM_TABLE", 8, kMaxPayloadBytes, 0, kMaxMemoryTableRegions,
                    0, &S::set_mem_table},
        MessageRule{kSetVringNum, "SET_VRING_NUM", kState, kState, 0, 0, 0, &S::set_vring_num},
        MessageRule{kSetVringAddr, "SET_VRING_ADDR", sizeof(VringAddress), sizeof(VringAddress), 0,
                    0, 0, &S::set_vring_addr},
        MessageRule{kSetVringBase, "SET_VRING_BASE", kState, kState, 0, 0, 0, &S::set_vring_base},
        MessageRule{kGetVringBase, "GET_VRING_BASE", kState, kState, 0, 0, 0, &S::get_vring_base},
        MessageRule{kSetVringKick, "SET_VRING_KICK", 8, 8, 0, 1, 0, &S::set_vring_kick},
        MessageRule{kSetVringCall, "SET_VRING_CALL", 8, 8, 0, 1, 0, &S::set_vring_call},
        MessageRule{kSetVringErr, "SET_VRING_ERR", 8, 8, 0, 1, 0, &S::set_vring_err},
        MessageRule{kGetProtocolFeatures, "GET_PROTOCOL_FEATURES", 0, 8, 0, 0, 0,
                    &S::get_protocol_features},
        MessageRule{kSetProtocolFeatures, "SET_PROTOCOL_FEATURES", 8, 8, 0, 0, 0,
                    &S::set_protocol_features},
        MessageRule{kGetQueueNum, "GET_QUEUE_NUM", 0, 8, 0, 0, kMq, &S::get_queue_num},
        MessageRule{kSetVringEnable, "SET_VRING_ENABLE", kState, kState, 0, 0, 0,
                    &S::set_vring_enable},
        MessageRule{kSetBackendReqFd, "SET_BACKEND_REQ_FD", 0, 8, 1, 1,
                    bit(ProtocolFeature::kBackendReq), &S::set_backend_req_fd},
        MessageRule{kGetConfig, "GET_CONFIG", sizeof(ConfigHeader), kMaxPayloadBytes, 0, 0, kConf,
                    &S::get_config},
        MessageRule{kSetConfig, "SET_CONFIG", sizeof(ConfigHeader), kAnyConfig, 0, 0, kConf,
                    &S::set_config},
        MessageRule{kGetInflightFd, "GET_INFLIGHT_FD", sizeof(InflightDescription),
                    kInflightPaddedBytes, 0, 0, kInfl, &S::get_inflight_fd},
        MessageRule{kSetInflightFd, "SET_INFLIGHT_FD", sizeof(InflightDescription),
                    kInflightPaddedBytes, 1, 1, kInfl, &S::set_inflight_fd},
        MessageRule{kResetDevice, "RESET_DEVICE", 0, 8, 0, 0, bit(ProtocolFeature::kResetDevice),
                    &S::reset_device},
        MessageRule{kGetMaxMemSlots, "GET_MAX_MEM_SLOTS", 0, 8, 0, 0, kSlots,
                    &S::get_max_mem_slots},
        MessageRule{kAddMemReg, "ADD_MEM_REG", sizeof(SingleRegion), sizeof(SingleRegion), 1, 1,
                    kSlots, &S::add_mem_reg},
        MessageRule{kRemMemReg, "REM_MEM_REG", sizeof(SingleRegion), sizeof(SingleRegion), 0, 1,
                    kSlots, &S::rem_mem_reg},
        MessageRule{kSetStatus, "SET_STATUS", 8, 8, 0, 0, bit(ProtocolFeature::kStatus),
                    &S::set_status},
        MessageRule{kGetStatus, "GET_STATUS", 0, 8, 0, 0, bit(ProtocolFeature::kStatus),
                    &S::get_status},
    };
    const auto* rule =
        std::ranges::find(kRules, static_cast<MessageType>(type), &MessageRule::type);
    return rule == kRules.end() ? nullptr : rule;
}

// ---- Connection ---------------------------------------------------------------------------------

Session::Session(std::shared_ptr<Device> device, UniqueFd socket)
    : device_(std::move(device)),
      worker_(*device_->worker),
      socket_(std::move(socket)),
      descriptors_(device_->descriptors),
      memory_(std::make_shared<GuestMemory>()),
      queues_(device_->options.queues) {
    socket_source_ = EventSource{EventSource::Kind::kSocket, this, 0};
    for (Queue& queue : queues_) {
        queue.source = EventSource{EventSource::Kind::kKick, this, index_of(queue)};
    }
}

Result<void> Session::open() {
    STELLARIUM_TRY(account_descriptors());
    return worker_.watch(socket_.get(), EPOLLIN, socket_source_);
}

void Session::on_socket() {
    if (closed_) {
        return;
    }
    if (pending_.active) {
        // Nothing is read now, so this can only be the end of the connection.
        close("the front-end disconnected");
        return;
    }
    for (size_t i = 0; i < kMessageBudget; ++i) {
        Message message;
        Result<MessageReader::Outcome> outcome = reader_.read(socket_.get(), message);
        if (!outcome) {
            break_off(outcome.error());
            return;
        }
        if (*outcome == MessageReader::Outcome::kIncomplete) {
            if (Result<void> counted = account_descriptors(); !counted) {
                break_off(counted.error());
            }
            return;
        }
        if (*outcome == MessageReader::Outcome::kClosed) {
            close("the front-end disconnected");
            return;
        }
        handle(message);
        if (closed_ || pending_.active) {
            return;
        }
    }
}

void Session::handle(Message& message) {
    uint32_t type = message.header.type;
    uint32_t flags = message.header.flags;
    const MessageRule* rule = MessageRule::find(type);
    if (rule == nullptr) {
        return break_off(Error(ErrorCode::kProtocol, fmt::format("unknown message {}", type)));
    }
    if ((flags & kFlagVersionMask) != kFlagVersion || (flags & kFlagReply) != 0) {
        return break_off(
            Error(ErrorCode::kProtocol, fmt::format("{} with flags {:#x}", rule->name, flags)));
    }
    if (message.payload.size() < rule->min_payload || message.payload.size() > rule->max_payload ||
        message.fds.size() < rule->min_fds || message.fds.size() > rule->max_fds) {
        return break_off(
            Error(ErrorCode::kProtocol,
                  fmt::format("{} with a payload of {} bytes and {} descriptors", rule->name,
                              message.payload.size(), message.fds.size())));
    }
    if ((protocol_features_ & rule->needs) != rule->needs) {
        return break_off(
            Error(ErrorCode::kProtocol,
                  fmt::format("{} without negotiating the protocol feature it needs", rule->name)));
    }
    replied_ = false;
    refused_ = false;
    Result<void> result = (this->*rule->handler)(message);
    if (closed_ || pending_.active) {
        return;
    }
    if (result) {
        result = account_descriptors();
    }
    bool wants_ack = (flags & kFlagNeedReply) != 0 && has(ProtocolFeature::kReplyAck);
    if (wants_ack && !replied_) {
        U64Le answer = result && !refused_ ? 0 : 1;
        if (Result<void> sent = reply(message, bytes_of(answer)); !sent && result) {
            result = sent;
        }
    }
    if (!result) {
        break_off(result.error().with_context(rule->name));
    }
}

Result<void> Session::reply(const Message& message, Bytes payload, std::span<const int> fds) {
    replied_ = true;
    return send_message(socket_.get(), message.header.type, kFlagReply, payload, fds);
}

Result<void> Session::account_descriptors() {
    uint64_t held = reader_.held_descriptors();
    for (const UniqueFd* fd : {&socket_, &backend_channel_}) {
        held += *fd ? 1 : 0;
    }
    for (const Queue& queue : queues_) {
        for (const EventFd* event : {&queue.kick, &queue.call, &queue.error}) {
            held += event->fd ? 1 : 0;
        }
    }
    if (!descriptors_.resize(held)) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("it needs {} descriptors, and this process has none left for "
                                "guests: give the daemon more (LimitNOFILE= in the systemd unit, "
                                "ulimit -Hn)",
                                held));
    }
    return {};
}

void Session::break_off(const Error& error) {
    if (closed_) {
        return;
    }
    add(device_->forced_disconnects, 1);
    {
        std::lock_guard lock(device_->fault_mutex);
        device_->last_fault = error.message();
    }
    device_->log(LogLevel::kWarning,
                 fmt::format("front-end (pid {}) disconnected by us: {}",
                             device_->peer_pid.load(std::memory_order_relaxed), error.message()));
    for (const Queue& queue : queues_) {
        [[maybe_unused]] bool told = queue.error.signal(worker_);  // It is leaving anyway.
    }
    close({});
}

void Session::close(std::string_view reason) {
    if (closed_) {
        return;
    }
    closed_ = true;
    if (!reason.empty()) {
        device_->log(LogLevel::kInfo, reason);
    }
    end_holding();
    worker_.unwatch(socket_.get());
    socket_.reset();
    backend_channel_.reset();
    for (Queue& queue : queues_) {
        clear_kick(queue);
        queue.call = {};
        queue.error = {};
    }
    reader_ = {};
    std::ignore = descriptors_.resize(0);  // Less is always possible.
    device_->connected.store(false);
    device_->peer_pid.store(0);
    worker_.keep_until_end_of_turn(shared_from_this());
    if (async_ == 0) {
        device_->on_session_drained();
    } else {
        device_->pool->abandon(*device_);
    }
}

void Session::drain() {
    draining_ = true;
    if (async_ > 0) {
        device_->pool->abandon(*device_);
    }
    if (async_ == 0) {
        close_drained();
    }
}

void Session::close_drained() {
    for (Queue& queue : queues_) {
        publish(queue);
    }
    close("detached");
}

// ---- Features -----------------------------------------------------------------------------------

Result<void> Session::get_features(Message& message) {
    return reply(message, bytes_of(U64Le(offered_features(device_->read_only))));
}

Result<void> Session::set_features(Message& message) {
    uint64_t features = u64_payload(message);
    if ((features & ~offered_features(device_->read_only)) != 0) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("features {:#x} were not offered",
                                features & ~offered_features(device_->read_only)));
    }
    features_ = features;
    for (Queue& queue : queues_) {
        queue.ring.set_features((features & feature_bit(kFeatureIndirectDesc)) != 0,
                                (features & feature_bit(kFeatureEventIdx)) != 0);
        // Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
        if ((features & feature_bit(kFeatureProtocolFeatures)) == 0) {
            queue.enabled = true;
            STELLARIUM_TRY(try_start(queue));
        }
    }
    return {};
}

Result<void> Session::get_protocol_features(Message& message) {
    return reply(message, bytes_of(U64Le(offered_protocol_features())));
}

Result<void> Session::set_protocol_features(Message& message) {
    uint64_t features = u64_payload(message);
    if ((features & ~offered_protocol_features()) != 0) {
        return fail(ErrorCode::kProtocol, fmt::format("protocol features {:#x} were not offered",
                                                      features & ~offered_protocol_features()));
    }
    protocol_features_ = features;
    return {};
}

Result<void> Session::set_owner(Message&) {
    return {};
}

Result<void> Session::reset_owner(Message&) {
    // Deprecated; the protocol recommends to ignore it or to disable all rings, not more.
    for (Queue& queue : queues_) {
        queue.enabled = false;
    }
    return {};
}

Result<void> Session::get_queue_num(Message& message) {
    return reply(message, bytes_of(U64Le(queues_.size())));
}

Result<void> Session::set_backend_req_fd(Message& message) {
    struct stat st = {};
    if (::fstat(message.fds[0].get(), &st) != 0 || !S_ISSOCK(st.st_mode)) {
        return fail(ErrorCode::kProtocol, "the backend channel is not a socket");
    }
    backend_channel_ = std::move(message.fds[0]);
    return {};
}

Result<void> Session::set_status(Message& message) {
    uint64_t status = u64_payload(message);
    if (status == 0) {
        start_pending(message, 0, 0);
    } else {
        status_ = status;
    }
    return {};
}

Result<void> Session::get_status(Message& message) {
    return reply(message, bytes_of(U64Le(status_)));
}

Result<void> Session::reset_device(Message& message) {
    start_pending(message, 0, 0);
    return {};
}

// ---- Memory -------------------------------------------------------------------------------------

Result<void> Session::map_region(const RegionDescription& region, int fd,
                                 std::shared_ptr<const GuestMemory>& memory) {
    STELLARIUM_ASSIGN(auto mapping, SharedMapping::map(fd, region.mmap_offset, region.size));
    STELLARIUM_ASSIGN(memory, memory->with(MemoryRegion{region.guest_address, region.size,
                                                        region.user_address, std::move(mapping)}));
    return {};
}

Result<void> Session::use_memory(std::shared_ptr<const GuestMemory> memory) {
    for (Queue& queue : queues_) {
        publish(queue);
    }
    if (closed_) {
        return {};
    }
    // Requests in flight keep the memory they were decoded with.
    memory_ = std::move(memory);
    for (Queue& queue : queues_) {
        queue.ring.resolve(*memory_);
        STELLARIUM_TRY(try_start(queue));
        if (queue.ring.started()) {
            schedule(queue);
        }
    }
    return {};
}

Result<void> Session::set_mem_table(Message& message) {
    auto header = load<MemoryTableHeader>(message.payload);
    if (header.regions > kMaxMemoryTableRegions || header.regions != message.fds.size() ||
        message.payload.size() < sizeof(header) + header.regions * sizeof(RegionDescription)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("{} regions in {} bytes with {} descriptors", header.regions.get(),
                                message.payload.size(), message.fds.size()));
    }
    std::shared_ptr<const GuestMemory> memory = std::make_shared<GuestMemory>();
    for (size_t i = 0; i < message.fds.size(); ++i) {
        auto region = load<RegionDescription>(
            Bytes(message.payload).subspan(sizeof(header) + i * sizeof(RegionDescription)));
        STELLARIUM_TRY(map_region(region, message.fds[i].get(), memory));
    }
    return use_memory(std::move(memory));
}

Result<void> Session::add_mem_reg(Message& message) {
    auto single = load<SingleRegion>(message.payload);
    std::shared_ptr<const GuestMemory> memory = memory_;
    STELLARIUM_TRY(map_region(single.region, message.fds[0].get(), memory));
    return use_memory(std::move(memory));
}

Result<void> Session::rem_mem_reg(Message& message) {
    auto single = load<SingleRegion>(message.payload);
    STELLARIUM_ASSIGN(auto memory, memory_->without(single.region.guest_address, single.region.size,
                                                    single.region.user_address));
    return use_memory(std::move(memory));
}

Result<void> Session::get_max_mem_slots(Message& message) {
    return reply(message, bytes_of(U64Le(kMaxMemorySlots)));
}

// ---- Rings --------------------------------------------------------------------------------------

Result<Session::Queue*> Session::queue_at(uint64_t index) {
    if (index >= queues_.size()) {
        return fail(ErrorCode::kProtocol, fmt::format("queue {} of {}", index, queues_.size()));
    }
    return &queues_[index];
}

Result<void> Session::set_vring_num(Message& message) {
    auto state = load<VringState>(message.payload);
    STELLARIUM_ASSIGN(Queue * queue, queue_at(state.index));
    STELLARIUM_TRY(queue->ring.set_size(state.num));
    queue->ring.resolve(*memory_);
    return try_start(*queue);
}

Result<void> Session::set_vring_addr(Message& message) {
    auto address = load<VringAddress>(message.payload);
    STELLARIUM_ASSIGN(Queue * queue, queue_at(address.index));
    publish(*queue);
    if (closed_) {
        return {};
    }
    STELLARIUM_TRY(queue->ring.set_addresses(address));
    if (!queue->ring.resolve(*memory_)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("rings of queue {} are not in shared memory", address.index.get()));
    }
    STELLARIUM_TRY(try_start(*queue));
    if (queue->ring.started()) {
        // Kicks that came while it was nowhere in shared memory were not followed.
        schedule(*queue);
    }
    return {};
}

Result<void> Session::set_vring_base(Message& message) {
    auto state = load<VringState>(message.payload);
    STELLARIUM_ASSIGN(Queue * queue, queue_at(state.index));
    if (queue->ring.started() || state.num > UINT16_MAX) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("base {} of {} queue {}", state.num.get(),
                                queue->ring.started() ? "running" : "stopped", state.index.get()));
    }
    queue->ring.set_base(static_cast<uint16_t>(state.num));
    return {};
}

Result<void> Session::get_vring_base(Message& message) {
    auto state = load<VringState>(message.payload);
    STELLARIUM_TRY(queue_at(state.index));
    start_pending(message, static_cast<uint16_t>(state.index), 0);
    return {};
}

Result<Session::Queue*> Session::queue_of_fd_message(Message& message) {
    uint64_t value = u64_payload(message);
    bool expects_fd = (value & kVringNoFd) == 0;
    if ((value & ~(kVringIndexMask | kVringNoFd)) != 0 || expects_fd != (message.fds.size() == 1)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("value {:#x} with {} descriptors", value, message.fds.size()));
    }
    return queue_at(value & kVringIndexMask);
}

void Session::clear_kick(Queue& queue) {
    if (queue.kick.fd) {
        worker_.unwatch(queue.kick.fd.get());
    }
    queue.kick = {};
    queue.kick_set = false;
    queue.polled = false;
}

Result<void> Session::set_vring_kick(Message& message) {
    STELLARIUM_ASSIGN(Queue * queue, queue_of_fd_message(message));
    clear_kick(*queue);
    queue->kick_set = true;
    if (message.fds.empty()) {
        queue->polled = true;
        if (!queue->on_poll_list) {
            queue->on_poll_list = true;
            worker_.poll_queue(weak_from_this(), index_of(*queue));
        }
    } else {
        STELLARIUM_ASSIGN(EventFd kick, take_event_fd(std::move(message.fds[0])));
        // An eventfd is never read, see worker.h; a socket is, so that it does not fill up.
        uint32_t events = kick.is_socket ? uint32_t{EPOLLIN} : EPOLLIN | EPOLLET;
        STELLARIUM_TRY(worker_.watch(kick.fd.get(), events, queue->source));
        queue->kick = std::move(kick);
    }
    return try_start(*queue);
}

Result<void> Session::set_vring_call(Message& message) {
    STELLARIUM_ASSIGN(Queue * queue, queue_of_fd_message(message));
    queue->call = {};
    if (!message.fds.empty()) {
        STELLARIUM_ASSIGN(queue->call, take_event_fd(std::move(message.fds[0])));
        // Completions may have been published while there was no descriptor to call.
        if (queue->ring.started() && !queue->call.signal(worker_)) {
            return fail(ErrorCode::kProtocol, std::string(kStuckCall));
        }
    }
    return {};
}

Result<void> Session::set_vring_err(Message& message) {
    STELLARIUM_ASSIGN(Queue * queue, queue_of_fd_message(message));
    queue->error = {};
    if (!message.fds.empty()) {
        STELLARIUM_ASSIGN(queue->error, take_event_fd(std::move(message.fds[0])));
    }
    return {};
}

Result<void> Session::set_vring_enable(Message& message) {
    auto state = load<VringState>(message.payload);
    STELLARIUM_ASSIGN(Queue * queue, queue_at(state.index));
    if (state.num > 1) {
        return fail(ErrorCode::kProtocol, fmt::format("enable value {}", state.num.get()));
    }
    queue->enabled = state.num == 1;
    STELLARIUM_TRY(try_start(*queue));
    if (queue->enabled && queue->ring.started()) {
        schedule(*queue);
    }
    return {};
}

Result<void> Session::try_start(Queue& queue) {
    if (queue.ring.started() || !queue.enabled || !queue.kick_set || !queue.ring.resolved() ||
        draining_) {
        return {};
    }
    InflightQueue inflight;
    if (inflight_ != nullptr && index_of(queue) < inflight_layout_.queues) {
        uint64_t bytes = inflight_queue_bytes(inflight_layout_.queue_size);
        uint8_t* at = inflight_->data() + index_of(queue) * bytes;
        inflight.mapping = inflight_;
        inflight.header = reinterpret_cast<InflightHeader*>(at);
        inflight.states = reinterpret_cast<InflightState*>(at + sizeof(InflightHeader));
        inflight.queue_size = inflight_layout_.queue_size;
    }
    queue.ring.set_inflight(std::move(inflight));
    STELLARIUM_TRY(queue.ring.start());
    // Requests may be waiting whose kick went to an earlier back-end.
    schedule(queue);
    return {};
}

// ---- Messages that wait for requests in flight --------------------------------------------------

void Session::start_pending(const Message& message, uint16_t queue, uint64_t status) {
    pending_.type = static_cast<MessageType>(message.header.type.get());
    pending_.queue = queue;
    pending_.status = status;
    pending_.active = true;
    replied_ = true;  // By finish_pending().
    pending_.wants_ack =
        (message.header.flags & kFlagNeedReply) != 0 && has(ProtocolFeature::kReplyAck);
    worker_.change(socket_.get(), 0, socket_source_);
    finish_pending();
}

void Session::finish_pending() {
    bool one_queue = pending_.type == MessageType::kGetVringBase;
    size_t in_the_way = one_queue ? queues_[pending_.queue].in_flight : async_;
    if (!pending_.active || in_the_way > 0) {
        return;
    }
    if (one_queue && has_to_recover(queues_[pending_.queue])) {
        if (!queues_[pending_.queue].stalled) {
            schedule(queues_[pending_.queue]);
        }
        return;
    }
    auto stop = [&](Queue& queue) {
        publish(queue);
        clear_kick(queue);
        queue.stalled = false;
        queue.was_held = 0;
        return queue.ring.stop();
    };
    uint32_t type = static_cast<uint32_t>(pending_.type);
    Result<void> sent;
    if (one_queue) {
        VringState state{pending_.queue, stop(queues_[pending_.queue])};
        if (!closed_) {
            sent = send_message(socket_.get(), type, kFlagReply, bytes_of(state));
        }
    } else {
        for (Queue& queue : queues_) {
            stop(queue);
            queue.ring.set_base(0);
            queue.enabled = false;
        }
        status_ = 0;
        if (pending_.wants_ack && !closed_) {
            sent = send_message(socket_.get(), type, kFlagReply, bytes_of(U64Le(0)));
        }
    }
    pending_.active = false;
    if (closed_) {
        return;
    }
    worker_.change(socket_.get(), EPOLLIN, socket_source_);
    if (!sent) {
        break_off(sent.error());
    }
}

// ---- Configuration space ------------------------------------------------------------------------

BlkConfig Session::config() const {
    BlkConfig config;
    uint32_t block_size = device_->options.block_size_bytes;
    config.capacity_sectors = device_->disk->size_bytes() >> kSectorShift;
    config.size_max = kSizeMaxBytes;
    config.seg_max = kSegMax;
    config.blk_size = block_size;
    // The engine works in pages of 4 KiB, so smaller writes cost more than they look.
    config.physical_block_exp = block_size == 512 ? 3 : 0;
    config.min_io_blocks = block_size == 512 ? 8 : 1;
    config.opt_io_blocks = 65536 / block_size;
    config.queues = static_cast<uint16_t>(queues_.size());
    if (!device_->read_only) {
        config.max_discard_sectors = kMaxDiscardSectors;
        config.max_discard_segments = kMaxDiscardSegments;
        config.discard_alignment_sectors = block_size >> kSectorShift;
        config.max_write_zeroes_sectors = kMaxDiscardSectors;
        config.max_write_zeroes_segments = kMaxDiscardSegments;
        config.write_zeroes_may_unmap = 1;
    }
    return config;
}

Result<void> Session::get_config(Message& message) {
    auto header = load<ConfigHeader>(message.payload);
    uint64_t end = uint64_t{header.offset} + header.size;
    if (end > kMaxConfigBytes) {
        // An empty payload is the protocol's way to say no.
        return reply(message, {});
    }
    // What lies behind the fields we have reads as zeros, so any size is answered.
    std::array<std::byte, sizeof(ConfigHeader) + kMaxConfigBytes> space{};
    BlkConfig fields = config();
    std::memcpy(space.data() + sizeof(ConfigHeader), &fields, sizeof(fields));
    // The header goes right before the part that was asked for.
    std::byte* part = space.data() + header.offset;
    std::memcpy(part, &header, sizeof(header));
    return reply(message, Bytes(part, sizeof(header) + header.size));
}

Result<void> Session::set_config(Message& message) {
    auto header = load<ConfigHeader>(message.payload);
    if (message.payload.size() != sizeof(header) + header.size) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("{} bytes announced, {} sent", header.size.get(),
                                message.payload.size() - sizeof(header)));
    }
    // No field is the driver's to write. A migration may bring its old values: ours count.
    refused_ = (header.flags & kConfigForMigration) == 0;
    return {};
}

void Session::on_resize() {
    if (closed_ || !backend_channel_ || !has(ProtocolFeature::kConfig)) {
        return;
    }
    Result<void> sent = send_message(backend_channel_.get(), kBackendConfigChange, 0, {});
    // A full channel already holds this very message.
    if (!sent && sent.error().code() != ErrorCode::kWouldBlock) {
        device_->log(LogLevel::kWarning,
                     fmt::format("the guest was not told of its disk's new size: {}",
                                 sent.error().message()));
    }
}

// ---- In-flight region ---------------------------------------------------------------------------

Result<void> Session::get_inflight_fd(Message& message) {
    auto asked = load<InflightDescription>(message.payload);
    if (asked.queues == 0 || asked.queues > queues_.size() || asked.queue_size == 0 ||
        asked.queue_size > kMaxQueueSize) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("{} queues of {}", asked.queues.get(), asked.queue_size.get()));
    }
    uint64_t bytes = asked.queues * inflight_queue_bytes(asked.queue_size);
    UniqueFd fd(::memfd_create("vhost-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
        ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        return std::unexpected(Error::from_errno(errno, "memfd for the in-flight region"));
    }
    InflightDescription answer;
    answer.mmap_size = bytes;
    answer.mmap_offset = 0;
    answer.queues = asked.queues;
    answer.queue_size = asked.queue_size;
    std::array<std::byte, kInflightPaddedBytes> payload{};
    std::memcpy(payload.data(), &answer, sizeof(answer));
    int raw = fd.get();
    return reply(message, Bytes(payload).first(message.payload.size()), std::span(&raw, 1));
}

Result<void> Session::set_inflight_fd(Message& message) {
    auto layout = load<InflightDescription>(message.payload);
    bool any_started =
        std::ranges::any_of(queues_, [](const Queue& queue) { return queue.ring.started(); });
    if (any_started) {
        return fail(ErrorCode::kProtocol, "the in-flight region of a running ring");
    }
    if (layout.queues == 0 || layout.queues > queues_.size() || layout.queue_size == 0 ||
        layout.queue_size > kMaxQueueSize ||
        layout.mmap_size < layout.queues * inflight_queue_bytes(layout.queue_size)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("{} bytes for {} queues of {}", layout.mmap_size.get(),
                                layout.queues.get(), layout.queue_size.get()));
    }
    STELLARIUM_ASSIGN(auto mapping, SharedMapping::map(message.fds[0].get(), layout.mmap_offset,
                                                       layout.mmap_size));
    if (reinterpret_cast<uintptr_t>(mapping->data()) % alignof(InflightState) != 0) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("misaligned offset {}", layout.mmap_offset.get()));
    }
    inflight_ = std::move(mapping);
    inflight_layout_ = layout;
    return {};
}

// ---- Requests -----------------------------------------------------------------------------------

bool Session::stopping(const Queue& queue) const {
    return pending_.active &&
           (pending_.type != MessageType::kGetVringBase || pending_.queue == index_of(queue));
}

bool Session::usable(const Queue& queue) const {
    return !closed_ && !draining_ && queue.enabled && queue.ring.started() && queue.ring.resolved();
}

bool Session::has_to_recover(const Queue& queue) const {
    return queue.ring.has_recovered() && usable(queue);
}

bool Session::running(const Queue& queue) const {
    if (stopping(queue)) {
        // Whoever asks where the ring stands goes on behind what was popped before a crash: nobody
        // else will complete that.
        return pending_.type == MessageType::kGetVringBase && has_to_recover(queue);
    }
    return usable(queue);
}

void Session::schedule(Queue& queue) {
    if (!queue.ready) {
        queue.ready = true;
        ready_.push_back(index_of(queue));
        if (!on_ready_list_) {
            on_ready_list_ = true;
            worker_.make_ready(shared_from_this());
        }
    }
}

void Session::on_kick(uint16_t index) {
    if (closed_) {
        return;
    }
    Queue& queue = queues_[index];
    if (queue.kick.fd && queue.kick.is_socket) {
        std::array<std::byte, 512> ignored;
        if (::recv(queue.kick.fd.get(), ignored.data(), ignored.size(), MSG_DONTWAIT) == 0) {
            // Its other end is closed: it would be readable for ever.
            worker_.unwatch(queue.kick.fd.get());
            queue.kick = {};
        }
    }
    if (!queue.stalled && !queue.held) {
        schedule(queue);
    }
}

bool Session::poll(uint16_t index) {
    Queue& queue = queues_[index];
    if (!closed_ && queue.polled && !queue.stalled && !queue.held) {
        schedule(queue);
    }
    queue.on_poll_list = !closed_ && queue.polled;
    return queue.on_poll_list;
}

void Session::take_turn() {
    on_ready_list_ = false;
    turn_budget_ = kTurnBudgetBytes;
    // Rings that become ready during this turn, or find no budget left in it, wait for the next.
    for (size_t count = ready_.size(); count > 0 && turn_budget_ > 0 && !closed_; --count) {
        Queue& queue = queues_[ready_.front()];
        ready_.pop_front();
        queue.ready = false;
        process(queue);
    }
    if (!ready_.empty() && !closed_ && !on_ready_list_) {
        on_ready_list_ = true;
        worker_.make_ready(shared_from_this());
    }
}

void Session::process(Queue& queue) {
    publish(queue);
    if (!running(queue) || (queue.held && !stopping(queue))) {
        return;
    }
    std::shared_ptr<const GuestMemory> memory = memory_;
    DiskView disk{device_->disk->size_bytes(), device_->read_only};
    Chain& chain = worker_.chain();
    queue.ring.disable_notifications();
    size_t unpublished = 0;
    for (size_t taken = 0;; ++taken) {
        if (async_ >= kMaxAsyncRequests) {
            queue.stalled = true;
            any_stalled_ = true;
            break;
        }
        if (taken == kQueueBudget || turn_budget_ == 0) {
            schedule(queue);
            break;
        }
        if (stopping(queue) && !queue.ring.has_recovered()) {
            break;
        }
        const bool admitted = may_take(queue);
        if (!admitted && queue.ring.waiting() > 0) {
            hold(queue, taken > 0);
            break;
        }
        Result<bool> popped = admitted ? queue.ring.pop(*memory, chain) : Result<bool>(false);
        if (!popped) {
            // A lost mapping reads as zeros, which is the better explanation of what it broke.
            publish(queue);
            check_memory();
            break_off(popped.error().with_context(fmt::format("queue {}", index_of(queue))));
            return;
        }
        if (!*popped) {
            if (!queue.ring.enable_notifications()) {
                break;
            }
            queue.ring.disable_notifications();
            continue;
        }
        if (queue.was_held > 0) {
            --queue.was_held;
            add(device_->throttled_requests, 1);
        }
        start_request(queue, chain, disk);
        if (closed_) {
            return;
        }
        if (++unpublished == kPublishEvery) {
            unpublished = 0;
            publish(queue);
        }
    }
    publish(queue);
    check_memory();
    if (!closed_ && stopping(queue)) {
        finish_pending();
    }
}

bool Session::may_take(const Queue& queue) {
    // A stop does not wait for a limit: what has to be done before it is paid for afterwards. What
    // comes while others are held back does not overtake them.
    return !device_->throttle.limited() || stopping(queue) ||
           (held_.empty() && device_->throttle.admits(worker_.now_ns()));
}

void Session::hold(Queue& queue, bool was_served) {
    queue.held = true;
    if (held_.empty()) {
        held_since_ns_ = worker_.now_ns();
        timer_at_ns_ = device_->throttle.admits_at();
        worker_.start_timer(timer_at_ns_, *this);
    }
    if (was_served) {
        held_.push_back(index_of(queue));
    } else {
        held_.insert(held_.begin() + static_cast<std::ptrdiff_t>(unserved_), index_of(queue));
        ++unserved_;
    }
}

void Session::end_holding() {
    if (held_.empty()) {
        return;
    }
    worker_.stop_timer(timer_at_ns_, *this);
    add(device_->throttled_ns, worker_.now_ns() - held_since_ns_);
    for (uint16_t index : held_) {
        queues_[index].held = false;
    }
    held_.clear();
    unserved_ = 0;
}

void Session::release_held() {
    const std::deque<uint16_t> held = held_;
    end_holding();
    for (uint16_t index : held) {
        Queue& queue = queues_[index];
        if (queue.ring.started() && queue.ring.resolved()) {
            queue.was_held = queue.ring.waiting();
        }
        schedule(queue);
    }
}

void Session::on_timer() {
    release_held();
}

void Session::on_limits() {
    if (!closed_) {
        release_held();
    }
}

bool Session::write_through() const {
    // VIRTIO 1.2, 5.2.6.2: a driver without flush expects a completed write to be stable.
    return (features_ & feature_bit(kBlkFeatureFlush)) == 0;
}

void Session::start_request(Queue& queue, Chain& chain, const DiskView& disk) {
    std::unique_ptr<Request> request = worker_.take_request();
    request->started_ns = now_ns();
    request->queue = index_of(queue);
    if (Result<void> decoded = decode(chain, disk, *request); !decoded) {
        publish(queue);
        break_off(decoded.error().with_context(fmt::format("queue {}", request->queue)));
        return;
    }
    const bool moves_data =
        request->kind == RequestKind::kRead || request->kind == RequestKind::kWrite;
    device_->throttle.charge(moves_data && request->status == kBlkStatusOk ? request->length_bytes
                                                                           : 0);
    if (request->status != kBlkStatusOk) {
        return finish(queue, std::move(request));
    }
    switch (request->kind) {
        case RequestKind::kFlush:
            return submit_flush(queue, std::move(request));
        case RequestKind::kGetId:
            fill_serial(device_->serial, *request);
            return finish(queue, std::move(request));
        case RequestKind::kUnknown:
            return finish(queue, std::move(request));
        case RequestKind::kRead:
        case RequestKind::kWrite:
        case RequestKind::kDiscard:
        case RequestKind::kWriteZeroes:
            break;
    }
    if (!request->data.empty() && request->length_bytes > kInlineBytes) {
        return submit(queue, std::move(request), Lane::kLarge);
    }
    if (request->ranges.size() > 1 ||
        (!request->ranges.empty() && request->length_bytes > kInlineRangeBytes)) {
        return submit(queue, std::move(request), Lane::kWrite);
    }
    turn_budget_ -= std::min(turn_budget_, std::max(request->length_bytes, kMinRequestCost));
    Result<void> result = perform(*device_->disk, *request, IoMode::kNoWait);
    if (!result && result.error().code() == ErrorCode::kWouldBlock) {
        Lane lane = waiting_lane(*request);
        return submit(queue, std::move(request), lane);
    }
    request->status = status_of(*device_, *request, result);
    if (result && request->kind != RequestKind::kRead && write_through()) {
        return submit_flush(queue, std::move(request));
    }
    finish(queue, std::move(request));
}

void Session::go_async(Queue& queue, Request& request) {
    request.session = shared_from_this();
    request.memory = memory_;
    ++queue.in_flight;
    ++async_;
    device_->in_flight.store(async_, std::memory_order_relaxed);
}

void Session::submit(Queue& queue, std::unique_ptr<Request> request, Lane lane) {
    go_async(queue, *request);
    device_->pool->submit(lane, device_, std::move(request));
}

void Session::submit_flush(Queue& queue, std::unique_ptr<Request> request) {
    go_async(queue, *request);
    request->flushed = true;
    // The callback must be copyable, so it owns by a plain pointer; it is called exactly once.
    device_->disk->flush_async(
        [device = device_, raw = request.release()](const Result<void>& result) {
            std::unique_ptr<Request> owned(raw);
            owned->status = status_of(*device, *owned, result);
            device->worker->complete(std::move(owned));
        });
}

void Session::on_completed(std::unique_ptr<Request> request) {
    Queue& queue = queues_[request->queue];
    --queue.in_flight;
    --async_;
    device_->in_flight.store(async_, std::memory_order_relaxed);
    if (closed_) {
        worker_.recycle(std::move(request));
        if (async_ == 0) {
            device_->on_session_drained();
        }
        return;
    }
    if (request->abandoned) {
        // The guest is not told: its next back-end finds the request in the in-flight region.
        worker_.recycle(std::move(request));
        if (async_ == 0) {
            close_drained();
        }
        return;
    }
    bool changed = request->kind != RequestKind::kRead && request->kind != RequestKind::kFlush;
    if (changed && !request->flushed && request->status == kBlkStatusOk && write_through()) {
        return submit_flush(queue, std::move(request));
    }
    if (!queue.ring.resolved()) {
        return break_off(Error(
            ErrorCode::kProtocol,
            fmt::format("memory of queue {} was removed with requests in flight", request->queue)));
    }
    finish(queue, std::move(request));
    // Publishes, with whatever else completes in this turn.
    schedule(queue);
    if (any_stalled_ && async_ <= kMaxAsyncRequests / 2) {
        any_stalled_ = false;
        for (Queue& other : queues_) {
            if (other.stalled) {
                other.stalled = false;
                schedule(other);
            }
        }
    }
    if (pending_.active) {
        finish_pending();
    }
    if (draining_ && async_ == 0) {
        close_drained();
    }
}

void Session::finish(Queue& queue, std::unique_ptr<Request> request) {
    LiveTotals& totals = device_->totals[static_cast<size_t>(request->kind)];
    add(totals.requests, 1);
    add(totals.bytes, request->length_bytes);
    add(totals.errors, request->status == kBlkStatusOk ? 0 : 1);
    add(totals.latency_ns, now_ns() - request->started_ns);
    *request->status_byte = request->status;
    queue.ring.push(request->head, request->written_bytes());
    worker_.recycle(std::move(request));
}

void Session::publish(Queue& queue) {
    if (!queue.ring.has_unpublished()) {
        return;
    }
    if (!queue.ring.resolved()) {
        return break_off(Error(ErrorCode::kProtocol,
                               fmt::format("memory of queue {} was removed with requests in flight",
                                           index_of(queue))));
    }
    // What was read from lost memory may have been zeros: nothing of it is confirmed.
    if (check_memory() && queue.ring.publish() && !queue.call.signal(worker_)) {
        break_off(Error(ErrorCode::kProtocol, std::string(kStuckCall)));
    }
}

bool Session::check_memory() {
    if (memory_->lost() || (inflight_ != nullptr && inflight_->lost())) {
        break_off(Error(ErrorCode::kProtocol,
                        "shared memory could not be accessed: its file was cut short"));
    }
    return !closed_;
}

}  // namespace stellarium::vhost
