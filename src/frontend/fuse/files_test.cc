// Open files over a pool: what is attached for them, what may be cached, any offset and length.
#include "frontend/fuse/files.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "base/test_scale.h"
#include "frontend/fuse/tree.h"
#include "nova/testing/test_pool.h"

namespace stellarium::fuse {
namespace {

using nova::testing::code_of;
using nova::testing::import_image;
using nova::testing::must;
using nova::testing::random_bytes;
using nova::testing::TestPool;

constexpr uint64_t kMiB = uint64_t{1} << 20;

/// A pool, the table that outlives daemons, and the files of the present one.
class FilesTest : public testing::Test {
  protected:
    FilesTest() : memory_(must(OpenTable::create())) { start(); }

    void start() {
        table_ = must(OpenTable::map(UniqueFd(dup(memory_.get()))));
        files_ = std::make_unique<Files>(
            *pool_, *table_,
            FilesOptions{
                .directory = "/mnt",
                .warn = [this](const std::string& text) { warnings_.push_back(text); },
                .resized = [this](uint64_t node) { resized_.push_back(node); },
                .attached = [this](const std::string& source) { attached_.push_back(source); }});
        files_->adopt();
    }
    /// The process dies; the next one adopts.
    void kill() {
        pool_.machine().kill_process();
        files_.reset();
        warnings_.clear();  // What the dead process' devices could not flush.
        pool_.kill();
        start();
    }
    void restart() {
        files_->stop();
        files_.reset();
        pool_.reopen();
        start();
    }

    uint64_t volume(const std::string& name, uint64_t size_bytes) {
        return node_of(must(pool_->create_volume(name, size_bytes)).id);
    }
    Result<Opened> open(uint64_t node, int flags) {
        unique_ += 2;
        return files_->open(node, flags, unique_, false);
    }
    std::vector<std::byte> read(uint64_t node, uint64_t handle, uint64_t offset_bytes,
                                size_t length_bytes) {
        std::vector<std::byte> scratch(length_bytes + 1024);
        const Bytes got = must(files_->read(node, handle, offset_bytes, length_bytes, scratch));
        return {got.begin(), got.end()};
    }

    TestPool pool_;
    const UniqueFd memory_;
    std::unique_ptr<OpenTable> table_;
    std::unique_ptr<Files> files_;
    std::vector<std::string> warnings_;
    std::vector<uint64_t> resized_;
    std::vector<std::string> attached_;
    uint64_t unique_ = 0;
};

TEST_F(FilesTest, WhatAnOpeningAttachesIsToldOf) {
    import_image(*pool_, "debian", random_bytes(kMiB, 3));
    const uint64_t image = node_of(must(pool_->find("debian")).id);
    const uint64_t node = volume("vm", kMiB);
    const uint64_t first = must(open(node, O_RDWR)).handle;
    const uint64_t second = must(open(node, O_RDWR)).handle;
    EXPECT_EQ(attached_, std::vector<std::string>{"vm"});
    EXPECT_EQ(files_->open_names(10), std::vector<std::string>{"volumes/vm"});
    must(open(image, O_RDONLY));
    EXPECT_EQ(attached_, (std::vector<std::string>{"vm", "debian"}));
    // What was open before the daemon died has booted long ago.
    kill();
    EXPECT_EQ(attached_.size(), 2U);
    EXPECT_EQ(files_->open_names(10), (std::vector<std::string>{"images/debian", "volumes/vm"}));
    EXPECT_EQ(files_->open_names(1).size(), 1U);
    files_->release(first);
    files_->release(second);
    EXPECT_EQ(files_->open_names(10), std::vector<std::string>{"images/debian"});
    must(open(node, O_RDONLY));
    EXPECT_EQ(attached_.size(), 3U);
}

TEST_F(FilesTest, WhatWouldHaveToWaitSaysSo) {
    const uint64_t node = volume("vm", kMiB);
    const uint64_t handle = must(open(node, O_RDWR)).handle;
    // Nothing waits here: done at once, whole sectors and parts of them.
    const auto data = random_bytes(8192, 5);
    EXPECT_EQ(must(files_->write(node, 4096, data, IoMode::kNoWait)), data.size());
    EXPECT_EQ(read(node, handle, 4096, 8192), data);
    EXPECT_TRUE(files_->zero(node, 0, 4096, true, IoMode::kNoWait));
    const auto odd = random_bytes(100, 6);
    auto written = files_->write(node, 5000, odd, IoMode::kNoWait);
    if (!written) {
        EXPECT_EQ(code_of(written), ErrorCode::kWouldBlock);
        written = files_->write(node, 5000, odd);
    }
    EXPECT_EQ(must(written), odd.size());
    EXPECT_EQ(read(node, handle, 5000, 100), odd);
    // A buffer without room, for nobody writes it back.
    constexpr uint64_t kMoreThanTheBuffer = 8 * kMiB;
    const uint64_t full = volume("full", kMoreThanTheBuffer);
    const uint64_t full_handle = must(open(full, O_RDWR)).handle;
    uint64_t at = 0;
    Result<size_t> last = size_t{0};
    while (last && at < kMoreThanTheBuffer) {
        last = files_->write(full, at, random_bytes(65536, at + 1), IoMode::kNoWait);
        at += last ? *last : 0;
    }
    ASSERT_FALSE(last) << "the buffer takes everything";
    EXPECT_EQ(code_of(last), ErrorCode::kWouldBlock);
    // Nothing of it has happened.
    EXPECT_EQ(read(full, full_handle, at, 65536), std::vector<std::byte>(65536));
}

TEST_F(FilesTest, AnyOffsetAndLengthIsReadAndWritten) {
    constexpr uint64_t kSize = 64 * 1024;
    const uint64_t node = volume("vm", kSize);
    const uint64_t handle = must(open(node, O_RDWR)).handle;
    std::vector<std::byte> shadow(kSize);
    const uint64_t seed = first_seed();
    std::mt19937_64 engine(seed);
    const auto below = [&](uint64_t end) { return engine() % end; };
    for (uint64_t step = 0; step < scaled(600, 150); ++step) {
        const uint64_t at = below(kSize);
        const uint64_t length = std::min(kSize - at, 1 + below(3000));
        switch (below(4)) {
            case 0:
            case 1: {
                const auto data = random_bytes(length, step);
                ASSERT_EQ(must(files_->write(node, at, data)), length);
                std::ranges::copy(data, shadow.begin() + static_cast<std::ptrdiff_t>(at));
                break;
            }
            case 2:
                must(files_->zero(node, at, length, below(2) == 0));
                std::fill_n(shadow.begin() + static_cast<std::ptrdiff_t>(at), length, std::byte{0});
                break;
            default:
                ASSERT_TRUE(std::ranges::equal(read(node, handle, at, length),
                                               Bytes(shadow).subspan(at, length)))
                    << "seed " << seed << ", step " << step;
        }
        if (step % 150 == 149) {
            kill();
        }
    }
    EXPECT_EQ(read(node, handle, 0, kSize + 5), shadow) << "seed " << seed;
    EXPECT_TRUE(read(node, handle, kSize, 10).empty());
    EXPECT_EQ(code_of(files_->write(node, kSize, random_bytes(1, 1))), ErrorCode::kNoSpace);
    EXPECT_EQ(must(files_->write(node, kSize - 3, random_bytes(10, 1))), 3U);
    EXPECT_EQ(code_of(files_->zero(node, kSize - 3, 4, false)), ErrorCode::kNoSpace);
    EXPECT_TRUE(files_->zero(node, kSize - 3, 4, true));
    EXPECT_TRUE(files_->check_within(node, 0, kSize));
    EXPECT_EQ(code_of(files_->check_within(node, 1, kSize)), ErrorCode::kNoSpace);
}

TEST_F(FilesTest, AVolumeIsCachedOnlyWhileItIsHeld) {
    const uint64_t node = volume("vm", kMiB);
    const Opened looking = must(open(node, O_RDONLY));
    EXPECT_TRUE(looking.direct) << "others may write";
    const Opened writing = must(open(node, O_RDWR));
    EXPECT_FALSE(writing.direct);
    EXPECT_FALSE(writing.keep_cache) << "pages of before the hold go";
    const Opened second = must(open(node, O_RDONLY));
    EXPECT_FALSE(second.direct);
    EXPECT_TRUE(second.keep_cache);
    const Opened direct = must(open(node, O_RDWR | O_DIRECT));
    EXPECT_TRUE(direct.direct);
    EXPECT_TRUE(direct.keep_cache) << "others' pages stay";
    files_->release(writing.handle);
    files_->release(direct.handle);
    EXPECT_EQ(code_of(pool_->attach("vm", {})), ErrorCode::kBusy) << "its pages can be seen";
    files_->release(second.handle);
    EXPECT_TRUE(must(pool_->attach("vm", {}))) << "a reader past the cache is in nobody's way";
    EXPECT_EQ(read(node, looking.handle, 0, 10).size(), 10U);
    EXPECT_EQ(code_of(files_->write(node, 0, random_bytes(1, 1))), ErrorCode::kReadOnly);
    EXPECT_FALSE(must(open(node, O_WRONLY)).keep_cache) << "somebody may have written since";
    files_->release(looking.handle);
    files_->release(looking.handle);
    EXPECT_EQ(files_->open_files(), 1U);
}

TEST_F(FilesTest, OneFrontendWritesAtATime) {
    const uint64_t node = volume("vm", kMiB);
    {
        const auto device = must(pool_->attach("vm", {.label = "another frontend"}));
        EXPECT_EQ(code_of(open(node, O_RDWR)), ErrorCode::kBusy);
        ASSERT_EQ(warnings_.size(), 1U);
        EXPECT_NE(warnings_[0].find("another frontend"), std::string::npos) << warnings_[0];
        const uint64_t handle = must(open(node, O_RDONLY)).handle;
        const auto data = random_bytes(512, 1);
        must(nova::testing::write(*device, 512, data));
        EXPECT_EQ(read(node, handle, 512, 512), data);
        files_->release(handle);
    }
    // One on record counts, also when nobody has it now.
    must(pool_->set_attachment(
        "vm", nova::Pool::AttachmentRecord{.source = "vm", .label = "on record", .options = {}}));
    EXPECT_EQ(code_of(open(node, O_RDWR)), ErrorCode::kBusy);
    must(pool_->set_attachment("vm", std::nullopt));
    EXPECT_EQ(table_->count(), 0U) << "what failed is not open";
    EXPECT_TRUE(open(node, O_RDWR));
    EXPECT_EQ(code_of(pool_->remove({"vm"})), ErrorCode::kBusy);
}

TEST_F(FilesTest, TheEndOfAHoldIsDurable) {
    const uint64_t node = volume("vm", kMiB);
    const auto data = random_bytes(700, 1);
    const uint64_t handle = must(open(node, O_RDWR)).handle;
    must(files_->write(node, 100, data));
    files_->release(handle);
    files_->stop();
    files_.reset();
    pool_.crash(1);
    start();
    EXPECT_EQ(read(node, must(open(node, O_RDONLY)).handle, 100, 700), data);
}

TEST_F(FilesTest, OpenFilesLiveOnInTheNextProcess) {
    const uint64_t written = volume("written", kMiB);
    const uint64_t image = node_of(import_image(*pool_, "image", random_bytes(10'001, 2)).id);
    const Opened writing = must(open(written, O_RDWR));
    const uint64_t unique = unique_;
    const Opened reading = must(open(image, O_RDONLY));
    const auto data = random_bytes(3'333, 3);
    must(files_->write(written, 77, data));
    for (const bool planned : {false, true, false}) {
        planned ? restart() : kill();
        EXPECT_TRUE(warnings_.empty()) << warnings_[0];
        EXPECT_EQ(code_of(pool_->attach("written", {})), ErrorCode::kBusy)
            << "attached before anybody else can be";
        EXPECT_EQ(read(written, writing.handle, 77, data.size()), data);
        EXPECT_EQ(read(image, reading.handle, 0, 20'000), random_bytes(10'001, 2));
        const Opened again = must(files_->open(written, O_RDWR, unique, true));
        EXPECT_EQ(again.handle, writing.handle) << "the opening whose answer was lost";
        EXPECT_FALSE(again.keep_cache);
        EXPECT_EQ(files_->open_files(), 2U);
    }
    files_->release(writing.handle);
    const Opened next = must(open(written, O_RDWR));
    files_->release(writing.handle);
    EXPECT_EQ(must(files_->write(written, 0, data)), data.size()) << "a late repeat closes nothing";
    files_->release(next.handle);
    files_->release(reading.handle);
    EXPECT_EQ(files_->open_files(), 0U);
    EXPECT_TRUE(pool_->remove({"written", "image"}));
}

TEST_F(FilesTest, WhatCannotBeAttachedAgainFailsAlone) {
    const uint64_t good = volume("good", kMiB);
    const uint64_t bad = volume("bad", kMiB);
    const uint64_t good_handle = must(open(good, O_RDWR)).handle;
    const uint64_t bad_handle = must(open(bad, O_RDWR)).handle;
    files_->stop();
    files_.reset();
    must(pool_->remove({"bad"}));  // By a command, while no daemon ran.
    start();
    ASSERT_EQ(warnings_.size(), 1U);
    EXPECT_EQ(code_of(files_->write(bad, 0, random_bytes(512, 1))), ErrorCode::kNotFound);
    std::vector<std::byte> scratch(2'000);
    EXPECT_FALSE(files_->read(bad, bad_handle, 0, 100, scratch));
    Result<void> flushed;
    files_->flush_async(bad, [&](Result<void> result) { flushed = std::move(result); });
    EXPECT_FALSE(flushed) << "what was written before is not durable";
    EXPECT_TRUE(files_->write(good, 0, random_bytes(512, 1)));
    files_->release(bad_handle);
    files_->release(good_handle);
    EXPECT_EQ(files_->open_files(), 0U);
}

TEST_F(FilesTest, ImagesEndWhereTheyEndAndKnowTheirHoles) {
    std::vector<std::byte> content(40'000);
    const auto data = random_bytes(5'000, 1);
    std::ranges::copy(data, content.begin() + 8'192);
    content.back() = std::byte{1};
    const uint64_t node = node_of(import_image(*pool_, "image", content).id);
    EXPECT_EQ(code_of(open(node, O_RDWR)), ErrorCode::kReadOnly);
    const Opened opened = must(open(node, O_RDONLY));
    EXPECT_FALSE(opened.direct);
    EXPECT_TRUE(opened.keep_cache) << "from one opening to the next";
    EXPECT_TRUE(must(open(node, O_RDONLY | O_DIRECT)).direct);
    EXPECT_EQ(read(node, opened.handle, 0, 100'000), content);
    EXPECT_EQ(read(node, opened.handle, 39'999, 600).size(), 1U);
    using Found = std::optional<uint64_t>;
    EXPECT_EQ(must(files_->seek(node, 0, true)), Found(8'192));
    EXPECT_EQ(must(files_->seek(node, 0, false)), Found(0));
    EXPECT_EQ(must(files_->seek(node, 9'000, true)), Found(9'000));
    EXPECT_EQ(must(files_->seek(node, 9'000, false)), Found(16'384));
    EXPECT_EQ(must(files_->seek(node, 16'384, true)), Found(36'864));
    EXPECT_EQ(must(files_->seek(node, 39'000, false)), Found(40'000));
    EXPECT_EQ(must(files_->seek(node, 40'000, true)), Found());
    const uint64_t empty = volume("vm", kMiB);
    must(open(empty, O_RDONLY));
    EXPECT_EQ(must(files_->seek(empty, 5, true)), Found(5)) << "everything is data";
    EXPECT_EQ(must(files_->seek(empty, 5, false)), Found(kMiB));
}

TEST_F(FilesTest, AVolumeThatGrowsIsSaidToHaveGrown) {
    const uint64_t node = volume("vm", kMiB);
    must(open(node, O_RDWR));
    must(pool_->resize("vm", 2 * kMiB));
    EXPECT_EQ(resized_, std::vector<uint64_t>{node});
    EXPECT_EQ(must(files_->write(node, 2 * kMiB - 512, random_bytes(512, 1))), 512U);
}

TEST_F(FilesTest, FoldersListWhatThereIs) {
    Tree tree(*pool_, {.uid = 7, .gid = 8, .for_group = true});
    const uint64_t node = volume("vm", kMiB);
    must(pool_->create_snapshot("vm", "first"));
    EXPECT_EQ(must(tree.lookup(kRoot, "volumes")).attributes.st_ino, kVolumesFolder);
    EXPECT_EQ(code_of(tree.lookup(kRoot, "vm")), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(tree.lookup(kImagesFolder, "vm")), ErrorCode::kNotFound);
    const NodeStat found = must(tree.lookup(kVolumesFolder, "vm"));
    EXPECT_EQ(found.attributes.st_ino, node);
    EXPECT_EQ(found.attributes.st_mode, mode_t{S_IFREG | 0660});
    EXPECT_EQ(found.attributes.st_uid, 7U);
    EXPECT_FALSE(found.immutable);
    const NodeStat snapshot = must(tree.lookup(kSnapshotsFolder, "vm@first"));
    EXPECT_EQ(snapshot.attributes.st_mode, mode_t{S_IFREG | 0440});
    EXPECT_TRUE(snapshot.immutable);
    EXPECT_EQ(must(tree.stat(node)).attributes.st_size, static_cast<off_t>(kMiB));
    EXPECT_EQ(must(tree.list(kRoot, 1))->size(), 4U);
    const auto before = must(tree.list(kVolumesFolder, 2));
    ASSERT_EQ(before->size(), 1U);
    EXPECT_EQ(before->front().name, "vm");
    const uint64_t later = volume("another", kMiB);
    EXPECT_EQ(must(tree.list(kVolumesFolder, 2))->size(), 1U) << "kept for its reader";
    tree.forget(2);
    const auto now = must(tree.list(kVolumesFolder, 2));
    ASSERT_EQ(now->size(), 2U);
    EXPECT_EQ(now->back().node, later) << "in the order of nodes, not of names";
    EXPECT_EQ(must(tree.list(kSnapshotsFolder, 2))->front().name, "vm@first");
    for (uint64_t handle = 10; handle < 10 + 2 * kMaxListings; ++handle) {
        must(tree.list(kVolumesFolder, handle));
    }
    EXPECT_EQ(code_of(tree.list(node, 3)), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(tree.stat(node_of(999))), ErrorCode::kNotFound);
}

}  // namespace
}  // namespace stellarium::fuse
