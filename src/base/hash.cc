#include "base/hash.h"

#include <algorithm>
#include <cassert>
#include <vector>

#include <blake3.h>
#include <xxhash.h>

// The packaged BLAKE3 sources expose the lane-parallel compression function only in their internal
// header, which is C and not clean under our warnings, so the one prototype is repeated here. The
// golden tests in hash_test.cc compare its results with the public interface.
extern "C" {
void blake3_hash_many(const uint8_t* const* inputs, size_t num_inputs, size_t blocks,
                      const uint32_t key[8], uint64_t counter, bool increment_counter,
                      uint8_t flags, uint8_t flags_start, uint8_t flags_end, uint8_t* out);
}

namespace stellarium {
namespace {

constexpr size_t kLeafBytes = 1024;  // BLAKE3 calls this a chunk; ours are larger.
constexpr size_t kBlockBytes = 64;
constexpr size_t kMaxBatchedBytes = size_t{64} << 10;
constexpr size_t kMaxLanes = 16;
constexpr uint8_t kChunkStart = 1 << 0;
constexpr uint8_t kChunkEnd = 1 << 1;
constexpr uint8_t kParent = 1 << 2;
constexpr uint8_t kRoot = 1 << 3;
constexpr std::array<uint32_t, 8> kIv{0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                      0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

/// Chaining values of one input, in order. Level by level, neighbours are joined into parents; an
/// odd last one moves up unchanged, which yields BLAKE3's left-balanced tree.
using ChainingValues = std::array<std::array<uint8_t, 32>, kMaxBatchedBytes / kLeafBytes>;

/// Hashes `count` inputs of `size` bytes each, lane-parallel at every level of their trees.
void hash_equal_sizes(std::span<const Bytes> inputs, size_t size, std::span<Hash256> out) {
    const size_t count = inputs.size();
    size_t nodes = size / kLeafBytes;
    std::vector<ChainingValues> cvs(count);
    std::array<const uint8_t*, kMaxLanes> lanes{};
    std::array<uint8_t, kMaxLanes * 32> results{};
    assert(count <= kMaxLanes && nodes >= 2);
    for (size_t leaf = 0; leaf < nodes; ++leaf) {
        for (size_t i = 0; i < count; ++i) {
            lanes[i] = reinterpret_cast<const uint8_t*>(inputs[i].data()) + leaf * kLeafBytes;
        }
        blake3_hash_many(lanes.data(), count, kLeafBytes / kBlockBytes, kIv.data(), leaf, false, 0,
                         kChunkStart, kChunkEnd, results.data());
        for (size_t i = 0; i < count; ++i) {
            std::memcpy(cvs[i][leaf].data(), results.data() + i * 32, 32);
        }
    }
    while (nodes > 1) {
        const uint8_t flags = nodes == 2 ? kParent | kRoot : kParent;
        const size_t pairs = nodes / 2;
        for (size_t pair = 0; pair < pairs; ++pair) {
            for (size_t i = 0; i < count; ++i) {
                lanes[i] = cvs[i][2 * pair].data();
            }
            blake3_hash_many(lanes.data(), count, 1, kIv.data(), 0, false, flags, 0, 0,
                             results.data());
            for (size_t i = 0; i < count; ++i) {
                std::memcpy(cvs[i][pair].data(), results.data() + i * 32, 32);
            }
        }
        if (nodes % 2 == 1) {
            for (size_t i = 0; i < count; ++i) {
                cvs[i][pairs] = cvs[i][nodes - 1];
            }
        }
        nodes = pairs + nodes % 2;
    }
    for (size_t i = 0; i < count; ++i) {
        std::memcpy(out[i].bytes.data(), cvs[i][0].data(), 32);
    }
}

bool can_batch(size_t size) {
    return size >= 2 * kLeafBytes && size <= kMaxBatchedBytes && size % kLeafBytes == 0;
}

}  // namespace

uint64_t Hash256::prefix() const {
    return load<U64Le>(std::as_bytes(std::span(bytes)));
}

std::string Hash256::hex() const {
    static constexpr std::string_view kDigits = "0123456789abcdef";
    std::string text;
    text.reserve(64);
    for (const uint8_t byte : bytes) {
        text += kDigits[byte >> 4];
        text += kDigits[byte & 15];
    }
    return text;
}

std::optional<Hash256> Hash256::from_hex(std::string_view text) {
    Hash256 result;
    if (text.size() != 64) {
        return std::nullopt;
    }
    for (size_t i = 0; i < 64; ++i) {
        const char c = text[i];
        unsigned digit = 0;
        if (c >= '0' && c <= '9') {
            digit = static_cast<unsigned>(c - '0');
        } else if (c >= 'a' && c <= 'f') {
            digit = static_cast<unsigned>(c - 'a') + 10;
        } else if (c >= 'A' && c <= 'F') {
            digit = static_cast<unsigned>(c - 'A') + 10;
        } else {
            return std::nullopt;
        }
        result.bytes[i / 2] = static_cast<uint8_t>(result.bytes[i / 2] << 4 | digit);
    }
    return result;
}

Hash256 hash(Bytes bytes) {
    Hash256 result;
    blake3_hasher hasher;
    blake3_hasher_init(&hasher);
    blake3_hasher_update(&hasher, bytes.data(), bytes.size());
    blake3_hasher_finalize(&hasher, result.bytes.data(), result.bytes.size());
    return result;
}

void hash_many(std::span<const Bytes> inputs, std::span<Hash256> out) {
    assert(inputs.size() == out.size());
    size_t i = 0;
    while (i < inputs.size()) {
        const size_t size = inputs[i].size();
        size_t run = 1;
        while (run < kMaxLanes && i + run < inputs.size() && inputs[i + run].size() == size) {
            ++run;
        }
        // From 16 KiB on a single input fills the lanes with its own leaves, without the copies.
        if (run > 1 && can_batch(size) && size < kMaxLanes * kLeafBytes) {
            hash_equal_sizes(inputs.subspan(i, run), size, out.subspan(i, run));
        } else {
            run = 1;
            out[i] = hash(inputs[i]);
        }
        i += run;
    }
}

struct Hasher::State {
    blake3_hasher hasher;
};

Hasher::Hasher() : state_(std::make_unique<State>()) {
    blake3_hasher_init(&state_->hasher);
}
Hasher::~Hasher() = default;
Hasher::Hasher(Hasher&&) noexcept = default;
Hasher& Hasher::operator=(Hasher&&) noexcept = default;

void Hasher::update(Bytes bytes) {
    blake3_hasher_update(&state_->hasher, bytes.data(), bytes.size());
}

Hash256 Hasher::finish() const {
    Hash256 result;
    blake3_hasher_finalize(&state_->hasher, result.bytes.data(), result.bytes.size());
    return result;
}

uint64_t checksum64(Bytes bytes, uint64_t seed) {
    return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

}  // namespace stellarium
