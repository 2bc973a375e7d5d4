// Garbage collection at the level of the store: what is kept, what goes, and what readers see.
#include "nebula/collection.h"

#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/simulated.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

/// A store with small segments on a simulated machine.
class CollectionTest : public ::testing::Test {
  protected:
    CollectionTest() : machine_(1) { reopen(); }

    void reopen() {
        if (store_ != nullptr) {
            ASSERT_OK(store_->close());
            store_.reset();
        }
        auto opened = open_store(machine_.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
        ASSERT_OK(opened);
        store_ = std::move(opened->store);
    }

    static void append_chunk(Store& store, const Blob& chunk) {
        WriteBatch batch;
        batch.add_chunk(chunk.id, chunk.bytes);
        ASSERT_OK(store.append(batch));
    }
    static void append_object(Store& store, const Blob& object) {
        WriteBatch batch;
        batch.add_object(object.id, object.bytes);
        ASSERT_OK(store.append(batch));
    }

    /// A collection that has its position: everything appended so far may go.
    std::unique_ptr<Collection> begin() {
        auto collection = store_->begin_collection();
        EXPECT_OK(collection);
        EXPECT_OK(store_->checkpoint(store_->sequence(), {}));
        EXPECT_OK((*collection)->fix_position());
        return std::move(*collection);
    }

    static CollectionReport dry_run(Collection& collection) {
        const auto report = collection.sweep({.dry_run = true});
        EXPECT_OK(report);
        return report.value_or(CollectionReport{});
    }

    io::SimulatedMachine machine_;
    std::unique_ptr<Store> store_;
};

TEST_F(CollectionTest, OneAtATimeAndOnlyWithAPosition) {
    auto first = store_->begin_collection();
    ASSERT_OK(first);
    EXPECT_EQ(store_->begin_collection().error().code(), ErrorCode::kBusy);
    EXPECT_EQ((*first)->mark_object(make_chunk(1, 1).id, {}).error().code(),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ((*first)->sweep({}).error().code(), ErrorCode::kInvalidArgument);
    first->reset();
    EXPECT_OK(store_->begin_collection());
}

TEST_F(CollectionTest, MarksKeepAndTheRestIsDead) {
    const Blob kept = make_chunk(1, 4);
    const Blob dead = make_chunk(2, 3);
    const Blob object = make_blob(3, 100);
    const Blob dead_object = make_blob(4, 200);
    append_chunk(*store_, kept);
    append_chunk(*store_, dead);
    append_object(*store_, object);
    append_object(*store_, dead_object);
    const auto collection = begin();
    EXPECT_EQ(collection->mark_pages(kept.id, {}, 0x3).value(), Collection::Mark::kNew);
    EXPECT_EQ(collection->mark_object(object.id, {}).value(), Collection::Mark::kNew);
    EXPECT_EQ(collection->mark_object(object.id, store_->object_address(object.id)).value(),
              Collection::Mark::kAgain);
    EXPECT_EQ(collection->mark_object(make_chunk(9, 1).id, {}).error().code(),
              ErrorCode::kNotFound);
    const CollectionReport report = dry_run(*collection);
    EXPECT_EQ(report.live_chunks, 2U);
    EXPECT_EQ(report.live_bytes, kept.bytes.size() + object.bytes.size());
    EXPECT_EQ(report.dead_chunks, 2U);
    EXPECT_EQ(report.dead_bytes, dead.bytes.size() + dead_object.bytes.size());
    // The chunk and its header; the pack and its header.
    EXPECT_EQ(report.freed_bytes, (3 + 1 + 1 + 1) * kPageBytes);
}

TEST_F(CollectionTest, SparseMeansLittleNeededByOneOnly) {
    const Blob chunk = make_chunk(1, 8);
    append_chunk(*store_, chunk);
    const auto sparse_after = [&](const std::vector<uint16_t>& marks, bool found_by_append) {
        const auto collection = begin();
        for (const uint16_t mask : marks) {
            EXPECT_OK(collection->mark_pages(chunk.id, {}, mask));
        }
        if (found_by_append) {
            append_chunk(*store_, chunk);
        }
        const auto sparse = collection->sparse(chunk.id, {});
        EXPECT_OK(sparse);
        return sparse && *sparse ? (*sparse)->live_pages : uint16_t{0};
    };
    EXPECT_EQ(sparse_after({0x15}, false), 0x15U);
    EXPECT_EQ(sparse_after({0x55}, false), 0U) << "half of it";
    EXPECT_EQ(sparse_after({0x01, 0x04}, false), 0U) << "two users";
    EXPECT_EQ(sparse_after({0x15}, true), 0U) << "a user that is on its way";
    EXPECT_EQ(sparse_after({}, false), 0U);
    const auto collection = begin();
    EXPECT_EQ(collection->mark_pages(chunk.id, {}, 0x100).error().code(), ErrorCode::kCorrupt);
}

TEST_F(CollectionTest, TheBarrierKeepsDuplicatesAndLeavesThemToBeVisited) {
    const Blob chunk = make_chunk(1, 2);
    const Blob object = make_blob(2, 50);
    const Blob lost = make_chunk(3, 2);
    append_chunk(*store_, chunk);
    append_object(*store_, object);
    append_chunk(*store_, lost);
    const auto collection = begin();
    append_chunk(*store_, chunk);
    append_object(*store_, object);
    EXPECT_EQ(collection->mark_object(object.id, {}).value(), Collection::Mark::kNew);
    EXPECT_FALSE(collection->is_shared(object.id, {}).value());
    const CollectionReport report = dry_run(*collection);
    EXPECT_EQ(report.live_chunks, 2U);
    EXPECT_EQ(report.dead_chunks, 1U);
}

TEST_F(CollectionTest, ProtectionsKeepWhatWentThroughThem) {
    const Blob old = make_chunk(1, 1);
    const Blob asked = make_chunk(2, 1);
    const Blob fresh = make_chunk(3, 1);
    const Blob lost = make_chunk(4, 1);
    append_chunk(*store_, old);
    append_chunk(*store_, asked);
    append_chunk(*store_, lost);
    auto handle = store_->protect();
    append_chunk(*handle, old);
    append_chunk(*handle, fresh);
    bool found = false;
    ASSERT_OK(handle->contains(std::span(&asked.id, 1), std::span(&found, 1)));
    EXPECT_TRUE(found);
    EXPECT_EQ(dry_run(*begin()).live_chunks, 3U);
    {
        // It ends while a collection runs: that one still honours it, the next one does not.
        const auto collection = begin();
        handle.reset();
        EXPECT_EQ(dry_run(*collection).live_chunks, 3U);
    }
    EXPECT_EQ(dry_run(*begin()).live_chunks, 0U);
}

}  // namespace
}  // namespace stellarium::nebula
