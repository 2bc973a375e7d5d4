// The pool end to end on a simulated machine: each operation, its refusals, and what survives.
#include "nova/pool.h"

#include <cstring>
#include <functional>
#include <thread>

#include "base/units.h"
#include "nova/device.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

TEST(Pool, ImportExportAndClone) {
    TestPool pool;
    const auto content = random_bytes(5'000'001, 7);
    const EntityInfo image = import_image(*pool, "debian", content);
    EXPECT_EQ(image.kind, EntityKind::kImage);
    EXPECT_EQ(image.size_bytes, content.size());
    EXPECT_EQ(export_all(*pool, "debian"), content);

    must(pool->clone("debian", {"vm-1", "vm-2"}));
    const EntityInfo clone = must(pool->find("vm-2"));
    EXPECT_EQ(clone.kind, EntityKind::kVolume);
    EXPECT_EQ(clone.parent, "debian");
    EXPECT_EQ(clone.size_bytes, (content.size() + 511) / 512 * 512);
    auto padded = content;
    padded.resize(clone.size_bytes);
    EXPECT_EQ(export_all(*pool, "vm-2"), padded);

    pool.reopen();
    EXPECT_EQ(export_all(*pool, "debian"), content);
    EXPECT_EQ(export_all(*pool, "vm-1"), padded);
}

TEST(Pool, WritesAreSeenAtOnceAndAfterFlushAndReopen) {
    TestPool pool;
    must(pool->create_volume("a", 8 * kMiB));
    const auto data = random_bytes(100'352, 3);
    auto shadow = std::vector<std::byte>(8 * kMiB);
    {
        auto device = must(pool->attach("a", {}));
        for (const uint64_t offset : {512U, 2'000'896U, 4'194'304U - 51'200U}) {
            must(write(*device, offset, data));
            std::memcpy(shadow.data() + offset, data.data(), data.size());
            EXPECT_EQ(read(*device, 0, shadow.size()), shadow);
        }
        must(flush(*device));
        EXPECT_EQ(read(*device, 0, shadow.size()), shadow);
        must(device->discard(4096 + 512, 2 * kMiB, IoMode::kMayBlock));
        std::memset(shadow.data() + 4096 + 512, 0, 2 * kMiB);
        EXPECT_EQ(read(*device, 0, shadow.size()), shadow);
    }
    EXPECT_EQ(export_all(*pool, "a"), shadow);
    pool.reopen();
    EXPECT_EQ(export_all(*pool, "a"), shadow);
}

TEST(Pool, PagesWrittenInNoOrderAreReadTogether) {
    PoolOptions options = TestPool::small_options();
    options.dirty_budget_bytes = 16 * kMiB;
    TestPool pool(1, options);
    constexpr uint64_t kPages = 1100;  // More runs than are read at once, over three leaves.
    must(pool->create_volume("a", kPages * kPageBytes));
    const auto data = random_bytes(kPages * kPageBytes, 9);
    {
        const auto device = must(pool->attach("a", {}));
        for (uint64_t i = 0; i < kPages; ++i) {
            const uint64_t page = i * 7 % kPages;
            must(write(*device, page * kPageBytes,
                       Bytes(data).subspan(page * kPageBytes, kPageBytes)));
        }
    }
    pool.reopen();
    const auto device = must(pool->attach("a", {.read_only = true}));
    const auto expected = [&](uint64_t offset, uint64_t length) {
        const auto begin = data.begin() + static_cast<ptrdiff_t>(offset);
        return std::vector<std::byte>(begin, begin + static_cast<ptrdiff_t>(length));
    };
    EXPECT_EQ(read(*device, 0, data.size()), data);
    EXPECT_EQ(read(*device, 512, data.size() - 1024), expected(512, data.size() - 1024));
    EXPECT_EQ(read(*device, 5 * 512, 3 * kPageBytes), expected(5 * 512, 3 * kPageBytes));
}

TEST(Pool, AcknowledgedWritesSurviveTheProcess) {
    TestPool pool;
    must(pool->create_volume("a", 8 * kMiB));
    const auto data = random_bytes(20 * 4096, 4);
    auto device = must(pool->attach("a", {}));
    must(write(*device, 512 * 5, data));
    pool.machine().kill_process();
    device.reset();
    pool.kill();
    EXPECT_GT(must(pool->find("a")).dirty_bytes, 0U);
    device = must(pool->attach("a", {}));
    EXPECT_EQ(read(*device, 512 * 5, data.size()), data);
}

// --- Names, lineage, refusals --------------------------------------------------------------------

TEST(Pool, NamesAreChecked) {
    TestPool pool;
    for (const std::string name : {"", ".", "..", "a/b", "a@b", "ä", "a b"}) {
        EXPECT_EQ(code_of(pool->create_volume(name, 512)), ErrorCode::kInvalidArgument) << name;
        EXPECT_EQ(code_of(pool->begin_import(name)), ErrorCode::kInvalidArgument) << name;
    }
    must(pool->create_volume(std::string(128, 'x'), 512));
    EXPECT_EQ(code_of(pool->create_volume(std::string(129, 'x'), 512)),
              ErrorCode::kInvalidArgument);
    must(pool->create_volume("a", 512));
    EXPECT_EQ(code_of(pool->create_volume("a", 512)), ErrorCode::kAlreadyExists);
    EXPECT_EQ(code_of(pool->begin_import("a")), ErrorCode::kAlreadyExists);
    EXPECT_EQ(code_of(pool->clone("a", {"b", "a"})), ErrorCode::kAlreadyExists);
    EXPECT_EQ(code_of(pool->clone("a", {"b", "b"})), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(pool->clone("a", {})), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(pool->find("b")), ErrorCode::kNotFound) << "a refused call made something";
    EXPECT_EQ(code_of(pool->rename("a", "a")), ErrorCode::kAlreadyExists);
    EXPECT_EQ(code_of(pool->find("a@s")), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(pool->create_volume("odd", 513)), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(pool->create_volume("huge", kMaxVolumeBytes + 512)),
              ErrorCode::kInvalidArgument);
    const auto import = must(pool->begin_import("promised"));
    EXPECT_EQ(code_of(pool->create_volume("promised", 512)), ErrorCode::kAlreadyExists);
}

TEST(Pool, LineageIsKeptAndFollowsNames) {
    TestPool pool;
    import_image(*pool, "base", random_bytes(5000, 1));
    must(pool->clone("base", {"vm"}));
    must(pool->create_snapshot("vm", "s1"));
    must(pool->clone("vm@s1", {"fork"}));
    EXPECT_EQ(must(pool->detail("fork")).lineage,
              (std::vector<std::string>{"vm@s1", "vm", "base"}));
    must(pool->rename("vm", "machine"));
    EXPECT_EQ(must(pool->detail("fork")).lineage,
              (std::vector<std::string>{"machine@s1", "machine", "base"}));
    must(pool->remove({"machine"}));
    for (int round = 0; round < 3; ++round) {
        const EntityInfo fork = must(pool->find("fork"));
        EXPECT_EQ(fork.parent, "machine@s1");
        EXPECT_TRUE(fork.parent_removed);
        EXPECT_EQ(must(pool->detail("fork")).lineage, (std::vector<std::string>{"machine@s1"}));
        if (round == 1) {
            must(pool->checkpoint());
        }
        pool.reopen();
    }
    EXPECT_EQ(code_of(pool->find("machine@s1")), ErrorCode::kNotFound);
    // A new entity of the same name is not the old parent.
    must(pool->create_volume("machine", 512));
    EXPECT_TRUE(must(pool->find("fork")).parent_removed);
    EXPECT_GT(must(pool->find("machine")).id, must(pool->find("fork")).id);
}

TEST(Pool, AttachedVolumesAreProtected) {
    TestPool pool;
    import_image(*pool, "base", random_bytes(5000, 1));
    must(pool->clone("base", {"vm", "other"}));
    must(pool->create_snapshot("vm", "s"));
    EXPECT_EQ(code_of(pool->attach("base", {.read_only = false, .label = "x"})),
              ErrorCode::kReadOnly);
    EXPECT_EQ(code_of(pool->attach("vm@s", {.read_only = false, .label = "x"})),
              ErrorCode::kReadOnly);

    auto device = must(pool->attach("vm", {.read_only = false, .label = "socket one.sock"}));
    const auto expect_busy = [](const auto& result) {
        ASSERT_FALSE(result.has_value());
        EXPECT_EQ(result.error().code(), ErrorCode::kBusy);
        EXPECT_NE(result.error().message().find("socket one.sock"), std::string::npos)
            << result.error().message();
    };
    expect_busy(pool->attach("vm", {.read_only = false, .label = "second"}));
    expect_busy(pool->remove({"other", "vm"}));
    expect_busy(pool->rollback("vm", "s"));
    expect_busy(pool->resize("vm", 512));
    expect_busy(pool->close());
    EXPECT_TRUE(pool->find("other").has_value()) << "a refused removal removed something";
    EXPECT_EQ(must(pool->find("vm")).attachment, "socket one.sock");

    const auto reader = must(pool->attach("vm@s", {.read_only = true, .label = "socket one.sock"}));
    device.reset();
    expect_busy(pool->remove({"vm"}));
    expect_busy(pool->remove_snapshot("vm", "s"));
    EXPECT_EQ(code_of(write(*reader, 0, random_bytes(512, 1))), ErrorCode::kReadOnly);
    EXPECT_EQ(code_of(reader->discard(0, 512, IoMode::kMayBlock)), ErrorCode::kReadOnly);
    EXPECT_EQ(reader->size_bytes(), 5120U) << "an image's length, in whole sectors";
}

TEST(Pool, AttachmentsOnRecordPersist) {
    TestPool pool;
    must(pool->create_volume("vm", 4096));
    const auto options = random_bytes(4096, 5);
    must(pool->set_attachment(
        "vm", Pool::AttachmentRecord{.source = "vm", .label = "socket a", .options = options}));
    for (int round = 0; round < 3; ++round) {
        const auto attachments = pool->attachments();
        ASSERT_EQ(attachments.size(), 1U);
        EXPECT_EQ(attachments[0].source, round < 2 ? "vm" : "renamed");
        EXPECT_EQ(attachments[0].label, "socket a");
        EXPECT_EQ(attachments[0].options, options);
        EXPECT_TRUE(must(pool->find(attachments[0].source)).attached);
        EXPECT_EQ(code_of(pool->remove({attachments[0].source})), ErrorCode::kBusy);
        if (round == 1) {
            must(pool->checkpoint());
            must(pool->rename("vm", "renamed"));
        }
        pool.kill();
    }
    EXPECT_EQ(code_of(pool->set_attachment(
                  "renamed",
                  Pool::AttachmentRecord{
                      .source = "renamed", .label = "x", .options = random_bytes(4097, 1)})),
              ErrorCode::kInvalidArgument);
    must(pool->set_attachment("renamed", std::nullopt));
    pool.reopen();
    EXPECT_TRUE(pool->attachments().empty());
    must(pool->remove({"renamed"}));
}

TEST(Pool, WhatIsAttachedByItsIdIsThatWhateverItsNameIs) {
    // A frontend finds out the id, and the names change hands before it goes on.
    TestPool pool;
    must(pool->create_volume("vm", 4096));
    const uint64_t id = must(pool->find("vm")).id;
    must(pool->rename("vm", "old"));
    must(pool->create_volume("vm", 8192));
    {
        const auto device = must(pool->attach("vm", {.label = "socket", .id = id}));
        EXPECT_EQ(device->size_bytes(), 4096U);
        EXPECT_TRUE(must(pool->find("old")).attached);
        EXPECT_FALSE(must(pool->find("vm")).attached);
    }
    must(pool->set_attachment(
        id, Pool::AttachmentRecord{.source = "vm", .label = "socket", .options = {}}));
    ASSERT_EQ(pool->attachments().size(), 1U);
    EXPECT_EQ(pool->attachments()[0].source, "old");
    must(pool->set_attachment(id, std::nullopt));
    EXPECT_TRUE(pool->attachments().empty());
    must(pool->remove({"old"}));
    EXPECT_EQ(code_of(pool->attach("vm", {.id = id})), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(pool->set_attachment(id, std::nullopt)), ErrorCode::kNotFound);
}

TEST(Pool, AGrowingVolumeTellsItsDevices) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    auto device = must(pool->attach("vm", {}));
    uint64_t told = 0;
    device->set_resize_listener([&](uint64_t size) { told = size; });
    must(pool->resize("vm", 3 * kMiB + 512));
    EXPECT_EQ(told, 3 * kMiB + 512);
    EXPECT_EQ(device->size_bytes(), 3 * kMiB + 512);
    const auto data = random_bytes(512, 1);
    must(write(*device, 3 * kMiB, data));
    EXPECT_EQ(read(*device, 3 * kMiB, 512), data);
    EXPECT_EQ(code_of(write(*device, 3 * kMiB + 512, data)), ErrorCode::kInvalidArgument);
    device->set_resize_listener({});
    must(pool->resize("vm", 4 * kMiB));
    EXPECT_EQ(told, 3 * kMiB + 512);
    EXPECT_EQ(device->serial(), "vm");
}

TEST(Pool, WhatAShrunkVolumeLosesStaysLost) {
    TestPool pool;
    must(pool->create_volume("vm", 5 * kMiB));
    const auto data = random_bytes(5 * kMiB, 1);
    must(write(*must(pool->attach("vm", {})), 0, data));
    for (const uint64_t size : {4 * kMiB + 512, 3 * kMiB, 4096 * kKiB / 2 + 1536, uint64_t{512}}) {
        must(pool->resize("vm", size));
        must(pool->resize("vm", 5 * kMiB));
        auto expected = data;
        std::fill(expected.begin() + static_cast<ptrdiff_t>(size), expected.end(), std::byte{0});
        EXPECT_EQ(export_all(*pool, "vm"), expected) << size;
        pool.kill();
        EXPECT_EQ(export_all(*pool, "vm"), expected) << size;
    }
}

// --- Images --------------------------------------------------------------------------------------

TEST(Pool, ImagesOfAllShapesRoundTrip) {
    TestPool pool;
    int number = 0;
    for (const size_t size :
         {size_t{0}, size_t{1}, size_t{511}, size_t{512}, size_t{4095}, size_t{4096}, size_t{4097},
          size_t{2 * kMiB - 1}, size_t{2 * kMiB}, size_t{2 * kMiB + 1}, size_t{3'333'333}}) {
        for (const bool zeros : {false, true}) {
            const auto content =
                zeros ? std::vector<std::byte>(size) : random_bytes(size, size + 1);
            const std::string name = fmt::format("i{}", number++);
            const EntityInfo image = import_image(*pool, name, content);
            EXPECT_EQ(image.size_bytes, size);
            EXPECT_EQ(export_all(*pool, name), content) << size << " zeros " << zeros;
            EXPECT_EQ(must(pool->detail(name)).data_bytes,
                      zeros ? 0 : (size + kPageBytes - 1) / kPageBytes * kPageBytes);
        }
    }
}

TEST(Pool, EqualImagesHaveEqualRootsHoweverTheyAreGiven) {
    TestPool pool;
    auto content = random_bytes(6'000'000, 3);
    std::fill(content.begin() + 1'000'000, content.begin() + 4'000'000, std::byte{0});
    import_image(*pool, "a", content, 6'000'000);
    import_image(*pool, "b", content, 4'097);
    {
        auto import = must(pool->begin_import("c"));  // Zeros left out.
        must(import->append(0, Bytes(content).first(1'000'000)));
        must(import->append(4'000'000, Bytes(content).subspan(4'000'000)));
        must(import->finish(content.size()));
        EXPECT_EQ(import->progress().new_bytes, 0U);
        EXPECT_EQ(import->progress().bytes, 3'000'000U);
    }
    pool.options().background = true;
    pool.options().hash_threads = 3;
    pool.reopen();
    import_image(*pool, "d", content, 333'333);
    const Hash256 root = must(pool->detail("a")).root;
    for (const std::string name : {"b", "c", "d"}) {
        EXPECT_EQ(must(pool->detail(name)).root, root) << name;
        EXPECT_EQ(export_all(*pool, name), content) << name;
    }
    // A volume that comes to hold the same by another way has it too, once it is cut the same.
    must(pool->clone("a", {"v"}));
    EXPECT_EQ(must(pool->detail("v")).root, root);
    size_t ranges = 0;
    must(pool->diff("a", "d", [&](DiffRange) -> Result<void> {
        ++ranges;
        return {};
    }));
    EXPECT_EQ(ranges, 0U);
}

TEST(Pool, ImportRefusesWhatMakesNoSense) {
    TestPool pool;
    const auto data = random_bytes(10'000, 1);
    {
        auto import = must(pool->begin_import("a"));
        must(import->append(5000, data));
        EXPECT_EQ(code_of(import->append(14'999, data)), ErrorCode::kInvalidArgument);
        EXPECT_EQ(code_of(import->append(kMaxVolumeBytes - 1, data)), ErrorCode::kInvalidArgument);
        EXPECT_EQ(code_of(import->finish(14'999)), ErrorCode::kInvalidArgument);
    }
    EXPECT_EQ(code_of(pool->find("a")), ErrorCode::kNotFound) << "an unfinished import has a name";
    auto import = must(pool->begin_import("a"));
    must(import->append(5000, data));
    must(import->finish(15'000));
    EXPECT_FALSE(import->append(20'000, data).has_value());
    EXPECT_FALSE(import->finish(15'000).has_value());
}

TEST(Pool, SparseImagesOfManyTerabytes) {
    TestPool pool;
    const uint64_t size = 15 * kTiB + 511;
    const auto data = random_bytes(10'000, 1);
    auto import = must(pool->begin_import("sparse"));
    must(import->append(123, data));
    must(import->append(size - data.size(), data));
    must(import->finish(size));
    import.reset();
    pool.reopen();
    auto reader = must(pool->open_reader("sparse"));
    EXPECT_EQ(reader->size_bytes(), size);
    const auto first = must(reader->next_data(0));
    ASSERT_TRUE(first.has_value());
    EXPECT_EQ(*first, std::pair(uint64_t{0}, uint64_t{3 * 4096}));
    const auto second = must(reader->next_data(first->second));
    ASSERT_TRUE(second.has_value());
    EXPECT_EQ(second->first + second->second, size);
    EXPECT_FALSE(must(reader->next_data(size)).has_value());
    std::vector<std::byte> back(data.size());
    must(reader->read(size - data.size(), back));
    EXPECT_EQ(back, data);
    must(reader->read(123, back));
    EXPECT_EQ(back, data);
    must(reader->read(7 * kTiB + 5, back));
    EXPECT_EQ(back, std::vector<std::byte>(data.size()));
    EXPECT_EQ(code_of(reader->read(size - 1, back)), ErrorCode::kInvalidArgument);
}

TEST(Pool, AVolumeOf64TiB) {
    TestPool pool;
    must(pool->create_volume("huge", 64 * kTiB));
    const auto data = random_bytes(100'352, 1);
    {
        auto device = must(pool->attach("huge", {}));
        must(write(*device, 0, data));
        must(write(*device, 64 * kTiB - data.size(), data));
        must(flush(*device));
        // A discard of nearly everything costs what is there, not what could be.
        EXPECT_EQ(code_of(device->discard(kMiB, 64 * kTiB - 2 * kMiB, IoMode::kNoWait)),
                  ErrorCode::kWouldBlock);
        must(device->discard(kMiB, 64 * kTiB - 2 * kMiB, IoMode::kMayBlock));
    }
    pool.kill();
    auto device = must(pool->attach("huge", {}));
    EXPECT_EQ(read(*device, 0, data.size()), data);
    EXPECT_EQ(read(*device, 64 * kTiB - data.size(), data.size()), data);
    EXPECT_LE(must(pool->detail("huge")).extents, 100U);
}

// --- Costs, counted ------------------------------------------------------------------------------

uint64_t appended_by(TestPool& pool, const std::function<void()>& what) {
    const uint64_t before = pool->stats().store.appended_bytes;
    what();
    return pool->stats().store.appended_bytes - before;
}

TEST(PoolCost, AThousandClonesAreOneBatchAndSurviveTheProcess) {
    TestPool pool;
    import_image(*pool, "debian", random_bytes(3 * kMiB, 1));
    std::vector<std::string> names;
    for (int i = 0; i < 1000; ++i) {
        names.push_back(fmt::format("{:0>100}", i));
    }
    const auto before = pool.machine().files().counts();
    EXPECT_LE(appended_by(pool, [&] { must(pool->clone("debian", names)); }), 256 * kKiB);
    const auto after = pool.machine().files().counts();
    EXPECT_LE(after.of(io::OperationKind::kDatasync) - before.of(io::OperationKind::kDatasync), 2U);
    pool.kill();
    EXPECT_EQ(pool->volumes().size(), 1000U);

    // In a checkpoint, a clone takes at most 64 bytes beyond its name.
    const uint64_t with_clones = appended_by(pool, [&] { must(pool->checkpoint()); });
    EXPECT_LE(with_clones, 1000 * (64 + 100) + 64 * kKiB);
    pool.reopen();
    EXPECT_EQ(pool->volumes().size(), 1000U);
    EXPECT_EQ(must(pool->find(names[500])).parent, "debian");
}

TEST(PoolCost, ClonesAndSnapshotsCostTheSameWhateverTheyHold) {
    TestPool pool;
    must(pool->create_volume("empty", 64 * kMiB));
    must(pool->create_volume("full", 64 * kMiB));
    {
        auto device = must(pool->attach("full", {}));
        for (uint64_t i = 0; i < 300; ++i) {
            must(write(*device, (i * 7919 % 16384) * 4096, random_bytes(4096, i)));
        }
    }
    const auto cost = [&](const std::string& source, const std::string& suffix) {
        return appended_by(pool, [&] {
            must(pool->clone(source, {source + "-c" + suffix}));
            must(pool->create_snapshot(source, "s" + suffix));
        });
    };
    const uint64_t of_empty = cost("empty", "1");
    EXPECT_EQ(cost("full", "1"), of_empty);
    for (int i = 0; i < 50; ++i) {
        must(pool->create_snapshot("full", fmt::format("more{}", i)));
    }
    EXPECT_EQ(cost("full", "2"), of_empty);
    EXPECT_LE(of_empty, 4 * 4096U);
}

TEST(PoolCost, TheTenThousandthSnapshotReadsLikeTheFirst) {
    constexpr int kDepth = 10'000;
    TestPool pool;
    const auto base = random_bytes(8 * kMiB, 1);
    import_image(*pool, "base", base);
    must(pool->clone("base", {"v0"}));
    auto expected = base;
    for (int i = 1; i <= kDepth; ++i) {
        const std::string parent = fmt::format("v{}", i - 1);
        if (i % 20 == 0) {
            const auto page = random_bytes(4096, static_cast<uint64_t>(i));
            const uint64_t offset = static_cast<uint64_t>(i) * 7919 % 2048 * 4096;
            must(write(*must(pool->attach(parent, {})), offset, page));
            std::copy(page.begin(), page.end(), expected.begin() + static_cast<ptrdiff_t>(offset));
        }
        must(pool->create_snapshot(parent, "s"));
        must(pool->clone(parent + "@s", {fmt::format("v{}", i)}));
        if (i > 1) {
            // The chain's history stays in lineage and content; names make room.
            must(pool->remove({fmt::format("v{}", i - 2)}));
        }
    }
    must(pool->checkpoint());
    const auto reads_of = [&](const std::string& name, const std::vector<std::byte>& content) {
        pool.reopen();  // Nothing cached.
        auto device = must(pool->attach(name, {.read_only = true}));
        const uint64_t before = pool.machine().files().counts().of(io::OperationKind::kRead);
        for (uint64_t i = 0; i < 200; ++i) {
            const uint64_t offset = i * 104'729 % 2048 * 4096;
            const auto data = read(*device, offset, 4096);
            EXPECT_EQ(std::memcmp(data.data(), content.data() + offset, 4096), 0) << name;
        }
        return pool.machine().files().counts().of(io::OperationKind::kRead) - before;
    };
    must(pool->clone("base", {"first"}));
    const uint64_t first = reads_of("first", base);
    const uint64_t last = reads_of(fmt::format("v{}", kDepth), expected);
    // The delta adds its own nodes, one path each; the depth of the chain adds nothing.
    EXPECT_LE(last, first + 100);
}

TEST(PoolCost, RandomWritesCostAtMost256BytesOfMetadata) {
    TestPool::small_options();
    PoolOptions options = TestPool::small_options();
    options.dirty_budget_bytes = 32 * kMiB;
    TestPool pool(1, options);
    const auto base = random_bytes(16 * kMiB, 1);
    import_image(*pool, "base", base);
    must(pool->clone("base", {"vm"}));
    constexpr uint64_t kWrites = 6'000;
    uint64_t data_bytes = 0;
    const uint64_t appended = appended_by(pool, [&] {
        auto device = must(pool->attach("vm", {}));
        for (uint64_t i = 0; i < kWrites; ++i) {
            must(write(*device, i * 7919 % 4096 * 4096, random_bytes(4096, 1000 + i)));
            if (i % 1000 == 999) {
                data_bytes += must(pool->find("vm")).dirty_bytes;
                must(flush(*device));
                must(pool->checkpoint());
            }
        }
    });
    const uint64_t metadata = appended - data_bytes;
    EXPECT_LE(metadata, kWrites * 256) << metadata / kWrites << " bytes for each write";
}

// --- The buffer of writes ------------------------------------------------------------------------

TEST(PoolBuffer, AFullBufferStallsOnlyItsOwnVolume) {
    PoolOptions options = TestPool::small_options();
    options.background = true;
    options.dirty_budget_bytes = 4 * kMiB;
    TestPool pool(1, options);
    must(pool->create_volume("greedy", 64 * kMiB));
    must(pool->create_volume("modest", 64 * kMiB));
    auto greedy = must(pool->attach("greedy", {}));
    auto modest = must(pool->attach("modest", {}));
    // Nothing can be written back.
    const auto space = must(pool.machine().files().space("/pool"));
    pool.machine().files().set_space_limit(space.total_bytes - space.free_bytes);
    uint64_t written = 0;
    Result<void> last;
    while ((last = write(*greedy, written, random_bytes(64 * kKiB, written)))) {
        written += 64 * kKiB;
        ASSERT_LE(written, options.dirty_budget_bytes);
    }
    EXPECT_EQ(last.error().code(), ErrorCode::kNoSpace) << last.error().message();
    EXPECT_EQ(code_of(write(*greedy, written, random_bytes(64 * kKiB, 1), IoMode::kNoWait)),
              ErrorCode::kWouldBlock);
    EXPECT_GE(written, options.dirty_budget_bytes / 4);
    // The other one has room, and everything can be read.
    for (uint64_t offset = 0; offset < 256 * kKiB; offset += 64 * kKiB) {
        must(write(*modest, offset, random_bytes(64 * kKiB, 500 + offset), IoMode::kNoWait));
    }
    EXPECT_EQ(code_of(flush(*modest)), ErrorCode::kNoSpace);
    for (uint64_t offset = 0; offset < written; offset += 64 * kKiB) {
        EXPECT_EQ(read(*greedy, offset, 64 * kKiB), random_bytes(64 * kKiB, offset));
    }
    // With space, everything works again, without a restart.
    pool.machine().files().set_space_limit(uint64_t{1} << 40);
    must(write(*greedy, written, random_bytes(64 * kKiB, written)));
    must(flush(*greedy));
    must(flush(*modest));
    greedy.reset();
    modest.reset();
    pool.reopen();
    EXPECT_EQ(must(pool->find("greedy")).dirty_bytes, 0U);
    auto reader = must(pool->attach("greedy", {.read_only = true}));
    for (uint64_t offset = 0; offset <= written; offset += 64 * kKiB) {
        EXPECT_EQ(read(*reader, offset, 64 * kKiB), random_bytes(64 * kKiB, offset));
    }
}

TEST(PoolBuffer, ARequestThatWouldBlockHasDoneNothing) {
    // A volume may hold half of the 1024 pages, and writes at most a quarter in one piece.
    TestPool pool;
    must(pool->create_volume("vm", 8 * kMiB));
    const auto device = must(pool->attach("vm", {}));
    const auto fill = [&](uint64_t first_page, uint64_t end_page) {
        for (uint64_t page = first_page; page < end_page; ++page) {
            must(write(*device, page * 4096, random_bytes(4096, page), IoMode::kNoWait));
        }
    };
    fill(0, 384);
    EXPECT_EQ(code_of(write(*device, 4 * kMiB + 512, random_bytes(kMiB, 1), IoMode::kNoWait)),
              ErrorCode::kWouldBlock);
    EXPECT_EQ(read(*device, 4 * kMiB, 2 * kMiB), std::vector<std::byte>(2 * kMiB));
    fill(384, 511);
    EXPECT_EQ(code_of(device->discard(510 * 4096 + 512, 2 * 4096 - 512, IoMode::kNoWait)),
              ErrorCode::kWouldBlock);
    EXPECT_EQ(code_of(device->write_zeroes(509 * 4096, 4096 + 512, IoMode::kNoWait)),
              ErrorCode::kWouldBlock);
    for (const uint64_t page : {509U, 510U}) {
        EXPECT_EQ(read(*device, page * 4096, 4096), random_bytes(4096, page));
    }
    // With waiting, and aligned, all of them go ahead.
    must(device->discard(510 * 4096 + 512, 2 * 4096 - 512, IoMode::kMayBlock));
    must(write(*device, 4 * kMiB + 512, random_bytes(kMiB, 1)));
    EXPECT_EQ(read(*device, 4 * kMiB + 512, kMiB), random_bytes(kMiB, 1));
}

TEST(PoolBuffer, OldDirtyPagesAreWrittenBackWithoutAFlush) {
    PoolOptions options = TestPool::small_options();
    options.background = true;
    options.writeback_age = std::chrono::milliseconds(0);
    TestPool pool(1, options);
    must(pool->create_volume("vm", kMiB));
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 4096, random_bytes(8192, 1)));
    while (must(pool->find("vm")).dirty_bytes != 0) {
        std::this_thread::yield();
    }
    EXPECT_EQ(read(*device, 4096, 8192), random_bytes(8192, 1));
    EXPECT_EQ(pool->stats().written_bytes, 8192U);
}

TEST(PoolBuffer, ZerosAreHolesHoweverTheyAreWritten) {
    TestPool pool;
    must(pool->create_volume("vm", 4 * kMiB));
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 0, random_bytes(2 * kMiB + 4096, 1)));
    must(flush(*device));
    must(write(*device, 8192, std::vector<std::byte>(kMiB)));
    must(device->write_zeroes(kMiB + 8192, kMiB, IoMode::kMayBlock));
    must(flush(*device));
    EXPECT_EQ(must(pool->detail("vm")).data_bytes, 2 * 4096U);
}

TEST(Pool, WhatIsMappedIsCountedAgainWhenItHasChanged) {
    TestPool pool;
    const uint64_t id = must(pool->create_volume("vm", 4 * kMiB)).id;
    EXPECT_EQ(must(pool->mapped_bytes(id)), 0U);
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 0, random_bytes(10 * kPageBytes, 1)));
    EXPECT_EQ(must(pool->mapped_bytes(id)), 0U) << "without what is dirty";
    must(flush(*device));
    EXPECT_EQ(must(pool->mapped_bytes(id)), 10 * kPageBytes);
    EXPECT_EQ(must(pool->mapped_bytes(id)), 10 * kPageBytes) << "remembered";
    must(pool->clone("vm", {"clone"}));
    const uint64_t clone = must(pool->find("clone")).id;
    EXPECT_EQ(must(pool->mapped_bytes(clone)), 10 * kPageBytes);
    must(device->discard(0, 3 * kPageBytes, IoMode::kMayBlock));
    must(flush(*device));
    EXPECT_EQ(must(pool->mapped_bytes(id)), 7 * kPageBytes);
    EXPECT_EQ(must(pool->mapped_bytes(clone)), 10 * kPageBytes);
    EXPECT_EQ(must(pool->mapped_bytes(id)), must(pool->detail("vm")).data_bytes);
    device.reset();
    must(pool->resize("vm", 5 * kPageBytes));
    EXPECT_EQ(must(pool->mapped_bytes(id)), 2 * kPageBytes);
    EXPECT_EQ(must(pool->find(id)).name, "vm");
    must(pool->rename("vm", "other"));
    EXPECT_EQ(must(pool->find(id)).name, "other");
    must(pool->remove({"other"}));
    EXPECT_EQ(pool->find(id).error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(pool->mapped_bytes(id).error().code(), ErrorCode::kNotFound);
}

TEST(PoolBuffer, DirtyZerosCostTheirSlotsWhateverTheirLength) {
    TestPool pool;
    must(pool->create_volume("vm", 64 * kMiB));
    auto device = must(pool->attach("vm", {}));
    constexpr uint64_t kLeaves = 8;
    for (uint64_t leaf = 0; leaf < kLeaves; ++leaf) {
        const uint64_t start = leaf * kLeafBytes;
        must(device->discard(start, kLeafBytes / 2, IoMode::kNoWait));
        must(device->write_zeroes(start + kLeafBytes / 4, kLeafBytes / 2, IoMode::kNoWait));
        must(device->discard(start + kLeafBytes / 2, kLeafBytes / 2, IoMode::kNoWait));
    }
    Volume& volume = *dynamic_cast<Device&>(*device).volume();
    EXPECT_EQ(volume.dirty_bytes(), kLeaves * kPageBytes);
    {
        const std::lock_guard lock(volume.entity()->commit_mutex);
        const std::vector<DirtyRun> cut = volume.cut();
        EXPECT_EQ(cut.size(), kLeaves);
        volume.settle(cut, /*committed=*/false);
    }
    // A page in the middle of a leaf's zeros, then zeros again, also over the death of the process.
    const auto data = random_bytes(kPageBytes, 1);
    must(write(*device, kLeafBytes / 2, data));
    must(write(*device, kLeafBytes, data));
    must(device->discard(kLeafBytes, kPageBytes, IoMode::kNoWait));
    EXPECT_EQ(volume.dirty_bytes(), (kLeaves + 1) * kPageBytes);
    pool.machine().kill_process();
    device.reset();
    pool.kill();
    device = must(pool->attach("vm", {}));
    EXPECT_EQ(read(*device, kLeafBytes / 2, kPageBytes), data);
    EXPECT_EQ(read(*device, kLeafBytes, kPageBytes), std::vector<std::byte>(kPageBytes));
    must(flush(*device));
    EXPECT_EQ(must(pool->find("vm")).dirty_bytes, 0U);
    EXPECT_EQ(must(pool->detail("vm")).data_bytes, kPageBytes);
}

TEST(PoolBuffer, AnotherRuntimeDirectoryFindsTheArenaThroughTheLog) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    const auto data = random_bytes(10'240, 1);
    must(write(*must(pool->attach("vm", {})), 0, data));
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 512, data));
    must(device->discard(8192, 4096, IoMode::kMayBlock));
    pool.machine().kill_process();
    device.reset();
    auto expected = data;
    expected.insert(expected.end(), 512, std::byte{0});
    std::copy(data.begin(), data.end(), expected.begin() + 512);
    std::fill(expected.begin() + 8192, expected.end(), std::byte{0});
    // A command that has no runtime directory of its own.
    pool.options().runtime_directory.clear();
    pool.kill();
    EXPECT_EQ(must(pool->find("vm")).dirty_bytes, 0U);
    EXPECT_EQ(read(*must(pool->attach("vm", {})), 0, expected.size()), expected);
    EXPECT_TRUE(must(pool.machine().files().list(TestPool::kRuntime)).empty());
    pool.reopen();
    EXPECT_EQ(read(*must(pool->attach("vm", {})), 0, expected.size()), expected);
    // And a daemon after that starts with an empty one, without complaint.
    pool.close();
    pool.options().runtime_directory = TestPool::kRuntime;
    pool.open();
    EXPECT_TRUE(pool->warnings().empty()) << pool->warnings().front();
    EXPECT_EQ(read(*must(pool->attach("vm", {})), 0, expected.size()), expected);
}

TEST(PoolBuffer, AFlushCoversWhatWasAppendedBeforeTheVolumeWasOpened) {
    const auto data = random_bytes(64 * kPageBytes, 1);
    for (uint64_t seed = 1; seed <= 8; ++seed) {
        SCOPED_TRACE(seed);
        TestPool pool(seed);
        must(pool->create_volume("vm", kMiB));
        auto device = must(pool->attach("vm", {}));
        must(write(*device, 0, data));
        pool.machine().kill_process();
        device.reset();
        pool.kill();
        // Appended, and not synced.
        must(pool->detail("vm"));
        ASSERT_EQ(must(pool->find("vm")).dirty_bytes, 0U);
        ASSERT_LT(pool->stats().store.durable_sequence, pool->stats().store.sequence);
        must(pool->attach("vm", {.read_only = true})).reset();
        device = must(pool->attach("vm", {}));
        must(flush(*device));
        pool.machine().crash(seed);
        device.reset();
        pool.kill();
        EXPECT_TRUE(read(*must(pool->attach("vm", {})), 0, data.size()) == data);
    }
}

TEST(PoolBuffer, WhatBecameCleanIsWrittenBackWhenItIsDirtyAgain) {
    TestPool pool;
    must(pool->create_volume("a", 64 * kMiB));
    must(pool->create_volume("filler", 64 * kMiB));
    auto a = must(pool->attach("a", {}));
    auto filler = must(pool->attach("filler", {}));
    // Twice the buffer: everything that is dirty is written back on the way.
    const auto fill = [&](uint64_t seed) {
        for (uint64_t i = 0; i < 2 * pool.options().dirty_budget_bytes / kMiB; ++i) {
            must(write(*filler, i * kMiB, random_bytes(kMiB, seed + i)));
        }
    };
    must(write(*a, 8 * kMiB, random_bytes(4096, 1)));
    must(a->discard(0, 64 * kMiB, IoMode::kMayBlock));
    EXPECT_EQ(must(pool->find("a")).dirty_bytes, 0U);
    fill(100);
    must(write(*a, 8 * kMiB, random_bytes(4096, 2)));
    fill(200);
    EXPECT_EQ(must(pool->find("a")).dirty_bytes, 0U);
}

TEST(PoolBuffer, ALostArenaIsSaid) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 0, random_bytes(4096, 1)));
    pool.machine().crash(3);
    device.reset();
    pool.kill();
    ASSERT_EQ(pool->warnings().size(), 1U);
    EXPECT_NE(pool->warnings()[0].find("not closed cleanly"), std::string::npos);
    pool.reopen();
    EXPECT_TRUE(pool->warnings().empty());
}

TEST(Pool, ARollbackIsAllOrNothingWhateverIsDirty) {
    const auto of_snapshot = random_bytes(4096, 1);
    const auto flushed = random_bytes(4096, 2);
    const auto dirty = random_bytes(4096, 3);
    uint64_t done = 0;
    for (uint64_t at = 1; at <= 6; ++at) {
        for (const auto side :
             {io::HaltSide::kBefore, io::HaltSide::kInFlight, io::HaltSide::kAfter}) {
            SCOPED_TRACE(fmt::format("halt at {}, side {}", at, static_cast<int>(side)));
            TestPool pool;
            must(pool->create_volume("vm", kMiB));
            auto device = must(pool->attach("vm", {}));
            must(write(*device, 0, of_snapshot));
            must(flush(*device));
            must(pool->create_snapshot("vm", "s"));
            must(write(*device, 0, flushed));
            must(flush(*device));
            must(write(*device, 8192, dirty));
            pool.machine().kill_process();
            device.reset();
            pool.kill();
            EXPECT_EQ(must(pool->find("vm")).dirty_bytes, 4096U);
            pool.machine().files().halt_at_mutation(at, side);
            const bool acknowledged = pool->rollback("vm", "s").has_value();
            done += acknowledged ? 1 : 0;
            pool.machine().kill_process();
            pool.kill();
            const auto reader = must(pool->attach("vm", {.read_only = true}));
            const bool rolled_back = read(*reader, 0, 4096) == of_snapshot;
            EXPECT_TRUE(rolled_back || !acknowledged);
            if (!rolled_back) {
                EXPECT_EQ(read(*reader, 0, 4096), flushed);
            }
            EXPECT_EQ(read(*reader, 8192, 4096),
                      rolled_back ? std::vector<std::byte>(4096) : dirty);
        }
    }
    EXPECT_GT(done, 0U) << "no halt point lies behind the rollback";
}

TEST(Pool, ReadersHoldTheirMoment) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 0, random_bytes(kMiB, 1)));
    auto reader = must(pool->open_reader("vm"));
    must(write(*device, 0, random_bytes(kMiB, 2)));
    must(flush(*device));
    device.reset();
    must(pool->remove({"vm"}));
    std::vector<std::byte> content(kMiB);
    must(reader->read(0, content));
    EXPECT_EQ(content, random_bytes(kMiB, 1));
}

TEST(Pool, AReadOnlyStoreIsReadAndNotChanged) {
    TestPool pool;
    import_image(*pool, "base", random_bytes(5000, 1));
    must(pool->create_volume("vm", kMiB));
    pool.close();
    pool.options().store.read_only = true;
    pool.open();
    EXPECT_TRUE(pool->read_only_reason().has_value());
    EXPECT_EQ(export_all(*pool, "base"), random_bytes(5000, 1));
    EXPECT_EQ(code_of(pool->create_volume("x", 512)), ErrorCode::kReadOnly);
    EXPECT_EQ(code_of(pool->clone("base", {"x"})), ErrorCode::kReadOnly);
    EXPECT_EQ(code_of(pool->begin_import("x")), ErrorCode::kReadOnly);
    EXPECT_EQ(code_of(pool->attach("vm", {})), ErrorCode::kReadOnly);
    EXPECT_EQ(code_of(pool->remove({"vm"})), ErrorCode::kReadOnly);
    EXPECT_FALSE(must(pool->find("vm")).attached);
    pool.close();
}

}  // namespace
}  // namespace stellarium::nova
