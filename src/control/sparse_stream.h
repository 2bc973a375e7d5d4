// Disk content on the move: extents of data in ascending order, holes left out.
//
// A SparseSource is how content goes into an import and comes out of an export, inside one process
// or between two. Between two it travels as a framed byte stream (docs/formats/sparse-stream.md):
// SparseEncoder makes the bytes, SparseDecoder reads them and believes none of them unchecked.
//
//     while (true) {
//         STELLARIUM_ASSIGN(auto extent, source.next());
//         if (!extent) break;                        // size_bytes() is known now
//         use(extent->offset_bytes, extent->data);   // valid until the next call of next()
//     }
//
// Memory: both directions hold at most one frame (kMaxFrameBytes).
// Thread rule: one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <sys/uio.h>

#include "base/bytes.h"
#include "base/error.h"

namespace stellarium::control {

struct SparseExtent {
    uint64_t offset_bytes = 0;
    Bytes data;  ///< 1 to kMaxFrameBytes bytes, borrowed from the source until its next call.
};

inline constexpr size_t kMaxFrameBytes = size_t{1} << 20;

class SparseSource {
  public:
    virtual ~SparseSource() = default;
    /// The total size, when it is known before reading; sources of unknown length give nullopt.
    virtual std::optional<uint64_t> size_hint() const = 0;
    /// The next extent; offsets ascend and extents do not overlap. nullopt at the end. After the
    /// end or an error it is not called again.
    virtual Result<std::optional<SparseExtent>> next() = 0;
    /// The total size, holes at the end included. Valid after next() gave nullopt.
    virtual uint64_t size_bytes() const = 0;
};

/// Where a decoder gets its bytes: a socket's body, a buffer.
class ByteSource {
  public:
    virtual ~ByteSource() = default;
    /// Up to `into.size()` bytes (at least 1 unless at the end); 0 at the end.
    virtual Result<size_t> read_some(MutableBytes into) = 0;
};

// --- The format ---------------------------------------------------------------------------------

inline constexpr uint64_t kSparseMagic = 0x4d52545350534c53;  ///< "SLSPSTRM", little-endian.
inline constexpr uint32_t kSparseVersion = 1;
inline constexpr uint64_t kUnknownSize = ~uint64_t{0};
inline constexpr uint64_t kMaxSparseSize = uint64_t{1} << 62;
inline constexpr size_t kMaxErrorBytes = size_t{64} << 10;
inline constexpr const char* kSparseContentType = "application/x-stellarium-sparse";

struct SparseStreamHeader {
    U64Le magic;
    U32Le version;
    U32Le reserved;   ///< Zero.
    U64Le size_hint;  ///< Bytes, or kUnknownSize.
    U64Le checksum;   ///< checksum64 of the 24 bytes before.
};
static_assert(sizeof(SparseStreamHeader) == 32);

enum class FrameType : uint32_t {
    kData = 1,   ///< `length` bytes of content at `offset` follow.
    kEnd = 2,    ///< `offset` is the total size. Nothing follows.
    kError = 3,  ///< The sender gave up; `length` bytes of JSON say why. Nothing follows.
};

struct SparseFrameHeader {
    U32Le type;
    U32Le length;    ///< Bytes that follow this header.
    U64Le offset;    ///< Bytes.
    U64Le checksum;  ///< checksum64 of what follows, seeded with checksum64 of the 16 bytes before.
};
static_assert(sizeof(SparseFrameHeader) == 24);

/// Turns a source into the bytes of the stream, frame by frame.
class SparseEncoder {
  public:
    explicit SparseEncoder(SparseSource& source) : source_(source) {}

    /// The next pieces to send, in order; empty after the last. Valid until the next call. An error
    /// of the source becomes an error frame and then error().
    std::span<const Bytes> next();
    /// What stopped the source, once next() has given the error frame.
    const std::optional<Error>& error() const { return error_; }
    /// Makes the next frame an error frame.
    void abort(Error error) { error_ = std::move(error); }

  private:
    std::span<const Bytes> emit(FrameType type, uint64_t offset, Bytes payload);

    enum class State : uint8_t { kHeader, kFrames, kDone };
    SparseSource& source_;
    State state_ = State::kHeader;
    std::optional<Error> error_;
    SparseStreamHeader stream_header_;
    SparseFrameHeader frame_header_;
    std::string error_text_;
    std::vector<Bytes> pieces_;
};

/// Reads a stream. Errors: kProtocol for anything malformed, out of order, torn or damaged, naming
/// the byte of the stream; those of the byte source; and what an error frame carries.
class SparseDecoder final : public SparseSource {
  public:
    explicit SparseDecoder(std::unique_ptr<ByteSource> bytes) : bytes_(std::move(bytes)) {}

    /// Reads the stream's header, which size_hint() needs. next() does it when nobody did.
    Result<void> read_header();

    std::optional<uint64_t> size_hint() const override { return size_hint_; }
    Result<std::optional<SparseExtent>> next() override;
    uint64_t size_bytes() const override { return size_bytes_; }

  private:
    Result<void> read_exact(MutableBytes into);
    std::unexpected<Error> malformed(std::string_view why) const;

    std::unique_ptr<ByteSource> bytes_;
    std::vector<std::byte> payload_;
    uint64_t stream_offset_ = 0;  ///< Of the next byte to read.
    uint64_t frame_offset_ = 0;   ///< Where the current frame began, for messages.
    uint64_t content_end_ = 0;    ///< End of the last extent.
    uint64_t size_bytes_ = 0;
    std::optional<uint64_t> size_hint_;
    bool header_read_ = false;
};

}  // namespace stellarium::control
