// Entries of a segment are found by their pages, however unevenly they lie.
#include "nebula/segment.h"

#include <algorithm>
#include <random>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "io/simulated.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

constexpr uint32_t kLastPage = 65535;

Entry entry_of(uint32_t page, uint32_t offset, uint64_t number) {
    Entry entry{};
    entry.id = hash(bytes_of(U64Le(number)));
    entry.page = static_cast<uint16_t>(page);
    entry.offset = static_cast<uint16_t>(offset);
    entry.length = static_cast<uint32_t>(offset == 0 ? kPageBytes : 100);
    entry.kind = static_cast<uint8_t>(offset == 0 ? EntryKind::kChunk : EntryKind::kObject);
    return entry;
}

/// Ascending pages: dense and sparse stretches, gaps, and pages with several entries.
std::vector<Entry> uneven_entries(std::mt19937_64& random) {
    std::vector<Entry> entries;
    const uint64_t most = random() % 4000;
    uint32_t page = 1 + static_cast<uint32_t>(random() % 100);
    uint64_t number = random();
    while (page < kLastPage && entries.size() < most) {
        const bool shared = random() % 8 == 0;
        for (uint32_t i = 0; i < (shared ? 1 + random() % 40 : 1); ++i) {
            entries.push_back(entry_of(page, i * 100, ++number));
        }
        const uint64_t stride = random() % 50 == 0 ? 1 + random() % 5000 : 1 + random() % 3;
        page += static_cast<uint32_t>(stride);
    }
    return entries;
}

TEST(SegmentSet, FindsEveryEntryAndNoOther) {
    const uint64_t seed = first_seed();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937_64 random(seed);
    for (int round = 0; round < 60; ++round) {
        const std::vector<Entry> entries = uneven_entries(random);
        io::SimulatedMachine machine(seed);
        SegmentSet segments(machine.files(), "store", StoreId{});
        Segment& segment = segments.add_in_memory(1, nullptr, entries);

        std::vector<SegmentSet::Sought> sought;
        for (const Entry& entry : entries) {
            sought.push_back({.page = entry.page.get(), .id = &entry.id});
        }
        std::vector<std::optional<LocatedEntry>> found(sought.size());
        for (const bool shuffled : {false, true}) {
            if (shuffled) {
                std::ranges::shuffle(sought, random);
            }
            ASSERT_TRUE(segments.entries_at(segment, sought, found));
            for (size_t i = 0; i < sought.size(); ++i) {
                ASSERT_TRUE(found[i]) << "page " << sought[i].page;
                EXPECT_EQ(found[i]->entry.id, *sought[i].id);
                EXPECT_EQ(entries[found[i]->ordinal].id, *sought[i].id);
            }
        }
        // The right id at every other page, and beyond both ends.
        for (uint32_t page = 0; page <= kLastPage && !entries.empty();
             page += 1 + static_cast<uint32_t>(random() % 97)) {
            const Entry& any = entries[random() % entries.size()];
            const auto at = segments.entry_at(segment, page, any.id);
            ASSERT_TRUE(at);
            EXPECT_EQ(at->has_value(), page == any.page.get()) << "page " << page;
        }
    }
}

}  // namespace
}  // namespace stellarium::nebula
