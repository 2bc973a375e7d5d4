// A program that embeds the engine, as one outside of this tree would: made against the installed
// headers and library only. Makes a store, writes a page of a volume, reads it from a clone.
#include <array>
#include <cstdio>
#include <future>
#include <string>

#include "io/io.h"
#include "nova/pool.h"

using stellarium::IoMode;
using stellarium::Result;

namespace {

constexpr size_t kPageBytes = 4096;

Result<bool> round_trip(const std::string& directory) {
    const stellarium::nova::PoolOptions options;
    STELLARIUM_TRY(stellarium::nova::Pool::create(stellarium::io::real_env(), directory, options));
    STELLARIUM_ASSIGN(const auto pool,
                      stellarium::nova::Pool::open(stellarium::io::real_env(), directory, options));
    STELLARIUM_TRY(pool->create_volume("first", 1 << 20));

    std::array<unsigned char, kPageBytes> page{};
    page.fill(0x5a);
    {
        STELLARIUM_ASSIGN(const auto device, pool->attach("first", {}));
        const std::array from{iovec{page.data(), page.size()}};
        STELLARIUM_TRY(device->write(kPageBytes, from, IoMode::kMayBlock));
        std::promise<Result<void>> flushed;
        device->flush_async([&](Result<void> result) { flushed.set_value(std::move(result)); });
        STELLARIUM_TRY(flushed.get_future().get());
    }
    STELLARIUM_TRY(pool->clone("first", {"second"}));

    std::array<unsigned char, kPageBytes> back{};
    {
        STELLARIUM_ASSIGN(const auto device, pool->attach("second", {}));
        const std::array into{iovec{back.data(), back.size()}};
        STELLARIUM_TRY(device->read(kPageBytes, into, IoMode::kMayBlock));
    }
    STELLARIUM_TRY(pool->close());
    return back == page;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: embed DIRECTORY\n");
        return 2;
    }
    const Result<bool> same = round_trip(argv[1]);
    if (!same) {
        std::fprintf(stderr, "embed: %s\n", same.error().message().c_str());
        return 1;
    }
    return *same ? 0 : 1;
}
