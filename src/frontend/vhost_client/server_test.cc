// What a well-behaved guest sees.
#include <fstream>
#include <future>
#include <thread>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "frontend/vhost/limits.h"
#include "frontend/vhost_client/test_bench.h"

namespace stellarium::vhost {
namespace {

constexpr std::chrono::seconds kTimeout = kClientTimeout;

// ---- Requests -----------------------------------------------------------------------------------

struct RingVariant {
    const char* name;
    bool indirect;
    bool event_index;
    uint32_t segment_bytes;
    bool would_block;
};

class RequestTest : public VhostTest, public ::testing::WithParamInterface<RingVariant> {
  protected:
    GuestOptions guest_options() const {
        GuestOptions options;
        if (!GetParam().indirect) {
            options.features &= ~feature_bit(kFeatureIndirectDesc);
        }
        if (!GetParam().event_index) {
            options.features &= ~feature_bit(kFeatureEventIdx);
        }
        options.segment_bytes = GetParam().segment_bytes;
        return options;
    }
};

TEST_P(RequestTest, EveryKindOfRequestDoesWhatItSays) {
    attach_one({.serial = "serial-of-20-bytes!!"});
    disk_->set_would_block(GetParam().would_block);
    TestGuest guest(guest_options());
    guest.connect(socket());
    BlkDriver& driver = guest.driver();

    // Enough of them that the rings go round.
    for (unsigned i = 0; i < 150; ++i) {
        size_t bytes = 512 * (size_t{1} + i % 64);
        uint64_t offset = uint64_t{i} * 37 * 512;
        std::vector<std::byte> data = pattern(bytes, i);
        ASSERT_EQ(value_of(driver.write(offset, data), "write"), kBlkStatusOk);
        ASSERT_EQ(driver.used_length(), 1U);
        ASSERT_TRUE(equal(on_disk(offset, bytes), data));
        std::vector<std::byte> back(bytes);
        ASSERT_EQ(value_of(driver.read(offset, back), "read"), kBlkStatusOk);
        ASSERT_EQ(driver.used_length(), bytes + 1);
        ASSERT_EQ(back, data);
    }
    EXPECT_EQ(value_of(driver.flush(), "flush"), kBlkStatusOk);
    EXPECT_EQ(disk_->flushes(), 1U);

    disk_->fill(std::byte{0x55});
    EXPECT_EQ(value_of(driver.discard(4096, 8192), "discard"), kBlkStatusOk);
    EXPECT_EQ(value_of(driver.write_zeroes(65536, 512), "write zeroes"), kBlkStatusOk);
    EXPECT_TRUE(all_zero(on_disk(4096, 8192)));
    EXPECT_TRUE(all_zero(on_disk(65536, 512)));
    EXPECT_EQ(on_disk(4095, 1)[0], std::byte{0x55});
    EXPECT_EQ(on_disk(4096 + 8192, 1)[0], std::byte{0x55});
    EXPECT_EQ(value_of(driver.get_id(), "id"), "serial-of-20-bytes!!");

    AttachmentStatus now = status();
    EXPECT_TRUE(now.connected);
    EXPECT_EQ(now.peer_pid, ::getpid());
    EXPECT_EQ(now.of(RequestKind::kRead).requests, 150U);
    EXPECT_EQ(now.of(RequestKind::kWrite).requests, 150U);
    EXPECT_EQ(now.of(RequestKind::kRead).bytes, now.of(RequestKind::kWrite).bytes);
    EXPECT_EQ(now.of(RequestKind::kDiscard).bytes, 8192U);
    EXPECT_EQ(now.of(RequestKind::kWriteZeroes).bytes, 512U);
    EXPECT_EQ(now.of(RequestKind::kFlush).requests, 1U);
    EXPECT_EQ(now.of(RequestKind::kGetId).requests, 1U);
    EXPECT_GT(now.of(RequestKind::kRead).latency_ns, 0U);
    EXPECT_EQ(now.forced_disconnects, 0U);
}

INSTANTIATE_TEST_SUITE_P(Rings, RequestTest,
                         ::testing::Values(RingVariant{"Plain", false, false, UINT32_MAX, false},
                                           RingVariant{"EventIndex", false, true, 4096, false},
                                           RingVariant{"Indirect", true, false, 512, false},
                                           RingVariant{"Both", true, true, 4096, false},
                                           RingVariant{"ThroughThePool", true, true, UINT32_MAX,
                                                       true}),
                         [](const auto& variant) { return std::string(variant.param.name); });

TEST_F(VhostTest, DepthKeepsEveryRequestApart) {
    attach_one({.queues = 4});
    GuestOptions options;
    options.queues = 4;
    options.ram_bytes = 64 * kMiB;
    TestGuest guest(options);
    guest.connect(socket());

    for (bool would_block : {false, true}) {
        disk_->set_would_block(would_block);
        struct Slot {
            std::unique_ptr<BlkSlot> memory;
            std::vector<std::byte> data;
            uint64_t offset = 0;
        };
        // Every queue holds 64 writes at once, then 64 reads of the same places.
        std::vector<std::vector<Slot>> slots(4);
        for (uint32_t type : {kBlkOut, kBlkIn}) {
            for (uint16_t q = 0; q < 4; ++q) {
                slots[q].resize(64);
                for (unsigned i = 0; i < 64; ++i) {
                    Slot& slot = slots[q][i];
                    if (!slot.memory) {
                        slot.memory = std::make_unique<BlkSlot>(*guest.ram, 4096);
                        slot.offset = (q * 64 + i) * uint64_t{8192};
                        slot.data = pattern(4096, q * 64 + i + (would_block ? 1000 : 0));
                    }
                    std::ranges::copy(type == kBlkOut ? slot.data : std::vector<std::byte>(4096),
                                      slot.memory->data().begin());
                    ASSERT_TRUE(guest.queue(q).add(
                        slot.memory->prepare(type, slot.offset >> kSectorShift, 4096)));
                }
                guest.queue(q).kick_if_wanted();
            }
            for (uint16_t q = 0; q < 4; ++q) {
                while (guest.queue(q).outstanding() > 0) {
                    ASSERT_TRUE(guest.queue(q).wait(kTimeout));
                    while (guest.queue(q).take_used()) {
                    }
                }
                for (Slot& slot : slots[q]) {
                    ASSERT_EQ(slot.memory->status(), kBlkStatusOk);
                    ASSERT_TRUE(equal(slot.memory->data(), slot.data));
                    ASSERT_TRUE(equal(on_disk(slot.offset, 4096), slot.data));
                }
            }
        }
    }
}

TEST_F(VhostTest, LargeTransfersLeaveTheDataThreadAndArrive) {
    attach_one();
    GuestOptions options;
    options.ram_bytes = 40 * kMiB;
    TestGuest guest(options);
    guest.connect(socket());
    constexpr uint32_t kBytes = 16 * kMiB;
    BlkSlot slot(*guest.ram, kBytes, 1 << 20);
    std::vector<std::byte> data = pattern(kBytes, 7);
    for (bool would_block : {false, true}) {
        disk_->set_would_block(would_block);
        std::ranges::copy(data, slot.data().begin());
        ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkOut, 8, kBytes)));
        guest.queue().kick_if_wanted();
        ASSERT_TRUE(guest.queue().wait(kTimeout));
        guest.queue().take_used();
        ASSERT_EQ(slot.status(), kBlkStatusOk);
        ASSERT_TRUE(equal(on_disk(4096, kBytes), data));
        std::ranges::fill(slot.data(), std::byte{0});
        ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 8, kBytes)));
        guest.queue().kick_if_wanted();
        ASSERT_TRUE(guest.queue().wait(kTimeout));
        EXPECT_EQ(guest.queue().take_used().value_or(UsedElement{}).length, kBytes + 1);
        ASSERT_TRUE(equal(slot.data(), data));
    }
}

TEST_F(VhostTest, RequestsThatCannotBeDoneGetAStatusAndNothingElse) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    BlkDriver& driver = guest.driver();
    uint64_t sectors = kDiskBytes / 512;
    struct Case {
        const char* name;
        uint32_t type;
        uint64_t sector;
        uint32_t bytes;
        uint8_t status;
    };
    for (const Case& c : {
             Case{"read behind the end", kBlkIn, sectors, 512, kBlkStatusIoError},
             Case{"read across the end", kBlkIn, sectors - 1, 1024, kBlkStatusIoError},
             Case{"write across the end", kBlkOut, sectors - 1, 1024, kBlkStatusIoError},
             Case{"sector that wraps around", kBlkIn, UINT64_MAX, 512, kBlkStatusIoError},
             Case{"offset that wraps around", kBlkOut, UINT64_MAX / 512 + 1, 512,
                  kBlkStatusIoError},
             Case{"half a sector", kBlkIn, 0, 256, kBlkStatusIoError},
             Case{"no data", kBlkIn, 0, 0, kBlkStatusOk},
             Case{"last sector", kBlkIn, sectors - 1, 512, kBlkStatusOk},
             Case{"SCSI command", 2, 0, 512, kBlkStatusUnsupported},
             Case{"secure erase", 14, 0, 16, kBlkStatusUnsupported},
             Case{"no such type", 0xffffffff, 0, 0, kBlkStatusUnsupported},
             Case{"discard without ranges", kBlkDiscard, 0, 0, kBlkStatusIoError},
             Case{"discard with half a range", kBlkDiscard, 0, 24, kBlkStatusIoError},
             Case{"discard with too many ranges", kBlkDiscard, 0, (kMaxDiscardSegments + 1) * 16,
                  kBlkStatusIoError},
         }) {
        std::ranges::fill(driver.slot().data().first(4096), std::byte{0});
        EXPECT_EQ(value_of(driver.run(c.type, c.sector, c.bytes), c.name), c.status) << c.name;
    }
    struct RangeCase {
        const char* name;
        uint32_t type;
        BlkRange range;
        uint8_t status;
    };
    for (const RangeCase& c : {
             RangeCase{
                 "discard with the unmap flag", kBlkDiscard, {0, 8, 1}, kBlkStatusUnsupported},
             RangeCase{
                 "zeroes with an unknown flag", kBlkWriteZeroes, {0, 8, 2}, kBlkStatusUnsupported},
             RangeCase{
                 "discard across the end", kBlkDiscard, {sectors - 1, 2, 0}, kBlkStatusIoError},
             RangeCase{"discard that wraps", kBlkDiscard, {UINT64_MAX, 8, 0}, kBlkStatusIoError},
             RangeCase{"zeroes that are too many",
                       kBlkWriteZeroes,
                       {0, UINT32_MAX, 0},
                       kBlkStatusIoError},
             RangeCase{"zeroes of nothing", kBlkWriteZeroes, {0, 0, 0}, kBlkStatusOk},
         }) {
        EXPECT_EQ(value_of(driver.ranges(c.type, std::span(&c.range, 1)), c.name), c.status)
            << c.name;
    }
    EXPECT_EQ(status().forced_disconnects, 0U);

    disk_->set_failure(std::make_shared<Error>(ErrorCode::kNoSpace, "the store is full"));
    std::vector<std::byte> sector(512);
    EXPECT_EQ(value_of(driver.write(0, sector), "write"), kBlkStatusIoError);
    EXPECT_EQ(value_of(driver.flush(), "flush"), kBlkStatusIoError);
    EXPECT_NE(log().find("the store is full"), std::string::npos);
    disk_->set_failure(nullptr);
    EXPECT_EQ(value_of(driver.write(0, sector), "write"), kBlkStatusOk);
    EXPECT_EQ(status().of(RequestKind::kFlush).errors, 1U);
}

TEST_F(VhostTest, ReadOnlyRefusesWhatWouldChange) {
    for (bool by_device : {false, true}) {
        auto disk = value_of(MemoryDisk::create(kMiB), "disk");
        disk->set_read_only(by_device);
        attach("ro", disk, {.read_only = !by_device});
        TestGuest guest;
        guest.connect(socket("ro"));
        EXPECT_NE(guest.client->features() & feature_bit(kBlkFeatureReadOnly), 0U);
        EXPECT_EQ(guest.client->features() & feature_bit(kBlkFeatureDiscard), 0U);
        std::vector<std::byte> sector(512, std::byte{1});
        EXPECT_EQ(value_of(guest.driver().write(0, sector), "write"), kBlkStatusIoError);
        EXPECT_EQ(value_of(guest.driver().discard(0, 512), "discard"), kBlkStatusIoError);
        EXPECT_EQ(value_of(guest.driver().write_zeroes(0, 512), "zeroes"), kBlkStatusIoError);
        EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
        EXPECT_EQ(value_of(guest.driver().flush(), "flush"), kBlkStatusOk);
        EXPECT_EQ(disk->writes(), 0U);
        STELLARIUM_EXPECT_OK(server_->detach("ro"));
    }
}

TEST_F(VhostTest, WithoutTheFlushFeatureEveryWriteIsFlushed) {
    attach_one();
    for (bool would_block : {false, true}) {
        disk_->set_would_block(would_block);
        GuestOptions options;
        options.features &= ~feature_bit(kBlkFeatureFlush);
        TestGuest guest(options);
        guest.connect(socket());
        uint64_t before = disk_->flushes();
        std::vector<std::byte> sector(512, std::byte{1});
        EXPECT_EQ(value_of(guest.driver().write(0, sector), "write"), kBlkStatusOk);
        EXPECT_EQ(disk_->flushes(), before + 1);
        EXPECT_EQ(value_of(guest.driver().discard(0, 512), "discard"), kBlkStatusOk);
        EXPECT_EQ(disk_->flushes(), before + 2);
        EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
        EXPECT_EQ(disk_->flushes(), before + 2);
    }
}

// ---- Notifications ------------------------------------------------------------------------------

TEST_F(VhostTest, EventIndexCallsOnlyWhenAsked) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    DriverQueue& queue = guest.queue();
    std::vector<std::byte> sector(512);
    ASSERT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);

    // All further completions but the tenth are not worth a call.
    uint16_t wanted = static_cast<uint16_t>(queue.used_taken() + 9);
    queue.set_used_event(wanted);
    queue.calls();
    std::vector<std::unique_ptr<BlkSlot>> slots;
    for (int i = 0; i < 20; ++i) {
        slots.push_back(std::make_unique<BlkSlot>(*guest.ram, 512));
        ASSERT_TRUE(queue.add(slots.back()->prepare(kBlkIn, 0, 512)));
        queue.kick();
        ASSERT_TRUE(queue.spin(kTimeout));
        queue.take_used();
    }
    EXPECT_EQ(queue.calls(), 1U);
}

TEST_F(VhostTest, NoInterruptFlagIsHonoured) {
    attach_one();
    GuestOptions options;
    options.features &= ~feature_bit(kFeatureEventIdx);
    TestGuest guest(options);
    guest.connect(socket());
    DriverQueue& queue = guest.queue();
    BlkSlot slot(*guest.ram, 512);
    queue.calls();
    queue.set_available_flags(kAvailNoInterrupt);
    for (int i = 0; i < 5; ++i) {
        ASSERT_TRUE(queue.add(slot.prepare(kBlkIn, 0, 512)));
        queue.kick();
        ASSERT_TRUE(queue.spin(kTimeout));
        queue.take_used();
    }
    EXPECT_EQ(value_of(guest.client->stop_queue(0), "stop"), 5U);  // A call would be out by now.
    EXPECT_EQ(queue.calls(), 0U);
}

TEST_F(VhostTest, RingsWithoutDescriptorsArePolled) {
    attach_one();
    TestGuest guest;
    guest.connect_only(socket());
    Client& client = *guest.client;
    STELLARIUM_EXPECT_OK(client.share(*guest.ram));
    STELLARIUM_EXPECT_OK(client.tell(MessageType::kSetVringNum, bytes_of(VringState{0, 128})));
    STELLARIUM_EXPECT_OK(
        client.tell(MessageType::kSetVringAddr, bytes_of(guest.queue().addresses(0))));
    for (MessageType type :
         {MessageType::kSetVringCall, MessageType::kSetVringErr, MessageType::kSetVringKick}) {
        STELLARIUM_EXPECT_OK(client.tell(type, bytes_of(U64Le(kVringNoFd))));
    }
    STELLARIUM_EXPECT_OK(client.tell(MessageType::kSetVringEnable, bytes_of(VringState{0, 1})));
    BlkSlot slot(*guest.ram, 512);
    for (int i = 0; i < 3; ++i) {
        ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 512)));
        ASSERT_TRUE(guest.queue().spin(kTimeout));
        guest.queue().take_used();
        EXPECT_EQ(slot.status(), kBlkStatusOk);
    }
}

TEST_F(VhostTest, SocketsServeAsKickAndCall) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    std::array<int, 2> kick{};
    std::array<int, 2> call{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, kick.data()), 0);
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, call.data()), 0);
    UniqueFd kick_ours(kick[0]);
    UniqueFd kick_theirs(kick[1]);
    UniqueFd call_ours(call[0]);
    UniqueFd call_theirs(call[1]);
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetVringKick, bytes_of(U64Le(0)), std::span(&kick[1], 1)));
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetVringCall, bytes_of(U64Le(0)), std::span(&call[1], 1)));
    BlkSlot slot(*guest.ram, 512);
    for (int i = 0; i < 3; ++i) {
        guest.queue().set_used_event(guest.queue().used_taken());
        ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 512)));
        uint64_t one = 1;
        ASSERT_EQ(::write(kick_ours.get(), &one, sizeof(one)), 8);
        ASSERT_EQ(::read(call_ours.get(), &one, sizeof(one)), 8);
        ASSERT_TRUE(guest.queue().spin(kTimeout));
        guest.queue().take_used();
    }
    kick_ours.reset();  // The server drops its end and must not spin on it.
    std::vector<std::byte> sector(512);
    int eventfd = guest.queue().kick_fd();
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetVringKick, bytes_of(U64Le(0)), std::span(&eventfd, 1)));
    int call_fd = guest.queue().call_fd();
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetVringCall, bytes_of(U64Le(0)), std::span(&call_fd, 1)));
    EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
}

// ---- Configuration ------------------------------------------------------------------------------

TEST_F(VhostTest, ConfigurationSpaceOfAnySize) {
    attach_one({.queues = 3, .block_size_bytes = 4096});
    TestGuest guest;
    guest.connect_only(socket());
    BlkConfig config = value_of(guest.client->config(), "config");
    EXPECT_EQ(config.capacity_sectors, kDiskBytes / 512);
    EXPECT_EQ(config.blk_size, 4096U);
    EXPECT_EQ(config.queues, 3U);
    EXPECT_EQ(config.seg_max, kSegMax);
    EXPECT_EQ(config.size_max, kSizeMaxBytes);
    EXPECT_EQ(config.discard_alignment_sectors, 8U);
    EXPECT_EQ(config.max_discard_segments, kMaxDiscardSegments);
    EXPECT_EQ(value_of(guest.client->ask_u64(MessageType::kGetQueueNum), "queues"), 3U);

    std::vector<std::byte> whole = value_of(guest.client->get_config(0, kMaxConfigBytes), "all");
    EXPECT_TRUE(equal(Bytes(whole).first(sizeof(config)), bytes_of(config)));
    EXPECT_TRUE(all_zero(Bytes(whole).subspan(sizeof(config))));
    for (uint32_t offset : {0U, 1U, 7U, 20U, 59U, 60U, 61U, 255U, 256U}) {
        for (uint32_t size : {0U, 1U, 3U, 8U, 61U}) {
            Result<std::vector<std::byte>> part = guest.client->get_config(offset, size);
            if (offset + size > kMaxConfigBytes) {
                EXPECT_FALSE(part) << offset << " " << size;
            } else {
                ASSERT_TRUE(part) << offset << " " << size;
                EXPECT_TRUE(equal(*part, Bytes(whole).subspan(offset, size)));
            }
        }
    }
    EXPECT_FALSE(guest.client->get_config(UINT32_MAX, 1));
    // User-mode Linux sends the header with no room behind it.
    STELLARIUM_EXPECT_OK(
        guest.client->send(MessageType::kGetConfig, bytes_of(ConfigHeader{0, 8, 0})));
    Message answer = value_of(guest.client->receive(), "config");
    EXPECT_EQ(answer.payload.size(), sizeof(ConfigHeader) + 8);

    struct {
        ConfigHeader header{0, 8, 0};
        U64Le capacity{1};
    } write;
    EXPECT_FALSE(guest.client->tell(MessageType::kSetConfig, bytes_of(write)));
    write.header.flags = kConfigForMigration;
    STELLARIUM_EXPECT_OK(guest.client->tell(MessageType::kSetConfig, bytes_of(write)));
    EXPECT_EQ(value_of(guest.client->config(), "config").capacity_sectors, kDiskBytes / 512);
    EXPECT_EQ(status().forced_disconnects, 0U);
}

TEST_F(VhostTest, AGrownDiskIsToldAndUsable) {
    disk_->resize(kMiB);
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    UniqueFd channel = value_of(guest.client->open_backend_channel(), "channel");
    std::vector<std::byte> sector(512);
    EXPECT_EQ(value_of(guest.driver().read(kMiB, sector), "read"), kBlkStatusIoError);

    disk_->resize(2 * kMiB);
    MessageHeader header;
    ASSERT_EQ(::recv(channel.get(), &header, sizeof(header), MSG_WAITALL),
              static_cast<ssize_t>(sizeof(header)));
    EXPECT_EQ(header.type, kBackendConfigChange);
    EXPECT_EQ(header.flags, kFlagVersion);
    EXPECT_EQ(header.size, 0U);
    EXPECT_EQ(value_of(guest.client->config(), "config").capacity_sectors, 2 * kMiB / 512);
    EXPECT_EQ(value_of(guest.driver().read(kMiB, sector), "read"), kBlkStatusOk);
}

// ---- Rings and memory ---------------------------------------------------------------------------

TEST_F(VhostTest, RingsStartEnabledWithoutProtocolFeatures) {
    attach_one();
    GuestOptions options;
    options.features &= ~feature_bit(kFeatureProtocolFeatures);
    TestGuest guest(options);
    guest.connect(socket());
    std::vector<std::byte> sector(512);
    EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
}

TEST_F(VhostTest, ADisabledRingWaits) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetVringEnable, bytes_of(VringState{0, 0})));
    BlkSlot slot(*guest.ram, 512);
    ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 512)));
    guest.queue().kick();
    // A round trip on the socket, after which the kick has been seen.
    STELLARIUM_EXPECT_OK(guest.client->config());
    EXPECT_EQ(guest.queue().used_index(), 0U);
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetVringEnable, bytes_of(VringState{0, 1})));
    EXPECT_TRUE(guest.queue().wait(kTimeout));
}

TEST_F(VhostTest, StoppingARingWaitsForItsRequests) {
    attach_one({.queues = 2});
    GuestOptions options;
    options.queues = 2;
    TestGuest guest(options);
    guest.connect(socket());
    disk_->hold();
    BlkSlot slot(*guest.ram, 512);
    ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkFlush, 0, 0)));
    guest.queue().kick();
    disk_->wait_until_held(1);
    STELLARIUM_EXPECT_OK(
        guest.client->send(MessageType::kGetVringBase, bytes_of(VringState{0, 0})));
    EXPECT_EQ(guest.queue().used_index(), 0U);
    disk_->release();
    Message answer = value_of(guest.client->receive(), "base");
    EXPECT_EQ(load<VringState>(answer.payload).num, 1U);
    EXPECT_EQ(guest.queue().used_index(), 1U);
    EXPECT_EQ(slot.status(), kBlkStatusOk);
    guest.queue().take_used();

    // Stopped: what is made available now is done after the next start, from that base.
    BlkSlot next(*guest.ram, 512);
    ASSERT_TRUE(guest.queue().add(next.prepare(kBlkIn, 0, 512)));
    guest.queue().kick();
    std::vector<std::byte> sector(512);
    EXPECT_EQ(value_of(guest.driver(1).read(0, sector), "other queue"), kBlkStatusOk);
    EXPECT_EQ(guest.queue().used_index(), 1U);
    STELLARIUM_EXPECT_OK(guest.client->start_queue(0, guest.queue(), 1));
    ASSERT_TRUE(guest.queue().wait(kTimeout));
    EXPECT_EQ(next.status(), kBlkStatusOk);
}

TEST_F(VhostTest, ResetsStopEverythingAndCanBeStartedAgain) {
    attach_one();
    uint64_t protocol =
        kUsualProtocolFeatures | bit(ProtocolFeature::kResetDevice) | bit(ProtocolFeature::kStatus);
    for (MessageType reset : {MessageType::kResetDevice, MessageType::kSetStatus}) {
        GuestOptions options;
        options.protocol_features = protocol;
        TestGuest guest(options);
        guest.connect(socket());
        STELLARIUM_EXPECT_OK(guest.client->tell(MessageType::kSetStatus, bytes_of(U64Le(0xf))));
        EXPECT_EQ(value_of(guest.client->ask_u64(MessageType::kGetStatus), "status"), 0xfU);
        std::vector<std::byte> sector(512);
        EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
        STELLARIUM_EXPECT_OK(guest.client->tell(
            reset, reset == MessageType::kSetStatus ? bytes_of(U64Le(0)) : Bytes()));
        EXPECT_EQ(value_of(guest.client->ask_u64(MessageType::kGetStatus), "status"), 0U);

        BlkSlot slot(*guest.ram, 512);
        ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 512)));
        guest.queue().kick();
        STELLARIUM_EXPECT_OK(guest.client->config());
        EXPECT_EQ(guest.queue().used_index(), 1U);
        STELLARIUM_EXPECT_OK(guest.client->start_queue(0, guest.queue(), 1));
        ASSERT_TRUE(guest.queue().wait(kTimeout));
        EXPECT_EQ(slot.status(), kBlkStatusOk);
        STELLARIUM_EXPECT_OK(guest.client->tell(MessageType::kResetOwner, {}));
    }
}

TEST_F(VhostTest, MemorySlotsComeAndGo) {
    attach_one();
    GuestOptions options;
    options.protocol_features |= bit(ProtocolFeature::kConfigureMemSlots);
    TestGuest guest(options);
    guest.connect(socket());
    EXPECT_EQ(value_of(guest.client->ask_u64(MessageType::kGetMaxMemSlots), "slots"),
              kMaxMemorySlots);
    std::vector<std::byte> data = pattern(8192, 3);
    ASSERT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);

    // A second region right behind the first, mapped from an offset that is no page boundary, so
    // that a buffer can lie across the two.
    auto more = value_of(GuestRam::create(kMiB), "more memory");
    SingleRegion region;
    uint64_t end = GuestRam::kGuestBase + guest.ram->size_bytes();
    region.region =
        RegionDescription{end, 65536, GuestRam::kUserBase + guest.ram->size_bytes(), 512};
    int fd = more->fd();
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kAddMemReg, bytes_of(region), std::span(&fd, 1)));
    std::byte* tail = guest.ram->data() + guest.ram->size_bytes() - 4096;
    BlkSlot slot(*guest.ram, 512);
    std::span<const Buffer> made = slot.prepare(kBlkIn, 0, 0);
    std::vector<Buffer> buffers = {made[0], Buffer{end - 4096, 8192, true}, made[1]};
    ASSERT_TRUE(guest.queue().add(buffers));
    guest.queue().kick();
    ASSERT_TRUE(guest.queue().wait(kTimeout));
    guest.queue().take_used();
    EXPECT_EQ(slot.status(), kBlkStatusOk);
    EXPECT_TRUE(equal(Bytes(tail, 4096), Bytes(data).first(4096)));
    EXPECT_TRUE(equal(Bytes(more->data() + 512, 4096), Bytes(data).subspan(4096)));

    STELLARIUM_EXPECT_OK(guest.client->tell(MessageType::kRemMemReg, bytes_of(region)));
    EXPECT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
    ASSERT_TRUE(guest.queue().add(buffers));
    guest.queue().kick();
    EXPECT_TRUE(guest.client->wait_closed());
    EXPECT_NE(status().last_fault.find("outside guest memory"), std::string::npos);
}

TEST_F(VhostTest, MemoryTableIsReplacedUnderARunningRing) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    std::vector<std::byte> data = pattern(4096, 3);
    for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
        STELLARIUM_EXPECT_OK(guest.client->share(*guest.ram));
    }
    EXPECT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
}

// ---- Attachments --------------------------------------------------------------------------------

TEST_F(VhostTest, ARingThatIsFoundAgainByItsAddressesGoesOn) {
    attach_one();
    TestGuest guest;
    guest.connect(socket());
    // The front-end maps the guest elsewhere, and a kick comes before the new addresses.
    constexpr uint64_t kShift = uint64_t{1} << 40;
    struct {
        MemoryTableHeader header;
        RegionDescription region;
    } table;
    table.header.regions = 1;
    table.region = RegionDescription{GuestRam::kGuestBase, guest.ram->size_bytes(),
                                     GuestRam::kUserBase + kShift, 0};
    int fd = guest.ram->fd();
    STELLARIUM_EXPECT_OK(
        guest.client->tell(MessageType::kSetMemTable, bytes_of(table), std::span(&fd, 1)));
    BlkSlot slot(*guest.ram, 4096);
    ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 4096)));
    guest.queue().kick();
    // Each answer comes from a turn of its own: the kick has been seen.
    STELLARIUM_EXPECT_OK(guest.client->config());
    STELLARIUM_EXPECT_OK(guest.client->config());
    EXPECT_EQ(guest.queue().used_index(), 0U);
    VringAddress addresses = guest.queue().addresses(0);
    addresses.descriptor = addresses.descriptor + kShift;
    addresses.available = addresses.available + kShift;
    addresses.used = addresses.used + kShift;
    STELLARIUM_EXPECT_OK(guest.client->tell(MessageType::kSetVringAddr, bytes_of(addresses)));
    ASSERT_TRUE(guest.queue().wait(kTimeout));
    EXPECT_EQ(slot.status(), kBlkStatusOk);
}

TEST_F(VhostTest, OneFrontEndAtATimeAndTheNextInTurn) {
    attach_one();
    auto first = std::make_unique<TestGuest>();
    first->connect(socket());
    disk_->hold();
    BlkSlot slot(*first->ram, 512);
    ASSERT_TRUE(first->queue().add(slot.prepare(kBlkOut, 0, 512)));
    first->queue().kick();
    disk_->wait_until_held(1);

    // The second is not answered while the first is there, nor while its request is on its way.
    auto second = value_of(Client::connect(socket()), "second");
    STELLARIUM_EXPECT_OK(second->send(MessageType::kGetFeatures, {}));
    first.reset();
    EXPECT_EQ(disk_->writes(), 0U);
    disk_->release();
    STELLARIUM_EXPECT_OK(second->receive());
    EXPECT_EQ(disk_->writes(), 1U);
    EXPECT_EQ(status().connections, 2U);
}

TEST_F(VhostTest, DetachFinishesWhatWasBegunAndGivesUpTheRest) {
    attach_one();
    attach("two", disk_);
    attach("three", disk_);  // So that each data thread has one that is not being detached.
    GuestOptions options;
    options.inflight = true;
    TestGuest guest(options);
    guest.connect(socket());
    disk_->hold();
    std::vector<std::unique_ptr<BlkSlot>> slots;
    for (int i = 0; i < 10; ++i) {
        slots.push_back(std::make_unique<BlkSlot>(*guest.ram, 512));
        ASSERT_TRUE(guest.queue().add(
            slots.back()->prepare(i % 2 == 0 ? kBlkOut : kBlkFlush, 0, i % 2 == 0 ? 512 : 0)));
    }
    guest.queue().kick();
    disk_->wait_until_held(6);  // One of the writes, and the five flushes.
    EXPECT_EQ(status().in_flight, 10U);
    std::thread detaching([&] { STELLARIUM_EXPECT_OK(server_->detach("one")); });
    while (std::filesystem::exists(socket())) {
        std::this_thread::yield();
    }
    // The file goes in the task that gives up; whatever the thread answers afterwards comes later.
    for (const char* name : {"two", "three"}) {
        TestGuest other;
        other.connect_only(socket(name));
    }
    disk_->release();
    detaching.join();
    EXPECT_EQ(guest.queue().used_index(), 6U);
    EXPECT_EQ(disk_->writes(), 1U);
    EXPECT_TRUE(guest.client->wait_closed());
    EXPECT_FALSE(std::filesystem::exists(socket()));
    EXPECT_FALSE(server_->detach("one"));
    EXPECT_FALSE(server_->status("one"));
    // The next back-end finds the rest.
    attach_one();
    guest.connect(socket());
    while (guest.queue().outstanding() > 0) {
        ASSERT_TRUE(guest.queue().wait(kTimeout));
        while (guest.queue().take_used()) {
        }
    }
    for (const auto& slot : slots) {
        EXPECT_EQ(slot->status(), kBlkStatusOk);
    }
    EXPECT_EQ(disk_->writes(), 5U);
}

TEST_F(VhostTest, StoppingARingWaitsForWhatWasInFlightBeforeACrash) {
    attach_one({.queues = 2});
    GuestOptions options;
    options.queues = 2;
    options.queue_size = 512;
    options.inflight = true;
    TestGuest guest(options);
    guest.connect(socket());
    disk_->hold();
    std::vector<std::unique_ptr<BlkSlot>> slots;
    for (int i = 0; i < 10; ++i) {
        slots.push_back(std::make_unique<BlkSlot>(*guest.ram, 512));
        ASSERT_TRUE(guest.queue(0).add(slots.back()->prepare(kBlkOut, 0, 512)));
    }
    guest.queue(0).kick();
    disk_->wait_until_held(1);
    while (status().in_flight < 10) {
        std::this_thread::yield();
    }
    // The back-end goes, and gives up the nine that it has not begun.
    std::thread detaching([&] { STELLARIUM_EXPECT_OK(server_->detach("one")); });
    while (std::filesystem::exists(socket())) {
        std::this_thread::yield();
    }
    disk_->release();
    detaching.join();
    const uint16_t done = guest.queue(0).used_index();
    ASSERT_LT(done, 10U);

    // The next one has as much to do as it may, so it cannot take them up at once...
    attach_one({.queues = 2});
    disk_->hold();
    guest.connect_only(socket());
    STELLARIUM_EXPECT_OK(guest.client->share(*guest.ram));
    STELLARIUM_EXPECT_OK(guest.client->set_inflight(guest.inflight_fd, guest.inflight_layout));
    BlkSlot flush(*guest.ram, 512);
    for (size_t i = 0; i < kMaxAsyncRequests; ++i) {
        ASSERT_TRUE(guest.queue(1).add(flush.prepare(kBlkFlush, 0, 0)));
    }
    STELLARIUM_EXPECT_OK(guest.client->start_queue(1, guest.queue(1), 0));
    disk_->wait_until_held(kMaxAsyncRequests);
    STELLARIUM_EXPECT_OK(guest.client->start_queue(0, guest.queue(0), done));
    STELLARIUM_EXPECT_OK(guest.client->config());
    // ... and is asked where the ring stands, which says that all before it is done.
    STELLARIUM_EXPECT_OK(
        guest.client->send(MessageType::kGetVringBase, bytes_of(VringState{0, 0})));
    disk_->release();
    Message answer = value_of(guest.client->receive(), "base");
    EXPECT_EQ(load<VringState>(answer.payload).num, 10U);
    EXPECT_EQ(guest.queue(0).used_index(), 10U);
    for (const auto& slot : slots) {
        EXPECT_EQ(slot->status(), kBlkStatusOk);
    }
}

/// A disk of zeros that says in which mode it was asked, and makes the first read wait at a gate.
class ProbeDisk : public BlockDevice {
  public:
    explicit ProbeDisk(std::function<void(uint64_t length_bytes, IoMode mode)> on_request)
        : on_request_(std::move(on_request)) {}

    uint64_t size_bytes() const override { return kGiB; }
    bool read_only() const override { return false; }
    std::string serial() const override { return {}; }
    Result<void> read(uint64_t, std::span<const iovec> into, IoMode mode) override {
        uint64_t length_bytes = 0;
        for (const iovec& part : into) {
            length_bytes += part.iov_len;
        }
        on_request_(length_bytes, mode);
        return {};
    }
    Result<void> write(uint64_t, std::span<const iovec>, IoMode) override { return {}; }
    Result<void> discard(uint64_t, uint64_t length_bytes, IoMode mode) override {
        on_request_(length_bytes, mode);
        return {};
    }
    Result<void> write_zeroes(uint64_t offset, uint64_t length_bytes, IoMode mode) override {
        return discard(offset, length_bytes, mode);
    }
    void flush_async(std::function<void(Result<void>)> done) override { done({}); }
    void set_resize_listener(std::function<void(uint64_t)>) override {}

  private:
    std::function<void(uint64_t, IoMode)> on_request_;
};

TEST_F(VhostTest, DiscardsOfManyOrLongRangesLeaveTheDataThread) {
    std::mutex mutex;
    std::vector<IoMode> modes;
    auto probe = std::make_shared<ProbeDisk>([&](uint64_t, IoMode mode) {
        std::lock_guard lock(mutex);
        modes.push_back(mode);
    });
    STELLARIUM_EXPECT_OK(server_->attach("probe", probe, {.socket_path = socket("probe")}));
    TestGuest guest;
    guest.connect(socket("probe"));
    auto modes_of = [&](uint32_t kind, const std::vector<BlkRange>& ranges) {
        {
            std::lock_guard lock(mutex);
            modes.clear();
        }
        auto bytes = static_cast<uint32_t>(ranges.size() * sizeof(BlkRange));
        BlkSlot slot(*guest.ram, bytes);
        std::memcpy(slot.data().data(), ranges.data(), bytes);
        EXPECT_TRUE(guest.queue().add(slot.prepare(kind, 0, bytes)));
        guest.queue().kick();
        EXPECT_TRUE(guest.queue().wait(kTimeout));
        EXPECT_TRUE(guest.queue().take_used());
        EXPECT_EQ(slot.status(), kBlkStatusOk);
        std::lock_guard lock(mutex);
        return modes;
    };
    constexpr uint32_t kInlineSectors = kInlineRangeBytes / 512;
    for (uint32_t kind : {kBlkDiscard, kBlkWriteZeroes}) {
        EXPECT_EQ(modes_of(kind, {{0, kInlineSectors, 0}}), std::vector{IoMode::kNoWait});
        EXPECT_EQ(modes_of(kind, {{0, kInlineSectors + 8, 0}}), std::vector{IoMode::kMayBlock});
        EXPECT_EQ(modes_of(kind, {{0, 8, 0}, {8, 8, 0}}), std::vector(2, IoMode::kMayBlock));
    }
}

TEST_F(VhostTest, ATurnIsBoundedForTheDeviceNotForEachRing) {
    ServerOptions one_thread;
    one_thread.data_threads = 1;
    server_ = value_of(VhostServer::create(one_thread), "server");
    std::promise<void> entered;
    std::promise<void> gate;
    std::atomic<bool> first{true};
    std::atomic<uint64_t> greedy_bytes{0};
    std::atomic<uint64_t> before_modest{0};
    auto greedy = std::make_shared<ProbeDisk>([&](uint64_t length_bytes, IoMode) {
        if (first.exchange(false)) {
            entered.set_value();
            gate.get_future().wait();
        }
        greedy_bytes += length_bytes;
    });
    auto modest =
        std::make_shared<ProbeDisk>([&](uint64_t, IoMode) { before_modest = greedy_bytes.load(); });
    AttachOptions attach_options{.socket_path = socket("greedy"), .queues = 8};
    STELLARIUM_EXPECT_OK(server_->attach("greedy", greedy, attach_options));
    STELLARIUM_EXPECT_OK(server_->attach("modest", modest, {.socket_path = socket("modest")}));
    GuestOptions options;
    options.queues = 8;
    TestGuest bad(options);
    bad.connect(socket("greedy"));
    TestGuest good;
    good.connect(socket("modest"));
    // The data thread stands in the first request while everything else arrives.
    BlkSlot opener(*bad.ram, 4096);
    ASSERT_TRUE(bad.queue(7).add(opener.prepare(kBlkIn, 0, 4096)));
    bad.queue(7).kick();
    entered.get_future().wait();
    BlkSlot big(*bad.ram, kInlineBytes);
    for (uint16_t q = 0; q < 8; ++q) {
        // All of them into the same buffer: nobody reads it.
        for (int i = 0; i < 40; ++i) {
            ASSERT_TRUE(bad.queue(q).add(big.prepare(kBlkIn, 0, kInlineBytes)));
        }
        bad.queue(q).kick();
    }
    BlkSlot small(*good.ram, 4096);
    ASSERT_TRUE(good.queue().add(small.prepare(kBlkIn, 0, 4096)));
    good.queue().kick();
    gate.set_value();
    ASSERT_TRUE(good.queue().wait(kTimeout));
    // What was left of the turn under way, and perhaps one more.
    EXPECT_LE(before_modest, 2 * (kTurnBudgetBytes + kInlineBytes));
    for (uint16_t q = 0; q < 8; ++q) {
        while (bad.queue(q).outstanding() > 0) {
            ASSERT_TRUE(bad.queue(q).wait(kTimeout));
            while (bad.queue(q).take_used()) {
            }
        }
    }
    EXPECT_EQ(greedy_bytes.load(), 4096 + 8 * 40 * kInlineBytes);
    server_->shutdown();
}

TEST_F(VhostTest, AStalledDeviceStallsOnlyItself) {
    attach_one();
    auto healthy = value_of(MemoryDisk::create(kDiskBytes), "disk");
    attach("two", healthy);
    attach("three", healthy);  // So that both data threads have one of them.
    TestGuest stalled;
    stalled.connect(socket());
    disk_->hold();
    // More than the blocking pool has threads, reads and writes.
    std::vector<std::unique_ptr<BlkSlot>> slots;
    for (int i = 0; i < 40; ++i) {
        slots.push_back(std::make_unique<BlkSlot>(*stalled.ram, 4096));
        ASSERT_TRUE(
            stalled.queue().add(slots.back()->prepare(i % 2 == 0 ? kBlkOut : kBlkIn, 0, 4096)));
    }
    stalled.queue().kick();
    disk_->wait_until_held(2);
    for (const char* name : {"two", "three"}) {
        TestGuest guest;
        guest.connect(socket(name));
        std::vector<std::byte> data = pattern(4096, 1);
        for (bool would_block : {false, true}) {
            healthy->set_would_block(would_block);
            ASSERT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
            ASSERT_EQ(value_of(guest.driver().read(0, data), "read"), kBlkStatusOk);
        }
    }
    EXPECT_EQ(stalled.queue().used_index(), 0U);
    disk_->release();
    while (stalled.queue().outstanding() > 0) {
        ASSERT_TRUE(stalled.queue().wait(kTimeout));
        stalled.queue().take_used();
    }
}

TEST_F(VhostTest, ManyStalledDevicesLeaveAThreadForTheHealthyOne) {
    // One more than the write lane keeps threads.
    GuestOptions options;
    options.ram_bytes = 2 * kMiB;
    std::vector<std::shared_ptr<MemoryDisk>> disks;
    std::vector<std::unique_ptr<TestGuest>> guests;
    std::vector<std::unique_ptr<BlkSlot>> slots;
    for (int i = 0; i < 6; ++i) {
        std::string name = "d" + std::to_string(i);
        disks.push_back(value_of(MemoryDisk::create(kMiB), "disk"));
        attach(name, disks.back());
        guests.push_back(std::make_unique<TestGuest>(options));
        guests.back()->connect(socket(name));
        slots.push_back(std::make_unique<BlkSlot>(*guests.back()->ram, 4096));
        // A write that has to read a page first.
        disks.back()->set_would_block(true);
        bool healthy = i == 5;
        if (!healthy) {
            disks.back()->hold();
        }
        ASSERT_TRUE(guests.back()->queue().add(slots.back()->prepare(kBlkOut, 0, 4096)));
        guests.back()->queue().kick();
        if (!healthy) {
            disks.back()->wait_until_held(1);
        }
    }
    EXPECT_TRUE(guests.back()->queue().wait(kTimeout));
    for (const auto& disk : disks) {
        disk->release();
    }
    for (const auto& guest : guests) {
        EXPECT_TRUE(guest->queue().wait(kTimeout));
    }
}

TEST_F(VhostTest, MoreRequestsThanMayBeInFlightAreAllDone) {
    attach_one({.queues = 4});
    GuestOptions options;
    options.queues = 4;
    options.queue_size = 256;
    TestGuest guest(options);
    guest.connect(socket());
    disk_->hold();
    BlkSlot slot(*guest.ram, 512);
    for (uint16_t q = 0; q < 4; ++q) {
        for (int i = 0; i < 200; ++i) {
            ASSERT_TRUE(guest.queue(q).add(slot.prepare(kBlkFlush, 0, 0)));
        }
        guest.queue(q).kick();
    }
    disk_->wait_until_held(kMaxAsyncRequests);
    STELLARIUM_EXPECT_OK(guest.client->config());
    EXPECT_EQ(disk_->held(), kMaxAsyncRequests);
    EXPECT_EQ(status().in_flight, kMaxAsyncRequests);
    disk_->release();
    for (uint16_t q = 0; q < 4; ++q) {
        while (guest.queue(q).outstanding() > 0) {
            ASSERT_TRUE(guest.queue(q).wait(kTimeout));
            while (guest.queue(q).take_used()) {
            }
        }
    }
    EXPECT_EQ(disk_->flushes(), 800U);
}

TEST_F(VhostTest, SocketFilesAreReplacedOnlyWhenStale) {
    attach_one();
    struct stat st = {};
    ASSERT_EQ(::stat(socket().c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 0777, 0600U);
    EXPECT_TRUE(S_ISSOCK(st.st_mode));

    AttachOptions options;
    options.socket_path = socket();
    Result<void> busy = server_->attach("other", disk_, options);
    ASSERT_FALSE(busy);
    EXPECT_EQ(busy.error().code(), ErrorCode::kBusy);
    Result<void> twice = server_->attach("one", disk_, {.socket_path = socket("x")});
    ASSERT_FALSE(twice);
    EXPECT_EQ(twice.error().code(), ErrorCode::kAlreadyExists);

    std::ofstream(socket("file")) << "data";
    Result<void> file = server_->attach("file", disk_, {.socket_path = socket("file")});
    ASSERT_FALSE(file);
    EXPECT_EQ(file.error().code(), ErrorCode::kAlreadyExists);

    // A socket that nobody listens on any more.
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::string stale = socket("stale");
    stale.copy(address.sun_path, sizeof(address.sun_path) - 1);
    {
        UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM, 0));
        ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
                  0);
    }
    STELLARIUM_EXPECT_OK(server_->attach("stale", disk_, {.socket_path = stale}));
    TestGuest guest;
    guest.connect(stale);

    // What took the place of our socket is not ours to remove.
    std::filesystem::remove(stale);
    std::ofstream(stale) << "data";
    STELLARIUM_EXPECT_OK(server_->detach("stale"));
    EXPECT_TRUE(std::filesystem::exists(stale));
}

TEST_F(VhostTest, AttachChecksItsArguments) {
    auto odd = value_of(MemoryDisk::create(kMiB + 512), "disk");
    std::string path = socket("x");
    for (const AttachOptions& options : {
             AttachOptions{},
             AttachOptions{.socket_path = path, .queues = 0},
             AttachOptions{.socket_path = path, .queues = kMaxQueues + 1},
             AttachOptions{.socket_path = path, .block_size_bytes = 1024},
             AttachOptions{.socket_path = path, .block_size_bytes = 4096},
             AttachOptions{.socket_path = path, .serial = "this serial has 26 letters"},
             AttachOptions{.socket_path = std::string(200, 'x')},
         }) {
        Result<void> attached = server_->attach("x", odd, options);
        ASSERT_FALSE(attached);
        EXPECT_EQ(attached.error().code(), ErrorCode::kInvalidArgument);
    }
    UniqueFd not_listening(::socket(AF_UNIX, SOCK_STREAM, 0));
    AttachOptions given;
    given.listen_fd = not_listening.release();
    EXPECT_FALSE(server_->attach("x", odd, given));
    EXPECT_TRUE(server_->status().empty());
}

TEST_F(VhostTest, AListeningDescriptorCanBeGiven) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::string path = socket("given");
    path.copy(address.sun_path, sizeof(address.sun_path) - 1);
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ASSERT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    ASSERT_EQ(::listen(fd.get(), 4), 0);
    AttachOptions options;
    options.listen_fd = fd.release();
    STELLARIUM_EXPECT_OK(server_->attach("given", disk_, options));
    TestGuest guest;
    guest.connect(path);
    std::vector<std::byte> sector(512);
    EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
    STELLARIUM_EXPECT_OK(server_->detach("given"));
    EXPECT_TRUE(std::filesystem::exists(path));  // Whoever made it removes it.
}

TEST_F(VhostTest, ShutdownDetachesAll) {
    std::vector<std::unique_ptr<TestGuest>> guests;
    for (int i = 0; i < 10; ++i) {
        std::string name = "disk" + std::to_string(i);
        attach(name, value_of(MemoryDisk::create(kMiB), "disk"));
        if (i % 2 == 0) {
            GuestOptions options;
            options.ram_bytes = 2 * kMiB;
            guests.push_back(std::make_unique<TestGuest>(options));
            guests.back()->connect(socket(name));
        }
    }
    EXPECT_EQ(server_->status().size(), 10U);
    server_->shutdown();
    EXPECT_TRUE(server_->status().empty());
    for (auto& guest : guests) {
        EXPECT_TRUE(guest->client->wait_closed());
    }
    Result<void> late = server_->attach("late", disk_, {.socket_path = socket("late")});
    ASSERT_FALSE(late);
    EXPECT_EQ(late.error().code(), ErrorCode::kUnavailable);
}

}  // namespace
}  // namespace stellarium::vhost
