// What the fuzz targets share: taking values off an input, and stopping where a promise is broken.
//
// A target is one function, LLVMFuzzerTestOneInput. With clang it is linked with libFuzzer (make
// fuzz); everywhere else with replay_main.cc, which runs the kept corpus and seeded mutations of it
// as an ordinary test. It may define add_seeds(), whose inputs are made of real structures.
//
// Thread rule: as libFuzzer has it: one input at a time.
//
//     Feed feed(data, size);
//     const auto pages = feed.below(16) + 1;            // An exhausted feed gives zeros.
//     require(decoded == again, "a batch that was decoded is encoded as the same bytes");
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace stellarium::fuzz {

using Input = std::vector<std::byte>;

/// Inputs made of real structures by today's encoders, for mutation and for the corpus. Defined by
/// targets that have such.
[[gnu::weak]] void add_seeds(std::vector<Input>& out);

/// Stops with a message unless `kept`: what follows would hide the defect.
inline void require(bool kept, std::string_view promise) {
    if (!kept) {
        std::fprintf(stderr, "fuzz target: broken promise: %.*s\n",
                     static_cast<int>(promise.size()), promise.data());
        std::abort();
    }
}

/// The value of a step that must not fail.
template <typename T>
T must(Result<T> result) {
    if (!result) {
        std::fprintf(stderr, "fuzz target: must not fail: %s\n",
                     std::string(result.error().message()).c_str());
        std::abort();
    }
    if constexpr (!std::is_void_v<T>) {
        return *std::move(result);
    }
}

/// Gives the input away from the front; zeros when there is nothing left.
class Feed {
  public:
    Feed(const uint8_t* data, size_t size) : left_(std::as_bytes(std::span(data, size))) {}

    bool empty() const { return left_.empty(); }
    Bytes rest() { return std::exchange(left_, {}); }
    /// At most `count` bytes.
    Bytes bytes(size_t count) {
        const Bytes front = left_.first(std::min(count, left_.size()));
        left_ = left_.subspan(front.size());
        return front;
    }
    /// Exactly `count` bytes, filled up with zeros.
    Input padded(size_t count) {
        const Bytes front = bytes(count);
        Input out(front.begin(), front.end());
        out.resize(count);
        return out;
    }
    uint8_t u8() { return number<uint8_t>(); }
    uint16_t u16() { return number<uint16_t>(); }
    uint32_t u32() { return number<uint32_t>(); }
    uint64_t u64() { return number<uint64_t>(); }
    /// 0 to limit - 1.
    uint32_t below(uint32_t limit) {
        return (limit <= 256 ? u8() : limit <= 65'536 ? u16() : u32()) % limit;
    }

  private:
    template <typename Number>
    Number number() {
        const Input bytes = padded(sizeof(Number));
        Number value{};
        std::memcpy(&value, bytes.data(), sizeof(value));
        return value;
    }

    Bytes left_;
};

inline void append(Input& out, Bytes bytes) {
    out.insert(out.end(), bytes.begin(), bytes.end());
}
inline void append_byte(Input& out, unsigned value) {
    out.push_back(static_cast<std::byte>(value));
}
template <typename Number>
void append_number(Input& out, Number value) {
    append(out, std::as_bytes(std::span(&value, 1)));
}

inline bool equal(Bytes a, Bytes b) {
    return std::ranges::equal(a, b);
}

}  // namespace stellarium::fuzz
