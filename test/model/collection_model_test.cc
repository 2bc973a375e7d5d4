// Garbage collection of the content store while others write, read and drop.
//
// Writers store blobs and refer to them, often such as are about to die; others drop references.
// Readers hold what they read, as a layer above would, and must always get the right bytes; they
// also read addresses from long ago, which must give the right bytes or say that they are stale.
// The collector runs one collection after another. In the end what is referred to is there, also
// after opening again, and the files take as much room as the store says.
#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "io/simulated.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

constexpr size_t kBlobs = 240;
constexpr size_t kFirstObject = 160;
constexpr uint16_t kRecord = 1;

std::vector<Blob> make_blobs() {
    std::vector<Blob> all;
    all.reserve(kBlobs);
    for (uint64_t i = 0; i < kBlobs; ++i) {
        all.push_back(i < kFirstObject ? make_chunk(i, static_cast<uint32_t>(1 + i % 6))
                                       : make_blob(i, 100 + 50 * (i - kFirstObject)));
    }
    return all;
}

class World {
  public:
    explicit World(uint64_t seed) : seed_(seed), machine_(seed) {
        auto opened = open_store(machine_.env(), "/pool", kOptions);
        EXPECT_OK(opened);
        store_ = std::move(opened->store);
    }

    void run() {
        const uint64_t writes = scaled(1500, 250);
        std::atomic<int> writers_left = 2;
        std::vector<std::thread> threads;
        for (uint64_t i = 0; i < 2; ++i) {
            threads.emplace_back([this, i, writes, &writers_left] {
                Sequence random(seed_ * 100 + i);
                for (uint64_t n = 0; n < writes && !::testing::Test::HasFailure(); ++n) {
                    write(random);
                }
                --writers_left;
            });
            threads.emplace_back([this, i, &writers_left] {
                Sequence random(seed_ * 100 + 50 + i);
                while (writers_left > 0 && !::testing::Test::HasFailure()) {
                    read_held(random);
                    read_remembered(random);
                }
            });
        }
        threads.emplace_back([this, &writers_left] {
            Sequence random(seed_ * 100 + 99);
            while (writers_left > 0 && !::testing::Test::HasFailure()) {
                collect(random);
            }
        });
        for (std::thread& thread : threads) {
            thread.join();
        }
        finish();
    }

    uint64_t collections() const { return collections_; }
    uint64_t freed_bytes() const { return freed_bytes_; }

  private:
    static constexpr StoreOptions kOptions{.segment_bytes = kMinSegmentBytes};

    /// Stores a few blobs and refers to them, or drops some; now and then in the two steps of an
    /// import.
    void write(Sequence& random) {
        WriteBatch batch;
        std::vector<size_t> numbers;
        // Large ones are looked up long enough for something to be condemned meanwhile.
        for (uint64_t i = random.one_in(8) ? 60 : 1 + random.below(4); i > 0; --i) {
            numbers.push_back(random.below(kBlobs));
            const Blob& blob = blobs_[numbers.back()];
            if (numbers.back() < kFirstObject) {
                batch.add_chunk(blob.id, blob.bytes);
            } else {
                batch.add_object(blob.id, blob.bytes);
            }
        }
        const uint64_t what = random.below(10);
        if (what == 0) {
            const std::unique_ptr<Store> handle = store_->protect();
            EXPECT_OK(handle->append(batch));
            std::this_thread::yield();
            WriteBatch record;
            record.add_record(kRecord, {});
            const std::lock_guard gate(gate_);
            EXPECT_OK(store_->append(record));
            for (const size_t number : numbers) {
                needed_[number] = true;
            }
        } else if (what < 6) {
            batch.add_record(kRecord, {});
            const std::lock_guard gate(gate_);
            const auto appended = store_->append(batch);
            EXPECT_OK(appended);
            for (const size_t number : numbers) {
                needed_[number] = true;
            }
            remember(numbers, *appended);
        } else {
            WriteBatch record;
            record.add_record(kRecord, {});
            const std::lock_guard gate(gate_);
            EXPECT_OK(store_->append(record));
            for (const size_t number : numbers) {
                for (size_t i = number; i < std::min(number + 20, kBlobs); ++i) {
                    needed_[i] = false;
                }
            }
        }
    }

    /// Addresses of chunks; gate_ is held.
    void remember(const std::vector<size_t>& numbers, const Appended& appended) {
        size_t next = 0;
        for (const size_t number : numbers) {
            if (number < kFirstObject) {
                remembered_.emplace_back(appended.locations[next++].address, number);
            }
        }
    }

    /// A blob that is needed, or another reader holds, stays while this one holds it.
    void read_held(Sequence& random) {
        const size_t number = random.below(kBlobs);
        {
            const std::lock_guard gate(gate_);
            if (!needed_[number]) {
                return;
            }
            ++held_[number];
        }
        const Blob& blob = blobs_[number];
        ByteVector bytes(blob.bytes.size());
        if (number < kFirstObject) {
            for (int tries = 0;; ++tries) {
                const auto location = store_->resolve(blob.id);
                EXPECT_OK(location);
                const iovec into{bytes.data(), bytes.size()};
                const auto read =
                    location ? store_->read(location->address, {&into, 1}, IoMode::kMayBlock)
                             : Result<void>();
                if (!read && read.error().code() == ErrorCode::kStale && tries < 100) {
                    continue;  // Moved in between.
                }
                EXPECT_OK(read);
                break;
            }
        } else {
            auto object = store_->get_object(blob.id);
            EXPECT_OK(object);
            bytes = object ? std::move(object->content) : ByteVector();
        }
        EXPECT_TRUE(bytes == blob.bytes) << number;
        const std::lock_guard gate(gate_);
        --held_[number];
    }

    void read_remembered(Sequence& random) {
        std::pair<PageAddress, size_t> known;
        {
            const std::lock_guard gate(gate_);
            if (remembered_.empty()) {
                return;
            }
            known = remembered_[random.below(remembered_.size())];
        }
        ByteVector page(kPageBytes);
        const iovec into{page.data(), page.size()};
        const auto read = store_->read(known.first, {&into, 1},
                                       random.one_in(3) ? IoMode::kNoWait : IoMode::kMayBlock);
        if (read) {
            EXPECT_TRUE(
                std::ranges::equal(page, Bytes(blobs_[known.second].bytes).first(kPageBytes)));
        } else {
            EXPECT_TRUE(read.error().code() == ErrorCode::kStale ||
                        read.error().code() == ErrorCode::kWouldBlock)
                << read.error().message();
        }
    }

    void collect(Sequence& random) {
        auto collection = store_->begin_collection();
        ASSERT_OK(collection);
        std::array<bool, kBlobs> roots{};
        {
            const std::lock_guard gate(gate_);
            for (size_t i = 0; i < kBlobs; ++i) {
                roots[i] = needed_[i] || held_[i] > 0;
            }
            ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
        }
        ASSERT_OK((*collection)->fix_position());
        for (size_t i = 0; i < kBlobs; ++i) {
            if (!roots[i]) {
                continue;
            }
            if (i < kFirstObject) {
                ASSERT_OK((*collection)->mark_pages(blobs_[i].id, {}, 1));
            } else {
                ASSERT_OK((*collection)->mark_object(blobs_[i].id, {}));
            }
        }
        const auto report =
            (*collection)
                ->sweep({.dry_run = random.one_in(8), .move_below = random.one_in(2) ? 0.25 : 0.7});
        ASSERT_OK(report);
        ++collections_;
        freed_bytes_ += report->freed_bytes;
    }

    void finish() {
        Sequence random(seed_);
        if (::testing::Test::HasFailure()) {
            return;
        }
        collect(random);
        const auto check = [this] {
            uint64_t bytes = 0;
            for (size_t i = 0; i < kBlobs; ++i) {
                if (needed_[i]) {
                    const auto object = store_->get_object(blobs_[i].id);
                    EXPECT_OK(object);
                    EXPECT_TRUE(object && object->content == blobs_[i].bytes) << i;
                    bytes += blobs_[i].bytes.size();
                }
            }
            EXPECT_GE(store_->stats().unique_bytes, bytes);
            EXPECT_EQ(store_->stats().index_misses_recovered, 0U);
            EXPECT_EQ(store_->read_only_reason(), std::nullopt);
            EXPECT_EQ(store_->stats().stored_bytes, bytes_on_disk());
        };
        check();
        EXPECT_OK(store_->close());
        store_.reset();
        auto opened = open_store(machine_.env(), "/pool", kOptions);
        ASSERT_OK(opened);
        store_ = std::move(opened->store);
        check();
    }

    uint64_t bytes_on_disk() {
        uint64_t bytes = 0;
        const auto files = machine_.files().list("/pool/segments");
        EXPECT_OK(files);
        for (const io::DirectoryEntry& entry : *files) {
            const auto file =
                machine_.files().open("/pool/segments/" + entry.name, io::OpenMode::kReadOnly);
            EXPECT_OK(file);
            uint64_t at = 0;
            while (const auto extent = (*file)->next_data(at).value_or(std::nullopt)) {
                bytes += extent->second;
                at = extent->first + extent->second;
            }
        }
        return bytes;
    }

    const uint64_t seed_;
    const std::vector<Blob> blobs_ = make_blobs();
    io::SimulatedMachine machine_;
    std::unique_ptr<Store> store_;

    std::mutex gate_;  ///< As the layer above has one: records are applied in order.
    std::array<bool, kBlobs> needed_{};
    std::array<int, kBlobs> held_{};
    std::vector<std::pair<PageAddress, size_t>> remembered_;

    uint64_t collections_ = 0;
    uint64_t freed_bytes_ = 0;
};

TEST(CollectionModel, WritersReadersAndCollectorsTogether) {
    const uint64_t first = first_seed();
    for (uint64_t seed = first; seed < first + scaled(3, 1) && !HasFailure(); ++seed) {
        SCOPED_TRACE("reproduce with STELLARIUM_TEST_SEED=" + std::to_string(seed));
        World world(seed);
        world.run();
        EXPECT_GT(world.collections(), 1U);
        EXPECT_GT(world.freed_bytes(), 0U);
    }
}

}  // namespace
}  // namespace stellarium::nebula
