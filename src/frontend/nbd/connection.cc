#include "frontend/nbd/connection.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
#include <fmt/format.h>

namespace stellarium::nbd {

namespace asio = boost::asio;
using ErrorCodeOfBoost = boost::system::error_code;

namespace {
/// Buffers that one call of the socket takes.
constexpr size_t kMaxGathered = 64;
}  // namespace

Shared::Shared(ExportSource& source_in, const ServerOptions& options_in)
    : source(source_in),
      options(options_in),
      control("nbd-control", {.threads = 1, .at_once = 1, .grows = true}),
      reading("nbd-read", {.threads = kReadingThreads, .at_once = kReadingThreadsPerExport}),
      // More at once of one export would only wait for the same space.
      writing("nbd-write", {.threads = 2, .at_once = 1, .grows = true}) {}

Buffer PieceBuffers::take() {
    if (kept_.empty()) {
        return std::make_unique_for_overwrite<std::byte[]>(kHeaderRoomBytes + kPieceBytes);
    }
    Buffer buffer = std::move(kept_.back());
    kept_.pop_back();
    return buffer;
}

void PieceBuffers::give(Buffer buffer) {
    if (kept_.size() < kRecycledPieces) {
        kept_.push_back(std::move(buffer));
    }
}

Connection::Connection(Shared& shared, std::shared_ptr<asio::io_context> io, PieceBuffers& pieces,
                       Socket socket, std::function<void(Connection&)> on_closed)
    : shared_(shared),
      io_(std::move(io)),
      pieces_(pieces),
      socket_(std::move(socket)),
      on_closed_(std::move(on_closed)),
      in_(std::make_unique_for_overwrite<std::byte[]>(kInputBytes)) {}

void Connection::start() {
    option_since_ = Clock::now();
    // Twice the usual, where the system lets us: fewer turns for a long answer.
    ErrorCodeOfBoost ignored;
    ignored = socket_.set_option(asio::socket_base::send_buffer_size(1 << 20), ignored);
    ignored = socket_.non_blocking(true, ignored);
    push(bytes_of(Greeting{}), false);
    process();
}

void Connection::stop() {
    if (phase_ != Phase::kTransmission) {
        return close();
    }
    draining_ = true;
    stop_at_ = Clock::now() + kDrainTimeout;
    forget_what_is_coming();
    process();
}

void Connection::check_time(Clock::time_point now) {
    if (closed_) {
        return;
    }
    // Once everything has come that a device was asked for, only the client is waited for.
    if (stop_at_ && now >= *stop_at_ && elsewhere_ == 0) {
        return close();
    }
    if (phase_ != Phase::kTransmission) {
        if (!option_under_way_ && now - option_since_ > shared_.options.handshake_timeout) {
            fault("it did not finish the handshake in time");
        }
        return;
    }
    if (writing_ && now - write_since_ > shared_.options.stall_timeout) {
        return fault("it takes no answers");
    }
    const bool in_the_middle = filling_.has_value() || skip_bytes_ > 0 || in_begin_ != in_end_;
    if (reading_ && in_the_middle && now - read_since_ > shared_.options.stall_timeout) {
        fault("it stopped in the middle of a request");
    }
}

// --- The socket ----------------------------------------------------------------------------------

/// Does what can be done with what has come, sends what is to be sent, and asks for more.
void Connection::process() {
    if (closed_ || processing_) {
        return finish_if_done();
    }
    processing_ = true;
    blocked_ = false;
    uint32_t steps = 0;
    uint64_t begun = 0;
    // A request that has come wholly is answered, whatever follows.
    while (!closed_ && !continues_ && (!draining_ || current_)) {
        const uint64_t before = current_ ? current_->begun_bytes : 0;
        const bool went_on = phase_ == Phase::kTransmission ? next_request() : next_option();
        if (!went_on) {
            break;
        }
        begun += current_ && current_->begun_bytes > before ? current_->begun_bytes - before
                                                            : uint64_t{kPreferredBlockBytes};
        if (++steps >= kTurnRequests || begun >= kTurnBytes) {
            continues_ = true;
            asio::post(*io_, [self = shared_from_this()] {
                self->continues_ = false;
                self->process();
            });
        }
    }
    processing_ = false;
    write();
    if (!continues_ && !blocked_) {
        read();
    }
    finish_if_done();
}

void Connection::read() {
    if (reading_ || closed_ || draining_) {
        return;
    }
    if (eof_) {
        // What was announced will not come; what came is answered.
        draining_ = true;
        stop_at_ = Clock::now() + shared_.options.stall_timeout;
        return forget_what_is_coming();
    }
    if (in_begin_ == in_end_) {
        in_begin_ = in_end_ = 0;
    } else if (in_begin_ > 0) {
        std::memmove(in_.get(), in_.get() + in_begin_, in_end_ - in_begin_);
        in_end_ -= in_begin_;
        in_begin_ = 0;
    }
    std::array<asio::mutable_buffer, 2> buffers;
    if (filling_) {
        buffers[0] = {filling_->bytes.get() + filling_->start + filled_bytes_,
                      filling_->size - filled_bytes_};
    }
    buffers[1] = {in_.get() + in_end_, kInputBytes - in_end_};
    reading_ = true;
    read_since_ = Clock::now();
    socket_.async_read_some(buffers,
                            [self = shared_from_this()](ErrorCodeOfBoost code, size_t bytes) {
                                self->reading_ = false;
                                // Whoever says no more may still want answers; if not, writing them
                                // fails.
                                self->eof_ = self->eof_ || code;
                                self->on_read(code ? 0 : bytes);
                            });
}

/// The rest of a request that is still coming in will not be waited for.
void Connection::forget_what_is_coming() {
    if (current_ && (skip_bytes_ > 0 || current_->command == kCmdWrite)) {
        current_.reset();
    }
}

void Connection::on_read(size_t bytes) {
    if (filling_) {
        const size_t taken = std::min(bytes, filling_->size - filled_bytes_);
        filled_bytes_ += taken;
        bytes -= taken;
    }
    in_end_ += bytes;
    process();
}

void Connection::write() {
    if (writing_ || closed_ || out_.empty()) {
        return;
    }
    std::vector<asio::const_buffer> buffers;
    buffers.reserve(std::min(out_.size(), kMaxGathered));
    for (const Chunk& chunk : out_) {
        if (buffers.size() == kMaxGathered) {
            break;
        }
        buffers.emplace_back(chunk.bytes.get() + chunk.start, chunk.size);
    }
    writing_ = true;
    write_since_ = Clock::now();
    socket_.async_write_some(buffers,
                             [self = shared_from_this()](ErrorCodeOfBoost code, size_t bytes) {
                                 self->writing_ = false;
                                 if (code) {
                                     return self->close();
                                 }
                                 self->on_written(bytes);
                             });
}

void Connection::on_written(size_t bytes) {
    while (bytes > 0 && !out_.empty()) {
        Chunk& first = out_.front();
        const size_t sent = std::min(bytes, first.size);
        first.start += sent;
        first.size -= sent;
        bytes -= sent;
        if (first.size == 0) {
            release(first);
            out_.pop_front();
        }
    }
    process();
}

void Connection::release(Chunk& chunk) {
    give(chunk.held);
    if (chunk.ends_request) {
        --in_flight_;
    }
    if (chunk.recycle) {
        pieces_.give(std::move(chunk.bytes));
    }
}

void Connection::push(Chunk chunk) {
    if (!closed_) {
        out_.push_back(std::move(chunk));
        return;
    }
    release(chunk);
}

void Connection::push(Bytes bytes, bool ends_request) {
    Chunk chunk;
    chunk.bytes = std::make_unique_for_overwrite<std::byte[]>(bytes.size());
    chunk.size = bytes.size();
    chunk.ends_request = ends_request;
    std::memcpy(chunk.bytes.get(), bytes.data(), bytes.size());
    push(std::move(chunk));
}

uint64_t Connection::cost_of(size_t data_bytes) {
    return kHeaderRoomBytes + (data_bytes > kInputBytes ? kPieceBytes : data_bytes);
}

/// Room for data and, before them, for a header. take() was asked for cost_of().
Connection::Chunk Connection::make_chunk(size_t data_bytes) {
    Chunk chunk;
    chunk.recycle = data_bytes > kInputBytes;
    chunk.bytes = chunk.recycle
                      ? pieces_.take()
                      : std::make_unique_for_overwrite<std::byte[]>(kHeaderRoomBytes + data_bytes);
    chunk.start = kHeaderRoomBytes;
    chunk.size = data_bytes;
    chunk.held = cost_of(data_bytes);
    return chunk;
}

bool Connection::take(uint64_t bytes) {
    blocked_ = !shared_.budget.take(held_, bytes);
    return !blocked_;
}

void Connection::fault(const std::string& reason) {
    if (closed_) {
        return;
    }
    shared_.forced_disconnects.fetch_add(1, std::memory_order_relaxed);
    shared_.log(name_, "an NBD client was disconnected: " + reason);
    close();
}

void Connection::close() {
    if (!closed_) {
        closed_ = true;
        ErrorCodeOfBoost ignored;
        ignored = socket_.close(ignored);
        current_.reset();
    }
    finish_if_done();
}

/// Once nothing is under way, an end that was wanted is made: what was lent goes back, and the
/// export is released where that may wait.
void Connection::finish_if_done() {
    if (draining_ && !closed_ && !current_ && elsewhere_ == 0 && out_.empty() && !writing_) {
        return close();
    }
    if (!closed_ || finished_ || processing_ || elsewhere_ > 0 || reading_ || writing_ ||
        continues_) {
        return;
    }
    finished_ = true;
    for (Chunk& chunk : out_) {
        release(chunk);
    }
    out_.clear();
    if (filling_) {
        release(*filling_);
        filling_.reset();
    }
    if (export_) {
        shared_.control.submit(control_turns_,
                               [released = std::move(export_)]() mutable { released.reset(); });
    }
    on_closed_(*this);
}

}  // namespace stellarium::nbd
