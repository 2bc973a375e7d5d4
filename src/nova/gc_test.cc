// What garbage collection frees, and what it must not.
#include <algorithm>
#include <cstring>
#include <future>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "nebula/store.h"
#include "nova/arena.h"
#include "nova/catalog.h"
#include "nova/collector.h"
#include "nova/committer.h"
#include "nova/folder.h"
#include "nova/testing/counting_store.h"
#include "nova/testing/test_pool.h"
#include "nova/volume.h"

namespace stellarium::nova {
namespace {

using testing::code_of;
using testing::export_all;
using testing::import_image;
using testing::must;
using testing::random_bytes;
using testing::TestPool;

/// Bytes that the store takes on the simulated disk.
uint64_t used_bytes(TestPool& pool) {
    const auto space = must(pool.machine().files().space(TestPool::kDirectory));
    return space.total_bytes - space.free_bytes;
}

PoolOptions one_mebibyte_segments() {
    PoolOptions options = TestPool::small_options();
    options.store.segment_bytes = kMiB;
    return options;
}

/// A pool on a disk whose space is counted.
class MeasuredPool : public TestPool {
  public:
    explicit MeasuredPool(PoolOptions options = small_options()) : TestPool(1, std::move(options)) {
        machine().files().set_space_limit(uint64_t{1} << 40);
    }
};

void fill_volume(TestPool& pool, const std::string& name, uint64_t size, uint64_t seed) {
    must(pool->create_volume(name, size));
    const auto device = must(pool->attach(name, {}));
    must(testing::write(*device, 0, random_bytes(size, seed)));
}

TEST(Gc, DeletedVolumesGiveTheirBytesBack) {
    MeasuredPool pool;
    const auto count = static_cast<unsigned>(scaled(200, 20));
    import_image(*pool, "kept", random_bytes(3 * kMiB, 1));
    std::vector<std::string> names;
    const uint64_t before = used_bytes(pool);
    for (unsigned i = 0; i < count; ++i) {
        names.push_back(fmt::format("v{}", i));
        // Some of what each holds is the image's.
        must(pool->clone("kept", {names.back()}));
        const auto device = must(pool->attach(names.back(), {}));
        must(testing::write(*device, kMiB, random_bytes(kMiB, 1000 + i)));
    }
    const uint64_t full = used_bytes(pool);
    ASSERT_GT(full - before, count * kMiB);
    must(pool->remove(names));
    EXPECT_GE(pool->stats().gc.reclaimable_bytes, count * kMiB);

    const GcReport would = must(pool->gc({.dry_run = true}));
    EXPECT_GE(would.dead_bytes, count * kMiB);
    EXPECT_GE(used_bytes(pool), full);
    EXPECT_EQ(pool->stats().gc.collections, 0U);

    const GcReport report = must(pool->gc({}));
    const uint64_t after = used_bytes(pool);
    EXPECT_GE(full - after, count * kMiB * 95 / 100)
        << full << " bytes before, " << after << " after";
    EXPECT_GE(report.freed_bytes, count * kMiB * 95 / 100);
    EXPECT_GE(report.dead_bytes, count * kMiB);
    const PoolStats stats = pool->stats();
    EXPECT_EQ(stats.gc.collections, 1U);
    EXPECT_EQ(stats.gc.freed_bytes, report.freed_bytes);
    EXPECT_LT(stats.gc.reclaimable_bytes, kMiB);
    EXPECT_TRUE(export_all(*pool, "kept") == random_bytes(3 * kMiB, 1));
    pool.reopen();
    EXPECT_TRUE(export_all(*pool, "kept") == random_bytes(3 * kMiB, 1));
}

/// Overwrites random pages, `times` a volume's size in all; `content` follows.
void overwrite(BlockDevice& device, std::vector<std::byte>& content, unsigned times, uint64_t seed,
               bool flush_often) {
    std::mt19937_64 random(seed);
    const uint64_t pages = content.size() / kPageBytes;
    for (uint64_t i = 0; i < times * pages; ++i) {
        const uint64_t offset = random() % pages * kPageBytes;
        const auto page = MutableBytes(content).subspan(offset, kPageBytes);
        io::SeededRandom(seed * pages * times + i).fill(page);
        must(testing::write(device, offset, page));
        if (flush_often && i % 64 == 0) {
            must(testing::flush(device));
        }
    }
}

class GcOverwriting : public ::testing::TestWithParam<bool> {};

TEST_P(GcOverwriting, TenTimesTheSizeLeavesAtMostTwiceTheLiveBytes) {
    PoolOptions options = TestPool::small_options();
    // In one case guests flush all the time and write single pages; in the other, large commits
    // make large chunks, of which a little stays alive.
    const bool flush_often = GetParam();
    options.dirty_budget_bytes = flush_often ? 4 * kMiB : 64 * kMiB;
    options.checkpoint_bytes = 32 * kMiB;
    MeasuredPool pool(options);
    const uint64_t size = scaled(16, 4) * kMiB;
    std::vector<std::byte> content = random_bytes(size, 1);
    fill_volume(pool, "v", size, 1);
    {
        const auto device = must(pool->attach("v", {}));
        overwrite(*device, content, 10, 7, flush_often);
    }
    const uint64_t before = used_bytes(pool);
    must(pool->gc({}));
    EXPECT_LE(used_bytes(pool), 2 * size) << before << " bytes before";
    EXPECT_TRUE(export_all(*pool, "v") == content);
    pool.reopen();
    EXPECT_TRUE(export_all(*pool, "v") == content);
}

INSTANTIATE_TEST_SUITE_P(Commits, GcOverwriting, ::testing::Bool(),
                         [](const auto& param) { return param.param ? "Small" : "Large"; });

TEST(Gc, ChunksThatAreMostlyDeadAreWrittenAnewForOneVolumeAndNotForSharedOnes) {
    for (const bool shared : {false, true}) {
        SCOPED_TRACE(shared ? "with a snapshot" : "alone");
        MeasuredPool pool;
        std::vector<std::byte> content = random_bytes(4 * kMiB, 1);
        const std::vector<std::byte> old = content;
        fill_volume(pool, "v", content.size(), 1);
        if (shared) {
            must(pool->create_snapshot("v", "s"));
        }
        // All but the first two pages of every 16 are overwritten with something that is stored
        // once.
        {
            const auto device = must(pool->attach("v", {}));
            const auto same = random_bytes(14 * kPageBytes, 2);
            for (uint64_t page = 0; page < content.size() / kPageBytes; page += 16) {
                std::copy(same.begin(), same.end(),
                          content.begin() + static_cast<ptrdiff_t>((page + 2) * kPageBytes));
                must(testing::write(*device, (page + 2) * kPageBytes, same));
            }
        }
        const GcReport report = must(pool->gc({}));
        if (shared) {
            EXPECT_EQ(report.rewritten_bytes, 0U);
            EXPECT_GE(used_bytes(pool), content.size());
            EXPECT_TRUE(export_all(*pool, "v@s") == old);
        } else {
            EXPECT_GT(report.rewritten_bytes, content.size() / 16);
            EXPECT_LT(used_bytes(pool), content.size() / 2);
        }
        EXPECT_TRUE(export_all(*pool, "v") == content);
        EXPECT_EQ(must(pool->gc({})).rewritten_bytes, 0U) << "there is nothing left to rewrite";
        pool.reopen();
        EXPECT_TRUE(export_all(*pool, "v") == content);
    }
}

TEST(Gc, WhatWasDiscardedIsFreed) {
    MeasuredPool pool;
    fill_volume(pool, "v", 8 * kMiB, 1);
    const uint64_t full = used_bytes(pool);
    {
        const auto device = must(pool->attach("v", {}));
        must(device->discard(kMiB, 7 * kMiB, IoMode::kMayBlock));
    }
    must(pool->gc({}));
    EXPECT_LT(used_bytes(pool), full - 6 * kMiB);
    EXPECT_EQ(export_all(*pool, "v").size(), 8 * kMiB);
    const auto device = must(pool->attach("v", {}));
    auto kept = random_bytes(8 * kMiB, 1);
    kept.resize(kMiB);
    EXPECT_TRUE(testing::read(*device, 0, kMiB) == kept);
}

/// Every byte of every file of the store.
std::vector<std::byte> all_files(TestPool& pool) {
    std::vector<std::byte> all;
    io::FileSystem& files = pool.machine().files();
    for (const std::string& directory :
         {std::string(TestPool::kDirectory), fmt::format("{}/segments", TestPool::kDirectory)}) {
        for (const io::DirectoryEntry& entry : must(files.list(directory))) {
            if (entry.is_directory) {
                continue;
            }
            const auto file =
                must(files.open(directory + "/" + entry.name, io::OpenMode::kReadOnly));
            const size_t start = all.size();
            all.resize(start + must(file->size_bytes()));
            must(io::read_exact(*file, MutableBytes(all).subspan(start), 0));
        }
    }
    return all;
}

TEST(Gc, ADeletedVolumesBytesAreNowhere) {
    MeasuredPool pool(one_mebibyte_segments());
    // A neighbour whose chunks lie among those of the secret.
    const std::string marker = "the guest's secret, 3f9d27c1a04b";
    std::vector<std::byte> secret = random_bytes(2 * kMiB, 1);
    for (size_t offset = 0; offset < secret.size(); offset += kPageBytes) {
        std::memcpy(secret.data() + offset + 100, marker.data(), marker.size());
    }
    must(pool->create_volume("secret", secret.size()));
    must(pool->create_volume("neighbour", secret.size()));
    {
        const auto a = must(pool->attach("secret", {}));
        const auto b = must(pool->attach("neighbour", {}));
        for (size_t offset = 0; offset < secret.size(); offset += 128 * kKiB) {
            must(testing::write(*a, offset, Bytes(secret).subspan(offset, 128 * kKiB)));
            must(testing::write(*b, offset, random_bytes(128 * kKiB, 2 + offset)));
            must(testing::flush(*a));
            must(testing::flush(*b));
        }
    }
    const Bytes needle = bytes_of(std::string_view(marker));
    const auto found = [&] {
        const std::vector<std::byte> all = all_files(pool);
        return std::search(all.begin(), all.end(), needle.begin(), needle.end()) != all.end();
    };
    ASSERT_TRUE(found());
    must(pool->checkpoint());
    const Hash256 root = must(pool->detail("secret")).root;
    must(pool->remove({"secret"}));
    must(pool->gc({}));

    EXPECT_FALSE(found());
    EXPECT_EQ(code_of(pool->attach("secret", {.read_only = true})), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(pool->open_reader("secret")), ErrorCode::kNotFound);
    pool.close();
    const auto store =
        must(nebula::Store::open(pool.machine().env(), TestPool::kDirectory, pool.options().store));
    class NoRecords final : public nebula::ReplaySink {
      public:
        Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
    };
    NoRecords sink;
    must(store->replay(sink));
    EXPECT_EQ(code_of(store->get_object(root)), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(store->resolve(hash(Bytes(secret).first(kPageBytes)))), ErrorCode::kNotFound);
    must(store->close());
    pool.open();
    EXPECT_FALSE(found());
}

TEST(Gc, ExportsAndDifferencesHoldWhatTheyRead) {
    MeasuredPool pool(one_mebibyte_segments());
    const auto content = random_bytes(3 * kMiB, 1);
    fill_volume(pool, "v", content.size(), 1);
    must(pool->checkpoint());
    {
        // Over the tree there is a delta in memory only.
        const auto device = must(pool->attach("v", {}));
        must(testing::write(*device, 0, random_bytes(kPageBytes, 2)));
    }
    auto expected = content;
    const auto page = random_bytes(kPageBytes, 2);
    std::copy(page.begin(), page.end(), expected.begin());
    auto reader = must(pool->open_reader("v"));
    must(pool->remove({"v"}));
    const uint64_t held = must(pool->gc({})).dead_bytes;
    EXPECT_LT(held, kMiB);
    std::vector<std::byte> actual(content.size());
    must(reader->read(0, actual));
    EXPECT_TRUE(actual == expected);
    reader.reset();
    EXPECT_GE(must(pool->gc({})).dead_bytes, content.size());

    // Within a difference everything may go.
    fill_volume(pool, "a", kMiB, 3);
    fill_volume(pool, "b", kMiB, 4);
    uint64_t pages = 0;
    must(pool->diff("a", "b", [&](DiffRange range) -> Result<void> {
        if (pages == 0) {
            STELLARIUM_TRY(pool->remove({"a", "b"}));
            STELLARIUM_TRY(pool->gc({}));
        }
        pages += range.length_bytes / kPageBytes;
        return {};
    }));
    EXPECT_EQ(pages, kMiB / kPageBytes);
}

TEST(Gc, AnImportKeepsWhatItFoundAndWhatItWrote) {
    MeasuredPool pool(one_mebibyte_segments());
    const auto content = random_bytes(6 * kMiB, 1);
    import_image(*pool, "old", Bytes(content).first(3 * kMiB));
    auto import = must(pool->begin_import("new"));
    must(import->append(0, Bytes(content).first(4 * kMiB)));
    must(pool->remove({"old"}));
    must(pool->gc({}));
    must(import->append(4 * kMiB, Bytes(content).subspan(4 * kMiB)));
    must(pool->gc({}));
    must(import->finish(content.size()));
    EXPECT_GE(import->progress().duplicate_bytes, 2 * kMiB);
    import.reset();
    must(pool->gc({}));
    EXPECT_TRUE(export_all(*pool, "new") == content);
    pool.crash(5);
    EXPECT_TRUE(export_all(*pool, "new") == content);

    // One that is given up leaves nothing.
    auto given_up = must(pool->begin_import("never"));
    must(given_up->append(0, random_bytes(4 * kMiB, 9)));
    given_up.reset();
    EXPECT_GE(must(pool->gc({})).dead_bytes, 2 * kMiB);
}

TEST(Gc, AChunkThatMovedIsFoundByItsId) {
    MeasuredPool pool(one_mebibyte_segments());
    // Few pages of a volume among much that dies: its segments are emptied, and the addresses that
    // its delta holds in memory are stale.
    must(pool->create_volume("v", kMiB));
    std::vector<std::byte> content(kMiB);
    const auto device = must(pool->attach("v", {}));
    std::vector<std::string> others;
    for (unsigned i = 0; i < 8; ++i) {
        const auto page = random_bytes(kPageBytes, 100 + i);
        std::copy(page.begin(), page.end(),
                  content.begin() + static_cast<ptrdiff_t>(2 * i * kPageBytes));
        must(testing::write(*device, 2 * i * kPageBytes, page));
        must(testing::flush(*device));
        others.push_back(fmt::format("other{}", i));
        fill_volume(pool, others.back(), kMiB, i);
    }
    must(pool->remove(others));
    const GcReport report = must(pool->gc({}));
    ASSERT_GE(report.moved_bytes, kPageBytes);

    std::vector<std::byte> actual(kMiB);
    const iovec whole{.iov_base = actual.data(), .iov_len = actual.size()};
    EXPECT_EQ(code_of(device->read(0, std::span(&whole, 1), IoMode::kNoWait)),
              ErrorCode::kWouldBlock);
    EXPECT_TRUE(testing::read(*device, 0, kMiB) == content);
    // What was looked up is remembered: nobody has to wait again.
    must(device->read(0, std::span(&whole, 1), IoMode::kNoWait));
    EXPECT_TRUE(actual == content);
    EXPECT_TRUE(export_all(*pool, "v") == content);
}

TEST(Gc, ADamagedVolumeIsNamedAndNothingIsFreed) {
    MeasuredPool pool;
    import_image(*pool, "whole", random_bytes(3 * kMiB, 1));
    must(pool->checkpoint());
    pool.reopen();
    const uint64_t leaf_magic = 0x4c544c53;  // SLTL
    import_image(*pool, "broken", random_bytes(3 * kMiB, 2));
    fill_volume(pool, "gone", 2 * kMiB, 3);
    must(pool->remove({"gone"}));
    must(pool->checkpoint());
    pool.close();
    // The last leaf of a tree in the log is one of "broken".
    const std::string path = fmt::format("{}/segments", TestPool::kDirectory);
    io::FileSystem& files = pool.machine().files();
    std::string last_file;
    uint64_t last_offset = 0;
    auto entries = must(files.list(path));
    std::sort(entries.begin(), entries.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
    for (const io::DirectoryEntry& entry : entries) {
        const auto file = must(files.open(path + "/" + entry.name, io::OpenMode::kReadOnly));
        std::vector<std::byte> bytes(must(file->size_bytes()));
        must(io::read_exact(*file, bytes, 0));
        const U32Le magic = static_cast<uint32_t>(leaf_magic);
        const Bytes needle = bytes_of(magic);
        for (auto at = bytes.begin();
             (at = std::search(at, bytes.end(), needle.begin(), needle.end())) != bytes.end();
             ++at) {
            last_file = file->path();
            last_offset = static_cast<uint64_t>(at - bytes.begin());
        }
    }
    ASSERT_FALSE(last_file.empty());
    pool.machine().files().damage(last_file, last_offset + 40, 1, 1);
    pool.open();
    const uint64_t used = used_bytes(pool);
    const auto report = pool->gc({});
    EXPECT_EQ(code_of(report), ErrorCode::kCorrupt);
    EXPECT_NE(report.error().message().find("image 'broken'"), std::string::npos)
        << report.error().message();
    EXPECT_GE(used_bytes(pool), used);
    const PoolStats stats = pool->stats();
    EXPECT_EQ(stats.gc.failures, 1U);
    EXPECT_EQ(stats.gc.last_error, report.error().message());
    EXPECT_FALSE(stats.gc.running);
    // Without it everything is known again.
    must(pool->remove({"broken"}));
    EXPECT_GE(must(pool->gc({})).dead_bytes, 4 * kMiB);
    EXPECT_TRUE(export_all(*pool, "whole") == random_bytes(3 * kMiB, 1));
}

TEST(Gc, OneAtATimeWithProgressUntilCancelled) {
    MeasuredPool pool;
    fill_volume(pool, "v", 4 * kMiB, 1);
    std::vector<GcProgress::Phase> phases;
    GcOptions options;
    options.progress = [&](const GcProgress& progress) {
        phases.push_back(progress.phase);
        EXPECT_EQ(code_of(pool->gc({})), ErrorCode::kBusy);
        EXPECT_TRUE(pool->stats().gc.running);
    };
    must(pool->gc(options));
    ASSERT_GE(phases.size(), 2U);
    EXPECT_EQ(phases.front(), GcProgress::Phase::kMark);
    EXPECT_EQ(phases.back(), GcProgress::Phase::kFree);

    must(pool->remove({"v"}));
    EXPECT_EQ(code_of(pool->gc({.cancelled = [] { return true; }})), ErrorCode::kCancelled);
    EXPECT_EQ(pool->stats().gc.failures, 0U);
    EXPECT_GE(must(pool->gc({})).dead_bytes, 4 * kMiB);
}

TEST(Gc, ReadOnlyPoolsAreLeftAlone) {
    TestPool pool;
    pool.close();
    pool.options().store.read_only = true;
    pool.open();
    EXPECT_EQ(code_of(pool->gc({})), ErrorCode::kReadOnly);
}

/// Collects what the pool tells the operator.
class Notices {
  public:
    void add(const std::string& sentence) {
        const std::lock_guard lock(mutex_);
        said_.push_back(sentence);
        changed_.notify_all();
    }
    /// Waits until something with these words was said.
    std::string wait_for(std::string_view words) {
        std::unique_lock lock(mutex_);
        std::string found;
        changed_.wait(lock, [&] {
            for (const std::string& sentence : said_) {
                if (sentence.find(words) != std::string::npos) {
                    found = sentence;
                    return true;
                }
            }
            return false;
        });
        return found;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::string> said_;
};

TEST(Gc, ComesByItselfWhenEnoughIsDead) {
    Notices notices;
    PoolOptions options = TestPool::small_options();
    options.background = true;
    options.gc.min_dead_bytes = 2 * kMiB;
    options.gc.dead_share = 0.3;
    options.gc.rate_bytes_per_second = 0;
    options.notice = [&](const std::string& sentence) { notices.add(sentence); };
    MeasuredPool pool(options);
    fill_volume(pool, "kept", 4 * kMiB, 1);
    fill_volume(pool, "gone", 4 * kMiB, 2);
    must(pool->remove({"gone"}));
    notices.wait_for("garbage collection: ");
    const PoolStats stats = pool->stats();
    EXPECT_EQ(stats.gc.collections, 1U);
    EXPECT_GE(stats.gc.last->dead_bytes, 4 * kMiB);
    EXPECT_TRUE(export_all(*pool, "kept") == random_bytes(4 * kMiB, 1));
}

TEST(Gc, AnAlmostFullDiskIsSaidAndCollectedFor) {
    Notices notices;
    PoolOptions options = TestPool::small_options();
    options.background = true;
    options.gc.rate_bytes_per_second = 0;
    options.notice = [&](const std::string& sentence) { notices.add(sentence); };
    MeasuredPool pool(options);
    fill_volume(pool, "gone", 4 * kMiB, 2);
    must(pool->remove({"gone"}));
    EXPECT_FALSE(pool->stats().space_low);
    const uint64_t used = used_bytes(pool);
    pool.close();
    pool.machine().files().set_space_limit(used + used / 20);
    pool.open();  // Looks at once.
    const std::string warning = notices.wait_for("almost full");
    EXPECT_NE(warning.find(TestPool::kDirectory), std::string::npos);
    EXPECT_TRUE(pool->stats().space_low || pool->stats().gc.collections > 0);
    fill_volume(pool, "more", 64 * kKiB, 3);
}

// --- A read beside a collection ------------------------------------------------------------------

/// Does something before a read of the store is passed on.
class InterposedStore final : public testing::CountingStore {
  public:
    using CountingStore::CountingStore;
    std::function<void()> before_read;

    Result<void> read(nebula::PageAddress address, std::span<const iovec> into,
                      IoMode mode) override {
        if (before_read) {
            std::exchange(before_read, nullptr)();
        }
        return CountingStore::read(address, into, mode);
    }
};

/// The parts of a pool, with a store in between that tests can look into.
class Parts {
  public:
    Parts() {
        must(nebula::Store::create(machine_.env(), "/store", {.segment_bytes = kMiB}));
        store_ = std::make_unique<InterposedStore>(
            must(nebula::Store::open(machine_.env(), "/store", {.segment_bytes = kMiB})));
        class NoRecords final : public nebula::ReplaySink {
          public:
            Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
        };
        NoRecords sink;
        must(store_->replay(sink));
        catalog_ = std::make_unique<Catalog>(*store_, cache_);
        committer_ =
            std::make_unique<Committer>(machine_.env(), *store_, cache_, *catalog_, *arena_,
                                        CommitterOptions{.background = false, .after_commit = {}});
        const PendingRecord create = PendingRecord::of(CreateRecord{.id = 1,
                                                                    .kind = EntityKind::kVolume,
                                                                    .size_bytes = 4 * kMiB,
                                                                    .created_ns = 0,
                                                                    .data_bytes = 0,
                                                                    .root = {},
                                                                    .name = "v"});
        must(committer_->commit({}, std::span(&create, 1)));
        volume_ = std::make_shared<Volume>(*store_, cache_, *arena_, *committer_,
                                           catalog_->find(uint64_t{1}));
    }

    InterposedStore& store() { return *store_; }
    Volume& volume() { return *volume_; }
    void commit() {
        const std::lock_guard lock(volume_->entity()->commit_mutex);
        must(committer_->commit(std::span(&volume_, 1), {}));
    }
    void write(uint64_t offset, const std::vector<std::byte>& data) {
        std::vector<std::byte> copy = data;
        const iovec part{.iov_base = copy.data(), .iov_len = copy.size()};
        must(volume_->write(offset, std::span(&part, 1), IoMode::kMayBlock));
        commit();
    }
    GcReport collect() {
        const Folder folder(*store_, cache_, *catalog_, *committer_);
        const Collector collector(
            *store_, cache_, *catalog_, folder, [this]() -> Result<Collector::Published> {
                Collector::Published published;
                STELLARIUM_ASSIGN(published.collection, store_->begin_collection());
                const uint64_t sequence = store_->sequence();
                published.frozen = catalog_->freeze();
                STELLARIUM_ASSIGN(published.payload, Catalog::save(*store_, published.frozen));
                STELLARIUM_TRY(store_->checkpoint(sequence, published.payload));
                STELLARIUM_TRY(published.collection->fix_position());
                return published;
            });
        return must(collector.run({}));
    }

  private:
    io::SimulatedMachine machine_{1};
    std::unique_ptr<InterposedStore> store_;
    NodeCache cache_{kMiB};
    std::unique_ptr<Arena> arena_ = Arena::make_private(16 * kMiB);
    std::unique_ptr<Catalog> catalog_;
    std::unique_ptr<Committer> committer_;
    std::shared_ptr<Volume> volume_;
};

TEST(GcRead, StartsAgainWhenWhatItReadsWasOverwrittenAndCollected) {
    Parts parts;
    const auto newer = random_bytes(2 * kMiB, 2);
    parts.write(0, random_bytes(2 * kMiB, 1));
    std::vector<std::byte> actual(2 * kMiB);
    const iovec whole{.iov_base = actual.data(), .iov_len = actual.size()};
    uint64_t dead_bytes = 0;
    parts.store().before_read = [&] {
        // The reader has looked everything up. Now all of it dies.
        parts.write(0, newer);
        dead_bytes = parts.collect().dead_bytes;
    };
    must(parts.volume().read(0, std::span(&whole, 1), IoMode::kMayBlock));
    EXPECT_GE(dead_bytes, kMiB);
    EXPECT_TRUE(actual == newer);
}

TEST(GcRead, LooksUpAgainWhatMovedMeanwhile) {
    Parts parts;
    std::vector<std::byte> content(2 * kMiB);
    const auto page = random_bytes(kPageBytes, 3);
    std::copy(page.begin(), page.end(), content.begin());
    parts.write(0, content);
    // What fills the segment beside that page dies with the second round.
    for (uint64_t seed = 10; seed < 30; seed += 10) {
        for (uint64_t i = 0; i < 8; ++i) {
            parts.write(2 * kMiB + i * 128 * kKiB, random_bytes(128 * kKiB, seed + i));
        }
    }
    std::vector<std::byte> actual(2 * kMiB);
    const iovec whole{.iov_base = actual.data(), .iov_len = actual.size()};
    uint64_t moved_bytes = 0;
    parts.store().before_read = [&] { moved_bytes = parts.collect().moved_bytes; };
    must(parts.volume().read(0, std::span(&whole, 1), IoMode::kMayBlock));
    EXPECT_GE(moved_bytes, kPageBytes);
    EXPECT_TRUE(actual == content);
}

}  // namespace
}  // namespace stellarium::nova
