#include "nebula/index.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <fstream>
#include <map>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/io.h"

namespace stellarium::nebula {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kScale = 20;  // Sanitizers slow the large tests down; make them smaller.
#else
constexpr uint64_t kScale = 1;
#endif

class SplitMix64 {
  public:
    explicit SplitMix64(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        state_ += 0x9E3779B97F4A7C15;
        uint64_t z = state_;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t bound) { return next() % bound; }

  private:
    uint64_t state_;
};

/// The i-th of a sequence of ids, as uniform as hashes.
ChunkId id_of(uint64_t i) {
    SplitMix64 random(i);
    ChunkId id;
    for (size_t at = 0; at < id.bytes.size(); at += 8) {
        const U64Le word = random.next();
        std::memcpy(id.bytes.data() + at, &word, 8);
    }
    return id;
}

/// An id with the given prefix; what follows it does not matter to the index.
ChunkId id_with_prefix(uint64_t prefix) {
    ChunkId id;
    const U64Le word = prefix;
    std::memcpy(id.bytes.data(), &word, 8);
    return id;
}

/// An address that is a function of i, none of them "nowhere".
PageAddress address_of(uint64_t i) {
    return PageAddress::make(static_cast<uint32_t>(1 + i / kSegmentPages),
                             static_cast<uint32_t>(i % kSegmentPages));
}

std::vector<PageAddress> candidates(const ChunkIndex& index, const ChunkId& id) {
    std::vector<PageAddress> out;
    const auto result = index.candidates(id, out);
    EXPECT_TRUE(result.has_value()) << result.error().message();
    std::ranges::sort(out);
    return out;
}

bool has(const ChunkIndex& index, const ChunkId& id, PageAddress address) {
    return std::ranges::binary_search(candidates(index, id), address);
}

void fill(ChunkIndex& index, uint64_t begin, uint64_t end) {
    std::vector<ChunkIndex::Entry> entries;
    for (uint64_t i = begin; i < end;) {
        entries.clear();
        for (const uint64_t stop = std::min(end, i + 4096); i < stop; ++i) {
            entries.push_back({id_of(i), address_of(i)});
        }
        ASSERT_TRUE(index.insert_many(entries).has_value());
    }
}

constexpr std::array<uint8_t, 16> kUuid{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

/// A directory for checkpoint files, removed with them at the end.
class IndexFiles : public ::testing::Test {
  protected:
    IndexFiles() {
        std::string pattern = ::testing::TempDir() + "stellarium-index-XXXXXX";
        EXPECT_NE(mkdtemp(pattern.data()), nullptr);
        directory_ = pattern;
    }
    ~IndexFiles() override {
        io::FileSystem& files = *env_.files;
        const std::vector<io::DirectoryEntry> entries = files.list(directory_).value();
        for (const io::DirectoryEntry& entry : entries) {
            EXPECT_TRUE(files.remove(directory_ + "/" + entry.name).has_value());
        }
        EXPECT_TRUE(files.remove(directory_).has_value());
    }

    std::unique_ptr<io::File> file(const std::string& name) {
        return env_.files->open(directory_ + "/" + name, io::OpenMode::kCreate).value();
    }
    /// Through a checkpoint and back.
    std::unique_ptr<ChunkIndex> reopened(const ChunkIndex& index, uint64_t sequence = 0) {
        const auto target = file("checkpoint-" + std::to_string(files_++));
        const auto written = index.write_checkpoint(*target, {kUuid, sequence});
        EXPECT_TRUE(written.has_value()) << written.error().message();
        auto opened = ChunkIndex::open_checkpoint(*target, kUuid);
        EXPECT_TRUE(opened.has_value()) << opened.error().message();
        EXPECT_EQ(opened->info, (ChunkIndex::CheckpointInfo{kUuid, sequence}));
        return std::move(opened->index);
    }

    io::Env env_ = io::real_env();
    std::string directory_;
    int files_ = 0;
};

TEST(Index, InsertsFindsReplacesErases) {
    ChunkIndex index;
    const ChunkId id = id_of(1);
    EXPECT_TRUE(candidates(index, id).empty());
    EXPECT_FALSE(index.erase(id, address_of(1)).value());
    EXPECT_TRUE(index.insert(id, address_of(1)).value());
    EXPECT_FALSE(index.insert(id, address_of(1)).value());
    EXPECT_TRUE(index.insert(id, address_of(2)).value());
    EXPECT_EQ(candidates(index, id), (std::vector{address_of(1), address_of(2)}));
    EXPECT_TRUE(index.replace(id, address_of(1), address_of(3)).value());
    EXPECT_FALSE(index.replace(id, address_of(1), address_of(4)).value());
    EXPECT_EQ(candidates(index, id), (std::vector{address_of(2), address_of(3)}));
    EXPECT_TRUE(index.replace(id, address_of(3), address_of(2)).value());
    EXPECT_EQ(candidates(index, id), (std::vector{address_of(2)}));
    EXPECT_EQ(index.size(), 1U);
    EXPECT_TRUE(index.erase(id, address_of(2)).value());
    EXPECT_EQ(index.size(), 0U);
}

TEST(Index, RemembersEveryAddressOfTheRange) {
    ChunkIndex index;
    const ChunkId id = id_with_prefix(0);  // r and shard 0: an empty slot must not match it.
    const std::vector<PageAddress> addresses{PageAddress(1), PageAddress::make(1, 0),
                                             PageAddress::make(PageAddress::kMaxSegment, 16383),
                                             PageAddress(PageAddress::kReserved - 1)};
    EXPECT_TRUE(candidates(index, id).empty());
    for (const PageAddress address : addresses) {
        EXPECT_TRUE(index.insert(id, address).value());
    }
    for (const PageAddress address : addresses) {
        EXPECT_TRUE(has(index, id, address));
    }
    EXPECT_EQ(candidates(index, id).size(), addresses.size());
    EXPECT_TRUE(candidates(index, id_with_prefix(uint64_t{1} << 28)).empty());
}

/// The promise of the index: at most 12 bytes of memory a chunk at each of 20 sizes as it grows.
TEST(Index, TakesAtMostTwelveBytesAChunkWhileItGrows) {
    ChunkIndex index;
    const uint64_t step = 1'000'000 / kScale;
    for (uint64_t size = step; size <= 20 * step; size += step) {
        fill(index, size - step, size);
        EXPECT_EQ(index.size(), size);
        // 4096 shard heads are a fixed quarter of a mebibyte; the promise starts at a million.
        EXPECT_LE(static_cast<double>(index.memory_bytes()),
                  12.0 * static_cast<double>(std::max<uint64_t>(size, 200'000)))
            << size;
    }
    for (uint64_t i = 0; i < 20 * step; i += 997) {
        ASSERT_TRUE(has(index, id_of(i), address_of(i))) << i;
    }
}

TEST(Index, BatchedProbesEqualSingleOnes) {
    ChunkIndex index;
    fill(index, 0, 20'000);
    for (const size_t count : {0UL, 1UL, 63UL, 64UL, 65UL, 1000UL}) {
        std::vector<ChunkId> ids;
        std::vector<ChunkIndex::Match> expected;
        for (size_t i = 0; i < count; ++i) {
            ids.push_back(id_of(19'700 + i));  // Some are not there.
            for (const PageAddress address : candidates(index, ids.back())) {
                expected.push_back({i, address});
            }
        }
        std::vector<ChunkIndex::Match> found;
        ASSERT_TRUE(index.find_many(ids, found).has_value());
        EXPECT_EQ(found, expected) << count;
    }
}

TEST(Index, SurvivesManyChunksWithTheSameRememberedBits) {
    ChunkIndex index;
    fill(index, 0, 50'000);
    const uint64_t prefix = 0xABC'123456'0000000;
    std::vector<PageAddress> expected;
    for (uint64_t i = 0; i < 500; ++i) {
        expected.push_back(address_of(1'000'000 + i));
        EXPECT_TRUE(index.insert(id_with_prefix(prefix | i), expected.back()).value());
        EXPECT_FALSE(index.insert(id_with_prefix(prefix), expected.back()).value());
    }
    EXPECT_EQ(candidates(index, id_with_prefix(prefix)), expected);
    EXPECT_EQ(index.size(), 50'500U);
    EXPECT_LE(index.memory_bytes(), 50'500U * 24);  // No growth without end.
    fill(index, 50'000, 100'000);                   // The shards grow with it.
    EXPECT_EQ(candidates(index, id_with_prefix(prefix)), expected);
    for (const PageAddress address : expected) {
        EXPECT_TRUE(index.erase(id_with_prefix(prefix), address).value());
    }
    EXPECT_TRUE(candidates(index, id_with_prefix(prefix)).empty());
    EXPECT_EQ(index.size(), 100'000U);
}

TEST(Index, VisitsEachPairOnceAndGivesMemoryBack) {
    ChunkIndex index;
    constexpr uint64_t kCount = 400'000;
    fill(index, 0, kCount);
    std::vector<bool> seen(kCount);
    const auto visit = [&](PageAddress address) {
        const uint64_t i = address.value() - kSegmentPages;
        ASSERT_LT(i, kCount);
        ASSERT_FALSE(seen[i]);
        seen[i] = true;
    };
    ASSERT_TRUE(index.for_each(visit).has_value());
    EXPECT_EQ(std::ranges::count(seen, true), static_cast<ptrdiff_t>(kCount));

    const uint64_t before = index.memory_bytes();
    const auto dead = [](PageAddress address) { return address.value() % 10 != 0; };
    const uint64_t erased = index.erase_if(dead).value();
    EXPECT_EQ(index.size(), kCount - erased);
    EXPECT_LT(index.memory_bytes(), before / 4);
    for (uint64_t i = 0; i < kCount; i += 7) {
        EXPECT_EQ(has(index, id_of(i), address_of(i)), !dead(address_of(i)));
    }
}

/// Random programs against a plain map. Ids come from a small set of prefixes, so that several
/// chunks share their remembered bits, and the shards in use are crowded.
class IndexModel : public IndexFiles, public ::testing::WithParamInterface<uint64_t> {};

TEST_P(IndexModel, RandomProgramsBehaveAsAMap) {
    SCOPED_TRACE("seed " + std::to_string(GetParam()));
    SplitMix64 random(GetParam());
    const uint64_t shards = 1 + random.below(8);
    const uint64_t remembered = random.below(3) == 0 ? 3 : 1 + random.below(3000);
    const uint64_t addresses = 20 + random.below(3000);
    const auto random_id = [&] {
        const uint64_t shard = random.below(shards) * 511;
        const uint64_t r = (random.below(remembered) * 0x9E3779) & 0xFFFFFF;
        return id_with_prefix(shard << 52 | r << 28 | (random.next() & 0xFFFFFFF));
    };
    const auto key_of = [](const ChunkId& id) { return id.prefix() >> 28; };

    auto index = std::make_unique<ChunkIndex>();
    std::unordered_multimap<uint64_t, PageAddress> model;
    const auto model_has = [&](const ChunkId& id, PageAddress address) {
        const auto [begin, end] = model.equal_range(key_of(id));
        return std::find_if(begin, end, [&](const auto& e) { return e.second == address; });
    };
    const auto model_candidates = [&](const ChunkId& id) {
        std::vector<PageAddress> result;
        const auto [begin, end] = model.equal_range(key_of(id));
        std::for_each(begin, end, [&](const auto& e) { result.push_back(e.second); });
        std::ranges::sort(result);
        return result;
    };
    const auto range_end = [&](const ChunkId& id) { return model.equal_range(key_of(id)).second; };

    uint64_t grow = 70;  // Percent of insertions among the changes; swings to and fro.
    for (int step = 0; step < 20'000; ++step) {
        const ChunkId id = random_id();
        const PageAddress address = address_of(random.below(addresses));
        if (step % 4000 == 3999) {
            grow = 100 - grow;
        }
        const uint64_t kind = random.below(1000);
        if (kind < 800) {
            const auto there = model_has(id, address);
            if (random.below(100) < grow) {
                ASSERT_EQ(index->insert(id, address).value(), there == range_end(id));
                if (there == range_end(id)) {
                    model.emplace(key_of(id), address);
                }
            } else {
                // Erase something that is there, if the id has anything.
                const auto options = model_candidates(id);
                const PageAddress victim =
                    options.empty() ? address : options[random.below(options.size())];
                ASSERT_EQ(index->erase(id, victim).value(), !options.empty());
                if (!options.empty()) {
                    model.erase(model_has(id, victim));
                }
            }
        } else if (kind < 880) {
            const auto options = model_candidates(id);
            const PageAddress from =
                options.empty() ? address : options[random.below(options.size())];
            ASSERT_EQ(index->replace(id, from, address).value(), !options.empty());
            if (!options.empty()) {
                model.erase(model_has(id, from));
                if (model_has(id, address) == range_end(id)) {
                    model.emplace(key_of(id), address);
                }
            }
        } else if (kind < 980) {
            ASSERT_EQ(candidates(*index, id), model_candidates(id));
        } else if (kind < 990) {
            std::vector<ChunkId> ids(random.below(100));
            std::ranges::generate(ids, random_id);
            std::vector<ChunkIndex::Match> found;
            ASSERT_TRUE(index->find_many(ids, found).has_value());
            size_t at = 0;
            for (size_t i = 0; i < ids.size(); ++i) {
                std::vector<PageAddress> of_id;
                for (; at < found.size() && found[at].id_index == i; ++at) {
                    of_id.push_back(found[at].address);
                }
                std::ranges::sort(of_id);
                ASSERT_EQ(of_id, model_candidates(ids[i]));
            }
            ASSERT_EQ(at, found.size());
        } else if (kind < 992) {
            const uint64_t keep = 2 + random.below(20);
            const auto dead = [&](PageAddress a) { return a.value() % keep == 0; };
            const size_t gone =
                std::erase_if(model, [&](const auto& entry) { return dead(entry.second); });
            ASSERT_EQ(index->erase_if(dead).value(), gone);
        } else if (step % 50 == 0) {
            index = reopened(*index);
        }
        if (step % 500 == 0) {
            ASSERT_EQ(index->size(), model.size());
        }
    }
    ASSERT_EQ(index->size(), model.size());
    std::vector<PageAddress> all;
    ASSERT_TRUE(index->for_each([&](PageAddress a) { all.push_back(a); }).has_value());
    std::vector<PageAddress> expected;
    std::ranges::transform(model, std::back_inserter(expected),
                           [](const auto& entry) { return entry.second; });
    std::ranges::sort(all);
    std::ranges::sort(expected);
    EXPECT_EQ(all, expected);
}

INSTANTIATE_TEST_SUITE_P(Seeds, IndexModel, ::testing::Range(uint64_t{1}, uint64_t{17}));

// --- Threads. Run under ThreadSanitizer too.

TEST(IndexThreads, ReadersFindWhatWasInsertedWhileEverythingGrows) {
    constexpr uint64_t kWriters = 2;
    constexpr uint64_t kReaders = 2;
    const uint64_t each = 400'000 / kScale;
    ChunkIndex index;
    std::array<std::atomic<uint64_t>, kWriters> inserted{};
    std::atomic<bool> done = false;
    std::atomic<uint64_t> lost = 0;
    std::vector<std::thread> threads;
    threads.reserve(kWriters + kReaders);
    for (uint64_t w = 0; w < kWriters; ++w) {
        threads.emplace_back([&, w] {
            for (uint64_t i = 0; i < each; ++i) {
                const uint64_t number = w * each + i;
                lost += index.insert(id_of(number), address_of(number)).value() ? 0 : 1;
                inserted[w].store(i + 1, std::memory_order_release);
            }
        });
    }
    for (uint64_t reader = 0; reader < kReaders; ++reader) {
        threads.emplace_back([&, reader] {
            SplitMix64 random(reader);
            std::vector<PageAddress> single;
            while (!done) {
                std::vector<uint64_t> numbers;
                std::vector<ChunkId> ids;
                for (int i = 0; i < 100; ++i) {
                    const uint64_t w = random.below(kWriters);
                    const uint64_t there = inserted[w].load(std::memory_order_acquire);
                    if (there > 0) {
                        numbers.push_back(w * each + random.below(there));
                        ids.push_back(id_of(numbers.back()));
                    }
                }
                std::vector<ChunkIndex::Match> found;
                lost += index.find_many(ids, found).has_value() ? 0 : 1;
                std::set<std::pair<size_t, PageAddress>> set;
                for (const auto& match : found) {
                    set.emplace(match.id_index, match.address);
                }
                for (size_t i = 0; i < ids.size(); ++i) {
                    lost += set.contains({i, address_of(numbers[i])}) ? 0 : 1;
                }
            }
        });
    }
    for (uint64_t w = 0; w < kWriters; ++w) {
        threads[w].join();
    }
    done = true;
    for (uint64_t reader = 0; reader < kReaders; ++reader) {
        threads[kWriters + reader].join();
    }
    EXPECT_EQ(lost, 0U);
    EXPECT_EQ(index.size(), kWriters * each);
}

TEST(IndexThreads, AReplacedChunkIsAlwaysAtOneOfItsPlaces) {
    ChunkIndex index;
    const uint64_t rounds = 200'000 / kScale;
    const ChunkId id = id_of(1);
    ASSERT_TRUE(index.insert(id, address_of(0)).has_value());
    std::atomic<bool> done = false;
    std::atomic<uint64_t> missing = 0;
    std::thread reader([&] {
        std::vector<PageAddress> found;
        while (!done) {
            found.clear();
            missing += index.candidates(id, found).has_value() && found.size() == 1 ? 0 : 1;
        }
    });
    // A neighbour in the same shard makes it grow and shrink.
    std::thread neighbour([&] {
        for (uint64_t i = 0; i < rounds / 100; ++i) {
            const auto other = [&](uint64_t k) {
                return id_with_prefix((id.prefix() & ~uint64_t{0xFFFFFF0000000}) | k << 30);
            };
            for (uint64_t k = 1; k < 100; ++k) {
                missing += index.insert(other(k), address_of(k)).has_value() ? 0 : 1;
            }
            for (uint64_t k = 1; k < 100; ++k) {
                missing += index.erase(other(k), address_of(k)).value() ? 0 : 1;
            }
        }
    });
    uint64_t failed = 0;
    for (uint64_t i = 0; i < rounds; ++i) {
        failed += index.replace(id, address_of(i), address_of(i + 1)).value() ? 0 : 1;
    }
    neighbour.join();
    done = true;
    reader.join();
    EXPECT_EQ(missing, 0U);
    EXPECT_EQ(failed, 0U);
    EXPECT_EQ(candidates(index, id), std::vector{address_of(rounds)});
}

TEST_F(IndexFiles, ACheckpointTakenDuringChangesHoldsWhatWasThereBefore) {
    const uint64_t before = 200'000 / kScale;
    ChunkIndex index;
    fill(index, 0, before);
    std::thread writer([&] { fill(index, before, 2 * before); });
    const auto copy = reopened(index);
    writer.join();
    for (uint64_t i = 0; i < before; ++i) {
        ASSERT_TRUE(has(*copy, id_of(i), address_of(i)));
    }
    ASSERT_TRUE(
        copy->for_each([&](PageAddress a) { ASSERT_LT(a.value() - kSegmentPages, 2 * before); })
            .has_value());
}

TEST_F(IndexFiles, OpenedShardsAreFirstTouchedByManyThreadsAtOnce) {
    const uint64_t count = 100'000 / kScale;
    ChunkIndex index;
    fill(index, 0, count);
    const auto copy = reopened(index);
    std::atomic<uint64_t> missing = 0;
    std::vector<std::thread> threads;
    threads.reserve(3);
    for (uint64_t t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
            for (uint64_t i = 0; i < count; ++i) {
                if (t == 0 && i % 3 == 0) {  // One changes, so that shards move to the heap.
                    missing +=
                        copy->insert(id_of(i + count), address_of(i + count)).value() ? 0 : 1;
                }
                missing += has(*copy, id_of(i), address_of(i)) ? 0 : 1;
            }
        });
    }
    std::ranges::for_each(threads, [](std::thread& t) { t.join(); });
    EXPECT_EQ(missing, 0U);
    EXPECT_EQ(copy->size(), count + (count + 2) / 3);
}

// --- Checkpoints.

TEST_F(IndexFiles, RoundTripsAndWorksInPlaceUntilChanged) {
    ChunkIndex index;
    fill(index, 0, 100'000);
    const ChunkId crowded = id_with_prefix(0xABC'123456'0000000);
    for (uint64_t i = 0; i < 40; ++i) {
        ASSERT_TRUE(index.insert(crowded, address_of(1'000'000 + i)).value());
    }
    auto copy = reopened(index, 42);
    EXPECT_EQ(copy->size(), index.size());
    const uint64_t head_bytes = ChunkIndex().memory_bytes();
    EXPECT_EQ(copy->memory_bytes(), head_bytes);
    EXPECT_GT(copy->mapped_bytes(), 100'000U * 8);
    ASSERT_TRUE(copy->verify().has_value());
    EXPECT_EQ(candidates(*copy, crowded), candidates(index, crowded));
    for (uint64_t i = 0; i < 100'000; ++i) {
        ASSERT_EQ(candidates(*copy, id_of(i)), candidates(index, id_of(i)));
    }
    // A change copies its own shard only.
    const uint64_t mapped_before = copy->mapped_bytes();
    EXPECT_FALSE(copy->insert(id_of(5), address_of(5)).value());
    EXPECT_EQ(copy->mapped_bytes(), mapped_before);
    EXPECT_TRUE(copy->insert(id_of(5), address_of(6)).value());
    EXPECT_LT(copy->mapped_bytes(), mapped_before);
    EXPECT_GT(copy->mapped_bytes(), mapped_before * 9 / 10);
    // What was changed, and what never was, go into the next checkpoint alike.
    ASSERT_TRUE(copy->erase(id_of(7), address_of(7)).value());
    const auto third = reopened(*copy);
    EXPECT_EQ(third->size(), index.size());
    EXPECT_TRUE(has(*third, id_of(5), address_of(6)));
    EXPECT_FALSE(has(*third, id_of(7), address_of(7)));
    EXPECT_TRUE(has(*third, id_of(8), address_of(8)));
}

TEST_F(IndexFiles, AnEmptyIndexRoundTrips) {
    const auto copy = reopened(ChunkIndex());
    EXPECT_EQ(copy->size(), 0U);
    EXPECT_TRUE(copy->insert(id_of(1), address_of(1)).value());
    EXPECT_EQ(candidates(*copy, id_of(1)), std::vector{address_of(1)});
}

TEST_F(IndexFiles, TheSameContentInALongerOldFileIsStillAWholeCheckpoint) {
    ChunkIndex large;
    fill(large, 0, 50'000);
    const auto target = file("reused");
    ASSERT_TRUE(large.write_checkpoint(*target, {kUuid, 1}).has_value());
    ASSERT_TRUE(ChunkIndex().write_checkpoint(*target, {kUuid, 2}).has_value());
    const auto opened = ChunkIndex::open_checkpoint(*target, kUuid);
    ASSERT_TRUE(opened.has_value()) << opened.error().message();
    EXPECT_EQ(opened->index->size(), 0U);
    EXPECT_EQ(opened->info.sequence, 2U);
}

class IndexDamage : public IndexFiles {
  protected:
    IndexDamage() {
        ChunkIndex index;
        fill(index, 0, 3000);
        for (uint64_t i = 0; i < 20; ++i) {  // One shard with overflow slots.
            EXPECT_TRUE(index.insert(id_with_prefix(uint64_t{7} << 52), address_of(i)).value());
        }
        file_ = file("victim");
        EXPECT_TRUE(index.write_checkpoint(*file_, {kUuid, 9}).has_value());
        content_.resize(file_->size_bytes().value());
        EXPECT_TRUE(io::read_exact(*file_, content_, 0).has_value());
    }

    void write(Bytes bytes, uint64_t offset) {
        ASSERT_TRUE(io::write_all(*file_, bytes, offset).has_value());
    }
    /// Opens and touches every shard.
    Result<void> open_and_verify() {
        auto opened = ChunkIndex::open_checkpoint(*file_, kUuid);
        if (!opened) {
            return std::unexpected(opened.error());
        }
        const auto verified = opened->index->verify();
        // Whatever state the shards are in, using them must be an error or an answer.
        std::vector<PageAddress> found;
        for (uint64_t i = 0; i < 50; ++i) {
            const auto result = opened->index->candidates(id_of(i), found);
            EXPECT_TRUE(result.has_value() || result.error().code() == ErrorCode::kCorrupt);
        }
        return verified;
    }
    /// Changes one byte and expects the file to be refused.
    void expect_flip_refused(uint64_t offset, std::byte mask) {
        const std::byte changed = content_[offset] ^ mask;
        write(Bytes(&changed, 1), offset);
        const auto result = open_and_verify();
        ASSERT_FALSE(result.has_value()) << "byte " << offset;
        EXPECT_EQ(result.error().code(), ErrorCode::kCorrupt) << "byte " << offset;
        EXPECT_NE(result.error().message().find(file_->path()), std::string::npos);
        EXPECT_NE(result.error().message().find("offset"), std::string::npos);
        write(Bytes(content_).subspan(offset, 1), offset);
    }
    /// Writes a changed header with a right checksum.
    template <typename Change>
    Error refused_with_header(Change&& change) {
        auto header = load<IndexCheckpointHeader>(content_);
        change(header);
        header.checksum = checksum64(bytes_of(header).first(sizeof(header) - 8));
        write(bytes_of(header), 0);
        const auto result = open_and_verify();
        EXPECT_FALSE(result.has_value());
        write(Bytes(content_).first(sizeof(header)), 0);
        return result.has_value() ? Error(ErrorCode::kIo, "accepted") : result.error();
    }
    /// Writes a changed row, with right checksums of table and header.
    template <typename Change>
    Error refused_with_row(uint32_t shard, Change&& change) {
        std::vector<std::byte> changed = content_;
        const size_t at = sizeof(IndexCheckpointHeader) + shard * sizeof(IndexShardRow);
        auto row = load<IndexShardRow>(Bytes(changed).subspan(at));
        change(row);
        std::memcpy(changed.data() + at, &row, sizeof(row));
        auto header = load<IndexCheckpointHeader>(changed);
        header.table_checksum = checksum64(Bytes(changed).subspan(
            sizeof(IndexCheckpointHeader), kIndexShards * sizeof(IndexShardRow)));
        header.checksum = checksum64(bytes_of(header).first(sizeof(header) - 8));
        std::memcpy(changed.data(), &header, sizeof(header));
        write(changed, 0);
        const auto result = open_and_verify();
        EXPECT_FALSE(result.has_value());
        write(content_, 0);
        return result.has_value() ? Error(ErrorCode::kIo, "accepted") : result.error();
    }

    std::unique_ptr<io::File> file_;
    std::vector<std::byte> content_;
};

TEST_F(IndexDamage, NoFlippedByteIsOverlooked) {
    ASSERT_TRUE(open_and_verify().has_value());
    SplitMix64 random(1);
    const auto mask = [&] { return static_cast<std::byte>(1U << random.below(8)); };
    const uint64_t data = sizeof(IndexCheckpointHeader) + kIndexShards * sizeof(IndexShardRow);
    for (uint64_t offset = 0; offset < 120; ++offset) {  // Every field of the header.
        expect_flip_refused(offset, mask());
    }
    for (uint64_t offset = sizeof(IndexCheckpointHeader) - 16;
         offset < sizeof(IndexCheckpointHeader) + 3 * sizeof(IndexShardRow); ++offset) {
        expect_flip_refused(offset, mask());  // Its end, and every field of some rows.
    }
    for (uint64_t i = 0; i < 600 / kScale; ++i) {
        expect_flip_refused(random.below(data), mask());
        expect_flip_refused(data + random.below(content_.size() - data), mask());
    }
    // The shard with overflow slots: they, and the zeros after them, are covered too.
    const auto row = load<IndexShardRow>(
        Bytes(content_).subspan(sizeof(IndexCheckpointHeader) + 7 * sizeof(IndexShardRow)));
    ASSERT_GT(row.overflow_slots, 0U);
    const uint64_t overflow = row.offset_bytes + uint64_t{row.buckets} * 64;
    for (uint64_t offset = overflow; offset < overflow + 64; ++offset) {
        expect_flip_refused(offset, mask());
    }
    ASSERT_TRUE(open_and_verify().has_value());
}

TEST_F(IndexDamage, TruncatedLengthenedAndForeignFilesAreRefused) {
    SplitMix64 random(2);
    for (int i = 0; i < 40; ++i) {
        const uint64_t size = i < 4 ? static_cast<uint64_t>(i) * 64 : random.below(content_.size());
        ASSERT_TRUE(file_->truncate(size).has_value());
        const auto result = open_and_verify();
        ASSERT_FALSE(result.has_value()) << size;
        EXPECT_EQ(result.error().code(), ErrorCode::kCorrupt) << size;
        write(content_, 0);
    }
    ASSERT_TRUE(file_->truncate(content_.size() + 64).has_value());
    EXPECT_EQ(open_and_verify().error().code(), ErrorCode::kCorrupt);
    ASSERT_TRUE(file_->truncate(0).has_value());
    ASSERT_TRUE(file_->truncate(content_.size()).has_value());  // All zeros.
    EXPECT_EQ(open_and_verify().error().code(), ErrorCode::kCorrupt);
    write(content_, 0);
    const auto other = ChunkIndex::open_checkpoint(*file_, {});
    ASSERT_FALSE(other.has_value());
    EXPECT_NE(other.error().message().find("another store"), std::string::npos);
    EXPECT_TRUE(open_and_verify().has_value());
}

TEST_F(IndexDamage, NewerFormatsAreUnsupportedAndHarmlessFeaturesIgnored) {
    EXPECT_EQ(refused_with_header([](auto& h) { h.read_version = 2; }).code(),
              ErrorCode::kUnsupported);
    EXPECT_EQ(refused_with_header([](auto& h) { h.features_refuse = 1; }).code(),
              ErrorCode::kUnsupported);
    auto header = load<IndexCheckpointHeader>(content_);
    header.write_version = 2;
    header.features_read_only = 1;
    header.features_ignore = 1;
    header.checksum = checksum64(bytes_of(header).first(sizeof(header) - 8));
    write(bytes_of(header), 0);
    EXPECT_TRUE(open_and_verify().has_value());
}

/// Checksums can be made right by whoever writes the file; then bounds must hold.
TEST_F(IndexDamage, HostileFieldsWithRightChecksumsAreRefused) {
    for (const auto code :
         {refused_with_header([](auto& h) { h.read_version = 0; }).code(),
          refused_with_header([](auto& h) { h.shards = 8192; }).code(),
          refused_with_header([](auto& h) { h.bucket_bytes = 32; }).code(),
          refused_with_header([](auto& h) { h.entries = h.entries + 1; }).code(),
          refused_with_header([](auto& h) { h.file_bytes = ~uint64_t{0}; }).code(),
          refused_with_header([](auto& h) { h.reserved[5] = 1; }).code(),
          refused_with_row(0, [](auto& r) { r.offset_bytes = ~uint64_t{63}; }).code(),
          refused_with_row(0, [](auto& r) { r.offset_bytes = r.offset_bytes + 64; }).code(),
          refused_with_row(1, [](auto& r) { r.buckets = ~uint32_t{0}; }).code(),
          refused_with_row(1, [](auto& r) { r.buckets = uint32_t{1} << 26; }).code(),
          refused_with_row(1, [](auto& r) { r.buckets = 0; }).code(),
          refused_with_row(1, [](auto& r) { r.overflow_slots = ~uint32_t{0}; }).code(),
          refused_with_row(1, [](auto& r) { r.entries = ~uint32_t{0}; }).code(),
          refused_with_row(1, [](auto& r) { r.entries = r.entries + 1; }).code(),
          refused_with_row(1, [](auto& r) { r.reserved = 1; }).code(),
          refused_with_row(kIndexShards - 1, [](auto& r) { r.buckets = r.buckets + 1; }).code()}) {
        EXPECT_EQ(code, ErrorCode::kCorrupt);
    }
}

TEST_F(IndexDamage, ADamagedShardIsAnErrorUntilItIsClearedAndFilledAgain) {
    const uint32_t damaged_shard = ChunkIndex::shard_of(id_of(0));
    const auto row = load<IndexShardRow>(Bytes(content_).subspan(
        sizeof(IndexCheckpointHeader) + damaged_shard * sizeof(IndexShardRow)));
    const std::byte flipped = content_[row.offset_bytes] ^ std::byte{1};
    write(Bytes(&flipped, 1), row.offset_bytes);

    auto opened = ChunkIndex::open_checkpoint(*file_, kUuid);
    ASSERT_TRUE(opened.has_value());
    ChunkIndex& index = *opened->index;
    const ChunkId id = id_of(0);
    std::vector<PageAddress> found;
    std::vector<ChunkIndex::Match> matches;
    EXPECT_TRUE(index.clear_damaged().empty());  // Nobody has looked yet.
    EXPECT_EQ(index.candidates(id, found).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.find_many(std::span(&id, 1), matches).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.insert(id, address_of(0)).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.erase(id, address_of(0)).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.replace(id, address_of(0), address_of(1)).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.verify().error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.for_each([](PageAddress) {}).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(index.erase_if([](PageAddress) { return false; }).error().code(),
              ErrorCode::kCorrupt);
    EXPECT_EQ(index.write_checkpoint(*file("next"), {kUuid, 10}).error().code(),
              ErrorCode::kCorrupt);
    uint64_t elsewhere = 1;
    while (ChunkIndex::shard_of(id_of(elsewhere)) == damaged_shard) {
        ++elsewhere;
    }
    EXPECT_TRUE(has(index, id_of(elsewhere), address_of(elsewhere)));

    EXPECT_EQ(index.clear_damaged(), std::vector{damaged_shard});
    EXPECT_TRUE(candidates(index, id).empty());
    for (uint64_t i = 0; i < 3000; ++i) {
        if (ChunkIndex::shard_of(id_of(i)) == damaged_shard) {
            EXPECT_TRUE(index.insert(id_of(i), address_of(i)).value());
        }
    }
    EXPECT_EQ(index.size(), 3020U);
    EXPECT_TRUE(index.verify().has_value());
    EXPECT_TRUE(has(index, id, address_of(0)));
}

// --- docs/formats/index-checkpoint.md.

/// The page's lines under a heading, up to the next one.
std::vector<std::string> page_section(const std::string& heading) {
    std::ifstream file(STELLARIUM_SOURCE_DIR "/docs/formats/index-checkpoint.md");
    std::vector<std::string> lines;
    bool inside = false;
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with("#")) {
            inside = line.substr(line.find(' ') + 1) == heading;
        } else if (inside) {
            lines.push_back(line);
        }
    }
    EXPECT_FALSE(lines.empty()) << "no section '" << heading << "'";
    return lines;
}

struct Field {
    size_t offset;
    size_t size;
    std::string name;
    friend bool operator==(const Field&, const Field&) = default;
    // The name is GoogleTest's. NOLINTNEXTLINE(readability-identifier-naming)
    friend void PrintTo(const Field& field, std::ostream* out) {
        *out << field.name << " at " << field.offset << ", " << field.size << " bytes";
    }
};

/// The rows of a section's table of offset, size and name.
std::vector<Field> page_fields(const std::string& heading) {
    std::vector<Field> fields;
    for (const std::string& line : page_section(heading)) {
        Field field{};
        std::string bar;
        std::istringstream row(line);
        if (row >> bar >> field.offset >> bar >> field.size >> bar >> field.name && bar == "|") {
            fields.push_back(
                {field.offset, field.size, field.name.substr(1, field.name.size() - 2)});
        }
    }
    return fields;
}

/// The bytes of a section's hex dump, by offset.
std::map<size_t, std::byte> page_dump(const std::string& heading) {
    std::map<size_t, std::byte> bytes;
    bool inside = false;
    for (const std::string& line : page_section(heading)) {
        if (line.starts_with("```")) {
            inside = !inside;
        } else if (inside) {
            std::istringstream row(line);
            size_t offset = 0;
            row >> std::hex >> offset;
            for (unsigned value = 0; row >> value;) {
                bytes[offset++] = static_cast<std::byte>(value);
            }
        }
    }
    return bytes;
}

#define STELLARIUM_FIELD(Struct, field)                        \
    Field {                                                    \
        offsetof(Struct, field), sizeof(Struct::field), #field \
    }

TEST(IndexCheckpointPage, StructsAreAsDocumented) {
    using Header = IndexCheckpointHeader;
    EXPECT_EQ(
        page_fields("Header, 4096 bytes"),
        (std::vector<Field>{
            STELLARIUM_FIELD(Header, magic), STELLARIUM_FIELD(Header, read_version),
            STELLARIUM_FIELD(Header, write_version), STELLARIUM_FIELD(Header, features_refuse),
            STELLARIUM_FIELD(Header, features_read_only), STELLARIUM_FIELD(Header, features_ignore),
            STELLARIUM_FIELD(Header, store_uuid), STELLARIUM_FIELD(Header, sequence),
            STELLARIUM_FIELD(Header, entries), STELLARIUM_FIELD(Header, file_bytes),
            STELLARIUM_FIELD(Header, shards), STELLARIUM_FIELD(Header, bucket_bytes),
            STELLARIUM_FIELD(Header, table_checksum), STELLARIUM_FIELD(Header, reserved),
            STELLARIUM_FIELD(Header, checksum)}));
    EXPECT_EQ(
        page_fields("Row of the shard table, 32 bytes"),
        (std::vector<Field>{
            STELLARIUM_FIELD(IndexShardRow, offset_bytes), STELLARIUM_FIELD(IndexShardRow, buckets),
            STELLARIUM_FIELD(IndexShardRow, overflow_slots),
            STELLARIUM_FIELD(IndexShardRow, entries), STELLARIUM_FIELD(IndexShardRow, reserved),
            STELLARIUM_FIELD(IndexShardRow, checksum)}));
}

/// A change here is a change of format.
TEST_F(IndexFiles, GoldenCheckpointIsTheOneOnThePage) {
    ChunkIndex index;
    ASSERT_TRUE(index.insert(hash(bytes_of("stellarium")), PageAddress::make(3, 5)).value());
    const auto target = file("golden");
    ASSERT_TRUE(index.write_checkpoint(*target, {kUuid, 0x0102030405060708}).has_value());
    std::vector<std::byte> content(target->size_bytes().value());
    ASSERT_TRUE(io::read_exact(*target, content, 0).has_value());
    EXPECT_EQ(content.size(), 4096U + 4096 * 32 + 64);
    EXPECT_EQ(hash(content).hex(),
              "b849d27c1be06aec0ab9735521fbbc1b2d8ef486a7ba1c4ae256d442f46f4c18");
    const auto dump = page_dump("Example");
    EXPECT_GT(dump.size(), 200U);
    for (const auto& [offset, byte] : dump) {
        ASSERT_LT(offset, content.size());
        EXPECT_EQ(content[offset], byte) << "offset " << offset;
    }
}

/// A reader written from the page alone finds every pair where the page says.
TEST_F(IndexFiles, AnIndependentReaderFindsEveryPair) {
    ChunkIndex index;
    constexpr uint64_t kCount = 300'000 / kScale;
    fill(index, 0, kCount);
    const auto target = file("placement");
    ASSERT_TRUE(index.write_checkpoint(*target, {kUuid, 1}).has_value());
    std::vector<std::byte> content(target->size_bytes().value());
    ASSERT_TRUE(io::read_exact(*target, content, 0).has_value());

    using Pair = std::tuple<uint64_t, uint64_t, uint64_t>;  // Shard, r, address.
    std::set<Pair> in_file;
    for (uint64_t shard = 0; shard < 4096; ++shard) {
        const auto row = load<IndexShardRow>(Bytes(content).subspan(4096 + shard * 32, 32));
        const uint64_t n = row.buckets;
        for (uint64_t i = 0; i < n * 8 + row.overflow_slots; ++i) {
            const uint64_t slot = load<U64Le>(Bytes(content).subspan(row.offset_bytes + i * 8, 8));
            if (slot == 0) {
                continue;
            }
            const uint64_t r = slot >> 40;
            const uint64_t b1 = r * n >> 24;
            uint64_t m = r ^ r >> 13;
            m = (m * 0x9E3779B1) % (1 << 24);
            m ^= m >> 11;
            m = (m * 0x85EBCA6B) % (1 << 24);
            m ^= m >> 13;
            const uint64_t b2 = n == 1 ? b1 : (b1 + 1 + (m * (n - 1) >> 24)) % n;
            ASSERT_TRUE(i >= n * 8 || i / 8 == b1 || i / 8 == b2) << shard << " " << i;
            ASSERT_TRUE(in_file.emplace(shard, r, slot % (uint64_t{1} << 40)).second);
        }
    }
    std::set<Pair> expected;
    for (uint64_t i = 0; i < kCount; ++i) {
        const uint64_t prefix = load<U64Le>(bytes_of(id_of(i)).first(8));
        expected.emplace(prefix >> 52, (prefix >> 28) % (1 << 24), address_of(i).value());
    }
    EXPECT_EQ(in_file, expected);
}

TEST_F(IndexFiles, AShardThatCannotBeReadIsDamagedAndNotTheEndOfTheProcess) {
    if (::madvise(nullptr, 0, MADV_POPULATE_READ) != 0) {
        GTEST_SKIP() << "Linux before 5.14 cannot say what of a mapping cannot be read";
    }
    const auto target = file("cut");
    const auto id_of = [](uint32_t i) { return hash(std::as_bytes(std::span(&i, 1))); };
    ChunkIndex written;
    constexpr uint32_t kPairs = 100'000;
    for (uint32_t i = 0; i < kPairs; ++i) {
        ASSERT_TRUE(written.insert(id_of(i), PageAddress::make(1, 1 + i % 16000)).has_value());
    }
    ASSERT_TRUE(written.write_checkpoint(*target, {kUuid, 1}).has_value());
    const auto opened = ChunkIndex::open_checkpoint(*target, kUuid);
    ASSERT_TRUE(opened.has_value()) << opened.error().message();
    // What is behind the file's end now is as a sector that cannot be read: SIGBUS for whoever
    // touches it.
    const uint64_t size = target->size_bytes().value();
    ASSERT_TRUE(target->truncate(size / 2).has_value());
    uint64_t found = 0;
    uint64_t refused = 0;
    for (uint32_t i = 0; i < kPairs; ++i) {
        std::vector<PageAddress> addresses;
        const auto probed = opened->index->candidates(id_of(i), addresses);
        if (!probed) {
            EXPECT_EQ(probed.error().code(), ErrorCode::kCorrupt) << probed.error().message();
            ++refused;
        } else {
            EXPECT_FALSE(addresses.empty());
            ++found;
        }
    }
    EXPECT_GT(found, kPairs / 4);
    EXPECT_GT(refused, kPairs / 4);
    // As a store does with what is damaged.
    std::vector<bool> shards(kIndexShards);
    for (const uint32_t shard : opened->index->clear_damaged()) {
        shards[shard] = true;
    }
    for (uint32_t i = 0; i < kPairs; ++i) {
        if (shards[ChunkIndex::shard_of(id_of(i))]) {
            const auto address = PageAddress::make(1, 1 + i % 16000);
            ASSERT_TRUE(opened->index->insert(id_of(i), address).has_value());
        }
    }
    EXPECT_TRUE(opened->index->verify().has_value());
    EXPECT_EQ(opened->index->size(), kPairs);
}

}  // namespace
}  // namespace stellarium::nebula
