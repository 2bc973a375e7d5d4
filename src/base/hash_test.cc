#include "base/hash.h"

#include <random>
#include <vector>

#include <gtest/gtest.h>

namespace stellarium {
namespace {

TEST(Hash, MatchesTheReferenceVectors) {
    // From the BLAKE3 project's test_vectors.json: input bytes are i % 251.
    EXPECT_EQ(hash({}).hex(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    std::vector<std::byte> input(1);
    EXPECT_EQ(hash(input).hex(),
              "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213");
}

TEST(Hash, ManyEqualsOneByOneForEverySizeAndRun) {
    std::mt19937_64 random(7);
    std::vector<std::byte> data(64 * 65536);
    for (auto& byte : data) {
        byte = static_cast<std::byte>(random());
    }
    for (const size_t size : {1UL, 1024UL, 2048UL, 3072UL, 4096UL, 4097UL, 8192UL, 12288UL, 16384UL,
                              20480UL, 61440UL, 65536UL}) {
        for (const size_t count : {1UL, 2UL, 15UL, 16UL, 17UL, 40UL}) {
            std::vector<Bytes> inputs;
            for (size_t i = 0; i < count; ++i) {
                inputs.push_back(Bytes(data).subspan(i * 65536, size));
            }
            std::vector<Hash256> out(count);
            hash_many(inputs, out);
            for (size_t i = 0; i < count; ++i) {
                ASSERT_EQ(out[i], hash(inputs[i])) << "size " << size << " index " << i;
            }
        }
    }
}

TEST(Hash, HexRoundTripsAndRefusesOtherText) {
    const Hash256 h = hash(bytes_of("stellarium"));
    EXPECT_EQ(Hash256::from_hex(h.hex()), h);
    EXPECT_FALSE(Hash256::from_hex("").has_value());
    EXPECT_FALSE(Hash256::from_hex(h.hex() + "0").has_value());
    EXPECT_FALSE(Hash256::from_hex(std::string(63, '0') + "g").has_value());
}

TEST(Hash, StreamEqualsWhole) {
    const std::vector<std::byte> data(100'000, std::byte{7});
    Hasher hasher;
    hasher.update(Bytes(data).first(33'333));
    hasher.update(Bytes(data).subspan(33'333));
    EXPECT_EQ(hasher.finish(), hash(data));
}

}  // namespace
}  // namespace stellarium
