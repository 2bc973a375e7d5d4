// The migration stream, made here as QEMU 7.2 makes it, cut at every place.
#include "vm/migration_stream.h"

#include <map>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "base/test_scale.h"

namespace stellarium::vm {
namespace {

constexpr uint64_t kRamBytes = 64 * kGuestPageBytes;

/// Remembers the last of each page; an empty one is zeros.
class PageMap final : public PageSink {
  public:
    Result<void> page(uint64_t number, Bytes data) override {
        pages[number].assign(data.begin(), data.end());
        return {};
    }
    Result<void> zero_page(uint64_t number) override {
        pages[number].clear();
        return {};
    }
    std::map<uint64_t, std::vector<std::byte>> pages;
};

/// Writes a stream, and beside it what should be left without the pages of "ram".
class StreamMaker {
  public:
    template <typename Native>
    void both(Native value) {
        put(stream, value);
        put(rest, value);
    }
    template <typename Native>
    void ours(Native value) {
        put(stream, value);
    }
    void both_name(const std::string& name) {
        both(static_cast<uint8_t>(name.size()));
        append(stream, name);
        append(rest, name);
    }
    void ours_name(const std::string& name) {
        ours(static_cast<uint8_t>(name.size()));
        append(stream, name);
    }
    void both_bytes(const std::string& text) {
        append(stream, text);
        append(rest, text);
    }

    void begin(uint64_t ram_bytes = kRamBytes) {
        both(uint32_t{0x5145564d});
        both(uint32_t{3});
        both(uint8_t{7});
        both(uint32_t{6});
        both_bytes("pc-q35");
        both(uint8_t{1});
        both(uint32_t{2});
        both_name("ram");
        both(uint32_t{0});
        both(uint32_t{4});
        both((ram_bytes + 2 * kGuestPageBytes) | 4);
        both_name("pc.bios");
        both(2 * kGuestPageBytes);
        both_name("ram");
        both(ram_bytes);
        end_ram();
    }
    void part(uint8_t type) {
        both(type);
        both(uint32_t{2});
    }
    void end_ram() {
        both(uint64_t{0x10});
        both(uint8_t{0x7e});
        both(uint32_t{2});
    }
    void page(uint64_t number, std::byte fill, bool continued) {
        ours(number * kGuestPageBytes | 8 | (continued ? 0x20U : 0U));
        if (!continued) {
            ours_name("ram");
        }
        stream.insert(stream.end(), kGuestPageBytes, fill);
    }
    void zero_page(uint64_t number, bool continued) {
        ours(number * kGuestPageBytes | 2 | (continued ? 0x20U : 0U));
        if (!continued) {
            ours_name("ram");
        }
        ours(uint8_t{0});
    }
    void firmware_page(uint64_t number) {
        both(number * kGuestPageBytes | 8);
        both_name("pc.bios");
        both_bytes(std::string(kGuestPageBytes, 'f'));
    }
    void devices() {
        both(uint8_t{4});
        both_bytes("devices, of which nothing is understood");
        both(uint8_t{0});
    }

    std::vector<std::byte> stream;
    std::vector<std::byte> rest;

  private:
    template <typename Native>
    static void put(std::vector<std::byte>& out, Native value) {
        for (size_t i = sizeof value; i-- > 0;) {
            out.push_back(static_cast<std::byte>(static_cast<uint64_t>(value) >> (8 * i)));
        }
    }
    static void append(std::vector<std::byte>& out, const std::string& text) {
        for (const char c : text) {
            out.push_back(static_cast<std::byte>(c));
        }
    }
};

StreamMaker sample() {
    StreamMaker maker;
    maker.begin();
    maker.part(2);
    maker.page(0, std::byte{1}, false);
    maker.zero_page(1, true);
    maker.page(5, std::byte{2}, true);
    maker.firmware_page(1);
    maker.page(63, std::byte{3}, false);
    maker.end_ram();
    maker.part(3);
    maker.page(5, std::byte{4}, false);
    maker.zero_page(0, true);
    maker.end_ram();
    maker.devices();
    return maker;
}

void expect_sample(const PageMap& pages) {
    const std::vector<std::byte> fours(kGuestPageBytes, std::byte{4});
    const std::vector<std::byte> threes(kGuestPageBytes, std::byte{3});
    EXPECT_EQ(pages.pages, (std::map<uint64_t, std::vector<std::byte>>{
                               {0, {}}, {1, {}}, {5, fours}, {63, threes}}));
}

/// The code of what goes wrong with this stream.
std::optional<ErrorCode> failure_of(Bytes stream) {
    PageMap pages;
    MigrationStream parser("ram", pages);
    if (const Result<void> fed = parser.feed(stream); !fed) {
        return fed.error().code();
    }
    const auto state = parser.finish();
    return state ? std::nullopt : std::optional(state.error().code());
}

TEST(MigrationStream, IsTakenApartWhereverItIsCut) {
    const StreamMaker maker = sample();
    for (const size_t piece :
         {size_t{1}, size_t{7}, size_t{4095}, size_t{4097}, size_t{20'000}, maker.stream.size()}) {
        PageMap pages;
        MigrationStream parser("ram", pages);
        for (size_t at = 0; at < maker.stream.size(); at += piece) {
            const Bytes rest = Bytes(maker.stream).subspan(at);
            ASSERT_TRUE(parser.feed(rest.first(std::min(piece, rest.size()))));
        }
        const auto state = parser.finish();
        ASSERT_TRUE(state) << state.error().message();
        EXPECT_EQ(*state, maker.rest) << "pieces of " << piece;
        EXPECT_EQ(parser.block_bytes(), kRamBytes);
        expect_sample(pages);
    }
}

TEST(MigrationStream, RandomRoundsInRandomPieces) {
    const uint64_t seed = first_seed();
    for (uint64_t run = 0; run < scaled(200, 20); ++run) {
        SCOPED_TRACE(testing::Message() << "STELLARIUM_TEST_SEED=" << seed + run);
        std::mt19937_64 random(seed + run);
        StreamMaker maker;
        std::map<uint64_t, std::vector<std::byte>> expected;
        maker.begin();
        const uint64_t rounds = 1 + random() % 4;
        bool continued = false;  // Also from one section to the next, as QEMU does it.
        for (uint64_t round = 0; round < rounds; ++round) {
            maker.part(round + 1 == rounds ? 3 : 2);
            for (uint64_t i = random() % 40; i > 0; --i) {
                const uint64_t number = random() % (kRamBytes / kGuestPageBytes);
                const auto fill = static_cast<std::byte>(1 + random() % 255);
                switch (random() % 3) {
                    case 0:
                        maker.page(number, fill, continued);
                        expected[number].assign(kGuestPageBytes, fill);
                        continued = true;
                        break;
                    case 1:
                        maker.zero_page(number, continued);
                        expected[number].clear();
                        continued = true;
                        break;
                    default:
                        maker.firmware_page(number % 2);
                        continued = false;
                }
            }
            maker.end_ram();
        }
        maker.devices();
        PageMap pages;
        MigrationStream parser("ram", pages);
        for (Bytes rest(maker.stream); !rest.empty();) {
            const size_t piece = std::min<size_t>(rest.size(), 1 + random() % 9000);
            ASSERT_TRUE(parser.feed(rest.first(piece)));
            rest = rest.subspan(piece);
        }
        const auto state = parser.finish();
        ASSERT_TRUE(state) << state.error().message();
        EXPECT_EQ(*state, maker.rest);
        EXPECT_EQ(pages.pages, expected);
    }
}

TEST(MigrationStream, EndsAfterItsRamOrNotAtAll) {
    const StreamMaker maker = sample();
    // The last part of RAM ends before the devices: everything from there on is a whole stream.
    const size_t devices = maker.stream.size() - 41;
    for (size_t length = 0; length < devices; length += 97) {
        EXPECT_EQ(failure_of(Bytes(maker.stream).first(length)), ErrorCode::kProtocol) << length;
    }
    EXPECT_FALSE(failure_of(maker.stream));
}

TEST(MigrationStream, RefusesWhatItDoesNotKnow) {
    const auto changed = [](auto change) {
        StreamMaker maker;
        maker.begin();
        maker.part(2);
        change(maker);
        maker.end_ram();
        maker.part(3);
        maker.end_ram();
        return failure_of(maker.stream);
    };
    EXPECT_FALSE(changed([](StreamMaker& maker) { maker.page(1, std::byte{1}, false); }));
    // Beyond the block, compressed records, a page of equal bytes.
    EXPECT_EQ(changed([](StreamMaker& maker) { maker.page(64, std::byte{1}, false); }),
              ErrorCode::kProtocol);
    EXPECT_EQ(changed([](StreamMaker& maker) { maker.ours(uint64_t{0x40}); }),
              ErrorCode::kUnsupported);
    EXPECT_EQ(changed([](StreamMaker& maker) {
                  maker.ours(uint64_t{2});
                  maker.ours_name("ram");
                  maker.ours(uint8_t{9});
              }),
              ErrorCode::kUnsupported);
    std::vector<std::byte> other = sample().stream;
    other[0] = std::byte{0};
    EXPECT_EQ(failure_of(other), ErrorCode::kProtocol);
    StreamMaker odd;
    odd.begin(kRamBytes + 512);
    EXPECT_EQ(failure_of(odd.stream), ErrorCode::kUnsupported);
}

TEST(MigrationStream, AnErrorOfTheSinkEndsIt) {
    class Full final : public PageSink {
        Result<void> page(uint64_t, Bytes) override { return fail(ErrorCode::kNoSpace, "full"); }
        Result<void> zero_page(uint64_t) override { return {}; }
    } full;
    MigrationStream parser("ram", full);
    const Result<void> fed = parser.feed(sample().stream);
    ASSERT_FALSE(fed);
    EXPECT_EQ(fed.error().code(), ErrorCode::kNoSpace);
}

}  // namespace
}  // namespace stellarium::vm
