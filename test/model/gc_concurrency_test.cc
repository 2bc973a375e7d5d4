// Garbage collections in a loop, beside everything else that a pool does.
//
//   - guests write, read back and flush; much of what they write is what others have just dropped,
//     so that it is found as a duplicate of chunks that are about to die;
//   - clones come and go, and each is read through an export that outlives it;
//   - images are imported whose content was removed a moment ago.
//
// Everything that is read is compared with what was written.
//
//     STELLARIUM_TEST_SCALE=100  run longer
#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using testing::must;
using testing::random_bytes;
using testing::TestPool;

constexpr unsigned kGuests = 2;
constexpr uint64_t kGuestBytes = 3 * kMiB;
constexpr uint64_t kImageBytes = 2 * kMiB;
constexpr unsigned kRecurring = 12;  ///< Pieces of content that are written again and again.
constexpr uint64_t kPieceBytes = 128 * kKiB;

class GcBesideAll {
  public:
    GcBesideAll() : pool_(1, options()) {
        for (unsigned i = 0; i < kRecurring; ++i) {
            recurring_.push_back(random_bytes(kPieceBytes, 100 + i));
        }
        for (unsigned i = 0; i < images_.size(); ++i) {
            // Images share pieces with each other and with what guests write.
            images_[i] = random_bytes(kImageBytes, 200 + i);
            for (unsigned k = 0; k < 4; ++k) {
                const auto& piece = recurring_[(3 * i + k) % kRecurring];
                std::copy(piece.begin(), piece.end(),
                          images_[i].begin() + static_cast<ptrdiff_t>(2 * k * kPieceBytes));
            }
        }
        testing::import_image(*pool_, "base", images_[0]);
        for (unsigned g = 0; g < kGuests; ++g) {
            const std::string name = fmt::format("guest{}", g);
            must(pool_->create_volume(name, kGuestBytes));
            devices_[g] = must(pool_->attach(name, {}));
            contents_[g].resize(kGuestBytes);
        }
    }

    void run() {
        std::vector<std::thread> threads;
        for (unsigned g = 0; g < kGuests; ++g) {
            start(threads, [this, g] { be_a_guest(g); });
        }
        start(threads, [this] { clone_and_remove(); });
        start(threads, [this] { import_and_remove(); });
        const uint64_t collections = scaled(40, 6);
        uint64_t freed_bytes = 0;
        for (uint64_t i = 0; i < collections && !failed(); ++i) {
            // Everybody does something between two collections.
            freed_bytes += must(pool_->gc({})).freed_bytes;
            wait_for_all();
        }
        stop_ = true;
        for (std::thread& thread : threads) {
            thread.join();
        }
        EXPECT_GT(freed_bytes, 0U);
        check_guests();
        must(pool_->gc({}));
        check_guests();
        for (auto& device : devices_) {
            device.reset();
        }
        pool_.reopen();
        for (unsigned g = 0; g < kGuests; ++g) {
            devices_[g] = must(pool_->attach(fmt::format("guest{}", g), {}));
        }
        check_guests();
        EXPECT_TRUE(testing::export_all(*pool_, "base") == images_[0]);
        for (auto& device : devices_) {
            device.reset();
        }
    }

  private:
    static PoolOptions options() {
        PoolOptions options = TestPool::small_options();
        options.store.segment_bytes = kMiB;
        options.background = true;
        options.dirty_budget_bytes = 2 * kMiB;
        options.checkpoint_bytes = 8 * kMiB;
        options.node_cache_bytes = 256 * kKiB;
        options.gc.automatic = false;
        return options;
    }

    bool failed() const { return stop_.load() || ::testing::Test::HasFailure(); }

    /// What a thread has done once more.
    enum Did : size_t { kGuestTurn, kClone, kImport, kKinds };
    void note(Did what) {
        const std::lock_guard lock(mutex_);
        ++done_[what];
        changed_.notify_all();
    }
    /// Until each kind was done once more.
    void wait_for_all() {
        std::unique_lock lock(mutex_);
        const auto before = done_;
        changed_.wait(lock, [&] {
            return failed() || std::equal(before.begin(), before.end(), done_.begin(),
                                          [](uint64_t was, uint64_t is) { return was < is; });
        });
    }

    /// An exception of a thread is a failure of the test.
    template <typename Work>
    void start(std::vector<std::thread>& threads, Work work) {
        threads.emplace_back([this, work] {
            try {
                work();
            } catch (const std::exception& error) {
                ADD_FAILURE() << error.what();
            }
            // Whoever waits sees that it ended, and why.
            const std::lock_guard lock(mutex_);
            changed_.notify_all();
        });
    }

    void be_a_guest(unsigned g) {
        std::mt19937_64 random(g + 1);
        BlockDevice& device = *devices_[g];
        std::vector<std::byte>& content = contents_[g];
        for (uint64_t turn = 0; !failed(); ++turn) {
            const uint64_t sectors = 1 + random() % (random() % 4 == 0 ? 256 : 24);
            const uint64_t first = random() % (kGuestBytes / kSectorBytes - sectors);
            const uint64_t offset = first * kSectorBytes;
            const auto target = MutableBytes(content).subspan(offset, sectors * kSectorBytes);
            if (random() % 8 == 0) {
                must(device.discard(offset, target.size(), IoMode::kMayBlock));
                std::memset(target.data(), 0, target.size());
            } else {
                if (random() % 3 != 0) {
                    const auto& piece = recurring_[random() % kRecurring];
                    std::memcpy(target.data(), piece.data(),
                                std::min<size_t>(target.size(), piece.size()));
                } else {
                    io::SeededRandom(random()).fill(target);
                }
                must(testing::write(device, offset, target));
            }
            const uint64_t look = random() % (kGuestBytes / kSectorBytes - 64) * kSectorBytes;
            const auto read = testing::read(device, look, 64 * kSectorBytes);
            ASSERT_TRUE(std::equal(read.begin(), read.end(),
                                   content.begin() + static_cast<ptrdiff_t>(look)))
                << "guest " << g << " reads wrong at " << look << " in turn " << turn;
            if (random() % 6 == 0) {
                must(testing::flush(device));
            }
            note(kGuestTurn);
        }
    }

    void clone_and_remove() {
        for (uint64_t i = 0; !failed(); ++i) {
            const std::string name = fmt::format("clone{}", i);
            must(pool_->clone("base", {name}));
            std::vector<std::byte> content = images_[0];
            {
                const auto device = must(pool_->attach(name, {}));
                const auto& piece = recurring_[i % kRecurring];
                const uint64_t offset = i % 15 * kPieceBytes + kPageBytes;
                std::copy(piece.begin(), piece.end(),
                          content.begin() + static_cast<ptrdiff_t>(offset));
                must(testing::write(*device, offset, piece));
            }
            const std::string snapshot = name + "@s";
            must(pool_->create_snapshot(name, "s"));
            const auto reader = must(pool_->open_reader(i % 2 == 0 ? name : snapshot));
            must(pool_->remove({name}));
            std::vector<std::byte> actual(content.size());
            for (uint64_t offset = 0; offset < actual.size(); offset += kPieceBytes) {
                must(reader->read(offset, MutableBytes(actual).subspan(offset, kPieceBytes)));
            }
            ASSERT_TRUE(actual == content) << "clone " << i << " was exported wrongly";
            note(kClone);
        }
    }

    void import_and_remove() {
        for (uint64_t i = 0; !failed(); ++i) {
            // The same content comes back when the last image that had it has just gone.
            const std::vector<std::byte>& content = images_[1 + i / 3 % (images_.size() - 1)];
            const std::string name = fmt::format("image{}", i);
            testing::import_image(*pool_, name, content, 300'000);
            if (i % 4 == 0) {
                must(pool_->detail(name));
            }
            ASSERT_TRUE(testing::export_all(*pool_, name) == content)
                << "image " << i << " was imported wrongly";
            must(pool_->remove({name}));
            note(kImport);
        }
    }

    void check_guests() {
        for (unsigned g = 0; g < kGuests; ++g) {
            EXPECT_TRUE(testing::read(*devices_[g], 0, kGuestBytes) == contents_[g])
                << "guest " << g;
        }
    }

    TestPool pool_;
    std::vector<std::vector<std::byte>> recurring_;
    std::array<std::vector<std::byte>, 4> images_;
    std::array<std::shared_ptr<BlockDevice>, kGuests> devices_;
    std::array<std::vector<std::byte>, kGuests> contents_;  ///< Of its guest's thread.
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable changed_;
    std::array<uint64_t, kKinds> done_{};  ///< Guarded by mutex_.
};

TEST(GcConcurrency, GuestsClonesImportsAndExportsGoOn) {
    GcBesideAll().run();
}

}  // namespace
}  // namespace stellarium::nova
