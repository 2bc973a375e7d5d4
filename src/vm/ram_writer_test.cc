// RAM into a file: afterwards the file is the RAM, whatever it held, and only changes were written.
#include "vm/ram_writer.h"

#include <algorithm>
#include <random>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/test_scale.h"
#include "base/unique_fd.h"
#include "vm/files.h"

namespace stellarium::vm {
namespace {

constexpr uint64_t kPages = 3 * kPagesPerRamBlock + 17;
constexpr uint64_t kBytes = kPages * kGuestPageBytes;

using Ram = std::vector<std::vector<std::byte>>;

/// Of each page its bytes; zeros are zeros.
Ram blank_ram() {
    return Ram(kPages, std::vector<std::byte>(kGuestPageBytes));
}

UniqueFd ram_file() {
    UniqueFd file(memfd_create("ram", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    EXPECT_TRUE(file);
    EXPECT_EQ(ftruncate(file.get(), kBytes), 0);
    return file;
}

void expect_file(const UniqueFd& file, const Ram& ram) {
    std::vector<std::byte> content(kBytes);
    ASSERT_TRUE(read_at(file.get(), "ram", 0, content));
    for (uint64_t page = 0; page < kPages; ++page) {
        ASSERT_EQ(
            std::memcmp(content.data() + page * kGuestPageBytes, ram[page].data(), kGuestPageBytes),
            0)
            << "page " << page;
    }
}

Result<void> send(RamWriter& writer, const Ram& ram, uint64_t page) {
    const bool zero = std::ranges::all_of(ram[page], [](std::byte b) { return b == std::byte{0}; });
    return zero ? writer.zero_page(page) : writer.page(page, ram[page]);
}

TEST(RamWriter, WritesWhatDiffersAndNothingElse) {
    const UniqueFd file = ram_file();
    Ram ram = blank_ram();
    for (const uint64_t page : {uint64_t{0}, uint64_t{1}, uint64_t{2}, uint64_t{300}, kPages - 1}) {
        ram[page].assign(kGuestPageBytes, std::byte{7});
    }
    RamWriter first(file.get(), "ram", kBytes, {.empty = true});
    for (uint64_t page = 0; page < kPages; ++page) {
        ASSERT_TRUE(send(first, ram, page));
    }
    ASSERT_TRUE(first.finish());
    expect_file(file, ram);
    EXPECT_EQ(first.figures().changed_bytes, 5 * kGuestPageBytes);
    EXPECT_EQ(first.figures().writes, 3U) << "pages that lie together are one write";
    EXPECT_EQ(first.figures().pages, kPages);

    // The same again, but for one page, and one that is zeros now.
    ram[300][9] = std::byte{1};
    std::ranges::fill(ram[1], std::byte{0});
    RamWriter second(file.get(), "ram", kBytes, {.empty = false});
    for (uint64_t page = 0; page < kPages; ++page) {
        ASSERT_TRUE(send(second, ram, page));
    }
    ASSERT_TRUE(second.finish());
    expect_file(file, ram);
    EXPECT_EQ(second.figures().changed_bytes, kGuestPageBytes);
    EXPECT_EQ(second.figures().zeroed_bytes, kGuestPageBytes);
}

TEST(RamWriter, RandomRoundsOverWhateverWasThere) {
    const uint64_t seed = first_seed();
    for (uint64_t run = 0; run < scaled(30, 5); ++run) {
        SCOPED_TRACE(testing::Message() << "STELLARIUM_TEST_SEED=" << seed + run);
        std::mt19937_64 random(seed + run);
        const UniqueFd file = ram_file();
        // An attempt that was broken off left some pages of its own.
        for (uint64_t i = random() % 20; i > 0; --i) {
            const std::vector<std::byte> junk(kGuestPageBytes, std::byte{0x55});
            ASSERT_TRUE(write_at(file.get(), "ram", random() % kPages * kGuestPageBytes, junk));
        }
        Ram ram = blank_ram();
        RamWriter writer(file.get(), "ram", kBytes, {.empty = false});
        for (uint64_t page = 0; page < kPages; ++page) {
            if (random() % 3 == 0) {
                ram[page].assign(kGuestPageBytes, static_cast<std::byte>(random()));
            }
            ASSERT_TRUE(send(writer, ram, page));
        }
        for (uint64_t round = random() % 4; round > 0; --round) {
            for (uint64_t page = random() % 50; page < kPages; page += 1 + random() % 200) {
                ram[page].assign(kGuestPageBytes, static_cast<std::byte>(random() % 3));
                ASSERT_TRUE(send(writer, ram, page));
            }
        }
        ASSERT_TRUE(writer.finish());
        expect_file(file, ram);
    }
}

TEST(RamWriter, AFileThatCannotBeWrittenIsAnError) {
    const UniqueFd file = ram_file();
    ASSERT_EQ(fcntl(file.get(), F_ADD_SEALS, F_SEAL_WRITE), 0);
    RamWriter writer(file.get(), "the file", kBytes, {.empty = true});
    const std::vector<std::byte> data(kGuestPageBytes, std::byte{1});
    ASSERT_TRUE(writer.page(3, data)) << "it is written with its block";
    const Result<void> finished = writer.finish();
    ASSERT_FALSE(finished);
    EXPECT_NE(finished.error().message().find("the file at 12288"), std::string::npos)
        << finished.error().message();
}

}  // namespace
}  // namespace stellarium::vm
