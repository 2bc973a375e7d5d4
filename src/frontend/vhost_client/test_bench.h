// What the tests of the frontend share: a server with a disk, and guests that drive it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/units.h"
#include "frontend/vhost/server.h"
#include "frontend/vhost_client/client.h"
#include "frontend/vhost_client/memory_disk.h"

namespace stellarium::vhost {

/// Unwraps a Result, failing the test with its message.
#define STELLARIUM_EXPECT_OK(expr)                                                      \
    do {                                                                                \
        const auto& expect_ok_result = (expr);                                          \
        EXPECT_TRUE(expect_ok_result.has_value())                                       \
            << (expect_ok_result ? std::string() : expect_ok_result.error().message()); \
    } while (false)

template <typename T>
T value_of(Result<T> result, const char* what) {
    if (!result) {
        ADD_FAILURE() << what << ": " << result.error().message();
        std::abort();  // Nothing after this would mean anything.
    }
    return std::move(*result);
}

/// A folder that goes with its contents.
class TemporaryFolder {
  public:
    TemporaryFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "vhost-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) {
            std::abort();
        }
        path_ = name;
    }
    ~TemporaryFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;
    std::string operator/(std::string_view name) const { return (path_ / name).string(); }

  private:
    std::filesystem::path path_;
};

/// How a guest of the tests is set up.
struct GuestOptions {
    uint64_t features = kUsualFeatures;
    uint64_t protocol_features = kUsualProtocolFeatures;
    uint16_t queues = 1;
    uint16_t queue_size = 128;
    uint64_t ram_bytes = 24 * kMiB;
    uint32_t segment_bytes = UINT32_MAX;
    bool inflight = false;
};

/// RAM and rings of a guest, and its connection, which can be lost and made again.
struct TestGuest {
    explicit TestGuest(GuestOptions guest_options = {}) : options(guest_options) {
        ram = value_of(GuestRam::create(options.ram_bytes), "guest memory");
        for (uint16_t i = 0; i < options.queues; ++i) {
            queues.push_back(std::make_unique<DriverQueue>(
                *ram, options.queue_size, (options.features & feature_bit(kFeatureEventIdx)) != 0,
                (options.features & feature_bit(kFeatureIndirectDesc)) != 0));
        }
    }

    /// Connects and negotiates, but shares and starts nothing.
    void connect_only(const std::string& socket) {
        client = value_of(Client::connect(socket), "connect");
        STELLARIUM_EXPECT_OK(client->negotiate(options.features, options.protocol_features));
    }
    void connect(const std::string& socket) {
        connect_only(socket);
        STELLARIUM_EXPECT_OK(client->share(*ram));
        if (options.inflight) {
            if (!inflight_fd) {
                auto [fd, layout] = value_of(
                    client->get_inflight(options.queues, options.queue_size), "in-flight region");
                inflight_fd = std::move(fd);
                inflight_layout = layout;
            }
            STELLARIUM_EXPECT_OK(client->set_inflight(inflight_fd, inflight_layout));
        }
        for (uint16_t i = 0; i < options.queues; ++i) {
            STELLARIUM_EXPECT_OK(client->start_queue(i, *queues[i], queues[i]->used_taken()));
        }
    }
    BlkDriver& driver(uint16_t queue = 0) {
        drivers.resize(options.queues);
        if (!drivers[queue]) {
            drivers[queue] =
                std::make_unique<BlkDriver>(*ram, *queues[queue], 1 << 20, options.segment_bytes);
        }
        return *drivers[queue];
    }
    DriverQueue& queue(uint16_t index = 0) { return *queues[index]; }

    GuestOptions options;
    std::unique_ptr<GuestRam> ram;
    std::vector<std::unique_ptr<DriverQueue>> queues;
    std::vector<std::unique_ptr<BlkDriver>> drivers;
    std::unique_ptr<Client> client;
    UniqueFd inflight_fd;
    InflightDescription inflight_layout;
};

class VhostTest : public ::testing::Test {
  protected:
    static constexpr uint64_t kDiskBytes = 32 * kMiB;

    void SetUp() override {
        start_server();
        disk_ = value_of(MemoryDisk::create(kDiskBytes), "disk");
    }
    void TearDown() override { server_.reset(); }

    void start_server() {
        ServerOptions options;
        options.data_threads = data_threads_;
        options.clock = clock_;
        options.logger = [this](LogLevel level, std::string_view device, std::string_view message) {
            std::lock_guard lock(log_mutex_);
            log_ += std::string(device) + ": " + std::string(message) + "\n";
            warnings_ += level == LogLevel::kInfo ? 0 : 1;
        };
        server_ = value_of(VhostServer::create(std::move(options)), "server");
    }

    void attach(const std::string& name, const std::shared_ptr<MemoryDisk>& disk,
                AttachOptions options = {}) {
        options.socket_path = socket(name);
        STELLARIUM_EXPECT_OK(server_->attach(name, disk, std::move(options)));
    }
    void attach_one(AttachOptions options = {}) { attach("one", disk_, std::move(options)); }
    std::string socket(std::string_view name = "one") const { return folder_ / name; }
    AttachmentStatus status(std::string_view name = "one") const {
        return value_of(server_->status(name), "status");
    }
    std::string log() {
        std::lock_guard lock(log_mutex_);
        return log_;
    }
    /// Different bytes for each seed.
    static std::vector<std::byte> pattern(size_t bytes, unsigned seed) {
        std::vector<uint64_t> words(bytes / 8 + 1);
        std::mt19937_64 random(seed);
        std::ranges::generate(words, random);
        Bytes data = std::as_bytes(std::span(words)).first(bytes);
        return {data.begin(), data.end()};
    }
    std::vector<std::byte> on_disk(uint64_t offset, size_t bytes) const {
        return disk_->content(offset, bytes);
    }
    static bool equal(Bytes a, Bytes b) {
        return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
    }

    unsigned data_threads_ = 2;        ///< Before SetUp().
    std::function<uint64_t()> clock_;  ///< The same; empty for the system's.
    TemporaryFolder folder_;
    std::shared_ptr<MemoryDisk> disk_;
    std::unique_ptr<VhostServer> server_;
    std::mutex log_mutex_;
    std::string log_;
    int warnings_ = 0;
};

}  // namespace stellarium::vhost
