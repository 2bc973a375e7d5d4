// Requests and their answers.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "frontend/nbd/connection.h"
#include "frontend/nbd/elsewhere.h"

namespace stellarium::nbd {
namespace {

/// What kind_of() says of a READ.
constexpr size_t kReadKind = 0;

bool has_data_to_come(uint16_t command) {
    return command == kCmdWrite;
}

bool changes_something(uint16_t command) {
    return command == kCmdWrite || command == kCmdTrim || command == kCmdWriteZeroes;
}

/// Flags that a command may have. FUA goes with all of them: proto.md.
uint16_t flags_of(uint16_t command, bool structured) {
    switch (command) {
        case kCmdRead:
            return structured ? kCmdFlagFua | kCmdFlagDf : kCmdFlagFua;
        case kCmdWriteZeroes:
            return kCmdFlagFua | kCmdFlagNoHole;
        case kCmdBlockStatus:
            return kCmdFlagFua | kCmdFlagReqOne;
        default:
            return kCmdFlagFua;
    }
}

/// The extents of a range, as of `map`; at least one, and maybe not up to its end.
Result<std::vector<StatusExtent>> extents_of(AllocationMap& map, uint64_t offset_bytes,
                                             uint64_t length_bytes, size_t at_most) {
    std::vector<StatusExtent> extents;
    const uint64_t end = offset_bytes + length_bytes;
    const auto add = [&](uint64_t bytes, uint32_t flags) {
        if (bytes == 0 || at_most == 0) {
            return;
        }
        if (!extents.empty() && extents.back().flags == flags) {
            extents.back().length_bytes =
                static_cast<uint32_t>(extents.back().length_bytes + bytes);
        } else if (extents.size() < at_most) {
            extents.push_back({.length_bytes = static_cast<uint32_t>(bytes), .flags = flags});
        } else {
            at_most = 0;
        }
    };
    uint64_t position = offset_bytes;
    while (position < end && at_most > 0) {
        STELLARIUM_ASSIGN(const auto data, map.next_data(position));
        const uint64_t start = data ? std::clamp(data->first, position, end) : end;
        add(start - position, kStateHole | kStateZero);
        const uint64_t stop =
            data ? std::clamp(data->first + data->second, start, end) : uint64_t{end};
        add(stop - start, 0);
        position = stop;
    }
    return extents;
}

}  // namespace

std::string_view command_name(size_t kind) {
    constexpr std::array<std::string_view, kCommandKinds> kNames = {
        "read", "write", "flush", "trim", "cache", "write_zeroes", "block_status"};
    return kNames.at(kind);
}

std::optional<size_t> kind_of(uint16_t command) {
    switch (command) {
        case kCmdRead:
            return kReadKind;
        case kCmdWrite:
            return 1;
        case kCmdFlush:
            return 2;
        case kCmdTrim:
            return 3;
        case kCmdCache:
            return 4;
        case kCmdWriteZeroes:
            return 5;
        case kCmdBlockStatus:
            return 6;
        default:
            return std::nullopt;
    }
}

/// Takes the next request, or goes on with the one whose pieces are being begun. False when more
/// has to come from the client, or (then blocked_ is set) something has to be finished first.
bool Connection::next_request() {
    if (skip_bytes_ > 0) {
        const size_t skipped = std::min<uint64_t>(skip_bytes_, available().size());
        consume(skipped);
        skip_bytes_ -= skipped;
        if (skip_bytes_ > 0) {
            return false;
        }
        const std::shared_ptr<Request> request = std::exchange(current_, nullptr);
        request->all_begun = true;
        piece_done(request, {});
        return !closed_;
    }
    if (current_) {
        return go_on();
    }
    if (available().size() < sizeof(RequestHeader)) {
        return false;
    }
    if (in_flight_ >= kMaxClientRequests) {
        blocked_ = true;
        return false;
    }
    const auto header = load<RequestHeader>(available());
    if (header.magic != kRequestMagic) {
        fault("a request without its magic number");
        return false;
    }
    consume(sizeof(RequestHeader));
    if (header.command == kCmdDisconnect) {
        draining_ = true;
        stop_at_ = Clock::now() + shared_.options.stall_timeout;
        return false;
    }
    const auto request = std::make_shared<Request>();
    request->command = header.command;
    request->flags = header.flags;
    request->cookie = header.cookie;
    request->offset_bytes = header.offset_bytes;
    request->length_bytes = header.length_bytes;
    ++in_flight_;
    begin(request);
    return !closed_;
}

/// Why a request cannot be done, if so: the error and a sentence.
std::optional<std::pair<uint32_t, std::string>> Connection::objection(
    const Request& request) const {
    using Objection = std::pair<uint32_t, std::string>;
    const auto kind = kind_of(request.command);
    if (!kind) {
        return Objection(kErrInvalid, fmt::format("command {} is not known", request.command));
    }
    const uint16_t command = request.command;
    if ((request.flags & ~flags_of(command, structured_)) != 0) {
        return Objection(kErrInvalid, fmt::format("flags {:#x} do not go with a {}", request.flags,
                                                  command_name(*kind)));
    }
    if (command == kCmdFlush) {
        return std::nullopt;
    }
    if (command == kCmdBlockStatus && !has_context_) {
        return Objection(kErrInvalid, "base:allocation was not chosen");
    }
    if (changes_something(command) && read_only_) {
        return Objection(kErrPermission, "the export is read-only");
    }
    const uint64_t size = export_->device().size_bytes();
    if (request.offset_bytes > size || request.length_bytes > size - request.offset_bytes) {
        return Objection(
            command == kCmdWrite || command == kCmdWriteZeroes ? kErrNoSpace : kErrInvalid,
            fmt::format("{} bytes at {} go beyond the export's {}", request.length_bytes,
                        request.offset_bytes, size));
    }
    if (request.length_bytes == 0 || request.offset_bytes % kMinBlockBytes != 0 ||
        request.length_bytes % kMinBlockBytes != 0) {
        return Objection(kErrInvalid,
                         fmt::format("{} bytes at {}: requests are made of blocks of {} bytes",
                                     request.length_bytes, request.offset_bytes, kMinBlockBytes));
    }
    if ((command == kCmdRead || command == kCmdWrite) && request.length_bytes > kMaxTransferBytes) {
        return Objection(kErrInvalid, fmt::format("{} bytes at once; at most {} are possible",
                                                  request.length_bytes, kMaxTransferBytes));
    }
    if ((request.flags & kCmdFlagDf) != 0 && request.length_bytes > kMaxUnfragmentedBytes) {
        return Objection(kErrOverflow,
                         fmt::format("at most {} bytes come unfragmented", kMaxUnfragmentedBytes));
    }
    return std::nullopt;
}

void Connection::begin(const std::shared_ptr<Request>& request) {
    if (const auto kind = kind_of(request->command)) {
        shared_.counters[*kind].requests.fetch_add(1, std::memory_order_relaxed);
    }
    if (auto why = objection(*request)) {
        request->error = why->first;
        request->message = std::move(why->second);
        if (has_data_to_come(request->command) && request->length_bytes > 0) {
            request->pending = 1;
            skip_bytes_ = request->length_bytes;
            current_ = request;
            return;
        }
        request->all_begun = true;
        return conclude(request);
    }
    switch (request->command) {
        case kCmdRead:
        case kCmdWrite:
        case kCmdBlockStatus:
            current_ = request;
            return;
        case kCmdFlush:
            return start_flush(request);
        case kCmdCache:
            return start_cache(request);
        default:
            return start_range(request);
    }
}

bool Connection::go_on() {
    const std::shared_ptr<Request> request = current_;
    switch (request->command) {
        case kCmdRead:
            return go_on_reading(request);
        case kCmdWrite:
            return go_on_writing(request);
        default:
            return go_on_status(request);
    }
}

// --- Reading -------------------------------------------------------------------------------------

bool Connection::go_on_reading(const std::shared_ptr<Request>& request) {
    if (request->error != 0) {
        request->all_begun = true;
        current_.reset();
        if (request->pending == 0) {
            conclude(request);
        }
        return !closed_;
    }
    // A simple reply has one header, and then the data in order: a long one goes alone.
    if (!structured_ && request->length_bytes > kPieceBytes &&
        (request->pending > 0 || in_flight_ > 1)) {
        blocked_ = true;
        return false;
    }
    const auto piece = static_cast<uint32_t>(
        std::min<uint64_t>(kPieceBytes, request->length_bytes - request->begun_bytes));
    if (!take(cost_of(piece))) {
        return false;
    }
    const uint64_t offset = request->offset_bytes + request->begun_bytes;
    request->begun_bytes += piece;
    if (request->begun_bytes == request->length_bytes) {
        request->all_begun = true;
        current_.reset();
    }
    read_piece(request, offset, piece);
    return !closed_;
}

void Connection::read_piece(const std::shared_ptr<Request>& request, uint64_t offset_bytes,
                            uint32_t length_bytes) {
    ++request->pending;
    Chunk chunk = make_chunk(length_bytes);
    const auto read = [](Export& from, Chunk& into, uint64_t offset, IoMode mode) {
        const iovec data{.iov_base = into.bytes.get() + into.start, .iov_len = into.size};
        return from.device().read(offset, std::span(&data, 1), mode);
    };
    const Result<void> result = read(*export_, chunk, offset_bytes, IoMode::kNoWait);
    if (result || result.error().code() != ErrorCode::kWouldBlock) {
        return piece_read(request, offset_bytes, std::move(chunk), result);
    }
    struct Read {
        Chunk chunk;
        Result<void> result;
    };
    do_elsewhere(
        shared_.reading, export_->reading_turns,
        [read, from = export_.get(), chunk = std::move(chunk), offset_bytes]() mutable {
            const Result<void> done = read(*from, chunk, offset_bytes, IoMode::kMayBlock);
            return Read{.chunk = std::move(chunk), .result = done};
        },
        [this, request, offset_bytes](Read done) {
            piece_read(request, offset_bytes, std::move(done.chunk), done.result);
        });
}

void Connection::piece_read(const std::shared_ptr<Request>& request, uint64_t offset_bytes,
                            Chunk chunk, const Result<void>& result) {
    if (!result) {
        fail_request(*request, result.error());
    }
    const bool last = request->all_begun && request->pending == 1;
    if (closed_ || request->error != 0) {
        release(chunk);
        return piece_done(request, {});
    }
    push_data(request, offset_bytes, std::move(chunk), last);
    --request->pending;
    if (last) {
        shared_.counters[kReadKind].bytes.fetch_add(request->length_bytes,
                                                    std::memory_order_relaxed);
    }
}

void Connection::push_data(const std::shared_ptr<Request>& request, uint64_t offset_bytes,
                           Chunk chunk, bool last) {
    chunk.ends_request = last;
    const auto put_header = [&](const auto& header) {
        chunk.start -= sizeof(header);
        std::memcpy(chunk.bytes.get() + chunk.start, &header, sizeof(header));
    };
    if (structured_) {
        ChunkHeader header;
        header.flags = last ? kReplyFlagDone : uint16_t{0};
        header.cookie = request->cookie;
        const auto length = static_cast<uint32_t>(chunk.size);
        if (all_zero(Bytes(chunk.bytes.get() + chunk.start, chunk.size))) {
            header.type = kChunkOffsetHole;
            header.length_bytes = sizeof(HoleChunk) - sizeof(ChunkHeader);
            chunk.ends_request = false;
            release(chunk);
            return push(bytes_of(HoleChunk{
                            .header = header, .offset_bytes = offset_bytes, .hole_bytes = length}),
                        last);
        }
        header.type = kChunkOffsetData;
        header.length_bytes = length + sizeof(DataChunk) - sizeof(ChunkHeader);
        put_header(DataChunk{.header = header, .offset_bytes = offset_bytes});
        chunk.size += sizeof(DataChunk);
        return push(std::move(chunk));
    }
    if (!request->header_sent) {
        request->header_sent = true;
        put_header(SimpleReply{.error = 0, .cookie = request->cookie});
        chunk.size += sizeof(SimpleReply);
    }
    push(std::move(chunk));
}

// --- Writing -------------------------------------------------------------------------------------

bool Connection::go_on_writing(const std::shared_ptr<Request>& request) {
    const auto piece = static_cast<uint32_t>(
        std::min<uint64_t>(kPieceBytes, request->length_bytes - request->begun_bytes));
    const uint64_t offset = request->offset_bytes + request->begun_bytes;
    const auto begun = [&] {
        request->begun_bytes += piece;
        if (request->begun_bytes == request->length_bytes) {
            request->all_begun = true;
            current_.reset();
        }
    };
    if (request->error != 0 && !filling_) {
        // A piece has failed; nothing is gained by writing the others.
        ++request->pending;
        skip_bytes_ = request->length_bytes - request->begun_bytes;
        return true;
    }
    if (piece > kInputBytes) {
        if (!filling_) {
            if (!take(cost_of(piece))) {
                return false;
            }
            filling_ = make_chunk(piece);
            filled_bytes_ = 0;
        }
        const size_t copied = std::min<size_t>(available().size(), piece - filled_bytes_);
        std::memcpy(filling_->bytes.get() + filling_->start + filled_bytes_, available().data(),
                    copied);
        consume(copied);
        filled_bytes_ += copied;
        if (filled_bytes_ < piece) {
            return false;
        }
        Chunk data = *std::move(filling_);
        filling_.reset();
        begun();
        write_piece(request, offset, std::move(data));
        return !closed_;
    }
    if (available().size() < piece) {
        return false;
    }
    // Straight from where it came in, if the device takes it at once.
    const Bytes data = available().first(piece);
    const iovec from{.iov_base = in_.get() + in_begin_, .iov_len = piece};
    const Result<void> result =
        export_->device().write(offset, std::span(&from, 1), IoMode::kNoWait);
    if (!result && result.error().code() == ErrorCode::kWouldBlock) {
        if (!take(cost_of(piece))) {
            return false;
        }
        Chunk chunk = make_chunk(piece);
        std::memcpy(chunk.bytes.get() + chunk.start, data.data(), piece);
        consume(piece);
        begun();
        write_piece(request, offset, std::move(chunk));
        return !closed_;
    }
    consume(piece);
    begun();
    ++request->pending;
    piece_done(request, result);
    return !closed_;
}

void Connection::write_piece(const std::shared_ptr<Request>& request, uint64_t offset_bytes,
                             Chunk data) {
    ++request->pending;
    const auto write = [](Export& to, const Chunk& from, uint64_t offset, IoMode mode) {
        const iovec bytes{.iov_base = from.bytes.get() + from.start, .iov_len = from.size};
        return to.device().write(offset, std::span(&bytes, 1), mode);
    };
    const Result<void> result = write(*export_, data, offset_bytes, IoMode::kNoWait);
    if (result || result.error().code() != ErrorCode::kWouldBlock) {
        release(data);
        return piece_done(request, result);
    }
    struct Written {
        Chunk chunk;
        Result<void> result;
    };
    do_elsewhere(
        shared_.writing, export_->writing_turns,
        [write, to = export_.get(), data = std::move(data), offset_bytes]() mutable {
            const Result<void> done = write(*to, data, offset_bytes, IoMode::kMayBlock);
            return Written{.chunk = std::move(data), .result = done};
        },
        [this, request](Written done) {
            release(done.chunk);
            piece_done(request, done.result);
        });
}

void Connection::start_range(const std::shared_ptr<Request>& request) {
    request->pending = 1;
    request->all_begun = true;
    const auto change = [command = request->command, offset = request->offset_bytes,
                         length = request->length_bytes](Export& to, IoMode mode) {
        return command == kCmdTrim ? to.device().discard(offset, length, mode)
                                   : to.device().write_zeroes(offset, length, mode);
    };
    if (request->length_bytes <= kInlineRangeBytes) {
        const Result<void> result = change(*export_, IoMode::kNoWait);
        if (result || result.error().code() != ErrorCode::kWouldBlock) {
            return piece_done(request, result);
        }
    }
    do_elsewhere(
        shared_.writing, export_->writing_turns,
        [change, to = export_.get()] { return change(*to, IoMode::kMayBlock); },
        [this, request](const Result<void>& result) { piece_done(request, result); });
}

void Connection::start_flush(const std::shared_ptr<Request>& request) {
    ++elsewhere_;
    // Called from a thread of the device's, which may be the last to hold what posts.
    const auto done = [self = shared_from_this(), io = io_, request](Result<void> result) {
        boost::asio::post(*io, [self, request, result = std::move(result)] {
            --self->elsewhere_;
            if (!result) {
                self->fail_request(*request, result.error());
            }
            self->reply(request);
            self->process();
        });
    };
    export_->device().flush_async(done);
}

// --- Looking -------------------------------------------------------------------------------------

/// Reads and forgets, a step at a time, so that others have their turn.
void Connection::start_cache(const std::shared_ptr<Request>& request) {
    const uint64_t offset = request->offset_bytes + request->begun_bytes;
    const uint64_t step = std::min(kCacheStepBytes, request->length_bytes - request->begun_bytes);
    request->begun_bytes += step;
    request->pending = 1;
    request->all_begun = request->begun_bytes == request->length_bytes;
    do_elsewhere(
        shared_.reading, export_->reading_turns,
        [from = export_.get(), offset, step]() -> Result<void> {
            const auto scratch = std::make_unique_for_overwrite<std::byte[]>(kPieceBytes);
            for (uint64_t at = 0; at < step; at += kPieceBytes) {
                const iovec into{.iov_base = scratch.get(),
                                 .iov_len = std::min<uint64_t>(kPieceBytes, step - at)};
                STELLARIUM_TRY(
                    from->device().read(offset + at, std::span(&into, 1), IoMode::kMayBlock));
            }
            return {};
        },
        [this, request](const Result<void>& result) {
            if (result && !request->all_begun && !closed_ && !draining_) {
                return start_cache(request);
            }
            request->all_begun = true;
            piece_done(request, result);
        });
}

bool Connection::go_on_status(const std::shared_ptr<Request>& request) {
    constexpr uint64_t kAnswerBytes = kMaxStatusExtents * sizeof(StatusExtent);
    if (!take(kAnswerBytes)) {
        return false;
    }
    current_.reset();
    const size_t at_most = (request->flags & kCmdFlagReqOne) != 0 ? 1 : kMaxStatusExtents;
    do_elsewhere(
        shared_.writing, export_->writing_turns,
        [from = export_.get(), offset = request->offset_bytes, length = request->length_bytes,
         at_most]() -> Result<std::vector<StatusExtent>> {
            STELLARIUM_ASSIGN(const auto map, from->allocation());
            return extents_of(*map, offset, length, at_most);
        },
        [this, request](const Result<std::vector<StatusExtent>>& extents) {
            if (extents) {
                return reply_status(request, *extents);
            }
            give(kAnswerBytes);
            fail_request(*request, extents.error());
            reply(request);
        });
    return true;
}

void Connection::reply_status(const std::shared_ptr<Request>& request,
                              const std::vector<StatusExtent>& extents) {
    const size_t payload = extents.size() * sizeof(StatusExtent);
    Chunk chunk;
    chunk.size = sizeof(StatusChunk) + payload;
    chunk.bytes = std::make_unique_for_overwrite<std::byte[]>(chunk.size);
    chunk.held = kMaxStatusExtents * sizeof(StatusExtent);
    chunk.ends_request = true;
    const StatusChunk head{.header = {.flags = kReplyFlagDone,
                                      .type = kChunkBlockStatus,
                                      .cookie = request->cookie,
                                      .length_bytes = static_cast<uint32_t>(4 + payload)},
                           .context = kContextAllocationId};
    std::memcpy(chunk.bytes.get(), &head, sizeof(head));
    std::memcpy(chunk.bytes.get() + sizeof(head), extents.data(), payload);
    push(std::move(chunk));
}

// --- Answers -------------------------------------------------------------------------------------

void Connection::fail_request(Request& request, const Error& error) {
    // A client may repeat what fails as fast as it likes: log the 1st, 2nd, 4th, 8th, ...
    const uint64_t failures = shared_.failures.fetch_add(1, std::memory_order_relaxed) + 1;
    if (std::has_single_bit(failures)) {
        shared_.log(name_, fmt::format("{} of {} bytes at {} failed ({} failures so far): {}",
                                       command_name(kind_of(request.command).value_or(kReadKind)),
                                       request.length_bytes, request.offset_bytes, failures,
                                       error.message()));
    }
    if (request.error == 0) {
        request.error = wire_error_of(error);
        request.message = error.message();
    }
}

void Connection::piece_done(const std::shared_ptr<Request>& request, const Result<void>& result) {
    if (!result) {
        fail_request(*request, result.error());
    }
    if (--request->pending == 0 && request->all_begun) {
        conclude(request);
    }
}

/// Everything of the request is done, but for what FUA asks.
void Connection::conclude(const std::shared_ptr<Request>& request) {
    if (closed_) {
        return;
    }
    if (request->error == 0 && (request->flags & kCmdFlagFua) != 0 &&
        changes_something(request->command)) {
        return start_flush(request);
    }
    reply(request);
}

void Connection::reply(const std::shared_ptr<Request>& request) {
    if (const auto kind = kind_of(request->command)) {
        Shared::Counters& counters = shared_.counters[*kind];
        (request->error != 0 ? counters.errors : counters.bytes)
            .fetch_add(request->error != 0             ? 1
                       : request->command == kCmdFlush ? 0
                                                       : request->length_bytes,
                       std::memory_order_relaxed);
    }
    if (closed_) {
        return;
    }
    if (request->header_sent) {
        // Its success was announced already: there is no way to say that it failed.
        return fault("what it reads cannot be read: " + request->message);
    }
    if (!structured_ || request->error == 0) {
        return push(bytes_of(SimpleReply{.error = request->error, .cookie = request->cookie}),
                    true);
    }
    const std::string_view message = std::string_view(request->message).substr(0, kMaxMessageBytes);
    std::vector<std::byte> out;
    append_bytes(out, bytes_of(ErrorChunk{.header = {.flags = kReplyFlagDone,
                                                     .type = kChunkError,
                                                     .cookie = request->cookie,
                                                     .length_bytes = static_cast<uint32_t>(
                                                         sizeof(ErrorChunk) - sizeof(ChunkHeader) +
                                                         message.size())},
                                          .error = request->error,
                                          .message_bytes = static_cast<uint16_t>(message.size())}));
    append_bytes(out, bytes_of(message));
    push(out, true);
}

}  // namespace stellarium::nbd
