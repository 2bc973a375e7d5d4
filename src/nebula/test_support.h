// Helpers that the store's tests share: made-up chunks, and short spellings of store calls.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/hash.h"
#include "io/io.h"
#include "nebula/store.h"

namespace stellarium::nebula::testing {

using ByteVector = std::vector<std::byte>;

/// A small reproducible generator (splitmix64).
class Sequence {
  public:
    explicit Sequence(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        state_ += 0x9E3779B97F4A7C15;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    /// Below `bound`, which is not 0.
    uint64_t below(uint64_t bound) { return next() % bound; }
    bool one_in(uint64_t n) { return below(n) == 0; }

  private:
    uint64_t state_;
};

/// Bytes that are a function of (seed, size) alone.
inline ByteVector make_bytes(uint64_t seed, size_t size) {
    Sequence sequence(seed);
    ByteVector bytes(size);
    for (size_t at = 0; at < size; at += sizeof(uint64_t)) {
        const uint64_t word = sequence.next();
        std::memcpy(bytes.data() + at, &word, std::min(sizeof(word), size - at));
    }
    return bytes;
}

struct Blob {
    ByteVector bytes;
    ChunkId id;
};

inline Blob make_blob(uint64_t seed, size_t size) {
    Blob blob{.bytes = make_bytes(seed, size), .id = {}};
    blob.id = hash(blob.bytes);
    return blob;
}

inline Blob make_chunk(uint64_t seed, uint32_t pages) {
    return make_blob(seed, pages * kPageBytes);
}

inline std::string text_of(Bytes bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Remembers what was replayed.
class RecordedReplay final : public ReplaySink {
  public:
    struct Record {
        uint64_t sequence;
        uint16_t kind;
        std::string payload;
    };
    Result<void> replay(uint64_t sequence, uint16_t kind, Bytes payload) override {
        records.push_back({sequence, kind, text_of(payload)});
        return {};
    }
    std::vector<Record> records;
};

/// Fails the test with the error's message.
template <typename T>
::testing::AssertionResult succeeded(const Result<T>& result) {
    if (result) {
        return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure()
           << error_mapping(result.error().code()).name << ": " << result.error().message();
}

#define ASSERT_OK(expression) ASSERT_TRUE(::stellarium::nebula::testing::succeeded(expression))
#define EXPECT_OK(expression) EXPECT_TRUE(::stellarium::nebula::testing::succeeded(expression))

/// A store open for use: created when missing, replayed into `replay`.
struct OpenStore {
    std::unique_ptr<Store> store;
    RecordedReplay replay;
};

inline Result<OpenStore> open_store(const io::Env& env, const std::string& directory,
                                    const StoreOptions& options = {}) {
    OpenStore out;
    STELLARIUM_ASSIGN(const bool there, env.files->exists(directory + "/superblock"));
    if (!there) {
        STELLARIUM_TRY(Store::create(env, directory, options));
    }
    STELLARIUM_ASSIGN(out.store, Store::open(env, directory, options));
    STELLARIUM_TRY(out.store->replay(out.replay));
    return out;
}

inline Result<ByteVector> read_chunk(Store& store, const ChunkId& id) {
    STELLARIUM_ASSIGN(const ChunkLocation location, store.resolve(id));
    ByteVector bytes(location.pages * kPageBytes);
    const iovec into{bytes.data(), bytes.size()};
    STELLARIUM_TRY(store.read(location.address, std::span(&into, 1), IoMode::kMayBlock));
    return bytes;
}

}  // namespace stellarium::nebula::testing
