// How much of guests' memory one process maps.
#include "frontend/vhost/guest_memory.h"

#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "frontend/vhost/limits.h"

namespace stellarium::vhost {
namespace {

TEST(GuestMemoryTest, NoMoreIsMappedThanAProcessMay) {
    const UniqueFd fd(::memfd_create("guest", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(fd.get(), 8192), 0);
    std::vector<std::shared_ptr<SharedMapping>> mappings;
    while (true) {
        // Every other page, or the system would make one mapping of two.
        auto mapping = SharedMapping::map(fd.get(), 4096 * (mappings.size() % 2), 4096);
        if (!mapping) {
            EXPECT_EQ(mapping.error().code(), ErrorCode::kLimitExceeded)
                << mapping.error().message();
            break;
        }
        mappings.push_back(*std::move(mapping));
        ASSERT_LE(mappings.size(), kMaxGuestMappings);
    }
    EXPECT_EQ(mappings.size(), kMaxGuestMappings);
    // One that is given back makes room, one that failed took none.
    EXPECT_FALSE(SharedMapping::map(fd.get(), 0, 1 << 20));
    mappings.pop_back();
    EXPECT_FALSE(SharedMapping::map(fd.get(), 0, 1 << 20));
    EXPECT_TRUE(SharedMapping::map(fd.get(), 0, 4096));
}

}  // namespace
}  // namespace stellarium::vhost
