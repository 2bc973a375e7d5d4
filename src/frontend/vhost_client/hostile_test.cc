// Guests and front-ends that break the rules: each is disconnected with the reason logged, may
// connect again, and harms no one else.
#include <array>
#include <functional>
#include <random>

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "frontend/vhost/limits.h"
#include "frontend/vhost_client/test_bench.h"

namespace stellarium::vhost {
namespace {

class HostileTest : public VhostTest {
  protected:
    void SetUp() override {
        VhostTest::SetUp();
        attach_one({.queues = 2});
        // With two data threads, one of these shares the victim's.
        for (const char* name : {"two", "three"}) {
            attach(name, value_of(MemoryDisk::create(kMiB), "disk"));
            GuestOptions options;
            options.ram_bytes = 2 * kMiB;
            bystanders_.push_back(std::make_unique<TestGuest>(options));
            bystanders_.back()->connect(socket(name));
        }
    }

    void expect_thrown_out(TestGuest& guest, const std::string& reason, const std::string& name) {
        EXPECT_TRUE(guest.client->wait_closed()) << name;
        AttachmentStatus now = status();
        EXPECT_NE(now.last_fault.find(reason), std::string::npos)
            << name << ": expected '" << reason << "', got '" << now.last_fault << "'";
        EXPECT_EQ(now.forced_disconnects, ++faults_) << name;
        expect_bystanders_unharmed(name);
    }

    void expect_bystanders_unharmed(const std::string& name) {
        for (auto& bystander : bystanders_) {
            std::vector<std::byte> data = pattern(4096, ++counter_);
            std::vector<std::byte> back(4096);
            ASSERT_EQ(value_of(bystander->driver().write(8192, data), name.c_str()), kBlkStatusOk);
            ASSERT_EQ(value_of(bystander->driver().read(8192, back), name.c_str()), kBlkStatusOk);
            ASSERT_EQ(back, data) << name;
        }
    }

    static GuestOptions small() {
        GuestOptions options;
        options.queue_size = 16;
        options.ram_bytes = 2 * kMiB;
        options.protocol_features |= bit(ProtocolFeature::kResetDevice) |
                                     bit(ProtocolFeature::kStatus) |
                                     bit(ProtocolFeature::kConfigureMemSlots);
        return options;
    }

    std::vector<std::unique_ptr<TestGuest>> bystanders_;
    uint64_t faults_ = 0;
    unsigned counter_ = 0;
};

// ---- Control messages ---------------------------------------------------------------------------

struct BadMessage {
    const char* name;
    const char* reason;
    std::function<void(TestGuest&)> act;
};

/// Sends a message as it is; that it cannot be sent because the server left already is fine.
void raw(TestGuest& guest, uint32_t type, uint32_t flags, Bytes payload,
         std::vector<int> fds = {}) {
    [[maybe_unused]] Result<void> sent =
        send_message(guest.client->socket(), type, flags, payload, fds);
}

void raw(TestGuest& guest, MessageType type, Bytes payload, std::vector<int> fds = {}) {
    raw(guest, static_cast<uint32_t>(type), 0, payload, std::move(fds));
}

struct OneRegion {
    MemoryTableHeader header{1, 0};
    RegionDescription region;
};

OneRegion table_of(const TestGuest& guest) {
    OneRegion table;
    table.region = guest.ram->description();
    return table;
}

void add_region(TestGuest& guest, uint64_t guest_address, uint64_t size, uint64_t user_address,
                uint64_t offset) {
    SingleRegion single;
    single.region = RegionDescription{guest_address, size, user_address, offset};
    raw(guest, MessageType::kAddMemReg, bytes_of(single), {guest.ram->fd()});
}

std::vector<BadMessage> bad_messages() {
    using enum MessageType;
    constexpr uint64_t kFar = 0x9'0000'0000;
    return {
        {"unknown type", "unknown message 99", [](TestGuest& g) { raw(g, 99, 0, {}); }},
        {"type zero", "unknown message 0", [](TestGuest& g) { raw(g, 0, 0, {}); }},
        {"reply instead of a request", "GET_FEATURES with flags",
         [](TestGuest& g) { raw(g, 1, kFlagReply, {}); }},
        {"other protocol version", "GET_FEATURES with flags",
         [](TestGuest& g) { raw(g, 1, 2, {}); }},
        {"payload beyond any limit", "payload of 4294967295 bytes",
         [](TestGuest& g) {
             MessageHeader header{1, kFlagVersion, UINT32_MAX};
             ASSERT_EQ(::send(g.client->socket(), &header, sizeof(header), MSG_NOSIGNAL), 12);
         }},
        {"payload too short", "SET_FEATURES with a payload of 4 bytes",
         [](TestGuest& g) { raw(g, kSetFeatures, bytes_of(U32Le(0))); }},
        {"payload too long", "SET_VRING_NUM with a payload of 12 bytes",
         [](TestGuest& g) { raw(g, kSetVringNum, bytes_of(std::array<U32Le, 3>{})); }},
        {"descriptors that no one asked for", "1 descriptors",
         [](TestGuest& g) { raw(g, kSetOwner, {}, {g.ram->fd()}); }},
        {"features never offered", "were not offered",
         [](TestGuest& g) { raw(g, kSetFeatures, bytes_of(U64Le(feature_bit(63)))); }},
        {"protocol features never offered", "were not offered",
         [](TestGuest& g) { raw(g, kSetProtocolFeatures, bytes_of(U64Le(1ULL << 40))); }},
        {"feature used but not negotiated", "without negotiating",
         [](TestGuest& g) {
             raw(g, kSetProtocolFeatures, bytes_of(U64Le(0)));
             raw(g, kGetConfig, bytes_of(ConfigHeader{0, 8, 0}));
         }},

        {"more regions than descriptors", "2 regions",
         [](TestGuest& g) {
             OneRegion table = table_of(g);
             table.header.regions = 2;
             raw(g, kSetMemTable, bytes_of(table), {g.ram->fd()});
         }},
        {"regions that do not fit the payload", "8 regions in 40 bytes",
         [](TestGuest& g) {
             OneRegion table = table_of(g);
             table.header.regions = 8;
             raw(g, kSetMemTable, bytes_of(table), std::vector<int>(8, g.ram->fd()));
         }},
        {"a huge number of regions", "4294967295 regions",
         [](TestGuest& g) {
             OneRegion table = table_of(g);
             table.header.regions = UINT32_MAX;
             raw(g, kSetMemTable, bytes_of(table), {g.ram->fd()});
         }},
        {"region larger than its file", "does not lie within its file",
         [](TestGuest& g) {
             OneRegion table = table_of(g);
             table.region.size = g.ram->size_bytes() + 4096;
             raw(g, kSetMemTable, bytes_of(table), {g.ram->fd()});
         }},
        {"region whose offset wraps around", "does not lie within its file",
         [](TestGuest& g) { add_region(g, kFar, 4096, kFar, UINT64_MAX - 4095); }},
        {"region of nothing", "does not lie within its file",
         [](TestGuest& g) { add_region(g, kFar, 0, kFar, 0); }},
        {"region at the end of the address space", "wraps around",
         [](TestGuest& g) { add_region(g, UINT64_MAX - 100, 4096, kFar, 0); }},
        {"region at the end of user addresses", "wraps around",
         [](TestGuest& g) { add_region(g, kFar, 4096, UINT64_MAX - 100, 0); }},
        {"region over another one", "overlaps",
         [](TestGuest& g) { add_region(g, GuestRam::kGuestBase + 4096, 4096, kFar, 0); }},
        {"region over another's user addresses", "overlaps",
         [](TestGuest& g) { add_region(g, kFar, 4096, GuestRam::kUserBase, 0); }},
        {"memory that is a socket", "not a regular file",
         [](TestGuest& g) { raw(g, kSetMemTable, bytes_of(table_of(g)), {g.client->socket()}); }},
        {"memory that cannot be written", "mmap",
         [](TestGuest& g) {
             std::string path = "/proc/self/fd/" + std::to_string(g.ram->fd());
             UniqueFd readable(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
             raw(g, kSetMemTable, bytes_of(table_of(g)), {readable.get()});
         }},
        {"removal of a region that is not there", "to remove",
         [](TestGuest& g) {
             SingleRegion single;
             single.region = RegionDescription{kFar, 4096, kFar, 0};
             raw(g, kRemMemReg, bytes_of(single));
         }},

        {"queue that does not exist", "queue 2 of 2",
         [](TestGuest& g) { raw(g, kSetVringNum, bytes_of(VringState{2, 16})); }},
        {"queue index of all ones", "queue 4294967295 of 2",
         [](TestGuest& g) { raw(g, kGetVringBase, bytes_of(VringState{UINT32_MAX, 0})); }},
        {"ring size that is no power of two", "ring size 24",
         [](TestGuest& g) { raw(g, kSetVringNum, bytes_of(VringState{1, 24})); }},
        {"ring size of zero", "ring size 0",
         [](TestGuest& g) { raw(g, kSetVringNum, bytes_of(VringState{1, 0})); }},
        {"ring size beyond the limit", "ring size 2048",
         [](TestGuest& g) { raw(g, kSetVringNum, bytes_of(VringState{1, 2048})); }},
        {"size of a running ring", "size of a running ring",
         [](TestGuest& g) { raw(g, kSetVringNum, bytes_of(VringState{0, 32})); }},
        {"base of a running ring", "running queue",
         [](TestGuest& g) { raw(g, kSetVringBase, bytes_of(VringState{0, 0})); }},
        {"base beyond 16 bits", "base 65536",
         [](TestGuest& g) { raw(g, kSetVringBase, bytes_of(VringState{1, 65536})); }},
        {"rings outside of memory", "not in shared memory",
         [](TestGuest& g) {
             VringAddress address = g.queue().addresses(0);
             address.used = kFar;
             raw(g, kSetVringAddr, bytes_of(address));
         }},
        {"ring that ends outside of memory", "not in shared memory",
         [](TestGuest& g) {
             VringAddress address = g.queue().addresses(0);
             address.descriptor = GuestRam::kUserBase + g.ram->size_bytes() - 16;
             raw(g, kSetVringAddr, bytes_of(address));
         }},
        {"ring at the end of the address space", "not in shared memory",
         [](TestGuest& g) {
             VringAddress address = g.queue().addresses(0);
             address.available = UINT64_MAX - 1;
             raw(g, kSetVringAddr, bytes_of(address));
         }},
        {"misaligned ring", "misaligned ring",
         [](TestGuest& g) {
             VringAddress address = g.queue().addresses(0);
             address.used = address.used + 2;
             raw(g, kSetVringAddr, bytes_of(address));
         }},
        {"enable with a strange value", "enable value 7",
         [](TestGuest& g) { raw(g, kSetVringEnable, bytes_of(VringState{0, 7})); }},
        {"kick without its descriptor", "with 0 descriptors",
         [](TestGuest& g) { raw(g, kSetVringKick, bytes_of(U64Le(0))); }},
        {"kick with the flag and a descriptor", "with 1 descriptors",
         [](TestGuest& g) {
             raw(g, kSetVringKick, bytes_of(U64Le(kVringNoFd)), {g.queue().kick_fd()});
         }},
        {"kick with unknown bits", "value 0x10000",
         [](TestGuest& g) {
             raw(g, kSetVringKick, bytes_of(U64Le(0x10000)), {g.queue().kick_fd()});
         }},
        {"call that is a file", "neither an eventfd nor a socket",
         [](TestGuest& g) { raw(g, kSetVringCall, bytes_of(U64Le(0)), {g.ram->fd()}); }},
        {"kick that is a pipe", "neither an eventfd nor a socket",
         [](TestGuest& g) {
             std::array<int, 2> ends{};
             ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
             UniqueFd reader(ends[0]);
             UniqueFd writer(ends[1]);
             raw(g, kSetVringKick, bytes_of(U64Le(0)), {reader.get()});
         }},
        {"backend channel that is no socket", "not a socket",
         [](TestGuest& g) { raw(g, kSetBackendReqFd, {}, {g.ram->fd()}); }},
        {"backend channel without a descriptor", "0 descriptors",
         [](TestGuest& g) { raw(g, kSetBackendReqFd, {}); }},

        {"configuration write of another size", "bytes announced",
         [](TestGuest& g) { raw(g, kSetConfig, bytes_of(ConfigHeader{0, 100, 0})); }},
        {"in-flight region of no queues", "0 queues",
         [](TestGuest& g) { raw(g, kGetInflightFd, bytes_of(InflightDescription{0, 0, 0, 16})); }},
        {"in-flight region of too many queues", "3 queues",
         [](TestGuest& g) { raw(g, kGetInflightFd, bytes_of(InflightDescription{0, 0, 3, 16})); }},
        {"in-flight region of huge queues", "2 queues of 65535",
         [](TestGuest& g) {
             raw(g, kGetInflightFd, bytes_of(InflightDescription{0, 0, 2, 65535}));
         }},
        {"in-flight region of a running ring", "running ring",
         [](TestGuest& g) {
             raw(g, kSetInflightFd, bytes_of(InflightDescription{4096, 0, 2, 16}), {g.ram->fd()});
         }},
    };
}

TEST_F(HostileTest, MalformedMessages) {
    for (const BadMessage& bad : bad_messages()) {
        TestGuest guest(small());
        guest.connect(socket());
        bad.act(guest);
        expect_thrown_out(guest, bad.reason, bad.name);
    }
}

TEST_F(HostileTest, MessagesBeforeTheirTime) {
    for (const BadMessage& bad : std::vector<BadMessage>{
             {"rings without memory", "not in shared memory",
              [](TestGuest& g) {
                  raw(g, MessageType::kSetVringNum, bytes_of(VringState{0, 16}));
                  raw(g, MessageType::kSetVringAddr, bytes_of(g.queue().addresses(0)));
              }},
             {"in-flight region shorter than it must be", "100 bytes for 2 queues",
              [](TestGuest& g) {
                  raw(g, MessageType::kSetInflightFd, bytes_of(InflightDescription{100, 0, 2, 16}),
                      {g.ram->fd()});
              }},
             {"in-flight region longer than its file", "does not lie within its file",
              [](TestGuest& g) {
                  raw(g, MessageType::kSetInflightFd,
                      bytes_of(InflightDescription{64 * kMiB, 0, 2, 16}), {g.ram->fd()});
              }},
             {"misaligned in-flight region", "misaligned offset",
              [](TestGuest& g) {
                  raw(g, MessageType::kSetInflightFd, bytes_of(InflightDescription{4096, 1, 2, 16}),
                      {g.ram->fd()});
              }},
         }) {
        TestGuest guest(small());
        guest.connect_only(socket());
        bad.act(guest);
        expect_thrown_out(guest, bad.reason, bad.name);
    }
}

TEST_F(HostileTest, TooManyDescriptorsInAMessage) {
    TestGuest guest(small());
    guest.connect(socket());
    // More than send_message() would take, so by hand.
    MessageHeader header{5, kFlagVersion, 0};
    iovec part{&header, sizeof(header)};
    std::array<int, 20> fds{};
    fds.fill(guest.ram->fd());
    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(fds))> control{};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(fds));
    std::memcpy(CMSG_DATA(c), fds.data(), sizeof(fds));
    ASSERT_EQ(::sendmsg(guest.client->socket(), &message, 0), 12);
    expect_thrown_out(guest, "more than 8 descriptors", "20 descriptors");
}

TEST_F(HostileTest, AFrontEndThatNeverReadsIsDropped) {
    TestGuest guest(small());
    guest.connect(socket());
    // Its answers fill the other direction; the server gives up instead of waiting.
    Result<void> sent;
    while (sent || sent.error().code() == ErrorCode::kWouldBlock) {
        pollfd waiting{guest.client->socket(), POLLOUT, 0};
        ASSERT_GT(::poll(&waiting, 1, 20'000), 0);
        sent = guest.client->send(MessageType::kGetFeatures, {});
    }
    expect_thrown_out(guest, "does not read", "unread answers");
}

TEST_F(HostileTest, HalfAMessageHoldsUpNoOne) {
    TestGuest guest(small());
    guest.connect(socket());
    MessageHeader header{2, kFlagVersion, 8};
    ASSERT_EQ(::send(guest.client->socket(), &header, 5, 0), 5);
    expect_bystanders_unharmed("half a header");
    ASSERT_EQ(::send(guest.client->socket(), reinterpret_cast<std::byte*>(&header) + 5, 7, 0), 7);
    expect_bystanders_unharmed("header without payload");
    std::vector<std::byte> sector(512);
    EXPECT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
    guest.client.reset();
    TestGuest next(small());
    next.connect(socket());
    EXPECT_EQ(status().forced_disconnects, 0U);
}

TEST_F(HostileTest, ACallDescriptorThatMakesUsWait) {
    GuestOptions options = small();
    options.features &= ~feature_bit(kFeatureEventIdx);  // So that each completion is signalled.
    TestGuest guest(options);
    guest.connect(socket());
    UniqueFd call(::eventfd(0, EFD_CLOEXEC));
    ASSERT_TRUE(call);
    const uint64_t queue = 0;
    raw(guest, MessageType::kSetVringCall, bytes_of(queue), {call.get()});
    // When this is answered, that has been handled, and has signalled once.
    ASSERT_NE(value_of(guest.client->ask_u64(MessageType::kGetFeatures), "features"), 0U);
    // The server made the file non-blocking; its other owner takes that back, and fills it.
    ASSERT_EQ(::fcntl(call.get(), F_SETFL, O_RDWR), 0);
    uint64_t count = 0;
    ASSERT_EQ(::read(call.get(), &count, sizeof(count)), 8);
    count = UINT64_MAX - 1;
    ASSERT_EQ(::write(call.get(), &count, sizeof(count)), 8);
    BlkSlot slot(*guest.ram, 512);
    ASSERT_TRUE(guest.queue().add(slot.prepare(kBlkIn, 0, 512)));
    guest.queue().kick();
    expect_thrown_out(guest, "makes us wait", "call descriptor");
}

// ---- Rings and descriptors ----------------------------------------------------------------------

struct BadRing {
    const char* name;
    const char* reason;
    /// Fills descriptors and makes something available; the kick follows.
    std::function<void(TestGuest&)> act;
    uint64_t features = kUsualFeatures;
};

uint64_t in_ram(const TestGuest& guest, uint64_t offset) {
    return guest.ram->guest_address(guest.ram->data() + offset);
}

/// Offset of memory in the guest that no ring uses.
constexpr uint64_t kFree = 1 * kMiB;

void make_available(TestGuest& guest, uint16_t head) {
    DriverQueue& queue = guest.queue();
    queue.write_available(queue.available_index() % queue.size(), head);
    queue.set_available_index(static_cast<uint16_t>(queue.available_index() + 1));
}

/// Writes a table into free memory and makes an indirect descriptor for it available.
void make_indirect(TestGuest& guest, std::vector<Descriptor> table, uint16_t flags = 0,
                   uint32_t length = 0) {
    std::memcpy(guest.ram->data() + kFree, table.data(), table.size() * sizeof(Descriptor));
    guest.queue().descriptor(0) =
        Descriptor{in_ram(guest, kFree),
                   length != 0 ? length : static_cast<uint32_t>(table.size() * sizeof(Descriptor)),
                   static_cast<uint16_t>(kDescriptorIndirect | flags), 1};
    make_available(guest, 0);
}

std::vector<BadRing> bad_rings() {
    constexpr uint16_t kW = kDescriptorWrite;
    constexpr uint16_t kN = kDescriptorNext;
    constexpr uint64_t kNoEvent = kUsualFeatures & ~feature_bit(kFeatureIndirectDesc);
    return {
        {"available index far ahead", "ahead in a ring of 16",
         [](TestGuest& g) { g.queue().set_available_index(1000); }},
        {"available index that went back", "ahead in a ring of 16",
         [](TestGuest& g) { g.queue().set_available_index(UINT16_MAX); }},
        {"head out of the table", "names descriptor 16 of 16",
         [](TestGuest& g) { make_available(g, 16); }},
        {"head of all ones", "names descriptor 65535",
         [](TestGuest& g) { make_available(g, UINT16_MAX); }},
        {"chain that points to itself", "longer than its ring",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 16, kN, 0};
             make_available(g, 0);
         }},
        {"chain that runs in a circle", "longer than its ring",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 16, kN, 1};
             g.queue().descriptor(1) = {in_ram(g, kFree), 16, kN, 2};
             g.queue().descriptor(2) = {in_ram(g, kFree), 16, kN, 1};
             make_available(g, 0);
         }},
        {"chain that leaves the table", "continues at 16 of 16",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 16, kN, 16};
             make_available(g, 0);
         }},
        {"descriptor of no length", "zero length",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 0, 0, 0};
             make_available(g, 0);
         }},
        {"address before memory", "outside guest memory",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {GuestRam::kGuestBase - 8, 16, 0, 0};
             make_available(g, 0);
         }},
        {"address across the end of memory", "outside guest memory",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, g.ram->size_bytes() - 8), 16, 0, 0};
             make_available(g, 0);
         }},
        {"address that wraps around", "outside guest memory",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {UINT64_MAX - 7, 16, 0, 0};
             make_available(g, 0);
         }},
        {"length of 4 GiB", "outside guest memory",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), UINT32_MAX, 0, 0};
             make_available(g, 0);
         }},
        {"user address instead of a guest address", "outside guest memory",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {GuestRam::kUserBase, 16, 0, 0};
             make_available(g, 0);
         }},
        {"header too short", "without a whole header",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 15, kN, 1};
             g.queue().descriptor(1) = {in_ram(g, kFree + 64), 1, kW, 0};
             make_available(g, 0);
         }},
        {"nothing to write a status to", "without a status byte",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 16, 0, 0};
             make_available(g, 0);
         }},
        {"header that is writable", "without a whole header",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 32, kW, 0};
             make_available(g, 0);
         }},
        {"readable after writable", "readable descriptor after a writable one",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 16, kN, 1};
             g.queue().descriptor(1) = {in_ram(g, kFree), 16, kN | kW, 2};
             g.queue().descriptor(2) = {in_ram(g, kFree), 16, 0, 0};
             make_available(g, 0);
         }},
        {"indirect though not negotiated", "which was not negotiated",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, 0, 0}}); }, kNoEvent},
        {"indirect and next", "indirect descriptor with flags",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, 0, 0}}, kN); }},
        {"indirect within indirect", "within an indirect table",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, kDescriptorIndirect, 0}}); }},
        {"indirect table of half a descriptor", "indirect table of 24 bytes",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, 0, 0}}, 0, 24); }},
        {"empty indirect table", "indirect table of 0 bytes",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, kFree), 0, kDescriptorIndirect, 0};
             make_available(g, 0);
         }},
        {"indirect table beyond the limit", "indirect table of 16400 bytes",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, 0, 0}}, 0, 16400); }},
        {"indirect table of 4 GiB", "indirect table of 4294967280 bytes",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, 0, 0}}, 0, 0xfffffff0); }},
        {"indirect table outside of memory", "indirect table at",
         [](TestGuest& g) {
             g.queue().descriptor(0) = {in_ram(g, g.ram->size_bytes() - 16), 32,
                                        kDescriptorIndirect, 0};
             make_available(g, 0);
         }},
        {"indirect chain that leaves its table", "leaves or loops",
         [](TestGuest& g) { make_indirect(g, {{in_ram(g, kFree), 16, kN, 1}}); }},
        {"indirect chain in a circle", "leaves or loops",
         [](TestGuest& g) {
             make_indirect(g, {{in_ram(g, kFree), 16, kN, 1}, {in_ram(g, kFree), 16, kN, 0}});
         }},
    };
}

TEST_F(HostileTest, MalformedRings) {
    for (const BadRing& bad : bad_rings()) {
        GuestOptions options = small();
        options.features = bad.features;
        TestGuest guest(options);
        guest.connect(socket());
        // Not from the very beginning of the ring.
        std::vector<std::byte> sector(512);
        for (int i = 0; i < 3; ++i) {
            ASSERT_EQ(value_of(guest.driver().read(0, sector), bad.name), kBlkStatusOk);
        }
        bad.act(guest);
        guest.queue().kick();
        expect_thrown_out(guest, bad.reason, bad.name);
        uint64_t count = 0;
        EXPECT_EQ(::read(guest.queue().error_fd(), &count, sizeof(count)), 8) << bad.name;
    }
}

TEST_F(HostileTest, AHeadThatIsAlreadyInFlight) {
    TestGuest guest(small());
    guest.connect(socket());
    disk_->hold();
    BlkSlot slot(*guest.ram, 512);
    std::optional<uint16_t> head = guest.queue().add(slot.prepare(kBlkFlush, 0, 0));
    make_available(guest, head.value_or(0));
    guest.queue().kick();
    expect_thrown_out(guest, "while in flight", "head twice");
    disk_->release();
    TestGuest next(small());
    next.connect(socket());
}

TEST_F(HostileTest, ManySmallRegionsDoNotMultiplySegments) {
    GuestOptions options = small();
    TestGuest guest(options);
    guest.connect(socket());
    // 200 regions of 16 bytes one after the other: a descriptor over them all is 200 segments.
    constexpr uint64_t kBase = 0x9'0000'0000;
    for (uint64_t i = 0; i < 200; ++i) {
        SingleRegion single;
        single.region = RegionDescription{kBase + 16 * i, 16, kBase + 16 * i, kFree};
        int fd = guest.ram->fd();
        STELLARIUM_EXPECT_OK(
            guest.client->tell(MessageType::kAddMemReg, bytes_of(single), std::span(&fd, 1)));
    }
    std::vector<Descriptor> table(100, Descriptor{kBase, 3200, kDescriptorNext, 0});
    for (size_t i = 0; i < table.size(); ++i) {
        table[i].next = static_cast<uint16_t>(i + 1);
    }
    make_indirect(guest, table);
    guest.queue().kick();
    expect_thrown_out(guest, "more than 1024 segments", "many segments");
}

TEST_F(HostileTest, MoreMemorySlotsThanThereAre) {
    TestGuest guest(small());
    guest.connect(socket());
    for (uint64_t i = 0; i < kMaxMemorySlots; ++i) {
        uint64_t address = 0x9'0000'0000 + 4096 * i;
        add_region(guest, address, 4096, address, 0);
    }
    expect_thrown_out(guest, "more than 256 memory regions", "slots");
}

TEST_F(HostileTest, RequestsThatAreTooLongGetAnError) {
    GuestOptions options = small();
    TestGuest guest(options);
    guest.connect(socket());
    // 129 times the same MiB.
    BlkSlot slot(*guest.ram, 512);
    std::vector<Buffer> buffers(slot.prepare(kBlkIn, 0, 0).begin(),
                                slot.prepare(kBlkIn, 0, 0).end());
    buffers.insert(buffers.begin() + 1, 129, Buffer{in_ram(guest, kFree), 1 << 20, true});
    std::vector<Descriptor> table;
    for (size_t i = 0; i < buffers.size(); ++i) {
        bool last = i + 1 == buffers.size();
        table.push_back(
            Descriptor{buffers[i].guest_address, buffers[i].length_bytes,
                       static_cast<uint16_t>((buffers[i].writable ? kDescriptorWrite : 0) |
                                             (last ? 0 : kDescriptorNext)),
                       static_cast<uint16_t>(i + 1)});
    }
    make_indirect(guest, table);
    guest.queue().kick();
    ASSERT_TRUE(guest.queue().wait(kClientTimeout));
    EXPECT_EQ(slot.status(), kBlkStatusIoError);
    EXPECT_EQ(status().forced_disconnects, 0U);
}

// ---- Memory that goes away ----------------------------------------------------------------------

TEST_F(HostileTest, MemoryCutShortUnderTheRings) {
    TestGuest guest(small());
    guest.connect(socket());
    std::vector<std::byte> sector(512);
    ASSERT_EQ(value_of(guest.driver().read(0, sector), "read"), kBlkStatusOk);
    // From here on the guest's own mapping must not be touched either.
    ASSERT_EQ(::ftruncate(guest.ram->fd(), 0), 0);
    guest.queue().kick();
    expect_thrown_out(guest, "cut short", "rings");
}

TEST_F(HostileTest, MemoryCutShortUnderARequest) {
    for (bool through_the_pool : {false, true}) {
        disk_->set_would_block(through_the_pool);
        disk_->fill(std::byte{0x77});
        TestGuest guest(small());
        guest.connect(socket());
        for (uint32_t type : {kBlkIn, kBlkOut}) {
            BlkSlot slot(*guest.ram, 512);
            std::span<const Buffer> made = slot.prepare(type, 0, 0);
            std::vector<Buffer> buffers = {
                made[0], Buffer{in_ram(guest, kFree), 65536, type == kBlkIn}, made[1]};
            ASSERT_TRUE(guest.queue().add(buffers));
        }
        // The rings stay, the data goes.
        ASSERT_EQ(::ftruncate(guest.ram->fd(), kFree), 0);
        guest.queue().kick();
        expect_thrown_out(guest, "cut short", "data");
        EXPECT_EQ(guest.queue().used_index(), 0U);
        disk_->set_would_block(false);
    }
}

TEST_F(HostileTest, InflightRegionCutShort) {
    GuestOptions options = small();
    TestGuest guest(options);
    guest.connect_only(socket());
    STELLARIUM_EXPECT_OK(guest.client->share(*guest.ram));
    auto [fd, layout] = value_of(guest.client->get_inflight(2, 16), "region");
    // Ours is sealed against this, so it is given one that is not.
    EXPECT_NE(::ftruncate(fd.get(), 0), 0);
    UniqueFd other(::memfd_create("inflight", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(other.get(), static_cast<off_t>(layout.mmap_size)), 0);
    STELLARIUM_EXPECT_OK(guest.client->set_inflight(other, layout));
    ASSERT_EQ(::ftruncate(other.get(), 0), 0);
    // Without waiting for an answer: starting the ring is what touches the region.
    [[maybe_unused]] Result<void> started = guest.client->start_queue(0, guest.queue(), 0);
    guest.queue().kick();
    expect_thrown_out(guest, "cut short", "in-flight region");
}

// ---- Random programs ----------------------------------------------------------------------------

uint64_t iterations(uint64_t usual) {
    const char* factor = std::getenv("STELLARIUM_TEST_SCALE");
    return factor == nullptr ? usual : usual * std::strtoull(factor, nullptr, 10);
}

uint64_t first_seed() {
    const char* seed = std::getenv("STELLARIUM_TEST_SEED");
    return seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10);
}

/// Descriptor tables of anything, mostly almost right.
class RandomRing {
  public:
    RandomRing(TestGuest& guest, std::mt19937_64& random) : guest_(guest), random_(random) {}

    void fill() {
        for (uint16_t i = 0; i < guest_.queue().size(); ++i) {
            guest_.queue().descriptor(i) = descriptor(guest_.queue().size(), true);
        }
        for (int i = 0; i < 64; ++i) {
            Descriptor entry = descriptor(64, false);
            std::memcpy(guest_.ram->data() + kFree + static_cast<size_t>(i) * sizeof(entry), &entry,
                        sizeof(entry));
        }
        // Headers that mean something, where descriptors often point.
        for (uint64_t at = 0; at < 64; ++at) {
            static constexpr std::array<uint32_t, 8> kTypes = {0, 1, 4, 8, 11, 13, 0, 1};
            BlkRequestHeader header{kTypes[pick(8)], 0, pick(10) == 0 ? random_() : pick(4096)};
            std::memcpy(guest_.ram->data() + kFree + 4096 + at * 16, &header, sizeof(header));
        }
        for (uint64_t n = 1 + pick(4); n > 0; --n) {
            make_available(guest_, static_cast<uint16_t>(pick(10) == 0 ? random_() : pick(16)));
        }
    }

  private:
    uint64_t pick(uint64_t below) { return random_() % below; }

    Descriptor descriptor(uint64_t table, bool may_be_indirect) {
        Descriptor d{};
        d.address = in_ram(guest_, kFree + 4096 + pick(64) * 16);
        d.length = 16;
        d.next = static_cast<uint16_t>(pick(table));
        switch (pick(12)) {
            case 0:
                d.address = random_();
                break;
            case 1:
                d.address = in_ram(guest_, guest_.ram->size_bytes() - pick(64));
                break;
            case 2:
                d.length = static_cast<uint32_t>(random_());
                break;
            case 3:
                d.length = static_cast<uint32_t>(pick(3));
                break;
            case 4:
            case 5:
                d.length = static_cast<uint32_t>(512 * pick(64));
                break;
            case 6:
                d.next = static_cast<uint16_t>(random_());
                break;
            default:
                break;
        }
        d.flags = static_cast<uint16_t>(pick(20) == 0 ? random_() : pick(4));
        if (may_be_indirect && pick(4) == 0) {
            d = Descriptor{in_ram(guest_, kFree), static_cast<uint32_t>(16 * (1 + pick(64))),
                           kDescriptorIndirect, 0};
        }
        return d;
    }

    TestGuest& guest_;
    std::mt19937_64& random_;
};

TEST_F(HostileTest, RandomRings) {
    uint64_t thrown_out = 0;
    uint64_t count = iterations(400);
    for (uint64_t seed = first_seed(); seed < first_seed() + count; ++seed) {
        SCOPED_TRACE("STELLARIUM_TEST_SEED=" + std::to_string(seed));
        std::mt19937_64 random(seed);
        GuestOptions options = small();
        options.inflight = random() % 2 == 0;
        TestGuest guest(options);
        guest.connect(socket());
        disk_->set_would_block(random() % 4 == 0);
        bool alive = true;
        for (int round = 0; round < 8 && alive; ++round) {
            RandomRing(guest, random).fill();
            guest.queue().kick();
            // A ring may be stopped before its kick was looked at. This question comes after the
            // kick, so with its answer the ring has had a turn.
            alive = guest.client->ask_u64(MessageType::kGetFeatures).has_value();
            // Stopping the ring waits until the server is through with it, one way or the other.
            alive = alive && guest.client->stop_queue(0).has_value();
            if (alive) {
                uint16_t used = guest.queue().used_index();
                guest.queue().set_available_index(used);
                alive = guest.client->start_queue(0, guest.queue(), used).has_value();
            }
        }
        thrown_out += alive ? 0 : 1;
        if (seed % 16 == 0) {
            expect_bystanders_unharmed("random rings");
        }
    }
    EXPECT_GT(thrown_out, count / 4);
    EXPECT_LT(status().forced_disconnects, count + 1);
    expect_bystanders_unharmed("random rings");
}

TEST_F(HostileTest, RandomMessages) {
    uint64_t count = iterations(300);
    for (uint64_t seed = first_seed(); seed < first_seed() + count; ++seed) {
        SCOPED_TRACE("STELLARIUM_TEST_SEED=" + std::to_string(seed));
        std::mt19937_64 random(seed);
        auto pick = [&](uint64_t below) { return random() % below; };
        TestGuest guest(small());
        guest.connect(socket());
        std::array<int, 2> pair{};
        ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()), 0);
        UniqueFd ours(pair[0]);
        UniqueFd theirs(pair[1]);
        const std::array<int, 4> fds = {guest.ram->fd(), guest.queue().kick_fd(), theirs.get(),
                                        guest.queue().call_fd()};
        for (int message = 0; message < 20; ++message) {
            std::vector<std::byte> payload(pick(3) == 0 ? pick(64) : 8 * pick(6));
            for (std::byte& b : payload) {
                b = static_cast<std::byte>(pick(3) == 0 ? random() : 0);
            }
            if (pick(3) == 0 && payload.size() >= sizeof(OneRegion)) {
                OneRegion table = table_of(guest);
                std::memcpy(payload.data(), &table, sizeof(table));
            }
            std::vector<int> sent;
            for (uint64_t n = pick(3); n > 0; --n) {
                sent.push_back(fds[pick(fds.size())]);
            }
            raw(guest, static_cast<uint32_t>(1 + pick(41)),
                pick(8) == 0 ? static_cast<uint32_t>(pick(16)) : 0, payload, sent);
            if (pick(4) == 0) {
                guest.queue().kick();
            }
        }
        guest.client.reset();
        if (seed % 16 == 0) {
            expect_bystanders_unharmed("random messages");
        }
    }
    expect_bystanders_unharmed("random messages");
    TestGuest next(small());
    next.connect(socket());
}

}  // namespace
}  // namespace stellarium::vhost
