// The server is killed, again and again, while a guest has requests in flight; each of them is
// completed exactly once, and the disk holds what was written last.
#include <array>
#include <fstream>
#include <functional>
#include <random>

#include <unistd.h>

#include "base/test_scale.h"
#include "frontend/vhost_client/test_bench.h"
#include "test/system/vhost/process.h"

namespace stellarium::vhost {
namespace {

/// A running vhost_memdisk.
class ServerProcess : public Process {
  public:
    ServerProcess(const std::string& socket, const std::string& file, bool hold, bool would_block)
        : Process(words_for(socket, file, hold, would_block)) {
        wait_for("ready");  // The socket is there.
    }

  private:
    static std::vector<std::string> words_for(const std::string& socket, const std::string& file,
                                              bool hold, bool would_block) {
        std::vector<std::string> words = {STELLARIUM_VHOST_MEMDISK,
                                          "--socket",
                                          socket,
                                          "--file",
                                          file,
                                          "--queues",
                                          "2",
                                          "--threads",
                                          "2"};
        if (hold) {
            words.emplace_back("--hold");
        }
        if (would_block) {
            words.emplace_back("--would-block");
        }
        return words;
    }
};

/// One place on the disk, written and read back in turn.
struct Worker {
    std::unique_ptr<BlkSlot> slot;
    uint64_t sector = 0;
    uint64_t generation = 0;  ///< Last written, or being written.
    bool writing = false;
    bool busy = false;
};

void stamp(MutableBytes page, uint64_t sector, uint64_t generation) {
    for (size_t at = 0; at < page.size(); at += 16) {
        std::memcpy(page.data() + at, &sector, 8);
        std::memcpy(page.data() + at + 8, &generation, 8);
    }
}

class RecoveryTest : public ::testing::Test {
  protected:
    static constexpr uint32_t kPage = 4096;

    void SetUp() override {
        file_ = folder_ / "disk";
        socket_ = folder_ / "socket";
        std::ofstream(file_).close();
        ASSERT_EQ(::truncate(file_.c_str(), 4 * kMiB), 0);
    }

    /// Makes servers and kills them, `kills` times, while two queues of requests are in flight.
    /// Every answer and every read is checked on the way; the last server lives to finish all.
    void hammer(const std::string& socket, uint64_t kills,
                const std::function<std::unique_ptr<Process>(std::mt19937_64& random)>& start);

    std::array<std::vector<Worker>, 2> workers_;
    std::unique_ptr<TestGuest> guest_;
    TemporaryFolder folder_;
    std::string file_;
    std::string socket_;
};

void RecoveryTest::hammer(
    const std::string& socket, uint64_t kills,
    const std::function<std::unique_ptr<Process>(std::mt19937_64& random)>& start) {
    const uint64_t seed = first_seed();
    SCOPED_TRACE("STELLARIUM_TEST_SEED=" + std::to_string(seed));
    std::mt19937_64 random(seed);

    GuestOptions options;
    options.inflight = true;
    options.queues = 2;
    options.queue_size = 64;
    options.protocol_features |= bit(ProtocolFeature::kConfigureMemSlots);
    guest_ = std::make_unique<TestGuest>(options);
    TestGuest& guest = *guest_;
    std::array<std::vector<Worker>, 2>& workers = workers_;
    for (uint16_t q = 0; q < 2; ++q) {
        workers[q].resize(24);
        for (size_t i = 0; i < workers[q].size(); ++i) {
            workers[q][i].slot = std::make_unique<BlkSlot>(*guest.ram, kPage, 1024);
            workers[q][i].sector = (q * uint64_t{24} + i) * (kPage / 512);
        }
    }
    std::array<std::vector<Worker*>, 2> by_head = {std::vector<Worker*>(64),
                                                   std::vector<Worker*>(64)};

    uint64_t done = 0;
    auto submit = [&](uint16_t q, Worker& worker) {
        worker.writing = worker.generation == 0 || random() % 2 == 0;
        if (worker.writing) {
            stamp(worker.slot->data(), worker.sector, ++worker.generation);
        } else {
            std::ranges::fill(worker.slot->data(), std::byte{0});
        }
        std::optional<uint16_t> head = guest.queue(q).add(
            worker.slot->prepare(worker.writing ? kBlkOut : kBlkIn, worker.sector, kPage));
        ASSERT_TRUE(head);
        worker.busy = true;
        by_head[q][*head] = &worker;
    };
    auto complete = [&](uint16_t q) {
        uint64_t count = 0;
        while (std::optional<UsedElement> used = guest.queue(q).take_used()) {
            Worker* worker = std::exchange(by_head[q].at(used->id), nullptr);
            ASSERT_NE(worker, nullptr) << "descriptor " << used->id << " completed twice";
            worker->busy = false;
            ASSERT_EQ(worker->slot->status(), kBlkStatusOk);
            std::array<std::byte, kPage> expected;
            stamp(expected, worker->sector, worker->generation);
            ASSERT_EQ(std::memcmp(worker->slot->data().data(), expected.data(), kPage), 0)
                << "sector " << worker->sector << " generation " << worker->generation;
            ++count;
        }
        done += count;
    };

    for (uint64_t life = 0; life <= kills; ++life) {
        bool last = life == kills;
        const std::unique_ptr<Process> server = start(random);
        guest.connect(socket);
        uint64_t target = done + random() % 300;
        while (done < target) {
            for (uint16_t q = 0; q < 2; ++q) {
                for (Worker& worker : workers[q]) {
                    if (!worker.busy && random() % 4 != 0) {
                        submit(q, worker);
                    }
                }
                guest.queue(q).kick_if_wanted();
            }
            ASSERT_TRUE(guest.queue(0).wait(kClientTimeout));
            complete(0);
            complete(1);
            if (HasFatalFailure()) {
                return;
            }
        }
        if (last) {
            for (uint16_t q = 0; q < 2; ++q) {
                while (guest.queue(q).outstanding() > 0) {
                    ASSERT_TRUE(guest.queue(q).wait(kClientTimeout));
                    complete(q);
                }
            }
            break;
        }
        // A burst, and the end somewhere in the middle of it.
        for (uint16_t q = 0; q < 2; ++q) {
            for (Worker& worker : workers[q]) {
                if (!worker.busy) {
                    submit(q, worker);
                }
            }
            guest.queue(q).kick_if_wanted();
        }
        for (uint64_t spin = random() % 30'000; spin > 0; --spin) {
            (void)guest.queue(0).used_index();
        }
        server->kill();
    }
}

TEST_F(RecoveryTest, KilledAtAnyMomentNothingIsLostOrDoneTwice) {
    hammer(socket_, scaled(25, 5), [&](std::mt19937_64& random) {
        return std::make_unique<ServerProcess>(socket_, file_, /*hold=*/false,
                                               /*would_block=*/random() % 3 == 0);
    });
    std::ifstream disk(file_, std::ios::binary);
    for (const auto& group : workers_) {
        for (const Worker& worker : group) {
            std::array<std::byte, kPage> expected;
            std::array<std::byte, kPage> found;
            stamp(expected, worker.sector, worker.generation);
            disk.seekg(static_cast<std::streamoff>(worker.sector * 512));
            disk.read(reinterpret_cast<char*>(found.data()), kPage);
            if (worker.generation > 0) {
                EXPECT_EQ(found, expected) << "sector " << worker.sector;
            }
        }
    }
}

/// A store with one attached volume, and the daemon that serves it.
class DaemonRecoveryTest : public RecoveryTest {
  protected:
    void SetUp() override {
        RecoveryTest::SetUp();
        // Before any thread is started.
        ::setenv("STELLARIUM_RUNTIME_DIR", (folder_ / "run").c_str(), 1);
        store_ = folder_ / "store";
        link_ = folder_ / "volume.sock";
        ctl({"init"});
        ctl({"volume", "create", "volume", "--size", "4MiB"});
        const auto daemon = start();
        ctl({"attach", "volume", "--vhost-user", link_, "--queues", "2"});
    }
    void TearDown() override { ::unsetenv("STELLARIUM_RUNTIME_DIR"); }

    void ctl(const std::vector<std::string>& words) const {
        std::vector<std::string> all = {STELLARIUM_CTL, "--store", store_};
        all.insert(all.end(), words.begin(), words.end());
        EXPECT_EQ(Process(all).wait(), 0) << words[0];
    }
    /// Little memory and an early write-back, so that a kill meets both at work.
    std::unique_ptr<Process> start() const {
        auto daemon = std::make_unique<Process>(
            std::vector<std::string>{STELLARIUM_DAEMON, "--store", store_, "--threads", "2",
                                     "--memory", "16MiB", "--writeback-age-ms", "50"},
            STDERR_FILENO);
        daemon->wait_for("event=ready");
        return daemon;
    }

    std::string store_;
    std::string link_;
};

TEST_F(DaemonRecoveryTest, UnflushedWritesOutliveTheDaemonHoweverOftenItIsKilled) {
    hammer(link_, scaled(25, 5), [&](std::mt19937_64&) { return start(); });
    if (HasFatalFailure()) {
        return;
    }
    guest_.reset();
    // Killed once more, with everything acknowledged.
    for (int again = 0; again < 2; ++again) {
        const auto daemon = start();
        TestGuest reader;
        reader.connect(link_);
        for (const auto& group : workers_) {
            for (const Worker& worker : group) {
                if (worker.generation == 0) {
                    continue;
                }
                std::array<std::byte, kPage> expected;
                std::array<std::byte, kPage> found;
                stamp(expected, worker.sector, worker.generation);
                EXPECT_EQ(value_of(reader.driver().read(worker.sector * 512, found), "read"),
                          kBlkStatusOk);
                EXPECT_EQ(found, expected) << "sector " << worker.sector;
            }
        }
    }
}

TEST_F(RecoveryTest, WhatAServerNeverFinishedIsFinishedByTheNext) {
    GuestOptions options;
    options.inflight = true;
    options.queues = 2;
    TestGuest guest(options);
    std::vector<std::unique_ptr<BlkSlot>> slots;
    {
        ServerProcess holding(socket_, file_, /*hold=*/true, /*would_block=*/false);
        guest.connect(socket_);
        for (unsigned i = 0; i < 20; ++i) {
            slots.push_back(std::make_unique<BlkSlot>(*guest.ram, kPage));
            stamp(slots.back()->data(), 7, i);
            ASSERT_TRUE(guest.queue().add(slots.back()->prepare(kBlkOut, 7, kPage)));
        }
        guest.queue().kick();
        // Stopping cannot finish, so the answer to another question says that the kick was seen.
        STELLARIUM_EXPECT_OK(guest.client->config());
    }
    EXPECT_EQ(guest.queue().used_index(), 0U);
    ServerProcess next(socket_, file_, /*hold=*/false, /*would_block=*/false);
    guest.connect(socket_);
    while (guest.queue().outstanding() > 0) {
        ASSERT_TRUE(guest.queue().wait(kClientTimeout));
        guest.queue().take_used();
    }
    std::array<std::byte, kPage> expected;
    std::array<std::byte, kPage> found;
    stamp(expected, 7, 19);
    std::ifstream disk(file_, std::ios::binary);
    disk.seekg(std::streamoff{7} * 512);
    disk.read(reinterpret_cast<char*>(found.data()), kPage);
    EXPECT_EQ(found, expected);
}

}  // namespace
}  // namespace stellarium::vhost
