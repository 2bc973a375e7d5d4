// Requests that were in flight when the connection, or the server, was lost.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>

#include "frontend/vhost/virtqueue.h"
#include "frontend/vhost_client/test_bench.h"

namespace stellarium::vhost {
namespace {

// ---- The region, step by step -------------------------------------------------------------------

/// A device-side queue on a driver-side queue, and the region between two lives of the device.
class InflightRegionTest : public ::testing::Test {
  protected:
    static constexpr uint16_t kSize = 8;

    void SetUp() override {
        ram_ = value_of(GuestRam::create(kMiB), "guest memory");
        driver_ = std::make_unique<DriverQueue>(*ram_, kSize, false, false);
        data_ = ram_->allocate(4096);
        auto mapping = value_of(SharedMapping::map(ram_->fd(), 0, ram_->size_bytes()), "mapping");
        region_ = ram_->allocate(inflight_queue_bytes(kSize), 64);
        std::memset(region_, 0, inflight_queue_bytes(kSize));
        memory_ = value_of(GuestMemory().with(MemoryRegion{GuestRam::kGuestBase, ram_->size_bytes(),
                                                           GuestRam::kUserBase, mapping}),
                           "memory");
        uint8_t* at = mapping->data() + (region_ - ram_->data());
        inflight_.mapping = mapping;
        inflight_.header = reinterpret_cast<InflightHeader*>(at);
        inflight_.states = reinterpret_cast<InflightState*>(at + sizeof(InflightHeader));
        inflight_.queue_size = kSize;
    }

    /// A back-end that begins where a front-end without better knowledge would say: at the used
    /// index.
    Result<std::unique_ptr<Virtqueue>> new_life() {
        auto queue = std::make_unique<Virtqueue>();
        STELLARIUM_TRY(queue->set_size(kSize));
        STELLARIUM_TRY(queue->set_addresses(driver_->addresses(0)));
        EXPECT_TRUE(queue->resolve(*memory_));
        queue->set_base(driver_->used_index());
        queue->set_inflight(inflight_);
        STELLARIUM_TRY(queue->start());
        return queue;
    }

    uint16_t add() {
        Buffer buffer{ram_->guest_address(data_), 16, false};
        return driver_->add(std::span(&buffer, 1)).value_or(UINT16_MAX);
    }
    uint16_t pop(Virtqueue& queue) {
        Chain chain;
        EXPECT_TRUE(value_of(queue.pop(*memory_, chain), "pop"));
        return chain.head;
    }
    std::vector<uint16_t> pop_all(Virtqueue& queue) {
        std::vector<uint16_t> heads;
        Chain chain;
        while (value_of(queue.pop(*memory_, chain), "pop")) {
            heads.push_back(chain.head);
        }
        return heads;
    }
    InflightState& state(uint16_t head) { return inflight_.states[head]; }

    std::unique_ptr<GuestRam> ram_;
    std::unique_ptr<DriverQueue> driver_;
    std::byte* data_ = nullptr;
    std::byte* region_ = nullptr;
    std::shared_ptr<const GuestMemory> memory_;
    InflightQueue inflight_;
};

TEST_F(InflightRegionTest, WhatWasTakenComesBackInItsOrderThenWhatIsNew) {
    auto first = value_of(new_life(), "start");
    EXPECT_EQ(inflight_.header->version, kInflightVersion);
    // Heads in an order that is not that of their numbers: five requests, two of them finished.
    std::vector<uint16_t> heads = {add(), add(), add()};
    EXPECT_EQ(pop_all(*first), heads);
    first->push(heads[0], 0);
    first->push(heads[2], 0);
    first->publish();
    while (driver_->take_used()) {
    }
    uint16_t reused = add();
    uint16_t other = add();
    EXPECT_EQ(pop(*first), reused);
    EXPECT_EQ(pop(*first), other);
    uint16_t never_taken = add();
    first.reset();  // As if killed: nothing is tidied up.

    auto second = value_of(new_life(), "start");
    EXPECT_EQ(pop_all(*second), (std::vector<uint16_t>{heads[1], reused, other, never_taken}));
    for (uint16_t head : {other, heads[1], reused, never_taken}) {
        second->push(head, 0);
    }
    second->publish();
    second.reset();

    auto third = value_of(new_life(), "start");
    EXPECT_TRUE(pop_all(*third).empty());
    size_t used = 0;
    while (driver_->take_used()) {
        ++used;
    }
    EXPECT_EQ(used, 4U);
    EXPECT_EQ(driver_->outstanding(), 0U);
}

TEST_F(InflightRegionTest, EveryPointOfACompletionIsRecoverable) {
    // The stores of push() and publish() in their order; the process may end after each.
    enum Point {
        kTaken,
        kLinked,
        kListed,
        kInUsedRing,
        kPublished,
        kOneCleared,
        kAllCleared,
        kDone
    };
    for (int point = kTaken; point <= kDone; ++point) {
        SetUp();
        auto first = value_of(new_life(), "start");
        uint16_t stays = add();
        uint16_t a = add();
        uint16_t b = add();
        EXPECT_EQ(pop_all(*first), (std::vector<uint16_t>{stays, a, b}));
        first.reset();
        // Completing a and b as one batch, by hand.
        std::byte* used = ram_->data() + (driver_->addresses(0).used - GuestRam::kUserBase);
        auto step = [&](Point reached) { return point >= reached; };
        uint16_t before = inflight_.header->last_batch_head;
        if (step(kLinked)) {
            state(a).next = before;
        }
        if (step(kListed)) {
            state(b).next = a;
            inflight_.header->last_batch_head = b;
        }
        if (step(kInUsedRing)) {
            UsedElement elements[2] = {{a, 0}, {b, 0}};
            std::memcpy(used + 4, elements, sizeof(elements));
        }
        if (step(kPublished)) {
            uint16_t index = 2;
            std::memcpy(used + 2, &index, sizeof(index));
        }
        if (step(kOneCleared)) {
            state(a).in_flight = 0;
        }
        if (step(kAllCleared)) {
            state(b).in_flight = 0;
        }
        if (step(kDone)) {
            inflight_.header->used_index = 2;
        }
        auto second = value_of(new_life(), "start");
        std::vector<uint16_t> expected = {stays};
        if (!step(kPublished)) {
            expected = {stays, a, b};
        }
        EXPECT_EQ(pop_all(*second), expected) << "killed after step " << point;
        EXPECT_EQ(inflight_.header->used_index, driver_->used_index());
    }
}

TEST_F(InflightRegionTest, SpoiledRegionsAreRefused) {
    struct Case {
        const char* reason;
        std::function<void()> spoil;
    };
    for (const Case& c : std::vector<Case>{
             {"of version 7", [&] { inflight_.header->version = 7; }},
             {"does not fit a ring", [&] { inflight_.queue_size = 4; }},
             {"says used index", [&] { inflight_.header->used_index = 60000; }},
             {"lists descriptor 9",
              [&] {
                  inflight_.header->used_index = UINT16_MAX;
                  inflight_.header->last_batch_head = 9;
              }},
             {"lists descriptor 65535",
              [&] {
                  inflight_.header->used_index = UINT16_MAX - 1;
                  inflight_.header->last_batch_head = 1;
                  state(1).next = UINT16_MAX;
              }},
         }) {
        SetUp();
        value_of(new_life(), "first start");
        c.spoil();
        Result<std::unique_ptr<Virtqueue>> started = new_life();
        ASSERT_FALSE(started) << c.reason;
        EXPECT_EQ(started.error().code(), ErrorCode::kProtocol);
        EXPECT_NE(started.error().message().find(c.reason), std::string::npos)
            << started.error().message();
    }
}

TEST_F(InflightRegionTest, ARegionThatClaimsEverythingIsInFlightHandsOutEachHeadOnce) {
    value_of(new_life(), "first start");
    for (uint16_t head = 0; head < kSize; ++head) {
        driver_->descriptor(head) = {ram_->guest_address(data_), 16, 0, 0};
        state(head).in_flight = 255;
        state(head).counter = UINT64_MAX;
    }
    auto queue = value_of(new_life(), "start");
    std::vector<uint16_t> heads;
    Chain chain;
    for (uint16_t i = 0; i < kSize; ++i) {
        ASSERT_TRUE(value_of(queue->pop(*memory_, chain), "pop"));
        heads.push_back(chain.head);
    }
    std::ranges::sort(heads);
    EXPECT_EQ(heads, (std::vector<uint16_t>{0, 1, 2, 3, 4, 5, 6, 7}));
    // The driver made none of them available, so the ring now looks broken, and that is said.
    EXPECT_FALSE(queue->pop(*memory_, chain));
}

// ---- Through the server -------------------------------------------------------------------------

TEST_F(VhostTest, RequestsOfALostConnectionAreDoneAgainInOrder) {
    attach_one();
    GuestOptions options;
    options.inflight = true;
    TestGuest guest(options);
    guest.connect(socket());

    // Six writes to one place, the last of which must win, and a flush.
    disk_->hold();
    std::vector<std::unique_ptr<BlkSlot>> slots;
    std::vector<std::byte> last;
    for (unsigned i = 0; i < 6; ++i) {
        slots.push_back(std::make_unique<BlkSlot>(*guest.ram, 4096));
        last = pattern(4096, i);
        std::ranges::copy(last, slots.back()->data().begin());
        ASSERT_TRUE(guest.queue().add(slots.back()->prepare(kBlkOut, 0, 4096)));
    }
    slots.push_back(std::make_unique<BlkSlot>(*guest.ram, 512));
    ASSERT_TRUE(guest.queue().add(slots.back()->prepare(kBlkFlush, 0, 0)));
    guest.queue().kick();
    disk_->wait_until_held(2);
    ASSERT_EQ(status().in_flight, 7U);
    guest.client.reset();
    disk_->release();

    // The next connection is served when all of that is over, and does it once more. What had not
    // begun when the connection was seen to be lost was given up.
    guest.connect(socket());
    while (guest.queue().outstanding() > 0) {
        ASSERT_TRUE(guest.queue().wait(kClientTimeout));
        guest.queue().take_used();
    }
    for (const auto& slot : slots) {
        EXPECT_EQ(slot->status(), kBlkStatusOk);
    }
    EXPECT_EQ(on_disk(0, 4096), last);
    EXPECT_GE(disk_->writes(), 7U);
    EXPECT_LE(disk_->writes(), 12U);
    EXPECT_EQ(disk_->flushes(), 2U);
    EXPECT_EQ(guest.queue().used_index(), 7U);
}

TEST_F(VhostTest, WithoutARegionTheBaseIndexBringsThemBack) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    std::vector<std::byte> data = pattern(4096, 1);
    ASSERT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
    disk_->hold();
    BlkSlot slot(*guest.ram, 4096);
    ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 4096)));
    guest.queue().kick();
    disk_->wait_until_held(1);
    guest.client.reset();
    disk_->release();
    guest.connect(socket());  // With the used index as base.
    ASSERT_TRUE(guest.queue().wait(kClientTimeout));
    EXPECT_EQ(slot.status(), kBlkStatusOk);
    EXPECT_TRUE(equal(slot.data(), data));
}

TEST_F(VhostTest, AnotherServerTakesOverWhatWasNeverTaken) {
    GuestOptions options;
    options.inflight = true;
    TestGuest guest(options);
    attach_one();
    guest.connect(socket());
    std::vector<std::byte> data = pattern(4096, 1);
    ASSERT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
    server_.reset();
    BlkSlot slot(*guest.ram, 4096);
    ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 4096)));
    guest.queue().kick();
    start_server();
    attach_one();
    guest.connect(socket());
    ASSERT_TRUE(guest.queue().wait(kClientTimeout));
    EXPECT_EQ(slot.status(), kBlkStatusOk);
    EXPECT_TRUE(equal(slot.data(), data));
}

}  // namespace
}  // namespace stellarium::vhost
