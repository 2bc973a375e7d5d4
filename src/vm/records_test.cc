// Folders of machines, processes, and where a store is mounted.
#include "vm/records.h"

#include <algorithm>
#include <filesystem>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/files.h"
#include "vm/machine.h"

namespace stellarium::vm {
namespace {

using std::chrono::milliseconds;

/// A folder of the test's own, which is gone at its end.
class RecordsTest : public testing::Test {
  protected:
    void SetUp() override {
        std::string pattern = (std::filesystem::temp_directory_path() / "vm-XXXXXX").string();
        ASSERT_NE(mkdtemp(pattern.data()), nullptr);
        root = pattern;
    }
    void TearDown() override { std::filesystem::remove_all(root); }
    std::string root;
};

MachineRecord sample_record() {
    return {.name = "web",
            .config = {.memory_bytes = uint64_t{64} << 20, .cpus = 1, .accelerator = "tcg"},
            .process = {.pid = 12, .start_ticks = 34},
            .restored_from = "first@warm",
            .base = "first-base.warm",
            .pending = "next",
            .resume = true};
}

TEST_F(RecordsTest, ARecordIsKeptAndTheFolderGoes) {
    auto folder = MachineFolder::make(root + "/vm", "web", milliseconds(0));
    ASSERT_TRUE(folder) << folder.error().message();
    EXPECT_EQ(folder->read().error().code(), ErrorCode::kNotFound);
    EXPECT_TRUE(machine_names(root + "/vm").value_or(std::vector<std::string>{"?"}).empty());
    ASSERT_TRUE(folder->write(sample_record()));
    EXPECT_EQ(folder->read().value_or(MachineRecord()), sample_record());
    EXPECT_EQ(peek_record(root + "/vm", "web").value_or(MachineRecord()), sample_record());
    EXPECT_EQ(machine_names(root + "/vm").value_or(std::vector<std::string>()),
              std::vector<std::string>{"web"});
    ASSERT_TRUE(folder->remove());
    EXPECT_EQ(MachineFolder::open(root + "/vm", "web", milliseconds(0)).error().code(),
              ErrorCode::kNotFound);
}

TEST_F(RecordsTest, OneCommandAtATime) {
    auto folder = MachineFolder::make(root, "web", milliseconds(0));
    ASSERT_TRUE(folder);
    ASSERT_TRUE(folder->write(sample_record()));
    EXPECT_EQ(MachineFolder::open(root, "web", milliseconds(30)).error().code(), ErrorCode::kBusy);
    *folder = MachineFolder();
    EXPECT_TRUE(MachineFolder::open(root, "web", milliseconds(0)));
}

TEST_F(RecordsTest, NamesAreNoPaths) {
    for (const std::string name : {"", ".", "..", "a/b", "a b", "a@b", "ä"}) {
        EXPECT_EQ(MachineFolder::make(root, name, milliseconds(0)).error().code(),
                  ErrorCode::kInvalidArgument)
            << name;
    }
    EXPECT_FALSE(check_machine_name(std::string(kMaxMachineName + 1, 'a')));
    EXPECT_TRUE(check_machine_name(std::string(kMaxMachineName, 'a')));
    EXPECT_FALSE(check_snapshot_name(std::string(kMaxMachineSnapshotName + 1, 'a')));
}

TEST(Process, IsKnownByItsNumberAndItsStart) {
    const auto ours = identify(getpid());
    ASSERT_TRUE(ours);
    EXPECT_TRUE(is_alive(*ours));
    EXPECT_FALSE(is_alive({.pid = ours->pid, .start_ticks = ours->start_ticks + 1}));
    EXPECT_FALSE(is_alive({}));
    const pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    siginfo_t info{};
    ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
    EXPECT_EQ(identify(child).error().code(), ErrorCode::kNotFound) << "a zombie runs no more";
    ASSERT_EQ(waitpid(child, nullptr, 0), child);
}

TEST_F(RecordsTest, TheMountOfAStoreIsFound) {
    std::filesystem::create_directory(root + "/po ol");
    const std::string source = root + "/po\\040ol";
    const std::string info = fmt::format(
        "25 1 8:1 / / rw - ext4 /dev/vda1 rw\n"
        "60 25 0:50 / /srv/other rw,nosuid shared:3 - fuse.stellarium /srv/other-pool rw\n"
        "61 25 0:51 / /srv/my\\040disks rw,nosuid shared:4 master:1 - fuse.stellarium {} rw\n"
        "62 25 0:52 / /srv/sshfs rw - fuse.sshfs {} rw\n",
        source, source);
    EXPECT_EQ(find_files(root + "/po ol", info).value_or("?"), "/srv/my disks");
    EXPECT_EQ(find_files(root + "/elsewhere", info).error().code(), ErrorCode::kUnavailable);
    EXPECT_EQ(find_files(root + "/po ol", "").error().code(), ErrorCode::kUnavailable);
}

TEST(QemuArguments, ACloneMapsItsRamPrivately) {
    Launch launch{.name = "a,b",
                  .config = {.memory_bytes = uint64_t{64} << 20, .cpus = 3, .accelerator = "tcg"},
                  .disk = "/srv/di,sks/web-disk",
                  .ram_file = "/srv/ram",
                  .incoming_fd = 9};
    const auto has = [](const std::vector<std::string>& words, const std::string& word) {
        return std::ranges::find(words, word) != words.end();
    };
    std::vector<std::string> words = qemu_arguments(launch);
    EXPECT_TRUE(has(words, "memory-backend-file,id=ram,size=67108864,share=off,mem-path=/srv/ram"));
    EXPECT_TRUE(has(words, "a,,b"));
    EXPECT_TRUE(has(words,
                    "if=none,id=disk,format=raw,cache=none,discard=unmap,"
                    "file=/srv/di,,sks/web-disk"));
    EXPECT_TRUE(has(words, "fd:3"));
    EXPECT_TRUE(has(words, "-S"));
    EXPECT_FALSE(has(words, "-kernel"));
    launch.ram_file.clear();
    launch.incoming_fd = -1;
    words = qemu_arguments(launch);
    EXPECT_TRUE(has(words, "memory-backend-ram,id=ram,size=67108864"));
    EXPECT_FALSE(has(words, "-incoming"));
    EXPECT_FALSE(has(words, "-S"));
}

}  // namespace
}  // namespace stellarium::vm
