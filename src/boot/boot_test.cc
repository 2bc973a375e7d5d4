#include "boot/boot.h"

#include <gtest/gtest.h>

#include "boot/limits.h"
#include "nova/testing/test_pool.h"

namespace stellarium::boot {
namespace {

using nova::testing::code_of;
using nova::testing::import_image;
using nova::testing::must;
using nova::testing::random_bytes;
using nova::testing::TestPool;

constexpr uint64_t kPage = nova::kPageBytes;
constexpr uint64_t kImagePages = 600;

class BootTest : public ::testing::Test {
  protected:
    BootTest() {
        import_image(*test_, "image", random_bytes(kImagePages * kPage, 1));
        must(test_->clone("image", {"vm"}));
    }

    Boot& boot() {
        if (!boot_) {
            boot_ = std::make_unique<Boot>(*test_, *test_.machine().env().clock,
                                           BootOptions{.available_bytes = {}});
        }
        return *boot_;
    }
    void reopen() {
        boot_.reset();
        test_.reopen();
    }

    /// Attaches `source`, and reads these pages while it is recorded.
    void record_boot(const std::string& source, const std::vector<PageRange>& reads) {
        const auto device = must(test_->attach(source, {}));
        must(boot().record(source));
        for (const PageRange& range : reads) {
            nova::testing::read(*device, range.page * kPage, range.pages * kPage);
        }
        must(boot().stop(source, /*discard=*/false));
    }

    TestPool test_;
    std::unique_ptr<Boot> boot_;
};

const std::vector<PageRange> kReads{{.page = 40, .pages = 8}, {.page = 0, .pages = 2}};

TEST_F(BootTest, WhatIsReadBecomesTheManifestOfTheImage) {
    record_boot("vm", kReads);
    const ManifestView view = must(boot().show("image"));
    EXPECT_EQ(view.manifest.prefetch, kReads);
    EXPECT_EQ(view.manifest.merged_traces, 1U);
    EXPECT_EQ(view.images, (std::vector<std::string>{"image"}));
    EXPECT_EQ(view.manifest.size_bytes, kImagePages * kPage);
    ASSERT_EQ(boot().list().size(), 1U);
    EXPECT_EQ(boot().list()[0].manifest, view.manifest);
}

TEST_F(BootTest, ClonesOfClonesInheritItWhateverBecomesOfTheirAncestors) {
    record_boot("vm", kReads);
    must(test_->create_snapshot("vm", "s"));
    must(test_->clone("vm@s", {"child"}));
    must(test_->clone("child", {"grandchild"}));
    {
        // Written to, and folded: its root is another one.
        const auto device = must(test_->attach("grandchild", {}));
        must(nova::testing::write(*device, 0, random_bytes(300 * kPage, 9)));
        must(nova::testing::flush(*device));
    }
    must(test_->checkpoint());
    for (const char* source : {"vm", "vm@s", "child", "grandchild"}) {
        EXPECT_EQ(must(boot().show(source)).manifest.prefetch, kReads) << source;
    }
    must(test_->remove({"image", "vm", "child"}));
    EXPECT_EQ(must(boot().show("grandchild")).manifest.prefetch, kReads);
    EXPECT_TRUE(must(boot().show("grandchild")).images.empty());
    // Through a checkpoint, where no ancestor is left to tell.
    must(test_->checkpoint());
    reopen();
    EXPECT_EQ(must(boot().show("grandchild")).manifest.prefetch, kReads);
    must(test_->clone("grandchild", {"last"}));
    must(test_->remove({"grandchild"}));
    must(test_->checkpoint());
    reopen();
    EXPECT_EQ(must(boot().show("last")).manifest.prefetch, kReads);
    // It goes with the last one.
    must(test_->remove({"last"}));
    EXPECT_TRUE(boot().list().empty());
    EXPECT_TRUE(test_->boot_manifests().empty());
}

TEST_F(BootTest, ItSurvivesRestartsCrashesAndCollections) {
    record_boot("vm", kReads);
    const BootManifest manifest = must(boot().show("vm")).manifest;
    const auto expect_same = [&](const char* what) {
        const auto now = boot().show("vm");
        ASSERT_TRUE(now) << what << ": " << now.error().message();
        EXPECT_EQ(now->manifest, manifest) << what;
    };
    boot_.reset();
    test_.kill();
    expect_same("killed");
    boot_.reset();
    test_.crash(3);
    expect_same("crashed");
    must(test_->gc({}));
    expect_same("collected");
    must(test_->gc({}));
    expect_same("collected again");
    reopen();
    expect_same("opened again");
    // One that takes more than one object.
    BootManifest large = manifest;
    for (uint64_t i = 0; i < 20'000; ++i) {
        large.prefetch.push_back({.page = 2 * i, .pages = 1});
    }
    must(test_->set_boot_manifest(large.root, encode(large)));
    must(test_->gc({}));
    must(test_->gc({}));
    reopen();
    EXPECT_EQ(must(boot().show("vm")).manifest, large);
    must(boot().remove("vm"));
    EXPECT_EQ(code_of(boot().show("image")), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(boot().remove("image")), ErrorCode::kNotFound);
    reopen();
    EXPECT_EQ(code_of(boot().show("image")), ErrorCode::kNotFound);
    // What it took is garbage.
    EXPECT_GT(must(test_->gc({})).dead_chunks, 0U);
}

TEST_F(BootTest, TracesMerge) {
    record_boot("vm", {{.page = 10, .pages = 4}, {.page = 100, .pages = 1}});
    record_boot("vm", {{.page = 10, .pages = 4}, {.page = 200, .pages = 1}});
    record_boot("vm", {{.page = 10, .pages = 4}, {.page = 300, .pages = 1}});
    const BootManifest manifest = must(boot().show("image")).manifest;
    EXPECT_EQ(manifest.merged_traces, 3U);
    EXPECT_EQ(manifest.traces.size(), 3U);
    EXPECT_EQ(manifest.prefetch, (std::vector<PageRange>{{.page = 10, .pages = 4}}));
}

TEST_F(BootTest, ARecordingTakesEveryDeviceAndEndsWithIt) {
    EXPECT_EQ(code_of(boot().record("vm")), ErrorCode::kInvalidArgument) << "it is not attached";
    EXPECT_EQ(code_of(boot().record("nothing")), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(boot().stop("vm", false)), ErrorCode::kNotFound);
    auto device = must(test_->attach("vm", {}));
    const auto second = must(test_->attach("vm", {.read_only = true}));
    nova::testing::read(*device, 0, kPage);  // Before.
    must(boot().record("vm"));
    EXPECT_EQ(code_of(boot().record("vm")), ErrorCode::kBusy);
    EXPECT_EQ(boot().stats().recordings, 1U);
    nova::testing::read(*device, 5 * kPage, kPage);
    nova::testing::read(*second, 7 * kPage, kPage);
    ASSERT_EQ(boot().recordings().size(), 1U);
    EXPECT_EQ(boot().recordings()[0].progress.pages, 2U);
    // A rename does not end it.
    must(test_->rename("vm", "renamed"));
    nova::testing::read(*device, 9 * kPage, kPage);
    EXPECT_EQ(must(boot().stop("renamed", /*discard=*/true)).progress.pages, 3U);
    EXPECT_EQ(code_of(boot().show("image")), ErrorCode::kNotFound) << "it was discarded";
    nova::testing::read(*device, 11 * kPage, kPage);
    EXPECT_TRUE(boot().recordings().empty());
    // Nothing that was read is nothing to store.
    must(boot().record("renamed"));
    EXPECT_EQ(code_of(boot().stop("renamed", false)), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(boot().show("image")), ErrorCode::kNotFound);
    // What was detached meanwhile can be stopped all the same.
    must(boot().record("renamed"));
    nova::testing::read(*device, 20 * kPage, kPage);
    device.reset();
    EXPECT_EQ(must(boot().stop("renamed", false)).progress.pages, 1U);
}

TEST_F(BootTest, RecordingsAreBounded) {
    std::vector<std::string> names;
    for (size_t i = 0; i <= kMaxRecordings; ++i) {
        names.push_back("clone-" + std::to_string(i));
    }
    must(test_->clone("image", names));
    std::vector<std::shared_ptr<BlockDevice>> devices;
    for (size_t i = 0; i <= kMaxRecordings; ++i) {
        devices.push_back(must(test_->attach(names[i], {})));
        if (i < kMaxRecordings) {
            must(boot().record(names[i]));
        }
    }
    EXPECT_EQ(code_of(boot().record(names.back())), ErrorCode::kLimitExceeded);
    must(boot().stop(names.front(), true));
    must(boot().record(names.back()));
}

TEST_F(BootTest, AVolumeWithoutAnImageHasNone) {
    must(test_->create_volume("empty", 10 * kPage));
    const auto device = must(test_->attach("empty", {}));
    const auto refused = boot().record("empty");
    ASSERT_FALSE(refused);
    EXPECT_NE(refused.error().message().find("descends from no image"), std::string::npos);
}

TEST_F(BootTest, KernelInitrdAndHintsBelongToIt) {
    import_image(*test_, "kernel", random_bytes(3 * kPage + 17, 2));
    EXPECT_EQ(code_of(boot().set_files("vm", {.kernel = "vm"})), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(boot().set_files("vm", {.kernel = "nothing"})), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(boot().set_files("vm", {.hints = std::string(kMaxHintsBytes + 1, 'x')})),
              ErrorCode::kInvalidArgument);
    must(boot().set_files("vm", {.kernel = "kernel", .hints = "quiet"}));
    record_boot("vm", kReads);
    must(test_->rename("kernel", "vmlinuz"));
    ManifestView view = must(boot().show("image"));
    EXPECT_EQ(view.kernel_image, "vmlinuz");
    ASSERT_TRUE(view.manifest.kernel);
    EXPECT_EQ(view.manifest.kernel->size_bytes, 3 * kPage + 17);
    EXPECT_EQ(view.manifest.hints, "quiet");
    EXPECT_EQ(view.manifest.prefetch, kReads);
    must(test_->remove({"vmlinuz"}));
    EXPECT_EQ(must(boot().show("image")).kernel_image, "");
    view = must(boot().set_files("image", {.kernel = ""}));
    EXPECT_FALSE(view.manifest.kernel);
    EXPECT_EQ(view.manifest.hints, "quiet");
}

TEST_F(BootTest, PrefetchStagesWhatTheManifestSays) {
    EXPECT_EQ(code_of(boot().prefetch("vm", {})), ErrorCode::kNotFound);
    EXPECT_EQ(must(boot().prefetch("vm", {.all = true})).staged_bytes, kImagePages * kPage);
    record_boot("vm", kReads);
    must(test_->clone("vm", {"clone"}));
    reopen();
    const StageReport report = must(boot().prefetch("clone", {}));
    EXPECT_EQ(report.wanted_bytes, 10 * kPage);
    EXPECT_EQ(report.staged_bytes, 10 * kPage);
    EXPECT_EQ(boot().stats().prefetches, 1U);
    EXPECT_EQ(boot().stats().staged_bytes, 10 * kPage);
    EXPECT_FALSE(boot().stats().staging);
    EXPECT_EQ(code_of(boot().prefetch("clone", {.cancelled = [] { return true; }})),
              ErrorCode::kCancelled);
}

TEST_F(BootTest, AHundredClonesAreStagedOnce) {
    record_boot("vm", kReads);
    std::vector<std::string> names;
    for (int i = 0; i < 100; ++i) {
        names.push_back("clone-" + std::to_string(i));
    }
    must(test_->clone("image", names));
    import_image(*test_, "other", random_bytes(20 * kPage, 8));
    boot_ = std::make_unique<Boot>(*test_, *test_.machine().env().clock,
                                   BootOptions{.background = true, .available_bytes = {}});
    for (const std::string& name : names) {
        boot().attached(name);
    }
    boot().attached("other");    // No manifest.
    boot().attached("nothing");  // Nobody is told.
    // Waits for what is queued before it.
    must(boot().prefetch("vm", {}));
    const BootStats stats = boot().stats();
    EXPECT_EQ(stats.prefetches, 2U);
    EXPECT_EQ(stats.joined, 99U);
    EXPECT_EQ(stats.failures, 0U);
    EXPECT_EQ(stats.waiting, 0U);
    // A new trace makes it worth while again.
    record_boot("vm", {{.page = 99, .pages = 1}});
    boot().attached("clone-1");
    must(boot().prefetch("vm", {}));
    EXPECT_EQ(boot().stats().prefetches, 4U);
    boot().stop_staging();
    EXPECT_EQ(code_of(boot().prefetch("vm", {})), ErrorCode::kCancelled);
    // Switched off, nothing is done by itself.
    boot_ = std::make_unique<Boot>(
        *test_, *test_.machine().env().clock,
        BootOptions{.background = true, .prefetch_attached = false, .available_bytes = {}});
    boot().attached("clone-1");
    must(boot().prefetch("vm", {}));
    EXPECT_EQ(boot().stats().prefetches, 1U);
}

TEST_F(BootTest, ADamagedManifestHoldsUpNothingElse) {
    record_boot("vm", kReads);
    const Hash256 root = must(test_->boot_root("image"));
    // Not one at all: what a newer version writes may be anything.
    must(test_->set_boot_manifest(root, random_bytes(100, 5)));
    EXPECT_EQ(code_of(boot().show("image")), ErrorCode::kCorrupt);
    ASSERT_EQ(boot().list().size(), 1U);
    EXPECT_NE(boot().list()[0].damage, "");
    EXPECT_EQ(code_of(boot().prefetch("vm", {})), ErrorCode::kCorrupt);
    must(boot().remove("image"));
    EXPECT_TRUE(boot().list().empty());
    EXPECT_EQ(code_of(test_->set_boot_manifest(root, std::vector<std::byte>())),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(test_->set_boot_manifest(
                  root, std::vector<std::byte>(nova::kMaxBootManifestBytes + 1))),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of(test_->set_boot_manifest(hash(bytes_of(std::string_view("no image"))),
                                               random_bytes(100, 5))),
              ErrorCode::kNotFound);
}

}  // namespace
}  // namespace stellarium::boot
