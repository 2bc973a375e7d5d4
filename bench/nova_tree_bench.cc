// Micro benchmarks of volume content: what a read, a write, a snapshot and a fold pay for the map.
//
//     nova_tree_bench --benchmark_filter=WarmLeaf
//
// The store is on the simulated machine, so that no disk is in the numbers.
#include <map>
#include <random>
#include <span>

#include <benchmark/benchmark.h>

#include "io/simulated.h"
#include "nebula/store.h"
#include "nova/codec.h"
#include "nova/tree.h"

namespace stellarium::nova {
namespace {

template <typename T>
T must(Result<T> result) {
    if (!result) {
        std::fputs((result.error().message() + "\n").c_str(), stderr);
        std::abort();
    }
    if constexpr (!std::is_void_v<T>) {
        return *std::move(result);
    }
}

constexpr uint64_t kLeaves = 2048;        // 4 GiB.
constexpr uint32_t kExtentsPerLeaf = 90;  // As an imported system image has.

/// A store with a tree of kLeaves leaves; made once, shared by all benchmarks.
class Fixture {
  public:
    static Fixture& instance() {
        static Fixture fixture;
        return fixture;
    }

    nebula::Store& store() { return *store_; }
    NodeCache& cache() { return cache_; }
    const NodeRef& root() const { return root_; }
    const Extents& leaf(uint64_t number) const { return leaves_.at(number); }
    const Extent& chunk(uint64_t number) const { return chunks_[number % chunks_.size()]; }

  private:
    class NoRecords final : public nebula::ReplaySink {
      public:
        Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
    };

    Fixture() : machine_(1), cache_(uint64_t{64} << 20) {
        must(nebula::Store::create(machine_.env(), "/pool", {}));
        store_ = must(nebula::Store::open(machine_.env(), "/pool", {}));
        NoRecords sink;
        must(store_->replay(sink));
        std::vector<std::byte> content(4 * nebula::kPageBytes);
        for (uint32_t i = 0; i < 4096; ++i) {
            std::memcpy(content.data(), &i, sizeof(i));
            Extent chunk;
            chunk.id = hash(content);
            chunk.pages = 4;
            nebula::WriteBatch batch;
            batch.add_chunk(chunk.id, content);
            chunk.chunk_address = must(store_->append(batch)).locations[0].address;
            chunks_.push_back(chunk);
        }
        std::mt19937_64 random(1);
        TreeBuilder builder(*store_);
        for (uint64_t number = 0; number < kLeaves; ++number) {
            Extents extents;
            for (uint32_t i = 0; i < kExtentsPerLeaf; ++i) {
                Extent extent = chunks_[random() % chunks_.size()];
                extent.first_page = static_cast<uint16_t>(5 * i);
                extents.push_back(extent);
            }
            must(builder.add_leaf(number, extents));
            leaves_[number] = std::move(extents);
        }
        root_ = must(builder.finish());
    }

    io::SimulatedMachine machine_;
    std::unique_ptr<nebula::Store> store_;
    NodeCache cache_;
    NodeRef root_;
    std::vector<Extent> chunks_;
    std::map<uint64_t, Extents> leaves_;
};

/// A random read of a warm volume: target below 300 ns.
void WarmLeaf(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
        must(fixture.cache().leaf(fixture.store(), fixture.root(), leaf));
    }
    std::mt19937_64 random(static_cast<uint64_t>(state.thread_index()) + 1);
    for (auto _ : state) {
        benchmark::DoNotOptimize(fixture.cache().leaf(fixture.store(), fixture.root(),
                                                      random() % kLeaves, IoMode::kNoWait));
    }
}
BENCHMARK(WarmLeaf)->ThreadRange(1, 2)->UseRealTime();

void ColdLeaf(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    std::mt19937_64 random(1);
    NodeCache cache(0);  // As small as it gets: nearly every look-up reads and decodes.
    for (auto _ : state) {
        benchmark::DoNotOptimize(
            must(cache.leaf(fixture.store(), fixture.root(), random() % kLeaves)));
    }
}
BENCHMARK(ColdLeaf);

/// A delta of `range` leaves, an extent each.
Delta delta_of(Fixture& fixture, int64_t leaves) {
    Delta delta;
    for (int64_t i = 0; i < leaves; ++i) {
        must(delta.set(fixture.store(), static_cast<uint64_t>(i) * 7, {fixture.chunk(0)}));
    }
    return delta;
}

void DeltaFind(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    const Delta delta = delta_of(fixture, state.range(0));
    std::mt19937_64 random(1);
    for (auto _ : state) {
        const uint64_t leaf = random() % (static_cast<uint64_t>(state.range(0)) * 7);
        benchmark::DoNotOptimize(delta.find(fixture.store(), leaf, IoMode::kNoWait));
    }
}
BENCHMARK(DeltaFind)->Arg(8)->Arg(1000)->Arg(100'000);

/// range(1) = 1: a snapshot is taken before every change, so that each copies its path.
void DeltaSet(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    Delta delta = delta_of(fixture, state.range(0));
    Delta snapshot;
    std::mt19937_64 random(1);
    for (auto _ : state) {
        if (state.range(1) != 0) {
            snapshot = delta;
        }
        const uint64_t leaf = random() % static_cast<uint64_t>(state.range(0)) * 7;
        must(delta.set(fixture.store(), leaf, {fixture.chunk(leaf)}));
    }
}
BENCHMARK(DeltaSet)->ArgsProduct({{8, 1000, 100'000}, {0, 1}});

void Overlay(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    Extent written = fixture.chunk(1).slice(0, 1);
    written.first_page = 250;
    for (auto _ : state) {
        benchmark::DoNotOptimize(overlay(fixture.leaf(0), {&written, 1}, false));
    }
}
BENCHMARK(Overlay);

void EncodeLeaf(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    for (auto _ : state) {
        benchmark::DoNotOptimize(encode_tree_leaf(fixture.leaf(0)));
    }
}
BENCHMARK(EncodeLeaf);

void DecodeLeaf(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    const EncodedNode node = encode_tree_leaf(fixture.leaf(0));
    for (auto _ : state) {
        benchmark::DoNotOptimize(decode_tree_leaf(node.content, node.aux));
    }
}
BENCHMARK(DecodeLeaf);

/// Folding one leaf: five inner nodes and the leaf, hashed and appended in one batch.
void UpdateTree(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    NodeRef root = fixture.root();
    uint64_t round = 0;
    for (auto _ : state) {
        ++round;
        Extents extents = fixture.leaf(round % kLeaves);
        extents.front() = fixture.chunk(round * 31);
        root = must(update_tree(fixture.store(), fixture.cache(), root,
                                {{round % kLeaves, std::move(extents)}}));
    }
}
BENCHMARK(UpdateTree)->Iterations(2000);

/// The difference of two volumes of 4 GiB that differ in one page.
void DiffOfOnePage(benchmark::State& state) {
    Fixture& fixture = Fixture::instance();
    VolumeState a;
    a.root = fixture.root();
    a.size_bytes = kLeaves * kPagesPerLeaf * nebula::kPageBytes;
    VolumeState b = a;
    Extent written = fixture.chunk(1).slice(0, 1);
    written.first_page = 499;
    must(b.delta.set(fixture.store(), 1000, {written}));
    for (auto _ : state) {
        must(diff(fixture.store(), fixture.cache(), a, b, false,
                  [](uint64_t, uint64_t) { return Result<void>{}; }));
    }
}
BENCHMARK(DiffOfOnePage);

}  // namespace
}  // namespace stellarium::nova

BENCHMARK_MAIN();
