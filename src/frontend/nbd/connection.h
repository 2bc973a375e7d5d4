// One client: its handshake, its requests, its answers.
//
// A request is done in pieces of at most kPieceBytes, each tried without waiting on the client's
// own thread, and done by the pool if that would wait. A piece of a READ becomes a chunk of the
// structured reply; without structured replies the pieces of a long READ go out one after the
// other, when all other answers are sent.
//
// Thread rule: everything on the thread of its loop, unless it says otherwise.
// Ownership: the loop has it until it is closed and nothing of it is under way; work in the pools
// holds it too.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>

#include "base/bytes.h"
#include "base/error.h"
#include "frontend/nbd/export.h"
#include "frontend/nbd/limits.h"
#include "frontend/nbd/memory_budget.h"
#include "frontend/nbd/options.h"
#include "frontend/nbd/protocol.h"
#include "frontend/nbd/server.h"
#include "frontend/nbd/turn_pool.h"

namespace stellarium::nbd {

using Buffer = std::unique_ptr<std::byte[]>;

/// What all clients share.
struct Shared {
    Shared(ExportSource& source_in, const ServerOptions& options_in);

    ExportSource& source;
    const ServerOptions& options;
    MemoryBudget budget;
    TurnPool control;  ///< Looking for exports, opening and releasing them.
    TurnPool reading;
    TurnPool writing;  ///< Also what looks at allocation, which may have to write first.

    struct Counters {
        std::atomic<uint64_t> requests{0};
        std::atomic<uint64_t> bytes{0};
        std::atomic<uint64_t> errors{0};
    };
    std::array<Counters, kCommandKinds> counters;
    std::atomic<uint64_t> connections{0};
    std::atomic<uint64_t> forced_disconnects{0};
    std::atomic<uint64_t> failures{0};  ///< Of devices, for the log.

    void log(std::string_view export_name, std::string_view message) const {
        if (options.logger) {
            options.logger(export_name, message);
        }
    }
};

/// Buffers of whole pieces, kept by a loop.
class PieceBuffers {
  public:
    Buffer take();
    void give(Buffer buffer);

  private:
    std::vector<Buffer> kept_;
};

class Connection : public std::enable_shared_from_this<Connection> {
  public:
    using Socket = boost::asio::basic_stream_socket<boost::asio::local::stream_protocol,
                                                    boost::asio::io_context::executor_type>;
    using Clock = std::chrono::steady_clock;

    /// `on_closed` is called once, when nothing of it is under way any more and its export was
    /// handed on to be released.
    Connection(Shared& shared, std::shared_ptr<boost::asio::io_context> io, PieceBuffers& pieces,
               Socket socket, std::function<void(Connection&)> on_closed);

    void start();
    /// Answers what was asked, and closes.
    void stop();
    /// Closes it if it has kept us waiting for too long.
    void check_time(Clock::time_point now);

  private:
    enum class Phase : uint8_t { kGreeting, kOptions, kTransmission };
    struct Request;
    /// A part of the output.
    struct Chunk {
        Buffer bytes;
        size_t start = 0;
        size_t size = 0;
        uint64_t held = 0;          ///< Of the budget.
        bool recycle = false;       ///< It is a whole piece's.
        bool ends_request = false;  ///< With it the request is answered.
    };

    // connection.cc: the socket.
    void process();
    void read();
    void on_read(size_t bytes);
    void forget_what_is_coming();
    void write();
    void on_written(size_t bytes);
    Bytes available() const { return {in_.get() + in_begin_, in_end_ - in_begin_}; }
    void consume(size_t bytes) { in_begin_ += bytes; }
    void push(Chunk chunk);
    void push(Bytes bytes, bool ends_request);
    void release(Chunk& chunk);
    static uint64_t cost_of(size_t data_bytes);
    Chunk make_chunk(size_t data_bytes);
    bool take(uint64_t bytes);
    void give(uint64_t bytes) { shared_.budget.give(held_, bytes); }
    void fault(const std::string& reason);
    void close();
    void finish_if_done();
    /// Runs `then(result of work())` on the loop's thread; `work` in the pool.
    template <typename Work, typename Then>
    void do_elsewhere(TurnPool& pool, const std::shared_ptr<TurnPool::Turns>& turns, Work work,
                      Then then);

    // handshake.cc
    bool next_option();
    void option(uint32_t option, Bytes payload);
    void answer(const std::vector<std::byte>& bytes);
    void refuse(uint32_t option, uint32_t type, std::string_view message);
    void list(std::string after);
    void info_or_go(uint32_t option, Bytes payload);
    void meta_context(uint32_t option, Bytes payload);
    void export_name(Bytes payload);
    void enter(std::shared_ptr<Export> opened, std::string name);

    // transmission.cc
    bool next_request();
    bool go_on();
    bool go_on_reading(const std::shared_ptr<Request>& request);
    bool go_on_writing(const std::shared_ptr<Request>& request);
    bool go_on_status(const std::shared_ptr<Request>& request);
    void begin(const std::shared_ptr<Request>& request);
    std::optional<std::pair<uint32_t, std::string>> objection(const Request& request) const;
    void start_range(const std::shared_ptr<Request>& request);
    void start_flush(const std::shared_ptr<Request>& request);
    void start_cache(const std::shared_ptr<Request>& request);
    void read_piece(const std::shared_ptr<Request>& request, uint64_t offset_bytes,
                    uint32_t length_bytes);
    void write_piece(const std::shared_ptr<Request>& request, uint64_t offset_bytes, Chunk data);
    void piece_read(const std::shared_ptr<Request>& request, uint64_t offset_bytes, Chunk chunk,
                    const Result<void>& result);
    void piece_done(const std::shared_ptr<Request>& request, const Result<void>& result);
    void fail_request(Request& request, const Error& error);
    void conclude(const std::shared_ptr<Request>& request);
    void reply(const std::shared_ptr<Request>& request);
    void reply_status(const std::shared_ptr<Request>& request,
                      const std::vector<StatusExtent>& extents);
    /// Makes an answer's piece of data ready, with its header.
    void push_data(const std::shared_ptr<Request>& request, uint64_t offset_bytes, Chunk chunk,
                   bool last);

    Shared& shared_;
    const std::shared_ptr<boost::asio::io_context> io_;
    PieceBuffers& pieces_;
    Socket socket_;
    std::function<void(Connection&)> on_closed_;
    const std::shared_ptr<TurnPool::Turns> control_turns_ = std::make_shared<TurnPool::Turns>();

    Phase phase_ = Phase::kGreeting;
    bool draining_ = false;  ///< Takes no more, answers the rest.
    bool closed_ = false;
    bool finished_ = false;
    bool blocked_ = false;  ///< Not for want of input.
    bool processing_ = false;
    bool continues_ = false;  ///< process() is posted.
    bool reading_ = false;
    bool writing_ = false;
    uint32_t elsewhere_ = 0;          ///< Work in pools, and flushes.
    bool eof_ = false;                ///< The client says no more.
    Clock::time_point option_since_;  ///< The next option is waited for.
    Clock::time_point read_since_;    ///< The present read of the socket.
    Clock::time_point write_since_;   ///< The present write to the socket.
    std::optional<Clock::time_point> stop_at_;

    // Input.
    Buffer in_;
    size_t in_begin_ = 0;
    size_t in_end_ = 0;
    uint64_t skip_bytes_ = 0;
    // Output.
    std::deque<Chunk> out_;
    uint64_t held_ = 0;

    // Handshake.
    bool no_zeroes_ = false;
    bool fixed_newstyle_ = false;
    bool structured_ = false;
    std::optional<std::string> context_export_;  ///< base:allocation was chosen for this one.
    bool option_under_way_ = false;
    std::optional<std::string> list_after_;  ///< The list goes on after this name.

    // Transmission.
    std::string name_;
    std::shared_ptr<Export> export_;
    bool read_only_ = false;
    bool has_context_ = false;
    uint32_t in_flight_ = 0;            ///< Requests whose last answer has not been sent.
    std::shared_ptr<Request> current_;  ///< Whose pieces are being begun.
    std::optional<Chunk> filling_;      ///< A piece of a WRITE that is coming in.
    size_t filled_bytes_ = 0;
};

struct Connection::Request {
    uint16_t command = 0;
    uint16_t flags = 0;
    U64Be cookie;
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
    uint64_t begun_bytes = 0;
    uint32_t pending = 0;  ///< Pieces begun and not done.
    bool all_begun = false;
    bool header_sent = false;  ///< Of a simple reply.
    uint32_t error = 0;        ///< The first one.
    std::string message;
};

/// The index of a command in ServerStatus::totals; nothing for those that are not counted.
std::optional<size_t> kind_of(uint16_t command);

}  // namespace stellarium::nbd
