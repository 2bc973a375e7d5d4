#include "frontend/vhost/device.h"

#include <cerrno>

#include <fmt/core.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "frontend/vhost/session.h"

namespace stellarium::vhost {

void Device::start_listening() {
    if (!listener.fd || listening_ || session != nullptr) {
        return;
    }
    listener_source = EventSource{EventSource::Kind::kListener, this, 0};
    if (Result<void> watched = worker->watch(listener.fd.get(), EPOLLIN, listener_source);
        !watched) {
        log(LogLevel::kError,
            fmt::format("no front-end can connect: {}", watched.error().message()));
        return;
    }
    listening_ = true;
}

void Device::on_listener() {
    if (!listening_) {
        return;
    }
    UniqueFd socket(::accept4(listener.fd.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            log(LogLevel::kError, fmt::format("a front-end has to wait: {}",
                                              Error::from_errno(errno, "accept").message()));
            worker->unwatch(listener.fd.get());
            listening_ = false;
            worker->accept_later(weak_from_this());
        }
        // Otherwise the front-end went away again.
        return;
    }
    // One front-end at a time: the next waits in the backlog until on_session_drained().
    worker->unwatch(listener.fd.get());
    listening_ = false;
    ucred peer = {};
    socklen_t length = sizeof(peer);
    ::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length);
    peer_pid.store(peer.pid);
    connected.store(true);
    connections.fetch_add(1);
    log(LogLevel::kInfo, fmt::format("front-end connected (pid {})", peer.pid));
    session = std::make_shared<Session>(shared_from_this(), std::move(socket));
    if (Result<void> opened = session->open(); !opened) {
        log(LogLevel::kError, fmt::format("connection dropped: {}", opened.error().message()));
        connected.store(false);
        session.reset();
        start_listening();
    }
}

void Device::on_resize() {
    if (session != nullptr) {
        session->on_resize();
    }
}

void Device::set_limits(const RateLimits& limits) {
    throttle.set(limits, worker->now_ns());
    if (session != nullptr) {
        session->on_limits();
    }
}

void Device::on_session_drained() {
    session.reset();
    abandoning.store(false);
    if (when_detached) {
        finish_detach();
    } else {
        start_listening();
    }
}

void Device::begin_detach(std::function<void()> done) {
    when_detached = std::move(done);
    if (listening_) {
        worker->unwatch(listener.fd.get());
        listening_ = false;
    }
    remove_socket_file(listener);
    listener.fd.reset();
    if (session == nullptr) {
        finish_detach();
    } else {
        session->drain();
    }
}

void Device::finish_detach() {
    // The events of this turn may still point here.
    worker->keep_until_end_of_turn(shared_from_this());
    std::function<void()> done = std::move(when_detached);
    when_detached = nullptr;
    done();
}

}  // namespace stellarium::vhost
