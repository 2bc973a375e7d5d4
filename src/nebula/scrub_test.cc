// Scrub: finds what rots, wherever it is; what is found is remembered, and heals.
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/simulated.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

class ScrubTest : public ::testing::Test {
  protected:
    ScrubTest() : machine_(1) { reopen(); }

    void reopen() {
        if (store_ != nullptr) {
            ASSERT_OK(store_->close());
            store_.reset();
        }
        auto opened = open_store(machine_.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
        ASSERT_OK(opened);
        store_ = std::move(opened->store);
    }

    /// Several segments of chunks, packed objects and objects alone.
    void fill() {
        for (uint64_t i = 0; store_->stats().segments < 3; ++i) {
            WriteBatch batch;
            chunks_.push_back(make_chunk(i, static_cast<uint32_t>(1 + i % 5)));
            batch.add_chunk(chunks_.back().id, chunks_.back().bytes);
            for (uint64_t k = 0; k < 4; ++k) {
                objects_.push_back(make_blob(1000 + 10 * i + k, i % 4 == 3 ? 35000 : 2000 + i));
                batch.add_object(objects_.back().id, objects_.back().bytes);
            }
            ASSERT_OK(store_->append(batch));
        }
        ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    }

    /// Goes through all of it in steps of so many bytes.
    std::vector<DamagedChunk> scrub(uint64_t budget_bytes) {
        std::vector<DamagedChunk> found;
        ScrubStep step;
        total_ = {};
        do {
            const auto done = store_->scrub(step.next, budget_bytes,
                                            [&](const DamagedChunk& bad) { found.push_back(bad); });
            EXPECT_OK(done);
            if (!done) {
                return found;
            }
            EXPECT_TRUE(!done->next || done->next > step.next);
            step = *done;
            total_.bytes += step.bytes;
            total_.entries += step.entries;
            total_.damaged += step.damaged;
        } while (step.next);
        EXPECT_EQ(total_.damaged, found.size());
        return found;
    }

    void damage(PageAddress address, uint64_t offset = 0) {
        machine_.files().damage(
            "/pool/segments/000000" + std::to_string(address.segment()) + ".seg",
            address.offset_bytes() + offset, 1, 1);
    }

    io::SimulatedMachine machine_;
    std::unique_ptr<Store> store_;
    std::vector<Blob> chunks_;
    std::vector<Blob> objects_;
    ScrubStep total_;
};

TEST_F(ScrubTest, ChecksEverythingOnceWhateverTheSteps) {
    fill();
    for (const uint64_t budget : {uint64_t{1}, uint64_t{50000}, uint64_t{1} << 30}) {
        EXPECT_TRUE(scrub(budget).empty());
        EXPECT_EQ(total_.entries, chunks_.size() + objects_.size()) << budget;
        EXPECT_GE(total_.bytes, store_->stats().unique_bytes);
        EXPECT_LE(total_.bytes, store_->stats().stored_bytes);
    }
    EXPECT_EQ(store_->stats().damaged_chunks, 0U);
}

TEST_F(ScrubTest, RotIsFoundRememberedAndHealsWhenTheContentComesAgain) {
    fill();
    const Blob& chunk = chunks_[3];
    const Blob& object = objects_[5];
    const PageAddress chunk_address = store_->resolve(chunk.id)->address;
    const PageAddress object_address = store_->object_address(object.id).value();
    // Read before, so that nobody checks them again by himself.
    ASSERT_OK(read_chunk(*store_, chunk.id));
    damage(chunk_address, 100);
    // The end of an object in a pack: its last page, wherever it begins in the first.
    damage(PageAddress::make(object_address.segment(), object_address.page()), 4000);
    const std::vector<DamagedChunk> found = scrub(100000);
    std::set<ChunkId> ids;
    for (const DamagedChunk& bad : found) {
        ids.insert(bad.id);
        EXPECT_NE(bad.reason.find(bad.id.hex()), std::string::npos);
        EXPECT_NE(bad.reason.find(".seg at offset"), std::string::npos) << bad.reason;
    }
    EXPECT_EQ(found.size(), 2U) << "no neighbour suffers";
    EXPECT_TRUE(ids.contains(chunk.id));
    const auto check_damaged = [&] {
        EXPECT_EQ(store_->stats().damaged_chunks, 2U);
        EXPECT_EQ(store_->damaged()->size(), 2U);
        bool stored = true;
        EXPECT_OK(store_->contains(std::span(&chunk.id, 1), std::span(&stored, 1)));
        EXPECT_FALSE(stored) << "nothing is deduplicated against it";
        EXPECT_EQ(read_chunk(*store_, chunk.id).error().code(), ErrorCode::kCorrupt);
    };
    check_damaged();
    ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    reopen();
    check_damaged();
    EXPECT_EQ(store_->read_only_reason(), std::nullopt);

    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    const auto appended = store_->append(batch);
    ASSERT_OK(appended);
    EXPECT_EQ(appended->new_bytes, chunk.bytes.size());
    const auto check_healed = [&] {
        EXPECT_NE(store_->resolve(chunk.id, chunk_address)->address, chunk_address);
        EXPECT_EQ(read_chunk(*store_, chunk.id).value(), chunk.bytes);
        ByteVector page(kPageBytes);
        const iovec into{page.data(), page.size()};
        EXPECT_EQ(
            store_->read(chunk_address, std::span(&into, 1), IoMode::kMayBlock).error().code(),
            ErrorCode::kStale)
            << "look again, there is a better one";
        EXPECT_EQ(store_->damaged()->size(), 1U);
    };
    check_healed();
    EXPECT_EQ(scrub(1 << 20).size(), 1U) << "the copy that nobody needs is passed over";
    ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    reopen();
    check_healed();
    EXPECT_EQ(scrub(1 << 20).size(), 1U);
}

TEST_F(ScrubTest, WhatAReadFindsIsRememberedToo) {
    fill();
    ASSERT_OK(store_->close());
    store_.reset();
    auto opened = open_store(machine_.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
    ASSERT_OK(opened);
    store_ = std::move(opened->store);
    const Blob& chunk = chunks_[0];
    damage(store_->resolve(chunk.id)->address);
    EXPECT_EQ(read_chunk(*store_, chunk.id).error().code(), ErrorCode::kCorrupt);
    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    ASSERT_OK(store_->append(batch));
    EXPECT_EQ(read_chunk(*store_, chunk.id).value(), chunk.bytes);
}

TEST_F(ScrubTest, UnreadableSectorsAreDamage) {
    fill();
    const uint64_t all = chunks_.size() + objects_.size();
    machine_.files().inject({.kind = io::OperationKind::kRead,
                             .path_part = "0000001.seg",
                             .nth = 3,
                             .for_ever = true,
                             .errno_value = EIO});
    const std::vector<DamagedChunk> found = scrub(1 << 20);
    EXPECT_EQ(total_.entries, all) << "it goes on behind them";
    EXPECT_GT(found.size(), 1U);
    EXPECT_LT(found.size(), all);
    for (const DamagedChunk& bad : found) {
        EXPECT_EQ(bad.address.segment(), 1U);
    }
}

}  // namespace
}  // namespace stellarium::nebula
