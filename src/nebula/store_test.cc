// The store on the simulated machine: what goes in comes out, once, also after reopening.
#include "nebula/store.h"

#include <gtest/gtest.h>

#include "io/simulated.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

class StoreTest : public ::testing::Test {
  protected:
    OpenStore open(const StoreOptions& options = {}) {
        auto opened = open_store(machine_.env(), "/pool", options);
        EXPECT_OK(opened);
        return opened ? std::move(*opened) : OpenStore{};
    }

    io::SimulatedMachine machine_{1};
};

TEST_F(StoreTest, ChunksObjectsAndRecordsComeBack) {
    const Blob chunk = make_chunk(1, 3);
    const Blob small = make_blob(2, 100);
    const Blob large = make_blob(3, 50000);
    const ByteVector hints = make_bytes(4, 40);
    {
        const OpenStore opened = open();
        WriteBatch batch;
        EXPECT_EQ(batch.add_chunk(chunk.id, chunk.bytes), 0U);
        EXPECT_EQ(batch.add_chunk(chunk.id, chunk.bytes), 1U);
        batch.add_object(small.id, small.bytes, hints);
        batch.add_object(large.id, large.bytes);
        batch.add_record(7, bytes_of(std::string_view("hello")));
        const auto appended = opened.store->append(batch);
        ASSERT_OK(appended);
        EXPECT_EQ(appended->sequence, 1U);
        ASSERT_EQ(appended->locations.size(), 2U);
        EXPECT_EQ(appended->locations[0].address, appended->locations[1].address);
        EXPECT_EQ(appended->new_bytes, 3 * kPageBytes + 100 + 50000);
        EXPECT_EQ(appended->duplicate_bytes, 3 * kPageBytes);
        ASSERT_OK(opened.store->sync(1));
        ASSERT_OK(opened.store->close());
    }
    const OpenStore opened = open();
    EXPECT_EQ(opened.store->sequence(), 1U);
    ASSERT_EQ(opened.replay.records.size(), 1U);
    EXPECT_EQ(opened.replay.records[0].kind, 7U);
    EXPECT_EQ(opened.replay.records[0].payload, "hello");
    const auto read = read_chunk(*opened.store, chunk.id);
    ASSERT_OK(read);
    EXPECT_EQ(*read, chunk.bytes);
    const auto small_object = opened.store->get_object(small.id);
    ASSERT_OK(small_object);
    EXPECT_EQ(small_object->content, small.bytes);
    EXPECT_EQ(small_object->aux, hints);
    const auto large_object = opened.store->get_object(large.id);
    ASSERT_OK(large_object);
    EXPECT_EQ(large_object->content, large.bytes);
    EXPECT_TRUE(large_object->aux.empty());
    EXPECT_TRUE(opened.store->warnings().empty());
}

TEST_F(StoreTest, CheckpointShortensReplay) {
    const Blob chunk = make_chunk(1, 3);
    {
        const OpenStore opened = open();
        for (uint64_t i = 1; i <= 3; ++i) {
            WriteBatch batch;
            const Blob other = make_chunk(100 + i, 1);
            batch.add_chunk(chunk.id, chunk.bytes);
            batch.add_chunk(other.id, other.bytes);
            batch.add_record(static_cast<uint16_t>(i), {});
            ASSERT_OK(opened.store->append(batch));
        }
        ASSERT_OK(opened.store->checkpoint(2, bytes_of(std::string_view("state 2"))));
        ASSERT_OK(opened.store->close());
    }
    auto reopened = Store::open(machine_.env(), "/pool", {});
    ASSERT_OK(reopened);
    EXPECT_EQ(text_of((*reopened)->checkpoint_payload()), "state 2");
    RecordedReplay replay;
    ASSERT_OK((*reopened)->replay(replay));
    ASSERT_EQ(replay.records.size(), 1U);
    EXPECT_EQ(replay.records[0].sequence, 3U);
    EXPECT_EQ((*reopened)->stats().chunks, 4U);
    EXPECT_OK(read_chunk(**reopened, chunk.id));
    EXPECT_TRUE((*reopened)->warnings().empty());
}

}  // namespace
}  // namespace stellarium::nebula
