// A pool on a simulated machine, for tests.
//
//     TestPool test(seed);
//     test->create_volume("a", kGiB);
//     test.kill();            // The process dies and a new one opens the pool.
//
// Thread rule: one thread, but for the pool itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <future>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "io/simulated.h"
#include "nova/pool.h"

namespace stellarium::nova::testing {

/// Stops the test with the error's text.
template <typename T>
T must(Result<T> result) {
    if (!result) {
        throw std::runtime_error(result.error().message());
    }
    if constexpr (!std::is_void_v<T>) {
        return *std::move(result);
    }
}

inline ErrorCode code_of(const auto& result) {
    EXPECT_FALSE(result.has_value());
    return result ? ErrorCode::kCancelled : result.error().code();
}

class TestPool {
  public:
    static constexpr const char* kDirectory = "/pool";
    static constexpr const char* kRuntime = "/run";

    explicit TestPool(uint64_t seed = 1, PoolOptions options = small_options())
        : machine_(seed), options_(std::move(options)) {
        machine_.files().mount(kRuntime, {.kind = io::FileSystemKind::kMemory, .name = "tmpfs"});
        must(Pool::create(machine_.env(), kDirectory, options_));
        open();
    }
    /// A machine that continues from a copy of another; no pool is open yet.
    TestPool(std::unique_ptr<io::SimulatedFileSystem> files, uint64_t seed, PoolOptions options)
        : machine_(std::move(files), seed), options_(std::move(options)) {}

    /// No threads, small segments: everything happens in calls.
    static PoolOptions small_options() {
        PoolOptions options;
        options.store.segment_bytes = uint64_t{4} << 20;
        options.runtime_directory = kRuntime;
        options.dirty_budget_bytes = uint64_t{4} << 20;
        options.background = false;
        return options;
    }

    Pool* operator->() { return pool_.get(); }
    Pool& operator*() { return *pool_; }
    io::SimulatedMachine& machine() { return machine_; }
    PoolOptions& options() { return options_; }

    void open() { must(try_open()); }
    Result<void> try_open() {
        STELLARIUM_ASSIGN(pool_, Pool::open(machine_.process_env(), kDirectory, options_));
        return {};
    }
    bool is_open() const { return pool_ != nullptr; }
    /// Forgets the pool as it is, without a word to it.
    void drop() { pool_.reset(); }
    void close() {
        must(pool_->close());
        pool_.reset();
    }
    void reopen() {
        close();
        open();
    }
    /// Devices must be gone or belong to the dead process.
    void kill() {
        machine_.kill_process();
        pool_.reset();
        open();
    }
    void crash(uint64_t seed) {
        machine_.crash(seed);
        pool_.reset();
        open();
    }

  private:
    io::SimulatedMachine machine_;
    PoolOptions options_;
    std::unique_ptr<Pool> pool_;
};

inline std::vector<std::byte> random_bytes(size_t size, uint64_t seed) {
    std::vector<std::byte> bytes(size);
    io::SeededRandom(seed).fill(bytes);
    return bytes;
}

inline Result<void> write(BlockDevice& device, uint64_t offset_bytes, Bytes data,
                          IoMode mode = IoMode::kMayBlock) {
    // The interface takes the iovec of the system, which knows no const.
    const iovec part{.iov_base = const_cast<std::byte*>(data.data()), .iov_len = data.size()};
    return device.write(offset_bytes, std::span(&part, 1), mode);
}

inline std::vector<std::byte> read(BlockDevice& device, uint64_t offset_bytes, size_t size) {
    std::vector<std::byte> data(size, std::byte{0xee});
    const iovec part{.iov_base = data.data(), .iov_len = data.size()};
    must(device.read(offset_bytes, std::span(&part, 1), IoMode::kMayBlock));
    return data;
}

inline Result<void> flush(BlockDevice& device) {
    std::promise<Result<void>> promise;
    device.flush_async([&](Result<void> result) { promise.set_value(std::move(result)); });
    return promise.get_future().get();
}

inline EntityInfo import_image(Pool& pool, const std::string& name, Bytes content,
                               size_t step_bytes = 1'000'000) {
    auto import = must(pool.begin_import(name));
    for (size_t offset = 0; offset < content.size(); offset += step_bytes) {
        must(import->append(
            offset, content.subspan(offset, std::min(step_bytes, content.size() - offset))));
    }
    return must(import->finish(content.size()));
}

/// Everything, holes as zeros; checks that next_data() and read() agree.
inline std::vector<std::byte> export_all(Pool& pool, const std::string& source) {
    auto reader = must(pool.open_reader(source));
    std::vector<std::byte> content(reader->size_bytes());
    for (uint64_t offset = 0;;) {
        const auto range = must(reader->next_data(offset));
        if (!range) {
            return content;
        }
        EXPECT_GE(range->first, offset);
        EXPECT_GT(range->second, 0U);
        must(
            reader->read(range->first, MutableBytes(content).subspan(range->first, range->second)));
        offset = range->first + range->second;
    }
}

}  // namespace stellarium::nova::testing
