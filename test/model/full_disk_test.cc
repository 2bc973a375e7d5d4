// Random programs on a disk that is full most of the time.
//
// Guests write until writes fail, somebody else takes what is left of the file system and gives it
// back, volumes come and go, processes die and start. Whatever happens: a volume reads as it was
// written, where writes failed as before or after them; volumes can be removed and garbage can be
// collected; the pool can be closed and opened, with and without the runtime directory of the last
// process; and with room, writing works again.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "nebula/reserve.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

constexpr uint64_t kDiskBytes = 24 * kMiB;
constexpr uint64_t kVolumePages = 1024;
constexpr uint64_t kVolumeBytes = kVolumePages * kPageBytes;
constexpr const char* kOther = "/pool-neighbour";

PoolOptions tight_options() {
    PoolOptions options = TestPool::small_options();
    options.store.segment_bytes = kMiB;
    options.store.reserve_bytes = nebula::kReserveBytes;
    options.dirty_budget_bytes = 2 * kMiB;
    options.checkpoint_bytes = 2 * kMiB;
    return options;
}

class Program {
  public:
    explicit Program(uint64_t seed) : random_(seed), pool_(seed, tight_options()) {
        pool_.machine().files().set_space_limit(kDiskBytes);
        pool_.reopen();
        must(pool_->create_volume("first", kVolumeBytes));
        shadow_["first"];
    }

    void run(uint64_t steps) {
        for (uint64_t step = 0; step < steps && !::testing::Test::HasFailure(); ++step) {
            SCOPED_TRACE(fmt::format("step {}", step));
            const uint64_t what = below(100);
            if (what < 55) {
                write_some();
            } else if (what < 62) {
                flush_one();
            } else if (what < 67) {
                discard_some();
            } else if (what < 74) {
                add_volume();
            } else if (what < 82) {
                remove_one();
            } else if (what < 87) {
                collect();
            } else if (what < 92) {
                neighbour();
            } else if (what < 95) {
                check_one();
            } else {
                restart(below(4));
            }
        }
        finish();
    }

    uint64_t refused_writes = 0;
    uint64_t removals_on_a_full_disk = 0;
    uint64_t collections_on_a_full_disk = 0;
    uint64_t starts_on_a_full_disk = 0;

  private:
    /// The number of what a page holds, 0 zeros; several after a write that failed.
    struct Shadow {
        std::map<uint64_t, std::set<uint64_t>> pages;
    };

    uint64_t below(uint64_t limit) { return random_() % limit; }
    static std::vector<std::byte> content(uint64_t number) {
        return number == 0 ? std::vector<std::byte>(kPageBytes) : random_bytes(kPageBytes, number);
    }
    uint64_t free_bytes() { return must(pool_.machine().files().space("/pool")).free_bytes; }
    bool is_full() { return free_bytes() < 64 * kKiB; }

    std::string any_volume() {
        auto at = shadow_.begin();
        std::advance(at, below(shadow_.size()));
        return at->first;
    }
    BlockDevice& device(const std::string& name) {
        auto& device = devices_[name];
        if (!device) {
            device = must(pool_->attach(name, {}));
        }
        return *device;
    }
    static void expect_full(const Result<void>& done) {
        if (!done) {
            EXPECT_EQ(done.error().code(), ErrorCode::kNoSpace) << done.error().message();
        }
    }

    void write_some() {
        const std::string name = any_volume();
        const uint64_t count = 1 + below(below(4) == 0 ? 200 : 16);
        const uint64_t first = below(kVolumePages - count);
        std::vector<std::byte> data;
        std::vector<uint64_t> numbers;
        for (uint64_t i = 0; i < count; ++i) {
            numbers.push_back(++last_number_);
            const auto page = content(numbers.back());
            data.insert(data.end(), page.begin(), page.end());
        }
        const auto done = write(device(name), first * kPageBytes, data);
        expect_full(done);
        refused_writes += done ? 0 : 1;
        for (uint64_t i = 0; i < count; ++i) {
            auto& page = shadow_[name].pages[first + i];
            if (done) {
                page = {numbers[i]};
            } else {
                if (page.empty()) {
                    page.insert(0);
                }
                page.insert(numbers[i]);
            }
        }
    }
    void flush_one() { expect_full(flush(device(any_volume()))); }
    void discard_some() {
        const std::string name = any_volume();
        const uint64_t count = 1 + below(64);
        const uint64_t first = below(kVolumePages - count);
        const auto done =
            device(name).discard(first * kPageBytes, count * kPageBytes, IoMode::kMayBlock);
        expect_full(done);
        for (uint64_t i = 0; i < count; ++i) {
            auto& page = shadow_[name].pages[first + i];
            if (done) {
                page = {0};
            } else {
                page.insert(0);
            }
        }
    }
    void add_volume() {
        if (shadow_.size() >= 8) {
            return;
        }
        const std::string source = any_volume();
        const std::string name = fmt::format("v{}", ++last_name_);
        const bool clone = below(2) == 0;
        const Result<void> done = clone ? pool_->clone(source, {name}) : [&]() -> Result<void> {
            STELLARIUM_TRY(pool_->create_volume(name, kVolumeBytes));
            return {};
        }();
        expect_full(done);
        if (done) {
            shadow_[name] = clone ? shadow_[source] : Shadow{};
        }
    }
    void remove_one() {
        if (shadow_.size() < 2) {
            return;
        }
        removals_on_a_full_disk += is_full() ? 1 : 0;
        const std::string name = any_volume();
        devices_.erase(name);
        const auto done = pool_->remove({name});
        ASSERT_TRUE(done) << done.error().message();
        shadow_.erase(name);
    }
    void collect() {
        collections_on_a_full_disk += is_full() ? 1 : 0;
        const auto report = pool_->gc({});
        ASSERT_TRUE(report) << report.error().message();
    }
    /// Somebody else takes all that is free, or gives it back.
    void neighbour() {
        io::SimulatedFileSystem& files = pool_.machine().files();
        if (must(files.exists(kOther))) {
            must(files.remove(kOther));
            return;
        }
        const auto file = must(files.open(kOther, io::OpenMode::kCreate));
        must(file->allocate(0, free_bytes() / kPageBytes * kPageBytes));
    }
    void check(const std::string& name) {
        SCOPED_TRACE(name);
        const std::vector<std::byte> all = read(device(name), 0, kVolumeBytes);
        for (uint64_t page = 0; page < kVolumePages; ++page) {
            const Bytes found = Bytes(all).subspan(page * kPageBytes, kPageBytes);
            auto& allowed = shadow_[name].pages[page];
            if (allowed.empty()) {
                allowed.insert(0);
            }
            const auto match = std::ranges::find_if(allowed, [&](uint64_t number) {
                return std::ranges::equal(found, content(number));
            });
            ASSERT_NE(match, allowed.end()) << "page " << page;
            allowed = {*match};  // From now on it is known.
        }
    }
    void check_one() { check(any_volume()); }
    void check_all() {
        for (const auto& [name, shadow] : std::map<std::string, Shadow>(shadow_)) {
            check(name);
        }
    }
    void restart(uint64_t how) {
        starts_on_a_full_disk += is_full() ? 1 : 0;
        if (how < 2) {
            pool_.machine().kill_process();
            devices_.clear();
            pool_.kill();
        } else {
            devices_.clear();
            pool_.reopen();
        }
        if (how % 2 == 1) {
            // A command has the store in between, and knows nothing of the runtime directory.
            pool_.machine().kill_process();
            PoolOptions options = pool_.options();
            options.runtime_directory.clear();
            std::swap(options, pool_.options());
            pool_.kill();
            if (below(2) == 0) {
                remove_one();
                collect();
            }
            devices_.clear();
            pool_.close();
            std::swap(options, pool_.options());
            pool_.open();
        }
        if (below(3) == 0) {
            check_all();
        }
    }
    void finish() {
        if (::testing::Test::HasFailure()) {
            return;
        }
        check_all();
        // Room comes back, and everything works again without a restart.
        if (must(pool_.machine().files().exists(kOther))) {
            must(pool_.machine().files().remove(kOther));
        }
        while (shadow_.size() > 1) {
            remove_one();
        }
        collect();
        const std::string name = shadow_.begin()->first;
        for (uint64_t page = 0; page < kVolumePages; page += 128) {
            const auto data = content(++last_number_);
            must(write(device(name), page * kPageBytes, data));
            shadow_[name].pages[page] = {last_number_};
        }
        must(flush(device(name)));
        EXPECT_FALSE(pool_->stats().store.disk_full);
        EXPECT_GT(pool_->stats().store.reserve_bytes, 0U);
        EXPECT_EQ(pool_->read_only_reason(), std::nullopt);
        check_all();
        devices_.clear();
        pool_.machine().crash(random_());
        pool_.kill();
        check_all();
        EXPECT_EQ(must(pool_->scrub({})).damaged, 0U);
        devices_.clear();
        pool_.close();
    }

    std::mt19937_64 random_;
    TestPool pool_;
    std::map<std::string, Shadow> shadow_;
    std::map<std::string, std::shared_ptr<BlockDevice>> devices_;
    uint64_t last_number_ = 0;
    uint64_t last_name_ = 0;
};

TEST(FullDisk, NothingIsLostAndRoomCanAlwaysBeMade) {
    uint64_t refused = 0;
    uint64_t removals = 0;
    uint64_t collections = 0;
    uint64_t starts = 0;
    for (uint64_t i = 0; i < scaled(6, 1) && !HasFailure(); ++i) {
        const uint64_t seed = first_seed() + i;
        SCOPED_TRACE(fmt::format("STELLARIUM_TEST_SEED={}", seed));
        Program program(seed);
        program.run(300);
        refused += program.refused_writes;
        removals += program.removals_on_a_full_disk;
        collections += program.collections_on_a_full_disk;
        starts += program.starts_on_a_full_disk;
    }
    EXPECT_GT(refused, 0U);
    EXPECT_GT(removals, 0U);
    EXPECT_GT(collections, 0U);
    EXPECT_GT(starts, 0U);
}

}  // namespace
}  // namespace stellarium::nova
