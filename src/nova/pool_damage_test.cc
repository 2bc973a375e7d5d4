// What a pool does about damage: one volume's trouble is no other's, and nothing is served that is
// not known to be right.
#include <cstdint>
#include <string>
#include <vector>

#include "base/units.h"
#include "nova/limits.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

constexpr const char* kSegment = "/pool/segments/0000001.seg";

uint64_t segment_pages(TestPool& pool) {
    auto file = must(pool.machine().files().open(kSegment, io::OpenMode::kReadOnly));
    return must(file->size_bytes()) / kPageBytes;
}

/// A copy of a closed pool's machine in which one page of the first segment has rotted.
class RottenCopy {
  public:
    RottenCopy(TestPool& pool, uint64_t page)
        : machine_(pool.machine().files().fork(), 1), options_(pool.options()) {
        machine_.files().damage(kSegment, page * kPageBytes, kPageBytes, page);
    }
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

}  // namespace
}  // namespace stellarium::nova
