// Names and numbers of a mounted directory; /boot above all, whose files are names of images.
#include "frontend/fuse/tree.h"

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "nova/testing/test_pool.h"

namespace stellarium::fuse {
namespace {

using nova::testing::code_of;
using nova::testing::import_image;
using nova::testing::must;
using nova::testing::random_bytes;
using nova::testing::TestPool;

class TreeTest : public testing::Test {
  protected:
    TreeTest() {
        import_image(*pool_, "debian", random_bytes(100'000, 1));
        import_image(*pool_, "debian.vmlinuz", random_bytes(50'001, 2));
        import_image(*pool_, "debian.initrd", random_bytes(70'003, 3));
        must(pool_->clone("debian", std::vector<std::string>{"vm-1", "vm-2"}));
        must(pool_->create_snapshot("vm-1", "first"));
    }

    uint64_t node(std::string_view source) { return node_of(must(pool_->find(source)).id); }
    std::vector<std::string> names(uint64_t folder) {
        std::vector<std::string> names;
        for (const Entry& entry : *must(tree_.list(folder, ++handle_))) {
            names.push_back(entry.name);
            EXPECT_EQ(must(tree_.lookup(folder, entry.name)).attributes.st_ino, entry.node);
        }
        std::ranges::sort(names);
        return names;
    }

    TestPool pool_;
    std::map<std::string, BootImages, std::less<>> boots_;
    Tree tree_{*pool_,
               {.uid = 1,
                .gid = 2,
                .boots = {.images = [this](std::string_view source) -> Result<BootImages> {
                              const auto found = boots_.find(source);
                              if (found == boots_.end()) {
                                  return fail(ErrorCode::kNotFound, "there is no manifest");
                              }
                              return found->second;
                          },
                          .all =
                              [this] {
                                  std::vector<nova::EntityInfo> infos;
                                  for (const auto& [source, images] : boots_) {
                                      infos.push_back(must(pool_->find(source)));
                                  }
                                  return infos;
                              }}}};
    uint64_t handle_ = 0;
};

TEST_F(TreeTest, FoldersHaveTheirNames) {
    EXPECT_EQ(names(kRoot), (std::vector<std::string>{"boot", "images", "snapshots", "volumes"}));
    EXPECT_EQ(names(kVolumesFolder), (std::vector<std::string>{"vm-1", "vm-2"}));
    EXPECT_EQ(names(kSnapshotsFolder), std::vector<std::string>{"vm-1@first"});
    EXPECT_TRUE(names(kBootFolder).empty());
    EXPECT_EQ(path_of(must(pool_->find("vm-1@first"))), "snapshots/vm-1@first");
    EXPECT_EQ(code_of(tree_.lookup(kBootFolder, "vm-1")), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(tree_.list(kFirstFile - 1, 1)), ErrorCode::kNotFound);
}

TEST_F(TreeTest, KernelAndInitrdAreTheImagesThatHoldThem) {
    boots_["debian"] = boots_["vm-1"] = {.kernel = "debian.vmlinuz", .initrd = "debian.initrd"};
    boots_["vm-2"] = {.kernel = "debian.vmlinuz", .initrd = ""};
    EXPECT_EQ(names(kBootFolder), (std::vector<std::string>{"debian", "vm-1", "vm-2"}));
    const uint64_t folder = must(tree_.lookup(kBootFolder, "vm-1")).attributes.st_ino;
    EXPECT_TRUE(is_folder(folder));
    EXPECT_EQ(entity_of(folder), must(pool_->find("vm-1")).id);
    EXPECT_EQ(names(folder), (std::vector<std::string>{"initrd", "vmlinuz"}));
    const NodeStat kernel = must(tree_.lookup(folder, "vmlinuz"));
    EXPECT_EQ(kernel.attributes.st_ino, node("debian.vmlinuz")) << "one file, and its pages once";
    EXPECT_EQ(kernel.attributes.st_size, 50'001);
    EXPECT_TRUE(kernel.immutable);
    EXPECT_EQ(must(tree_.lookup(folder, "initrd")).attributes.st_ino, node("debian.initrd"));
    EXPECT_EQ(code_of(tree_.lookup(folder, "config")), ErrorCode::kNotFound);
    EXPECT_TRUE(S_ISDIR(must(tree_.stat(folder)).attributes.st_mode));
    EXPECT_FALSE(must(tree_.stat(folder)).immutable) << "its name can be given to another";
    EXPECT_EQ(names(must(tree_.lookup(kBootFolder, "vm-2")).attributes.st_ino),
              std::vector<std::string>{"vmlinuz"});
}

TEST_F(TreeTest, WhatIsRemovedIsNotThere) {
    boots_["vm-1"] = {.kernel = "debian.vmlinuz", .initrd = "debian.initrd"};
    const uint64_t folder = must(tree_.lookup(kBootFolder, "vm-1")).attributes.st_ino;
    must(pool_->remove({"debian.initrd"}));
    EXPECT_EQ(names(folder), std::vector<std::string>{"vmlinuz"});
    EXPECT_EQ(code_of(tree_.lookup(folder, "initrd")), ErrorCode::kNotFound);
    boots_.clear();
    EXPECT_EQ(code_of(tree_.lookup(kBootFolder, "vm-1")), ErrorCode::kNotFound);
    EXPECT_TRUE(names(folder).empty());
    must(pool_->remove({"vm-1"}));
    EXPECT_EQ(code_of(tree_.stat(folder)), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(tree_.lookup(folder, "vmlinuz")), ErrorCode::kNotFound);
    // A snapshot is no machine's disk.
    boots_["vm-2"] = {.kernel = "debian.vmlinuz", .initrd = ""};
    must(pool_->create_snapshot("vm-2", "first"));
    boots_["vm-2@first"] = boots_["vm-2"];
    EXPECT_EQ(code_of(tree_.lookup(kBootFolder, "vm-2@first")), ErrorCode::kNotFound);
}

}  // namespace
}  // namespace stellarium::fuse
