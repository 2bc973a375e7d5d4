// stellarium-store-scale: how a store of very many chunks opens, grows and answers.
//
// Fills a store with N small distinct objects (each one an index entry, as a chunk is), stops it
// cleanly and opens it again, then adds a quarter as many chunks of one page, at most half a GiB.
// Prints one JSON object: times in seconds, index bytes a chunk, and how many look-ups of those
// chunks a second of one processor are confirmed, in batches.
//
//     stellarium-store-scale DIRECTORY [N = 20000000]
//
// DIRECTORY must not exist; it is left for inspection. About 130 bytes of disk per object.
#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include <fmt/format.h>

#include "base/hash.h"
#include "nebula/store.h"

namespace stellarium {
namespace {

constexpr uint64_t kMaxChunks = 131'072;  // Half a GiB.

class IgnoreRecords : public nebula::ReplaySink {
  public:
    Result<void> replay(uint64_t /*sequence*/, uint16_t /*kind*/, Bytes /*payload*/) override {
        return {};
    }
};

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Result<void> fill(nebula::Store& store, uint64_t count) {
    constexpr uint64_t kObjectsPerBatch = 8192;
    std::vector<U64Le> contents(kObjectsPerBatch);
    nebula::WriteBatch batch;
    for (uint64_t first = 0; first < count; first += kObjectsPerBatch) {
        const uint64_t end = std::min(count, first + kObjectsPerBatch);
        batch.clear();
        for (uint64_t i = first; i < end; ++i) {
            contents[i - first] = i;
            const Bytes content = bytes_of(contents[i - first]);
            batch.add_object(hash(content), content);
        }
        STELLARIUM_ASSIGN(const auto appended, store.append(batch));
        (void)appended;
    }
    return store.sync(store.sequence());
}

/// Every probed object must be there; returns the seconds that `probes` of them took.
Result<double> probe(nebula::Store& store, uint64_t count, uint64_t probes) {
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t i = 0; i < probes; ++i) {
        const U64Le content = (i * 0x9E3779B97F4A7C15U) % count;
        STELLARIUM_ASSIGN(const auto object, store.get_object(hash(bytes_of(content))));
        if (load<U64Le>(object.content).get() != content.get()) {
            return fail(ErrorCode::kCorrupt, fmt::format("object {} reads back wrong", i));
        }
    }
    return seconds_since(start);
}

/// Adds chunks of one page each; their ids.
Result<std::vector<ChunkId>> add_chunks(nebula::Store& store, uint64_t count) {
    constexpr uint64_t kChunksPerBatch = 2048;
    std::vector<std::array<U64Le, nebula::kPageBytes / 8>> pages(kChunksPerBatch);
    std::vector<ChunkId> ids;
    nebula::WriteBatch batch;
    for (uint64_t first = 0; first < count; first += kChunksPerBatch) {
        const uint64_t end = std::min(count, first + kChunksPerBatch);
        batch.clear();
        for (uint64_t i = first; i < end; ++i) {
            pages[i - first].fill(~i);
            const Bytes content = bytes_of(pages[i - first]);
            ids.push_back(hash(content));
            batch.add_chunk(ids.back(), content);
        }
        STELLARIUM_ASSIGN(const auto appended, store.append(batch));
        (void)appended;
    }
    STELLARIUM_TRY(store.sync(store.sequence()));
    return ids;
}

double processor_seconds() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
}

/// Looks up all of `ids`, which are stored, in batches and in no order. A first pass reads the
/// footers that confirm them, the others are measured, in time of this thread on a processor.
Result<double> hits_per_second(nebula::Store& store, std::vector<ChunkId> ids) {
    constexpr size_t kIdsPerBatch = 4096;
    constexpr int kMeasuredPasses = 4;
    std::ranges::sort(ids, {}, [](const ChunkId& id) { return id.bytes; });
    const auto found = std::make_unique<bool[]>(kIdsPerBatch);
    double start = 0;
    for (int pass = 0; pass <= kMeasuredPasses; ++pass) {
        for (size_t first = 0; first < ids.size(); first += kIdsPerBatch) {
            const size_t many = std::min(kIdsPerBatch, ids.size() - first);
            const std::span<bool> out(found.get(), many);
            STELLARIUM_TRY(store.contains(std::span(ids).subspan(first, many), out));
            if (!std::ranges::all_of(out, std::identity{})) {
                return fail(ErrorCode::kCorrupt, "a stored chunk was not found");
            }
        }
        start = pass == 0 ? processor_seconds() : start;
    }
    return static_cast<double>(ids.size()) * kMeasuredPasses / (processor_seconds() - start);
}

Result<void> run(const std::string& directory, uint64_t count) {
    const io::Env env = io::real_env();
    IgnoreRecords sink;
    STELLARIUM_TRY(nebula::Store::create(env, directory, {}));
    auto start = std::chrono::steady_clock::now();
    {
        STELLARIUM_ASSIGN(auto store, nebula::Store::open(env, directory, {}));
        STELLARIUM_TRY(store->replay(sink));
        STELLARIUM_TRY(fill(*store, count));
        const double fill_seconds = seconds_since(start);
        start = std::chrono::steady_clock::now();
        STELLARIUM_TRY(store->checkpoint(store->sequence(), {}));
        fmt::print("{{\"objects\": {}, \"fill_seconds\": {:.2f}, \"checkpoint_seconds\": {:.2f}, ",
                   count, fill_seconds, seconds_since(start));
        STELLARIUM_TRY(store->close());
    }
    start = std::chrono::steady_clock::now();
    STELLARIUM_ASSIGN(auto store, nebula::Store::open(env, directory, {}));
    STELLARIUM_TRY(store->replay(sink));
    const double open_seconds = seconds_since(start);
    const nebula::StoreStats stats = store->stats();
    if (stats.chunks < count) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("{} chunks after reopening, {} written", stats.chunks, count));
    }
    const uint64_t probes = std::min<uint64_t>(count, 100'000);
    STELLARIUM_ASSIGN(const double probe_seconds, probe(*store, count, probes));
    STELLARIUM_ASSIGN(auto ids, add_chunks(*store, std::min(count / 4 + 1, kMaxChunks)));
    STELLARIUM_ASSIGN(const double hits, hits_per_second(*store, std::move(ids)));
    fmt::print(
        "\"open_seconds\": {:.3f}, \"index_bytes_per_chunk\": {:.2f}, \"probes\": {}, "
        "\"probe_seconds\": {:.3f}, \"hits_per_second\": {:.0f}, \"index_misses_recovered\": "
        "{}}}\n",
        open_seconds, static_cast<double>(stats.index_bytes) / static_cast<double>(stats.chunks),
        probes, probe_seconds, hits, store->stats().index_misses_recovered);
    return store->close();
}

}  // namespace
}  // namespace stellarium

int main(int argc, char** argv) {
    uint64_t count = 20'000'000;
    const std::string_view text = argc == 3 ? argv[2] : "1";
    if (argc < 2 || argc > 3 ||
        (argc == 3 &&
         (std::from_chars(text.begin(), text.end(), count).ptr != text.end() || count == 0))) {
        fmt::print(stderr, "usage: stellarium-store-scale DIRECTORY [OBJECTS]\n");
        return 2;
    }
    const auto result = stellarium::run(argv[1], count);
    if (!result) {
        fmt::print(stderr, "stellarium-store-scale: {}\n", result.error().message());
        return 1;
    }
    return 0;
}
