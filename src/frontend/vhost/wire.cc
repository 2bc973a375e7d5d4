#include "frontend/vhost/wire.h"

#include <array>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>
#include <sys/socket.h>

#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

namespace {

/// Room for one message's descriptors, aligned as the kernel writes them.
struct ControlBuffer {
    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMaxFdsPerMessage * sizeof(int))> bytes;
};

/// Takes ownership of every descriptor that `message` brought.
void collect_fds(msghdr& message, std::vector<UniqueFd>& fds) {
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; ++i) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            fds.emplace_back(fd);
        }
    }
}

}  // namespace

Result<MessageReader::Outcome> MessageReader::read(int socket, Message& out) {
    constexpr size_t kHeader = sizeof(MessageHeader);
    while (true) {
        if (have_ >= kHeader && have_ == kHeader + payload_.size()) {
            out.header = header_;
            out.payload = std::move(payload_);
            out.fds = std::move(fds_);
            have_ = 0;
            payload_.clear();
            fds_.clear();
            return Outcome::kMessage;
        }
        iovec into = {};
        if (have_ < kHeader) {
            into.iov_base = reinterpret_cast<std::byte*>(&header_) + have_;
            into.iov_len = kHeader - have_;
        } else {
            into.iov_base = payload_.data() + (have_ - kHeader);
            into.iov_len = payload_.size() - (have_ - kHeader);
        }
        ControlBuffer control;
        msghdr message = {};
        message.msg_iov = &into;
        message.msg_iovlen = 1;
        message.msg_control = control.bytes.data();
        message.msg_controllen = control.bytes.size();
        ssize_t got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK) {
                return Outcome::kIncomplete;
            }
            if (errno == EINTR) {
                continue;
            }
            if (errno == ECONNRESET) {
                return Outcome::kClosed;
            }
            return std::unexpected(Error::from_errno(errno, "recvmsg"));
        }
        collect_fds(message, fds_);
        if (got == 0) {
            return Outcome::kClosed;
        }
        if ((message.msg_flags & MSG_CTRUNC) != 0 || fds_.size() > kMaxFdsPerMessage) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("message with more than {} descriptors", kMaxFdsPerMessage));
        }
        have_ += static_cast<size_t>(got);
        if (have_ == kHeader) {
            if (header_.size > kMaxPayloadBytes) {
                return fail(ErrorCode::kProtocol,
                            fmt::format("message {} with a payload of {} bytes", header_.type.get(),
                                        header_.size.get()));
            }
            payload_.resize(header_.size);
        }
    }
}

Result<void> send_message(int socket, uint32_t type, uint32_t flags, Bytes payload,
                          std::span<const int> fds) {
    MessageHeader header;
    header.type = type;
    header.flags = flags | kFlagVersion;
    header.size = static_cast<uint32_t>(payload.size());
    std::array<iovec, 2> parts = {
        iovec{&header, sizeof(header)},
        iovec{const_cast<std::byte*>(payload.data()), payload.size()},  // sendmsg only reads it.
    };
    msghdr message = {};
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    ControlBuffer control = {};
    if (!fds.empty()) {
        message.msg_control = control.bytes.data();
        message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
        cmsghdr* c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
        std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
    }
    while (true) {
        ssize_t sent = ::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent == static_cast<ssize_t>(sizeof(header) + payload.size())) {
            return {};
        }
        if (sent >= 0) {
            // A stream socket takes a message this small whole, unless its peer lets it fill up.
            return fail(ErrorCode::kIo, "the peer does not read its messages");
        }
        if (errno == EINTR) {
            continue;
        }
        if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return fail(ErrorCode::kWouldBlock, "the peer does not read its messages");
        }
        return std::unexpected(Error::from_errno(errno, "sendmsg"));
    }
}

}  // namespace stellarium::vhost
