// A front-end that sends anything: a stream of vhost-user messages with descriptors of all kinds.
// The connection ends in order, nothing is kept of it, and the next guest is served.
//
// Input: steps. Each is a message as a front-end would send it, with a few numbers of the input in
// it, or one made of nothing but the input.
#include <array>
#include <filesystem>
#include <memory>
#include <string>

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/units.h"
#include "frontend/vhost/limits.h"
#include "frontend/vhost/server.h"
#include "frontend/vhost/session.h"
#include "frontend/vhost_client/client.h"
#include "frontend/vhost_client/memory_disk.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace vhost;  // NOLINT(google-build-using-namespace)

constexpr uint16_t kQueues = 2;
constexpr uint16_t kRingSize = 16;
constexpr uint64_t kRamBytes = 256 << 10;
constexpr uint64_t kDiskBytes = 1 << 20;
constexpr int kPatienceMs = 60'000;
constexpr uint32_t kMaxSteps = 64;

/// One server for all inputs; its folder goes with it.
class Bench {
  public:
    Bench() {
        std::string name = (std::filesystem::temp_directory_path() / "vhost-fuzz-XXXXXX").string();
        require(::mkdtemp(name.data()) != nullptr, "a temporary folder");
        folder_ = name;
        server_ = must(VhostServer::create({.data_threads = 1, .blocking_threads = 1}));
        disk_ = must(MemoryDisk::create(kDiskBytes));
        must(server_->attach("one", disk_, {.socket_path = socket(), .queues = kQueues}));
        ram_ = must(GuestRam::create(kRamBytes));
        for (uint16_t i = 0; i < kQueues; ++i) {
            rings_.push_back(std::make_unique<DriverQueue>(*ram_, kRingSize, true, true));
        }
    }
    ~Bench() {
        server_.reset();
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    std::string socket() const { return (folder_ / "one").string(); }
    const GuestRam& ram() const { return *ram_; }
    DriverQueue& ring(uint32_t index) { return *rings_.at(index % kQueues); }

    /// A descriptor that a front-end might send. Closed by the receiver of the result.
    UniqueFd descriptor(uint32_t kind) const {
        switch (kind % 10) {
            case 0:
            case 1:
                return UniqueFd(::fcntl(ram_->fd(), F_DUPFD_CLOEXEC, 0));
            case 2:
            case 3:
                return UniqueFd(::eventfd(0, EFD_CLOEXEC));
            case 4: {
                UniqueFd fd(::memfd_create("short", MFD_CLOEXEC));
                require(::ftruncate(fd.get(), 100) == 0, "a short file");
                return fd;
            }
            case 5: {
                UniqueFd fd(::memfd_create("inflight", MFD_CLOEXEC));
                require(::ftruncate(fd.get(), 4096) == 0, "a file of one page");
                return fd;
            }
            case 6:
                return UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
            case 7:
                return UniqueFd(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
            case 8: {
                std::array<int, 2> ends{};
                require(::pipe2(ends.data(), O_CLOEXEC) == 0, "a pipe");
                ::close(ends[0]);
                return UniqueFd(ends[1]);
            }
            default: {
                std::array<int, 2> ends{};
                require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0,
                        "a socket pair");
                ::close(ends[0]);
                return UniqueFd(ends[1]);
            }
        }
    }

    /// A guest that keeps the rules.
    void check_served() {
        const auto guest_ram = must(GuestRam::create(kRamBytes));
        DriverQueue queue(*guest_ram, kRingSize, true, true);
        const auto client = must(Client::connect(socket()));
        must(client->negotiate(kUsualFeatures, kUsualProtocolFeatures));
        must(client->share(*guest_ram));
        must(client->start_queue(0, queue, 0));
        BlkDriver driver(*guest_ram, queue, 8192);
        Input data(4096, static_cast<std::byte>(++checks_));
        Input back(4096);
        require(must(driver.write(8192, data)) == kBlkStatusOk &&
                    must(driver.read(8192, back)) == kBlkStatusOk && back == data,
                "a guest that keeps the rules is served");
    }

    size_t descriptors() const {
        size_t count = 0;
        for ([[maybe_unused]] const auto& entry :
             std::filesystem::directory_iterator("/proc/self/fd")) {
            ++count;
        }
        return count;
    }

  private:
    std::filesystem::path folder_;
    std::shared_ptr<MemoryDisk> disk_;
    std::unique_ptr<VhostServer> server_;
    std::unique_ptr<GuestRam> ram_;
    std::vector<std::unique_ptr<DriverQueue>> rings_;
    unsigned checks_ = 0;
};

void raw(int socket, uint32_t type, uint32_t flags, Bytes payload, const std::vector<int>& fds) {
    // It may have left already, and its buffer may be full of what it was not asked to read.
    [[maybe_unused]] const auto sent = send_message(socket, type, flags, payload, fds);
}

/// What a front-end says in the order of starting up; `number` changes one thing, mostly to what
/// is wrong.
void usual(Bench& bench, int socket, uint32_t step, Feed& feed) {
    const auto say = [&](MessageType type, Bytes payload, const std::vector<int>& fds = {}) {
        raw(socket, static_cast<uint32_t>(type), 0, payload, fds);
    };
    const uint32_t queue = feed.u8() % (kQueues + 1);
    VringState state{};
    state.index = queue;
    const auto event = [&](MessageType type) {
        const UniqueFd fd = bench.descriptor(feed.u8());
        const bool none = feed.u8() % 4 == 3;
        const U64Le payload(queue | (none ? kVringNoFd : 0));
        say(type, bytes_of(payload), none ? std::vector<int>() : std::vector<int>{fd.get()});
    };
    switch (step) {
        case 0:
            say(MessageType::kSetOwner, {});
            break;
        case 1:
            say(MessageType::kSetFeatures, bytes_of(U64Le(offered_features(false) & ~feed.u64())));
            break;
        case 2:
            say(MessageType::kSetProtocolFeatures,
                bytes_of(U64Le(offered_protocol_features() & ~feed.u64())));
            break;
        case 3: {
            RegionDescription region = bench.ram().description();
            region.mmap_offset = feed.u8() * uint64_t{1024};
            region.size = region.size - region.mmap_offset;
            region.guest_address = region.guest_address + (uint64_t{feed.u8()} << 20);
            region.user_address = region.user_address + (uint64_t{feed.u8()} << 20);
            SingleRegion single{};
            single.region = region;
            say(feed.u8() % 4 == 3 ? MessageType::kRemMemReg : MessageType::kAddMemReg,
                bytes_of(single), {bench.ram().fd()});
            break;
        }
        case 4: {
            struct {
                MemoryTableHeader header{1, 0};
                RegionDescription region;
            } table;
            table.region = bench.ram().description();
            say(MessageType::kSetMemTable, bytes_of(table), {bench.ram().fd()});
            break;
        }
        case 5:
            state.num = feed.u8() < 200 ? kRingSize : feed.u16();
            say(MessageType::kSetVringNum, bytes_of(state));
            break;
        case 6:
            state.num = feed.u16();
            say(MessageType::kSetVringBase, bytes_of(state));
            break;
        case 7: {
            VringAddress address = bench.ring(queue).addresses(queue);
            address.available = address.available + (feed.u8() < 250 ? 0U : 1U);
            address.used = address.used + (feed.u8() < 250 ? 0U : 4096U);
            say(MessageType::kSetVringAddr, bytes_of(address));
            break;
        }
        case 8:
            event(MessageType::kSetVringCall);
            break;
        case 9:
            event(MessageType::kSetVringErr);
            break;
        case 10:
            event(MessageType::kSetVringKick);
            break;
        case 11:
            state.num = feed.u8() % 3;
            say(MessageType::kSetVringEnable, bytes_of(state));
            break;
        case 12: {
            InflightDescription inflight{};
            inflight.queues = feed.u8() % 4;
            inflight.queue_size = feed.u8() % 32;
            say(MessageType::kGetInflightFd, bytes_of(inflight));
            break;
        }
        case 13: {
            const UniqueFd fd = bench.descriptor(feed.u8() % 2 == 0 ? 5 : feed.u8());
            InflightDescription inflight{};
            inflight.mmap_size = feed.u16();
            inflight.mmap_offset = feed.u8() * uint64_t{64};
            inflight.queues = feed.u8() % 4;
            inflight.queue_size = kRingSize;
            say(MessageType::kSetInflightFd, bytes_of(inflight), {fd.get()});
            break;
        }
        case 14:
            say(MessageType::kGetVringBase, bytes_of(state));
            break;
        case 15:
            say(MessageType::kResetDevice, {});
            break;
        case 16: {
            const UniqueFd fd = bench.descriptor(9);
            say(MessageType::kSetBackendReqFd, {}, {fd.get()});
            break;
        }
        case 17: {
            struct {
                ConfigHeader header;
                std::array<std::byte, 64> bytes{};
            } config;
            config.header.offset = feed.u8();
            config.header.size = 64;
            config.header.flags = feed.u8() % 3;
            say(feed.u8() % 2 == 0 ? MessageType::kGetConfig : MessageType::kSetConfig,
                bytes_of(config));
            break;
        }
        default:
            say(MessageType::kSetStatus, bytes_of(U64Le(feed.u8())));
    }
}
constexpr uint32_t kUsualSteps = 19;

void anything(Bench& bench, int socket, Feed& feed) {
    const uint32_t type = feed.u8() % 48;
    const uint32_t flags = feed.u8();
    std::vector<UniqueFd> fds;
    std::vector<int> numbers;
    for (uint32_t count = feed.u8() % 4; count > 0; --count) {
        fds.push_back(bench.descriptor(feed.u8()));
        numbers.push_back(fds.back().get());
    }
    const Bytes payload = feed.bytes(feed.u8());
    if (flags < 250) {
        raw(socket, type, flags % 4 == 0 ? flags : kFlagNeedReply, payload, numbers);
    } else {  // Bytes that are no message.
        [[maybe_unused]] const ssize_t sent =
            ::send(socket, payload.data(), payload.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
}

void drain(int socket) {
    std::array<std::byte, 4096> bytes{};
    while (::recv(socket, bytes.data(), bytes.size(), MSG_DONTWAIT) > 0) {
    }
}

void run(Feed& feed) {
    static Bench bench;
    static size_t runs = 0;
    static size_t usual_descriptors = 0;
    {
        const auto client = must(Client::connect(bench.socket()));
        for (uint32_t steps = 0; !feed.empty() && steps < kMaxSteps; ++steps) {
            const uint8_t kind = feed.u8();
            if (kind < 220) {
                usual(bench, client->socket(), kind % kUsualSteps, feed);
            } else {
                anything(bench, client->socket(), feed);
            }
            drain(client->socket());
        }
        // It reads what was sent, sees the end, and closes.
        ::shutdown(client->socket(), SHUT_WR);
        while (true) {
            pollfd wait{.fd = client->socket(), .events = POLLIN, .revents = 0};
            require(::poll(&wait, 1, kPatienceMs) == 1,
                    "the back-end ends a connection that the front-end ended");
            std::byte byte{};
            if (::recv(client->socket(), &byte, 1, 0) <= 0) {
                break;
            }
        }
    }
    if (++runs % 64 == 0) {
        bench.check_served();
        bench.check_served();  // The first one's session has ended when this one is served.
        if (usual_descriptors == 0) {
            usual_descriptors = bench.descriptors();
        }
        require(bench.descriptors() <= usual_descriptors + 8, "no descriptor is kept");
    }
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    // Starting up as usual; then everything in turn after that. Each step has the queue first, then
    // what it changes.
    Input start;
    const auto step_of = [&](unsigned step, const Input& numbers) {
        append_byte(start, step);
        append_byte(start, 0);
        append(start, numbers);
    };
    constexpr std::byte kNone{0};
    constexpr std::byte kEventFd{2};
    step_of(0, {});
    step_of(1, Input(8));
    step_of(2, Input(8));
    step_of(4, {});
    step_of(5, {kNone});
    step_of(6, {kNone, kNone});
    step_of(7, {kNone, kNone});
    for (const unsigned event : {8U, 9U, 10U}) {
        step_of(event, {kEventFd, kNone});
    }
    step_of(11, {std::byte{1}});
    out.push_back(start);
    for (unsigned step = 0; step < kUsualSteps + 40; ++step) {
        Input input = start;
        append_byte(input, step < kUsualSteps ? step : 220);
        append_byte(input, step < kUsualSteps ? 0 : step - kUsualSteps);
        append(input, Input(24, std::byte{1}));
        out.push_back(std::move(input));
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    stellarium::fuzz::Feed feed(data, size);
    stellarium::fuzz::run(feed);
    return 0;
}
