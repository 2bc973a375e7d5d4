// stellarium-gc-space: what garbage collection gives back to a real file system.
//
// In a new folder under DIRECTORY, which is removed at the end:
//   1. clones of an image, each with unique data of its own, are written, removed and collected;
//   2. one volume has random pages overwritten, ten times its size in all, and is collected.
// Prints one JSON object, counted in blocks as du counts them, and fails when less than 95 % of the
// removed bytes came back, or more than twice the live bytes stayed, or anything reads back wrong.
//
//     stellarium-gc-space DIRECTORY [VOLUMES = 1000] [KIB PER VOLUME = 1024] [MIB OVERWRITTEN = 32]
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <sys/stat.h>

#include "base/units.h"
#include "io/posix.h"
#include "io/simulated.h"
#include "nova/pool.h"

namespace stellarium {
namespace {

/// st_blocks of everything below a folder.
uint64_t disk_bytes(const std::string& folder) {
    uint64_t bytes = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
        struct stat status{};
        if (lstat(entry.path().c_str(), &status) == 0) {
            bytes += static_cast<uint64_t>(status.st_blocks) * 512;
        }
    }
    return bytes;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<std::byte> random_bytes(size_t size, uint64_t seed) {
    std::vector<std::byte> bytes(size);
    io::SeededRandom(seed).fill(bytes);
    return bytes;
}

Result<void> write(BlockDevice& device, uint64_t offset, MutableBytes data) {
    const iovec part{.iov_base = data.data(), .iov_len = data.size()};
    return device.write(offset, std::span(&part, 1), IoMode::kMayBlock);
}

Result<void> expect_content(nova::Pool& pool, const std::string& source, Bytes expected) {
    STELLARIUM_ASSIGN(const auto reader, pool.open_reader(source));
    std::vector<std::byte> actual(expected.size());
    STELLARIUM_TRY(reader->read(0, actual));
    if (!std::equal(actual.begin(), actual.end(), expected.begin())) {
        return fail(ErrorCode::kCorrupt, fmt::format("'{}' reads back wrong", source));
    }
    return {};
}

Result<void> delete_many(nova::Pool& pool, const std::string& folder, uint64_t volumes,
                         uint64_t volume_bytes) {
    const auto base = random_bytes(4 * kMiB, 1);
    STELLARIUM_ASSIGN(auto import, pool.begin_import("base"));
    STELLARIUM_TRY(import->append(0, base));
    STELLARIUM_TRY(import->finish(base.size() + volume_bytes));
    import.reset();
    STELLARIUM_TRY(pool.checkpoint());
    const uint64_t before = disk_bytes(folder);
    std::vector<std::string> names;
    for (uint64_t i = 0; i < volumes; ++i) {
        names.push_back(fmt::format("v{}", i));
    }
    STELLARIUM_TRY(pool.clone("base", names));
    for (uint64_t i = 0; i < volumes; ++i) {
        STELLARIUM_ASSIGN(const auto device, pool.attach(names[i], {}));
        auto data = random_bytes(volume_bytes, 1000 + i);
        STELLARIUM_TRY(write(*device, base.size(), data));
    }
    STELLARIUM_TRY(pool.checkpoint());
    const uint64_t full = disk_bytes(folder);
    STELLARIUM_TRY(pool.remove(names));
    const auto start = std::chrono::steady_clock::now();
    STELLARIUM_ASSIGN(const nova::GcReport report, pool.gc({}));
    const double seconds = seconds_since(start);
    const uint64_t after = disk_bytes(folder);
    const double share =
        static_cast<double>(full - after) / static_cast<double>(volumes * volume_bytes);
    fmt::print(
        "\"volumes\": {}, \"volume_bytes\": {}, \"bytes_empty\": {}, \"bytes_full\": {}, "
        "\"bytes_collected\": {}, \"returned_share\": {:.4f}, \"freed_bytes\": {}, "
        "\"gc_seconds\": {:.3f}, ",
        volumes, volume_bytes, before, full, after, share, report.freed_bytes, seconds);
    STELLARIUM_TRY(expect_content(pool, "base", base));
    if (share < 0.95) {
        return fail(ErrorCode::kNoSpace,
                    fmt::format("only {:.1f} % of the removed bytes came back", share * 100));
    }
    return {};
}

Result<void> overwrite(nova::Pool& pool, const std::string& folder, uint64_t size) {
    const uint64_t before = disk_bytes(folder);
    auto content = random_bytes(size, 2);
    STELLARIUM_TRY(pool.create_volume("overwritten", size));
    {
        STELLARIUM_ASSIGN(const auto device, pool.attach("overwritten", {}));
        STELLARIUM_TRY(write(*device, 0, content));
        std::mt19937_64 random(3);
        const uint64_t pages = size / nova::kPageBytes;
        for (uint64_t i = 0; i < 10 * pages; ++i) {
            const uint64_t offset = random() % pages * nova::kPageBytes;
            const auto page = MutableBytes(content).subspan(offset, nova::kPageBytes);
            io::SeededRandom(4 + i).fill(page);
            STELLARIUM_TRY(write(*device, offset, page));
        }
    }
    const uint64_t full = disk_bytes(folder) - before;
    const auto start = std::chrono::steady_clock::now();
    STELLARIUM_ASSIGN(const nova::GcReport report, pool.gc({}));
    const double seconds = seconds_since(start);
    // What was there before has been collected already.
    const uint64_t after = disk_bytes(folder) - before;
    const double ratio = static_cast<double>(after) / static_cast<double>(size);
    fmt::print(
        "\"overwritten_volume_bytes\": {}, \"overwritten_full_bytes\": {}, "
        "\"overwritten_collected_bytes\": {}, \"ratio\": {:.3f}, \"rewritten_bytes\": {}, "
        "\"moved_bytes\": {}, \"overwritten_gc_seconds\": {:.3f}}}\n",
        size, full, after, ratio, report.rewritten_bytes, report.moved_bytes, seconds);
    STELLARIUM_TRY(expect_content(pool, "overwritten", content));
    if (ratio > 2) {
        return fail(ErrorCode::kNoSpace,
                    fmt::format("the live bytes take {:.2f} times their size", ratio));
    }
    return {};
}

Result<void> run(const std::string& folder, uint64_t volumes, uint64_t volume_bytes,
                 uint64_t overwritten_bytes) {
    const io::Env env = io::real_env();
    nova::PoolOptions options;
    options.gc.automatic = false;
    options.dirty_budget_bytes = 16 * kMiB;
    const std::string store = folder + "/store";
    STELLARIUM_TRY(nova::Pool::create(env, store, options));
    STELLARIUM_ASSIGN(const auto pool, nova::Pool::open(env, store, options));
    fmt::print("{{");
    STELLARIUM_TRY(delete_many(*pool, store, volumes, volume_bytes));
    STELLARIUM_TRY(overwrite(*pool, store, overwritten_bytes));
    return pool->close();
}

uint64_t number(std::string_view text, uint64_t otherwise) {
    uint64_t value = otherwise;
    std::from_chars(text.data(), text.data() + text.size(), value);
    return value;
}

}  // namespace
}  // namespace stellarium

int main(int argc, char** argv) {
    using namespace stellarium;  // NOLINT(google-build-using-namespace): this is the program.
    if (argc < 2 || argc > 5) {
        fmt::print(stderr,
                   "usage: stellarium-gc-space DIRECTORY [VOLUMES] [KIB PER VOLUME] [MIB "
                   "OVERWRITTEN]\n");
        return 2;
    }
    std::string folder = std::string(argv[1]) + "/gc-space-XXXXXX";
    if (mkdtemp(folder.data()) == nullptr) {
        fmt::print(stderr, "stellarium-gc-space: no folder can be made in {}\n", argv[1]);
        return 1;
    }
    const auto argument = [&](int index, uint64_t otherwise) {
        return index < argc ? number(argv[index], otherwise) : otherwise;
    };
    const Result<void> done =
        run(folder, argument(2, 1000), argument(3, 1024) * kKiB, argument(4, 32) * kMiB);
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
    if (!done) {
        fmt::print(stderr, "stellarium-gc-space: {}\n", done.error().message());
        return 1;
    }
    return 0;
}
