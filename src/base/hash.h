// BLAKE3-256: the identity of every chunk, tree node and object.
//
// `hash(bytes)` equals what the b3sum tool prints for the same bytes. `hash_many` hashes many
// inputs across SIMD lanes: a single 4 KiB page cannot fill the lanes of AVX2 or AVX-512 by
// itself, sixteen pages together can.
//
// Thread rule: all functions are pure; Hasher belongs to one thread at a time.
// Source: O'Connor et al., "BLAKE3: one function, fast everywhere" (2020), tree mode of section 2.
#pragma once

#include <array>
#include <compare>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/bytes.h"

namespace stellarium {

/// A BLAKE3-256 digest. As a ChunkId it names the plain content of a chunk or object.
struct Hash256 {
    std::array<uint8_t, 32> bytes{};

    friend auto operator<=>(const Hash256&, const Hash256&) = default;

    /// The first eight bytes as a little-endian integer: uniformly distributed, for hash tables.
    uint64_t prefix() const;
    /// 64 lower-case hexadecimal digits.
    std::string hex() const;
    /// The inverse of hex(); nullopt unless exactly 64 hexadecimal digits.
    static std::optional<Hash256> from_hex(std::string_view text);
};
static_assert(sizeof(Hash256) == 32 && alignof(Hash256) == 1);

using ChunkId = Hash256;

Hash256 hash(Bytes bytes);

/// out[i] = hash(inputs[i]). Inputs of equal size (a multiple of 1 KiB, at most 64 KiB) that stand
/// next to each other in the list are hashed together. out.size() must equal inputs.size().
void hash_many(std::span<const Bytes> inputs, std::span<Hash256> out);

/// Incremental hashing of a stream.
class Hasher {
  public:
    Hasher();
    ~Hasher();
    Hasher(Hasher&&) noexcept;
    Hasher& operator=(Hasher&&) noexcept;
    void update(Bytes bytes);
    Hash256 finish() const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

/// XXH3-64 of metadata, against torn and rotten headers only: never an identity.
uint64_t checksum64(Bytes bytes, uint64_t seed = 0);

struct Hash256Hasher {
    size_t operator()(const Hash256& h) const { return static_cast<size_t>(h.prefix()); }
};

}  // namespace stellarium
