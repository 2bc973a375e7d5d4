#include "frontend/fuse/holder_protocol.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/unix_address.h"

namespace stellarium::fuse {
namespace {

/// It has nothing to do any more but to end.
constexpr int kGoneTimeoutMs = 10'000;

std::unexpected<Error> not_understood(uint32_t version) {
    return fail(ErrorCode::kProtocol,
                fmt::format("the holder of the mounted directory and the daemon are of different "
                            "versions ({} and {}): close the files, unmount the directory and "
                            "start the daemon again",
                            version, kHolderVersion));
}

}  // namespace

Result<HolderRequest> decode_request(Bytes packet) {
    if (packet.size() != sizeof(HolderRequest)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("a request of {} bytes, where {} are expected", packet.size(),
                                sizeof(HolderRequest)));
    }
    const auto request = load<HolderRequest>(packet);
    if (request.magic != kHolderMagic || request.version != kHolderVersion) {
        return not_understood(request.version);
    }
    return request;
}

std::string encode_answer(HolderResult result, const HolderStatus& status,
                          std::string_view message) {
    HolderAnswer answer;
    message = message.substr(0, kMaxHolderTextBytes);
    answer.result = static_cast<uint32_t>(result);
    answer.pid = static_cast<uint32_t>(status.pid);
    answer.store = status.store;
    answer.directory_bytes = static_cast<uint32_t>(status.directory.size());
    answer.message_bytes = static_cast<uint32_t>(message.size());
    std::string packet(sizeof answer, '\0');
    std::memcpy(packet.data(), &answer, sizeof answer);
    packet += status.directory;
    packet += message;
    return packet;
}

Result<DecodedAnswer> decode_answer(Bytes packet) {
    if (packet.size() < sizeof(HolderAnswer)) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("the holder's answer has {} bytes", packet.size()));
    }
    const auto answer = load<HolderAnswer>(packet);
    if (answer.magic != kHolderMagic || answer.version != kHolderVersion) {
        return not_understood(answer.version);
    }
    const uint64_t directory_bytes = answer.directory_bytes;
    const uint64_t message_bytes = answer.message_bytes;
    const Bytes text = packet.subspan(sizeof answer);
    if (answer.result > static_cast<uint32_t>(HolderResult::kFailed) ||
        directory_bytes + message_bytes != text.size()) {
        return fail(ErrorCode::kProtocol, "the holder's answer contradicts itself");
    }
    const auto text_of = [](Bytes bytes) {
        std::string out(bytes.size(), '\0');
        std::memcpy(out.data(), bytes.data(), bytes.size());
        return out;
    };
    return DecodedAnswer{.result = static_cast<HolderResult>(answer.result.get()),
                         .status = {.pid = answer.pid.get(),
                                    .store = answer.store,
                                    .directory = text_of(text.first(directory_bytes))},
                         .message = text_of(text.subspan(directory_bytes))};
}

Result<void> send_packet(int socket, Bytes packet, std::span<const int> descriptors) {
    iovec part{.iov_base = const_cast<std::byte*>(packet.data()), .iov_len = packet.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) std::array<char, CMSG_SPACE(2 * sizeof(int))> control{};
    if (!descriptors.empty()) {
        message.msg_control = control.data();
        message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
        cmsghdr* const header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(descriptors.size_bytes());
        std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size_bytes());
    }
    while (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
        if (errno != EINTR) {
            return std::unexpected(Error::from_errno(errno, "write to the holder's socket"));
        }
    }
    return {};
}

Result<Packet> receive_packet(int socket) {
    std::array<char, kMaxHolderPacketBytes> bytes;
    iovec part{.iov_base = bytes.data(), .iov_len = bytes.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(2 * sizeof(int))> control{};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    ssize_t got = 0;
    while ((got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0) {
        if (errno != EINTR) {
            return std::unexpected(Error::from_errno(errno, "read from the holder's socket"));
        }
    }
    Packet packet;
    packet.bytes.assign(bytes.data(), static_cast<size_t>(got));
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
         header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count && i < packet.descriptors.size(); ++i) {
            int descriptor = -1;
            std::memcpy(&descriptor, CMSG_DATA(header) + i * sizeof(int), sizeof descriptor);
            packet.descriptors[i] = UniqueFd(descriptor);
        }
    }
    if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
        return fail(ErrorCode::kProtocol, "a packet on the holder's socket is too long");
    }
    return packet;
}

Result<HolderClient> HolderClient::connect(const std::string& socket_path,
                                           std::optional<uid_t> trusted) {
    STELLARIUM_ASSIGN(const sockaddr_un address, unix_address(socket_path));
    UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (!socket) {
        return std::unexpected(Error::from_errno(errno, "make a socket"));
    }
    if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        if (errno == ENOENT || errno == ECONNREFUSED) {
            return fail(ErrorCode::kUnavailable,
                        fmt::format("nobody holds a mounted directory at {}", socket_path));
        }
        return std::unexpected(Error::from_errno(errno, "connect to " + socket_path));
    }
    ucred peer{};
    socklen_t length = sizeof peer;
    if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 ||
        (peer.uid != 0 && peer.uid != geteuid() && peer.uid != trusted)) {
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("at {} listens user {}, who is not to hold a directory for us",
                                socket_path, peer.uid));
    }
    return HolderClient(std::move(socket));
}

Result<DecodedAnswer> HolderClient::ask(HolderCommand command, const StoreUuid& store,
                                        std::array<UniqueFd, 2>* descriptors) {
    HolderRequest request;
    request.command = static_cast<uint32_t>(command);
    request.store = store;
    STELLARIUM_TRY(send_packet(socket_.get(), bytes_of(request), {}));
    STELLARIUM_ASSIGN(Packet packet, receive_packet(socket_.get()));
    if (packet.bytes.empty()) {
        return fail(ErrorCode::kUnavailable, "the holder of the mounted directory has ended");
    }
    if (descriptors != nullptr) {
        *descriptors = std::move(packet.descriptors);
    }
    STELLARIUM_ASSIGN(DecodedAnswer answer,
                      decode_answer(bytes_of(std::string_view(packet.bytes))));
    switch (answer.result) {
        case HolderResult::kDone:
            return answer;
        case HolderResult::kBusy:
        case HolderResult::kOtherStore:
            return fail(ErrorCode::kBusy, answer.message);
        case HolderResult::kFailed:
            break;
    }
    return fail(ErrorCode::kIo, answer.message);
}

Result<HolderStatus> HolderClient::status() {
    STELLARIUM_ASSIGN(DecodedAnswer answer, ask(HolderCommand::kStatus, {}, nullptr));
    return std::move(answer.status);
}

Result<Adoption> HolderClient::adopt(const StoreUuid& store) {
    std::array<UniqueFd, 2> descriptors;
    STELLARIUM_ASSIGN(DecodedAnswer answer, ask(HolderCommand::kAdopt, store, &descriptors));
    if (!descriptors[0] || !descriptors[1]) {
        return fail(ErrorCode::kProtocol, "the holder gave no descriptors");
    }
    return Adoption{.fuse = std::move(descriptors[0]),
                    .table = std::move(descriptors[1]),
                    .holder = std::move(answer.status)};
}

Result<UniqueFd> HolderClient::table() {
    std::array<UniqueFd, 2> descriptors;
    STELLARIUM_TRY(ask(HolderCommand::kTable, {}, &descriptors));
    if (!descriptors[0]) {
        return fail(ErrorCode::kProtocol, "the holder gave no descriptor");
    }
    return std::move(descriptors[0]);
}

Result<void> HolderClient::unmount() {
    STELLARIUM_TRY(ask(HolderCommand::kUnmount, {}, nullptr));
    pollfd look{.fd = socket_.get(), .events = POLLIN, .revents = 0};
    while (poll(&look, 1, kGoneTimeoutMs) < 0 && errno == EINTR) {
    }
    return {};
}

}  // namespace stellarium::fuse
