// The store on the simulated machine: what goes in comes out, once, also after reopening.
#include "nebula/store.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <thread>

#include <fmt/format.h>
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

TEST_F(StoreTest, DuplicatesAloneWriteNothing) {
    const Blob chunk = make_chunk(1, 2);
    const Blob object = make_blob(2, 700);
    const OpenStore opened = open();
    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    batch.add_object(object.id, object.bytes);
    const auto first = opened.store->append(batch);
    ASSERT_OK(first);
    const StoreStats before = opened.store->stats();
    const auto second = opened.store->append(batch);
    ASSERT_OK(second);
    EXPECT_EQ(second->sequence, first->sequence);
    EXPECT_EQ(second->new_bytes, 0U);
    EXPECT_EQ(second->duplicate_bytes, chunk.bytes.size());
    EXPECT_EQ(second->locations[0].address, first->locations[0].address);
    const StoreStats after = opened.store->stats();
    EXPECT_EQ(after.appended_bytes, before.appended_bytes);
    EXPECT_EQ(after.chunks, 2U);
    EXPECT_EQ(after.duplicate_bytes, before.duplicate_bytes + chunk.bytes.size());
}

TEST_F(StoreTest, AnObjectAndAChunkOfTheSameContentAreOne) {
    const Blob chunk = make_chunk(1, 10);
    const OpenStore opened = open();
    {
        WriteBatch batch;
        batch.add_object(chunk.id, chunk.bytes);
        batch.add_chunk(chunk.id, chunk.bytes);
        ASSERT_OK(opened.store->append(batch));
        EXPECT_EQ(opened.store->stats().chunks, 1U);
    }
    const auto object = opened.store->get_object(chunk.id);
    ASSERT_OK(object);
    EXPECT_EQ(object->content, chunk.bytes);
    // A packed object does not start at a page, so as a chunk it has to be stored again.
    const Blob page = make_chunk(2, 1);
    const ByteVector hints = make_bytes(3, 10);
    WriteBatch packed;
    packed.add_object(page.id, page.bytes, hints);
    ASSERT_OK(opened.store->append(packed));
    EXPECT_EQ(opened.store->resolve(page.id).error().code(), ErrorCode::kNotFound);
    WriteBatch batch;
    batch.add_chunk(page.id, page.bytes);
    ASSERT_OK(opened.store->append(batch));
    const auto read = read_chunk(*opened.store, page.id);
    ASSERT_OK(read);
    EXPECT_EQ(*read, page.bytes);
}

TEST_F(StoreTest, LargeAppendsAreSplitWithTheRecordsLast) {
    const OpenStore opened = open();
    WriteBatch batch;
    std::vector<Blob> chunks;
    for (uint64_t i = 0; i < 200; ++i) {
        chunks.push_back(make_chunk(i, kMaxChunkPages));
    }
    for (const Blob& chunk : chunks) {
        batch.add_chunk(chunk.id, chunk.bytes);
    }
    batch.add_record(1, bytes_of(std::string_view("done")));
    const auto appended = opened.store->append(batch);
    ASSERT_OK(appended);
    EXPECT_EQ(appended->sequence, 2U) << "8 MiB of data a batch at most";
    ASSERT_EQ(appended->locations.size(), chunks.size());
    ASSERT_OK(opened.store->sync(appended->sequence));
    machine_.kill_process();
    const OpenStore reopened = open();
    ASSERT_EQ(reopened.replay.records.size(), 1U);
    EXPECT_EQ(reopened.replay.records[0].sequence, 2U);
    for (const Blob& chunk : chunks) {
        const auto read = read_chunk(*reopened.store, chunk.id);
        ASSERT_OK(read);
        ASSERT_EQ(*read, chunk.bytes);
    }
}

TEST_F(StoreTest, LimitsAreRefusedBeforeAnythingIsWritten) {
    const OpenStore opened = open();
    WriteBatch batch;
    const ByteVector half(kMaxRecordBytes / 2 - 8);
    batch.add_record(1, half);
    batch.add_record(1, half);
    EXPECT_OK(opened.store->append(batch));
    const uint64_t sequence = opened.store->sequence();
    batch.add_record(1, {});
    const auto refused = opened.store->append(batch);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kLimitExceeded);
    EXPECT_EQ(opened.store->sequence(), sequence);
    EXPECT_EQ(opened.store->checkpoint(0, make_bytes(1, kMaxCheckpointPayload + 1)).error().code(),
              ErrorCode::kLimitExceeded);
    EXPECT_EQ(opened.store->checkpoint(sequence + 1, {}).error().code(),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ(opened.store->sync(sequence + 1).error().code(), ErrorCode::kInvalidArgument);

    const StoreOptions too_small{.segment_bytes = kMinSegmentBytes - kPageBytes};
    EXPECT_EQ(Store::open(machine_.env(), "/pool", too_small).error().code(),
              ErrorCode::kInvalidArgument);
}

TEST_F(StoreTest, AnObjectOfEverySizeComesBack) {
    std::vector<Blob> objects;
    std::vector<ByteVector> hints;
    for (const size_t size :
         {size_t{0}, size_t{1}, size_t{4087}, size_t{4088}, size_t{4089}, size_t{4096},
          size_t{32767}, size_t{32768}, kMaxObjectBytes - 1000, kMaxObjectBytes}) {
        objects.push_back(make_blob(size, size));
        hints.push_back(make_bytes(size + 1, std::min<size_t>(kMaxObjectBytes - size, 1000)));
    }
    for (const bool with_hints : {true, false}) {
        const std::string directory = with_hints ? "/pool" : "/plain";
        for (const bool again : {false, true}) {
            auto opened = open_store(machine_.env(), directory);
            ASSERT_OK(opened);
            WriteBatch batch;
            for (size_t i = 0; i < objects.size() && !again; ++i) {
                batch.add_object(objects[i].id, objects[i].bytes,
                                 with_hints ? Bytes(hints[i]) : Bytes());
            }
            ASSERT_OK(opened->store->append(batch));
            for (size_t i = 0; i < objects.size(); ++i) {
                const auto hint = opened->store->object_address(objects[i].id);
                ASSERT_TRUE(hint);
                const auto object = opened->store->get_object(objects[i].id, hint);
                ASSERT_OK(object);
                EXPECT_EQ(object->content, objects[i].bytes) << objects[i].bytes.size();
                EXPECT_EQ(object->aux, with_hints ? hints[i] : ByteVector());
            }
        }
    }
}

TEST_F(StoreTest, ManyObjectsShareFewPages) {
    const OpenStore opened = open();
    WriteBatch batch;
    std::vector<Blob> objects;
    for (uint64_t i = 0; i < 1000; ++i) {
        objects.push_back(make_blob(i, 100));
    }
    for (const Blob& object : objects) {
        batch.add_object(object.id, object.bytes);
    }
    ASSERT_OK(opened.store->append(batch));
    EXPECT_EQ(opened.store->stats().chunks, 1000U);
    // 148 bytes each with their place in the pack: three packs, a header, the segment's header.
    EXPECT_LE(opened.store->stats().appended_bytes, 40 * kPageBytes);
    for (const Blob& object : objects) {
        const auto read = opened.store->get_object(object.id);
        ASSERT_OK(read);
        ASSERT_EQ(read->content, object.bytes);
    }
}

TEST_F(StoreTest, ContainsTellsStoredFromUnknown) {
    const OpenStore opened = open();
    const Blob stored = make_chunk(1, 1);
    const Blob unknown = make_chunk(2, 1);
    const Blob object = make_blob(3, 10);
    WriteBatch batch;
    batch.add_chunk(stored.id, stored.bytes);
    batch.add_object(object.id, object.bytes);
    ASSERT_OK(opened.store->append(batch));
    const std::vector<ChunkId> ids{stored.id, unknown.id, object.id, stored.id};
    std::array<bool, 4> found{};
    ASSERT_OK(opened.store->contains(ids, found));
    EXPECT_EQ(found, (std::array{true, false, true, true}));
    EXPECT_EQ(opened.store->resolve(unknown.id).error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(opened.store->get_object(unknown.id).error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(opened.store->object_address(unknown.id), std::nullopt);
}

TEST_F(StoreTest, ReadsRunAcrossChunksAndStartWithinThem) {
    std::vector<Blob> chunks;
    ByteVector all;
    PageAddress start;
    {
        const OpenStore opened = open();
        WriteBatch batch;
        for (uint64_t i = 0; i < 5; ++i) {
            chunks.push_back(make_chunk(i, static_cast<uint32_t>(1 + 3 * i)));
            all.insert(all.end(), chunks.back().bytes.begin(), chunks.back().bytes.end());
        }
        for (const Blob& chunk : chunks) {
            batch.add_chunk(chunk.id, chunk.bytes);
        }
        const auto appended = opened.store->append(batch);
        ASSERT_OK(appended);
        start = appended->locations[0].address;
        // So that opening has no reason to read the data.
        ASSERT_OK(opened.store->checkpoint(appended->sequence, {}));
        ASSERT_OK(opened.store->close());
    }
    const OpenStore opened = open();
    // Pages 3 to 12 lie in the second to the fourth chunk.
    ByteVector first(3 * kPageBytes);
    ByteVector second(7 * kPageBytes);
    const std::array<iovec, 2> into{iovec{first.data(), first.size()},
                                    iovec{second.data(), second.size()}};
    const auto address = PageAddress::make(start.segment(), start.page() + 3);
    const auto not_yet = opened.store->read(address, into, IoMode::kNoWait);
    ASSERT_FALSE(not_yet);
    EXPECT_EQ(not_yet.error().code(), ErrorCode::kWouldBlock) << "nothing is checked yet";
    ASSERT_OK(opened.store->read(address, into, IoMode::kMayBlock));
    EXPECT_TRUE(std::ranges::equal(first, Bytes(all).subspan(3 * kPageBytes, first.size())));
    EXPECT_TRUE(std::ranges::equal(second, Bytes(all).subspan(6 * kPageBytes, second.size())));
    EXPECT_EQ(opened.store->stats().chunks_verified, 3U);
    EXPECT_OK(opened.store->read(address, into, IoMode::kNoWait));
    EXPECT_EQ(opened.store->stats().chunks_verified, 3U) << "checked once";

    ByteVector page(kPageBytes);
    const iovec one{page.data(), page.size()};
    const auto header = opened.store->read(PageAddress::make(start.segment(), start.page() - 1),
                                           std::span(&one, 1), IoMode::kMayBlock);
    ASSERT_FALSE(header) << "no chunk lies there";
    EXPECT_EQ(header.error().code(), ErrorCode::kInvalidArgument);
    EXPECT_EQ(opened.store->read(PageAddress::make(99, 1), std::span(&one, 1), IoMode::kMayBlock)
                  .error()
                  .code(),
              ErrorCode::kStale)
        << "segments come and go";
}

TEST_F(StoreTest, HintsAreCheckedNotTrusted) {
    const OpenStore opened = open();
    const Blob first = make_chunk(1, 1);
    const Blob second = make_chunk(2, 1);
    WriteBatch batch;
    batch.add_chunk(first.id, first.bytes);
    batch.add_chunk(second.id, second.bytes);
    const auto appended = opened.store->append(batch);
    ASSERT_OK(appended);
    const PageAddress right = appended->locations[0].address;
    for (const PageAddress hint :
         {right, appended->locations[1].address, PageAddress::make(77, 3), PageAddress()}) {
        const auto resolved = opened.store->resolve(first.id, hint);
        ASSERT_OK(resolved);
        EXPECT_EQ(resolved->address, right);
        EXPECT_EQ(resolved->pages, 1U);
    }
}

/// Fills a store of small segments; used where several segments are needed.
struct ManySegments {
    static StoreOptions options() {
        return {.segment_bytes = kMinSegmentBytes, .index_rewrite_factor = 0};
    }
    std::vector<Blob> chunks;
    std::vector<Blob> objects;

    explicit ManySegments(Store& store, uint64_t batches = 40) {
        for (uint64_t i = 0; i < batches; ++i) {
            WriteBatch batch;
            chunks.push_back(make_chunk(100 + i, static_cast<uint32_t>(1 + i % kMaxChunkPages)));
            objects.push_back(make_blob(300 + i, 50 * i));
            batch.add_chunk(chunks.back().id, chunks.back().bytes);
            batch.add_object(objects.back().id, objects.back().bytes);
            batch.add_record(static_cast<uint16_t>(i), {});
            EXPECT_OK(store.append(batch));
        }
        EXPECT_OK(store.sync(store.sequence()));
    }

    void expect_all_in(Store& store) const {
        for (size_t i = 0; i < chunks.size(); ++i) {
            const auto read = read_chunk(store, chunks[i].id);
            ASSERT_OK(read);
            ASSERT_EQ(*read, chunks[i].bytes);
            const auto object = store.get_object(objects[i].id);
            ASSERT_OK(object);
            ASSERT_EQ(object->content, objects[i].bytes);
        }
    }
};

TEST_F(StoreTest, SegmentsRollOverAndCountersSurvive) {
    const StoreOptions options = ManySegments::options();
    StoreStats before;
    std::optional<ManySegments> content;
    {
        const OpenStore opened = open(options);
        content.emplace(*opened.store);
        content->expect_all_in(*opened.store);
        before = opened.store->stats();
        EXPECT_GT(before.segments, 5U);
        ASSERT_OK(opened.store->close());
    }
    for (const uint64_t checkpoint_at : {uint64_t{0}, uint64_t{7}, uint64_t{23}, uint64_t{40}}) {
        const OpenStore opened = open(options);
        const StoreStats after = opened.store->stats();
        EXPECT_EQ(after.chunks, before.chunks);
        EXPECT_EQ(after.unique_bytes, before.unique_bytes);
        EXPECT_EQ(after.stored_bytes, before.stored_bytes);
        EXPECT_EQ(after.appended_bytes, before.appended_bytes);
        EXPECT_EQ(after.segments, before.segments);
        EXPECT_EQ(after.sequence, before.sequence);
        EXPECT_EQ(after.durable_sequence, before.sequence);
        content->expect_all_in(*opened.store);
        EXPECT_EQ(opened.store->stats().index_misses_recovered, 0U);
        EXPECT_TRUE(opened.store->warnings().empty()) << opened.store->warnings().front();
        ASSERT_OK(opened.store->checkpoint(checkpoint_at, {}));
        ASSERT_OK(opened.store->close());
    }
    const OpenStore opened = open(options);
    EXPECT_TRUE(opened.replay.records.empty());
    EXPECT_EQ(opened.store->bytes_since_checkpoint(), 0U);
    content->expect_all_in(*opened.store);
}

TEST_F(StoreTest, StoredBytesAreWhatTheFilesHold) {
    const OpenStore opened = open(ManySegments::options());
    const ManySegments content(*opened.store);
    uint64_t bytes = 0;
    const auto entries = machine_.files().list("/pool/segments");
    ASSERT_OK(entries);
    for (const io::DirectoryEntry& entry : *entries) {
        const auto file =
            machine_.files().open("/pool/segments/" + entry.name, io::OpenMode::kReadOnly);
        ASSERT_OK(file);
        bytes += (*file)->size_bytes().value_or(0);
    }
    EXPECT_EQ(opened.store->stats().stored_bytes, bytes);
}

TEST_F(StoreTest, ASecondOpenerIsToldWhoHoldsTheStore) {
    machine_.files().set_process_id(4711);
    const OpenStore opened = open();
    const auto second = Store::open(machine_.env(), "/pool", {});
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code(), ErrorCode::kBusy);
    EXPECT_NE(second.error().message().find("4711"), std::string::npos) << second.error().message();
    ASSERT_OK(opened.store->close());
    EXPECT_OK(Store::open(machine_.env(), "/pool", {}));
    EXPECT_EQ(opened.store->sync(0).error().code(), ErrorCode::kUnavailable);
    EXPECT_EQ(opened.store->resolve(ChunkId{}).error().code(), ErrorCode::kUnavailable);
}

TEST_F(StoreTest, ReadOnlyLooksBesideAWriterAndChangesNothing) {
    const OpenStore writer = open();
    const Blob chunk = make_chunk(1, 2);
    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    batch.add_record(1, {});
    ASSERT_OK(writer.store->append(batch));
    const uint64_t before = machine_.files().counts().mutating;
    const OpenStore reader = open({.read_only = true});
    EXPECT_EQ(machine_.files().counts().mutating, before);
    EXPECT_TRUE(reader.store->read_only_reason());
    EXPECT_EQ(reader.replay.records.size(), 1U);
    EXPECT_OK(read_chunk(*reader.store, chunk.id));
    const auto refused = reader.store->append(batch);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kReadOnly);
    EXPECT_EQ(reader.store->checkpoint(1, {}).error().code(), ErrorCode::kReadOnly);
    ASSERT_OK(reader.store->close());
    EXPECT_EQ(machine_.files().counts().mutating, before);
}

TEST_F(StoreTest, CreateRefusesWhatIsNotEmpty) {
    const io::Env env = machine_.env();
    ASSERT_OK(Store::create(env, "/pool", {}));
    const auto again = Store::create(env, "/pool", {});
    ASSERT_FALSE(again);
    EXPECT_EQ(again.error().code(), ErrorCode::kAlreadyExists);
    machine_.files().make_directories("/pictures/photos");
    const auto pictures = Store::create(env, "/pictures", {});
    ASSERT_FALSE(pictures);
    EXPECT_EQ(pictures.error().code(), ErrorCode::kAlreadyExists);
    EXPECT_NE(pictures.error().message().find("photos"), std::string::npos);
    EXPECT_FALSE(Store::create(env, "/no/such/parent", {}));
    const auto missing = Store::open(env, "/pictures", {});
    ASSERT_FALSE(missing);
    EXPECT_EQ(missing.error().code(), ErrorCode::kNotFound);
    EXPECT_NE(missing.error().message().find("stellarctl init"), std::string::npos);
}

TEST_F(StoreTest, CreationIsWholeOrCanBeRepeated) {
    // Power fails at each operation in turn until one creation gets through.
    for (uint64_t nth = 1;; ++nth) {
        io::SimulatedMachine machine(nth);
        machine.files().halt_at_mutation(nth);
        const bool created = Store::create(machine.env(), "/pool", {}).has_value();
        machine.crash(nth);
        if (!created) {
            const auto opened = Store::open(machine.env(), "/pool", {});
            if (opened) {
                continue;
            }
            ASSERT_EQ(opened.error().code(), ErrorCode::kNotFound) << opened.error().message();
            ASSERT_OK(Store::create(machine.env(), "/pool", {})) << "after operation " << nth;
        }
        ASSERT_OK(Store::open(machine.env(), "/pool", {}));
        if (created) {
            EXPECT_GT(nth, 8U);
            break;
        }
    }
}

TEST_F(StoreTest, FileSystemsThatForgetAreRefusedOrWarnedAbout) {
    io::SimulatedFileSystem& files = machine_.files();
    files.mount("/net", {io::FileSystemKind::kNetwork, "nfs"});
    files.mount("/mem", {io::FileSystemKind::kMemory, "tmpfs"});
    files.mount("/container", {io::FileSystemKind::kOverlay, "overlayfs"});
    files.mount("/strange", {io::FileSystemKind::kUnknown, "0x1234"});
    const auto refused = Store::create(machine_.env(), "/net/pool", {});
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kUnsupported);
    EXPECT_NE(refused.error().message().find("nfs"), std::string::npos);
    const StoreOptions unsafe{.allow_unsafe_file_system = true};
    ASSERT_OK(Store::create(machine_.env(), "/net/pool2", unsafe));
    EXPECT_EQ(Store::open(machine_.env(), "/net/pool2", {}).error().code(),
              ErrorCode::kUnsupported);
    for (const std::string root : {"/net/pool2", "/mem/pool", "/container/pool", "/strange/pool"}) {
        const auto opened = open_store(machine_.env(), root, unsafe);
        ASSERT_OK(opened);
        EXPECT_EQ(opened->store->warnings().size(), 1U);
    }
}

TEST_F(StoreTest, AFullDiskLeavesAStoreThatWorks) {
    machine_.files().set_space_limit(uint64_t{4} << 20);
    const OpenStore opened = open({.segment_bytes = uint64_t{1} << 20});
    std::vector<Blob> stored;
    uint64_t failures = 0;
    for (uint64_t i = 0; failures < 20; ++i) {
        const Blob chunk = make_chunk(i, kMaxChunkPages);
        WriteBatch batch;
        batch.add_chunk(chunk.id, chunk.bytes);
        batch.add_record(1, bytes_of(i));
        const auto appended = opened.store->append(batch);
        if (appended) {
            stored.push_back(chunk);
            continue;
        }
        ++failures;
        ASSERT_EQ(appended.error().code(), ErrorCode::kNoSpace) << appended.error().message();
        EXPECT_FALSE(opened.store->read_only_reason());
    }
    ASSERT_GT(stored.size(), 30U);
    EXPECT_OK(opened.store->sync(opened.store->sequence()));
    EXPECT_OK(opened.store->checkpoint(0, bytes_of(std::string_view("full"))))
        << "a full disk must not stop a checkpoint";
    for (const Blob& chunk : stored) {
        EXPECT_OK(read_chunk(*opened.store, chunk.id));
    }
    machine_.files().set_space_limit(uint64_t{64} << 20);
    const Blob more = make_chunk(12345, kMaxChunkPages);
    WriteBatch batch;
    batch.add_chunk(more.id, more.bytes);
    ASSERT_OK(opened.store->append(batch));
    ASSERT_OK(opened.store->close());
    const OpenStore reopened = open({.segment_bytes = uint64_t{1} << 20});
    EXPECT_EQ(reopened.replay.records.size(), stored.size());
    EXPECT_OK(read_chunk(*reopened.store, more.id));
    EXPECT_TRUE(reopened.store->warnings().empty()) << reopened.store->warnings().front();
}

/// An append that is half written at the end of segment 1 and fails, the next one, which takes its
/// number and needs segment 2, and one more, all synced: they are what is there after `death`.
template <typename Death>
void check_failed_append_at_a_segments_end(uint64_t seed, bool truncate_fails, Death&& death) {
    io::SimulatedMachine machine(seed);
    const StoreOptions options{.segment_bytes = kMinSegmentBytes};
    auto opened = open_store(machine.env(), "/pool", options);
    ASSERT_OK(opened);
    Store& store = *opened->store;
    const auto put = [&](uint64_t first, uint64_t chunks, std::string_view record) {
        WriteBatch batch;
        std::vector<Blob> blobs;
        for (uint64_t i = 0; i < chunks; ++i) {
            blobs.push_back(make_chunk(first + i, 8));
            batch.add_chunk(blobs.back().id, blobs.back().bytes);
        }
        batch.add_record(7, bytes_of(record));
        return store.append(batch);
    };
    const auto first = put(100, 5, "one");  // Most of segment 1.
    ASSERT_OK(first);
    ASSERT_OK(store.sync(first->sequence));
    io::Fault half;
    half.kind = io::OperationKind::kWrite;
    half.short_transfer = true;
    io::Fault full;
    full.kind = io::OperationKind::kWrite;
    full.errno_value = ENOSPC;
    full.nth = 2;
    machine.files().inject(half);
    machine.files().inject(full);
    if (truncate_fails) {
        io::Fault fault;
        fault.kind = io::OperationKind::kTruncate;
        fault.path_part = "0000001.seg";
        fault.for_ever = true;
        machine.files().inject(fault);
    }
    ASSERT_FALSE(put(200, 1, "failed"));
    auto second = put(300, 4, "two");
    if (truncate_fails) {
        ASSERT_FALSE(second) << "segment 1 is left only when nothing of the failure stays in it";
        EXPECT_TRUE(second.error().message().find("0000001.seg") != std::string::npos);
        EXPECT_FALSE(store.read_only_reason());
        machine.files().clear_faults();
        second = put(300, 4, "two");
    }
    ASSERT_OK(second);
    EXPECT_EQ(second->sequence, 2U);
    EXPECT_EQ(second->locations[0].address.segment(), 2U);
    ASSERT_OK(store.sync(second->sequence));
    const auto third = put(400, 1, "three");
    ASSERT_OK(third);
    ASSERT_OK(store.sync(third->sequence));

    io::SimulatedMachine after(death(machine.files()), seed);
    const auto again = open_store(after.env(), "/pool", options);
    ASSERT_OK(again);
    EXPECT_EQ(again->store->read_only_reason().value_or(""), "");
    std::string records;
    for (const auto& record : again->replay.records) {
        records += record.payload + " ";
    }
    EXPECT_EQ(records, "one two three ");
    for (const uint64_t chunk : {104U, 303U, 400U}) {
        EXPECT_OK(read_chunk(*again->store, make_chunk(chunk, 8).id));
    }
}

TEST_F(StoreTest, AnAppendThatFailedDoesNotReplaceTheOneThatTookItsNumber) {
    for (const bool truncate_fails : {false, true}) {
        for (uint64_t seed = 1; seed <= 100 && !HasFailure(); ++seed) {
            SCOPED_TRACE(fmt::format("seed {}, truncate fails: {}", seed, truncate_fails));
            check_failed_append_at_a_segments_end(
                seed, truncate_fails, [seed](auto& files) { return files.crashed_copy(seed); });
            check_failed_append_at_a_segments_end(seed, truncate_fails,
                                                  [](auto& files) { return files.fork(); });
        }
    }
}

TEST_F(StoreTest, TheNextSegmentSaysWhetherABatchWasGivenUp) {
    // What a writer of before this rule may have left: batch 2 in segment 1, never acknowledged,
    // and another batch 2 in segment 2.
    const StoreOptions options{.segment_bytes = kMinSegmentBytes};
    const auto put = [](Store& store, uint64_t first, uint64_t chunks, std::string_view record) {
        WriteBatch batch;
        std::vector<Blob> blobs;
        for (uint64_t i = 0; i < chunks; ++i) {
            blobs.push_back(make_chunk(first + i, 8));
            batch.add_chunk(blobs.back().id, blobs.back().bytes);
        }
        batch.add_record(7, bytes_of(record));
        EXPECT_OK(store.append(batch));
        EXPECT_OK(store.sync(store.sequence()));
    };
    OpenStore writer = open(options);
    put(*writer.store, 100, 5, "one");
    io::SimulatedMachine other(machine_.files().fork(), 2);
    put(*writer.store, 300, 4, "two");
    put(*writer.store, 400, 1, "three");
    ByteVector stale;
    {
        auto opened = open_store(other.env(), "/pool", options);
        ASSERT_OK(opened);
        put(*opened->store, 200, 1, "failed");
        const auto file = other.files().open("/pool/segments/0000001.seg", io::OpenMode::kReadOnly);
        ASSERT_OK(file);
        stale.resize((*file)->size_bytes().value_or(0));
        ASSERT_OK(io::read_exact(**file, stale, 0));
    }
    machine_.kill_process();
    {
        const auto file =
            machine_.files().open("/pool/segments/0000001.seg", io::OpenMode::kReadWrite);
        ASSERT_OK(file);
        ASSERT_OK((*file)->truncate(0));
        ASSERT_OK(io::write_all(**file, Bytes(stale), 0));
    }
    for (int opens = 0; opens < 2; ++opens) {
        const OpenStore found = open(options);
        EXPECT_EQ(found.store->read_only_reason().value_or(""), "");
        ASSERT_EQ(found.replay.records.size(), 3U);
        EXPECT_EQ(found.replay.records[1].payload, "two");
        EXPECT_OK(read_chunk(*found.store, make_chunk(303, 8).id));
        EXPECT_EQ(found.store->resolve(make_chunk(200, 8).id).error().code(), ErrorCode::kNotFound);
    }
}

TEST_F(StoreTest, AFailedSyncPoisonsTheStore) {
    const Blob first = make_chunk(1, 1);
    const Blob second = make_chunk(2, 1);
    const OpenStore opened = open();
    WriteBatch batch;
    batch.add_chunk(first.id, first.bytes);
    batch.add_record(1, {});
    ASSERT_OK(opened.store->append(batch));
    ASSERT_OK(opened.store->sync(1));
    WriteBatch lost;
    lost.add_chunk(second.id, second.bytes);
    lost.add_record(2, {});
    ASSERT_OK(opened.store->append(lost));
    io::Fault fault;
    fault.kind = io::OperationKind::kDatasync;
    fault.lose_unsynced = true;
    machine_.files().inject(fault);
    EXPECT_EQ(opened.store->sync(2).error().code(), ErrorCode::kIo);
    ASSERT_TRUE(opened.store->read_only_reason());
    EXPECT_NE(opened.store->read_only_reason()->find("0000001.seg"), std::string::npos);
    EXPECT_OK(opened.store->sync(1)) << "what was durable stays so";
    EXPECT_EQ(opened.store->sync(2).error().code(), ErrorCode::kReadOnly) << "no retry";
    EXPECT_EQ(opened.store->append(lost).error().code(), ErrorCode::kReadOnly);
    EXPECT_EQ(opened.store->checkpoint(1, {}).error().code(), ErrorCode::kReadOnly);
    EXPECT_OK(read_chunk(*opened.store, first.id));
    machine_.kill_process();
    const OpenStore reopened = open();
    EXPECT_FALSE(reopened.store->read_only_reason());
    EXPECT_EQ(reopened.replay.records.size(), 1U);
    EXPECT_OK(read_chunk(*reopened.store, first.id));
    EXPECT_EQ(reopened.store->resolve(second.id).error().code(), ErrorCode::kNotFound);
}

TEST_F(StoreTest, AGenerationThatTheDiskMayLackIsSyncedBeforeItIsTrusted) {
    {
        const OpenStore opened = open();
        WriteBatch batch;
        batch.add_record(1, {});
        ASSERT_OK(opened.store->append(batch));
        ASSERT_OK(opened.store->sync(1));
        io::Fault fault;
        fault.kind = io::OperationKind::kDatasync;
        fault.path_part = "superblock";
        machine_.files().inject(fault);
        EXPECT_FALSE(opened.store->checkpoint(1, bytes_of(std::string_view("unsynced"))));
        EXPECT_TRUE(opened.store->read_only_reason());
    }
    machine_.kill_process();
    std::string seen;
    {
        const OpenStore opened = open();
        seen = text_of(opened.store->checkpoint_payload());
    }
    machine_.files().crash(1, io::CrashStyle::kLoseAll);
    const OpenStore opened = open();
    EXPECT_EQ(text_of(opened.store->checkpoint_payload()), seen);
}

TEST_F(StoreTest, AFailedDirectorySyncPoisonsTheStore) {
    const OpenStore opened = open();
    WriteBatch batch;
    batch.add_record(1, {});
    ASSERT_OK(opened.store->append(batch));
    io::Fault fault;
    fault.kind = io::OperationKind::kSyncDirectory;
    machine_.files().inject(fault);
    EXPECT_FALSE(opened.store->sync(1));
    EXPECT_TRUE(opened.store->read_only_reason());
}

TEST_F(StoreTest, EveryOperationMayFailOnce) {
    // Fails the Nth operation of every kind, for N = 1, 2, 3 ..., until nothing fails any more:
    // what was acknowledged before or after must be there when the store is opened again.
    for (const int errno_value : {EIO, ENOSPC}) {
        for (uint64_t nth = 1;; ++nth) {
            SCOPED_TRACE(nth);
            io::SimulatedMachine machine(nth);
            const StoreOptions options{.segment_bytes = kMinSegmentBytes,
                                       .index_rewrite_factor = 0};
            ASSERT_OK(Store::create(machine.env(), "/pool", options));
            io::Fault fault;
            fault.nth = nth;
            fault.errno_value = errno_value;
            machine.files().inject(fault);
            std::vector<Blob> synced;
            size_t records = 0;
            if (auto opened = open_store(machine.env(), "/pool", options)) {
                for (uint64_t i = 0; i < 12; ++i) {
                    const Blob chunk = make_chunk(i, 12);
                    const Blob object = make_blob(50 + i, 300);
                    WriteBatch batch;
                    batch.add_chunk(chunk.id, chunk.bytes);
                    batch.add_object(object.id, object.bytes);
                    batch.add_record(1, {});
                    const auto appended = opened->store->append(batch);
                    if (appended && opened->store->sync(appended->sequence)) {
                        synced.push_back(chunk);
                        synced.push_back(object);
                        ++records;
                    }
                    if (i % 5 == 4) {
                        static_cast<void>(opened->store->checkpoint(0, {}));
                    }
                }
                static_cast<void>(opened->store->close());
            }
            const uint64_t fired = machine.files().faults_fired();
            machine.crash(nth);
            auto opened = open_store(machine.env(), "/pool", options);
            ASSERT_OK(opened);
            EXPECT_FALSE(opened->store->read_only_reason());
            EXPECT_GE(opened->replay.records.size(), records);
            for (const Blob& blob : synced) {
                const auto object = opened->store->get_object(blob.id);
                ASSERT_OK(object);
                ASSERT_EQ(object->content, blob.bytes);
            }
            if (fired == 0) {
                EXPECT_EQ(records, 12U);
                EXPECT_GT(nth, 60U);
                break;
            }
        }
    }
}

TEST_F(StoreTest, ReadersAndWritersTogether) {
    constexpr uint64_t kWriters = 3;
    constexpr uint64_t kAppends = 40;
    constexpr uint64_t kKinds = 50;
    std::vector<Blob> chunks;
    std::vector<Blob> objects;
    for (uint64_t i = 0; i < kKinds; ++i) {
        chunks.push_back(make_chunk(i, static_cast<uint32_t>(1 + i % 4)));
        objects.push_back(make_blob(1000 + i, 10 + 40 * i));
    }
    const OpenStore opened = open(ManySegments::options());
    Store& store = *opened.store;
    std::atomic<uint64_t> running = kWriters;
    std::vector<std::thread> threads;
    for (uint64_t writer = 0; writer < kWriters; ++writer) {
        threads.emplace_back([&, writer] {
            Sequence random(writer);
            for (uint64_t i = 0; i < kAppends; ++i) {
                WriteBatch batch;
                const uint64_t first = random.below(kKinds);
                for (uint64_t k = 0; k < 3; ++k) {
                    const Blob& chunk = chunks[(first + k) % kKinds];
                    batch.add_chunk(chunk.id, chunk.bytes);
                    const Blob& object = objects[(first + k) % kKinds];
                    batch.add_object(object.id, object.bytes);
                }
                batch.add_record(static_cast<uint16_t>(writer), bytes_of(i));
                const auto appended = store.append(batch);
                ASSERT_OK(appended);
                if (i % 3 == 0) {
                    ASSERT_OK(store.sync(appended->sequence));
                }
                for (uint64_t k = 0; k < 3; ++k) {
                    const Blob& chunk = chunks[(first + k) % kKinds];
                    ByteVector bytes(chunk.bytes.size());
                    const iovec into{bytes.data(), bytes.size()};
                    ASSERT_OK(store.read(appended->locations[k].address, std::span(&into, 1),
                                         IoMode::kMayBlock));
                    ASSERT_EQ(bytes, chunk.bytes);
                }
            }
            --running;
        });
    }
    threads.emplace_back([&] {
        while (running.load() > 0) {
            ASSERT_OK(store.checkpoint(0, {}));
            static_cast<void>(store.stats());
            static_cast<void>(store.warnings());
        }
    });
    threads.emplace_back([&] {
        Sequence random(99);
        while (running.load() > 0) {
            const uint64_t kind = random.below(kKinds);
            std::array<bool, 1> found{};
            ASSERT_OK(store.contains(std::span(&objects[kind].id, 1), found));
            if (found[0]) {
                const auto object = store.get_object(objects[kind].id);
                ASSERT_OK(object);
                ASSERT_EQ(object->content, objects[kind].bytes);
            }
        }
    });
    for (std::thread& thread : threads) {
        thread.join();
    }
    const StoreStats stats = store.stats();
    EXPECT_LE(stats.chunks, 2 * kKinds) << "concurrent duplicates were stored twice";
    ASSERT_OK(store.close());

    const OpenStore reopened = open(ManySegments::options());
    EXPECT_EQ(reopened.replay.records.size(), kWriters * kAppends);
    std::array<uint64_t, kWriters> next{};
    for (const RecordedReplay::Record& record : reopened.replay.records) {
        EXPECT_EQ(record.payload, text_of(bytes_of(next[record.kind]))) << "out of order";
        ++next[record.kind];
    }
    EXPECT_EQ(reopened.store->stats().chunks, stats.chunks);
}

}  // namespace
}  // namespace stellarium::nebula
