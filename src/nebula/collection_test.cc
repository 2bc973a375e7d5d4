// Garbage collection at the level of the store: what is kept, what goes, and what readers see.
#include "nebula/collection.h"

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "io/simulated.h"
#include "nebula/dump.h"
#include "nebula/format.h"
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

    static CollectionReport sweep(Collection& collection, const SweepOptions& options = {}) {
        const auto report = collection.sweep(options);
        EXPECT_OK(report);
        return report.value_or(CollectionReport{});
    }
    /// Everything goes but these.
    CollectionReport keep_only(const std::vector<const Blob*>& chunks,
                               const std::vector<const Blob*>& objects = {},
                               const SweepOptions& options = {}) {
        const auto collection = begin();
        for (const Blob* chunk : chunks) {
            EXPECT_OK(collection->mark_pages(chunk->id, {}, 1));
        }
        for (const Blob* object : objects) {
            EXPECT_OK(collection->mark_object(object->id, {}));
        }
        return sweep(*collection, options);
    }
    ErrorCode read_code(PageAddress address) {
        ByteVector page(kPageBytes);
        const iovec into{page.data(), page.size()};
        const auto read = store_->read(address, std::span(&into, 1), IoMode::kMayBlock);
        EXPECT_FALSE(read);
        return read ? ErrorCode::kIo : read.error().code();
    }
    bool contains(const ChunkId& id) {
        bool found = false;
        EXPECT_OK(store_->contains(std::span(&id, 1), std::span(&found, 1)));
        return found;
    }
    /// Bytes of segment files that are no holes.
    uint64_t bytes_on_disk() {
        uint64_t bytes = 0;
        const auto files = machine_.files().list("/pool/segments");
        EXPECT_OK(files);
        for (const io::DirectoryEntry& entry : *files) {
            const auto file =
                machine_.files().open("/pool/segments/" + entry.name, io::OpenMode::kReadOnly);
            EXPECT_OK(file);
            uint64_t at = 0;
            while (const auto extent = (*file)->next_data(at).value_or(std::nullopt)) {
                bytes += extent->second;
                at = extent->first + extent->second;
            }
        }
        return bytes;
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

TEST_F(CollectionTest, WhatIsDeadIsNotFoundAndItsBytesAreGone) {
    const Blob kept = make_chunk(1, 4);
    const Blob dead = make_chunk(2, 3);
    const Blob object = make_blob(3, 200);
    const Blob dead_object = make_blob(4, 200);
    {
        WriteBatch batch;
        batch.add_chunk(kept.id, kept.bytes);
        batch.add_chunk(dead.id, dead.bytes);
        batch.add_object(object.id, object.bytes);
        batch.add_object(dead_object.id, dead_object.bytes);
        ASSERT_OK(store_->append(batch));
    }
    const PageAddress dead_address = store_->resolve(dead.id)->address;
    const PageAddress kept_address = store_->resolve(kept.id)->address;
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    const CollectionReport report = keep_only({&kept}, {&object});
    EXPECT_EQ(report.dead_chunks, 2U);
    EXPECT_EQ(report.freed_bytes, 3 * kPageBytes);
    const auto check = [&] {
        EXPECT_EQ(store_->resolve(kept.id)->address, kept_address);
        EXPECT_EQ(read_chunk(*store_, kept.id).value(), kept.bytes);
        EXPECT_EQ(store_->get_object(object.id)->content, object.bytes);
        EXPECT_EQ(store_->resolve(dead.id).error().code(), ErrorCode::kNotFound);
        EXPECT_EQ(store_->resolve(dead.id, dead_address).error().code(), ErrorCode::kNotFound);
        EXPECT_EQ(store_->get_object(dead_object.id).error().code(), ErrorCode::kNotFound);
        EXPECT_FALSE(store_->object_address(dead_object.id));
        EXPECT_FALSE(contains(dead.id));
        EXPECT_EQ(read_code(dead_address), ErrorCode::kStale);
        EXPECT_EQ(store_->stats().chunks, 2U);
        EXPECT_EQ(store_->stats().unique_bytes, kept.bytes.size() + object.bytes.size());
        EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
        EXPECT_EQ(store_->stats().index_misses_recovered, 0U);
    };
    check();
    EXPECT_EQ(store_->stats().dead_bytes, dead_object.bytes.size()) << "it shares a pack";
    reopen();
    check();
    // The same content again is new, and lies somewhere else.
    append_chunk(*store_, dead);
    EXPECT_NE(store_->resolve(dead.id)->address, dead_address);
    EXPECT_EQ(read_chunk(*store_, dead.id).value(), dead.bytes);
    EXPECT_EQ(read_code(dead_address), ErrorCode::kStale);
    reopen();
    EXPECT_EQ(read_chunk(*store_, dead.id).value(), dead.bytes);
    EXPECT_EQ(read_code(dead_address), ErrorCode::kStale);
}

TEST_F(CollectionTest, NothingDeadChangesNothingOnDisk) {
    const Blob kept = make_chunk(1, 4);
    append_chunk(*store_, kept);
    EXPECT_EQ(keep_only({&kept}).freed_bytes, 0U);
    const auto files = machine_.files().list("/pool");
    ASSERT_OK(files);
    for (const io::DirectoryEntry& entry : *files) {
        EXPECT_FALSE(entry.name.starts_with("dead-")) << entry.name;
    }
}

TEST_F(CollectionTest, DeadSegmentsAreUnlinkedAndTheirAddressesStayStale) {
    std::vector<Blob> chunks;
    for (uint64_t i = 0; store_->stats().segments < 4; ++i) {
        chunks.push_back(make_chunk(i, kMaxChunkPages));
        append_chunk(*store_, chunks.back());
    }
    const PageAddress first = store_->resolve(chunks.front().id)->address;
    ASSERT_EQ(first.segment(), 1U);
    const CollectionReport report = keep_only({});
    EXPECT_EQ(report.segments_freed, 3U) << "all but the one that grows";
    EXPECT_EQ(store_->stats().segments, 1U);
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    EXPECT_EQ(store_->stats().chunks, 0U);
    EXPECT_FALSE(machine_.files().exists("/pool/segments/0000001.seg").value());
    EXPECT_EQ(read_code(first), ErrorCode::kStale);
    store_->prefetch(first, 16);
    reopen();
    EXPECT_EQ(read_code(first), ErrorCode::kStale);
    EXPECT_EQ(store_->resolve(chunks[0].id, first).error().code(), ErrorCode::kNotFound);
    for (const Blob& chunk : chunks) {
        append_chunk(*store_, chunk);
        EXPECT_EQ(read_chunk(*store_, chunk.id).value(), chunk.bytes);
    }
    EXPECT_EQ(store_->read_only_reason(), std::nullopt);
}

TEST_F(CollectionTest, WhatIsLeftOfADeadSegmentIsMoved) {
    std::vector<Blob> chunks;
    std::vector<Blob> objects;
    const ByteVector aux = make_bytes(7, 33);
    for (uint64_t i = 0; store_->stats().segments < 3; ++i) {
        chunks.push_back(make_chunk(i, 2));
        objects.push_back(make_blob(1000 + i, 300 + i));
        WriteBatch batch;
        batch.add_chunk(chunks.back().id, chunks.back().bytes);
        batch.add_object(objects.back().id, objects.back().bytes, aux);
        ASSERT_OK(store_->append(batch));
    }
    const PageAddress old_chunk = store_->resolve(chunks[1].id)->address;
    const std::optional<PageAddress> old_object = store_->object_address(objects[2].id);
    ASSERT_TRUE(old_object);
    auto handle = store_->protect();
    append_chunk(*handle, chunks[3]);
    const CollectionReport report = keep_only({&chunks[1]}, {&objects[2]});
    EXPECT_EQ(report.segments_freed, 2U);
    EXPECT_EQ(report.moved_bytes,
              chunks[1].bytes.size() + chunks[3].bytes.size() + objects[2].bytes.size());
    const auto check = [&] {
        EXPECT_EQ(store_->stats().chunks, 3U);
        EXPECT_EQ(read_chunk(*store_, chunks[1].id).value(), chunks[1].bytes);
        EXPECT_EQ(read_chunk(*store_, chunks[3].id).value(), chunks[3].bytes);
        const auto object = store_->get_object(objects[2].id, old_object);
        EXPECT_OK(object);
        EXPECT_EQ(object->content, objects[2].bytes);
        EXPECT_EQ(object->aux, aux);
        EXPECT_EQ(read_code(old_chunk), ErrorCode::kStale);
        EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    };
    check();
    // The protection has followed its chunk.
    EXPECT_EQ(keep_only({&chunks[1]}, {&objects[2]}).dead_chunks, 0U);
    check();
    handle.reset();
    reopen();
    check();
    EXPECT_EQ(keep_only({&chunks[1]}, {&objects[2]}).dead_chunks, 1U);
}

TEST_F(CollectionTest, WhatCannotBeReadIsNotMovedAndTheRestIsFreed) {
    std::vector<Blob> chunks;
    for (uint64_t i = 0; store_->stats().segments < 3; ++i) {
        chunks.push_back(make_chunk(i, 2));
        append_chunk(*store_, chunks.back());
    }
    machine_.files().inject({.kind = io::OperationKind::kRead,
                             .path_part = "0000001.seg",
                             .nth = 1,
                             .for_ever = true,
                             .errno_value = EIO});
    const CollectionReport report = keep_only({&chunks[1]});
    EXPECT_EQ(report.moved_bytes, 0U);
    EXPECT_EQ(report.dead_chunks, chunks.size() - 1);
    EXPECT_EQ(report.segments_freed, 1U);
    machine_.files().clear_faults();
    const auto found = read_chunk(*store_, chunks[1].id);
    ASSERT_OK(found);
    EXPECT_EQ(*found, chunks[1].bytes);
}

TEST_F(CollectionTest, FragmentedSegmentsAreEmptiedRatherThanPunched) {
    // One segment of single pages, of which every other one dies, with a few more.
    ASSERT_OK(store_->close());
    store_.reset();
    auto opened = open_store(machine_.env(), "/pool", {.segment_bytes = 4 * kMinSegmentBytes});
    ASSERT_OK(opened);
    store_ = std::move(opened->store);
    std::vector<Blob> chunks;
    while (store_->stats().segments < 2) {
        WriteBatch batch;
        const size_t first = chunks.size();
        for (size_t i = 0; i < 40; ++i) {
            chunks.push_back(make_chunk(first + i, 1));
        }
        for (size_t i = first; i < chunks.size(); ++i) {
            batch.add_chunk(chunks[i].id, chunks[i].bytes);
        }
        ASSERT_OK(store_->append(batch));
    }
    std::vector<const Blob*> kept;
    for (size_t i = 0; i < chunks.size(); i += 2) {
        if (i % 10 != 0) {
            kept.push_back(&chunks[i]);
        }
    }
    machine_.files().reset_counts();
    EXPECT_EQ(keep_only(kept).segments_freed, 1U);
    EXPECT_LT(machine_.files().counts().of(io::OperationKind::kPunchHole), 40U);
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    for (const Blob* chunk : kept) {
        EXPECT_EQ(read_chunk(*store_, chunk->id).value(), chunk->bytes);
    }
}

TEST_F(CollectionTest, PacksThatAreMostlyDeadAreRepacked) {
    std::vector<Blob> objects;
    WriteBatch batch;
    for (uint64_t i = 0; i < 50; ++i) {
        objects.push_back(make_blob(i, 1000));
        batch.add_object(objects.back().id, objects.back().bytes);
    }
    ASSERT_OK(store_->append(batch));
    const Blob chunk = make_chunk(1, 14);
    append_chunk(*store_, chunk);
    const uint64_t before = store_->stats().stored_bytes;
    EXPECT_EQ(keep_only({&chunk}, {&objects[4], &objects[40]}).moved_bytes, 2000U);
    EXPECT_LT(store_->stats().stored_bytes, before - 40000);
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    reopen();
    EXPECT_EQ(store_->get_object(objects[4].id)->content, objects[4].bytes);
    EXPECT_EQ(store_->get_object(objects[40].id)->content, objects[40].bytes);
    EXPECT_EQ(store_->get_object(objects[5].id).error().code(), ErrorCode::kNotFound);
}

TEST_F(CollectionTest, TheBarrierKeepsDuplicatesThroughASweep) {
    const Blob chunk = make_chunk(1, 2);
    const Blob lost = make_chunk(3, 2);
    append_chunk(*store_, chunk);
    append_chunk(*store_, lost);
    const auto collection = begin();
    append_chunk(*store_, chunk);
    EXPECT_EQ(sweep(*collection).dead_chunks, 1U);
    EXPECT_EQ(read_chunk(*store_, chunk.id).value(), chunk.bytes);
    EXPECT_FALSE(contains(lost.id));
}

TEST_F(CollectionTest, ACopyThatHealedRotIsKeptWhereTheRotIsForgotten) {
    const Blob chunk = make_chunk(1, 2);
    append_chunk(*store_, chunk);
    ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    const PageAddress rotten = store_->resolve(chunk.id)->address;
    machine_.files().damage("/pool/segments/0000001.seg", rotten.offset_bytes() + 100, 1, 1);
    reopen();
    ASSERT_EQ(read_chunk(*store_, chunk.id).error().code(), ErrorCode::kCorrupt);
    append_chunk(*store_, chunk);
    const PageAddress healed = store_->resolve(chunk.id)->address;
    ASSERT_NE(healed, rotten);
    // Without a checkpoint nobody knows any more which of the two is rotten, and nodes still name
    // the first.
    reopen();
    ASSERT_EQ(store_->stats().damaged_chunks, 0U);
    auto collection = begin();
    ASSERT_OK(collection->mark_pages(chunk.id, rotten, 0x3));
    EXPECT_EQ(sweep(*collection).dead_chunks, 0U);
    EXPECT_EQ(store_->stats().damaged_chunks, 1U);
    auto whole = read_chunk(*store_, chunk.id);
    ASSERT_OK(whole);
    EXPECT_EQ(*whole, chunk.bytes);
    // It is known now, and from the next checkpoint on for good: what is rotten goes.
    collection.reset();
    ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    reopen();
    collection = begin();
    ASSERT_OK(collection->mark_pages(chunk.id, rotten, 0x3));
    EXPECT_EQ(sweep(*collection).dead_chunks, 1U);
    EXPECT_EQ(store_->stats().damaged_chunks, 0U);
    EXPECT_EQ(read_code(rotten), ErrorCode::kStale);
    whole = read_chunk(*store_, chunk.id);
    ASSERT_OK(whole);
    EXPECT_EQ(*whole, chunk.bytes);
}

TEST_F(CollectionTest, OfTwoWholeCopiesOneGoes) {
    const Blob chunk = make_chunk(1, 2);
    append_chunk(*store_, chunk);
    ASSERT_OK(store_->checkpoint(store_->sequence(), {}));
    const PageAddress first = store_->resolve(chunk.id)->address;
    // Unreadable for a while, and so stored again.
    machine_.files().damage("/pool/segments/0000001.seg", first.offset_bytes(), 1, 1);
    reopen();
    ASSERT_EQ(read_chunk(*store_, chunk.id).error().code(), ErrorCode::kCorrupt);
    append_chunk(*store_, chunk);
    const PageAddress second = store_->resolve(chunk.id)->address;
    const auto file = machine_.files().open("/pool/segments/0000001.seg", io::OpenMode::kReadWrite);
    ASSERT_OK(file);
    ASSERT_OK(io::write_all(**file, Bytes(chunk.bytes), first.offset_bytes()));
    reopen();
    const auto collection = begin();
    ASSERT_OK(collection->mark_pages(chunk.id, first, 0x3));
    EXPECT_EQ(sweep(*collection).dead_chunks, 1U);
    EXPECT_EQ(read_code(second), ErrorCode::kStale);
    EXPECT_EQ(read_chunk(*store_, chunk.id).value(), chunk.bytes);
}

TEST_F(CollectionTest, FootersAndIndexThatAreLostComeBackWithoutTheDead) {
    std::vector<Blob> chunks;
    std::vector<Blob> objects;
    for (uint64_t i = 0; store_->stats().segments < 3; ++i) {
        chunks.push_back(make_chunk(i, static_cast<uint32_t>(1 + i % 3)));
        objects.push_back(make_blob(1000 + i, 30 + i));
        append_chunk(*store_, chunks.back());
        append_object(*store_, objects.back());
    }
    std::vector<const Blob*> kept_chunks;
    std::vector<const Blob*> kept_objects;
    for (size_t i = 0; i < chunks.size(); ++i) {
        if (i % 3 != 0) {
            kept_chunks.push_back(&chunks[i]);
        }
        if (i % 2 != 0) {
            kept_objects.push_back(&objects[i]);
        }
    }
    keep_only(kept_chunks, kept_objects);
    ASSERT_OK(store_->close());
    store_.reset();
    // Every footer, and the index.
    for (const uint32_t number : {1U, 2U}) {
        const std::string path = "/pool/segments/000000" + std::to_string(number) + ".seg";
        const auto file = machine_.files().open(path, io::OpenMode::kReadOnly);
        ASSERT_OK(file);
        machine_.files().damage(path, (*file)->size_bytes().value() - 64, 64, 1);
    }
    const auto files = machine_.files().list("/pool");
    for (const io::DirectoryEntry& entry : *files) {
        if (entry.name.starts_with("index-")) {
            ASSERT_OK(machine_.files().remove("/pool/" + entry.name));
        }
    }
    reopen();
    EXPECT_EQ(store_->read_only_reason(), std::nullopt);
    for (size_t i = 0; i < chunks.size(); ++i) {
        EXPECT_EQ(contains(chunks[i].id), i % 3 != 0) << i;
        EXPECT_EQ(contains(objects[i].id), i % 2 != 0) << i;
        if (i % 3 != 0) {
            EXPECT_EQ(read_chunk(*store_, chunks[i].id).value(), chunks[i].bytes);
        } else {
            EXPECT_EQ(store_->resolve(chunks[i].id).error().code(), ErrorCode::kNotFound)
                << "and no talk of damage";
        }
    }
    EXPECT_EQ(store_->stats().index_misses_recovered, 0U);
}

TEST_F(CollectionTest, DumpsKnowWhatWasFreed) {
    std::vector<Blob> chunks;
    for (uint64_t i = 0; store_->stats().segments < 3; ++i) {
        chunks.push_back(make_chunk(i, 8));
        WriteBatch batch;
        batch.add_chunk(chunks.back().id, chunks.back().bytes);
        std::vector<Blob> objects;
        for (uint64_t k = 0; k < 20; ++k) {
            objects.push_back(make_blob(1000 + 20 * i + k, 500));
        }
        for (const Blob& object : objects) {
            batch.add_object(object.id, object.bytes);
        }
        ASSERT_OK(store_->append(batch));
    }
    const Blob kept_object = make_blob(1021, 500);
    keep_only({&chunks[0], &chunks[2]}, {&kept_object}, {.move_below = 0});
    const auto dump = [&](const std::string& path) {
        std::string text;
        const auto damages = dump_file(machine_.env(), path, [&text](std::string_view line) {
            text.append(line).append("\n");
        });
        EXPECT_OK(damages);
        EXPECT_EQ(damages.value_or(0), 0U) << path << "\n" << text;
        return text;
    };
    EXPECT_NE(dump("/pool/segments/0000001.seg").find("freed by garbage collection"),
              std::string::npos);
    EXPECT_NE(dump("/pool/segments/0000001.seg").find(chunks[1].id.hex() + ", 32768 bytes, freed"),
              std::string::npos);
    EXPECT_NE(dump("/pool/superblock").find("dead-1.map names what is dead"), std::string::npos);
    const std::string map = dump("/pool/dead-1.map");
    EXPECT_NE(map.find("segment 1"), std::string::npos) << map;
    EXPECT_NE(map.find("object of a pack, dead"), std::string::npos) << map;
    machine_.files().damage("/pool/dead-1.map", 200, 1, 1);
    std::string text;
    EXPECT_EQ(dump_file(machine_.env(), "/pool/dead-1.map",
                        [&text](std::string_view line) { text.append(line); })
                  .value(),
              1U);
}

TEST_F(CollectionTest, WithoutItsDeadMapAStoreIsReadOnly) {
    const Blob kept = make_chunk(1, 4);
    const Blob dead = make_chunk(2, 3);
    append_chunk(*store_, kept);
    append_chunk(*store_, dead);
    keep_only({&kept});
    ASSERT_OK(store_->close());
    store_.reset();
    const std::string map = "/pool/dead-1.map";
    ASSERT_TRUE(machine_.files().exists(map).value());
    const auto check = [&](std::string_view text) {
        auto opened = Store::open(machine_.env(), "/pool", {.segment_bytes = kMinSegmentBytes});
        ASSERT_OK(opened);
        const std::string reason = (*opened)->read_only_reason().value_or("");
        EXPECT_NE(reason.find(map), std::string::npos) << reason;
        EXPECT_NE(reason.find(text), std::string::npos) << reason;
        RecordedReplay replay;
        ASSERT_OK((*opened)->replay(replay));
        EXPECT_EQ(read_chunk(**opened, kept.id).value(), kept.bytes);
        const auto gone = read_chunk(**opened, dead.id);
        ASSERT_FALSE(gone);
        EXPECT_TRUE(gone.error().code() == ErrorCode::kCorrupt ||
                    gone.error().code() == ErrorCode::kNotFound);
    };
    machine_.files().damage(map, 140, 1, 1);
    check("offset 8");
    ASSERT_OK(machine_.files().remove(map));
    check("");
}

TEST_F(CollectionTest, OnAFullDiskDeadSegmentsGoFirst) {
    std::vector<Blob> chunks;
    for (uint64_t i = 0; store_->stats().segments < 4; ++i) {
        chunks.push_back(make_chunk(i, kMaxChunkPages));
        append_chunk(*store_, chunks.back());
    }
    auto collection = begin();
    ASSERT_OK(collection->mark_pages(chunks.back().id, {}, 1));
    constexpr uint64_t kPlenty = uint64_t{1} << 30;
    machine_.files().set_space_limit(kPlenty);
    machine_.files().set_space_limit(kPlenty - machine_.files().space("/pool")->free_bytes);
    const CollectionReport report = sweep(*collection);
    EXPECT_EQ(report.segments_freed, 3U);
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    machine_.files().set_space_limit(kPlenty);
    collection.reset();
    reopen();
    EXPECT_EQ(store_->read_only_reason(), std::nullopt);
    EXPECT_EQ(read_chunk(*store_, chunks.back().id).value(), chunks.back().bytes);
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
}

TEST_F(CollectionTest, ACancelledSweepIsFinishedByTheNextOne) {
    std::vector<Blob> chunks;
    for (uint64_t i = 0; store_->stats().segments < 4; ++i) {
        chunks.push_back(make_chunk(i, kMaxChunkPages));
        append_chunk(*store_, chunks.back());
    }
    for (int looks = 0; looks < 12; ++looks) {
        const auto collection = begin();
        ASSERT_OK(collection->mark_pages(chunks.back().id, {}, 1));
        int left = looks;
        const auto swept = collection->sweep({.cancelled = [&left] { return left-- == 0; }});
        if (!swept) {
            EXPECT_EQ(swept.error().code(), ErrorCode::kCancelled);
        }
        EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes) << looks;
    }
    EXPECT_EQ(keep_only({&chunks.back()}).dead_chunks, 0U);
    EXPECT_EQ(store_->stats().segments, 1U);
    EXPECT_EQ(store_->stats().chunks, 1U);
    EXPECT_EQ(read_chunk(*store_, chunks.back().id).value(), chunks.back().bytes);
}

TEST_F(CollectionTest, AFileSystemWithoutHolesGivesBackWholeSegmentsOnly) {
    std::vector<Blob> chunks;
    for (uint64_t i = 0; store_->stats().segments < 4; ++i) {
        chunks.push_back(make_chunk(i, 8));
        append_chunk(*store_, chunks.back());
    }
    machine_.files().inject({.kind = io::OperationKind::kPunchHole,
                             .path_part = "",
                             .for_ever = true,
                             .errno_value = EOPNOTSUPP});
    // All of the first segment dies, and half of each other.
    std::vector<const Blob*> kept;
    for (size_t i = 0; i < chunks.size(); i += 2) {
        if (store_->resolve(chunks[i].id)->address.segment() > 1) {
            kept.push_back(&chunks[i]);
        }
    }
    const uint64_t before = bytes_on_disk();
    EXPECT_EQ(keep_only(kept).segments_freed, 1U);
    EXPECT_LT(bytes_on_disk(), before);
    EXPECT_EQ(bytes_on_disk(), store_->stats().stored_bytes);
    EXPECT_EQ(store_->warnings().size(), 1U);
    keep_only(kept);
    EXPECT_EQ(store_->warnings().size(), 1U) << "said once";
    EXPECT_EQ(read_chunk(*store_, kept.front()->id).value(), kept.front()->bytes);
}

/// Blocks that a directory's files take, in bytes.
uint64_t disk_usage(const std::string& directory) {
    uint64_t bytes = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
        struct stat info{};
        EXPECT_EQ(::lstat(entry.path().c_str(), &info), 0);
        bytes += entry.is_regular_file() ? static_cast<uint64_t>(info.st_blocks) * 512 : 0;
    }
    return bytes;
}

TEST(CollectionOnDisk, DuConfirmsWhatTheStoreSays) {
    std::string directory = ::testing::TempDir() + "stellarium-collection-XXXXXX";
    ASSERT_NE(::mkdtemp(directory.data()), nullptr);
    {
        const StoreOptions options{.segment_bytes = uint64_t{1} << 20};
        auto opened = open_store(io::real_env(), directory + "/pool", options);
        ASSERT_OK(opened);
        Store& store = *opened->store;
        std::vector<Blob> chunks;
        for (uint64_t i = 0; i < 400; ++i) {
            chunks.push_back(make_chunk(i, static_cast<uint32_t>(1 + i % 16)));
            WriteBatch batch;
            batch.add_chunk(chunks.back().id, chunks.back().bytes);
            ASSERT_OK(store.append(batch));
        }
        const auto segment_bytes = [&] { return disk_usage(directory + "/pool/segments"); };
        const auto collect_all_but = [&](size_t every) {
            const auto collection = store.begin_collection();
            ASSERT_OK(collection);
            ASSERT_OK(store.checkpoint(store.sequence(), {}));
            ASSERT_OK((*collection)->fix_position());
            for (size_t i = 0; i < chunks.size(); i += every) {
                ASSERT_OK((*collection)->mark_pages(chunks[i].id, {}, 1));
            }
            ASSERT_OK((*collection)->sweep({}));
        };
        // Some file systems need a block for the list of a file's holes.
        const auto check_usage = [&] {
            EXPECT_GE(segment_bytes(), store.stats().stored_bytes);
            EXPECT_LE(segment_bytes(),
                      store.stats().stored_bytes + store.stats().segments * kPageBytes);
        };
        const uint64_t before = segment_bytes();
        check_usage();
        collect_all_but(2);
        check_usage();
        EXPECT_LT(segment_bytes(), before * 60 / 100);
        collect_all_but(60);
        check_usage();
        EXPECT_LT(segment_bytes(), before * 5 / 100);
        for (size_t i = 0; i < chunks.size(); i += 60) {
            EXPECT_EQ(read_chunk(store, chunks[i].id).value(), chunks[i].bytes);
        }
        ASSERT_OK(store.close());
    }
    std::filesystem::remove_all(directory);
}

// --- Numbering -----------------------------------------------------------------------------------

/// Several closed segments of three chunks each, whose footers take turns in memory. The footer of
/// the first does not name its first chunk, which is garbage, as one that a repair wrote.
class Renumbering : public CollectionTest {
  protected:
    static constexpr uint64_t kChunks = 12;

    Renumbering() {
        for (uint64_t i = 0; i < kChunks; ++i) {
            chunks_.push_back(make_chunk(900 + i, kMaxChunkPages));
            append_chunk(*store_, chunks_.back());
        }
        EXPECT_OK(store_->checkpoint(store_->sequence(), {}));
        const StoreId id = store_->uuid();
        EXPECT_OK(store_->close());
        store_.reset();
        shorten_footer(id);
        auto opened = open_store(machine_.env(), "/pool",
                                 {.segment_bytes = kMinSegmentBytes, .mapped_footers = 1});
        EXPECT_OK(opened);
        store_ = std::move(opened->store);
    }

    void shorten_footer(const StoreId& id) {
        const auto file = machine_.files().open(kFirst, io::OpenMode::kReadWrite);
        ASSERT_OK(file);
        const uint64_t size = (*file)->size_bytes().value();
        ByteVector last(kPageBytes);
        ASSERT_OK(io::read_exact(**file, last, size - kPageBytes));
        const auto trailer = decode_footer_trailer(last, id, 1, size / kPageBytes);
        ASSERT_OK(trailer);
        const uint64_t start = uint64_t{trailer->footer_page} * kPageBytes;
        ByteVector bytes(size - start);
        ASSERT_OK(io::read_exact(**file, bytes, start));
        const auto footer = decode_footer(bytes, id, 1, size / kPageBytes);
        ASSERT_OK(footer);
        ASSERT_EQ(footer->entries.size(), 3U);
        ASSERT_EQ(footer->entries.front().id, chunks_.front().id);
        const ByteVector shorter =
            encode_footer(id, 1, trailer->footer_page, footer->entries.subspan(1),
                          trailer->first_sequence, trailer->last_sequence);
        ASSERT_EQ(shorter.size(), bytes.size());
        ASSERT_OK(io::write_all(**file, Bytes(shorter), start));
        ASSERT_OK((*file)->datasync());
        footer_offset_ = start;
    }

    /// The first segment's footer rots, and is not in memory any more.
    void lose_footer() {
        machine_.files().damage(kFirst, footer_offset_, 1, 1);
        for (uint64_t i = 3; i < kChunks; i += 3) {
            EXPECT_OK(store_->get_object(chunks_[i].id));
        }
    }
    void expect_all_there() {
        for (uint64_t i = 1; i < kChunks; ++i) {
            const auto object = store_->get_object(chunks_[i].id);
            ASSERT_OK(object) << i;
            EXPECT_EQ(object->content, chunks_[i].bytes) << i;
        }
    }

    static constexpr const char* kFirst = "/pool/segments/0000001.seg";
    std::vector<Blob> chunks_;
    uint64_t footer_offset_ = 0;
};

TEST_F(Renumbering, MarksOfAListThatIsReadAgainOtherwiseKeepAll) {
    auto collection = begin();
    for (uint64_t i = 1; i < kChunks; ++i) {
        ASSERT_OK(collection->mark_pages(chunks_[i].id, {}, 0xffff));
    }
    lose_footer();
    sweep(*collection);
    expect_all_there();
    collection.reset();
    // The next one has marks of the list that there is now.
    const auto next = begin();
    for (uint64_t i = 1; i < kChunks; ++i) {
        ASSERT_OK(next->mark_pages(chunks_[i].id, {}, 0xffff));
    }
    EXPECT_EQ(sweep(*next).dead_chunks, 1U);
    expect_all_there();
}

TEST_F(Renumbering, WhatIsProtectedByTheOldNumbersIsKept) {
    const auto protection = store_->protect();
    std::vector<ChunkId> ids;
    for (uint64_t i = 1; i < kChunks; ++i) {
        ids.push_back(chunks_[i].id);
    }
    const auto found = std::make_unique<bool[]>(ids.size());
    ASSERT_OK(protection->contains(ids, std::span(found.get(), ids.size())));
    lose_footer();
    EXPECT_OK(store_->get_object(chunks_[1].id));  // Numbered anew by now.
    const auto collection = begin();
    sweep(*collection);
    expect_all_there();
}

TEST_F(Renumbering, MarkingStopsRatherThanMixNumbers) {
    const auto collection = begin();
    ASSERT_OK(collection->mark_pages(chunks_[1].id, {}, 0xffff));
    lose_footer();
    const auto mark = collection->mark_pages(chunks_[2].id, {}, 0xffff);
    ASSERT_FALSE(mark);
    EXPECT_EQ(mark.error().code(), ErrorCode::kCorrupt) << mark.error().message();
    expect_all_there();
}

}  // namespace
}  // namespace stellarium::nebula
