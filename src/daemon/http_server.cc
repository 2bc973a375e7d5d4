// How a connection lives:
//
//   read_header -> wants_upload?  no  -> read_body -> (worker) handle -> write_answer ->
//   read_header
//                                                      `-> answer downloads: (stream) send_download
//                                 yes -> (stream) handle, pulling the body as it goes -> answer
//
// Everything on a socket happens on the one I/O thread; a stream's thread asks for one operation
// at a time and waits for it (`wait`). So no socket is ever touched by two threads.
#include "daemon/http_server.h"

#include <charconv>
#include <condition_variable>
#include <future>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/basic_stream.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/service.h"

namespace stellarium::daemon {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using control::Request;
using control::RequestHandler;
using control::Response;
using ErrorCodeOfBoost = boost::system::error_code;
using Protocol = asio::generic::stream_protocol;
using Stream = beast::basic_stream<Protocol, asio::io_context::executor_type>;

/// Not boost::none: Beast 1.74 takes every length to be above a limit that is not there.
constexpr uint64_t kNoBodyLimit = std::numeric_limits<uint64_t>::max();
/// The most that Beast reads at once.
constexpr size_t kReadBytes = 65536;
constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr std::chrono::milliseconds kAcceptRetry{100};
constexpr std::string_view kHeadMethod = "HEAD";

}  // namespace

struct HttpServer::Impl : std::enable_shared_from_this<Impl> {
    explicit Impl(HttpServerOptions given)
        : options(given), workers(given.workers), streams(given.max_streams) {}

    HttpServerOptions options;
    asio::io_context io{1};
    asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
    asio::thread_pool workers;
    asio::thread_pool streams;
    std::thread io_thread;

    // Below: the I/O thread only.
    struct Listener;
    class Session;
    std::vector<std::shared_ptr<Listener>> listeners;
    std::set<Session*> sessions;
    unsigned running_streams = 0;
    size_t held_bytes = 0;                      ///< Bodies and answers of all sessions.
    std::map<uid_t, unsigned> streams_of_user;  ///< No entry for none.
    bool stopping = false;

    std::mutex idle_mutex;
    std::condition_variable idle;
    bool all_closed = false;  ///< Stopping, and no session is left. Guarded by idle_mutex.

    /// Runs `function` on the I/O thread and waits for it.
    template <typename Function>
    void on_io_thread(Function function) {
        // Shared: the waiting thread may go on before set_value has returned.
        const auto done = std::make_shared<std::promise<void>>();
        asio::post(io, [&function, done] {
            function();
            done->set_value();
        });
        done->get_future().wait();
    }

    void session_closed(Session* session);
    void check_all_closed();
};

struct HttpServer::Impl::Listener : std::enable_shared_from_this<Listener> {
    Listener(std::shared_ptr<Impl> server_in, RequestHandler& handler_in,
             unsigned max_connections_in)
        : server(std::move(server_in)),
          handler(handler_in),
          max_connections(max_connections_in),
          acceptor(server->io),
          retry(server->io) {}

    std::shared_ptr<Impl> server;
    RequestHandler& handler;
    const unsigned max_connections;
    unsigned connections = 0;
    asio::basic_socket_acceptor<Protocol, asio::io_context::executor_type> acceptor;
    asio::steady_timer retry;
    std::string socket_path;
    bool accepting = false;

    void accept();
    void close_longest_idle(const Session* but);
    void close() {
        ErrorCodeOfBoost ignored;
        ignored = acceptor.close(ignored);
        retry.cancel();
        if (!socket_path.empty()) {
            unlink(socket_path.c_str());
        }
    }
};

class HttpServer::Impl::Session : public std::enable_shared_from_this<Session> {
  public:
    Session(std::shared_ptr<Listener> listener, Stream::socket_type socket)
        : listener_(std::move(listener)),
          server_(listener_->server),
          handler_(listener_->handler),
          stream_(std::move(socket)) {
        if (!listener_->socket_path.empty()) {
            ucred peer{};
            socklen_t length = sizeof peer;
            if (getsockopt(stream_.socket().native_handle(), SOL_SOCKET, SO_PEERCRED, &peer,
                           &length) == 0) {
                user_ = peer.uid;
            }
        }
        // Beast reads as much as the buffer has room for, which would be 512 bytes at first.
        buffer_.reserve(kReadBytes);
    }

    ~Session() = default;
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void read_header() {
        activity_ = Activity::kIdle;
        idle_since_ = std::chrono::steady_clock::now();
        if (server_->stopping) {
            return close();
        }
        head_ = std::make_unique<http::request_parser<http::empty_body>>();
        head_->header_limit(kMaxHeaderBytes);
        head_->body_limit(kNoBodyLimit);
        stream_.expires_after(server_->options.header_timeout);
        http::async_read_header(
            stream_, buffer_, *head_,
            [self = shared_from_this()](ErrorCodeOfBoost code, size_t) { self->on_header(code); });
    }

    const std::shared_ptr<Listener>& listener() const { return listener_; }
    /// Since when it has waited for its client's request; nothing while it does one.
    std::optional<std::chrono::steady_clock::time_point> idle_since() const {
        return activity_ == Activity::kIdle && !evicted_ ? std::optional(idle_since_)
                                                         : std::nullopt;
    }
    /// Makes room for another one.
    void evict() {
        evicted_ = true;
        close_socket();
    }

    /// The server stops: an idle connection and a stream end now, a running request may answer.
    void stop() {
        if (activity_ != Activity::kBusy) {
            close_socket();
        }
    }

  private:
    class UploadBody;
    enum class Activity : uint8_t { kIdle, kBusy, kStream };

    /// Counts a body or an answer; false when too much is held already. I/O thread.
    bool hold(size_t bytes) {
        if (server_->held_bytes > 0 &&
            bytes > server_->options.max_held_bytes -
                        std::min(server_->held_bytes, server_->options.max_held_bytes)) {
            return false;
        }
        server_->held_bytes += bytes;
        held_bytes_ += bytes;
        return true;
    }
    void release_held() { server_->held_bytes -= std::exchange(held_bytes_, 0); }
    static Response too_much_at_once() {
        return control::error_response(
            Error(ErrorCode::kBusy,
                  "too many long requests and answers are under way: come again in a while"));
    }

    void close_socket() {
        ErrorCodeOfBoost ignored;
        ignored = stream_.socket().close(ignored);
    }

    /// Called where nothing is outstanding any more.
    void close() {
        if (!closed_) {
            closed_ = true;
            release_held();
            close_socket();
            server_->session_closed(this);
        }
    }

    void on_header(ErrorCodeOfBoost code) {
        if (code) {
            return on_read_error(code);
        }
        const auto& header = head_->get();
        request_.method.assign(header.method_string().data(), header.method_string().size());
        request_.target.assign(header.target().data(), header.target().size());
        request_.body.clear();
        keep_alive_ = header.keep_alive();
        expects_continue_ = beast::iequals(header[http::field::expect], "100-continue");
        if (handler_.wants_upload(request_.method, request_.target)) {
            return start_stream([self = shared_from_this()] { self->run_upload(); });
        }
        const size_t max_bytes = handler_.max_json_bytes(request_.method, request_.target);
        const auto length = head_->content_length();
        if (length && *length > max_bytes) {
            return on_read_error(http::error::body_limit);
        }
        // One that does not say how long it is may become as long as it is allowed to be.
        if (!hold(length ? static_cast<size_t>(*length) : head_->chunked() ? max_bytes : 0)) {
            keep_alive_ = false;
            return answer(too_much_at_once());
        }
        body_ = std::make_unique<http::request_parser<http::string_body>>(std::move(*head_));
        body_->body_limit(max_bytes);
        if (expects_continue_ && !body_->is_done()) {
            return send_continue([self = shared_from_this()](ErrorCodeOfBoost failed) {
                failed ? self->close() : self->read_body();
            });
        }
        read_body();
    }

    void on_read_error(ErrorCodeOfBoost code) {
        if (code.category() != http::make_error_code(http::error::end_of_stream).category() ||
            code == http::error::end_of_stream || code == http::error::partial_message) {
            return close();  // Gone, silent for too long, or stopped.
        }
        keep_alive_ = false;
        const bool too_long = code == http::error::body_limit || code == http::error::header_limit;
        answer(control::error_response(
            Error(too_long ? ErrorCode::kLimitExceeded : ErrorCode::kInvalidArgument,
                  fmt::format("the HTTP request is malformed or too long: {}", code.message()))));
    }

    template <typename Done>
    void send_continue(const Done& done) {
        expects_continue_ = false;
        const auto message =
            std::make_shared<http::response<http::empty_body>>(http::status::continue_, 11);
        stream_.expires_after(server_->options.header_timeout);
        http::async_write(stream_, *message,
                          [self = shared_from_this(), message, done = done](
                              ErrorCodeOfBoost code, size_t) mutable { done(code); });
    }

    void read_body() {
        stream_.expires_after(server_->options.header_timeout);
        http::async_read(
            stream_, buffer_, *body_,
            [self = shared_from_this()](ErrorCodeOfBoost code, size_t) { self->on_body(code); });
    }

    void on_body(ErrorCodeOfBoost code) {
        if (code) {
            return on_read_error(code);
        }
        request_.body = std::move(body_->get().body());
        body_.reset();
        activity_ = Activity::kBusy;
        asio::post(server_->workers, [self = shared_from_this()] {
            auto response = std::make_shared<Response>(self->handle());
            std::string().swap(self->request_.body);  // An idle connection keeps nothing of it.
            asio::post(self->server_->io, [self, response] {
                self->release_held();
                if (!self->hold(response->body.size())) {
                    *response = too_much_at_once();
                }
                if (!response->download || self->request_.method == kHeadMethod) {
                    return self->answer(std::move(*response));
                }
                self->start_stream([self, response] { self->run_download(*response->download); });
            });
        });
    }

    /// A request that a stranger made must not end the process, whatever it made a library do.
    Response handle() {
        try {
            return handler_.handle(request_);
        } catch (const std::bad_alloc&) {
            return control::error_response(
                Error(ErrorCode::kLimitExceeded, "there is not enough memory for this request"));
        } catch (const std::exception& error) {
            return control::error_response(
                Error(ErrorCode::kIo, fmt::format("unexpected: {}", error.what())));
        }
    }

    /// Answers without content. I/O thread.
    void answer(Response response) {
        activity_ = Activity::kBusy;
        const auto message = std::make_shared<http::response<http::string_body>>(
            static_cast<http::status>(response.status), 11);
        if (!response.allow.empty()) {
            message->set(http::field::allow, response.allow);
        }
        if (response.status != 204) {
            message->set(http::field::content_type, response.content_type);
            message->body() = std::move(response.body);
        }
        message->keep_alive(keep_alive_ && !server_->stopping);
        message->prepare_payload();
        if (request_.method == kHeadMethod) {
            message->body().clear();  // Its length was said.
            if (response.download) {
                message->content_length(boost::none);
            }
        }
        stream_.expires_after(server_->options.header_timeout);
        http::async_write(stream_, *message,
                          [self = shared_from_this(), message](ErrorCodeOfBoost code, size_t) {
                              self->release_held();
                              code || !message->keep_alive() ? self->close() : self->read_header();
                          });
    }

    // --- Streams --------------------------------------------------------------------------------

    template <typename Run>
    void start_stream(Run run) {
        keep_alive_ = false;
        if (server_->running_streams >= server_->options.max_streams) {
            return answer(control::error_response(
                Error(ErrorCode::kBusy,
                      fmt::format("{} imports and exports are running already; more at once are "
                                  "not taken",
                                  server_->running_streams))));
        }
        unsigned& of_user = server_->streams_of_user[user_];
        if (of_user >= server_->options.max_streams_per_user) {
            return answer(control::error_response(
                Error(ErrorCode::kBusy,
                      fmt::format("user {} runs {} imports and exports already; more at once are "
                                  "not taken from one user",
                                  user_, of_user))));
        }
        ++of_user;
        ++server_->running_streams;
        activity_ = Activity::kStream;
        asio::post(server_->streams, std::move(run));
    }

    /// The end of a stream: on its thread, with the answer still to be sent if there is one.
    void finish_stream(std::shared_ptr<Response> response) {
        asio::post(server_->io, [self = shared_from_this(), response = std::move(response)] {
            --self->server_->running_streams;
            auto of_user = self->server_->streams_of_user.find(self->user_);
            if (--of_user->second == 0) {
                self->server_->streams_of_user.erase(of_user);
            }
            if (!response) {
                return self->close();
            }
            self->answer(std::move(*response));
        });
    }

    /// Starts one socket operation on the I/O thread and waits for it on a stream's thread.
    /// `start` is given the completion handler.
    template <typename Start>
    ErrorCodeOfBoost wait(Start start) {
        // Shared: the waiting thread may go on before set_value has returned.
        const auto promise = std::make_shared<std::promise<ErrorCodeOfBoost>>();
        asio::post(server_->io, [this, &start, promise] {
            if (server_->stopping) {
                promise->set_value(asio::error::operation_aborted);
                return;
            }
            stream_.expires_after(server_->options.stall_timeout);
            start([promise](ErrorCodeOfBoost code, size_t = 0) { promise->set_value(code); });
        });
        return promise->get_future().get();
    }

    /// Writes all of `buffers`, as long as some of it gets through now and then.
    template <typename Buffers>
    ErrorCodeOfBoost write(const Buffers& buffers) {
        return wait([&](auto done) {
            asio::async_write(
                stream_, buffers,
                [this](ErrorCodeOfBoost code, size_t) -> size_t {
                    stream_.expires_after(server_->options.stall_timeout);
                    return code ? 0 : kReadBytes;
                },
                std::move(done));
        });
    }

    Error stream_error(ErrorCodeOfBoost code, std::string_view what) const {
        if (code == asio::error::operation_aborted || code == asio::error::bad_descriptor) {
            return {ErrorCode::kUnavailable,
                    fmt::format("{}: the daemon is stopping, so nothing was taken over", what)};
        }
        if (code == beast::error::timeout) {
            return {ErrorCode::kCancelled, fmt::format("{}: nothing came for too long", what)};
        }
        return {ErrorCode::kCancelled, fmt::format("{}: {}", what, code.message())};
    }

    void run_upload();

    void run_download(control::SparseSource& source) {
        http::response<http::empty_body> message(http::status::ok, 11);
        message.set(http::field::content_type, control::kSparseContentType);
        message.chunked(true);
        message.keep_alive(false);
        http::response_serializer<http::empty_body> serializer(message);
        ErrorCodeOfBoost code = wait(
            [&](auto done) { http::async_write_header(stream_, serializer, std::move(done)); });
        control::SparseEncoder encoder(source);
        for (auto pieces = encoder.next(); !pieces.empty() && !code; pieces = encoder.next()) {
            std::vector<asio::const_buffer> buffers;
            for (const Bytes piece : pieces) {
                buffers.emplace_back(piece.data(), piece.size());
            }
            code = write(http::make_chunk(buffers));
        }
        if (!code) {
            code = write(http::make_chunk_last());
        }
        finish_stream(nullptr);
    }

    std::shared_ptr<Listener> listener_;
    std::shared_ptr<Impl> server_;
    RequestHandler& handler_;
    Stream stream_;
    uid_t user_ = static_cast<uid_t>(-1);  ///< At the other end; that is none for TCP.
    beast::flat_buffer buffer_{kBufferBytes};
    std::unique_ptr<http::request_parser<http::empty_body>> head_;
    std::unique_ptr<http::request_parser<http::string_body>> body_;
    Request request_;
    size_t held_bytes_ = 0;  ///< Of server_->held_bytes.
    Activity activity_ = Activity::kIdle;
    bool keep_alive_ = false;
    bool expects_continue_ = false;
    bool closed_ = false;
    bool evicted_ = false;
    std::chrono::steady_clock::time_point idle_since_;
};

/// The body of an upload as the handler pulls it. The client is told to go on at the first pull.
class HttpServer::Impl::Session::UploadBody final : public control::ByteSource {
  public:
    explicit UploadBody(Session& session) : session_(session), parser_(std::move(*session.head_)) {
        parser_.body_limit(kNoBodyLimit);
    }

    Result<size_t> read_some(MutableBytes into) override {
        if (session_.expects_continue_) {
            const ErrorCodeOfBoost code = session_.wait([&](const auto& done) {
                session_.send_continue(
                    [done = done](ErrorCodeOfBoost failed) mutable { done(failed); });
            });
            if (code) {
                return std::unexpected(session_.stream_error(code, "upload"));
            }
        }
        while (!parser_.is_done()) {
            auto& body = parser_.get().body();
            body.data = into.data();
            body.size = into.size();
            ErrorCodeOfBoost code = session_.wait([&](auto done) {
                http::async_read_some(session_.stream_, session_.buffer_, parser_, std::move(done));
            });
            if (code == http::error::need_buffer) {
                code = {};
            }
            if (code) {
                return std::unexpected(session_.stream_error(code, "upload"));
            }
            const size_t got = into.size() - body.size;
            if (got > 0) {
                return got;
            }
        }
        return size_t{0};
    }

  private:
    Session& session_;
    http::request_parser<http::buffer_body> parser_;
};

void HttpServer::Impl::Session::run_upload() {
    Response response;
    {
        control::SparseDecoder decoder(std::make_unique<UploadBody>(*this));
        request_.upload = &decoder;
        response = handle();
        request_.upload = nullptr;
    }
    finish_stream(std::make_shared<Response>(std::move(response)));
}

void HttpServer::Impl::session_closed(Session* session) {
    sessions.erase(session);
    const std::shared_ptr<Listener>& listener = session->listener();
    --listener->connections;
    if (!listener->accepting) {
        listener->accept();
    }
    check_all_closed();
}

void HttpServer::Impl::check_all_closed() {
    if (stopping && sessions.empty()) {
        const std::scoped_lock lock(idle_mutex);
        all_closed = true;
        idle.notify_all();
    }
}

void HttpServer::Impl::Listener::close_longest_idle(const Session* but) {
    Session* longest = nullptr;
    auto oldest = std::chrono::steady_clock::time_point::max();
    for (Session* session : server->sessions) {
        if (session == but || session->listener().get() != this) {
            continue;
        }
        if (const auto since = session->idle_since(); since && *since < oldest) {
            longest = session;
            oldest = *since;
        }
    }
    if (longest != nullptr) {
        longest->evict();
    }
}

void HttpServer::Impl::Listener::accept() {
    accepting = false;
    if (server->stopping || connections > max_connections) {
        return;  // The end of a session calls again.
    }
    accepting = true;
    acceptor.async_accept(
        [self = shared_from_this()](ErrorCodeOfBoost code, Stream::socket_type socket) {
            if (self->server->stopping) {
                return;
            }
            if (!code) {
                const auto session = std::make_shared<Session>(self, std::move(socket));
                self->server->sessions.insert(session.get());
                if (++self->connections > self->max_connections) {
                    self->close_longest_idle(session.get());
                }
                session->read_header();
                return self->accept();
            }
            // Out of descriptors, most likely: try again soon rather than spin.
            self->retry.expires_after(kAcceptRetry);
            self->retry.async_wait([self](ErrorCodeOfBoost cancelled) {
                if (!cancelled) {
                    self->accept();
                }
            });
        });
}

HttpServer::HttpServer(HttpServerOptions options) : impl_(std::make_shared<Impl>(options)) {
    impl_->io_thread = std::thread([impl = impl_.get()] { impl->io.run(); });
}

HttpServer::~HttpServer() {
    stop();
}

namespace {

/// Makes room for a socket at `path`.
Result<void> clear_stale_socket(const std::string& path) {
    struct stat status{};
    if (lstat(path.c_str(), &status) != 0) {
        if (errno == ENOENT) {
            return {};
        }
        return std::unexpected(Error::from_errno(errno, "control socket " + path));
    }
    if (!S_ISSOCK(status.st_mode)) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("control socket {}: a file that is no socket is there", path));
    }
    asio::io_context context;
    asio::local::stream_protocol::socket probe(context);
    ErrorCodeOfBoost code;
    code = probe.connect(asio::local::stream_protocol::endpoint(path), code);
    if (!code) {
        return fail(ErrorCode::kBusy,
                    fmt::format("control socket {}: another process answers there", path));
    }
    if (unlink(path.c_str()) != 0) {
        return std::unexpected(Error::from_errno(errno, "remove stale control socket " + path));
    }
    return {};
}

}  // namespace

Result<void> HttpServer::listen_unix(const std::string& path, const UnixListenOptions& options,
                                     RequestHandler& handler) {
    const std::string what = "control socket " + path;
    if (path.size() > 107) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{}: a socket's path has at most 107 bytes, this has {}", what,
                                path.size()));
    }
    STELLARIUM_TRY(clear_stale_socket(path));
    const auto listener =
        std::make_shared<Impl::Listener>(impl_, handler, impl_->options.max_connections);
    ErrorCodeOfBoost code;
    const asio::local::stream_protocol::endpoint endpoint(path);
    code = listener->acceptor.open(Protocol(AF_UNIX, 0), code);
    if (!code) {
        code = listener->acceptor.bind(Protocol::endpoint(endpoint), code);
    }
    if (code) {
        return std::unexpected(Error::from_errno(code.value(), what));
    }
    // Nobody can connect before listen(), so the mode is right from the first moment.
    listener->socket_path = path;
    if (options.group && chown(path.c_str(), static_cast<uid_t>(-1), *options.group) != 0) {
        const int failed = errno;
        listener->close();
        return std::unexpected(Error::from_errno(failed, "give " + what + " to its group"));
    }
    if (chmod(path.c_str(), options.group ? 0660 : 0600) != 0) {
        const int failed = errno;
        listener->close();
        return std::unexpected(Error::from_errno(failed, "set the mode of " + what));
    }
    code = listener->acceptor.listen(asio::socket_base::max_listen_connections, code);
    if (code) {
        listener->close();
        return std::unexpected(Error::from_errno(code.value(), what));
    }
    impl_->on_io_thread([&] {
        impl_->listeners.push_back(listener);
        listener->accept();
    });
    return {};
}

Result<std::pair<std::string, uint16_t>> parse_host_port(const std::string& address) {
    const size_t colon = address.rfind(':');
    uint16_t port = 0;
    const char* const end = address.data() + address.size();
    if (colon != std::string::npos && colon > 0 && colon + 1 < address.size()) {
        const auto [stop, code] = std::from_chars(address.data() + colon + 1, end, port);
        std::string host = address.substr(0, colon);
        if (host.starts_with('[') && host.ends_with(']')) {
            host = host.substr(1, host.size() - 2);
        } else if (host.find(':') != std::string::npos) {
            host.clear();
        }
        ErrorCodeOfBoost wrong;
        host = host == "localhost" ? "127.0.0.1" : host;
        asio::ip::make_address(host, wrong);
        if (code == std::errc() && stop == end && !host.empty() && !wrong) {
            return std::pair{host, port};
        }
    }
    return fail(ErrorCode::kInvalidArgument,
                fmt::format("'{}' is not an address to listen on (write IP:PORT, for example "
                            "127.0.0.1:9464, localhost:9464 or [::1]:9464)",
                            address));
}

Result<uint16_t> HttpServer::listen_tcp(const std::string& address, RequestHandler& handler) {
    STELLARIUM_ASSIGN(const auto host_port, parse_host_port(address));
    ErrorCodeOfBoost code;
    const asio::ip::address ip = asio::ip::make_address(host_port.first, code);
    const asio::ip::tcp::endpoint endpoint(ip, host_port.second);
    const auto listener =
        std::make_shared<Impl::Listener>(impl_, handler, impl_->options.max_tcp_connections);
    code = listener->acceptor.open(Protocol(endpoint.protocol().family(), IPPROTO_TCP), code);
    if (!code) {
        code = listener->acceptor.set_option(asio::socket_base::reuse_address(true), code);
    }
    if (!code) {
        code = listener->acceptor.bind(Protocol::endpoint(endpoint), code);
    }
    if (!code) {
        code = listener->acceptor.listen(asio::socket_base::max_listen_connections, code);
    }
    if (code) {
        return std::unexpected(Error::from_errno(code.value(), "listen on " + address));
    }
    const auto bound = listener->acceptor.local_endpoint(code);
    sockaddr_storage storage{};
    std::memcpy(&storage, bound.data(), std::min(bound.size(), sizeof storage));
    in_port_t port_be = 0;
    if (storage.ss_family == AF_INET6) {
        sockaddr_in6 v6{};
        std::memcpy(&v6, &storage, sizeof v6);
        port_be = v6.sin6_port;
    } else {
        sockaddr_in v4{};
        std::memcpy(&v4, &storage, sizeof v4);
        port_be = v4.sin_port;
    }
    impl_->on_io_thread([&] {
        impl_->listeners.push_back(listener);
        listener->accept();
    });
    return ntohs(port_be);
}

void HttpServer::stop() {
    if (!impl_->io_thread.joinable()) {
        return;
    }
    impl_->on_io_thread([&] {
        impl_->stopping = true;
        for (const auto& listener : impl_->listeners) {
            listener->close();
        }
        const std::set<Impl::Session*> sessions = impl_->sessions;
        for (Impl::Session* session : sessions) {
            session->stop();
        }
        impl_->check_all_closed();
    });
    {
        std::unique_lock lock(impl_->idle_mutex);
        impl_->idle.wait(lock, [&] { return impl_->all_closed; });
    }
    impl_->workers.join();
    impl_->streams.join();
    impl_->on_io_thread([&] { impl_->listeners.clear(); });
    impl_->work.reset();
    impl_->io_thread.join();
}

}  // namespace stellarium::daemon
