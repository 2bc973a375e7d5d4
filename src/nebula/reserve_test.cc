// Room that is kept for what frees room: who gets it, and when it is there again.
#include "nebula/reserve.h"

#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/units.h"
#include "io/simulated.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

class ReserveTest : public ::testing::Test {
  protected:
    static constexpr uint64_t kDisk = 32 * kMiB;
    static constexpr uint64_t kKept = kDisk / kReserveShare;

    ReserveTest() : machine_(1) {
        machine_.files().set_space_limit(kDisk);
        reopen();
    }
    void reopen() {
        if (store_ != nullptr) {
            ASSERT_OK(store_->close());
            store_.reset();
        }
        auto opened =
            open_store(machine_.env(), "/pool",
                       {.segment_bytes = kMinSegmentBytes, .reserve_bytes = kReserveBytes});
        ASSERT_OK(opened);
        store_ = std::move(opened->store);
    }
    uint64_t free_bytes() { return machine_.files().space("/pool")->free_bytes; }
    Result<void> append(uint64_t number) {
        const Blob chunk = make_chunk(number, 16);
        WriteBatch batch;
        batch.add_chunk(chunk.id, chunk.bytes);
        if (auto appended = store_->append(batch); !appended) {
            return std::unexpected(appended.error());
        }
        return {};
    }
    void fill() {
        Result<void> last;
        while ((last = append(++number_))) {
            ASSERT_LT(number_, kDisk / kMaxChunkBytes);
        }
        ASSERT_EQ(last.error().code(), ErrorCode::kNoSpace) << last.error().message();
    }
    Result<uint64_t> append_record() {
        WriteBatch batch;
        batch.add_record(1, bytes_of(std::string_view("a removal")));
        STELLARIUM_ASSIGN(const Appended appended, store_->append(batch));
        return appended.sequence;
    }
    /// Somebody else takes what is free.
    void take_the_rest() {
        auto file = machine_.files().open("/other", io::OpenMode::kCreate);
        ASSERT_OK(file);
        ASSERT_OK((*file)->allocate(0, free_bytes()));
        ASSERT_EQ(free_bytes(), 0U);
    }

    io::SimulatedMachine machine_;
    std::unique_ptr<Store> store_;
    uint64_t number_ = 0;
};

TEST_F(ReserveTest, IsForWhatFreesRoomAlone) {
    EXPECT_EQ(store_->stats().reserve_bytes, kKept);
    fill();
    EXPECT_EQ(store_->stats().reserve_bytes, kKept);
    EXPECT_TRUE(store_->stats().disk_full);
    EXPECT_GE(store_->stats().full_appends, 1U);
    take_the_rest();
    EXPECT_EQ(append_record().error().code(), ErrorCode::kNoSpace);
    {
        const ReserveScope scope;
        const auto sequence = append_record();
        ASSERT_OK(sequence);
        ASSERT_OK(store_->sync(*sequence));
    }
    EXPECT_EQ(store_->stats().reserve_bytes, 0U);
    EXPECT_GT(free_bytes(), kKept / 2);
    EXPECT_TRUE(store_->stats().disk_full) << "for all others it is";
    // What is free now is for nobody else.
    for (int i = 0; i < 3; ++i) {
        const auto refused = append(++number_);
        ASSERT_FALSE(refused);
        EXPECT_EQ(refused.error().code(), ErrorCode::kNoSpace);
        EXPECT_NE(refused.error().message().find("removing"), std::string::npos);
    }
    const ReserveScope scope;
    EXPECT_OK(append_record());
    EXPECT_EQ(store_->read_only_reason(), std::nullopt);
}

TEST_F(ReserveTest, IsThereAgainWhenThereIsRoom) {
    fill();
    take_the_rest();
    {
        const ReserveScope scope;
        ASSERT_OK(append_record());
    }
    ASSERT_EQ(store_->stats().reserve_bytes, 0U);
    reopen();
    EXPECT_EQ(store_->stats().reserve_bytes, 0U) << "there is no room";
    ASSERT_OK(machine_.files().remove("/other"));
    machine_.files().set_space_limit(2 * kDisk);
    ASSERT_OK(append(++number_));
    EXPECT_EQ(store_->stats().reserve_bytes, 2 * kKept);
    EXPECT_FALSE(store_->stats().disk_full);
    // The file outlives the process, and is taken over.
    const uint64_t left = free_bytes();
    machine_.kill_process();
    store_.reset();
    reopen();
    EXPECT_EQ(store_->stats().reserve_bytes, 2 * kKept);
    EXPECT_EQ(free_bytes(), left);
}

TEST_F(ReserveTest, IsKeptWhenAFullDiskGrowsALittle) {
    // More is wanted of the larger disk, and there is no room for more.
    constexpr uint64_t kLeft = 100 * kKiB;
    ASSERT_OK(store_->close());
    store_.reset();
    machine_.files().set_space_limit(2 * kDisk);
    const auto other = machine_.files().open("/other", io::OpenMode::kCreate);
    ASSERT_OK(other);
    ASSERT_OK((*other)->allocate(0, free_bytes() - kLeft));
    reopen();
    EXPECT_EQ(store_->stats().reserve_bytes, kKept);
    EXPECT_GT(free_bytes(), kLeft - 16 * kKiB);
}

TEST_F(ReserveTest, TheMapOfTheDeadHasRoomOnAFullDisk) {
    std::vector<ChunkId> kept;
    fill();
    take_the_rest();
    // Nothing is marked, so that all goes.
    auto collection = store_->begin_collection();
    ASSERT_OK(collection);
    {
        const ReserveScope scope;
        ASSERT_OK(append_record());
        ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    }
    ASSERT_OK((*collection)->fix_position());
    const auto report = (*collection)->sweep({});
    ASSERT_OK(report);
    EXPECT_GT(report->freed_bytes, kDisk / 2);
    collection->reset();
    EXPECT_EQ(store_->stats().reserve_bytes, kKept);
    EXPECT_OK(append(++number_));
    EXPECT_FALSE(store_->stats().disk_full);
}

TEST_F(ReserveTest, WithoutOneNothingIsKept) {
    ASSERT_OK(store_->close());
    store_.reset();
    auto opened = open_store(machine_.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
    ASSERT_OK(opened);
    store_ = std::move(opened->store);
    EXPECT_EQ(store_->stats().reserve_bytes, 0U);
    ASSERT_OK(machine_.files().remove("/pool/reserve"));
    fill();
    EXPECT_LT(free_bytes(), kMaxChunkBytes + 64 * kKiB);
}

}  // namespace
}  // namespace stellarium::nebula
