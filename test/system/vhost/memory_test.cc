// The real daemon under guests that write as much as they can and clients that ask for as much as
// they may: its memory stays within the budget of docs/internals/limits.md.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <thread>

#include <sys/socket.h>
#include <sys/un.h>

#include "daemon/limits.h"
#include "frontend/vhost_client/test_bench.h"
#include "test/system/vhost/process.h"

namespace stellarium::vhost {
namespace {

constexpr std::chrono::seconds kDeadline{60};
constexpr unsigned kGuests = 6;
constexpr unsigned kDepth = 8;
constexpr uint32_t kRequestBytes = 512 << 10;
constexpr uint64_t kVolumeBytes = 64 * kMiB;
constexpr unsigned kRounds = 6;
constexpr unsigned kBodies = 80;  ///< More, together, than the whole budget.
constexpr unsigned kImports = 3;
constexpr uint64_t kMemoryBytes = 32 * kMiB;

/// What a process has on its own and in the arena, in bytes: not the guests' memory, and not what
/// it maps of the store.
uint64_t own_memory_of(pid_t pid) {
    std::ifstream maps("/proc/" + std::to_string(pid) + "/smaps");
    uint64_t kib = 0;
    std::string line;
    std::string path;
    while (std::getline(maps, line)) {
        const size_t slash = line.find_first_of("/[");
        const bool heads_mapping = line.find('-') < line.find(' ');
        uint64_t value = 0;
        if (heads_mapping) {
            path = slash == std::string::npos ? std::string() : line.substr(slash);
        } else if (path.ends_with(".arena") || path.find(".arena ") != std::string::npos) {
            if (std::sscanf(line.c_str(), "Rss: %lu kB", &value) == 1) {
                kib += value;
            }
        } else if (!path.starts_with("/memfd:") &&
                   std::sscanf(line.c_str(), "Anonymous: %lu kB", &value) == 1) {
            kib += value;
        }
    }
    return kib * kKiB;
}

/// Looks again and again until it is destroyed.
class HighWater {
  public:
    explicit HighWater(pid_t pid)
        : thread_([this, pid] {
              while (!stop_) {
                  most_ = std::max<uint64_t>(most_, own_memory_of(pid));
                  std::this_thread::yield();
              }
          }) {}
    ~HighWater() { stop(); }
    HighWater(const HighWater&) = delete;
    HighWater& operator=(const HighWater&) = delete;
    uint64_t stop() {
        stop_ = true;
        if (thread_.joinable()) {
            thread_.join();
        }
        return most_;
    }

  private:
    std::atomic<bool> stop_{false};
    std::atomic<uint64_t> most_{0};
    std::thread thread_;
};

class DaemonMemoryTest : public ::testing::Test {
  protected:
    void SetUp() override {
        // Before any thread is started.
        ::setenv("STELLARIUM_RUNTIME_DIR", (folder_ / "run").c_str(), 1);
        ctl({"init"});
        daemon_ = std::make_unique<Process>(
            std::vector<std::string>{STELLARIUM_DAEMON, "--store", store_, "--socket", control_,
                                     "--threads", "2", "--memory", "32MiB"},
            STDERR_FILENO);
        daemon_->wait_for("event=ready");
    }
    void TearDown() override { ::unsetenv("STELLARIUM_RUNTIME_DIR"); }

    std::vector<std::string> ctl_words(const std::vector<std::string>& words) const {
        std::vector<std::string> all = {STELLARIUM_CTL, "--store", store_};
        all.insert(all.end(), words.begin(), words.end());
        return all;
    }
    void ctl(const std::vector<std::string>& words) const {
        EXPECT_EQ(Process(ctl_words(words)).wait(), 0) << words[0];
    }
    UniqueFd connect() const {
        UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        control_.copy(static_cast<char*>(address.sun_path), sizeof address.sun_path - 1);
        // The backlog may be full.
        while (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) !=
               0) {
            EXPECT_EQ(errno, EAGAIN);
            std::this_thread::yield();
        }
        return fd;
    }

    TemporaryFolder folder_;
    std::string store_ = folder_ / "store";
    std::string control_ = folder_ / "control.sock";
    std::unique_ptr<Process> daemon_;
};

TEST_F(DaemonMemoryTest, StaysWithinItsBudgetWhateverGuestsAndClientsDo) {
    std::vector<std::unique_ptr<TestGuest>> guests;
    std::vector<std::vector<std::unique_ptr<BlkSlot>>> slots(kGuests);
    for (unsigned i = 0; i < kGuests; ++i) {
        const std::string name = "v" + std::to_string(i);
        const std::string link = folder_ / (name + ".sock");
        ctl({"volume", "create", name, "--size", "64MiB"});
        ctl({"attach", name, "--vhost-user", link});
        guests.push_back(std::make_unique<TestGuest>());
        guests.back()->connect(link);
        for (unsigned slot = 0; slot < kDepth; ++slot) {
            slots[i].push_back(std::make_unique<BlkSlot>(*guests[i]->ram, kRequestBytes));
        }
    }
    HighWater memory(daemon_->pid());

    // Clients: whole images, contents that nobody reads, bodies of the greatest length.
    std::string image = folder_ / "image";
    {
        std::vector<uint64_t> words(24 * kMiB / 8);
        std::mt19937_64 random(1);
        std::ranges::generate(words, random);
        std::ofstream(image, std::ios::binary)
            .write(reinterpret_cast<const char*>(words.data()), 24 * kMiB);
    }
    std::vector<std::unique_ptr<Process>> imports;
    for (unsigned i = 0; i < kImports; ++i) {
        imports.push_back(std::make_unique<Process>(
            ctl_words({"image", "import", "image" + std::to_string(i), image})));
    }
    struct Body {
        UniqueFd fd;
        size_t sent = 0;
        bool over = false;
    };
    std::vector<Body> bodies;
    std::vector<UniqueFd> readers;
    const std::string header =
        "POST /v1/clones HTTP/1.1\r\nHost: x\r\nContent-Length: 16000000\r\n\r\n";
    const std::string filler(64 << 10, ' ');
    for (unsigned i = 0; i < kBodies; ++i) {
        bodies.push_back({connect()});
        ASSERT_EQ(::send(bodies[i].fd.get(), header.data(), header.size(), MSG_NOSIGNAL),
                  static_cast<ssize_t>(header.size()));
    }
    const auto push_bodies = [&] {
        bool moved = false;
        for (Body& body : bodies) {
            if (body.over || body.sent >= 15'900'000) {  // It never gets its last bytes.
                continue;
            }
            const ssize_t sent =
                ::send(body.fd.get(), filler.data(), filler.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            body.over = sent < 0 && errno != EAGAIN;
            body.sent += sent > 0 ? static_cast<size_t>(sent) : 0;
            moved = moved || sent > 0;
        }
        return moved;
    };

    // Guests: everything that fits into their rings, without a flush.
    for (unsigned round = 0; round < kRounds; ++round) {
        for (unsigned i = 0; i < kGuests; ++i) {
            for (unsigned slot = 0; slot < kDepth; ++slot) {
                std::ranges::fill(slots[i][slot]->data(),
                                  static_cast<std::byte>(1 + round * kGuests + i));
                const uint64_t offset =
                    (uint64_t{round} * kDepth + slot) * kRequestBytes % kVolumeBytes;
                ASSERT_TRUE(guests[i]->queue().add(
                    slots[i][slot]->prepare(kBlkOut, offset / 512, kRequestBytes)));
            }
            guests[i]->queue().kick();
        }
        for (unsigned i = 0; i < 20 && push_bodies(); ++i) {
        }
        for (auto& guest : guests) {
            while (guest->queue().outstanding() > 0) {
                ASSERT_TRUE(guest->queue().wait(std::chrono::seconds(60)));
                guest->queue().take_used();
            }
        }
        readers.push_back(connect());
        const std::string ask = "GET /v1/content?source=v0 HTTP/1.1\r\nHost: x\r\n\r\n";
        ASSERT_EQ(::send(readers.back().get(), ask.data(), ask.size(), MSG_NOSIGNAL),
                  static_cast<ssize_t>(ask.size()));
    }
    while (push_bodies()) {
    }
    for (auto& import : imports) {
        EXPECT_EQ(import->wait(), 0);
    }
    for (unsigned i = 0; i < kGuests; ++i) {
        for (auto& slot : slots[i]) {
            EXPECT_EQ(slot->status(), kBlkStatusOk);
        }
    }
    const uint64_t most = memory.stop();
    const unsigned hash_threads = std::clamp(std::thread::hardware_concurrency(), 1U, 8U);
    // There are fewer imports here than there may be, and no leave to use what these would have.
    const uint64_t budget = kMemoryBytes + daemon::memory_besides(kMemoryBytes, hash_threads) -
                            (daemon::kMaxStreams - kImports) * daemon::import_bytes(hash_threads);
    EXPECT_LE(most, budget) << format_size(most) << " of " << format_size(budget);
    EXPECT_LT(budget, uint64_t{kBodies} * 16 * kMiB) << "the clients could not have exceeded it";
    EXPECT_GE(most, kMemoryBytes / 2) << "what was measured is not what was meant";
    // With the clients goes what they held.
    bodies.clear();
    readers.clear();
    const auto end = std::chrono::steady_clock::now() + kDeadline;
    while (Process(ctl_words({"volume", "ls"})).wait() != 0) {
        ASSERT_LT(std::chrono::steady_clock::now(), end) << "the daemon refuses everything";
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    RecordProperty("most_bytes", std::to_string(most));
    if (std::getenv("STELLARIUM_TEST_VERBOSE") != nullptr) {
        std::printf("%s of %s\n", format_size(most).c_str(), format_size(budget).c_str());
    }
}

}  // namespace
}  // namespace stellarium::vhost
