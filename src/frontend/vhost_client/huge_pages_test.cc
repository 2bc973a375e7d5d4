// Guest memory that comes in huge pages.
#include "frontend/vhost_client/test_bench.h"

namespace stellarium::vhost {
namespace {

TEST_F(VhostTest, GuestMemoryOnHugePages) {
    Result<std::unique_ptr<GuestRam>> huge = GuestRam::create(8 * kMiB, /*huge_pages=*/true);
    if (!huge) {
        GTEST_SKIP() << "no huge pages are reserved here: " << huge.error().message();
    }
    attach_one();
    TestGuest guest;
    guest.ram = std::move(*huge);
    guest.queues[0] = std::make_unique<DriverQueue>(*guest.ram, 128, true, true);
    guest.connect(socket());
    std::vector<std::byte> data = pattern(65536, 3);
    EXPECT_EQ(value_of(guest.driver().write(0, data), "write"), kBlkStatusOk);
    EXPECT_TRUE(equal(on_disk(0, data.size()), data));
}

}  // namespace
}  // namespace stellarium::vhost
