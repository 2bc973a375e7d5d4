// Limits of rate: the buckets by themselves, and guests whose rings are held back.
//
// Time is the tests' own: it stands still until they move it, so that what a limit allows is a
// whole number, however slow the machine is.
#include "frontend/vhost/throttle.h"

#include <atomic>
#include <chrono>
#include <numeric>
#include <random>
#include <thread>

#include "base/test_scale.h"
#include "frontend/vhost_client/test_bench.h"

namespace stellarium::vhost {
namespace {

constexpr uint64_t kMsNs = 1'000'000;
constexpr uint64_t kSecondNs = 1'000 * kMsNs;
constexpr std::chrono::seconds kPatience{60};

// ---- The buckets --------------------------------------------------------------------------------

TEST(TokenBucketTest, GivesItsBurstThenItsRate) {
    TokenBucket bucket;
    EXPECT_TRUE(bucket.ready(0));  // Without a rate it always is.
    bucket.set(10, 3, kSecondNs);
    for (int i = 0; i < 3; ++i) {
        ASSERT_TRUE(bucket.ready(kSecondNs));
        bucket.charge(1);
    }
    for (uint64_t i = 1; i <= 20; ++i) {
        const uint64_t at = kSecondNs + i * 100 * kMsNs;
        ASSERT_FALSE(bucket.ready(at - 1));
        ASSERT_EQ(bucket.ready_at(), at);
        ASSERT_TRUE(bucket.ready(at));
        bucket.charge(1);
    }
    // A rest fills it up to the burst and no further.
    ASSERT_TRUE(bucket.ready(100 * kSecondNs));
    bucket.charge(3);
    EXPECT_FALSE(bucket.ready(100 * kSecondNs));
}

TEST(TokenBucketTest, WhatIsLargerThanTheBurstIsPaidForAfterwards) {
    TokenBucket bucket;
    bucket.set(1000, 100, 0);
    ASSERT_TRUE(bucket.ready(0));
    bucket.charge(5000);
    ASSERT_FALSE(bucket.ready(0));
    // It owes 4900, and one more makes it ready.
    EXPECT_EQ(bucket.ready_at(), 4901 * kMsNs);
    EXPECT_FALSE(bucket.ready(4901 * kMsNs - 1));
    EXPECT_TRUE(bucket.ready(4901 * kMsNs));
}

TEST(TokenBucketTest, ANewRateKeepsWhatIsThereAndWhatIsOwed) {
    TokenBucket bucket;
    bucket.set(10, 10, 0);
    bucket.charge(30);
    bucket.set(1000, 1000, kSecondNs);  // Ten of twenty were paid at the old rate.
    ASSERT_FALSE(bucket.ready(kSecondNs));
    EXPECT_EQ(bucket.ready_at(), kSecondNs + 11 * kMsNs);
    ASSERT_TRUE(bucket.ready(10 * kSecondNs));
    bucket.set(1000, 10, 10 * kSecondNs);  // Full with 1000; now it holds ten.
    bucket.charge(10);
    EXPECT_FALSE(bucket.ready(10 * kSecondNs));
    bucket.set(0, 0, 10 * kSecondNs);
    bucket.charge(1'000'000);
    EXPECT_TRUE(bucket.ready(10 * kSecondNs));
    bucket.set(10, 10, 10 * kSecondNs);  // From no limit to one: full.
    EXPECT_TRUE(bucket.ready(10 * kSecondNs));
}

TEST(TokenBucketTest, AClockThatStandsOrGoesBackGivesNothing) {
    TokenBucket bucket;
    bucket.set(1000, 10, kSecondNs);
    bucket.charge(10);
    EXPECT_FALSE(bucket.ready(kSecondNs));
    EXPECT_FALSE(bucket.ready(0));
    EXPECT_FALSE(bucket.ready(kSecondNs));
    EXPECT_TRUE(bucket.ready(kSecondNs + kMsNs));
}

TEST(TokenBucketTest, NoWindowOfTimeHoldsMoreThanBurstAndRateAndAGreedyUserGetsAll) {
    const uint64_t seed = first_seed();
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const auto pick = [&](uint64_t least, uint64_t most) {
        return std::uniform_int_distribution<uint64_t>(least, most)(random);
    };
    for (uint64_t round = 0; round < scaled(200, 50); ++round) {
        const uint64_t rate = uint64_t{1} << pick(0, 40);
        const uint64_t burst = pick((rate + kBurstsPerSecond - 1) / kBurstsPerSecond,
                                    rate * (round % 2 == 0 ? 1 : kMaxBurstSeconds));
        const uint64_t largest = pick(1, 2 * burst);
        const uint64_t start = pick(0, kSecondNs);
        TokenBucket bucket;
        bucket.set(rate, burst, start);
        struct Taken {
            uint64_t at_ns;
            uint64_t tokens;
        };
        std::vector<Taken> taken;
        uint64_t now = start;
        const bool rests = round % 3 == 0;
        for (int i = 0; i < 60; ++i) {
            if (!bucket.ready(now)) {
                const uint64_t at = bucket.ready_at();
                ASSERT_GT(at, now);
                ASSERT_FALSE(bucket.ready(at - 1));
                ASSERT_TRUE(bucket.ready(at));
                now = at;
            }
            const uint64_t tokens = pick(1, largest);
            bucket.charge(tokens);
            taken.push_back(Taken{now, tokens});
            if (rests) {
                now += pick(0, kSecondNs);
            }
        }
        // Of a window's last request only the first token has to be there.
        for (size_t first = 0; first < taken.size(); ++first) {
            uint64_t sum = 0;
            for (size_t last = first; last < taken.size(); ++last) {
                const double seconds =
                    static_cast<double>(taken[last].at_ns - taken[first].at_ns) / 1e9;
                const double allowed =
                    static_cast<double>(burst) + static_cast<double>(rate) * seconds;
                ASSERT_LE(static_cast<double>(sum + 1), allowed * 1.000001 + 1)
                    << "round " << round << ", from " << first << " to " << last;
                sum += taken[last].tokens;
            }
        }
        if (!rests) {
            // Who takes whatever there is has all of it: before the last one it was empty.
            uint64_t before_last = 0;
            for (size_t i = 0; i + 1 < taken.size(); ++i) {
                before_last += taken[i].tokens;
            }
            const double seconds = static_cast<double>(now - start) / 1e9;
            const double given = static_cast<double>(burst) + static_cast<double>(rate) * seconds;
            if (now > start) {
                EXPECT_LE(given, (static_cast<double>(before_last) + 2) * 1.000001 +
                                     static_cast<double>(rate) / 1e9);
            }
        }
    }
}

TEST(ThrottleTest, TheSlowerOfTheTwoLimitsCounts) {
    Throttle throttle;
    EXPECT_FALSE(throttle.limited());
    EXPECT_TRUE(throttle.admits(0));
    throttle.set({.iops = 100,
                  .iops_burst = 2,
                  .bandwidth_bytes = 1'000'000,
                  .bandwidth_burst_bytes = 10'000},
                 0);
    EXPECT_TRUE(throttle.limited());
    throttle.charge(0);
    EXPECT_TRUE(throttle.admits(0));
    throttle.charge(0);
    ASSERT_FALSE(throttle.admits(0));
    EXPECT_EQ(throttle.admits_at(), 10 * kMsNs);
    ASSERT_TRUE(throttle.admits(10 * kMsNs));
    throttle.charge(110'000);
    ASSERT_FALSE(throttle.admits(10 * kMsNs));
    // 100,000 owed and one more, at a byte each microsecond.
    EXPECT_EQ(throttle.admits_at(), 10 * kMsNs + 100'001'000);
}

// ---- Guests -------------------------------------------------------------------------------------

class ThrottledGuestTest : public VhostTest {
  protected:
    ThrottledGuestTest() {
        data_threads_ = 1;
        clock_ = [this] {
            ++asked_;
            return now_ns_.load();
        };
    }

    void advance(uint64_t ns) { now_ns_.fetch_add(ns); }
    void set_limits(const RateLimits& limits, const char* name = "one") {
        STELLARIUM_EXPECT_OK(server_->set_limits(name, limits));
    }

    /// A guest, and what it has been given back so far, by queue.
    struct Load {
        explicit Load(GuestOptions options = {}) : guest(options), done(options.queues) {}

        BlkSlot& add(uint32_t type, uint64_t offset, uint32_t bytes, uint16_t queue = 0) {
            slots.push_back(std::make_unique<BlkSlot>(*guest.ram, std::max(bytes, 512U)));
            EXPECT_TRUE(
                guest.queue(queue).add(slots.back()->prepare(type, offset >> kSectorShift, bytes)));
            return *slots.back();
        }
        void kick() {
            for (const auto& queue : guest.queues) {
                queue->kick();
            }
        }
        /// Each to a page of its own.
        void send_writes(unsigned count) {
            for (unsigned i = 0; i < count; ++i) {
                add(kBlkOut, uint64_t{4096} * i, 512);
            }
            kick();
        }
        void send_reads(unsigned count) {
            for (unsigned i = 0; i < count; ++i) {
                add(kBlkIn, 0, 512);
            }
            kick();
        }
        size_t total() const { return std::accumulate(done.begin(), done.end(), size_t{0}); }
        /// Takes what has been given back.
        void collect() {
            for (size_t i = 0; i < done.size(); ++i) {
                while (guest.queues[i]->take_used()) {
                    ++done[i];
                }
            }
        }
        /// Until so many have been given back in all; false when it takes too long. Never more.
        bool reaches(size_t count) {
            const auto deadline = std::chrono::steady_clock::now() + kPatience;
            for (collect(); total() < count; collect()) {
                if (std::chrono::steady_clock::now() > deadline) {
                    return false;
                }
                std::this_thread::yield();
            }
            EXPECT_EQ(total(), count);
            return total() == count;
        }
        bool all_ok() const {
            return std::ranges::all_of(
                slots, [](const auto& slot) { return slot->status() == kBlkStatusOk; });
        }

        TestGuest guest;
        std::vector<size_t> done;
        std::vector<std::unique_ptr<BlkSlot>> slots;
    };

    /// When it returns, the data thread has been through all of its devices.
    void settle() {
        attach("settle", disk_);
        Load load;
        load.guest.connect(socket("settle"));
        for (int i = 0; i < 3; ++i) {
            std::vector<std::byte> data(512);
            EXPECT_EQ(value_of(load.guest.driver().read(0, data), "read"), kBlkStatusOk);
        }
        load.guest.client.reset();
        STELLARIUM_EXPECT_OK(server_->detach("settle"));
    }

    std::atomic<uint64_t> now_ns_{kSecondNs};
    std::atomic<uint64_t> asked_{0};
};

TEST_F(ThrottledGuestTest, ALimitOfRequestsHoldsByTheDevicesClock) {
    attach_one({.limits = {.iops = 1000, .iops_burst = 10}});
    Load load;
    load.guest.connect(socket());
    const std::vector<uint32_t> types = {kBlkIn, kBlkOut, kBlkFlush, kBlkGetId};
    for (unsigned i = 0; i < 100; ++i) {
        const uint32_t type = types[i % types.size()];
        load.add(type, 0, type == kBlkFlush ? 0 : type == kBlkGetId ? 20 : 512);
    }
    load.kick();
    ASSERT_TRUE(load.reaches(10));
    settle();
    ASSERT_TRUE(load.reaches(10));
    size_t expected = 10;
    for (const uint64_t ms : {uint64_t{1}, uint64_t{3}, uint64_t{9}, uint64_t{2}}) {
        advance(ms * kMsNs);
        expected += ms;
        ASSERT_TRUE(load.reaches(expected)) << expected;
    }
    // A bucket holds no more than its burst.
    advance(10 * kSecondNs);
    expected += 10;
    ASSERT_TRUE(load.reaches(expected));
    settle();
    ASSERT_TRUE(load.reaches(expected));
    while (load.total() < 100) {
        advance(5 * kMsNs);
        expected += 5;
        ASSERT_TRUE(load.reaches(expected)) << expected;
    }
    EXPECT_TRUE(load.all_ok());
    EXPECT_EQ(status().throttled_requests, 90U);
    EXPECT_EQ(status().limits.iops_burst, 10U);
    EXPECT_GE(status().throttled_ns, 10 * kSecondNs);
}

TEST_F(ThrottledGuestTest, ALimitOfBandwidthCountsReadAndWrittenBytesAlone) {
    constexpr uint64_t kRate = 4 * kMiB;
    attach_one({.limits = {.bandwidth_bytes = kRate, .bandwidth_burst_bytes = 64 * kKiB}});
    Load load;
    load.guest.connect(socket());
    BlkRange range;
    range.sector = 0;
    range.sectors = 2 * kMiB >> kSectorShift;
    for (uint32_t type : {kBlkDiscard, kBlkWriteZeroes}) {
        load.slots.push_back(std::make_unique<BlkSlot>(*load.guest.ram, 512));
        std::ranges::copy(bytes_of(range), load.slots.back()->data().begin());
        ASSERT_TRUE(load.guest.queue().add(load.slots.back()->prepare(type, 0, sizeof(range))));
    }
    load.add(kBlkFlush, 0, 0);
    load.add(kBlkIn, 0, 32 * 1024);
    load.add(kBlkOut, 0, 32 * 1024);
    load.kick();
    ASSERT_TRUE(load.reaches(5));  // To the byte what the burst is.
    // One that is larger than the burst passes when there is anything.
    load.add(kBlkIn, 0, 1 << 20);
    load.add(kBlkIn, 0, 512);
    load.kick();
    settle();
    ASSERT_TRUE(load.reaches(5));
    advance(kMsNs);
    ASSERT_TRUE(load.reaches(6));
    // Then its debt is to be paid: a quarter of a second, of which a millisecond was there.
    advance(249 * kMsNs - 1000);
    settle();
    ASSERT_TRUE(load.reaches(6));
    advance(2000);
    ASSERT_TRUE(load.reaches(7));
    EXPECT_TRUE(load.all_ok());
}

TEST_F(ThrottledGuestTest, ANoisyGuestWaitsAloneAndAnotherOneOfItsThreadGoesOn) {
    attach_one({.limits = {.iops = 100, .iops_burst = 2}});
    attach("quiet", disk_);
    Load noisy;
    noisy.guest.connect(socket());
    for (int i = 0; i < 100; ++i) {
        noisy.add(kBlkIn, 0, 4096);
    }
    noisy.kick();
    Load quiet;
    quiet.guest.connect(socket("quiet"));
    std::vector<std::byte> data(4096);
    for (int i = 0; i < 2000; ++i) {
        ASSERT_EQ(value_of(quiet.guest.driver().read(0, data), "read"), kBlkStatusOk);
        if (i % 100 == 0) {
            noisy.guest.queue().kick();  // Of no use.
        }
    }
    ASSERT_TRUE(noisy.reaches(2));
    EXPECT_EQ(status("one").of(RequestKind::kRead).requests, 2U);
    EXPECT_EQ(status("quiet").of(RequestKind::kRead).requests, 2000U);
    EXPECT_EQ(status("quiet").throttled_requests, 0U);
}

TEST_F(ThrottledGuestTest, AChangedLimitIsLookedAtByWhoWaits) {
    attach_one({.limits = {.iops = 1, .iops_burst = 1}});
    Load load;
    load.guest.connect(socket());
    load.send_reads(50);
    ASSERT_TRUE(load.reaches(1));
    set_limits({.iops = 1000, .iops_burst = 10});
    EXPECT_EQ(status().limits.iops, 1000U);
    settle();
    ASSERT_TRUE(load.reaches(1));  // It may hold more now, and is as empty as it was.
    advance(5 * kMsNs);
    ASSERT_TRUE(load.reaches(6));
    set_limits({});
    ASSERT_TRUE(load.reaches(50));
    EXPECT_FALSE(status().limits.any());
    // And back again.
    set_limits({.iops = 1000, .iops_burst = 10});
    settle();
    load.send_reads(20);
    ASSERT_TRUE(load.reaches(60));
    EXPECT_EQ(server_->set_limits("one", {.iops = kMaxIops + 1}).error().code(),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ(server_->set_limits("nope", {}).error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(status().limits.iops, 1000U);
}

TEST_F(ThrottledGuestTest, TheRingsOfADeviceShareItsLimitInTurn) {
    GuestOptions options;
    options.queues = 4;
    attach_one({.queues = 4, .limits = {.iops = 1000, .iops_burst = 10}});
    Load load(options);
    load.guest.connect(socket());
    for (int i = 0; i < 100; ++i) {
        for (uint16_t queue = 0; queue < 4; ++queue) {
            load.add(kBlkIn, 0, 512, queue);
        }
    }
    load.kick();
    size_t expected = 10;
    ASSERT_TRUE(load.reaches(expected));
    settle();  // All four are known to wait.
    const std::vector<size_t> before = load.done;
    for (int round = 0; round < 8; ++round) {
        advance(4 * kMsNs);
        expected += 4;
        ASSERT_TRUE(load.reaches(expected));
    }
    for (size_t queue = 0; queue < 4; ++queue) {
        EXPECT_EQ(load.done[queue], before[queue] + 8) << queue;
    }
}

TEST_F(ThrottledGuestTest, ARingThatIsHeldBackIsStoppedAndGoesOn) {
    attach_one({.limits = {.iops = 1000, .iops_burst = 10}});
    Load load;
    load.guest.connect(socket());
    load.send_writes(30);
    ASSERT_TRUE(load.reaches(10));
    settle();
    EXPECT_EQ(value_of(load.guest.client->stop_queue(0), "base"), 10);
    advance(5 * kMsNs);
    settle();  // Its timer finds it stopped.
    ASSERT_TRUE(load.reaches(10));
    STELLARIUM_EXPECT_OK(load.guest.client->start_queue(0, load.guest.queue(), 10));
    ASSERT_TRUE(load.reaches(15));
    // The same with the timer of a life before.
    EXPECT_EQ(value_of(load.guest.client->stop_queue(0), "base"), 15);
    STELLARIUM_EXPECT_OK(load.guest.client->start_queue(0, load.guest.queue(), 15));
    advance(10 * kMsNs);
    ASSERT_TRUE(load.reaches(25));
    advance(10 * kMsNs);
    ASSERT_TRUE(load.reaches(30));
    EXPECT_EQ(disk_->writes(), 30U);
    EXPECT_TRUE(load.all_ok());
}

TEST_F(ThrottledGuestTest, ALostConnectionLosesNothingAndFillsNoBucket) {
    attach_one({.limits = {.iops = 1000, .iops_burst = 10}});
    Load load({.inflight = true});
    load.guest.connect(socket());
    load.send_writes(40);
    ASSERT_TRUE(load.reaches(10));
    for (const size_t expected : {size_t{10}, size_t{14}, size_t{18}}) {
        load.guest.client.reset();
        load.guest.connect(socket());
        settle();
        ASSERT_TRUE(load.reaches(expected));
        advance(4 * kMsNs);
        ASSERT_TRUE(load.reaches(expected + 4));
    }
    // Taken, and lost on the way: it is done again, within the limit, before what was never taken.
    disk_->hold();
    advance(3 * kMsNs);
    disk_->wait_until_held(1);
    load.guest.client.reset();
    disk_->release();
    load.guest.connect(socket());
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (load.total() < 40) {
        ASSERT_LT(std::chrono::steady_clock::now(), deadline);
        advance(5 * kMsNs);
        std::this_thread::yield();
        load.collect();
    }
    EXPECT_TRUE(load.all_ok());
    EXPECT_EQ(load.guest.queue().outstanding(), 0U);
    EXPECT_EQ(load.total(), 40U);
}

TEST_F(ThrottledGuestTest, AStopDoesNotWaitForTheLimitOfWhatWasInFlightBeforeACrash) {
    attach_one({.limits = {.iops = 1000, .iops_burst = 10}});
    Load load({.inflight = true});
    load.guest.connect(socket());
    disk_->hold();
    load.send_writes(20);
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (status().in_flight < 10) {
        ASSERT_LT(std::chrono::steady_clock::now(), deadline);
        std::this_thread::yield();
    }
    load.guest.client.reset();
    disk_->release();
    load.guest.connect(socket());
    settle();
    ASSERT_TRUE(load.reaches(0));  // They were paid for once, and are to be once more.
    EXPECT_EQ(value_of(load.guest.client->stop_queue(0), "base"), 10);
    ASSERT_TRUE(load.reaches(10));
    STELLARIUM_EXPECT_OK(load.guest.client->start_queue(0, load.guest.queue(), 10));
    advance(10 * kMsNs);
    settle();
    ASSERT_TRUE(load.reaches(10));
    advance(10 * kMsNs);
    ASSERT_TRUE(load.reaches(20));
    EXPECT_TRUE(load.all_ok());
}

TEST_F(ThrottledGuestTest, WhatIsHeldBackDoesNotHoldADetachUpAndIsFoundAgain) {
    attach_one({.limits = {.iops = 1, .iops_burst = 1}});
    Load load({.inflight = true});
    load.guest.connect(socket());
    load.send_writes(40);
    ASSERT_TRUE(load.reaches(1));
    settle();
    STELLARIUM_EXPECT_OK(server_->detach("one"));
    EXPECT_TRUE(load.guest.client->wait_closed());
    ASSERT_TRUE(load.reaches(1));
    attach_one();
    load.guest.connect(socket());
    ASSERT_TRUE(load.reaches(40));
    EXPECT_EQ(disk_->writes(), 40U);
    EXPECT_TRUE(load.all_ok());
}

TEST_F(ThrottledGuestTest, ALimitThatNobodyWaitsForCostsNothing) {
    attach_one({.limits = {.iops = 1000, .iops_burst = 10}});
    attach("other", disk_);
    Load load;
    load.guest.connect(socket());
    load.send_reads(20);
    ASSERT_TRUE(load.reaches(10));
    advance(10 * kMsNs);
    ASSERT_TRUE(load.reaches(20));
    Load other;
    other.guest.connect(socket("other"));
    std::vector<std::byte> data(512);
    ASSERT_EQ(value_of(other.guest.driver().read(0, data), "read"), kBlkStatusOk);
    // The ring has been found empty: there is no timer, and nobody looks at a clock for it.
    const uint64_t asked = asked_.load();
    for (int i = 0; i < 100; ++i) {
        ASSERT_EQ(value_of(other.guest.driver().read(0, data), "read"), kBlkStatusOk);
    }
    EXPECT_EQ(asked_.load(), asked);
}

TEST_F(ThrottledGuestTest, AttachRefusesLimitsOutOfBounds) {
    for (const RateLimits& limits : {RateLimits{.iops = kMaxIops + 1}, RateLimits{.iops_burst = 5},
                                     RateLimits{.bandwidth_bytes = kMinBandwidthBytes - 1},
                                     RateLimits{.iops = 1000, .iops_burst = 9}}) {
        AttachOptions options;
        options.socket_path = socket();
        options.limits = limits;
        const Result<void> refused = server_->attach("one", disk_, options);
        ASSERT_FALSE(refused);
        EXPECT_EQ(refused.error().code(), ErrorCode::kInvalidArgument);
    }
}

}  // namespace
}  // namespace stellarium::vhost
