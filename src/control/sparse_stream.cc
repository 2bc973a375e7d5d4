#include "control/sparse_stream.h"

#include <array>

#include <fmt/format.h>

#include "base/hash.h"
#include "control/json.h"

namespace stellarium::control {
namespace {

uint64_t header_checksum(const SparseStreamHeader& header) {
    return checksum64(bytes_of(header).first(offsetof(SparseStreamHeader, checksum)));
}

uint64_t frame_checksum(const SparseFrameHeader& header, Bytes payload) {
    const Bytes fields = bytes_of(header).first(offsetof(SparseFrameHeader, checksum));
    return checksum64(payload, checksum64(fields));
}

}  // namespace

std::span<const Bytes> SparseEncoder::emit(FrameType type, uint64_t offset, Bytes payload) {
    frame_header_.type = static_cast<uint32_t>(type);
    frame_header_.length = static_cast<uint32_t>(payload.size());
    frame_header_.offset = offset;
    frame_header_.checksum = frame_checksum(frame_header_, payload);
    pieces_.assign({bytes_of(frame_header_)});
    if (!payload.empty()) {
        pieces_.push_back(payload);
    }
    return pieces_;
}

std::span<const Bytes> SparseEncoder::next() {
    if (state_ == State::kDone) {
        return {};
    }
    if (state_ == State::kHeader) {
        state_ = State::kFrames;
        stream_header_.magic = kSparseMagic;
        stream_header_.version = kSparseVersion;
        stream_header_.reserved = 0;
        stream_header_.size_hint = source_.size_hint().value_or(kUnknownSize);
        stream_header_.checksum = header_checksum(stream_header_);
        pieces_.assign({bytes_of(stream_header_)});
        return pieces_;
    }
    if (!error_) {
        Result<std::optional<SparseExtent>> extent = source_.next();
        if (!extent) {
            error_ = extent.error();
        } else if (*extent) {
            return emit(FrameType::kData, (*extent)->offset_bytes, (*extent)->data);
        } else {
            state_ = State::kDone;
            return emit(FrameType::kEnd, source_.size_bytes(), {});
        }
    }
    state_ = State::kDone;
    error_text_ = to_text(error_to_json(*error_));
    if (error_text_.size() > kMaxErrorBytes) {
        error_text_ = to_text(error_to_json(Error(error_->code(), "(message too long)")));
    }
    return emit(FrameType::kError, 0, bytes_of(std::string_view(error_text_)));
}

std::unexpected<Error> SparseDecoder::malformed(std::string_view why) const {
    return fail(ErrorCode::kProtocol,
                fmt::format("sparse stream, frame at byte {}: {}", frame_offset_, why));
}

Result<void> SparseDecoder::read_exact(MutableBytes into) {
    while (!into.empty()) {
        STELLARIUM_ASSIGN(const size_t got, bytes_->read_some(into));
        if (got == 0) {
            return malformed("the stream ends before its end frame; the sender was interrupted");
        }
        stream_offset_ += got;
        into = into.subspan(got);
    }
    return {};
}

Result<void> SparseDecoder::read_header() {
    if (header_read_) {
        return {};
    }
    SparseStreamHeader header;
    STELLARIUM_TRY(read_exact(std::as_writable_bytes(std::span(&header, 1))));
    if (header.magic != kSparseMagic) {
        return malformed("this is no Stellarium sparse stream (wrong magic)");
    }
    if (header.checksum != header_checksum(header)) {
        return malformed("the stream header's checksum is wrong");
    }
    if (header.version != kSparseVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("sparse stream of version {}; this program reads version {}",
                                header.version.get(), kSparseVersion));
    }
    if (header.reserved != 0) {
        return malformed("reserved bytes of the stream header are not zero");
    }
    if (header.size_hint != kUnknownSize) {
        if (header.size_hint > kMaxSparseSize) {
            return malformed("the size is beyond every limit");
        }
        size_hint_ = header.size_hint.get();
    }
    header_read_ = true;
    return {};
}

Result<std::optional<SparseExtent>> SparseDecoder::next() {
    STELLARIUM_TRY(read_header());
    frame_offset_ = stream_offset_;
    SparseFrameHeader header;
    STELLARIUM_TRY(read_exact(std::as_writable_bytes(std::span(&header, 1))));
    const uint32_t length = header.length;
    const uint64_t offset = header.offset;
    const auto type = static_cast<FrameType>(header.type.get());
    // The length is checked before anything of that length is allocated or read.
    const size_t most = type == FrameType::kData    ? kMaxFrameBytes
                        : type == FrameType::kError ? kMaxErrorBytes
                                                    : 0;
    if (type != FrameType::kData && type != FrameType::kEnd && type != FrameType::kError) {
        return malformed(fmt::format("unknown frame type {}", header.type.get()));
    }
    if (length > most) {
        return malformed(
            fmt::format("{} bytes in one frame, at most {} are allowed", length, most));
    }
    payload_.resize(std::max<size_t>(payload_.size(), length));
    const MutableBytes payload = MutableBytes(payload_).first(length);
    STELLARIUM_TRY(read_exact(payload));
    if (header.checksum != frame_checksum(header, payload)) {
        return malformed("the frame's checksum is wrong");
    }
    if (type == FrameType::kError) {
        const std::string text(reinterpret_cast<const char*>(payload.data()), payload.size());
        return std::unexpected(error_from_json(text, 0));
    }
    if (offset > kMaxSparseSize || offset < content_end_) {
        return malformed(
            fmt::format("offset {} is out of order or out of bounds; content ends at "
                        "{} so far",
                        offset, content_end_));
    }
    if (type == FrameType::kData) {
        if (length == 0) {
            return malformed("an empty data frame");
        }
        content_end_ = offset + length;
        return SparseExtent{offset, payload};
    }
    if (size_hint_ && *size_hint_ != offset) {
        return malformed(fmt::format("the end frame says {} bytes, the stream's header said {}",
                                     offset, *size_hint_));
    }
    size_bytes_ = offset;
    std::array<std::byte, 1> extra{};
    STELLARIUM_ASSIGN(const size_t got, bytes_->read_some(extra));
    if (got != 0) {
        return malformed("bytes follow the end frame");
    }
    return std::nullopt;
}

}  // namespace stellarium::control
