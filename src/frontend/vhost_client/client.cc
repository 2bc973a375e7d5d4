#include "frontend/vhost_client/client.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/unix_address.h"
#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

Result<std::unique_ptr<Client>> Client::connect(const std::string& socket_path) {
    STELLARIUM_ASSIGN(const sockaddr_un address, unix_address(socket_path));
    std::unique_ptr<Client> client(new Client());
    client->socket_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!client->socket_ ||
        ::connect(client->socket_.get(), reinterpret_cast<const sockaddr*>(&address),
                  sizeof(address)) != 0) {
        return std::unexpected(Error::from_errno(errno, fmt::format("connect {}", socket_path)));
    }
    return client;
}

Result<void> Client::send(MessageType type, Bytes payload, std::span<const int> fds,
                          uint32_t flags) {
    return send_message(socket_.get(), static_cast<uint32_t>(type), flags, payload, fds);
}

Result<Message> Client::receive() {
    while (true) {
        Message message;
        STELLARIUM_ASSIGN(MessageReader::Outcome outcome, reader_.read(socket_.get(), message));
        if (outcome == MessageReader::Outcome::kMessage) {
            return message;
        }
        if (outcome == MessageReader::Outcome::kClosed) {
            return fail(ErrorCode::kUnavailable, "the back-end closed the connection");
        }
        pollfd waiting{socket_.get(), POLLIN, 0};
        std::chrono::milliseconds timeout = kClientTimeout;
        if (::poll(&waiting, 1, static_cast<int>(timeout.count())) == 0) {
            return fail(ErrorCode::kWouldBlock, "the back-end does not answer");
        }
    }
}

Result<Message> Client::ask(MessageType type, Bytes payload) {
    STELLARIUM_TRY(send(type, payload));
    STELLARIUM_ASSIGN(Message message, receive());
    if (message.header.type != static_cast<uint32_t>(type) ||
        (message.header.flags & kFlagReply) == 0) {
        return fail(
            ErrorCode::kProtocol,
            fmt::format("asked {}, answered {} with flags {:#x}", static_cast<uint32_t>(type),
                        message.header.type.get(), message.header.flags.get()));
    }
    return message;
}

Result<uint64_t> Client::ask_u64(MessageType type) {
    STELLARIUM_ASSIGN(Message message, ask(type));
    if (message.payload.size() != sizeof(U64Le)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("answer of {} bytes", message.payload.size()));
    }
    return load<U64Le>(message.payload).get();
}

Result<void> Client::tell(MessageType type, Bytes payload, std::span<const int> fds) {
    bool acknowledged = has(ProtocolFeature::kReplyAck);
    STELLARIUM_TRY(send(type, payload, fds, acknowledged ? kFlagNeedReply : 0));
    if (!acknowledged) {
        return {};
    }
    STELLARIUM_ASSIGN(Message message, receive());
    if (message.payload.size() != sizeof(U64Le)) {
        return fail(ErrorCode::kProtocol, "acknowledgement without a value");
    }
    uint64_t answer = load<U64Le>(message.payload);
    if (answer != 0) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("message {} refused with {}", static_cast<uint32_t>(type), answer));
    }
    return {};
}

bool Client::wait_closed() {
    while (true) {
        Result<Message> message = receive();
        if (!message) {
            return message.error().code() == ErrorCode::kUnavailable;
        }
    }
}

Result<void> Client::negotiate(uint64_t features, uint64_t protocol_features) {
    STELLARIUM_ASSIGN(uint64_t offered, ask_u64(MessageType::kGetFeatures));
    features_ = offered & features;
    if ((features_ & feature_bit(kFeatureProtocolFeatures)) != 0) {
        STELLARIUM_ASSIGN(uint64_t protocol, ask_u64(MessageType::kGetProtocolFeatures));
        protocol_features_ = protocol & protocol_features;
        STELLARIUM_TRY(
            send(MessageType::kSetProtocolFeatures, bytes_of(U64Le(protocol_features_))));
    }
    STELLARIUM_TRY(tell(MessageType::kSetOwner, {}));
    return tell(MessageType::kSetFeatures, bytes_of(U64Le(features_)));
}

Result<void> Client::share(const GuestRam& ram) {
    int fd = ram.fd();
    if (has(ProtocolFeature::kConfigureMemSlots)) {
        SingleRegion single;
        single.region = ram.description();
        return tell(MessageType::kAddMemReg, bytes_of(single), std::span(&fd, 1));
    }
    struct {
        MemoryTableHeader header;
        RegionDescription region;
    } table{{1, 0}, ram.description()};
    return tell(MessageType::kSetMemTable, bytes_of(table), std::span(&fd, 1));
}

Result<std::vector<std::byte>> Client::get_config(uint32_t offset, uint32_t size) {
    std::vector<std::byte> payload(sizeof(ConfigHeader) + size);
    ConfigHeader header{offset, size, 0};
    std::memcpy(payload.data(), &header, sizeof(header));
    STELLARIUM_ASSIGN(Message message, ask(MessageType::kGetConfig, payload));
    if (message.payload.empty()) {
        return fail(ErrorCode::kInvalidArgument, "configuration space refused");
    }
    if (message.payload.size() != payload.size()) {
        return fail(ErrorCode::kProtocol, fmt::format("asked {} bytes of configuration, got {}",
                                                      payload.size(), message.payload.size()));
    }
    message.payload.erase(message.payload.begin(), message.payload.begin() + sizeof(ConfigHeader));
    return std::move(message.payload);
}

Result<BlkConfig> Client::config() {
    STELLARIUM_ASSIGN(std::vector<std::byte> bytes, get_config(0, sizeof(BlkConfig)));
    return load<BlkConfig>(bytes);
}

Result<void> Client::start_queue(uint32_t index, const DriverQueue& queue, uint16_t base) {
    STELLARIUM_TRY(tell(MessageType::kSetVringNum, bytes_of(VringState{index, queue.size()})));
    STELLARIUM_TRY(tell(MessageType::kSetVringBase, bytes_of(VringState{index, base})));
    STELLARIUM_TRY(tell(MessageType::kSetVringAddr, bytes_of(queue.addresses(index))));
    int call = queue.call_fd();
    int error = queue.error_fd();
    int kick = queue.kick_fd();
    STELLARIUM_TRY(tell(MessageType::kSetVringErr, bytes_of(U64Le(index)), std::span(&error, 1)));
    STELLARIUM_TRY(tell(MessageType::kSetVringCall, bytes_of(U64Le(index)), std::span(&call, 1)));
    STELLARIUM_TRY(tell(MessageType::kSetVringKick, bytes_of(U64Le(index)), std::span(&kick, 1)));
    if ((features_ & feature_bit(kFeatureProtocolFeatures)) == 0) {
        return {};
    }
    return tell(MessageType::kSetVringEnable, bytes_of(VringState{index, 1}));
}

Result<uint16_t> Client::stop_queue(uint32_t index) {
    STELLARIUM_ASSIGN(Message message,
                      ask(MessageType::kGetVringBase, bytes_of(VringState{index, 0})));
    if (message.payload.size() != sizeof(VringState)) {
        return fail(ErrorCode::kProtocol, "answer to GET_VRING_BASE of a wrong size");
    }
    return static_cast<uint16_t>(load<VringState>(message.payload).num);
}

Result<UniqueFd> Client::open_backend_channel() {
    std::array<int, 2> pair{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()) != 0) {
        return std::unexpected(Error::from_errno(errno, "socketpair"));
    }
    UniqueFd ours(pair[0]);
    UniqueFd theirs(pair[1]);
    STELLARIUM_TRY(tell(MessageType::kSetBackendReqFd, {}, std::span(&pair[1], 1)));
    return ours;
}

Result<std::pair<UniqueFd, InflightDescription>> Client::get_inflight(uint16_t queues,
                                                                      uint16_t queue_size) {
    InflightDescription asked{0, 0, queues, queue_size};
    std::array<std::byte, kInflightPaddedBytes> payload{};
    std::memcpy(payload.data(), &asked, sizeof(asked));
    STELLARIUM_ASSIGN(Message message, ask(MessageType::kGetInflightFd, payload));
    if (message.payload.size() != payload.size() || message.fds.size() != 1) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("in-flight region in {} bytes with {} descriptors",
                                message.payload.size(), message.fds.size()));
    }
    return std::pair(std::move(message.fds[0]), load<InflightDescription>(message.payload));
}

Result<void> Client::set_inflight(const UniqueFd& fd, const InflightDescription& layout) {
    std::array<std::byte, kInflightPaddedBytes> payload{};
    std::memcpy(payload.data(), &layout, sizeof(layout));
    int raw = fd.get();
    return tell(MessageType::kSetInflightFd, payload, std::span(&raw, 1));
}

// ---- Requests -----------------------------------------------------------------------------------

BlkSlot::BlkSlot(GuestRam& ram, uint32_t data_bytes, uint32_t segment_bytes)
    : ram_(ram),
      capacity_bytes_(data_bytes),
      segment_bytes_(segment_bytes),
      header_(ram.allocate(sizeof(BlkRequestHeader))),
      status_(ram.allocate(1)),
      data_(ram.allocate(data_bytes, 4096)) {}

std::span<const Buffer> BlkSlot::prepare(uint32_t type, uint64_t sector, uint32_t data_bytes) {
    BlkRequestHeader header{type, 0, sector};
    std::memcpy(header_, &header, sizeof(header));
    *status_ = std::byte{0xff};
    bool from_device = type == kBlkIn || type == kBlkGetId;
    buffers_.clear();
    buffers_.push_back(Buffer{ram_.guest_address(header_), sizeof(header), false});
    for (uint32_t at = 0; at < data_bytes;) {
        uint32_t part = std::min(segment_bytes_, data_bytes - at);
        buffers_.push_back(Buffer{ram_.guest_address(data_ + at), part, from_device});
        at += part;
    }
    buffers_.push_back(Buffer{ram_.guest_address(status_), 1, true});
    return buffers_;
}

uint8_t BlkSlot::status() const {
    return static_cast<uint8_t>(*status_);
}

Result<uint8_t> BlkDriver::run(uint32_t type, uint64_t sector, uint32_t data_bytes) {
    if (!queue_.add(slot_.prepare(type, sector, data_bytes))) {
        return fail(ErrorCode::kBusy, "the ring is full");
    }
    queue_.kick_if_wanted();
    if (!queue_.wait(kClientTimeout)) {
        return fail(ErrorCode::kUnavailable, "no answer to a request");
    }
    std::optional<UsedElement> used = queue_.take_used();
    used_length_ = used ? used->length : 0;
    return slot_.status();
}

Result<uint8_t> BlkDriver::read(uint64_t offset_bytes, MutableBytes into) {
    STELLARIUM_ASSIGN(uint8_t status, run(kBlkIn, offset_bytes >> kSectorShift,
                                          static_cast<uint32_t>(into.size())));
    std::ranges::copy(slot_.data().first(into.size()), into.begin());
    return status;
}

Result<uint8_t> BlkDriver::write(uint64_t offset_bytes, Bytes from) {
    std::ranges::copy(from, slot_.data().begin());
    return run(kBlkOut, offset_bytes >> kSectorShift, static_cast<uint32_t>(from.size()));
}

Result<uint8_t> BlkDriver::flush() {
    return run(kBlkFlush, 0, 0);
}

Result<uint8_t> BlkDriver::ranges(uint32_t type, std::span<const BlkRange> ranges) {
    Bytes bytes = std::as_bytes(ranges);
    std::ranges::copy(bytes, slot_.data().begin());
    return run(type, 0, static_cast<uint32_t>(bytes.size()));
}

Result<uint8_t> BlkDriver::discard(uint64_t offset_bytes, uint64_t length_bytes) {
    BlkRange range{offset_bytes >> kSectorShift, static_cast<uint32_t>(length_bytes / kSectorBytes),
                   0};
    return ranges(kBlkDiscard, std::span(&range, 1));
}

Result<uint8_t> BlkDriver::write_zeroes(uint64_t offset_bytes, uint64_t length_bytes) {
    BlkRange range{offset_bytes >> kSectorShift, static_cast<uint32_t>(length_bytes / kSectorBytes),
                   kBlkRangeUnmap};
    return ranges(kBlkWriteZeroes, std::span(&range, 1));
}

Result<std::string> BlkDriver::get_id() {
    STELLARIUM_ASSIGN(uint8_t status, run(kBlkGetId, 0, kSerialBytes));
    if (status != kBlkStatusOk) {
        return fail(ErrorCode::kIo, "GET_ID failed");
    }
    const auto* text = reinterpret_cast<const char*>(slot_.data().data());
    return std::string(text, ::strnlen(text, kSerialBytes));
}

}  // namespace stellarium::vhost
