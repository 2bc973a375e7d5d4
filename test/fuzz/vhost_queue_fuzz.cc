// A guest driver that does anything: a program of requests, well-formed and not, against a disk
// with a shadow. What is read is what was written, refusals are those that were due, and whoever
// breaks the rules is disconnected and harms nothing.
//
// Input: flags (1: an in-flight region, 2: indirect tables, 4: no event index, 8: read-only); then
// steps: a batch of requests, a malformed chain, a new connection.
#include <array>
#include <filesystem>
#include <memory>
#include <string>

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/units.h"
#include "frontend/vhost/limits.h"
#include "frontend/vhost/server.h"
#include "frontend/vhost_client/client.h"
#include "frontend/vhost_client/memory_disk.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace vhost;  // NOLINT(google-build-using-namespace)

constexpr uint16_t kRingSize = 64;
constexpr uint64_t kRamBytes = 512 << 10;
constexpr uint64_t kDiskBytes = 256 << 10;
constexpr uint64_t kDiskSectors = kDiskBytes / kSectorBytes;
constexpr uint32_t kMaxBatch = 6;
constexpr uint32_t kZoneSectors = kDiskSectors / kMaxBatch / 8 * 8;
constexpr uint32_t kDataBytes = 16 << 10;  ///< Of one request.
constexpr uint32_t kMaxSteps = 24;
constexpr std::chrono::milliseconds kPatience{60'000};
constexpr unsigned kFlagIndirect = 2;

struct Flags {
    bool inflight = false;
    bool indirect = false;
    bool event_index = false;
    bool read_only = false;
};

class Bench {
  public:
    Bench() {
        std::string name = (std::filesystem::temp_directory_path() / "vhost-fuzz-XXXXXX").string();
        require(::mkdtemp(name.data()) != nullptr, "a temporary folder");
        folder_ = name;
        server_ = must(VhostServer::create({.data_threads = 1, .blocking_threads = 2}));
        disk_ = must(MemoryDisk::create(kDiskBytes));
        frozen_ = must(MemoryDisk::create(kDiskBytes));
        frozen_->fill(std::byte{0x5A});
        must(server_->attach("usual", disk_, {.socket_path = socket(false)}));
        must(server_->attach("frozen", frozen_, {.socket_path = socket(true), .read_only = true}));
    }
    ~Bench() {
        server_.reset();
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    std::string socket(bool read_only) const {
        return (folder_ / (read_only ? "frozen" : "usual")).string();
    }
    MemoryDisk& disk(bool read_only) { return read_only ? *frozen_ : *disk_; }

  private:
    std::filesystem::path folder_;
    std::shared_ptr<MemoryDisk> disk_;
    std::shared_ptr<MemoryDisk> frozen_;
    std::unique_ptr<VhostServer> server_;
};

/// One request of a batch, what it does, and what has to come of it.
struct Sent {
    uint32_t type = 0;
    uint64_t sector = 0;
    uint32_t bytes = 0;
    Input data;               ///< To be written.
    std::byte* at = nullptr;  ///< In guest memory.
    std::byte* status = nullptr;
    std::vector<BlkRange> ranges;
    uint8_t expected = kBlkStatusOk;
    bool has_been_answered = false;
};

class Guest {
  public:
    Guest(Bench& bench, Flags flags)
        : bench_(bench),
          flags_(flags),
          shadow_(bench.disk(flags.read_only).content(0, kDiskBytes)),
          ram_(must(GuestRam::create(kRamBytes))),
          queue_(*ram_, kRingSize, flags.event_index, flags.indirect),
          headers_(ram_->allocate(kMaxBatch * sizeof(BlkRequestHeader))),
          statuses_(ram_->allocate(kMaxBatch * 16)),
          data_(ram_->allocate(kMaxBatch * kDataBytes, 4096)),
          scratch_(ram_->allocate(8192, 4096)) {
        connect();
    }

    void connect() {
        client_ = must(Client::connect(bench_.socket(flags_.read_only)));
        must(client_->negotiate(
            flags_.event_index ? kUsualFeatures : kUsualFeatures & ~feature_bit(kFeatureEventIdx),
            kUsualProtocolFeatures));
        must(client_->share(*ram_));
        if (flags_.inflight) {
            if (!inflight_) {
                auto [fd, layout] = must(client_->get_inflight(1, kRingSize));
                inflight_ = std::move(fd);
                layout_ = layout;
            }
            must(client_->set_inflight(inflight_, layout_));
        }
        must(client_->start_queue(0, queue_, queue_.used_taken()));
    }

    void batch(Feed& feed) {
        std::vector<Sent> sent(1 + feed.u8() % kMaxBatch);
        std::vector<std::pair<uint16_t, size_t>> heads;
        for (size_t i = 0; i < sent.size(); ++i) {
            const std::vector<Buffer> buffers = make(feed, sent[i], i);
            const auto head = queue_.add(buffers);
            if (!head) {
                // The ring is full, for the chains are long.
                sent.resize(i);
                break;
            }
            heads.emplace_back(*head, i);
        }
        queue_.kick_if_wanted();
        for (size_t answered = 0; answered < sent.size(); ++answered) {
            require(queue_.wait(kPatience), "a well-formed request is answered");
            const auto used = queue_.take_used();
            require(used.has_value(), "an answer that was announced is there");
            const auto found =
                std::ranges::find(heads, used->id, [](const auto& pair) { return pair.first; });
            require(found != heads.end() && !sent[found->second].has_been_answered,
                    "each request is answered once");
            check(sent[found->second], used->length);
        }
    }

    /// Descriptors of the input's making, which may even be a request. Whatever becomes of it, the
    /// guest starts anew afterwards.
    void malformed(Feed& feed) {
        const uint16_t count = 1 + feed.u8() % 8;
        auto* const header = reinterpret_cast<BlkRequestHeader*>(scratch_);
        header->type = feed.u8() % 16;
        header->sector = feed.u16();
        for (uint16_t i = 0; i < count; ++i) {
            Descriptor& descriptor = queue_.descriptor(i);
            descriptor.address = ram_->guest_address(scratch_) + feed.u16() % 9000;
            descriptor.length = feed.u8() < 128 ? feed.u8() : feed.u32();
            descriptor.flags = feed.u8() % 8;
            descriptor.next = feed.u8() % 32 == 31 ? feed.u16() : static_cast<uint16_t>(i + 1);
            const uint8_t twist = feed.u8();
            if (i == 0 && twist < 192) {  // A header, so that what follows is looked at.
                descriptor.address = ram_->guest_address(scratch_);
                descriptor.length = sizeof(BlkRequestHeader);
                descriptor.flags = kDescriptorNext;
            } else if (twist == 255) {
                descriptor.address = feed.u64();
            } else if (twist > 240) {  // Tables within what the guest writes by itself.
                const Bytes table = feed.bytes(64);
                std::ranges::copy(table, scratch_ + 1024);
                descriptor.address = ram_->guest_address(scratch_ + 1024);
                descriptor.length = 64;
                descriptor.flags = kDescriptorIndirect;
            }
        }
        const uint16_t ahead = feed.u8() % 16 == 15 ? feed.u16() : 1;
        queue_.write_available(queue_.available_index() % kRingSize,
                               feed.u8() % 16 == 15 ? feed.u16() : 0);
        queue_.set_available_index(static_cast<uint16_t>(queue_.available_index() + ahead));
        queue_.kick();
        // Stopping the ring waits for its requests; one that broke the rules closes the connection.
        (void)client_->stop_queue(0);
        leave();
        shadow_ = bench_.disk(flags_.read_only).content(0, kDiskBytes);
    }
    /// After malformed(): this guest's ring is not in order any more.
    void leave() {
        ::shutdown(client_->socket(), SHUT_WR);
        while (true) {
            pollfd wait{.fd = client_->socket(), .events = POLLIN, .revents = 0};
            require(::poll(&wait, 1, static_cast<int>(kPatience.count())) == 1,
                    "the back-end ends a connection that the front-end ended");
            std::byte byte{};
            if (::recv(client_->socket(), &byte, 1, 0) <= 0) {
                return;
            }
        }
    }

    void check_disk() {
        require(bench_.disk(flags_.read_only).content(0, kDiskBytes) == shadow_,
                "the disk holds what was written");
    }

  private:
    /// A request in zone `zone` of the disk, so that the requests of a batch are independent.
    std::vector<Buffer> make(Feed& feed, Sent& request, size_t zone) {
        constexpr std::array kTypes = {kBlkIn,      kBlkOut,         kBlkFlush,   kBlkGetId,
                                       kBlkDiscard, kBlkWriteZeroes, uint32_t{99}};
        request.type = kTypes.at(feed.u8() % kTypes.size());
        request.at = data_ + zone * kDataBytes;
        request.status = statuses_ + zone * 16;
        *request.status = std::byte{0xEE};
        const uint64_t first = zone * kZoneSectors;
        const uint8_t where = feed.u8();
        // Some go beyond the end of the disk, some are no whole sectors.
        request.sector = where < 250 ? first + where % kZoneSectors : kDiskSectors - where % 6;
        const uint64_t end = first + kZoneSectors;
        const auto room = static_cast<uint32_t>(
            std::min<uint64_t>(kDataBytes, (end - std::min(request.sector, end)) * kSectorBytes));
        const uint16_t size = feed.u16();
        constexpr auto kSector = static_cast<uint32_t>(kSectorBytes);
        request.bytes = size % 32 == 31 ? size % 3000U : (1 + size % 32U) * kSector;
        request.bytes = where < 250 ? std::min(room, request.bytes) : 4 * kSector;
        bool to_device = false;
        switch (request.type) {
            case kBlkIn:
                request.expected = in_range(request) ? kBlkStatusOk : kBlkStatusIoError;
                std::memset(request.at, 0xCC, kDataBytes);
                break;
            case kBlkOut: {
                to_device = true;
                request.expected =
                    in_range(request) && !flags_.read_only ? kBlkStatusOk : kBlkStatusIoError;
                request.data = feed.padded(request.bytes % 64);
                request.data.resize(request.bytes, static_cast<std::byte>(size));
                std::ranges::copy(request.data, request.at);
                break;
            }
            case kBlkDiscard:
            case kBlkWriteZeroes:
                to_device = true;
                make_ranges(feed, request, first);
                break;
            case kBlkGetId:
                request.bytes = kSerialBytes;
                std::memset(request.at, 0xCC, kSerialBytes);
                break;
            case kBlkFlush:
                request.bytes = 0;
                break;
            default:
                request.bytes = 0;
                request.expected = kBlkStatusUnsupported;
        }
        BlkRequestHeader header{};
        header.type = request.type;
        header.sector = request.type == kBlkIn || request.type == kBlkOut ? request.sector : 0;
        std::byte* const header_at = headers_ + zone * sizeof(header);
        std::memcpy(header_at, &header, sizeof(header));

        std::vector<Buffer> buffers;
        add(buffers, feed, header_at, sizeof(header), false, 2);
        add(buffers, feed, request.at, request.bytes, !to_device, 4);
        buffers.push_back({ram_->guest_address(request.status), 1, true});
        return buffers;
    }

    void make_ranges(Feed& feed, Sent& request, uint64_t first) {
        request.ranges.resize(1 + feed.u8() % 3);
        uint64_t sector = first;
        bool good = !flags_.read_only;
        for (BlkRange& range : request.ranges) {
            sector += feed.u8() % 8;
            range.sector = sector;
            range.sectors = 1 + feed.u8() % 16;
            const uint8_t twist = feed.u8();
            range.flags = twist == 255 ? 2 : request.type == kBlkWriteZeroes ? twist % 2 : 0;
            if (range.flags > 1) {
                request.expected = kBlkStatusUnsupported;
            }
            sector += range.sectors;
            if (sector > first + kZoneSectors) {
                range.sector = kDiskSectors - 1;
                range.sectors = 2;
                good = false;
            }
        }
        if (!good) {
            request.expected = kBlkStatusIoError;
        }
        request.bytes = static_cast<uint32_t>(request.ranges.size() * sizeof(BlkRange));
        std::memcpy(request.at, request.ranges.data(), request.bytes);
    }

    /// The piece as one or more descriptors.
    void add(std::vector<Buffer>& buffers, Feed& feed, std::byte* at, uint32_t bytes, bool writable,
             uint32_t most) {
        for (uint32_t parts = 1; bytes > 0; ++parts) {
            const uint32_t cut = parts < most ? feed.u16() : 0;
            const uint32_t length = cut % 4 == 3 ? 1 + cut % bytes : bytes;
            buffers.push_back({ram_->guest_address(at), length, writable});
            at += length;
            bytes -= length;
        }
    }

    static bool in_range(const Sent& request) {
        return request.bytes % kSectorBytes == 0 && request.sector <= kDiskSectors &&
               request.bytes / kSectorBytes <= kDiskSectors - request.sector;
    }

    void check(Sent& request, uint32_t length) {
        request.has_been_answered = true;
        const auto status = static_cast<uint8_t>(*request.status);
        const Bytes data(request.at, request.bytes);
        const bool both_ways = request.type == kBlkDiscard || request.type == kBlkWriteZeroes;
        if (both_ways && request.expected != kBlkStatusOk) {
            require(status == kBlkStatusIoError || status == kBlkStatusUnsupported,
                    "a bad range is refused");
        } else if (request.type == kBlkOut && request.bytes == 0) {
            require(status == kBlkStatusOk || status == kBlkStatusIoError, "writing nothing");
        } else {
            require(status == request.expected, "the status is the one that was due, " +
                                                    std::to_string(request.type) + ": " +
                                                    std::to_string(status));
        }
        if (status != kBlkStatusOk) {
            if (both_ways) {  // It may have been refused in the middle.
                shadow_ = bench_.disk(flags_.read_only).content(0, kDiskBytes);
            }
            return;
        }
        const size_t offset = request.sector * kSectorBytes;
        switch (request.type) {
            case kBlkIn:
                require(length == request.bytes + 1, "a read reports what it wrote");
                require(equal(data, Bytes(shadow_).subspan(offset, request.bytes)),
                        "what is read is what was written");
                break;
            case kBlkOut:
                require(length == 1, "a write reports its status only");
                std::ranges::copy(request.data,
                                  shadow_.begin() + static_cast<std::ptrdiff_t>(offset));
                break;
            case kBlkGetId:
                require(equal(data.first(11), bytes_of(std::string_view("memory-disk"))),
                        "the serial number is the disk's");
                break;
            default:
                for (const BlkRange& range : request.ranges) {
                    std::ranges::fill(std::span(shadow_).subspan(range.sector * kSectorBytes,
                                                                 range.sectors * kSectorBytes),
                                      std::byte{0});
                }
        }
    }

    Bench& bench_;
    Flags flags_;
    Input shadow_;
    std::unique_ptr<GuestRam> ram_;
    DriverQueue queue_;
    std::byte* headers_;
    std::byte* statuses_;
    std::byte* data_;
    std::byte* scratch_;
    std::unique_ptr<Client> client_;
    UniqueFd inflight_;
    InflightDescription layout_;
};

void run(Feed& feed) {
    static Bench bench;
    const uint8_t bits = feed.u8();
    const Flags flags{.inflight = (bits & 1) != 0,
                      .indirect = (bits & kFlagIndirect) != 0,
                      .event_index = (bits & 4) == 0,
                      .read_only = (bits & 24) == 24};
    auto guest = std::make_unique<Guest>(bench, flags);
    for (uint32_t steps = 0; !feed.empty() && steps < kMaxSteps; ++steps) {
        const uint8_t kind = feed.u8();
        if (kind < 200) {
            guest->batch(feed);
        } else if (kind < 235) {
            guest->malformed(feed);
            guest->check_disk();
            guest = std::make_unique<Guest>(bench, flags);
        } else {
            guest->leave();
            guest->connect();
        }
    }
    guest->check_disk();
    guest->leave();
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    for (unsigned flags = 0; flags < 32; flags += 3) {
        for (const unsigned kind : {0U, 210U, 240U}) {
            Input input;
            append_byte(input, flags);
            for (unsigned i = 0; i < 40; ++i) {
                append_byte(input, i % 11 == 0 ? kind : (i * 37 + flags * 11) % 190);
            }
            append_byte(input, kind);
            append(input, Input(40, std::byte{5}));
            out.push_back(std::move(input));
        }
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    stellarium::fuzz::Feed feed(data, size);
    stellarium::fuzz::run(feed);
    return 0;
}
