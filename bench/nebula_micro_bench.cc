// Speed of the content store's inner loops, each beside what bounds it.
//
//     nebula_micro_bench                                  # all of it
//     nebula_micro_bench --benchmark_filter=Index         # the index
//     nebula_micro_bench --benchmark_filter='Cut|memcpy'  # cutting against copying
//
// The index's probes are of a table that does not fit the processor's caches (4 million chunks; set
// STELLARIUM_BENCH_CHUNKS for another number), half of them hits.

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "base/hash.h"
#include "io/io.h"
#include "nebula/chunker.h"
#include "nebula/index.h"

namespace stellarium::nebula {
namespace {

constexpr size_t kDataBytes = size_t{64} << 20;

uint64_t mix(uint64_t i) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/// Random pages, one in ten of them zero.
const std::vector<std::byte>& data() {
    static const std::vector<std::byte> kData = [] {
        std::vector<std::byte> bytes(kDataBytes);
        for (size_t at = 0; at < bytes.size(); at += 8) {
            const uint64_t word = mix(at / kPageBytes) % 10 == 0 ? 0 : mix(at);
            std::memcpy(bytes.data() + at, &word, 8);
        }
        return bytes;
    }();
    return kData;
}

/// The i-th of a sequence of ids whose prefixes are as uniform as hashes.
ChunkId id_of(uint64_t i) {
    ChunkId id;
    const U64Le prefix = mix(i);
    std::memcpy(id.bytes.data(), &prefix, 8);
    return id;
}

PageAddress address_of(uint64_t i) {
    return PageAddress::make(static_cast<uint32_t>(1 + i / kSegmentPages),
                             static_cast<uint32_t>(i % kSegmentPages));
}

uint64_t index_chunks() {
    const char* const text = std::getenv("STELLARIUM_BENCH_CHUNKS");
    return text != nullptr ? std::strtoull(text, nullptr, 10) : 4'000'000;
}

const ChunkIndex& filled_index() {
    static const std::unique_ptr<ChunkIndex> kIndex = [] {
        auto index = std::make_unique<ChunkIndex>();
        for (uint64_t i = 0; i < index_chunks(); ++i) {
            if (!index->insert(id_of(i), address_of(i))) {
                std::abort();
            }
        }
        return index;
    }();
    return *kIndex;
}

/// Ids in no order, half of them in filled_index().
const std::vector<ChunkId>& probe_ids() {
    static const std::vector<ChunkId> kIds = [] {
        std::vector<ChunkId> ids(size_t{1} << 20);
        for (size_t i = 0; i < ids.size(); ++i) {
            ids[i] = id_of(mix(i) % (2 * index_chunks()));
        }
        return ids;
    }();
    return kIds;
}

void set_bytes(benchmark::State& state, size_t bytes_each) {
    state.SetBytesProcessed(
        static_cast<int64_t>(state.iterations() * static_cast<int64_t>(bytes_each)));
}

// --- The bound of all that touches every byte.

void copy_memcpy(benchmark::State& state) {
    const Bytes from = data();  // Made before the clock runs, here and below.
    std::vector<std::byte> copy(kDataBytes);
    while (state.KeepRunning()) {
        std::memcpy(copy.data(), from.data(), kDataBytes);
        benchmark::DoNotOptimize(copy.data());
        benchmark::ClobberMemory();
    }
    set_bytes(state, kDataBytes);
}
BENCHMARK(copy_memcpy)->Name("memcpy");

// --- Cutting.

void cut_block(benchmark::State& state) {
    const Bytes from = data();
    std::vector<Cut> cuts;
    while (state.KeepRunning()) {
        cuts.clear();
        cut_block_data(from, 0, cuts);
        benchmark::DoNotOptimize(cuts.data());
    }
    set_bytes(state, kDataBytes);
}
BENCHMARK(cut_block)->Name("Cut/block");

void cut_stream(benchmark::State& state) {
    const Bytes from = data();
    while (state.KeepRunning()) {
        for (Bytes rest = from; !rest.empty();) {
            rest = rest.subspan(FastCdc::next_cut(rest, true));
        }
    }
    set_bytes(state, kDataBytes);
}
BENCHMARK(cut_stream)->Name("Cut/stream");

// --- Hashing, by chunk length in pages.

void hash_single(benchmark::State& state) {
    const size_t length = static_cast<size_t>(state.range(0)) * kPageBytes;
    const Bytes from = data();
    while (state.KeepRunning()) {
        for (size_t at = 0; at + length <= kDataBytes / 8; at += length) {
            benchmark::DoNotOptimize(hash(from.subspan(at, length)));
        }
    }
    set_bytes(state, kDataBytes / 8 / length * length);
}
BENCHMARK(hash_single)->Name("Hash/one_by_one")->ArgName("pages")->Arg(1)->Arg(4)->Arg(16);

void hash_lanes(benchmark::State& state) {
    const size_t length = static_cast<size_t>(state.range(0)) * kPageBytes;
    std::vector<Bytes> inputs;
    for (size_t at = 0; at + length <= kDataBytes / 8; at += length) {
        inputs.push_back(Bytes(data()).subspan(at, length));
    }
    std::vector<Hash256> out(inputs.size());
    while (state.KeepRunning()) {
        hash_many(inputs, out);
        benchmark::DoNotOptimize(out.data());
    }
    set_bytes(state, inputs.size() * length);
}
BENCHMARK(hash_lanes)->Name("Hash/across_lanes")->ArgName("pages")->Arg(1)->Arg(4)->Arg(16);

// --- The index.

void index_probe_batched(benchmark::State& state) {
    const ChunkIndex& index = filled_index();
    const std::span<const ChunkId> ids = probe_ids();
    const auto batch = static_cast<size_t>(state.range(0));
    std::vector<ChunkIndex::Match> matches;
    size_t at = 0;
    while (state.KeepRunning()) {
        matches.clear();
        at = at + batch > ids.size() ? 0 : at;
        if (!index.find_many(ids.subspan(at, batch), matches)) {
            state.SkipWithError("find_many failed");
        }
        at += batch;
    }
    state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(index_probe_batched)->Name("Index/probe_batched")->Arg(64)->Arg(4096);

void index_probe_single(benchmark::State& state) {
    const ChunkIndex& index = filled_index();
    const std::span<const ChunkId> ids = probe_ids();
    std::vector<PageAddress> addresses;
    size_t at = 0;
    while (state.KeepRunning()) {
        addresses.clear();
        if (!index.candidates(ids[at], addresses)) {
            state.SkipWithError("candidates failed");
        }
        at = (at + 1) % ids.size();
    }
    state.SetItemsProcessed(state.iterations());
}
BENCHMARK(index_probe_single)->Name("Index/probe_single");

/// Fills an index from nothing. worst_us: the longest single insert, which includes the growth of a
/// shard and whatever else the machine did; bytes_a_chunk: at the end.
void index_insert(benchmark::State& state) {
    using Clock = std::chrono::steady_clock;
    const auto count = static_cast<uint64_t>(state.range(0));
    Clock::duration worst{};
    double bytes_a_chunk = 0;
    while (state.KeepRunning()) {
        ChunkIndex index;
        for (uint64_t i = 0; i < count; ++i) {
            const Clock::time_point start = Clock::now();
            if (!index.insert(id_of(i), address_of(i))) {
                state.SkipWithError("insert failed");
            }
            worst = std::max(worst, Clock::now() - start);
        }
        bytes_a_chunk =
            static_cast<double>(index.memory_bytes()) / static_cast<double>(index.size());
    }
    state.SetItemsProcessed(state.iterations() * state.range(0));
    state.counters["worst_us"] = std::chrono::duration<double, std::micro>(worst).count();
    state.counters["bytes_a_chunk"] = bytes_a_chunk;
}
BENCHMARK(index_insert)
    ->Name("Index/insert")
    ->Arg(1'000'000)
    ->Arg(20'000'000)
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

/// A checkpoint of filled_index() in the temporary directory, removed when destroyed.
class CheckpointFile {
  public:
    CheckpointFile() : path_(std::filesystem::temp_directory_path() / "stellarium-index-bench") {
        auto opened = io::real_env().files->open(path_, io::OpenMode::kCreate);
        if (!opened) {
            std::abort();
        }
        file_ = *std::move(opened);
    }
    ~CheckpointFile() { std::filesystem::remove(path_); }
    CheckpointFile(const CheckpointFile&) = delete;
    CheckpointFile& operator=(const CheckpointFile&) = delete;
    io::File& file() { return *file_; }

  private:
    std::string path_;
    std::unique_ptr<io::File> file_;
};

void index_write_checkpoint(benchmark::State& state) {
    CheckpointFile target;
    while (state.KeepRunning()) {
        if (!filled_index().write_checkpoint(target.file(), {})) {
            state.SkipWithError("write_checkpoint failed");
        }
    }
    state.SetItemsProcessed(state.iterations() * static_cast<int64_t>(index_chunks()));
}
BENCHMARK(index_write_checkpoint)->Name("Index/write_checkpoint")->Unit(benchmark::kMillisecond);

/// Opening alone, and with a probe in every shard, which checks all of the file.
void index_open_checkpoint(benchmark::State& state) {
    const bool verify = state.range(0) != 0;
    CheckpointFile target;
    if (!filled_index().write_checkpoint(target.file(), {})) {
        state.SkipWithError("write_checkpoint failed");
    }
    while (state.KeepRunning()) {
        auto opened = ChunkIndex::open_checkpoint(target.file(), {});
        if (!opened || (verify && !opened->index->verify())) {
            state.SkipWithError("open_checkpoint failed");
        }
    }
}
BENCHMARK(index_open_checkpoint)
    ->Name("Index/open_checkpoint")
    ->ArgName("verify")
    ->Arg(0)
    ->Arg(1)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace stellarium::nebula

BENCHMARK_MAIN();
