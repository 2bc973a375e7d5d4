// What a pool does about damage: one volume's trouble is no other's, and nothing is served that is
// not known to be right.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/test_scale.h"
#include "base/units.h"
#include "nova/limits.h"
#include "nova/testing/bad_pages.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

constexpr const char* kSegment = "/pool/segments/0000001.seg";

uint64_t segment_pages(TestPool& pool) {
    auto file = must(pool.machine().files().open(kSegment, io::OpenMode::kReadOnly));
    return must(file->size_bytes()) / kPageBytes;
}

/// A copy of a pool's machine, as if its process had died, in which bytes of the first segment have
/// rotted.
class RottenCopy {
  public:
    RottenCopy(TestPool& pool, uint64_t offset_bytes, uint64_t length_bytes)
        : RottenCopy(pool.machine().files(), pool.options(), offset_bytes, length_bytes) {}
    RottenCopy(io::SimulatedFileSystem& files, const PoolOptions& options, uint64_t offset_bytes,
               uint64_t length_bytes)
        : machine_(files.fork(), 1), options_(options) {
        machine_.files().damage(kSegment, offset_bytes, length_bytes, offset_bytes);
    }
    RottenCopy(TestPool& pool, uint64_t page) : RottenCopy(pool, page * kPageBytes, kPageBytes) {}
    Result<void> open() {
        STELLARIUM_ASSIGN(pool_, Pool::open(machine_.env(), TestPool::kDirectory, options_));
        return {};
    }
    PoolOptions& options() { return options_; }
    Pool* operator->() { return pool_.get(); }
    Pool& operator*() { return *pool_; }
    void close() {
        must(pool_->close());
        pool_.reset();
    }

  private:
    io::SimulatedMachine machine_;
    PoolOptions options_;
    std::unique_ptr<Pool> pool_;
};

size_t count_warnings(Pool& pool, const std::string& part) {
    size_t count = 0;
    for (const std::string& warning : pool.warnings()) {
        count += warning.find(part) != std::string::npos ? 1 : 0;
    }
    return count;
}

Result<void> try_read(BlockDevice& device, uint64_t offset_bytes) {
    std::vector<std::byte> content(kPageBytes);
    const iovec part{.iov_base = content.data(), .iov_len = content.size()};
    return device.read(offset_bytes, std::span(&part, 1), IoMode::kMayBlock);
}

// --- Checkpoints ---------------------------------------------------------------------------------

TEST(PoolDamage, ARottenLeafOfOneVolumeStopsNoCheckpoint) {
    TestPool pool;
    constexpr uint64_t kWrites = 250;
    uint64_t first_page = 0;
    {
        auto import = must(pool->begin_import("image"));
        must(import->append(0, random_bytes(2 * kMiB, 77)));
        first_page = segment_pages(pool);
        must(import->finish(2 * kMiB));
    }
    must(pool->checkpoint());
    const uint64_t end_page = segment_pages(pool);
    must(pool->clone("image", {"a"}));
    must(pool->create_volume("other", kMiB));
    {
        // So many separate pages that the leaf is worth rewriting.
        auto device = must(pool->attach("a", {}));
        for (uint64_t i = 0; i < kWrites; ++i) {
            must(write(*device, i * 2 * kPageBytes, random_bytes(kPageBytes, 1000 + i)));
        }
        must(flush(*device));
    }
    pool.close();

    const auto data = random_bytes(kPageBytes, 5);
    unsigned leaves_hit = 0;
    for (uint64_t page = first_page; page < end_page; ++page) {
        RottenCopy copy(pool, page);
        if (!copy.open() || copy->read_only_reason()) {
            continue;  // The header of a batch that must be there.
        }
        // A page between two of the writes is found through the image's leaf only.
        const auto reading = try_read(*must(copy->attach("a", {.read_only = true})), kPageBytes);
        {
            auto other = must(copy->attach("other", {}));
            must(write(*other, 0, data));
        }
        must(copy->checkpoint());
        must(copy->checkpoint());
        EXPECT_LE(count_warnings(*copy, "'a' is damaged"), 1U);
        if (count_warnings(*copy, "'a' is damaged") == 1) {
            ++leaves_hit;
            EXPECT_FALSE(reading.has_value());
        }
        copy.close();
        must(copy.open());
        EXPECT_EQ(read(*must(copy->attach("other", {.read_only = true})), 0, data.size()), data);
    }
    EXPECT_EQ(leaves_hit, 1U);
}

// --- Replay --------------------------------------------------------------------------------------

/// Two volumes whose deltas lie in some bytes of the segment.
struct TwoDeltas {
    TwoDeltas() : owner(std::make_unique<TestPool>()), pool(*owner) {
        must(pool->create_volume("a", 8 * kMiB));
        must(pool->create_snapshot("a", "empty"));
        must(pool->create_volume("b", 8 * kMiB));
        for (const std::string name : {"a", "b"}) {
            // Few extents a leaf, which a checkpoint leaves in the delta.
            auto device = must(pool->attach(name, {}));
            for (uint64_t leaf = 0; leaf < 4; ++leaf) {
                for (uint64_t i = 0; i < 20; ++i) {
                    const uint64_t offset = leaf * kLeafBytes + 2 * i * kPageBytes;
                    const auto data = random_bytes(kPageBytes, random());
                    must(write(*device, offset, data));
                    std::copy(data.begin(), data.end(),
                              content[name].begin() + static_cast<ptrdiff_t>(offset));
                }
            }
            must(flush(*device));
        }
        first_byte = segment_pages(pool) * kPageBytes;
        must(pool->checkpoint());
        end_byte = segment_pages(pool) * kPageBytes;
        // The next one, of another catalog, brings them out of the part of the log that opening
        // reads anyway.
        must(pool->create_volume("later", kMiB));
        must(pool->checkpoint());
    }
    /// The process dies. Nodes that it has in memory are shared within this test's process, and
    /// would be used in place of those that have rotted.
    void kill() {
        files = pool.machine().files().fork();
        options = pool.options();
        pool.machine().kill_process();
        devices.clear();
        owner.reset();
    }
    /// Calls `visit` with a copy for each small part of those bytes, unless it is something that
    /// the pool needs for writing, or volume "b".
    void for_each_copy(const std::function<void(RottenCopy&)>& visit) {
        for (uint64_t offset = first_byte; offset < end_byte; offset += 192) {
            RottenCopy copy(*files, options, offset, 16);
            must(copy.open());
            if (!copy->read_only_reason() && must(copy->find("b")).damage.empty() &&
                try_read(*must(copy->attach("b", {.read_only = true})), 0)) {
                visit(copy);
            }
        }
    }

    std::unique_ptr<TestPool> owner;
    TestPool& pool;
    std::map<std::string, std::vector<std::byte>> content{{"a", std::vector<std::byte>(8 * kMiB)},
                                                          {"b", std::vector<std::byte>(8 * kMiB)}};
    std::mt19937_64 random{1};
    std::vector<std::shared_ptr<BlockDevice>> devices;
    std::unique_ptr<io::SimulatedFileSystem> files;
    PoolOptions options;
    uint64_t first_byte = 0;
    uint64_t end_byte = 0;
};

void expect_refused(Pool& pool, const std::string& source) {
    EXPECT_FALSE(must(pool.find(source)).damage.empty());
    EXPECT_EQ(code_of(pool.attach(source, {.read_only = true})), ErrorCode::kCorrupt);
    EXPECT_EQ(code_of(pool.open_reader(source)), ErrorCode::kCorrupt);
    const EntityDetail detail = must(pool.detail(source));
    EXPECT_FALSE(detail.info.damage.empty());
    EXPECT_EQ(detail.root, Hash256());
    EXPECT_EQ(code_of(pool.clone(source, {"x"})), ErrorCode::kCorrupt);
    EXPECT_EQ(code_of(pool.diff(source, "b", [](DiffRange) { return Result<void>(); })),
              ErrorCode::kCorrupt);
}

TEST(PoolDamage, AVolumeThatCannotBeReplayedIsDamagedAndNoOther) {
    TwoDeltas test;
    TestPool& pool = test.pool;
    const auto later = random_bytes(kPageBytes, 9);
    auto a = must(pool->attach("a", {}));
    must(write(*a, kPageBytes, later));
    must(flush(*a));
    must(pool->create_snapshot("a", "new"));
    must(pool->clone("a", {"c"}));
    must(pool->resize("a", 16 * kMiB));
    // Acknowledged, and in the arena only.
    must(write(*a, 0, later));
    auto b = must(pool->attach("b", {}));
    must(write(*b, 2 * kPageBytes, later));
    auto expected_of_b = test.content["b"];
    std::copy(later.begin(), later.end(), expected_of_b.begin() + 2 * kPageBytes);
    test.devices = {std::move(a), std::move(b)};
    test.kill();

    unsigned damaged = 0;
    test.for_each_copy([&](RottenCopy& copy) {
        if (must(copy->find("a")).damage.empty()) {
            return;
        }
        ++damaged;
        for (int round = 0; round < 2; ++round) {
            for (const std::string source : {"a", "a@new", "c"}) {
                expect_refused(*copy, source);
                EXPECT_EQ(count_warnings(*copy, fmt::format("'{}' is damaged", source)), 1U);
            }
            EXPECT_EQ(code_of(copy->create_snapshot("a", "x")), ErrorCode::kCorrupt);
            EXPECT_EQ(code_of(copy->resize("a", 32 * kMiB)), ErrorCode::kCorrupt);
            EXPECT_EQ(code_of(copy->rollback("a", "new")), ErrorCode::kCorrupt);
            EXPECT_EQ(must(copy->find("a")).size_bytes, 16 * kMiB);
            EXPECT_EQ(must(copy->find("a@empty")).damage, "");
            EXPECT_EQ(read(*must(copy->attach("b", {.read_only = true})), 0, expected_of_b.size()),
                      expected_of_b);
            if (round == 0) {
                // What is not known is not forgotten by a checkpoint.
                EXPECT_GT(copy->stats().dirty_bytes, kPageBytes);
                must(copy->checkpoint());
                copy.close();
                must(copy.open());
            }
        }
        EXPECT_EQ(copy->stats().dirty_bytes, 0U);
        must(copy->rename("c", "d"));
        must(copy->remove({"d"}));
        must(copy->remove_snapshot("a", "new"));
        must(copy->rollback("a", "empty"));
        EXPECT_EQ(must(copy->find("a")).damage, "");
        EXPECT_EQ(export_all(*copy, "a"), std::vector<std::byte>(8 * kMiB));
        copy.close();
        must(copy.open());
        EXPECT_EQ(count_warnings(*copy, "damaged and not shown"), 0U);
        EXPECT_EQ(export_all(*copy, "a"), std::vector<std::byte>(8 * kMiB));
    });
    EXPECT_GE(damaged, 1U);
}

TEST(PoolDamage, WhatTheBufferHoldsOfADamagedVolumeIsFreedWithIt) {
    TwoDeltas test;
    auto a = must(test.pool->attach("a", {}));
    must(write(*a, kPageBytes, random_bytes(kPageBytes, 9)));
    must(flush(*a));
    must(write(*a, 0, random_bytes(3 * kPageBytes, 10)));
    test.devices = {std::move(a)};
    test.kill();
    unsigned damaged = 0;
    test.for_each_copy([&](RottenCopy& copy) {
        if (must(copy->find("a")).damage.empty()) {
            return;
        }
        EXPECT_EQ(count_warnings(*copy, "3 acknowledged writes"), 1U);
        EXPECT_EQ(copy->stats().dirty_bytes, 3 * kPageBytes);
        must(++damaged % 2 == 0 ? copy->remove({"a"}) : copy->rollback("a", "empty"));
        EXPECT_EQ(copy->stats().dirty_bytes, 0U);
    });
    EXPECT_GE(damaged, 2U);
}

TEST(PoolDamage, AcknowledgedWritesOutliveDamageThatIsMended) {
    TwoDeltas test;
    auto a = must(test.pool->attach("a", {}));
    must(write(*a, kPageBytes, random_bytes(kPageBytes, 9)));
    must(flush(*a));
    const auto acknowledged = random_bytes(kPageBytes, 10);
    must(write(*a, 0, acknowledged));
    test.devices = {std::move(a)};
    test.kill();
    // A command that has the daemon's runtime directory, and one that has none.
    for (const bool has_runtime : {true, false}) {
        unsigned damaged = 0;
        for (uint64_t offset = test.first_byte; offset < test.end_byte; offset += 192) {
            io::SimulatedMachine machine(test.files->fork(), 1);
            machine.files().damage(kSegment, offset, 16, offset);
            PoolOptions options = test.options;
            if (!has_runtime) {
                options.runtime_directory.clear();
            }
            auto pool = must(Pool::open(machine.env(), TestPool::kDirectory, options));
            if (pool->read_only_reason() || must(pool->find("a")).damage.empty()) {
                continue;
            }
            ++damaged;
            must(pool->create_volume("other", kMiB));
            must(pool->close());
            pool.reset();
            // The file comes back from a backup, say.
            machine.files().damage(kSegment, offset, 16, offset);
            pool = must(Pool::open(machine.env(), TestPool::kDirectory, options));
            ASSERT_EQ(must(pool->find("a")).damage, "") << offset;
            EXPECT_EQ(read(*must(pool->attach("a", {.read_only = true})), 0, kPageBytes),
                      acknowledged)
                << "an acknowledged write was lost";
            must(pool->close());
        }
        EXPECT_GE(damaged, 1U);
    }
}

TEST(PoolDamage, AShrinkThatCannotBeAppliedIsNotLogged) {
    TwoDeltas test;
    test.kill();
    unsigned refused = 0;
    test.for_each_copy([&](RottenCopy& copy) {
        const auto done = copy->resize("a", kMiB);
        if (done) {
            return;
        }
        ++refused;
        EXPECT_EQ(done.error().code(), ErrorCode::kCorrupt) << done.error().message();
        EXPECT_EQ(copy->read_only_reason().value_or(""), "");
        must(copy->create_volume("other", kMiB));
        copy.close();
        must(copy.open());
        EXPECT_EQ(must(copy->find("a")).size_bytes, 8 * kMiB);
        EXPECT_EQ(must(copy->find("a")).damage, "");
        must(copy->find("other"));
    });
    EXPECT_GE(refused, 1U);
}

TEST(PoolDamage, AFlushThatCannotBeAppliedIsNotLogged) {
    TwoDeltas test;
    test.kill();
    for (const bool discards : {true, false}) {
        SCOPED_TRACE(discards);
        unsigned refused = 0;
        test.for_each_copy([&](RottenCopy& copy) {
            auto a = must(copy->attach("a", {}));
            // The separate pages of a leaf become one range. What is left of the delta fits into
            // one node, for which the neighbours are read.
            if (discards) {
                must(a->discard(0, kLeafBytes, IoMode::kMayBlock));
            } else {
                must(write(*a, 0, random_bytes(40 * kPageBytes, 1)));
            }
            const auto done = flush(*a);
            if (done) {
                return;
            }
            ++refused;
            EXPECT_EQ(done.error().code(), ErrorCode::kCorrupt) << done.error().message();
            EXPECT_EQ(copy->read_only_reason().value_or(""), "");
            EXPECT_EQ(must(copy->find("a")).damage, "");
            must(copy->create_volume("other", kMiB));
            a.reset();
            must(copy->remove({"a"}));
            copy.close();
            must(copy.open());
            must(copy->find("other"));
        });
        EXPECT_GE(refused, 1U);
    }
}

// --- A damaged log -------------------------------------------------------------------------------

/// Three flushed versions of a page, each in a batch of its own, on top of an image and a snapshot.
struct ThreeVersions {
    ThreeVersions() {
        import_image(*pool, "image", image);
        must(pool->create_volume("a", kMiB));
        must(pool->create_volume("b", kMiB));
        device = must(pool->attach("a", {}));
        for (unsigned i = 0; i < 3; ++i) {
            batch_page[i] = segment_pages(pool);
            must(write(*device, 0, version(i)));
            must(flush(*device));
            if (i == 0) {
                must(pool->create_snapshot("a", "s"));
            }
        }
    }
    static std::vector<std::byte> version(unsigned number) {
        return random_bytes(kPageBytes, 500 + number);
    }

    const std::vector<std::byte> image = random_bytes(100'000, 3);
    TestPool pool;
    std::shared_ptr<BlockDevice> device;
    std::array<uint64_t, 3> batch_page{};
};

TEST(PoolDamage, AfterALostRecordNoVolumeShowsAnOlderVersion) {
    ThreeVersions test;
    RottenCopy copy(test.pool, test.batch_page[1]);  // The batch's header.
    must(copy.open());
    ASSERT_TRUE(copy->read_only_reason().has_value());
    for (const std::string name : {"a", "b"}) {
        expect_refused(*copy, name);
    }
    EXPECT_EQ(count_warnings(*copy, "acknowledged changes are missing"), 1U);
    EXPECT_EQ(count_warnings(*copy, "'a'"), 0U) << "said for each volume";
    const auto refusal = copy->attach("a", {.read_only = true});
    EXPECT_NE(refusal.error().message().find("--allow-stale"), std::string::npos);
    // What never changes is served.
    EXPECT_EQ(export_all(*copy, "image"), test.image);
    EXPECT_EQ(read(*must(copy->attach("a@s", {.read_only = true})), 0, kPageBytes),
              ThreeVersions::version(0));
    copy.close();

    copy.options().allow_stale = true;
    must(copy.open());
    EXPECT_EQ(must(copy->find("a")).damage, "");
    EXPECT_EQ(read(*must(copy->attach("a", {.read_only = true})), 0, kPageBytes),
              ThreeVersions::version(0));
    EXPECT_EQ(count_warnings(*copy, "acknowledged changes are missing"), 1U);
    EXPECT_EQ(code_of(copy->attach("a", {})), ErrorCode::kReadOnly);
}

TEST(PoolDamage, WithoutItsWritesInTheBufferAVolumeIsNotShown) {
    ThreeVersions test;
    must(write(*test.device, kPageBytes, ThreeVersions::version(7)));  // Acknowledged.
    // Of the batch only the data of its chunk: all records are there, but nothing can be added.
    RottenCopy copy(test.pool, test.batch_page[1] + 1);
    must(copy.open());
    ASSERT_TRUE(copy->read_only_reason().has_value());
    expect_refused(*copy, "a");
    EXPECT_EQ(must(copy->find("b")).damage, "");
    EXPECT_EQ(export_all(*copy, "b"), std::vector<std::byte>(kMiB));
    copy.close();
    copy.options().allow_stale = true;
    must(copy.open());
    EXPECT_EQ(read(*must(copy->attach("a", {.read_only = true})), 0, kPageBytes),
              ThreeVersions::version(2));
}

TEST(PoolDamage, ARottenBitIsNeverServed) {
    TestPool pool;
    auto expected = random_bytes(kMiB, 77);
    import_image(*pool, "image", expected);
    must(pool->clone("image", {"a"}));
    {
        auto device = must(pool->attach("a", {}));
        const auto put = [&](uint64_t page, uint64_t seed) {
            const auto data = random_bytes(kPageBytes, seed);
            must(write(*device, page * kPageBytes, data));
            std::memcpy(expected.data() + page * kPageBytes, data.data(), data.size());
        };
        for (uint64_t i = 0; i < 40; ++i) {
            put(2 * i, i);
        }
        must(flush(*device));
        must(pool->checkpoint());
        put(1, 999);
        must(flush(*device));
        put(3, 1000);
        must(flush(*device));
    }
    pool.close();
    const uint64_t seed = first_seed();
    std::mt19937_64 random(seed);
    uint64_t served = 0;
    const uint64_t flips = scaled(250, 25);
    for (uint64_t i = 0; i < flips; ++i) {
        const std::string name = i % 8 == 0 ? "/pool/superblock" : kSegment;
        io::SimulatedMachine machine(pool.machine().files().fork(), 1);
        {
            auto file = must(machine.files().open(name, io::OpenMode::kReadWrite));
            const uint64_t at = random() % must(file->size_bytes());
            std::byte byte{};
            must(io::read_exact(*file, MutableBytes(&byte, 1), at));
            byte ^= std::byte{1} << (random() % 8);
            must(io::write_all(*file, Bytes(&byte, 1), at));
        }
        const auto opened = Pool::open(machine.env(), TestPool::kDirectory, pool.options());
        const auto device = opened ? (*opened)->attach("a", {.read_only = true})
                                   : Result<std::shared_ptr<BlockDevice>>();
        if (!opened || !device) {
            continue;
        }
        for (uint64_t offset = 0; offset < kMiB; offset += 16 * kPageBytes) {
            std::vector<std::byte> content(16 * kPageBytes);
            const iovec part{.iov_base = content.data(), .iov_len = content.size()};
            if ((*device)->read(offset, std::span(&part, 1), IoMode::kMayBlock)) {
                ++served;
                ASSERT_EQ(std::memcmp(content.data(), expected.data() + offset, content.size()), 0)
                    << "flip " << i << " in " << name << ", STELLARIUM_TEST_SEED=" << seed;
            }
        }
    }
    EXPECT_GT(served, flips);
}

// --- Who suffers ---------------------------------------------------------------------------------

/// The ids of all that a scrub of a store finds damaged.
std::vector<ChunkId> scrubbed(const io::Env& env) {
    class NoRecords final : public nebula::ReplaySink {
      public:
        Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
    };
    const auto store = must(nebula::Store::open(env, TestPool::kDirectory, {.read_only = true}));
    NoRecords sink;
    must(store->replay(sink));
    std::vector<ChunkId> ids;
    must(store->scrub({}, UINT64_MAX,
                      [&](const nebula::DamagedChunk& bad) { ids.push_back(bad.id); }));
    return ids;
}

TEST(PoolDamage, WhatIsNamedAsDamagedIsWhatCannotBeRead) {
    // An image with clones, snapshots, deltas of both kinds; page after page of the store rots, and
    // each time the pages that cannot be read are compared with those that were named.
    const uint64_t seed = first_seed();
    auto owner = std::make_unique<TestPool>(seed);
    TestPool& pool = *owner;
    constexpr uint64_t kSize = 3 * kMiB;
    import_image(*pool, "image", random_bytes(kSize, 1));
    must(pool->clone("image", {"a", "b", "c"}));
    const auto put = [&](const std::string& name, uint64_t first, uint64_t step, uint64_t count) {
        const auto device = must(pool->attach(name, {}));
        for (uint64_t i = 0; i < count; ++i) {
            must(write(*device, (first + i * step) * kPageBytes,
                       random_bytes(kPageBytes, first * 1000 + i)));
        }
    };
    put("a", 3, 5, 90);  // So many that a checkpoint keeps them in inner nodes or folds them.
    must(pool->create_snapshot("a", "s"));
    put("b", 1, 30, 20);
    must(pool->checkpoint());
    put("a", 0, 16, 10);
    put("c", 10, 1, 40);
    must(pool->resize("c", kSize - 17 * kPageBytes - 512));
    must(pool->checkpoint());
    put("b", 2, 30, 20);
    pool.machine().kill_process();
    const auto files = pool.machine().files().fork();
    const PoolOptions options = pool.options();
    owner.reset();

    const uint64_t pages =
        must(must(files->open(kSegment, io::OpenMode::kReadOnly))->size_bytes()) / kPageBytes;
    uint64_t nodes_hit = 0;
    uint64_t chunks_hit = 0;
    for (uint64_t page = 1 + seed % 3; page < pages; page += under_sanitizer() ? 29 : 5) {
        SCOPED_TRACE(fmt::format("page {}", page));
        io::SimulatedMachine machine(files->fork(), 1);
        machine.files().damage(kSegment, page * kPageBytes, 64, page);
        const std::vector<ChunkId> bad = scrubbed(machine.env());
        if (bad.empty()) {
            continue;  // A batch's header, or nothing.
        }
        const auto opened = Pool::open(machine.env(), TestPool::kDirectory, options);
        if (!opened || (*opened)->read_only_reason()) {
            continue;  // The end of the log, or the list of volumes, is damaged.
        }
        Pool& copy = **opened;
        std::map<std::string, BadRanges> named;
        must(copy.chunk_users(bad,
                              [&](const ChunkUser& user) -> Result<void> {
                                  EXPECT_TRUE(user.bad.complete);
                                  if (user.kind) {
                                      EXPECT_EQ(must(copy.find(user.name)).kind, *user.kind);
                                      EXPECT_TRUE(named.emplace(user.name, user.bad).second);
                                  }
                                  return {};
                              },
                              {}));
        for (const std::string name : {"image", "a", "a@s", "b", "c"}) {
            SCOPED_TRACE(name);
            const EntityInfo info = must(copy.find(name));
            if (!info.damage.empty()) {
                EXPECT_FALSE(named.contains(name));
                continue;
            }
            const auto found = pages_of(named[name], info.size_bytes);
            const auto device = must(copy.attach(name, {.read_only = true}));
            for (uint64_t at = 0; at < info.size_bytes; at += kPageBytes) {
                std::vector<std::byte> bytes(std::min(kPageBytes, info.size_bytes - at));
                const iovec into{bytes.data(), bytes.size()};
                const auto read = device->read(at, std::span(&into, 1), IoMode::kMayBlock);
                ASSERT_EQ(read.has_value(), !found.contains(at / kPageBytes))
                    << at << (read ? "" : ": " + read.error().message());
            }
            for (const auto& [number, cause] : found) {
                EXPECT_NE(std::find(bad.begin(), bad.end(), cause), bad.end());
                const bool is_node = found.size() > nebula::kMaxChunkPages;
                ++(is_node ? nodes_hit : chunks_hit);
            }
        }
    }
    EXPECT_GT(chunks_hit, 100U);
    if (!under_sanitizer()) {  // Where few pages are tried, a node's may be none of them.
        EXPECT_GT(nodes_hit, 100U);
    }
}

TEST(PoolDamage, TheListOfVolumesIsNamedWhenItIsDamaged) {
    TestPool pool;
    must(pool->create_volume("a", kMiB));
    must(pool->checkpoint());
    const uint64_t size = segment_pages(pool) * kPageBytes;
    unsigned lists = 0;
    for (uint64_t offset = kPageBytes; offset < size; offset += 64) {
        io::SimulatedMachine machine(pool.machine().files().fork(), 1);
        machine.files().damage(kSegment, offset, 1, 1);
        const std::vector<ChunkId> bad = scrubbed(machine.env());
        must(pool->chunk_users(bad,
                               [&](const ChunkUser& user) -> Result<void> {
                                   EXPECT_FALSE(user.kind.has_value());
                                   EXPECT_EQ(user.bad.ranges.at(0).cause, bad.at(0));
                                   ++lists;
                                   return {};
                               },
                               {}));
        EXPECT_LE(bad.size(), 1U);
    }
    EXPECT_GT(lists, 0U);
}

// --- Scrub ---------------------------------------------------------------------------------------

/// Stops a scrub after its first step.
ScrubOptions one_step() {
    ScrubOptions options;
    auto steps = std::make_shared<int>(0);
    options.progress = [steps](const ScrubPass&, uint64_t) { ++*steps; };
    options.cancelled = [steps] { return *steps > 0; };
    return options;
}

TEST(PoolScrub, GoesOnWhereItStoppedInAnotherProcess) {
    TestPool pool;
    import_image(*pool, "image", random_bytes(6 * kMiB, 1));
    const ScrubPass whole = must(pool->scrub({}));
    EXPECT_GE(whole.bytes, 6 * kMiB);
    EXPECT_GT(whole.ended.count(), 0);
    EXPECT_EQ(pool->stats().scrub.passes, 1U);

    uint64_t here = 0;
    for (int process = 0; process < 3; ++process) {
        EXPECT_EQ(code_of(pool->scrub(one_step())), ErrorCode::kCancelled);
        const ScrubStats stats = pool->stats().scrub;
        ASSERT_TRUE(stats.present);
        EXPECT_FALSE(stats.running);
        EXPECT_LT(stats.present->bytes, whole.bytes);
        EXPECT_GT(stats.present->bytes, here);
        EXPECT_EQ(stats.last->bytes, whole.bytes);
        here = stats.present->bytes;
        pool.kill();
    }
    const ScrubPass rest = must(pool->scrub({}));
    EXPECT_EQ(rest.bytes, whole.bytes);
    EXPECT_EQ(rest.entries, whole.entries);
    EXPECT_EQ(pool->stats().scrub.checked_bytes, whole.bytes - here);
    EXPECT_FALSE(pool->stats().scrub.present);

    EXPECT_EQ(code_of(pool->scrub(one_step())), ErrorCode::kCancelled);
    const uint64_t before = pool->stats().scrub.checked_bytes;
    must(pool->scrub({.restart = true}));
    EXPECT_EQ(pool->stats().scrub.checked_bytes - before, whole.bytes);

    // A position of another store, or damaged, is none.
    EXPECT_EQ(code_of(pool->scrub(one_step())), ErrorCode::kCancelled);
    pool.close();
    pool.machine().files().damage("/pool/scrub", 40, 1, 1);
    pool.open();
    EXPECT_FALSE(pool->stats().scrub.present);
    EXPECT_EQ(must(pool->scrub({})).bytes, whole.bytes);
}

TEST(PoolScrub, EndsAlthoughOthersWrite) {
    TestPool pool;
    import_image(*pool, "image", random_bytes(6 * kMiB, 1));
    must(pool->create_volume("v", 256 * kMiB));
    auto device = must(pool->attach("v", {}));
    uint64_t written = 0;
    // For each step of the scrub twice as much is written.
    ScrubOptions options;
    options.progress = [&](const ScrubPass&, uint64_t) {
        for (int i = 0; i < 2; ++i) {
            must(write(*device, written, random_bytes(kMiB, written)));
            written += kMiB;
        }
        must(flush(*device));
        ASSERT_LT(written, 100 * kMiB);
    };
    const ScrubPass pass = must(pool->scrub(options));
    EXPECT_GE(pass.bytes, 6 * kMiB);
    EXPECT_EQ(pass.damaged, 0U);
}

TEST(PoolScrub, DamageIsNamedUntilTheSameContentComesAgain) {
    TestPool pool;
    const auto content = random_bytes(kMiB, 1);
    import_image(*pool, "image", content);
    must(pool->clone("image", {"a"}));
    must(pool->create_snapshot("a", "s"));
    {
        auto device = must(pool->attach("a", {}));
        must(write(*device, 0, random_bytes(kMiB / 2, 2)));  // Hides the first half.
    }
    // Somewhere in the second half of the image.
    pool.machine().files().damage(kSegment, kMiB * 3 / 4, 1, 1);
    std::vector<std::string> notices;
    must(pool->checkpoint());
    pool.close();
    pool.options().notice = [&notices](const std::string& text) { notices.push_back(text); };
    pool.open();
    EXPECT_TRUE(must(pool->damage({})).listed.empty()) << "nobody has looked";
    EXPECT_EQ(must(pool->scrub({})).damaged, 1U);
    for (int round = 0; round < 2; ++round) {
        const DamageReport report = must(pool->damage({}));
        ASSERT_EQ(report.chunks, 1U);
        const ChunkDamage& bad = report.listed.at(0);
        EXPECT_EQ(bad.chunk.file, kSegment);
        EXPECT_LE(bad.chunk.offset_bytes, kMiB * 3 / 4);
        EXPECT_GT(bad.chunk.offset_bytes + nebula::kMaxChunkBytes, kMiB * 3 / 4);
        ASSERT_EQ(bad.users.size(), 3U);
        for (size_t i = 0; i < 3; ++i) {
            const std::array<std::string, 3> names{"image", "a", "a@s"};
            EXPECT_EQ(bad.users[i].name, names.at(i));
            ASSERT_EQ(bad.users[i].bad.ranges.size(), 1U);
            EXPECT_GE(bad.users[i].bad.ranges[0].offset_bytes, kMiB / 2);
        }
        EXPECT_EQ(pool->stats().scrub.damaged_chunks, 1U);
        EXPECT_EQ(count_warnings(*pool, "1 chunk is damaged"), 1U);
        pool.kill();
    }
    const auto said = [&](const std::string& part) {
        return std::ranges::any_of(
            notices, [&](const std::string& text) { return text.find(part) != std::string::npos; });
    };
    EXPECT_TRUE(said("scrub: /pool/segments/0000001.seg at offset"));
    EXPECT_TRUE(said("bytes of volume 'a' cannot be read"));
    EXPECT_TRUE(said("bytes of snapshot 'a@s' cannot be read"));

    import_image(*pool, "again", content);
    EXPECT_EQ(must(pool->damage({})).chunks, 0U);
    EXPECT_EQ(must(pool->scrub({.restart = true})).damaged, 0U);
    EXPECT_EQ(count_warnings(*pool, "damaged"), 0U);
    EXPECT_TRUE(export_all(*pool, "image") == content);
    must(pool->gc({}));
    EXPECT_EQ(pool->stats().store.damaged_chunks, 0U);
    EXPECT_TRUE(export_all(*pool, "a@s") == content);
}

TEST(PoolScrub, RunsByScheduleAndGivesWay) {
    PoolOptions options = TestPool::small_options();
    options.background = true;
    options.scrub.every = std::chrono::hours(24);
    TestPool pool(1, options);
    import_image(*pool, "image", random_bytes(2 * kMiB, 1));
    const auto first_due = pool->stats().scrub.next_due;
    EXPECT_GE(first_due, pool.machine().clock().wall());
    pool.reopen();
    EXPECT_EQ(pool->stats().scrub.next_due, first_due) << "a restart does not put it off";
    EXPECT_EQ(pool->stats().scrub.passes, 0U);
    pool.close();
    pool.machine().clock().advance(std::chrono::hours(25));
    pool.open();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
    while (pool->stats().scrub.passes == 0 && std::chrono::steady_clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const ScrubStats stats = pool->stats().scrub;
    EXPECT_EQ(stats.passes, 1U);
    EXPECT_GE(stats.checked_bytes, 2 * kMiB);
    EXPECT_GE(stats.next_due, first_due + std::chrono::hours(24));

    // One that is asked for takes over from the scheduled one, which is slow.
    pool.close();
    pool.machine().clock().advance(std::chrono::hours(25));
    pool.options().scrub.rate_bytes_per_second = 1;
    pool.options().scrub.least_rate_bytes_per_second = 1;
    pool.open();
    while (!pool->stats().scrub.present && std::chrono::steady_clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_GE(must(pool->scrub({})).bytes, 2 * kMiB);
    EXPECT_EQ(pool->stats().scrub.passes, 1U);
}

}  // namespace
}  // namespace stellarium::nova
