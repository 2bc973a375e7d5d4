// HTTP/1.1 over a unix socket, the client's side. Each exchange is a connection of its own:
// requests are few, and a broken one leaves nothing behind.
//
// An upload asks first (Expect: 100-continue), so that a name that is taken is told before any
// content is read. When the other side answers in the middle of an upload and closes, that answer
// is the result, not the broken pipe.
#include <algorithm>
#include <cerrno>
#include <limits>
#include <vector>

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <fmt/format.h>
#include <sys/socket.h>

#include "control/client.h"

namespace stellarium::control {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using UnixSocket = asio::local::stream_protocol::socket;

/// Not boost::none: Beast 1.74 takes every length to be above a limit that is not there.
constexpr uint64_t kNoBodyLimit = std::numeric_limits<uint64_t>::max();

/// The most that Beast reads at once.
constexpr size_t kReadBytes = 65536;

/// A list of 100,000 volumes is some 30 MB.
constexpr uint64_t kMaxAnswerBytes = uint64_t{1} << 30;

Error transport_error(const boost::system::error_code& code, std::string_view what) {
    if (code.category() == boost::system::system_category()) {
        return Error::from_errno(code.value(), what);
    }
    if (code == http::error::end_of_stream || code == http::error::partial_message ||
        code == asio::error::eof) {
        return {ErrorCode::kUnavailable,
                fmt::format("{}: the daemon closed the connection before it answered", what)};
    }
    return {ErrorCode::kProtocol, fmt::format("{}: {}", what, code.message())};
}

struct Connection {
    /// Beast reads as much as the buffer has room for, which would be 512 bytes at first.
    Connection() { buffer.reserve(kReadBytes); }

    asio::io_context context{1};
    UnixSocket socket{context};
    beast::flat_buffer buffer{size_t{2} << 20};
};

Result<void> check_peer(Connection& connection, const std::string& path,
                        std::span<const uid_t> trusted_users) {
    if (trusted_users.empty()) {
        return {};
    }
    ucred peer{};
    socklen_t length = sizeof peer;
    if (getsockopt(connection.socket.native_handle(), SOL_SOCKET, SO_PEERCRED, &peer, &length) !=
        0) {
        return std::unexpected(
            Error::from_errno(errno, "ask who listens at control socket " + path));
    }
    if (std::ranges::find(trusted_users, peer.uid) == trusted_users.end()) {
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("control socket {}: user {} listens there, who does not own the "
                                "store; name the socket with --socket if that is right",
                                path, peer.uid));
    }
    return {};
}

/// Only somebody of `trusted_users`, unless it is empty, may be at the other end. Asked of each
/// connection: the socket's file can be replaced between two of them.
Result<std::unique_ptr<Connection>> open_connection(const std::string& path,
                                                    std::span<const uid_t> trusted_users) {
    auto connection = std::make_unique<Connection>();
    boost::system::error_code code;
    const std::string what = fmt::format("control socket {}", path);
    if (path.size() > 107) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{}: a socket's path has at most 107 bytes", what));
    }
    code = connection->socket.connect(asio::local::stream_protocol::endpoint(path), code);
    if (!code) {
        STELLARIUM_TRY(check_peer(*connection, path, trusted_users));
        return connection;
    }
    if (code.value() == ENOENT || code.value() == ECONNREFUSED || code.value() == ENOTSOCK) {
        return fail(ErrorCode::kUnavailable,
                    fmt::format("{}: no daemon listens there ({})", what, code.message()));
    }
    return std::unexpected(transport_error(code, what));
}

/// The body of a download, as it comes.
class BodySource final : public ByteSource {
  public:
    BodySource(std::unique_ptr<Connection> connection,
               std::unique_ptr<http::response_parser<http::buffer_body>> parser)
        : connection_(std::move(connection)), parser_(std::move(parser)) {}

    Result<size_t> read_some(MutableBytes into) override {
        while (!parser_->is_done()) {
            auto& body = parser_->get().body();
            body.data = into.data();
            body.size = into.size();
            boost::system::error_code code;
            http::read_some(connection_->socket, connection_->buffer, *parser_, code);
            if (code == http::error::need_buffer) {
                code = {};
            }
            if (code) {
                return std::unexpected(transport_error(code, "download"));
            }
            const size_t got = into.size() - body.size;
            if (got > 0) {
                return got;
            }
        }
        return size_t{0};
    }

  private:
    std::unique_ptr<Connection> connection_;
    std::unique_ptr<http::response_parser<http::buffer_body>> parser_;
};

class UnixClient final : public ControlClient {
  public:
    UnixClient(std::string path, std::span<const uid_t> trusted_users)
        : path_(std::move(path)), trusted_users_(trusted_users.begin(), trusted_users.end()) {}

  protected:
    Result<Response> exchange(const Request& request) override {
        STELLARIUM_ASSIGN(std::unique_ptr<Connection> connection,
                          open_connection(path_, trusted_users_));
        if (request.upload != nullptr) {
            return exchange_upload(*connection, request);
        }
        http::request<http::string_body> message;
        prepare(message, request);
        message.body() = request.body;
        if (!request.body.empty()) {
            message.set(http::field::content_type, "application/json");
        }
        message.prepare_payload();
        boost::system::error_code code;
        http::write(connection->socket, message, code);
        if (code && code.value() != EPIPE) {
            return std::unexpected(transport_error(code, "control request"));
        }
        return read_answer(std::move(connection));
    }

  private:
    template <typename Message>
    static void prepare(Message& message, const Request& request) {
        message.version(11);
        message.method_string(request.method);
        message.target(request.target);
        message.set(http::field::host, "localhost");
        message.set(http::field::user_agent, "stellarctl");
        message.set(http::field::connection, "close");
    }

    static Result<Response> read_answer(std::unique_ptr<Connection> connection) {
        auto head = std::make_unique<http::response_parser<http::buffer_body>>();
        head->body_limit(kNoBodyLimit);
        boost::system::error_code code;
        http::read_header(connection->socket, connection->buffer, *head, code);
        if (code) {
            return std::unexpected(transport_error(code, "control answer"));
        }
        Response response;
        response.status = head->get().result_int();
        const auto type = head->get()[http::field::content_type];
        response.content_type.assign(type.data(), type.size());
        auto body = std::make_unique<BodySource>(std::move(connection), std::move(head));
        if (response.content_type == kSparseContentType) {
            auto decoder = std::make_unique<SparseDecoder>(std::move(body));
            STELLARIUM_TRY(decoder->read_header());
            response.download = std::move(decoder);
            return response;
        }
        std::vector<std::byte> piece(size_t{64} << 10);
        while (true) {
            STELLARIUM_ASSIGN(const size_t got, body->read_some(piece));
            if (got == 0) {
                return response;
            }
            response.body.append(reinterpret_cast<const char*>(piece.data()), got);
            if (response.body.size() > kMaxAnswerBytes) {
                return fail(ErrorCode::kProtocol, "the daemon's answer has no end");
            }
        }
    }

    static Result<Response> exchange_upload(Connection& connection, const Request& request) {
        http::request<http::empty_body> message;
        prepare(message, request);
        message.set(http::field::content_type, kSparseContentType);
        message.set(http::field::expect, "100-continue");
        message.chunked(true);
        http::request_serializer<http::empty_body> serializer(message);
        boost::system::error_code code;
        http::write_header(connection.socket, serializer, code);
        if (code && code.value() != EPIPE) {
            return std::unexpected(transport_error(code, "upload"));
        }
        STELLARIUM_ASSIGN(Response first, read_small(connection));
        if (first.status != 100) {
            return first;
        }
        SparseEncoder encoder(*request.upload);
        for (auto pieces = encoder.next(); !pieces.empty() && !code; pieces = encoder.next()) {
            std::vector<asio::const_buffer> buffers;
            for (const Bytes piece : pieces) {
                buffers.emplace_back(piece.data(), piece.size());
            }
            asio::write(connection.socket, http::make_chunk(buffers), code);
        }
        if (!code) {
            asio::write(connection.socket, http::make_chunk_last(), code);
        }
        Result<Response> answer = read_small(connection);
        if (answer) {
            return answer;
        }
        if (code) {
            return fail(
                ErrorCode::kUnavailable,
                fmt::format("the daemon stopped in the middle of the upload, so nothing was "
                            "taken over: begin again ({})",
                            code.message()));
        }
        return fail(
            answer.error().code(),
            fmt::format("all was uploaded, but whether it was taken over is not known: look "
                        "({})",
                        answer.error().message()));
    }

    static Result<Response> read_small(Connection& connection) {
        http::response_parser<http::string_body> parser;
        parser.body_limit(kMaxAnswerBytes);
        boost::system::error_code code;
        http::read(connection.socket, connection.buffer, parser, code);
        if (code) {
            return std::unexpected(transport_error(code, "control answer"));
        }
        Response response;
        response.status = parser.get().result_int();
        response.body = std::move(parser.get().body());
        return response;
    }

    std::string path_;
    std::vector<uid_t> trusted_users_;
};

}  // namespace

Result<std::unique_ptr<ControlClient>> connect_unix(const std::string& socket_path,
                                                    std::span<const uid_t> trusted_users) {
    // Proves that somebody listens; the connection itself is not kept.
    STELLARIUM_TRY(open_connection(socket_path, trusted_users));
    return std::make_unique<UnixClient>(socket_path, trusted_users);
}

}  // namespace stellarium::control
