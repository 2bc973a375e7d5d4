// The client's side of NBD, byte by byte, and exports in memory: for tests and fuzz targets. No
// part of the product.
//
//     TestExports exports;
//     exports.add("disk", must(vhost::MemoryDisk::create(kMiB)));
//     TestServer server(exports, {});
//     TestClient client(server.path());
//     client.go("disk");
//     client.request(kCmdRead, 0, 4096);
//     Answer answer = client.answer();
//
// Thread rule: a client is used by one thread.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bytes.h"
#include "frontend/nbd/export.h"
#include "frontend/nbd/protocol.h"
#include "frontend/nbd/server.h"
#include "frontend/vhost/listener.h"
#include "frontend/vhost_client/memory_disk.h"

namespace stellarium::nbd {

inline constexpr std::chrono::milliseconds kTestPatience{120'000};

/// Waits until `condition` holds; false when it did not in time.
template <typename Condition>
bool eventually(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + kTestPatience;
    while (!condition()) {
        if (std::chrono::steady_clock::now() > deadline) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

class TestExports final : public ExportSource {
  public:
    void add(const std::string& name, std::shared_ptr<vhost::MemoryDisk> disk) {
        const std::scoped_lock lock(mutex_);
        disks_[name] = std::move(disk);
    }
    /// Who opens it is told that something else has it.
    void set_busy(const std::string& name) {
        const std::scoped_lock lock(mutex_);
        busy_ = name;
    }
    unsigned opened() const {
        const std::scoped_lock lock(mutex_);
        return opened_;
    }
    unsigned open_now() const {
        const std::scoped_lock lock(mutex_);
        return open_now_;
    }

    Result<std::vector<std::string>> list(std::string_view after, size_t at_most) override {
        const std::scoped_lock lock(mutex_);
        std::vector<std::string> names;
        for (auto it = disks_.upper_bound(std::string(after));
             it != disks_.end() && names.size() < at_most; ++it) {
            names.push_back(it->first);
        }
        return names;
    }
    Result<ExportInfo> find(std::string_view name) override {
        const std::scoped_lock lock(mutex_);
        const auto found = disks_.find(std::string(name));
        if (found == disks_.end()) {
            return fail(ErrorCode::kNotFound, "no disk has that name");
        }
        return ExportInfo{.size_bytes = found->second->size_bytes(),
                          .read_only = found->second->read_only(),
                          .description = "a disk in memory"};
    }
    Result<std::shared_ptr<Export>> open(std::string_view name) override {
        const std::scoped_lock lock(mutex_);
        const std::string key(name);
        const auto found = disks_.find(key);
        if (found == disks_.end()) {
            return fail(ErrorCode::kNotFound, "no disk has that name");
        }
        if (key == busy_) {
            return fail(ErrorCode::kBusy, "a guest has it");
        }
        if (auto shared = open_[key].lock()) {
            return shared;
        }
        ++opened_;
        ++open_now_;
        auto made = std::make_shared<DiskExport>(*this, found->second);
        open_[key] = made;
        return made;
    }

  private:
    class DiskExport final : public Export {
      public:
        DiskExport(TestExports& owner, std::shared_ptr<vhost::MemoryDisk> disk)
            : owner_(owner), disk_(std::move(disk)) {}
        ~DiskExport() override {
            const std::scoped_lock lock(owner_.mutex_);
            --owner_.open_now_;
        }
        BlockDevice& device() override { return *disk_; }
        Result<std::shared_ptr<AllocationMap>> allocation() override {
            return std::make_shared<PageMap>(*disk_);
        }

      private:
        TestExports& owner_;
        std::shared_ptr<vhost::MemoryDisk> disk_;
    };
    /// Pages that are not all zeros are data.
    class PageMap final : public AllocationMap {
      public:
        explicit PageMap(vhost::MemoryDisk& disk) : content_(disk.content(0, disk.size_bytes())) {}
        Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(
            uint64_t offset_bytes) override {
            constexpr uint64_t kPage = 4096;
            for (uint64_t at = offset_bytes / kPage * kPage; at < content_.size(); at += kPage) {
                const uint64_t length = std::min(kPage, content_.size() - at);
                if (!all_zero(Bytes(content_).subspan(at, length))) {
                    const uint64_t start = std::max(at, offset_bytes);
                    return std::pair(start, at + length - start);
                }
            }
            return std::nullopt;
        }

      private:
        std::vector<std::byte> content_;
    };

    mutable std::mutex mutex_;
    std::map<std::string, std::shared_ptr<vhost::MemoryDisk>> disks_;
    std::map<std::string, std::weak_ptr<Export>> open_;
    std::string busy_;
    unsigned opened_ = 0;
    unsigned open_now_ = 0;
};

/// A server on a socket in a folder of its own.
class TestServer {
  public:
    TestServer(TestExports& exports, ServerOptions options) {
        std::string name = (std::filesystem::temp_directory_path() / "nbd-test-XXXXXX").string();
        folder_ = mkdtemp(name.data()) != nullptr ? name : std::string();
        auto listener = vhost::listen_at(path());
        if (listener) {
            options.listen_fd = listener->fd.release();
            auto started = Server::start(exports, std::move(options));
            server_ = started ? *std::move(started) : nullptr;
        }
    }
    ~TestServer() {
        server_.reset();
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }
    TestServer(const TestServer&) = delete;
    TestServer& operator=(const TestServer&) = delete;

    std::string path() const { return folder_ + "/nbd.sock"; }
    Server& operator*() { return *server_; }
    Server* operator->() { return server_.get(); }
    bool running() const { return server_ != nullptr; }

  private:
    std::string folder_;
    std::unique_ptr<Server> server_;
};

/// The whole answer to a request.
struct Answer {
    uint64_t cookie = 0;
    uint32_t error = 0;
    std::string message;
    std::map<uint64_t, std::vector<std::byte>> data;     ///< By offset; simple replies: at 0.
    std::map<uint64_t, uint32_t> holes;                  ///< By offset.
    std::vector<std::pair<uint32_t, uint32_t>> extents;  ///< Length and flags.
    unsigned chunks = 0;                                 ///< 0: a simple reply.

    /// What a READ at `offset_bytes` gave; nullopt when something is missing or there twice.
    std::optional<std::vector<std::byte>> content(uint64_t offset_bytes, size_t length) const {
        std::vector<std::byte> out(length);
        size_t covered = 0;
        const auto covers = [&](uint64_t at, size_t bytes) {
            covered += bytes;
            return at >= offset_bytes && at - offset_bytes + bytes <= length;
        };
        for (const auto& [at, bytes] : data) {
            if (!covers(at, bytes.size())) {
                return std::nullopt;
            }
            std::memcpy(out.data() + (at - offset_bytes), bytes.data(), bytes.size());
        }
        for (const auto& [at, bytes] : holes) {
            if (!covers(at, bytes)) {
                return std::nullopt;
            }
        }
        return covered == length ? std::optional(std::move(out)) : std::nullopt;
    }
};

struct OptionAnswer {
    uint32_t type = 0;
    std::vector<std::byte> payload;
    std::string text() const {
        return {reinterpret_cast<const char*>(payload.data()), payload.size()};
    }
};

class TestClient {
  public:
    explicit TestClient(const std::string& path, bool greet = true)
        : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.c_str(),
                    std::min(path.size() + 1, sizeof(address.sun_path)));
        connected_ =
            ::connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
        if (connected_ && greet) {
            greeting_ = take<Greeting>();
            put(U32Be(kHandshakeFixedNewstyle | kHandshakeNoZeroes));
        }
    }

    bool connected() const { return connected_; }
    const std::optional<Greeting>& greeting() const { return greeting_; }
    int socket() const { return fd_.get(); }
    void close() { fd_.reset(); }
    void say_no_more() { ::shutdown(fd_.get(), SHUT_WR); }

    bool send(Bytes bytes) {
        while (!bytes.empty()) {
            const ssize_t sent = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (sent <= 0) {
                return false;
            }
            bytes = bytes.subspan(static_cast<size_t>(sent));
        }
        return true;
    }
    template <typename T>
    bool put(const T& value) {
        return send(bytes_of(value));
    }
    /// nullopt: the server has hung up.
    std::optional<std::vector<std::byte>> receive(size_t count);
    template <typename T>
    std::optional<T> take() {
        const auto bytes = receive(sizeof(T));
        return bytes ? std::optional(load<T>(*bytes)) : std::nullopt;
    }
    /// True when the server ends the connection, whatever it still says.
    bool is_hung_up_on();

    // --- Handshake -------------------------------------------------------------------------------
    bool option(uint32_t option, Bytes payload = {}) {
        return put(OptionHeader{.option = option,
                                .length_bytes = static_cast<uint32_t>(payload.size())}) &&
               send(payload);
    }
    std::optional<OptionAnswer> option_answer() {
        const auto header = take<OptionReplyHeader>();
        if (!header || header->magic != kOptionReplyMagic) {
            return std::nullopt;
        }
        auto payload = receive(header->length_bytes);
        return payload ? std::optional(
                             OptionAnswer{.type = header->type, .payload = *std::move(payload)})
                       : std::nullopt;
    }
    /// Everything up to the ACK or an error.
    std::vector<OptionAnswer> option_answers();
    std::vector<OptionAnswer> ask(uint32_t number, Bytes payload = {}) {
        option(number, payload);
        return option_answers();
    }
    static std::vector<std::byte> info_payload(std::string_view name,
                                               const std::vector<uint16_t>& infos = {}) {
        std::vector<std::byte> payload;
        append_bytes(payload, bytes_of(U32Be(static_cast<uint32_t>(name.size()))));
        append_bytes(payload, bytes_of(name));
        append_bytes(payload, bytes_of(U16Be(static_cast<uint16_t>(infos.size()))));
        for (const uint16_t info : infos) {
            append_bytes(payload, bytes_of(U16Be(info)));
        }
        return payload;
    }
    static std::vector<std::byte> meta_payload(std::string_view name,
                                               const std::vector<std::string>& queries) {
        std::vector<std::byte> payload;
        append_bytes(payload, bytes_of(U32Be(static_cast<uint32_t>(name.size()))));
        append_bytes(payload, bytes_of(name));
        append_bytes(payload, bytes_of(U32Be(static_cast<uint32_t>(queries.size()))));
        for (const std::string& query : queries) {
            append_bytes(payload, bytes_of(U32Be(static_cast<uint32_t>(query.size()))));
            append_bytes(payload, bytes_of(std::string_view(query)));
        }
        return payload;
    }
    /// To the transmission phase, with everything the server has. False: refused.
    bool go(std::string_view name, bool structured = true) {
        if (structured) {
            ask(kOptStructuredReply);
            ask(kOptSetMetaContext, meta_payload(name, {kContextAllocation}));
        }
        const auto answers = ask(kOptGo, info_payload(name));
        structured_ = structured;
        return !answers.empty() && answers.back().type == kRepAck;
    }

    // --- Transmission ----------------------------------------------------------------------------
    uint64_t request(uint16_t command, uint64_t offset_bytes, uint32_t length_bytes,
                     uint16_t flags = 0, Bytes payload = {}) {
        const uint64_t cookie = ++last_cookie_;
        reads_[cookie] = command == kCmdRead ? length_bytes : 0;
        put(RequestHeader{.flags = flags,
                          .command = command,
                          .cookie = cookie,
                          .offset_bytes = offset_bytes,
                          .length_bytes = length_bytes});
        send(payload);
        return cookie;
    }
    /// The next answer that is complete; answers may be in pieces that are mixed.
    std::optional<Answer> answer();
    /// One request, and its answer.
    std::optional<Answer> call(uint16_t command, uint64_t offset_bytes, uint32_t length_bytes,
                               uint16_t flags = 0, Bytes payload = {}) {
        const uint64_t cookie = request(command, offset_bytes, length_bytes, flags, payload);
        auto got = answer();
        return got && got->cookie == cookie ? got : std::nullopt;
    }

  private:
    bool take_chunk();

    UniqueFd fd_;
    bool connected_ = false;
    bool structured_ = false;
    std::optional<Greeting> greeting_;
    uint64_t last_cookie_ = 0;
    std::map<uint64_t, uint32_t> reads_;  ///< Bytes that a simple reply has; of all requests.
    std::map<uint64_t, Answer> partial_;
    std::optional<Answer> done_;
};

}  // namespace stellarium::nbd
