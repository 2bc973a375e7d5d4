// The server is killed, again and again, while a guest has requests in flight; each of them is
// completed exactly once, and the disk holds what was written last.
#include <array>
#include <fstream>
#include <random>

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "frontend/vhost_client/test_bench.h"

extern char** environ;

namespace stellarium::vhost {
namespace {

/// A running vhost_memdisk.
class ServerProcess {
  public:
    ServerProcess(const std::string& socket, const std::string& file, bool hold, bool would_block) {
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
        std::vector<char*> arguments;
        arguments.reserve(words.size() + 1);
        for (std::string& word : words) {
            arguments.push_back(word.data());
        }
        arguments.push_back(nullptr);
        std::array<int, 2> output{};
        EXPECT_EQ(::pipe2(output.data(), O_CLOEXEC), 0);
        UniqueFd reader(output[0]);
        UniqueFd writer(output[1]);
        posix_spawn_file_actions_t actions;
        ::posix_spawn_file_actions_init(&actions);
        ::posix_spawn_file_actions_adddup2(&actions, writer.get(), STDOUT_FILENO);
        EXPECT_EQ(
            ::posix_spawn(&pid_, words[0].c_str(), &actions, nullptr, arguments.data(), environ),
            0);
        ::posix_spawn_file_actions_destroy(&actions);
        writer.reset();
        // It says "ready" when the socket is there; the end of the file would mean that it died.
        std::array<char, 6> ready{};
        EXPECT_EQ(::read(reader.get(), ready.data(), ready.size()), 6);
    }
    ~ServerProcess() { kill(); }
    ServerProcess(const ServerProcess&) = delete;
    ServerProcess& operator=(const ServerProcess&) = delete;

    void kill() {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            ::waitpid(pid_, nullptr, 0);
            pid_ = -1;
        }
    }

  private:
    pid_t pid_ = -1;
};

class RecoveryTest : public ::testing::Test {
  protected:
    static constexpr uint32_t kPage = 4096;

    void SetUp() override {
        file_ = folder_ / "disk";
        socket_ = folder_ / "socket";
        std::ofstream(file_).close();
        ASSERT_EQ(::truncate(file_.c_str(), 4 * kMiB), 0);
    }

    TemporaryFolder folder_;
    std::string file_;
    std::string socket_;
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

TEST_F(RecoveryTest, KilledAtAnyMomentNothingIsLostOrDoneTwice) {
    const char* scale_text = std::getenv("STELLARIUM_TEST_SCALE");
    uint64_t kills = 25 * (scale_text == nullptr ? 1 : std::strtoull(scale_text, nullptr, 10));
    const char* seed_text = std::getenv("STELLARIUM_TEST_SEED");
    uint64_t seed = seed_text == nullptr ? 1 : std::strtoull(seed_text, nullptr, 10);
    SCOPED_TRACE("STELLARIUM_TEST_SEED=" + std::to_string(seed));
    std::mt19937_64 random(seed);

    GuestOptions options;
    options.inflight = true;
    options.queues = 2;
    options.queue_size = 64;
    options.protocol_features |= bit(ProtocolFeature::kConfigureMemSlots);
    TestGuest guest(options);
    std::array<std::vector<Worker>, 2> workers;
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
        ServerProcess server(socket_, file_, /*hold=*/false, /*would_block=*/random() % 3 == 0);
        guest.connect(socket_);
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
        server.kill();
    }
    std::ifstream disk(file_, std::ios::binary);
    for (const auto& group : workers) {
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
