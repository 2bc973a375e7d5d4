// Little-endian integers as byte arrays, and byte spans.
//
// A struct made only of these types has no padding and no alignment, so it is its own on-disk or
// wire format: copy it with std::memcpy or read it in place, on any host. Never cast a byte buffer
// to a struct with native integers.
//
//     struct Header { U32Le magic; U64Le sequence; };
//     static_assert(sizeof(Header) == 12);
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace stellarium {

using Bytes = std::span<const std::byte>;
using MutableBytes = std::span<std::byte>;

/// An unsigned integer of `Width` bytes in a given order, alignment 1.
template <typename Native, size_t Width, std::endian Order>
class Packed {
    static_assert(std::is_unsigned_v<Native> && Width <= sizeof(Native));

  public:
    constexpr Packed() = default;
    constexpr Packed(Native value) { set(value); }  // NOLINT(google-explicit-constructor)

    constexpr Native get() const {
        Native value = 0;
        for (size_t i = 0; i < Width; ++i) {
            value = static_cast<Native>(value | static_cast<Native>(Native{bytes_[i]} << shift(i)));
        }
        return value;
    }
    constexpr void set(Native value) {
        for (size_t i = 0; i < Width; ++i) {
            bytes_[i] = static_cast<uint8_t>(value >> shift(i));
        }
    }
    constexpr operator Native() const { return get(); }  // NOLINT(google-explicit-constructor)

  private:
    static constexpr size_t shift(size_t i) {
        return 8 * (Order == std::endian::little ? i : Width - 1 - i);
    }
    std::array<uint8_t, Width> bytes_{};
};
template <typename Native, size_t Width = sizeof(Native)>
using LittleEndian = Packed<Native, Width, std::endian::little>;
template <typename Native, size_t Width = sizeof(Native)>
using BigEndian = Packed<Native, Width, std::endian::big>;

using U8 = LittleEndian<uint8_t>;
using U16Le = LittleEndian<uint16_t>;
using U24Le = LittleEndian<uint32_t, 3>;
using U32Le = LittleEndian<uint32_t>;
using U40Le = LittleEndian<uint64_t, 5>;
using U64Le = LittleEndian<uint64_t>;
using U16Be = BigEndian<uint16_t>;
using U32Be = BigEndian<uint32_t>;
using U64Be = BigEndian<uint64_t>;
static_assert(sizeof(U24Le) == 3 && alignof(U24Le) == 1 && sizeof(U64Le) == 8);

/// The bytes of a trivially copyable value, for writing it out.
template <typename T>
Bytes bytes_of(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    return std::as_bytes(std::span<const T, 1>(&value, 1));
}

inline Bytes bytes_of(std::string_view text) {
    return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

inline void append_bytes(std::vector<std::byte>& out, Bytes bytes) {
    // Not by insert(): at -O3 GCC 12 takes its move of the old content for an overflow.
    const size_t old_size = out.size();
    out.resize(old_size + bytes.size());
    std::copy(bytes.begin(), bytes.end(), out.begin() + static_cast<ptrdiff_t>(old_size));
}

/// Reads a T from the front of `bytes`; the caller has checked that it is long enough.
template <typename T>
T load(Bytes bytes) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) == 1);
    T value;
    std::memcpy(&value, bytes.data(), sizeof(T));
    return value;
}

/// True when every byte is zero. Reads word-wise; any length and alignment.
bool all_zero(Bytes bytes);

}  // namespace stellarium
