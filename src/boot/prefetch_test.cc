#include "boot/prefetch.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "boot/limits.h"
#include "nova/testing/test_pool.h"

namespace stellarium::boot {
namespace {

using nova::StoredRun;
using nova::testing::code_of;
using nova::testing::import_image;
using nova::testing::must;
using nova::testing::random_bytes;
using nova::testing::TestPool;

constexpr uint64_t kPage = nova::kPageBytes;
constexpr uint64_t kMaxReadPages = kStageReadBytes / kPage;

StoredRun run_at(uint64_t page, uint32_t segment, uint32_t stored_page, uint32_t pages) {
    return {
        .page = page, .address = nebula::PageAddress::make(segment, stored_page), .pages = pages};
}

TEST(PlanReads, NeighboursInTheStoreAreOneReadWhateverTheirOrder) {
    const std::vector<StoredRun> runs{run_at(0, 1, 100, 16), run_at(900, 1, 500, 4),
                                      run_at(40, 1, 116, 8), run_at(70, 1, 96, 4)};
    const auto reads = plan_reads(runs);
    ASSERT_EQ(reads.size(), 2U);
    EXPECT_EQ(reads[0].address.page(), 96U);
    EXPECT_EQ(reads[0].pages, 28U);
    EXPECT_EQ(reads[0].parts.size(), 3U);
    EXPECT_EQ(reads[1].address.page(), 500U);
    EXPECT_EQ(reads[1].parts, (std::vector<PageRange>{{.page = 900, .pages = 4}}));
}

TEST(PlanReads, SegmentsAndGapsEndARead) {
    const std::vector<StoredRun> runs{run_at(0, 1, 100, 2), run_at(2, 2, 102, 2),
                                      run_at(4, 1, 103, 1)};
    EXPECT_EQ(plan_reads(runs).size(), 3U);
}

TEST(PlanReads, RandomRunsAreCoveredOnce) {
    for (uint64_t seed = first_seed(); seed < first_seed() + scaled(200, 50); ++seed) {
        SCOPED_TRACE(seed);
        std::mt19937_64 random(seed);
        std::vector<StoredRun> runs;
        std::map<uint64_t, size_t> first_order;  // By stored page.
        for (size_t i = 0; i < 1 + random() % 60; ++i) {
            const auto segment = static_cast<uint32_t>(1 + random() % 3);
            const auto page = static_cast<uint32_t>(random() % 1500);
            const auto pages = static_cast<uint32_t>(1 + random() % (i % 10 == 0 ? 1200 : 16));
            runs.push_back(run_at(i * 2000, segment, page, pages));
            for (uint32_t k = 0; k < pages; ++k) {
                first_order.try_emplace(runs.back().address.value() + k, i);
            }
        }
        const auto reads = plan_reads(runs);
        std::set<uint64_t> covered;
        std::map<uint64_t, uint64_t> parts;  // Pages of the state by their first one.
        size_t last_order = 0;
        for (const PlannedRead& read : reads) {
            EXPECT_LE(read.pages, kMaxReadPages);
            size_t order = runs.size();
            for (uint32_t k = 0; k < read.pages; ++k) {
                const uint64_t stored = read.address.value() + k;
                ASSERT_TRUE(first_order.contains(stored)) << "a page that nobody asked for";
                covered.insert(stored);
                order = std::min(order, first_order[stored]);
            }
            // Parts of one long run may come anywhere behind its start.
            last_order = std::max(last_order, order);
            for (const PageRange& part : read.parts) {
                parts[part.page] += part.pages;
            }
        }
        EXPECT_EQ(covered.size(), first_order.size());
        uint64_t asked = 0;
        for (const StoredRun& run : runs) {
            asked += run.pages;
        }
        uint64_t said = 0;
        for (const auto& [page, pages] : parts) {
            said += pages;
        }
        EXPECT_EQ(said, asked);
        EXPECT_TRUE(std::ranges::any_of(reads.front().parts, [](const PageRange& part) {
            return part.page == 0;
        })) << "what the list has first comes first";
    }
}

/// An image of random pages with some holes.
std::vector<std::byte> content_of(uint64_t pages, uint64_t seed) {
    std::vector<std::byte> content = random_bytes(pages * kPage, seed);
    for (uint64_t page = 0; page < pages; page += 7) {
        std::fill_n(content.begin() + static_cast<std::ptrdiff_t>(page * kPage), kPage,
                    std::byte{0});
    }
    return content;
}

TEST(Stage, WhatIsStagedIsCheckedAndReadNoMore) {
    TestPool test;
    import_image(*test, "image", content_of(700, 1));
    must(test->clone("image", {"vm"}));
    // What the opening replays, it checks.
    must(test->checkpoint());
    test.reopen();
    const uint64_t before = test->stats().store.chunks_verified;
    const std::vector<PageRange> ranges{{.page = 600, .pages = 50}, {.page = 1, .pages = 100}};
    const auto reader = must(test->open_reader("vm"));
    const StageReport report = must(stage(*reader, ranges, {}));
    EXPECT_EQ(report.wanted_bytes, 150 * kPage);
    uint64_t holes = 0;
    for (const PageRange& range : ranges) {
        for (uint64_t page = range.page; page < range.page + range.pages; ++page) {
            holes += page % 7 == 0 ? 1 : 0;
        }
    }
    EXPECT_EQ(report.staged_bytes, (150 - holes) * kPage);
    EXPECT_EQ(report.damaged_bytes, 0U);
    EXPECT_FALSE(report.short_of_memory);
    EXPECT_LT(report.reads, 20U) << "what lies next to each other is read at once";
    const uint64_t checked = test->stats().store.chunks_verified;
    EXPECT_GT(checked, before);
    // The guest's reads find everything checked.
    {
        const auto device = must(test->attach("vm", {}));
        for (const PageRange& range : ranges) {
            nova::testing::read(*device, range.page * kPage, range.pages * kPage);
        }
    }
    EXPECT_EQ(test->stats().store.chunks_verified, checked);
    // And the rest of the image is as it was.
    const auto device = must(test->attach("vm", {}));
    nova::testing::read(*device, 300 * kPage, 50 * kPage);
    EXPECT_GT(test->stats().store.chunks_verified, checked);
}

TEST(Stage, AVolumesOwnPagesAreReadAsTheyAre) {
    TestPool test;
    import_image(*test, "image", content_of(100, 1));
    must(test->clone("image", {"vm"}));
    const std::vector<std::byte> own = random_bytes(3 * kPage, 99);
    {
        const auto device = must(test->attach("vm", {}));
        must(nova::testing::write(*device, 10 * kPage, own));
        must(nova::testing::flush(*device));
    }
    must(test->checkpoint());
    test.reopen();
    const PageRange range{.page = 8, .pages = 8};
    const auto reader = must(test->open_reader("vm"));
    must(stage(*reader, std::span(&range, 1), {}));
    const uint64_t checked = test->stats().store.chunks_verified;
    const auto device = must(test->attach("vm", {}));
    EXPECT_EQ(nova::testing::read(*device, 10 * kPage, 3 * kPage), own);
    EXPECT_EQ(test->stats().store.chunks_verified, checked);
}

TEST(Stage, WhatLiesBeyondTheEndIsLeftOut) {
    TestPool test;
    import_image(*test, "image", random_bytes(10 * kPage + 100, 1));
    const auto reader = must(test->open_reader("image"));
    const std::vector<PageRange> ranges{{.page = 8, .pages = 1000},
                                        {.page = 5000, .pages = 1},
                                        {.page = nova::kMaxPages - 1, .pages = 1}};
    const StageReport report = must(stage(*reader, ranges, {}));
    EXPECT_EQ(report.wanted_bytes, 3 * kPage);
    EXPECT_EQ(report.staged_bytes, 3 * kPage);
}

TEST(Stage, AllIsEverythingThatIsNoHole) {
    TestPool test;
    const std::vector<std::byte> content = content_of(5000, 3);
    import_image(*test, "image", content);
    test.reopen();
    const auto reader = must(test->open_reader("image"));
    uint64_t told = 0;
    const StageReport report =
        must(stage_all(*reader, {.progress = [&](uint64_t done) { told = done; }}));
    EXPECT_EQ(report.staged_bytes, (5000 - (5000 + 6) / 7) * kPage);
    EXPECT_EQ(told, report.staged_bytes) << "ranges of data have no holes";
}

TEST(Stage, StopsWhenItIsAskedToAndWhenMemoryIsShort) {
    TestPool test;
    import_image(*test, "image", random_bytes(3 * kPlanPages * kPage, 1));
    const auto reader = must(test->open_reader("image"));
    const PageRange whole{.page = 0, .pages = 3 * kPlanPages};
    int asked = 0;
    EXPECT_EQ(
        code_of(stage(*reader, std::span(&whole, 1), {.cancelled = [&] { return ++asked == 3; }})),
        ErrorCode::kCancelled);
    uint64_t plans = 0;
    const StageReport report = must(stage(*reader, std::span(&whole, 1), {.available_bytes = [&] {
        return ++plans == 2 ? kMinAvailableBytes - 1 : uint64_t{0};
    }}));
    EXPECT_TRUE(report.short_of_memory);
    EXPECT_EQ(report.staged_bytes, kPlanPages * kPage);
    EXPECT_EQ(plans, 2U);
}

TEST(Stage, GuestsThatWaitGoFirstForAMoment) {
    TestPool test;
    import_image(*test, "image", random_bytes(10 * kPage, 1));
    const auto reader = must(test->open_reader("image"));
    const PageRange range{.page = 0, .pages = 10};
    int asked = 0;
    const StageReport report =
        must(stage(*reader, std::span(&range, 1),
                   {.waiting_reads = [&]() -> uint32_t { return ++asked <= 3 ? 1 : 0; }}));
    EXPECT_GE(asked, 4);
    EXPECT_EQ(report.staged_bytes, 10 * kPage);
    // However long they go on waiting.
    must(stage(*reader, std::span(&range, 1), {.waiting_reads = [] { return 7U; }}));
}

TEST(Stage, WhatIsDamagedIsPassedOver) {
    TestPool test;
    const std::vector<std::byte> content = random_bytes(256 * kPage, 1);
    import_image(*test, "image", content);
    nebula::PageAddress address;
    {
        const auto reader = must(test->open_reader("image"));
        must(reader->locate(100, 1, [&](const StoredRun& run) { address = run.address; }));
    }
    test.close();
    test.machine().files().damage(
        fmt::format("{}/segments/{:07}.seg", TestPool::kDirectory, address.segment()),
        address.offset_bytes(), 1, 7);
    test.open();
    const auto reader = must(test->open_reader("image"));
    const PageRange whole{.page = 0, .pages = 256};
    const StageReport report = must(stage(*reader, std::span(&whole, 1), {}));
    EXPECT_GE(report.damaged_bytes, kPage);
    EXPECT_LE(report.damaged_bytes, 16 * kPage);
    EXPECT_EQ(report.staged_bytes + report.damaged_bytes, 256 * kPage);
}

TEST(Stage, WhatACollectionMovesIsFoundAgain) {
    TestPool test;
    import_image(*test, "other", random_bytes(512 * kPage, 5));
    import_image(*test, "image", random_bytes(64 * kPage, 1));
    must(test->clone("image", {"vm"}));
    {
        const auto device = must(test->attach("vm", {}));
        must(nova::testing::write(*device, 0, random_bytes(8 * kPage, 11)));
        must(nova::testing::flush(*device));
    }
    std::vector<StoredRun> before;
    const auto reader = must(test->open_reader("vm"));
    must(reader->locate(0, 64, [&](const StoredRun& run) { before.push_back(run); }));
    must(test->remove({"other"}));
    for (int i = 0; i < 4; ++i) {
        must(test->gc({}));
    }
    const PageRange range{.page = 0, .pages = 64};
    const StageReport report = must(stage(*reader, std::span(&range, 1), {}));
    EXPECT_EQ(report.staged_bytes, 64 * kPage);
    EXPECT_EQ(report.damaged_bytes, 0U);
    // An address from before is refused, or still good; never another content.
    std::vector<std::byte> buffer(16 * kPage);
    for (const StoredRun& run : before) {
        const MutableBytes into = MutableBytes(buffer).first(run.pages * kPage);
        if (const auto read = reader->stage(run.address, into); read) {
            std::vector<std::byte> expected(into.size());
            must(reader->read(run.page * kPage, expected));
            EXPECT_TRUE(std::ranges::equal(into, expected));
        } else {
            EXPECT_EQ(read.error().code(), ErrorCode::kStale);
        }
    }
}

}  // namespace
}  // namespace stellarium::boot
