#include "share/protocol.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>

#include "share/limits.h"

namespace stellarium::share {
namespace {

constexpr char kFilesByte = 'F';

Error lost(int error, std::string_view what) {
    if (error == EAGAIN) {
        return {ErrorCode::kUnavailable, fmt::format("{}: the other side takes too long", what)};
    }
    return Error::from_errno(error, what);
}

}  // namespace

Result<void> send_all(int socket, Bytes bytes) {
    while (!bytes.empty()) {
        const ssize_t sent = send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            return std::unexpected(lost(errno, "send to the map socket"));
        }
        bytes = bytes.subspan(static_cast<size_t>(sent));
    }
    return {};
}

Result<void> receive_all(int socket, MutableBytes into) {
    while (!into.empty()) {
        const ssize_t got = recv(socket, into.data(), into.size(), 0);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return std::unexpected(lost(errno, "receive from the map socket"));
        }
        if (got == 0) {
            return fail(ErrorCode::kUnavailable, "map socket: the other side has hung up");
        }
        into = into.subspan(static_cast<size_t>(got));
    }
    return {};
}

Result<void> send_files(int socket, std::span<const UniqueFd> files) {
    while (!files.empty()) {
        const std::span<const UniqueFd> now = files.first(std::min(files.size(), kFilesPerMessage));
        char byte = kFilesByte;
        iovec part{.iov_base = &byte, .iov_len = 1};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(kFilesPerMessage * sizeof(int))> control{};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.data();
        message.msg_controllen = CMSG_SPACE(now.size() * sizeof(int));
        cmsghdr* const header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(now.size() * sizeof(int));
        for (size_t i = 0; i < now.size(); ++i) {
            const int descriptor = now[i].get();
            std::memcpy(CMSG_DATA(header) + i * sizeof(int), &descriptor, sizeof(int));
        }
        ssize_t sent = 0;
        do {
            sent = sendmsg(socket, &message, MSG_NOSIGNAL);
        } while (sent < 0 && errno == EINTR);
        if (sent < 0) {
            return std::unexpected(lost(errno, "send descriptors to the map socket"));
        }
        files = files.subspan(now.size());
    }
    return {};
}

Result<std::vector<UniqueFd>> receive_files(int socket, size_t count) {
    std::vector<UniqueFd> files;
    files.reserve(count);
    while (files.size() < count) {
        char byte = 0;
        iovec part{.iov_base = &byte, .iov_len = 1};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(kFilesPerMessage * sizeof(int))> control{};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        const ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return std::unexpected(lost(errno, "receive descriptors from the map socket"));
        }
        if (got == 0) {
            return fail(ErrorCode::kUnavailable, "map socket: the other side has hung up");
        }
        const size_t before = files.size();
        for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
             header = CMSG_NXTHDR(&message, header)) {
            if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
                continue;
            }
            const size_t sent = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            for (size_t i = 0; i < sent; ++i) {
                int descriptor = -1;
                std::memcpy(&descriptor, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
                files.emplace_back(descriptor);
            }
        }
        // The kernel cuts off what this process may not have (RLIMIT_NOFILE).
        if ((message.msg_flags & MSG_CTRUNC) != 0) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("this process has no room for {} more descriptors: raise its "
                                    "limit (ulimit -n)",
                                    count));
        }
        if (byte != kFilesByte || files.size() == before || files.size() > count) {
            return fail(ErrorCode::kProtocol, "the daemon lends other files than it says");
        }
    }
    return files;
}

Result<void> set_timeouts(int socket, int receive_seconds, int send_seconds) {
    const timeval receive{.tv_sec = receive_seconds, .tv_usec = 0};
    const timeval send{.tv_sec = send_seconds, .tv_usec = 0};
    if (setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &receive, sizeof receive) != 0 ||
        setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &send, sizeof send) != 0) {
        return std::unexpected(Error::from_errno(errno, "set timeouts of the map socket"));
    }
    return {};
}

}  // namespace stellarium::share
