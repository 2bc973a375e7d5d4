#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/budget.h"
#include "base/bytes.h"
#include "base/error.h"
#include "base/rate_limits.h"
#include "base/units.h"

namespace stellarium {
namespace {

TEST(Units, ParsesWhatPeopleWrite) {
    EXPECT_EQ(parse_size("0").value(), 0U);
    EXPECT_EQ(parse_size("512").value(), 512U);
    EXPECT_EQ(parse_size("10GiB").value(), 10 * kGiB);
    EXPECT_EQ(parse_size("10G").value(), 10 * kGiB);
    EXPECT_EQ(parse_size("10 gib").value(), 10 * kGiB);
    EXPECT_EQ(parse_size("4KB").value(), 4000U);
    EXPECT_EQ(parse_size("1.5KiB").value(), 1536U);
    EXPECT_EQ(parse_size("64TiB").value(), 64 * kTiB);
}

TEST(Units, ParsesTimes) {
    using std::chrono::seconds;
    EXPECT_EQ(parse_duration("0").value(), seconds(0));
    EXPECT_EQ(parse_duration("90s").value(), seconds(90));
    EXPECT_EQ(parse_duration("5m").value(), seconds(300));
    EXPECT_EQ(parse_duration("12h").value(), seconds(43'200));
    EXPECT_EQ(parse_duration("30d").value(), seconds(2'592'000));
    for (const char* wrong : {"", "d", "5", "-1d", "1.5d", "1w", "1 d", "99999999999d",
                              "99999999999999999999s", "1dd"}) {
        EXPECT_FALSE(parse_duration(wrong)) << wrong;
    }
}

TEST(Units, RefusesTheRestWithAnExample) {
    for (const auto* text : {"", "GiB", "-1", "1.2.3K", "10XB", "99999999999999999999", "20000PiB",
                             "0.3", "1e3", "0x10", "nan", "1KiBB"}) {
        const auto result = parse_size(text);
        ASSERT_FALSE(result.has_value()) << text;
        EXPECT_EQ(result.error().code(), ErrorCode::kInvalidArgument);
        EXPECT_NE(result.error().message().find("64KiB"), std::string::npos);
    }
}

TEST(Units, FormatsThreeDigits) {
    EXPECT_EQ(format_size(0), "0 B");
    EXPECT_EQ(format_size(1023), "1023 B");
    EXPECT_EQ(format_size(1536), "1.50 KiB");
    EXPECT_EQ(format_size(10 * kGiB), "10.0 GiB");
    EXPECT_EQ(format_size(1024 * kKiB - 1), "1.00 MiB");
    EXPECT_EQ(format_size(~uint64_t{0}), "16.0 EiB");
}

TEST(RateLimits, AreCompletedToOneSecondsWorth) {
    const RateLimits limits = *completed({.iops = 500, .bandwidth_bytes = 20 * kMiB});
    EXPECT_EQ(limits.iops_burst, 500U);
    EXPECT_EQ(limits.bandwidth_burst_bytes, 20 * kMiB);
    EXPECT_EQ(format_rate_limits(limits),
              "500 requests/s (burst 500), 20.0 MiB/s (burst 20.0 MiB)");
    EXPECT_EQ(*completed(limits), limits);
    EXPECT_EQ(completed({.iops = 1000, .iops_burst = 10})->iops_burst, 10U);
    EXPECT_EQ(*completed({}), RateLimits{});
    EXPECT_FALSE(RateLimits{}.any());
    EXPECT_EQ(format_rate_limits({}), "");
    for (const RateLimits& widest :
         {RateLimits{.iops = kMaxIops, .iops_burst = kMaxIops * kMaxBurstSeconds},
          RateLimits{.bandwidth_bytes = kMaxBandwidthBytes,
                     .bandwidth_burst_bytes = kMaxBandwidthBytes * kMaxBurstSeconds},
          RateLimits{.iops = kMinIops, .bandwidth_bytes = kMinBandwidthBytes}}) {
        EXPECT_TRUE(completed(widest).has_value());
    }
}

TEST(RateLimits, OutOfBoundsAreRefusedWithTheBounds) {
    struct Case {
        RateLimits limits;
        const char* says;
    };
    for (const auto& [limits, says] :
         {Case{{.iops = kMaxIops + 1}, "from 1 to 100000000 a second"},
          Case{{.bandwidth_bytes = kMinBandwidthBytes - 1}, "from 4.00 KiB to 1.00 TiB a second"},
          Case{{.bandwidth_bytes = kMaxBandwidthBytes + 1}, "from 4.00 KiB to 1.00 TiB a second"},
          Case{{.iops_burst = 1}, "needs a limit of requests"},
          Case{{.iops = 5, .bandwidth_burst_bytes = kMiB}, "needs a limit of bandwidth"},
          Case{{.iops = 1001, .iops_burst = 10}, "from 11 to 3603600"},
          Case{{.iops = 10, .iops_burst = 36'001}, "from 1 to 36000"}}) {
        const Result<RateLimits> refused = completed(limits);
        ASSERT_FALSE(refused.has_value()) << says;
        EXPECT_EQ(refused.error().code(), ErrorCode::kInvalidArgument);
        EXPECT_NE(refused.error().message().find(says), std::string::npos)
            << refused.error().message();
    }
}

TEST(Bytes, LittleEndianIsByteExact) {
    const U32Le value = 0x01020304;
    EXPECT_EQ(bytes_of(value)[0], std::byte{4});
    EXPECT_EQ(bytes_of(value)[3], std::byte{1});
    EXPECT_EQ(load<U40Le>(bytes_of(U40Le{0xFF'1234'5678})).get(), 0xFF'1234'5678U);
}

TEST(Bytes, AllZeroSeesASingleBitAnywhere) {
    for (const size_t size : {0UL, 1UL, 15UL, 16UL, 17UL, 64UL, 4096UL}) {
        std::vector<std::byte> data(size);
        EXPECT_TRUE(all_zero(data));
        for (size_t i = 0; i < size; ++i) {
            data[i] = std::byte{0x80};
            EXPECT_FALSE(all_zero(data)) << size << " " << i;
            data[i] = std::byte{0};
        }
    }
}

TEST(Errors, EveryCodeHasADistinctNameAndExitCode) {
    for (int i = 0; i < kErrorCodeCount; ++i) {
        const ErrorMapping& a = error_mapping(static_cast<ErrorCode>(i));
        EXPECT_FALSE(a.advice.empty());
        EXPECT_GE(a.exit_code, 2);
        for (int j = 0; j < i; ++j) {
            const ErrorMapping& b = error_mapping(static_cast<ErrorCode>(j));
            EXPECT_NE(a.name, b.name);
            EXPECT_NE(a.exit_code, b.exit_code);
        }
    }
    EXPECT_EQ(Error::from_errno(ENOSPC, "pwrite x").code(), ErrorCode::kNoSpace);
    EXPECT_EQ(Error::from_errno(ENOSPC, "pwrite x").message(), "pwrite x: No space left on device");
}

TEST(Budget, SharesTakeTogetherNoMoreThanThereIs) {
    const auto budget = std::make_shared<Budget>(5);
    BudgetShare kept(budget);
    {
        BudgetShare other(budget);
        EXPECT_TRUE(kept.resize(2));
        EXPECT_TRUE(other.resize(3));
        EXPECT_FALSE(kept.resize(3));
        EXPECT_EQ(kept.held(), 2U) << "a refusal changes nothing";
        EXPECT_TRUE(other.resize(2));
        EXPECT_TRUE(kept.resize(3));
        EXPECT_EQ(budget->taken(), 5U);
    }
    EXPECT_EQ(budget->taken(), 3U);
    EXPECT_FALSE(kept.resize(UINT64_MAX));
    const BudgetShare moved(std::move(kept));
    EXPECT_EQ(budget->taken(), 3U);
    BudgetShare unbounded(nullptr);
    EXPECT_TRUE(unbounded.resize(UINT64_MAX));
}

TEST(Budget, ThreadsDoNotTakeMoreThanThereIs) {
    const auto budget = std::make_shared<Budget>(3);
    std::atomic<int> too_many = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (int turn = 0; turn < 20'000; ++turn) {
                BudgetShare share(budget);
                if (share.resize(2) && budget->taken() > budget->total()) {
                    ++too_many;
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_EQ(too_many, 0);
    EXPECT_EQ(budget->taken(), 0U);
}

}  // namespace
}  // namespace stellarium
