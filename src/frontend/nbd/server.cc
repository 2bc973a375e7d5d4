#include "frontend/nbd/server.h"

#include <algorithm>
#include <condition_variable>
#include <future>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frontend/nbd/connection.h"

namespace stellarium::nbd {

namespace asio = boost::asio;
using ErrorCodeOfBoost = boost::system::error_code;

namespace {
/// How often clients are looked at that keep us waiting.
constexpr std::chrono::milliseconds kSweepInterval{500};
constexpr std::chrono::milliseconds kAcceptRetry{100};

/// A thread, and the clients that it serves.
struct Loop {
    Loop() {
        thread = std::thread([this] { io->run(); });
        pthread_setname_np(thread.native_handle(), "nbd");
    }
    ~Loop() {
        asio::post(*io, [this] {
            ending = true;
            sweep.cancel();
        });
        work.reset();
        thread.join();
    }
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;

    std::vector<std::shared_ptr<Connection>> all() const {
        std::vector<std::shared_ptr<Connection>> list;
        list.reserve(clients.size());
        for (const auto& [key, client] : clients) {
            list.push_back(client);
        }
        return list;
    }
    void sweep_soon() {
        sweep.expires_after(kSweepInterval);
        sweep.async_wait([this](ErrorCodeOfBoost cancelled) {
            if (cancelled || ending) {
                return;
            }
            const auto now = Connection::Clock::now();
            for (const std::shared_ptr<Connection>& client : all()) {
                client->check_time(now);
            }
            sweep_soon();
        });
    }

    /// Shared with clients: a device's thread may still be about to post to it.
    const std::shared_ptr<asio::io_context> io = std::make_shared<asio::io_context>(1);
    asio::executor_work_guard<asio::io_context::executor_type> work{io->get_executor()};
    // The thread's own.
    PieceBuffers pieces;
    std::map<Connection*, std::shared_ptr<Connection>> clients;
    asio::steady_timer sweep{*io};
    bool ending = false;
    std::thread thread;  ///< Last: it uses the others.
};

}  // namespace

struct Server::Impl {
    using Acceptor =
        asio::basic_socket_acceptor<asio::local::stream_protocol, asio::io_context::executor_type>;

    Impl(ExportSource& source, ServerOptions options_in)
        : options(std::move(options_in)), shared(source, options) {
        unsigned threads = options.threads != 0 ? options.threads
                                                : std::max(std::thread::hardware_concurrency(), 1U);
        threads = std::min(threads, kMaxThreads);
        for (unsigned i = 0; i < threads; ++i) {
            loops.push_back(std::make_unique<Loop>());
            asio::post(*loops.back()->io, [loop = loops.back().get()] { loop->sweep_soon(); });
        }
        acceptor = std::make_unique<Acceptor>(*loops.front()->io);
        retry = std::make_unique<asio::steady_timer>(*loops.front()->io);
    }

    const ServerOptions options;
    Shared shared;
    std::vector<std::unique_ptr<Loop>> loops;

    // Of the first loop's thread.
    std::unique_ptr<Acceptor> acceptor;
    std::unique_ptr<asio::steady_timer> retry;
    size_t next_loop = 0;
    bool accepting = false;
    bool stopping = false;

    mutable std::mutex mutex;
    std::condition_variable gone;
    unsigned clients = 0;  ///< Guarded by mutex.
    bool stopped = false;

    void accept();
    void serve(Loop& loop, Connection::Socket socket);
    void client_gone(Loop& loop, Connection& client);
    bool full() const {
        const std::lock_guard lock(mutex);
        return clients >= options.max_clients;
    }
};

/// Waits for the next client. The first loop's thread.
void Server::Impl::accept() {
    if (stopping || accepting || full()) {
        return;  // The end of a client calls again.
    }
    accepting = true;
    Loop& loop = *loops[next_loop];
    next_loop = (next_loop + 1) % loops.size();
    acceptor->async_accept(
        *loop.io, [this, &loop](ErrorCodeOfBoost code, Connection::Socket socket) {
            accepting = false;
            if (stopping) {
                return;
            }
            if (!code) {
                {
                    const std::lock_guard lock(mutex);
                    ++clients;
                }
                shared.connections.fetch_add(1, std::memory_order_relaxed);
                asio::post(*loop.io, [this, &loop, socket = std::move(socket)]() mutable {
                    serve(loop, std::move(socket));
                });
                return accept();
            }
            // Out of descriptors, most likely: try again soon rather than spin.
            retry->expires_after(kAcceptRetry);
            retry->async_wait([this](ErrorCodeOfBoost cancelled) {
                if (!cancelled) {
                    accept();
                }
            });
        });
}

void Server::Impl::serve(Loop& loop, Connection::Socket socket) {
    const auto client = std::make_shared<Connection>(
        shared, loop.io, loop.pieces, std::move(socket),
        [this, &loop](Connection& closed) { client_gone(loop, closed); });
    loop.clients.emplace(client.get(), client);
    client->start();
    // stop() may have looked at the loop's clients before this one was among them.
    const std::lock_guard lock(mutex);
    if (stopped) {
        asio::post(*loop.io, [client] { client->stop(); });
    }
}

void Server::Impl::client_gone(Loop& loop, Connection& client) {
    loop.clients.erase(&client);
    // Both under the lock: when stop() sees that nobody is left, nothing here runs any more.
    const std::lock_guard lock(mutex);
    asio::post(*loops.front()->io, [this] { accept(); });
    --clients;
    gone.notify_all();
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() {
    stop();
}

Result<std::unique_ptr<Server>> Server::start(ExportSource& source, ServerOptions options) {
    const int listen_fd = std::exchange(options.listen_fd, -1);
    auto impl = std::make_unique<Impl>(source, std::move(options));
    ErrorCodeOfBoost code;
    code = impl->acceptor->assign(asio::local::stream_protocol(), listen_fd, code);
    if (code) {
        const Error error = Error::from_errno(code.value(), "take over the NBD socket");
        ::close(listen_fd);
        return std::unexpected(error);
    }
    if (::listen(listen_fd, kListenBacklog) != 0) {
        return std::unexpected(Error::from_errno(errno, "listen on the NBD socket"));
    }
    asio::post(*impl->loops.front()->io, [impl = impl.get()] { impl->accept(); });
    return std::unique_ptr<Server>(new Server(std::move(impl)));
}

ServerStatus Server::status() const {
    ServerStatus status;
    {
        const std::lock_guard lock(impl_->mutex);
        status.clients = impl_->clients;
    }
    const Shared& shared = impl_->shared;
    status.connections = shared.connections.load(std::memory_order_relaxed);
    status.forced_disconnects = shared.forced_disconnects.load(std::memory_order_relaxed);
    status.pending_bytes = shared.budget.used();
    for (size_t kind = 0; kind < kCommandKinds; ++kind) {
        const Shared::Counters& counters = shared.counters[kind];
        status.totals[kind] = {.requests = counters.requests.load(std::memory_order_relaxed),
                               .bytes = counters.bytes.load(std::memory_order_relaxed),
                               .errors = counters.errors.load(std::memory_order_relaxed)};
    }
    return status;
}

void Server::stop() {
    {
        const std::lock_guard lock(impl_->mutex);
        if (std::exchange(impl_->stopped, true)) {
            return;
        }
    }
    // Shared: this thread may go on before set_value has returned.
    const auto closed = std::make_shared<std::promise<void>>();
    asio::post(*impl_->loops.front()->io, [impl = impl_.get(), closed] {
        impl->stopping = true;
        ErrorCodeOfBoost ignored;
        ignored = impl->acceptor->close(ignored);
        impl->retry->cancel();
        closed->set_value();
    });
    closed->get_future().wait();
    for (const std::unique_ptr<Loop>& loop : impl_->loops) {
        asio::post(*loop->io, [loop = loop.get()] {
            for (const std::shared_ptr<Connection>& client : loop->all()) {
                client->stop();
            }
        });
    }
    {
        std::unique_lock lock(impl_->mutex);
        impl_->gone.wait(lock, [&] { return impl_->clients == 0; });
    }
    for (TurnPool* const pool :
         {&impl_->shared.reading, &impl_->shared.writing, &impl_->shared.control}) {
        pool->stop();
    }
    impl_->acceptor.reset();
    impl_->retry.reset();
    impl_->loops.clear();
}

}  // namespace stellarium::nbd
