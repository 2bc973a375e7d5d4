#include "vm/qmp.h"

#include <deque>

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/write.hpp>
#include <fmt/format.h>

namespace stellarium::vm {
namespace {

namespace asio = boost::asio;
using control::text_field;
using Clock = std::chrono::steady_clock;
using QmpError = boost::system::error_code;

/// An answer of QEMU; query-qmp-schema, which is not asked for, is the longest with 300 KiB.
constexpr size_t kMaxLineBytes = size_t{4} << 20;

}  // namespace

struct Qmp::Impl {
    explicit Impl(std::string path_in) : path(std::move(path_in)) {}

    std::string path;
    asio::io_context context{1};
    asio::local::stream_protocol::socket socket{context};
    std::string received;
    std::deque<Json> events;
    uint64_t next_id = 1;

    Error gone(const QmpError& code) const {
        return {ErrorCode::kUnavailable,
                fmt::format("QEMU at {} has gone away ({})", path, code.message())};
    }

    /// The next line; nullopt when it is not complete at the deadline. What came of it is kept.
    Result<std::optional<std::string>> read_line(Clock::time_point deadline) {
        bool done = false;
        QmpError outcome;
        size_t length = 0;
        asio::async_read_until(socket, asio::dynamic_buffer(received, kMaxLineBytes), '\n',
                               [&](const QmpError& code, size_t bytes) {
                                   done = true;
                                   outcome = code;
                                   length = bytes;
                               });
        context.restart();
        context.run_until(deadline);
        if (!done) {
            QmpError ignored;
            ignored = socket.cancel(ignored);
            context.run();
        }
        if (outcome == asio::error::operation_aborted) {
            return std::nullopt;
        }
        if (outcome == asio::error::not_found) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("QEMU at {} sends a line without end", path));
        }
        if (outcome) {
            return std::unexpected(gone(outcome));
        }
        std::string line = received.substr(0, length);
        received.erase(0, length);
        return line;
    }

    Result<std::optional<Json>> read_message(Clock::time_point deadline) {
        STELLARIUM_ASSIGN(const std::optional<std::string> line, read_line(deadline));
        if (!line) {
            return std::nullopt;
        }
        const Result<Json> message = control::parse_json(*line, "QEMU's answer");
        if (!message || !message->is_object()) {
            return fail(ErrorCode::kProtocol, fmt::format("{} does not speak QMP", path));
        }
        return *message;
    }

    Result<Json> answer_of(uint64_t id, std::string_view command, Clock::time_point deadline) {
        while (true) {
            STELLARIUM_ASSIGN(std::optional<Json> message, read_message(deadline));
            if (!message) {
                return fail(ErrorCode::kBusy,
                            fmt::format("QEMU at {} does not answer '{}'", path, command));
            }
            if (message->contains("event")) {
                events.push_back(*std::move(message));
                continue;
            }
            const auto found = message->find("id");
            if (found == message->end() || *found != id) {
                continue;  // Of a command that was given up.
            }
            if (const auto error = message->find("error"); error != message->end()) {
                const bool unknown = text_field(*error, "class") == "CommandNotFound";
                return fail(
                    unknown ? ErrorCode::kUnsupported : ErrorCode::kIo,
                    fmt::format("QEMU refuses '{}': {}", command, text_field(*error, "desc")));
            }
            return message->value("return", Json::object());
        }
    }
};

Qmp::Qmp(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Qmp::~Qmp() = default;

Result<std::unique_ptr<Qmp>> Qmp::connect(const std::string& path,
                                          std::chrono::milliseconds timeout) {
    const Clock::time_point deadline = Clock::now() + timeout;
    auto impl = std::make_unique<Impl>(path);
    QmpError code;
    code = impl->socket.connect(asio::local::stream_protocol::endpoint(path), code);
    if (code) {
        return fail(ErrorCode::kUnavailable,
                    fmt::format("no QEMU listens at {} ({})", path, code.message()));
    }
    STELLARIUM_ASSIGN(const std::optional<Json> greeting, impl->read_message(deadline));
    if (!greeting) {
        return fail(ErrorCode::kBusy,
                    fmt::format("QEMU at {} does not greet: somebody else speaks with it", path));
    }
    if (!greeting->contains("QMP")) {
        return fail(ErrorCode::kProtocol, fmt::format("{} does not speak QMP", path));
    }
    std::unique_ptr<Qmp> qmp(new Qmp(std::move(impl)));
    STELLARIUM_TRY(qmp->execute("qmp_capabilities"));
    return qmp;
}

Result<Json> Qmp::execute(std::string_view command, const Json& arguments,
                          std::chrono::milliseconds timeout) {
    const uint64_t id = impl_->next_id++;
    const std::string line =
        control::to_text(Json{{"execute", command}, {"arguments", arguments}, {"id", id}}) + "\n";
    QmpError code;
    asio::write(impl_->socket, asio::buffer(line), code);
    if (code) {
        return std::unexpected(impl_->gone(code));
    }
    return impl_->answer_of(id, command, Clock::now() + timeout);
}

Result<std::optional<Json>> Qmp::next_event(std::chrono::milliseconds timeout) {
    const Clock::time_point deadline = Clock::now() + timeout;
    while (impl_->events.empty()) {
        STELLARIUM_ASSIGN(std::optional<Json> message, impl_->read_message(deadline));
        if (!message) {
            return std::nullopt;
        }
        if (message->contains("event")) {
            impl_->events.push_back(*std::move(message));
        }
    }
    Json event = std::move(impl_->events.front());
    impl_->events.pop_front();
    return event;
}

Result<std::string> run_state(Qmp& qmp) {
    STELLARIUM_ASSIGN(const Json status, qmp.execute("query-status"));
    std::string state = text_field(status, "status");
    if (state.empty()) {
        return fail(ErrorCode::kProtocol, "QEMU does not say whether it runs");
    }
    return state;
}

}  // namespace stellarium::vm
