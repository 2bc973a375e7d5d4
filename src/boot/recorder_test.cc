#include "boot/recorder.h"

#include <algorithm>
#include <random>
#include <set>
#include <thread>

#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "io/simulated.h"

namespace stellarium::boot {
namespace {

constexpr uint64_t kPage = nova::kPageBytes;

std::vector<PageRange> runs_of(const Recorder& recorder) {
    return recorder.trace({}).runs;
}

TEST(Recorder, NotesFirstTouchesInTheirOrder) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 4096 * kPage);
    recorder.on_read(100 * kPage, 4 * kPage);
    recorder.on_read(104 * kPage, 2 * kPage);  // Goes on where the last one ended.
    recorder.on_read(0, kPage);
    recorder.on_read(98 * kPage, 10 * kPage);  // 98, 99, 106 and 107 are new.
    recorder.on_read(100 * kPage, 4 * kPage);  // Nothing is.
    EXPECT_EQ(runs_of(recorder), (std::vector<PageRange>{{.page = 100, .pages = 6},
                                                         {.page = 0, .pages = 1},
                                                         {.page = 98, .pages = 2},
                                                         {.page = 106, .pages = 2}}));
    EXPECT_EQ(recorder.progress().pages, 11U);
    EXPECT_EQ(recorder.progress().runs, 4U);
    EXPECT_FALSE(recorder.progress().cut);
    EXPECT_EQ(recorder.trace(std::chrono::nanoseconds(7)).recorded_ns, 7U);
}

TEST(Recorder, APartOfAPageIsThePage) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 4096 * kPage);
    recorder.on_read(5 * kPage + 512, 512);
    recorder.on_read(7 * kPage + 3584, 1024);  // The end of one, the start of the next.
    EXPECT_EQ(runs_of(recorder),
              (std::vector<PageRange>{{.page = 5, .pages = 1}, {.page = 7, .pages = 2}}));
}

TEST(Recorder, LeavesAreNoBorders) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 4096 * kPage);
    recorder.on_read(500 * kPage, 1000 * kPage);
    EXPECT_EQ(runs_of(recorder), (std::vector<PageRange>{{.page = 500, .pages = 1000}}));
}

TEST(Recorder, WhatLiesBeyondTheEndIsNotNoted) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 3 * kPage + 512);  // The last page is not whole.
    recorder.on_read(3 * kPage, 2 * kPage);
    recorder.on_read(4 * kPage, kPage);
    recorder.on_read(~uint64_t{0} - 511, 512);
    recorder.on_read(0, ~uint64_t{0});
    EXPECT_EQ(runs_of(recorder),
              (std::vector<PageRange>{{.page = 3, .pages = 1}, {.page = 0, .pages = 3}}));
    Recorder empty(clock, 0);
    empty.on_read(0, kPage);
    EXPECT_TRUE(runs_of(empty).empty());
}

TEST(Recorder, RunsAreBounded) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 1'000'000 * kPage);
    for (uint64_t i = 0; i < kMaxTraceRuns + 5; ++i) {
        EXPECT_EQ(recorder.progress().cut, i > kMaxTraceRuns) << i;
        recorder.on_read(i * 2 * kPage, kPage);
    }
    EXPECT_EQ(runs_of(recorder).size(), kMaxTraceRuns);
    EXPECT_TRUE(recorder.trace({}).cut);
}

TEST(Recorder, PagesAreBounded) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 4 * kMaxTracePages * kPage);
    recorder.on_read(kPage, (kMaxTracePages - 10) * kPage);
    EXPECT_FALSE(recorder.progress().cut);
    recorder.on_read(2 * kMaxTracePages * kPage, 11 * kPage);
    EXPECT_TRUE(recorder.progress().cut);
    EXPECT_EQ(recorder.progress().pages, kMaxTracePages);
    recorder.on_read(3 * kMaxTracePages * kPage, kPage);
    EXPECT_EQ(recorder.progress().pages, kMaxTracePages);
}

TEST(Recorder, TimeIsBounded) {
    io::SimulatedClock clock;
    Recorder recorder(clock, 100 * kPage, std::chrono::seconds(10));
    clock.advance(std::chrono::seconds(9));
    recorder.on_read(0, kPage);
    clock.advance(std::chrono::seconds(1));
    recorder.on_read(50 * kPage, kPage);
    EXPECT_EQ(recorder.progress().pages, 1U);
    EXPECT_TRUE(recorder.progress().cut);
}

/// Against a set of pages, with requests of every kind.
TEST(Recorder, AgreesWithASetOfPages) {
    for (uint64_t seed = first_seed(); seed < first_seed() + scaled(20, 5); ++seed) {
        SCOPED_TRACE(seed);
        std::mt19937_64 random(seed);
        io::SimulatedClock clock;
        const uint64_t pages = 600 + random() % 3000;
        Recorder recorder(clock, pages * kPage);
        std::set<uint64_t> touched;
        std::vector<uint64_t> order;
        for (int i = 0; i < 500; ++i) {
            const uint64_t offset = random() % (pages * kPage / 512) * 512;
            const uint64_t length = 512 * (1 + random() % (random() % 8 == 0 ? 8000 : 64));
            recorder.on_read(offset, length);
            const uint64_t end = std::min(pages, (offset + length + kPage - 1) / kPage);
            for (uint64_t page = offset / kPage; page < end; ++page) {
                if (touched.insert(page).second) {
                    order.push_back(page);
                }
            }
        }
        std::vector<uint64_t> recorded;
        for (const PageRange& run : runs_of(recorder)) {
            for (uint64_t i = 0; i < run.pages; ++i) {
                recorded.push_back(run.page + i);
            }
        }
        EXPECT_EQ(recorded, order);
    }
}

TEST(Recorder, TakesReadsOfManyThreads) {
    io::SimulatedClock clock;
    constexpr uint64_t kPages = 8192;
    Recorder recorder(clock, kPages * kPage);
    std::vector<std::thread> threads;
    for (uint64_t thread = 0; thread < 4; ++thread) {
        threads.emplace_back([&recorder, thread] {
            for (uint64_t page = 0; page < kPages; page += 8) {
                recorder.on_read((page + thread * kPages / 4) % kPages * kPage, 8 * kPage);
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    std::set<uint64_t> pages;
    for (const PageRange& run : runs_of(recorder)) {
        for (uint64_t i = 0; i < run.pages; ++i) {
            EXPECT_TRUE(pages.insert(run.page + i).second) << "page " << run.page + i << " twice";
        }
    }
    EXPECT_EQ(pages.size(), kPages);
}

}  // namespace
}  // namespace stellarium::boot
