#include "frontend/vhost/listener.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include <fmt/core.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/unix_address.h"
#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

namespace {

Result<void> check_replaceable(const std::string& path, const sockaddr_un& address) {
    struct stat st = {};
    if (::lstat(path.c_str(), &st) != 0) {
        return errno == ENOENT
                   ? Result<void>()
                   : std::unexpected(Error::from_errno(errno, fmt::format("lstat {}", path)));
    }
    if (!S_ISSOCK(st.st_mode)) {
        return fail(ErrorCode::kAlreadyExists, fmt::format("{} exists and is not a socket", path));
    }
    UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!probe) {
        return std::unexpected(Error::from_errno(errno, "socket"));
    }
    int rc = ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
    // EAGAIN: its backlog is full, so someone listens.
    if (rc == 0 || errno == EAGAIN) {
        return fail(ErrorCode::kBusy, fmt::format("another process listens on {}", path));
    }
    return {};
}

}  // namespace

Result<Listener> listen_at(const std::string& path) {
    STELLARIUM_ASSIGN(sockaddr_un address, unix_address(path));
    STELLARIUM_TRY(check_replaceable(path, address));
    // Bound beside its place and moved there when it listens: a front-end finds a socket that
    // answers, or the old one, and never one with the wrong mode.
    std::string temporary = fmt::format("{}.{}", path, ::getpid());
    STELLARIUM_ASSIGN(sockaddr_un temporary_address, unix_address(temporary));
    Listener listener;
    listener.path = path;
    listener.fd = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!listener.fd) {
        return std::unexpected(Error::from_errno(errno, "socket"));
    }
    ::unlink(temporary.c_str());  // Left by a predecessor with our pid, if at all.
    auto give_up = [&](const char* what) {
        int error = errno;
        ::unlink(temporary.c_str());
        return std::unexpected(Error::from_errno(error, fmt::format("{} {}", what, temporary)));
    };
    if (::bind(listener.fd.get(), reinterpret_cast<const sockaddr*>(&temporary_address),
               sizeof(temporary_address)) != 0) {
        return std::unexpected(Error::from_errno(errno, fmt::format("bind {}", temporary)));
    }
    struct stat st = {};
    if (::chmod(temporary.c_str(), 0600) != 0 || ::lstat(temporary.c_str(), &st) != 0) {
        return give_up("chmod");
    }
    if (::listen(listener.fd.get(), kListenBacklog) != 0) {
        return give_up("listen");
    }
    if (::rename(temporary.c_str(), path.c_str()) != 0) {
        return give_up("rename");
    }
    listener.device = st.st_dev;
    listener.inode = st.st_ino;
    return listener;
}

void remove_socket_file(const Listener& listener) {
    struct stat st = {};
    if (!listener.path.empty() && ::lstat(listener.path.c_str(), &st) == 0 &&
        st.st_dev == listener.device && st.st_ino == listener.inode) {
        ::unlink(listener.path.c_str());
    }
}

}  // namespace stellarium::vhost
