// Many threads on a few volumes, with the background threads of a pool running.
//
// Each volume has writers that own interleaved sectors, so that writers meet within pages but never
// within sectors. Every sector says which write of which thread it comes from. So each read, and
// each snapshot taken meanwhile, can be judged by itself:
//   - a sector is whole, and is of its place;
//   - a writer reads what it wrote last;
//   - a snapshot holds, for each writer, everything that it had completed before the snapshot was
//     asked for, nothing that it began after the snapshot was there, and no write without all of
//     the same writer's earlier ones.
//
//     STELLARIUM_TEST_SCALE=10  run ten times as long
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <future>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/hash.h"
#include "base/test_scale.h"
#include "base/units.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using testing::must;
using testing::TestPool;

constexpr unsigned kVolumes = 2;
constexpr unsigned kWriters = 3;
constexpr uint64_t kVolumeBytes = 5 * kMiB;  // Three leaves, the last one in part.
constexpr uint64_t kSectors = kVolumeBytes / kSectorBytes;
constexpr uint64_t kStripe = 5;  ///< Sectors in a row that one writer owns: no multiple of a page.

uint64_t rounds() {
    return scaled(40, 20);
}

unsigned owner_of(uint64_t sector) {
    return static_cast<unsigned>(sector / kStripe % kWriters);
}

using Sector = std::array<std::byte, kSectorBytes>;

/// What write number `operation` of the sector's owner puts there. 0: never written, zeros.
Sector sector_content(unsigned volume, uint64_t sector, uint32_t operation) {
    Sector content{};
    if (operation != 0) {
        io::SeededRandom((uint64_t{operation} << 32) + sector * kVolumes + volume).fill(content);
        std::memcpy(content.data(), &operation, sizeof operation);
    }
    return content;
}

/// The number of the write that a sector comes from; fails when it is not a whole one.
uint32_t operation_of(unsigned volume, uint64_t sector, Bytes content) {
    uint32_t operation = 0;
    std::memcpy(&operation, content.data(), sizeof operation);
    const Sector expected = sector_content(volume, sector, operation);
    EXPECT_EQ(std::memcmp(expected.data(), content.data(), kSectorBytes), 0)
        << "volume " << volume << " sector " << sector << " is torn or of another place";
    return operation;
}

/// One writer of one volume, and what it did.
struct Writer {
    struct Write {
        uint64_t first_sector = 0;
        uint64_t sectors = 0;
    };
    std::mutex mutex;
    std::vector<Write> writes = {Write{}};  ///< By number; number 0 is none. Guarded by mutex.
    std::atomic<uint32_t> submitted{0};
    std::atomic<uint32_t> completed{0};
};

struct TestVolume {
    std::string name;
    std::shared_ptr<BlockDevice> device;
    std::array<Writer, kWriters> writers;
};

class Concurrency {
  public:
    Concurrency() : pool_(1, options()) {
        for (unsigned v = 0; v < kVolumes; ++v) {
            volumes_[v].name = fmt::format("v{}", v);
            must(pool_->create_volume(volumes_[v].name, kVolumeBytes));
            volumes_[v].device = must(pool_->attach(volumes_[v].name, {}));
        }
    }

    void run() {
        std::vector<std::thread> threads;
        for (unsigned v = 0; v < kVolumes; ++v) {
            for (unsigned w = 0; w < kWriters; ++w) {
                threads.emplace_back([this, v, w] { write_and_read(v, w); });
            }
            threads.emplace_back([this, v] { flush(v); });
        }
        for (uint64_t round = 0; round < rounds() && !::testing::Test::HasFailure(); ++round) {
            take_snapshot(static_cast<unsigned>(round % kVolumes), round);
            if (round % 7 == 3) {
                must(pool_->checkpoint());
            }
        }
        stop_.store(true);
        for (std::thread& thread : threads) {
            thread.join();
        }
        check_all();
        for (TestVolume& volume : volumes_) {
            volume.device.reset();
        }
        pool_.reopen();
        for (TestVolume& volume : volumes_) {
            volume.device = must(pool_->attach(volume.name, {}));
        }
        check_all();
        for (TestVolume& volume : volumes_) {
            volume.device.reset();
        }
    }

  private:
    static PoolOptions options() {
        PoolOptions options = TestPool::small_options();
        options.background = true;
        options.dirty_budget_bytes = 2 * kMiB;  // Write-back by pressure all the time.
        options.checkpoint_bytes = 4 * kMiB;
        options.node_cache_bytes = 128 * kKiB;
        return options;
    }

    void write_and_read(unsigned v, unsigned w) {
        TestVolume& volume = volumes_[v];
        Writer& writer = volume.writers[w];
        std::mt19937_64 random(v * kWriters + w + 1);
        std::vector<uint32_t> last(kSectors);
        std::vector<std::byte> data;
        for (uint32_t operation = 1; !stop_.load() && !::testing::Test::HasFailure(); ++operation) {
            // Some sectors of one stripe.
            const uint64_t stripe = random() % (kSectors / kStripe / kWriters) * kWriters + w;
            const uint64_t first = stripe * kStripe + random() % kStripe;
            const uint64_t count = 1 + random() % (stripe * kStripe + kStripe - first);
            data.clear();
            for (uint64_t s = first; s < first + count; ++s) {
                const Sector content = sector_content(v, s, operation);
                data.insert(data.end(), content.begin(), content.end());
                last[s] = operation;
            }
            {
                const std::lock_guard lock(writer.mutex);
                writer.writes.push_back({.first_sector = first, .sectors = count});
            }
            writer.submitted.store(operation);
            auto written = testing::write(*volume.device, first * kSectorBytes, data,
                                          operation % 2 == 0 ? IoMode::kNoWait : IoMode::kMayBlock);
            if (!written && written.error().code() == ErrorCode::kWouldBlock) {
                written = testing::write(*volume.device, first * kSectorBytes, data);
            }
            must(std::move(written));
            writer.completed.store(operation);

            // Its own sectors somewhere else, and whatever is between them.
            const uint64_t start = random() % (kSectors - 40);
            const auto read =
                testing::read(*volume.device, start * kSectorBytes, 40 * kSectorBytes);
            for (uint64_t s = start; s < start + 40; ++s) {
                const uint32_t found = operation_of(
                    v, s, Bytes(read).subspan((s - start) * kSectorBytes, kSectorBytes));
                if (owner_of(s) == w) {
                    EXPECT_EQ(found, last[s]) << "volume " << v << " sector " << s;
                }
            }
        }
    }

    void flush(unsigned v) {
        while (!stop_.load()) {
            must(testing::flush(*volumes_[v].device));
        }
    }

    void take_snapshot(unsigned v, uint64_t round) {
        TestVolume& volume = volumes_[v];
        std::array<uint32_t, kWriters> before{};
        std::array<uint32_t, kWriters> after{};
        for (unsigned w = 0; w < kWriters; ++w) {
            before[w] = volume.writers[w].completed.load();
        }
        const std::string snapshot = fmt::format("s{}", round);
        must(pool_->create_snapshot(volume.name, snapshot));
        for (unsigned w = 0; w < kWriters; ++w) {
            after[w] = volume.writers[w].submitted.load();
        }
        const auto content = testing::export_all(*pool_, volume.name + "@" + snapshot);
        check_cut(v, content, before, after);
        if (round >= 4) {
            must(pool_->remove_snapshot(volumes_[(round - 4) % kVolumes].name,
                                        fmt::format("s{}", round - 4)));
        }
    }

    void check_cut(unsigned v, const std::vector<std::byte>& content,
                   const std::array<uint32_t, kWriters>& at_least,
                   const std::array<uint32_t, kWriters>& at_most) {
        std::vector<uint32_t> found(kSectors);
        std::array<uint32_t, kWriters> newest = at_least;
        for (uint64_t s = 0; s < kSectors; ++s) {
            found[s] = operation_of(v, s, Bytes(content).subspan(s * kSectorBytes, kSectorBytes));
            newest[owner_of(s)] = std::max(newest[owner_of(s)], found[s]);
        }
        for (unsigned w = 0; w < kWriters; ++w) {
            EXPECT_LE(newest[w], at_most[w]) << "holds a write from after the snapshot";
            Writer& writer = volumes_[v].writers[w];
            const std::lock_guard lock(writer.mutex);
            // What the first newest[w] writes leave; the last of them may be there in part.
            std::vector<uint32_t> expected(kSectors);
            std::vector<uint32_t> without_last(kSectors);
            for (uint32_t operation = 1; operation <= newest[w]; ++operation) {
                const Writer::Write& write = writer.writes[operation];
                for (uint64_t s = write.first_sector; s < write.first_sector + write.sectors; ++s) {
                    expected[s] = operation;
                    if (operation < newest[w] || operation <= at_least[w]) {
                        without_last[s] = operation;
                    }
                }
            }
            for (uint64_t s = 0; s < kSectors; ++s) {
                if (owner_of(s) == w && found[s] != expected[s] && found[s] != without_last[s]) {
                    ADD_FAILURE() << "volume " << v << " sector " << s << ": write " << found[s]
                                  << " instead of " << expected[s] << " of writer " << w << " at "
                                  << newest[w];
                    return;
                }
            }
        }
    }

    void check_all() {
        for (unsigned v = 0; v < kVolumes; ++v) {
            std::array<uint32_t, kWriters> done{};
            for (unsigned w = 0; w < kWriters; ++w) {
                done[w] = volumes_[v].writers[w].completed.load();
            }
            check_cut(v, testing::read(*volumes_[v].device, 0, kVolumeBytes), done, done);
        }
    }

    TestPool pool_;
    std::array<TestVolume, kVolumes> volumes_;
    std::atomic<bool> stop_{false};
};

TEST(PoolConcurrency, WritersReadersFlushesSnapshotsAndCheckpoints) {
    Concurrency().run();
}

/// A device goes while the next one is attached: whichever volume object the new device writes to,
/// a snapshot must see it.
TEST(PoolConcurrency, AttachWhileTheLastDeviceGoes) {
    PoolOptions options = TestPool::small_options();
    options.background = true;
    TestPool pool(1, options);
    must(pool->create_volume("a", kMiB));
    // Keeps the pool's list of devices contended, so that the threads below meet in every order.
    std::atomic<bool> stop{false};
    std::vector<std::thread> lookers;
    for (int i = 0; i < 3; ++i) {
        lookers.emplace_back([&] {
            while (!stop.load()) {
                must(pool->find("a"));
            }
        });
    }
    auto device = must(pool->attach("a", {}));
    const uint64_t last_round = scaled(60, 20);
    for (uint64_t round = 0; round < last_round && !HasFailure(); ++round) {
        std::thread detach([old = std::move(device)]() mutable { old.reset(); });
        for (device = nullptr; !device;) {
            if (auto attached = pool->attach("a", {})) {
                device = *std::move(attached);
            } else if (attached.error().code() != ErrorCode::kBusy) {
                ADD_FAILURE() << attached.error().message();
                break;
            }
        }
        detach.join();
        if (!device) {
            break;
        }
        const auto data = testing::random_bytes(kPageBytes, round);
        must(testing::write(*device, 0, data));
        must(pool->create_snapshot("a", "s"));
        std::vector<std::byte> found(kPageBytes);
        must(must(pool->open_reader("a@s"))->read(0, found));
        EXPECT_TRUE(found == data)
            << "round " << round << ": the snapshot lacks a write completed before it";
        must(pool->remove_snapshot("a", "s"));
    }
    stop.store(true);
    for (std::thread& thread : lookers) {
        thread.join();
    }
}

/// Comes when what is dirty in a volume has been written back; fails when it never does.
void wait_until_clean(Pool& pool, const std::string& name) {
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (must(pool.find(name)).dirty_bytes != 0) {
        if (std::chrono::steady_clock::now() > give_up) {
            ADD_FAILURE() << name << " is never written back";
            return;
        }
        std::this_thread::yield();
    }
}

/// However writes, flushes and discards meet, what is dirty is written back without being asked.
TEST(PoolConcurrency, NoVolumeFallsOutOfWriteBack) {
    PoolOptions options = TestPool::small_options();
    options.background = true;
    options.writeback_age = std::chrono::milliseconds(1);
    TestPool pool(1, options);
    pool.machine().clock().set_auto_step(std::chrono::seconds(1));  // Everything is old at once.
    must(pool->create_volume("a", 64 * kMiB));
    auto device = must(pool->attach("a", {}));
    const auto data = testing::random_bytes(kPageBytes, 1);
    const uint64_t last_round = scaled(10, 4);
    for (uint64_t round = 0; round < last_round && !HasFailure(); ++round) {
        std::atomic<bool> stop{false};
        std::thread writer([&] {
            for (uint64_t i = 0; !stop.load(); ++i) {
                must(testing::write(*device, i % 64 * kPageBytes, data));
            }
        });
        for (int i = 0; i < 30; ++i) {
            must(testing::flush(*device));
            if (i % 10 == 9) {
                must(device->discard(0, 64 * kMiB, IoMode::kMayBlock));
            }
        }
        stop.store(true);
        writer.join();
        must(testing::flush(*device));
        must(testing::write(*device, 0, data));
        wait_until_clean(*pool, "a");
    }
}

/// A completion may hold the last reference to its device. The flush that closing it makes does not
/// wait for the thread it runs on.
TEST(PoolConcurrency, ADeviceMayGoInACompletion) {
    PoolOptions options = TestPool::small_options();
    options.background = true;
    TestPool pool(1, options);
    must(pool->create_volume("a", kMiB));
    must(pool->create_volume("b", kMiB));
    auto other = must(pool->attach("b", {}));
    for (const bool fails : {false, true}) {
        auto device = must(pool->attach("a", {}));
        must(testing::write(*device, 0, testing::random_bytes(kPageBytes, fails ? 1 : 2)));
        if (fails) {
            // The completion is then called by the thread that commits, not the one that syncs.
            pool.machine().files().inject({.kind = io::OperationKind::kWrite,
                                           .path_part = "segments",
                                           .for_ever = true,
                                           .errno_value = ENOSPC});
        }
        std::promise<void> gone;
        std::promise<bool> flushed;
        BlockDevice& raw = *device;
        raw.flush_async(
            [keep = device, gone = gone.get_future().share(), &flushed](Result<void> result) {
                gone.wait();
                flushed.set_value(result.has_value());
            });
        device.reset();
        gone.set_value();
        EXPECT_EQ(flushed.get_future().get(), !fails);
        std::promise<void> next;
        auto next_done = next.get_future();
        other->flush_async([&next](Result<void>) { next.set_value(); });
        if (next_done.wait_for(std::chrono::seconds(60)) != std::future_status::ready) {
            fmt::print(stderr, "the pool's flushes wait for each other\n");
            std::abort();  // Nothing could be taken down any more.
        }
        EXPECT_FALSE(must(pool->find("a")).attached);
        pool.machine().files().clear_faults();
        must(pool->create_snapshot("a", fails ? "s1" : "s0"));
    }
}

}  // namespace
}  // namespace stellarium::nova
