// Saved states: their bytes against docs/formats/vm-state.md, and what is wrong with others.
#include "vm/state_file.h"

#include <gtest/gtest.h>

#include "base/hash.h"

namespace stellarium::vm {
namespace {

SavedState sample_state() {
    return {.config = {.memory_bytes = uint64_t{128} << 20,
                       .cpus = 2,
                       .accelerator = "tcg",
                       .kernel = "/boot/vmlinuz",
                       .initrd = "/boot/initrd",
                       .append = "console=ttyS0, quiet",
                       .nics = {"user"}},
            .disk_id = 17,
            .ram_id = 18,
            .devices = std::vector<std::byte>(5000, std::byte{3})};
}

TEST(StateFile, ComesBackAsItWas) {
    const SavedState state = sample_state();
    const auto bytes = encode(state);
    ASSERT_TRUE(bytes);
    EXPECT_EQ(bytes->size() % kStateHeaderBytes, 0U);
    EXPECT_EQ(state_bytes(*bytes).value_or(0), bytes->size());
    std::vector<std::byte> longer = *bytes;
    longer.resize(bytes->size() + 12'345, std::byte{9});  // Of an older state.
    const auto decoded = decode_state(longer);
    ASSERT_TRUE(decoded) << decoded.error().message();
    EXPECT_EQ(decoded->config, state.config);
    EXPECT_EQ(decoded->disk_id, 17U);
    EXPECT_EQ(decoded->ram_id, 18U);
    EXPECT_EQ(decoded->devices, state.devices);
}

TEST(StateFile, EveryChangedByteThatCountsIsFound) {
    const auto bytes = encode(sample_state());
    ASSERT_TRUE(bytes);
    constexpr size_t kStructBytes = 88;
    for (size_t at = 0; at < bytes->size(); at += at < kStructBytes ? 1 : 61) {
        if (at >= kStructBytes && at < kStateHeaderBytes) {
            continue;  // Nothing is there yet.
        }
        std::vector<std::byte> changed = *bytes;
        changed[at] ^= std::byte{0x10};
        const auto decoded = decode_state(changed);
        ASSERT_FALSE(decoded) << at;
        EXPECT_TRUE(decoded.error().code() == ErrorCode::kCorrupt ||
                    decoded.error().code() == ErrorCode::kUnsupported)
            << at << ": " << decoded.error().message();
    }
    for (size_t length = 0; length < bytes->size(); length += 511) {
        EXPECT_FALSE(decode_state(Bytes(*bytes).first(length))) << length;
    }
}

TEST(StateFile, ANewerFormatIsNamed) {
    auto bytes = encode(sample_state());
    ASSERT_TRUE(bytes);
    (*bytes)[8] = std::byte{9};
    const auto decoded = decode_state(*bytes);
    ASSERT_FALSE(decoded);
    EXPECT_EQ(decoded.error().code(), ErrorCode::kUnsupported);
}

TEST(StateFile, ImpossibleMachinesAreRefused) {
    for (const auto& [memory, cpus] : {std::pair<uint64_t, uint64_t>{1, 1},
                                       {uint64_t{128} << 20, 0},
                                       {uint64_t{128} << 20, 10'000},
                                       {(uint64_t{128} << 20) + 4096, 1}}) {
        MachineConfig config = sample_state().config;
        config.memory_bytes = memory;
        config.cpus = cpus;
        EXPECT_FALSE(config_from_json(to_json(config), "it")) << memory << " " << cpus;
    }
    EXPECT_EQ(config_from_json(to_json(sample_state().config), "it").value_or(MachineConfig()),
              sample_state().config);
}

}  // namespace
}  // namespace stellarium::vm
