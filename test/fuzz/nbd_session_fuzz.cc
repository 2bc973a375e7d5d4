// An NBD client that says anything: a program of options and requests, well-formed and not, against
// a disk with a shadow. What is read is what was written, refusals are those that were due, every
// request is answered once, and whoever breaks the rules is disconnected and harms nothing.
//
// Input: flags (1: no structured replies, 2: the disk makes the pool do everything, 24: read-only);
// then steps: an option, a batch of requests, raw bytes, a new connection.
#include <array>
#include <memory>
#include <string>

#include "base/units.h"
#include "frontend/nbd/limits.h"
#include "frontend/nbd_client/client.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace nbd;  // NOLINT(google-build-using-namespace)

constexpr uint64_t kDiskBytes = 2 << 20;
constexpr uint32_t kMaxBatch = 8;
constexpr uint64_t kZoneBytes = kDiskBytes / kMaxBatch;
constexpr uint32_t kMaxSteps = 24;
/// Of the data of a write that is out of range: it has to be sent all the same.
constexpr uint32_t kMaxWriteBytes = 300 << 10;

class Bench {
  public:
    Bench() {
        disk_ = must(vhost::MemoryDisk::create(kDiskBytes));
        frozen_ = must(vhost::MemoryDisk::create(kDiskBytes));
        frozen_->fill(std::byte{0x5A});
        frozen_->set_read_only(true);
        exports_.add("usual", disk_);
        exports_.add("frozen", frozen_);
        server_ = std::make_unique<TestServer>(exports_, ServerOptions{.threads = 1});
        require(server_->running(), "a server");
    }
    std::string path() const { return server_->path(); }
    vhost::MemoryDisk& disk(bool read_only) { return read_only ? *frozen_ : *disk_; }
    /// Nothing of an earlier client goes on any more.
    void settle() {
        require(eventually([&] { return exports_.open_now() == 0; }),
                "an export is closed when its clients have gone");
    }

  private:
    TestExports exports_;
    std::shared_ptr<vhost::MemoryDisk> disk_;
    std::shared_ptr<vhost::MemoryDisk> frozen_;
    std::unique_ptr<TestServer> server_;
};

struct Flags {
    bool structured = true;
    bool read_only = false;
};

/// One request of a batch, and what has to come of it.
struct Sent {
    uint16_t command = 0;
    uint16_t flags = 0;
    uint64_t offset = 0;
    uint32_t length = 0;
    Input data;
    uint32_t expected = 0;
};

class Guest {
  public:
    Guest(Bench& bench, Flags flags)
        : bench_(bench),
          flags_(flags),
          shadow_(bench.disk(flags.read_only).content(0, kDiskBytes)) {
        connect();
    }

    void connect() {
        client_ = std::make_unique<TestClient>(bench_.path());
        require(client_->greeting().has_value(), "the server greets");
        in_transmission_ = false;
    }
    bool in_transmission() const { return in_transmission_; }

    /// An option of the input's making; what it is answered with has its form.
    void option(Feed& feed) {
        constexpr std::array<uint32_t, 10> kOptions = {kOptList,
                                                       kOptStartTls,
                                                       kOptInfo,
                                                       kOptStructuredReply,
                                                       kOptInfo,
                                                       99,
                                                       kOptListMetaContext,
                                                       kOptSetMetaContext,
                                                       kOptGo,
                                                       kOptExportName};
        const uint32_t number = kOptions.at(feed.below(kOptions.size()));
        const uint8_t twist = feed.u8();
        const std::string name = twist % 4 == 3 ? "nothing" : flags_.read_only ? "frozen" : "usual";
        Input payload;
        if (number == kOptInfo || number == kOptGo) {
            payload = TestClient::info_payload(name, {static_cast<uint16_t>(feed.u8() % 5)});
        } else if (number == kOptListMetaContext || number == kOptSetMetaContext) {
            payload =
                TestClient::meta_payload(name, {feed.u8() % 2 == 0 ? kContextAllocation : "base:"});
        }
        if (twist >= 128) {  // Cut, changed, or made longer.
            payload.resize(feed.below(static_cast<uint32_t>(payload.size()) + 8));
            if (!payload.empty()) {
                payload[feed.u8() % payload.size()] ^= static_cast<std::byte>(feed.u8());
            }
        }
        client_->option(number, payload);
        if (number == kOptExportName) {
            // Accepted or hung up on, without a form.
            return leave();
        }
        const auto answers = client_->option_answers();
        require(!answers.empty(), "an option is answered");
        const uint32_t type = answers.back().type;
        require(type == kRepAck || (type & 0x8000'0000) != 0, "an option's answers end");
        if (number == kOptStartTls || number == 99) {
            require(type != kRepAck, "what is not there is refused");
        }
        if (number == kOptGo && type == kRepAck) {
            leave();  // What was chosen on the way is the input's; enter() knows what it chose.
        }
    }

    void enter() {
        if (!in_transmission_) {
            leave();
            require(client_->go(flags_.read_only ? "frozen" : "usual", flags_.structured),
                    "an export can be chosen");
            in_transmission_ = true;
        }
    }

    void batch(Feed& feed) {
        enter();
        std::map<uint64_t, Sent> sent;
        const size_t count = 1 + feed.u8() % kMaxBatch;
        for (size_t zone = 0; zone < count; ++zone) {
            Sent request = make(feed, zone);
            const uint64_t cookie = client_->request(request.command, request.offset,
                                                     request.length, request.flags, request.data);
            sent.emplace(cookie, std::move(request));
        }
        while (!sent.empty()) {
            const auto answer = client_->answer();
            require(answer.has_value(),
                    "a well-formed request is answered, and the answer is, too");
            const auto request = sent.extract(answer->cookie);
            require(!request.empty(), "each request is answered once");
            check(request.mapped(), *answer);
        }
    }

    /// Bytes of the input's making where a request or an option is due.
    void raw(Feed& feed) {
        if (feed.u8() % 2 == 0) {
            enter();
        }
        Input bytes = feed.padded(1 + feed.u8() % 64);
        if (feed.u8() % 4 != 0) {
            const U32Be request(kRequestMagic);
            const U64Be option(kOptionMagic);
            const Bytes magic = in_transmission_ ? bytes_of(request) : bytes_of(option);
            bytes.insert(bytes.begin(), magic.begin(), magic.end());
        }
        client_->send(bytes);
        client_->say_no_more();
        require(client_->is_hung_up_on(), "a connection ends when the client has ended it");
        bench_.settle();
        // Some of it may have been a request.
        shadow_ = bench_.disk(flags_.read_only).content(0, kDiskBytes);
        connect();
    }

    void leave() {
        client_->close();
        bench_.settle();
        connect();
    }

    void check_disk() {
        leave();
        require(bench_.disk(flags_.read_only).content(0, kDiskBytes) == shadow_,
                "the disk holds what was written");
    }

  private:
    /// A request in a zone of its own, so that those of a batch are independent.
    Sent make(Feed& feed, size_t zone) const {
        constexpr std::array<uint16_t, 8> kCommands = {
            kCmdRead,        kCmdWrite,       kCmdFlush, kCmdTrim,
            kCmdWriteZeroes, kCmdBlockStatus, kCmdCache, 99};
        Sent request;
        request.command = kCommands.at(feed.u8() % kCommands.size());
        const uint16_t where = feed.u16();
        const uint16_t size = feed.u16();
        const uint8_t twist = feed.u8();
        const bool flush = request.command == kCmdFlush;
        if (!flush) {
            request.offset = zone * kZoneBytes + where % 512 * (kZoneBytes / 512);
            const uint64_t room = (zone + 1) * kZoneBytes - request.offset;
            request.length = static_cast<uint32_t>(
                std::min<uint64_t>(room, (1 + size % (size % 5 == 0 ? 512U : 16U)) * 512U));
        }
        if (twist == 255) {
            request.offset = feed.u64();
        } else if (twist == 254) {
            request.length =
                request.command == kCmdWrite ? feed.u32() % kMaxWriteBytes : feed.u32();
        } else if (twist >= 240) {
            request.flags = static_cast<uint16_t>(1U << (twist % 8));
        }
        if (request.command == kCmdWrite) {
            request.data = feed.padded(request.length % 64);
            request.data.resize(request.length, static_cast<std::byte>(size));
        }
        request.expected = expectation(request);
        return request;
    }

    uint32_t expectation(const Sent& request) const {
        const uint16_t command = request.command;
        unsigned usual = kCmdFlagFua;
        usual |= command == kCmdRead && flags_.structured ? unsigned{kCmdFlagDf} : 0U;
        usual |= command == kCmdWriteZeroes ? unsigned{kCmdFlagNoHole} : 0U;
        usual |= command == kCmdBlockStatus ? unsigned{kCmdFlagReqOne} : 0U;
        if (command == 99 || (request.flags & ~usual) != 0) {
            return kErrInvalid;
        }
        if (command == kCmdFlush) {
            return 0;
        }
        if (command == kCmdBlockStatus && !flags_.structured) {
            return kErrInvalid;
        }
        const bool writes =
            command == kCmdWrite || command == kCmdTrim || command == kCmdWriteZeroes;
        if (writes && flags_.read_only) {
            return kErrPermission;
        }
        if (request.offset > kDiskBytes || request.length > kDiskBytes - request.offset) {
            return writes && command != kCmdTrim ? kErrNoSpace : kErrInvalid;
        }
        if (request.length == 0 || request.offset % 512 != 0 || request.length % 512 != 0) {
            return kErrInvalid;
        }
        if ((request.flags & kCmdFlagDf) != 0 && request.length > kMaxUnfragmentedBytes) {
            return kErrOverflow;
        }
        return 0;
    }

    void check(const Sent& request, const Answer& answer) {
        require(answer.error == request.expected, "the error is the one that was due, " +
                                                      std::to_string(request.command) + ": " +
                                                      std::to_string(answer.error));
        if (answer.error != 0) {
            require(answer.data.empty() && answer.extents.empty(), "an error comes alone");
            return;
        }
        const auto place = static_cast<std::ptrdiff_t>(request.offset);
        switch (request.command) {
            case kCmdRead: {
                const auto content =
                    answer.content(answer.chunks == 0 ? 0 : request.offset, request.length);
                require(content.has_value(), "each byte of a read comes once");
                require(equal(*content, Bytes(shadow_).subspan(request.offset, request.length)),
                        "what is read is what was written");
                require((request.flags & kCmdFlagDf) == 0 || answer.chunks == 1,
                        "what must not be fragmented is not");
                break;
            }
            case kCmdWrite:
                std::ranges::copy(request.data, shadow_.begin() + place);
                break;
            case kCmdTrim:
            case kCmdWriteZeroes:
                std::fill_n(shadow_.begin() + place, request.length, std::byte{0});
                break;
            case kCmdBlockStatus: {
                uint64_t position = request.offset;
                require(!answer.extents.empty(), "there is an extent");
                require((request.flags & kCmdFlagReqOne) == 0 || answer.extents.size() == 1,
                        "there is but one extent");
                for (const auto& [length, flags] : answer.extents) {
                    require(length > 0 && length <= request.offset + request.length - position,
                            "extents lie in the range");
                    // Other requests of the batch write to other zones only.
                    require((flags & kStateZero) == 0 ||
                                all_zero(Bytes(shadow_).subspan(position, length)),
                            "a hole holds zeros");
                    position += length;
                }
                break;
            }
            default:
                break;
        }
    }

    Bench& bench_;
    Flags flags_;
    Input shadow_;
    std::unique_ptr<TestClient> client_;
    bool in_transmission_ = false;
};

void run(Feed& feed) {
    static Bench bench;
    const uint8_t bits = feed.u8();
    const Flags flags{.structured = (bits & 1) == 0, .read_only = (bits & 24) == 24};
    bench.disk(flags.read_only).set_would_block((bits & 2) != 0);
    Guest guest(bench, flags);
    for (uint32_t steps = 0; !feed.empty() && steps < kMaxSteps; ++steps) {
        const uint8_t kind = feed.u8();
        if (kind < 160) {
            guest.batch(feed);
        } else if (kind < 210) {
            if (guest.in_transmission()) {
                guest.leave();
            }
            guest.option(feed);
        } else if (kind < 245) {
            guest.raw(feed);
        } else {
            guest.leave();
        }
    }
    guest.check_disk();
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    for (unsigned flags = 0; flags < 8; ++flags) {
        for (const unsigned kind : {0U, 170U, 220U, 250U}) {
            Input input;
            append_byte(input, flags == 7 ? 24U : flags);
            for (unsigned i = 0; i < 80; ++i) {
                append_byte(input, i % 23 == 0 ? kind : (i * 37 + flags * 11 + kind) % 250);
            }
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
