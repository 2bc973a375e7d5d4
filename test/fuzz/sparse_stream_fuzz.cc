// Sparse streams: what is decoded and encoded again is decoded as the same, and what comes out of a
// decoder keeps its promises whatever went in.
//
// Input: flags (1: checksums are made right); two numbers whose product is how many bytes are given
// at once; the stream.
#include <memory>
#include <string>

#include "base/hash.h"
#include "control/sparse_stream.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace control;  // NOLINT(google-build-using-namespace)

class BufferBytes final : public ByteSource {
  public:
    BufferBytes(Bytes bytes, size_t step) : bytes_(bytes), step_(step) {}
    Result<size_t> read_some(MutableBytes into) override {
        const size_t count = std::min({into.size(), bytes_.size(), step_});
        std::ranges::copy(bytes_.first(count), into.begin());
        bytes_ = bytes_.subspan(count);
        return count;
    }

  private:
    Bytes bytes_;
    size_t step_;
};

/// What a stream says, in memory.
struct Content {
    std::optional<uint64_t> hint;
    std::vector<std::pair<uint64_t, Input>> extents;
    uint64_t size_bytes = 0;
    std::string error;  ///< Why it ended early; empty: it did not.
    friend bool operator==(const Content&, const Content&) = default;
};

class ContentSource final : public SparseSource {
  public:
    explicit ContentSource(const Content& content) : content_(content) {}
    std::optional<uint64_t> size_hint() const override { return content_.hint; }
    uint64_t size_bytes() const override { return content_.size_bytes; }
    Result<std::optional<SparseExtent>> next() override {
        if (next_ == content_.extents.size()) {
            return std::nullopt;
        }
        const auto& [offset, data] = content_.extents[next_++];
        return SparseExtent{.offset_bytes = offset, .data = data};
    }

  private:
    const Content& content_;
    size_t next_ = 0;
};

Content decode(Bytes bytes, size_t step) {
    Content content;
    SparseDecoder decoder(std::make_unique<BufferBytes>(bytes, step));
    uint64_t end = 0;
    while (true) {
        const auto extent = decoder.next();
        if (!extent) {
            content.error = extent.error().message();
            require(!content.error.empty(), "a refusal says why");
            break;
        }
        if (!*extent) {
            content.size_bytes = decoder.size_bytes();
            require(content.size_bytes >= end && content.size_bytes <= kMaxSparseSize,
                    "content ends within its size");
            break;
        }
        require((*extent)->offset_bytes >= end && !(*extent)->data.empty() &&
                    (*extent)->data.size() <= kMaxFrameBytes,
                "extents ascend, and are not empty or long");
        end = (*extent)->offset_bytes + (*extent)->data.size();
        content.extents.emplace_back((*extent)->offset_bytes,
                                     Input((*extent)->data.begin(), (*extent)->data.end()));
    }
    content.hint = decoder.size_hint();
    return content;
}

Input encode(const Content& content) {
    ContentSource source(content);
    SparseEncoder encoder(source);
    Input out;
    for (auto pieces = encoder.next(); !pieces.empty(); pieces = encoder.next()) {
        for (const Bytes piece : pieces) {
            append(out, piece);
        }
    }
    require(!encoder.error(), "what was decoded is encoded");
    return out;
}

void fix_checksums(Input& stream) {
    if (stream.size() < sizeof(SparseStreamHeader)) {
        return;
    }
    const auto put = [&](size_t at, uint64_t sum) {
        const U64Le value(sum);
        std::memcpy(stream.data() + at, &value, sizeof(value));
    };
    constexpr size_t kSum = offsetof(SparseStreamHeader, checksum);
    put(kSum, checksum64(Bytes(stream).first(kSum)));
    for (size_t at = sizeof(SparseStreamHeader); at + sizeof(SparseFrameHeader) <= stream.size();) {
        constexpr size_t kFrameSum = offsetof(SparseFrameHeader, checksum);
        const size_t length =
            std::min<size_t>(load<SparseFrameHeader>(Bytes(stream).subspan(at)).length,
                             stream.size() - at - sizeof(SparseFrameHeader));
        put(at + kFrameSum,
            checksum64(Bytes(stream).subspan(at + sizeof(SparseFrameHeader), length),
                       checksum64(Bytes(stream).subspan(at, kFrameSum))));
        at += sizeof(SparseFrameHeader) + length;
    }
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    for (const unsigned flags : {0U, 1U}) {
        for (const bool hinted : {false, true}) {
            Content content;
            content.size_bytes = 1 << 20;
            content.hint = hinted ? std::optional(content.size_bytes) : std::nullopt;
            content.extents = {{0, Input(5, std::byte{1})}, {4096, Input(300, std::byte{2})}};
            Input input;
            append_byte(input, flags);
            append_number(input, uint16_t{0});
            append(input, encode(content));
            out.push_back(std::move(input));
        }
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    Feed feed(data, size);
    const bool fix = (feed.u8() & 1) != 0;
    const size_t step = size_t{feed.u8()} * feed.u8() + 1;
    const stellarium::Bytes given = feed.rest();
    Input stream(given.begin(), given.end());
    if (fix) {
        fix_checksums(stream);
    }
    const Content content = decode(stream, step);
    require(decode(stream, SIZE_MAX) == content, "how the bytes arrive makes no difference");
    if (content.error.empty()) {
        require(decode(encode(content), step) == content,
                "what was decoded and encoded is decoded as the same");
    }
    return 0;
}
