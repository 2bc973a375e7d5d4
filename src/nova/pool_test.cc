// The pool end to end on a simulated machine: each operation, its refusals, and what survives.
#include "nova/pool.h"

#include <cstring>

#include "base/units.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

TEST(Pool, ImportExportAndClone) {
    TestPool pool;
    const auto content = random_bytes(5'000'001, 7);
    const EntityInfo image = import_image(*pool, "debian", content);
    EXPECT_EQ(image.kind, EntityKind::kImage);
    EXPECT_EQ(image.size_bytes, content.size());
    EXPECT_EQ(export_all(*pool, "debian"), content);

    must(pool->clone("debian", {"vm-1", "vm-2"}));
    const EntityInfo clone = must(pool->find("vm-2"));
    EXPECT_EQ(clone.kind, EntityKind::kVolume);
    EXPECT_EQ(clone.parent, "debian");
    EXPECT_EQ(clone.size_bytes, (content.size() + 511) / 512 * 512);
    auto padded = content;
    padded.resize(clone.size_bytes);
    EXPECT_EQ(export_all(*pool, "vm-2"), padded);

    pool.reopen();
    EXPECT_EQ(export_all(*pool, "debian"), content);
    EXPECT_EQ(export_all(*pool, "vm-1"), padded);
}

TEST(Pool, WritesAreSeenAtOnceAndAfterFlushAndReopen) {
    TestPool pool;
    must(pool->create_volume("a", 8 * kMiB));
    const auto data = random_bytes(100'352, 3);
    auto shadow = std::vector<std::byte>(8 * kMiB);
    {
        auto device = must(pool->attach("a", {}));
        for (const uint64_t offset : {512U, 2'000'896U, 4'194'304U - 51'200U}) {
            must(write(*device, offset, data));
            std::memcpy(shadow.data() + offset, data.data(), data.size());
            EXPECT_EQ(read(*device, 0, shadow.size()), shadow);
        }
        must(flush(*device));
        EXPECT_EQ(read(*device, 0, shadow.size()), shadow);
        must(device->discard(4096 + 512, 2 * kMiB, IoMode::kMayBlock));
        std::memset(shadow.data() + 4096 + 512, 0, 2 * kMiB);
        EXPECT_EQ(read(*device, 0, shadow.size()), shadow);
    }
    EXPECT_EQ(export_all(*pool, "a"), shadow);
    pool.reopen();
    EXPECT_EQ(export_all(*pool, "a"), shadow);
}

TEST(Pool, AcknowledgedWritesSurviveTheProcess) {
    TestPool pool;
    must(pool->create_volume("a", 8 * kMiB));
    const auto data = random_bytes(20 * 4096, 4);
    auto device = must(pool->attach("a", {}));
    must(write(*device, 512 * 5, data));
    pool.machine().kill_process();
    device.reset();
    pool.kill();
    EXPECT_GT(must(pool->find("a")).dirty_bytes, 0U);
    device = must(pool->attach("a", {}));
    EXPECT_EQ(read(*device, 512 * 5, data.size()), data);
}

}  // namespace
}  // namespace stellarium::nova
