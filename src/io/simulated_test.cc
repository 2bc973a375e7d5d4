// That the simulated machine loses what it may lose, keeps what it must keep, and that each kind
// of loss does happen over the seeds. A test that says "seen" over many seeds guards the power of
// every crash test built on this.
#include "io/simulated.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "io/test_support.h"

namespace stellarium::io {
namespace {

constexpr uint64_t kSeeds = 400;
constexpr size_t kSectorBytes = 512;
constexpr size_t kPageBytes = 4'096;

using FileSystemPtr = std::unique_ptr<SimulatedFileSystem>;

std::unique_ptr<File> open_file(SimulatedFileSystem& files, const std::string& path,
                                OpenMode mode = OpenMode::kCreate) {
    auto file = files.open(path, mode);
    EXPECT_TRUE(file) << file.error().message();
    return file ? std::move(*file) : nullptr;
}

/// The bytes of a file, or nothing when there is no such name.
std::optional<std::vector<std::byte>> bytes_at(SimulatedFileSystem& files,
                                               const std::string& path) {
    if (!files.exists(path).value()) {
        return std::nullopt;
    }
    return contents(*open_file(files, path, OpenMode::kReadOnly));
}

/// The same for a name that must be there.
std::vector<std::byte> present_bytes(SimulatedFileSystem& files, const std::string& path) {
    auto bytes = bytes_at(files, path);
    EXPECT_TRUE(bytes) << path << " is gone";
    return std::move(bytes).value_or(std::vector<std::byte>());
}

/// A durable file with these bytes.
void make_durable(SimulatedFileSystem& files, const std::string& path, Bytes bytes) {
    const auto file = open_file(files, path, OpenMode::kCreate);
    STELLARIUM_ASSERT_OK(write_all(*file, bytes, 0));
    STELLARIUM_ASSERT_OK(file->datasync());
    STELLARIUM_ASSERT_OK(files.sync_directory("/"));
}

class SimulatedTest : public testing::Test {
  protected:
    SimulatedFileSystem files_;
};

// ---- Crashes: file content ----------------------------------------------------------------------

TEST_F(SimulatedTest, SyncedBytesAlwaysSurvive) {
    make_durable(files_, "/a", pattern(100'000, 1));
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(5'000, 2), 200'000));
    STELLARIUM_ASSERT_OK(file->punch_hole(8'192, 4'096));
    STELLARIUM_ASSERT_OK(file->truncate(150'000));
    STELLARIUM_ASSERT_OK(file->datasync());
    const auto expected = contents(*file);
    EXPECT_EQ(files_.unsynced_effects(), 0U);
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        ASSERT_EQ(bytes_at(*files_.crashed_copy(seed), "/a"), expected) << "seed " << seed;
    }
}

TEST_F(SimulatedTest, UnsyncedOverwritesAreTornInSectorsAndMayBeScrambled) {
    constexpr size_t kSectors = 16;
    const auto before = filled(kSectors * kSectorBytes, 1);
    make_durable(files_, "/a", before);
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, filled(kSectors * kSectorBytes, 2), 0));
    std::array<int, kSectors> old_seen{};
    std::array<int, kSectors> new_seen{};
    int garbage_seen = 0;
    int all_old = 0;
    int all_new = 0;
    int mixed = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const auto after = present_bytes(*files_.crashed_copy(seed), "/a");
        ASSERT_EQ(after.size(), before.size()) << "an overwrite changes no size; seed " << seed;
        size_t olds = 0;
        size_t news = 0;
        for (size_t i = 0; i < kSectors; ++i) {
            const Bytes sector = Bytes(after).subspan(i * kSectorBytes, kSectorBytes);
            const auto is = [&](uint8_t value) {
                return std::ranges::all_of(
                    sector, [&](std::byte byte) { return byte == std::byte{value}; });
            };
            if (is(1)) {
                ++old_seen[i];
                ++olds;
            } else if (is(2)) {
                ++new_seen[i];
                ++news;
            } else {
                ++garbage_seen;
            }
        }
        all_old += olds == kSectors ? 1 : 0;
        all_new += news == kSectors ? 1 : 0;
        mixed += olds > 0 && news > 0 ? 1 : 0;
    }
    for (size_t i = 0; i < kSectors; ++i) {
        EXPECT_GT(old_seen[i], 0) << "sector " << i;
        EXPECT_GT(new_seen[i], 0) << "sector " << i;
    }
    EXPECT_GT(garbage_seen, 0);
    EXPECT_GT(all_old, 0);
    EXPECT_GT(all_new, 0);
    EXPECT_GT(mixed, 0);
}

TEST_F(SimulatedTest, OnlyUnsyncedSectorsAreEverTouched) {
    const auto before = pattern(64 * kSectorBytes, 1);
    make_durable(files_, "/a", before);
    const auto file = open_file(files_, "/a");
    // Sectors 10 to 12, the last of them in part.
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(2 * kSectorBytes + 10, 2), 10 * kSectorBytes));
    bool neighbour_in_sector_damaged = false;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const auto after = present_bytes(*files_.crashed_copy(seed), "/a");
        ASSERT_EQ(std::memcmp(after.data(), before.data(), 10 * kSectorBytes), 0) << seed;
        ASSERT_EQ(std::memcmp(after.data() + 13 * kSectorBytes, before.data() + 13 * kSectorBytes,
                              51 * kSectorBytes),
                  0)
            << seed;
        neighbour_in_sector_damaged |=
            std::memcmp(after.data() + 12 * kSectorBytes + 10,
                        before.data() + 12 * kSectorBytes + 10, kSectorBytes - 10) != 0;
    }
    EXPECT_TRUE(neighbour_in_sector_damaged) << "a torn sector is lost as a whole";
}

TEST_F(SimulatedTest, UnsyncedWritesAreReordered) {
    make_durable(files_, "/a", filled(3 * kSectorBytes, 0));
    const auto file = open_file(files_, "/a");
    for (uint8_t i = 1; i <= 3; ++i) {
        STELLARIUM_ASSERT_OK(
            write_all(*file, filled(kSectorBytes, i), (i - 1U) * uint64_t{kSectorBytes}));
    }
    std::set<unsigned> outcomes;  // Bit i: the write of sector i survived.
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const auto after = present_bytes(*files_.crashed_copy(seed), "/a");
        unsigned outcome = 0;
        for (size_t i = 0; i < 3; ++i) {
            outcome |= (after[i * kSectorBytes + 100] == static_cast<std::byte>(i + 1) ? 1U : 0U)
                       << i;
        }
        outcomes.insert(outcome);
    }
    EXPECT_EQ(outcomes.size(), 8U) << "any subset of three writes may survive";
}

TEST_F(SimulatedTest, AnOlderVersionOfASectorMaySurviveANewerOne) {
    make_durable(files_, "/a", filled(kSectorBytes, 0));
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, filled(kSectorBytes, 1), 0));
    STELLARIUM_ASSERT_OK(write_all(*file, filled(kSectorBytes, 2), 0));
    std::map<std::byte, int> seen;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        ++seen[present_bytes(*files_.crashed_copy(seed), "/a")[300]];
    }
    EXPECT_GT(seen[std::byte{0}], 0);
    EXPECT_GT(seen[std::byte{1}], 0);
    EXPECT_GT(seen[std::byte{2}], 0);
}

TEST_F(SimulatedTest, SizesOfUnsyncedAppendsVaryAndNeedNotAgreeWithTheData) {
    make_durable(files_, "/a", pattern(1'000, 1));
    const auto file = open_file(files_, "/a");
    const auto appended = filled(9'000, 7);
    STELLARIUM_ASSERT_OK(write_all(*file, appended, 1'000));
    std::set<size_t> sizes;
    bool zeros_in_grown_part = false;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const auto after = present_bytes(*files_.crashed_copy(seed), "/a");
        ASSERT_GE(after.size(), 1'000U) << "synced bytes stay within the size; seed " << seed;
        ASSERT_LE(after.size(), 10'000U) << seed;
        sizes.insert(after.size());
        zeros_in_grown_part |= after.size() == 10'000 && all_zero(Bytes(after).subspan(5'000, 512));
    }
    EXPECT_TRUE(sizes.contains(1'000));
    EXPECT_TRUE(sizes.contains(10'000));
    EXPECT_GT(sizes.size(), 5U) << "sizes between the two";
    EXPECT_TRUE(zeros_in_grown_part);
}

TEST_F(SimulatedTest, UnsyncedTruncationsAndHolesHappenOrNot) {
    make_durable(files_, "/cut", pattern(20'000, 1));
    make_durable(files_, "/hole", pattern(20'000, 1));
    STELLARIUM_ASSERT_OK(open_file(files_, "/cut")->truncate(6'000));
    STELLARIUM_ASSERT_OK(open_file(files_, "/hole")->punch_hole(4'096, 8'192));
    std::set<size_t> sizes;
    std::set<std::pair<bool, bool>> holes;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const auto machine = files_.crashed_copy(seed);
        const auto cut = present_bytes(*machine, "/cut");
        sizes.insert(cut.size());
        ASSERT_EQ(std::memcmp(cut.data(), pattern(20'000, 1).data(), 6'000), 0) << seed;
        const auto hole = present_bytes(*machine, "/hole");
        ASSERT_EQ(hole.size(), 20'000U) << seed;
        holes.emplace(all_zero(Bytes(hole).subspan(4'096, 4'096)),
                      all_zero(Bytes(hole).subspan(8'192, 4'096)));
        ASSERT_EQ(std::memcmp(hole.data() + 12'288, pattern(20'000, 1).data() + 12'288, 7'712), 0);
    }
    EXPECT_EQ(sizes, (std::set<size_t>{6'000, 20'000}));
    EXPECT_EQ(holes.size(), 4U) << "page by page";
}

TEST_F(SimulatedTest, CutAndRegrownPartsNeverShowOldBytesOnceSynced) {
    make_durable(files_, "/a", pattern(20'000, 1));
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(file->truncate(100));
    STELLARIUM_ASSERT_OK(file->truncate(20'000));
    STELLARIUM_ASSERT_OK(file->datasync());
    for (uint64_t seed = 0; seed < 50; ++seed) {
        const auto after = present_bytes(*files_.crashed_copy(seed), "/a");
        ASSERT_EQ(after.size(), 20'000U);
        ASSERT_TRUE(all_zero(Bytes(after).subspan(100))) << seed;
    }
}

TEST_F(SimulatedTest, TheSameSeedGivesTheSameOutcomeAndOthersDiffer) {
    make_durable(files_, "/a", filled(50'000, 1));
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(60'000, 2), 0));
    std::set<std::vector<std::byte>> outcomes;
    for (uint64_t seed = 0; seed < 50; ++seed) {
        const auto copy = present_bytes(*files_.crashed_copy(seed), "/a");
        const FileSystemPtr fork = files_.fork();
        fork->crash(seed);
        ASSERT_EQ(present_bytes(*fork, "/a"), copy) << "seed " << seed;
        outcomes.insert(copy);
    }
    EXPECT_GT(outcomes.size(), 10U);
}

TEST_F(SimulatedTest, ExtremeStylesAreExact) {
    make_durable(files_, "/a", pattern(5'000, 1));
    STELLARIUM_ASSERT_OK(write_all(*open_file(files_, "/a"), pattern(9'000, 2), 0));
    STELLARIUM_ASSERT_OK(write_all(*open_file(files_, "/b"), pattern(10, 3), 0));
    const FileSystemPtr lost = files_.crashed_copy(1, CrashStyle::kLoseAll);
    EXPECT_EQ(bytes_at(*lost, "/a"), pattern(5'000, 1));
    EXPECT_EQ(bytes_at(*lost, "/b"), std::nullopt);
    const FileSystemPtr kept = files_.crashed_copy(1, CrashStyle::kKeepAll);
    EXPECT_EQ(bytes_at(*kept, "/a"), pattern(9'000, 2));
    EXPECT_EQ(bytes_at(*kept, "/b"), pattern(10, 3));
    EXPECT_EQ(kept->unsynced_effects(), 0U);
}

TEST_F(SimulatedTest, WhatSurvivedACrashSurvivesTheNext) {
    make_durable(files_, "/a", filled(50'000, 1));
    STELLARIUM_ASSERT_OK(write_all(*open_file(files_, "/a"), pattern(50'000, 2), 0));
    files_.crash(17);
    const auto after = bytes_at(files_, "/a");
    files_.crash(18);
    EXPECT_EQ(bytes_at(files_, "/a"), after);
}

// ---- Crashes: names -----------------------------------------------------------------------------

TEST_F(SimulatedTest, UnsyncedNamesMayVanishEvenWithSyncedData) {
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100, 1), 0));
    STELLARIUM_ASSERT_OK(file->datasync());
    int there = 0;
    int gone = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const auto bytes = bytes_at(*files_.crashed_copy(seed), "/a");
        ++(bytes ? there : gone);
        if (bytes) {
            ASSERT_EQ(*bytes, pattern(100, 1)) << seed;
        }
    }
    EXPECT_GT(there, 0);
    EXPECT_GT(gone, 0);
    STELLARIUM_ASSERT_OK(files_.sync_directory("/"));
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        ASSERT_EQ(bytes_at(*files_.crashed_copy(seed), "/a"), pattern(100, 1)) << seed;
    }
}

TEST_F(SimulatedTest, RenameShowsTheOldFileOrTheNewOne) {
    make_durable(files_, "/current", pattern(100, 1));
    const auto next = open_file(files_, "/next");
    STELLARIUM_ASSERT_OK(write_all(*next, pattern(100, 2), 0));
    STELLARIUM_ASSERT_OK(next->datasync());
    STELLARIUM_ASSERT_OK(files_.rename("/next", "/current"));
    int old_seen = 0;
    int new_seen = 0;
    int temporary_seen = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const FileSystemPtr machine = files_.crashed_copy(seed);
        const auto bytes = present_bytes(*machine, "/current");
        if (bytes == pattern(100, 1)) {
            ++old_seen;
            temporary_seen += machine->exists("/next").value() ? 1 : 0;
        } else {
            ASSERT_EQ(bytes, pattern(100, 2)) << seed;
            ASSERT_FALSE(machine->exists("/next").value()) << seed;
            ++new_seen;
        }
    }
    EXPECT_GT(old_seen, 0);
    EXPECT_GT(new_seen, 0);
    EXPECT_GT(temporary_seen, 0);
}

TEST_F(SimulatedTest, RenameOfUnsyncedDataMayShowAnEmptyFile) {
    make_durable(files_, "/current", pattern(100, 1));
    STELLARIUM_ASSERT_OK(write_all(*open_file(files_, "/next"), pattern(100, 2), 0));
    STELLARIUM_ASSERT_OK(files_.rename("/next", "/current"));
    STELLARIUM_ASSERT_OK(files_.sync_directory("/"));
    int empty_seen = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        empty_seen += present_bytes(*files_.crashed_copy(seed), "/current").empty() ? 1 : 0;
    }
    EXPECT_GT(empty_seen, 0) << "the classic mistake must be caught by the twin";
}

TEST_F(SimulatedTest, NameChangesHappenInAnyOrder) {
    make_durable(files_, "/removed", pattern(1, 1));
    open_file(files_, "/created");
    STELLARIUM_ASSERT_OK(files_.remove("/removed"));
    std::set<std::pair<bool, bool>> outcomes;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        const FileSystemPtr machine = files_.crashed_copy(seed);
        outcomes.emplace(machine->exists("/created").value(), machine->exists("/removed").value());
    }
    EXPECT_EQ(outcomes.size(), 4U);
}

TEST_F(SimulatedTest, AnUnsyncedDirectoryTakesItsContentAlong) {
    STELLARIUM_ASSERT_OK(files_.make_directory("/d"));
    const auto file = open_file(files_, "/d/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(10, 1), 0));
    STELLARIUM_ASSERT_OK(file->datasync());
    STELLARIUM_ASSERT_OK(files_.sync_directory("/d"));
    EXPECT_FALSE(files_.crashed_copy(0, CrashStyle::kLoseAll)->exists("/d").value());
    STELLARIUM_ASSERT_OK(files_.sync_directory("/"));
    EXPECT_EQ(bytes_at(*files_.crashed_copy(0, CrashStyle::kLoseAll), "/d/a"), pattern(10, 1));
}

TEST_F(SimulatedTest, RenameBetweenDirectoriesNeverLosesTheFile) {
    files_.make_directories("/from");
    files_.make_directories("/to");
    make_durable(files_, "/x", pattern(10, 1));
    STELLARIUM_ASSERT_OK(files_.rename("/x", "/from/x"));
    STELLARIUM_ASSERT_OK(files_.sync_directory("/from"));
    STELLARIUM_ASSERT_OK(files_.sync_directory("/"));
    STELLARIUM_ASSERT_OK(files_.rename("/from/x", "/to/x"));
    const auto places = [](const FileSystemPtr& machine) {
        return std::pair(machine->exists("/from/x").value(), machine->exists("/to/x").value());
    };
    using Outcomes = std::set<std::pair<bool, bool>>;
    Outcomes unsynced;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        unsynced.insert(places(files_.crashed_copy(seed)));
    }
    EXPECT_EQ(unsynced, (Outcomes{{true, false}, {false, true}}));

    const FileSystemPtr target_synced = files_.fork();
    STELLARIUM_ASSERT_OK(target_synced->sync_directory("/to"));
    Outcomes half;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        half.insert(places(target_synced->crashed_copy(seed)));
    }
    EXPECT_EQ(half, (Outcomes{{true, true}, {false, true}}));

    STELLARIUM_ASSERT_OK(files_.sync_directory("/from"));
    EXPECT_EQ(places(files_.crashed_copy(0, CrashStyle::kLoseAll)), std::pair(false, true));
}

// ---- Process death and memory file systems ------------------------------------------------------

TEST_F(SimulatedTest, ProcessDeathKeepsWhatWasWrittenAndClosesEverything) {
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(5'000, 1), 0));
    const auto lock = files_.lock("/lock").value();
    files_.kill_process();
    STELLARIUM_EXPECT_FAILS(file->pwrite(filled(1, 0), 0), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->size_bytes(), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->datasync(), ErrorCode::kIo);
    EXPECT_EQ(bytes_at(files_, "/a"), pattern(5'000, 1));
    const auto again = files_.lock("/lock");
    STELLARIUM_EXPECT_OK(again);
    EXPECT_FALSE(files_.crashed_copy(0, CrashStyle::kLoseAll)->exists("/a").value())
        << "still not durable";
}

TEST_F(SimulatedTest, ACrashKillsOpenFiles) {
    make_durable(files_, "/a", pattern(100, 1));
    const auto file = open_file(files_, "/a");
    files_.crash(3);
    std::vector<std::byte> into(10);
    const auto read = file->pread(into, 0);
    STELLARIUM_EXPECT_FAILS(read, ErrorCode::kIo);
    EXPECT_NE(read.error().message().find("machine has crashed"), std::string::npos);
    EXPECT_EQ(bytes_at(files_, "/a"), pattern(100, 1));
}

TEST_F(SimulatedTest, MemoryFileSystemsSurviveTheProcessAndNotTheMachine) {
    files_.mount("/run/stellarium", {FileSystemKind::kMemory, "tmpfs"});
    EXPECT_EQ(files_.type("/run/stellarium").value().kind, FileSystemKind::kMemory);
    EXPECT_EQ(files_.type("/run").value().kind, FileSystemKind::kLocal);
    const auto file = open_file(files_, "/run/stellarium/arena");
    STELLARIUM_ASSERT_OK(file->truncate(1U << 20));
    const MutableBytes map = file->map_shared(0, 1U << 20).value();
    std::ranges::copy(pattern(10'000, 1), map.begin() + 50'000);

    const FileSystemPtr fork = files_.fork();
    files_.kill_process();
    map[50'000] ^= std::byte{0xFF};  // A thread of the dead process that has not noticed.
    for (SimulatedFileSystem* machine : {&files_, fork.get()}) {
        const auto survivor = open_file(*machine, "/run/stellarium/arena", OpenMode::kReadWrite);
        EXPECT_EQ(survivor->size_bytes().value(), 1U << 20);
        const MutableBytes seen = survivor->map_shared(0, 1U << 20).value();
        EXPECT_EQ(std::memcmp(seen.data() + 50'000, pattern(10'000, 1).data(), 10'000), 0);
        EXPECT_TRUE(all_zero(seen.first(50'000)));
    }
    files_.crash(5, CrashStyle::kKeepAll);
    EXPECT_TRUE(files_.list("/run/stellarium").value().empty());
    EXPECT_EQ(files_.type("/run/stellarium").value().kind, FileSystemKind::kMemory);
    open_file(files_, "/run/stellarium/again");
    EXPECT_EQ(files_.unsynced_effects(), 0U);
}

TEST_F(SimulatedTest, SharedMapsOfDurableFilesAreDurableOnceSynced) {
    make_durable(files_, "/a", pattern(8'192, 1));
    const auto file = open_file(files_, "/a");
    const MutableBytes map = file->map_shared(0, 8'192).value();
    std::ranges::copy(pattern(100, 2), map.begin());
    STELLARIUM_ASSERT_OK(file->datasync());
    auto expected = pattern(8'192, 1);
    std::ranges::copy(pattern(100, 2), expected.begin());
    std::ranges::copy(pattern(100, 3), map.begin() + 4'096);
    EXPECT_EQ(files_.unsynced_effects(), 1U);
    EXPECT_EQ(bytes_at(*files_.crashed_copy(1, CrashStyle::kLoseAll), "/a"), expected);
    std::ranges::copy(pattern(100, 3), expected.begin() + 4'096);
    EXPECT_EQ(bytes_at(*files_.crashed_copy(1, CrashStyle::kKeepAll), "/a"), expected);
}

TEST_F(SimulatedTest, RenameDoesNotCrossFileSystems) {
    files_.mount("/run", {FileSystemKind::kMemory, "tmpfs"});
    open_file(files_, "/a");
    STELLARIUM_EXPECT_FAILS(files_.rename("/a", "/run/a"), ErrorCode::kIo);
    EXPECT_TRUE(files_.exists("/a").value());
    files_.mount("/net", {FileSystemKind::kNetwork, "nfs"});
    EXPECT_EQ(files_.type("/net").value().name, "nfs");
}

TEST_F(SimulatedTest, LocksNameTheProcess) {
    files_.set_process_id(4'321);
    const auto lock = files_.lock("/lock").value();
    const auto second = files_.lock("/lock");
    STELLARIUM_EXPECT_FAILS(second, ErrorCode::kBusy);
    EXPECT_EQ(second.error().message(), "/lock is held by process 4321");
}

// ---- Faults -------------------------------------------------------------------------------------

TEST_F(SimulatedTest, TheNthOperationFailsOnce) {
    const auto file = open_file(files_, "/a");
    files_.inject({.kind = OperationKind::kWrite, .path_part = {}, .nth = 3});
    STELLARIUM_EXPECT_OK(file->pwrite(filled(10, 1), 0));
    STELLARIUM_EXPECT_OK(file->datasync());
    STELLARIUM_EXPECT_OK(file->pwrite(filled(10, 2), 0));
    STELLARIUM_EXPECT_FAILS(file->pwrite(filled(10, 3), 0), ErrorCode::kIo);
    EXPECT_EQ(contents(*file), filled(10, 2));
    STELLARIUM_EXPECT_OK(file->pwrite(filled(10, 4), 0));
    EXPECT_EQ(files_.faults_fired(), 1U);
}

TEST_F(SimulatedTest, FaultsForEverUntilCleared) {
    open_file(files_, "/a");
    files_.inject(
        {.kind = {}, .path_part = "/a", .nth = 2, .for_ever = true, .errno_value = ENOSPC});
    STELLARIUM_EXPECT_OK(files_.open("/a", OpenMode::kReadOnly));
    STELLARIUM_EXPECT_FAILS(files_.open("/a", OpenMode::kReadOnly), ErrorCode::kNoSpace);
    STELLARIUM_EXPECT_FAILS(files_.rename("/a", "/b"), ErrorCode::kNoSpace);
    STELLARIUM_EXPECT_FAILS(files_.remove("/a"), ErrorCode::kNoSpace);
    STELLARIUM_EXPECT_OK(files_.open("/c", OpenMode::kCreate));
    files_.clear_faults();
    STELLARIUM_EXPECT_OK(files_.remove("/a"));
}

TEST_F(SimulatedTest, EveryKindOfOperationCanFail) {
    // The sweep that users of this machine run: fail the Nth operation until nothing is left.
    const auto workload = [](SimulatedFileSystem& files) -> Result<void> {
        STELLARIUM_TRY(files.make_directory("/d"));
        STELLARIUM_ASSIGN(const auto lock, files.lock("/d/lock"));
        STELLARIUM_ASSIGN(const auto file, files.open("/d/a", OpenMode::kCreateNew));
        STELLARIUM_TRY(file->allocate(0, 8'192));
        STELLARIUM_TRY(write_all(*file, pattern(8'192, 1), 0));
        STELLARIUM_TRY(file->truncate(5'000));
        STELLARIUM_TRY(file->punch_hole(0, 10));
        STELLARIUM_TRY(file->datasync());
        STELLARIUM_TRY(file->size_bytes());
        STELLARIUM_TRY(file->next_data(0));
        STELLARIUM_TRY(file->map(0, 100));
        STELLARIUM_TRY(file->map_shared(0, 100));
        std::vector<std::byte> into(10);
        STELLARIUM_TRY(read_exact(*file, into, 0));
        const iovec part{.iov_base = into.data(), .iov_len = into.size()};
        STELLARIUM_TRY(file->preadv(std::span(&part, 1), 0, IoMode::kNoWait));
        STELLARIUM_TRY(files.rename("/d/a", "/d/b"));
        STELLARIUM_TRY(files.sync_directory("/d"));
        STELLARIUM_TRY(files.list("/d"));
        STELLARIUM_TRY(files.exists("/d"));
        STELLARIUM_TRY(files.space("/d"));
        STELLARIUM_TRY(files.type("/d"));
        return files.remove("/d/b");
    };
    SimulatedFileSystem untouched;
    STELLARIUM_ASSERT_OK(workload(untouched));
    const OperationCounts counts = untouched.counts();
    for (size_t kind = 0; kind < kOperationKindCount; ++kind) {
        EXPECT_GT(counts.by_kind[kind], 0U) << "kind " << kind << " is not exercised";
    }
    for (uint64_t nth = 1; nth <= counts.total; ++nth) {
        SimulatedFileSystem files;
        files.inject({.kind = {}, .path_part = {}, .nth = nth});
        STELLARIUM_EXPECT_FAILS(workload(files), ErrorCode::kIo);
        EXPECT_EQ(files.faults_fired(), 1U);
        EXPECT_EQ(files.counts().total, nth) << "nothing runs on after an error";
    }
    SimulatedFileSystem interrupted;
    interrupted.inject({.kind = OperationKind::kRename, .path_part = {}, .errno_value = EINTR});
    interrupted.inject({.kind = OperationKind::kDatasync, .path_part = {}, .errno_value = EINTR});
    interrupted.inject({.kind = OperationKind::kWrite, .path_part = {}, .errno_value = EINTR});
    interrupted.inject({.kind = OperationKind::kRead, .path_part = {}, .errno_value = EINTR});
    STELLARIUM_EXPECT_OK(workload(interrupted));
    EXPECT_EQ(interrupted.faults_fired(), 4U);
}

TEST_F(SimulatedTest, FailedSyncPoisonsTheFile) {
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100, 1), 0));
    files_.inject({.kind = OperationKind::kDatasync, .path_part = {}, .errno_value = ENOSPC});
    STELLARIUM_EXPECT_FAILS(file->datasync(), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->datasync(), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->pwrite(filled(1, 1), 0), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->truncate(0), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->punch_hole(0, 1), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(file->allocate(0, 1), ErrorCode::kIo);
    EXPECT_EQ(contents(*file), pattern(100, 1));
}

TEST_F(SimulatedTest, FailedSyncMayLoseTheDataForGood) {
    make_durable(files_, "/a", pattern(100, 1));
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(9'000, 2), 0));
    files_.inject({.kind = OperationKind::kDatasync, .path_part = {}, .lose_unsynced = true});
    STELLARIUM_EXPECT_FAILS(file->datasync(), ErrorCode::kIo);
    const auto reopened = open_file(files_, "/a");
    STELLARIUM_EXPECT_OK(reopened->datasync());
    auto expected = pattern(100, 1);
    expected.resize(9'000);
    EXPECT_EQ(contents(*reopened), expected) << "a sync that now succeeds proves nothing";
    EXPECT_EQ(bytes_at(*files_.crashed_copy(1, CrashStyle::kLoseAll), "/a"), expected);
}

TEST_F(SimulatedTest, LoopsFinishOverShortAndInterruptedTransfers) {
    const auto file = open_file(files_, "/a");
    files_.inject({.kind = {}, .path_part = {}, .for_ever = true, .short_transfer = true});
    for (uint64_t nth = 1; nth < 20; nth += 3) {
        files_.inject(
            {.kind = OperationKind::kWrite, .path_part = {}, .nth = nth, .errno_value = EINTR});
        files_.inject(
            {.kind = OperationKind::kRead, .path_part = {}, .nth = nth, .errno_value = EINTR});
    }
    const auto bytes = pattern(10'000, 1);
    STELLARIUM_EXPECT_OK(write_all(*file, bytes, 77));
    std::vector<std::byte> back(bytes.size());
    STELLARIUM_EXPECT_OK(read_exact(*file, back, 77));
    EXPECT_EQ(back, bytes);

    auto a = pattern(1'000, 2);
    auto b = pattern(4'000, 3);
    STELLARIUM_EXPECT_OK(write_all(*file,
                                   std::vector<iovec>{{.iov_base = a.data(), .iov_len = a.size()},
                                                      {.iov_base = b.data(), .iov_len = b.size()}},
                                   20'000));
    back.resize(5'000);
    STELLARIUM_EXPECT_OK(read_exact(*file, back, 20'000));
    EXPECT_EQ(std::memcmp(back.data(), a.data(), a.size()), 0);
    EXPECT_EQ(std::memcmp(back.data() + 1'000, b.data(), b.size()), 0);
    EXPECT_GT(files_.counts().of(OperationKind::kRead), 10U);
}

TEST_F(SimulatedTest, EndlessInterruptionIsReported) {
    const auto file = open_file(files_, "/a");
    files_.inject(
        {.kind = OperationKind::kWrite, .path_part = {}, .for_ever = true, .errno_value = EINTR});
    STELLARIUM_EXPECT_FAILS(write_all(*file, filled(1, 1), 0), ErrorCode::kInterrupted);
}

TEST_F(SimulatedTest, ColdReadsWouldBlock) {
    make_durable(files_, "/a", pattern(100, 1));
    const auto file = open_file(files_, "/a");
    files_.inject({.kind = OperationKind::kReadNoWait, .path_part = {}, .errno_value = EAGAIN});
    std::vector<std::byte> into(100);
    const iovec part{.iov_base = into.data(), .iov_len = into.size()};
    STELLARIUM_EXPECT_FAILS(file->preadv(std::span(&part, 1), 0, IoMode::kNoWait),
                            ErrorCode::kWouldBlock);
    EXPECT_EQ(file->preadv(std::span(&part, 1), 0, IoMode::kNoWait).value(), 100U);
    EXPECT_EQ(into, pattern(100, 1));
}

TEST_F(SimulatedTest, SpaceRunsOutAndComesBack) {
    files_.set_space_limit(10 * kPageBytes);
    const auto file = open_file(files_, "/a");
    EXPECT_EQ(files_.space("/").value().total_bytes, 40'960U);
    STELLARIUM_EXPECT_OK(write_all(*file, pattern(8 * kPageBytes, 1), 0));
    EXPECT_EQ(files_.space("/").value().free_bytes, 8'192U);
    STELLARIUM_EXPECT_FAILS(file->allocate(0, 11 * kPageBytes), ErrorCode::kNoSpace);
    EXPECT_EQ(file->pwrite(pattern(3 * kPageBytes, 2), 8 * kPageBytes).value(), 8'192U)
        << "short at the limit";
    STELLARIUM_EXPECT_FAILS(file->pwrite(filled(1, 1), 10 * kPageBytes), ErrorCode::kNoSpace);
    STELLARIUM_EXPECT_OK(file->pwrite(filled(4'096, 1), 0));
    STELLARIUM_EXPECT_OK(file->punch_hole(0, 4'096));
    STELLARIUM_EXPECT_OK(file->pwrite(filled(1, 1), 10 * kPageBytes));
    STELLARIUM_EXPECT_OK(files_.remove("/a"));
    EXPECT_EQ(files_.space("/").value().free_bytes, 40'960U);
    const auto reserved = open_file(files_, "/b");
    STELLARIUM_EXPECT_OK(reserved->allocate(0, 40'960));
    EXPECT_EQ(files_.space("/").value().free_bytes, 0U);
    STELLARIUM_EXPECT_OK(write_all(*reserved, pattern(40'960, 1), 0));
}

TEST_F(SimulatedTest, DamageIsUnnoticedAndDurable) {
    make_durable(files_, "/a", pattern(10'000, 1));
    files_.damage("/a", 5'000, 3, 9);
    auto bytes = present_bytes(files_, "/a");
    auto expected = pattern(10'000, 1);
    for (size_t i = 5'000; i < 5'003; ++i) {
        EXPECT_NE(bytes[i], expected[i]);
        bytes[i] = expected[i];
    }
    EXPECT_EQ(bytes, expected);
    EXPECT_NE(bytes_at(*files_.crashed_copy(1), "/a"), expected);
}

// ---- Halt points and observation ----------------------------------------------------------------

TEST_F(SimulatedTest, HaltsAtTheNthMutationAndStaysHalted) {
    make_durable(files_, "/a", filled(512, 77));
    const auto file = open_file(files_, "/a");
    files_.halt_at_mutation(3);
    STELLARIUM_EXPECT_OK(file->pwrite(filled(512, 1), 0));
    STELLARIUM_EXPECT_OK(file->size_bytes());
    STELLARIUM_EXPECT_OK(file->datasync());
    EXPECT_FALSE(files_.halted());
    STELLARIUM_EXPECT_FAILS(file->pwrite(filled(512, 2), 0), ErrorCode::kIo);
    EXPECT_TRUE(files_.halted());
    STELLARIUM_EXPECT_FAILS(file->size_bytes(), ErrorCode::kIo);
    STELLARIUM_EXPECT_FAILS(files_.open("/a", OpenMode::kReadOnly), ErrorCode::kIo);
    std::set<std::vector<std::byte>> seen;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        seen.insert(present_bytes(*files_.crashed_copy(seed), "/a"));
    }
    EXPECT_FALSE(seen.contains(filled(512, 77))) << "that was synced over";
    EXPECT_TRUE(seen.contains(filled(512, 1)));
    EXPECT_TRUE(seen.contains(filled(512, 2))) << "the write in flight may have happened";
    files_.crash(1);
    EXPECT_FALSE(files_.halted());
    EXPECT_TRUE(bytes_at(files_, "/a"));
}

TEST_F(SimulatedTest, HaltSidesDifferInWhatASyncDid) {
    for (const HaltSide side : {HaltSide::kBefore, HaltSide::kInFlight, HaltSide::kAfter}) {
        SimulatedFileSystem files;
        make_durable(files, "/a", filled(512, 0));
        const auto file = open_file(files, "/a");
        STELLARIUM_ASSERT_OK(file->pwrite(filled(512, 1), 0));
        files.halt_at_mutation(1, side);
        STELLARIUM_EXPECT_FAILS(file->datasync(), ErrorCode::kIo);
        EXPECT_EQ(bytes_at(*files.crashed_copy(1, CrashStyle::kLoseAll), "/a"),
                  filled(512, side == HaltSide::kAfter ? 1 : 0));
    }
}

TEST_F(SimulatedTest, AProcessMayBeKilledWithinAWrite) {
    const auto file = open_file(files_, "/a");
    files_.halt_at_mutation(1, HaltSide::kPartial);
    STELLARIUM_EXPECT_FAILS(file->pwrite(pattern(1'000, 1), 0), ErrorCode::kIo);
    files_.kill_process();
    auto half = pattern(1'000, 1);
    half.resize(500);
    EXPECT_EQ(bytes_at(files_, "/a"), half);
}

TEST_F(SimulatedTest, CountsAndObserverSeeEveryOperation) {
    std::vector<OperationKind> seen;
    std::vector<FileSystemPtr> copies;
    files_.set_observer([&](OperationKind kind, std::string_view path) {
        EXPECT_EQ(path.substr(0, 2), "/a");
        seen.push_back(kind);
        copies.push_back(files_.crashed_copy(copies.size()));
    });
    const auto file = open_file(files_, "/a");
    STELLARIUM_EXPECT_OK(file->pwrite(filled(1, 1), 0));
    STELLARIUM_EXPECT_OK(file->datasync());
    STELLARIUM_EXPECT_OK(files_.rename("/a", "/b"));
    files_.set_observer({});
    STELLARIUM_EXPECT_OK(files_.exists("/b"));
    EXPECT_EQ(seen, (std::vector<OperationKind>{OperationKind::kOpen, OperationKind::kWrite,
                                                OperationKind::kDatasync, OperationKind::kRename}));
    EXPECT_EQ(files_.counts().total, 5U);
    EXPECT_EQ(files_.counts().mutating, 4U);
    EXPECT_EQ(files_.counts().of(OperationKind::kQuery), 1U);
    EXPECT_FALSE(copies[0]->exists("/a").value());
    files_.reset_counts();
    EXPECT_EQ(files_.counts().total, 0U);
}

// ---- Copies -------------------------------------------------------------------------------------

TEST_F(SimulatedTest, ForksGoTheirOwnWays) {
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(10'000, 1), 0));
    const FileSystemPtr fork = files_.fork();
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(10'000, 2), 0));
    const auto forked = open_file(*fork, "/a");
    EXPECT_EQ(contents(*forked), pattern(10'000, 1));
    STELLARIUM_ASSERT_OK(write_all(*forked, pattern(100, 3), 5'000));
    EXPECT_EQ(contents(*file), pattern(10'000, 2));
    EXPECT_GT(fork->unsynced_effects(), 0U);
}

TEST_F(SimulatedTest, ThousandsOfCrashesOfALargeStoreAreCheap) {
    // Eight segments of 64 MiB, sparse; each round appends and crashes. Without shared pages this
    // would copy some 60 GB.
    std::vector<std::unique_ptr<File>> segments;
    for (int i = 0; i < 8; ++i) {
        segments.push_back(open_file(files_, fmt::format("/segment{}", i)));
        STELLARIUM_ASSERT_OK(segments.back()->truncate(64U << 20));
        for (uint64_t mib = 0; mib < 64; mib += 8) {
            STELLARIUM_ASSERT_OK(write_all(*segments.back(), pattern(128 << 10, mib), mib << 20));
        }
        STELLARIUM_ASSERT_OK(segments.back()->datasync());
    }
    STELLARIUM_ASSERT_OK(files_.sync_directory("/"));
    const auto page = pattern(4'096, 7);
    for (uint64_t round = 0; round < 2'000; ++round) {
        File& segment = *segments[round % segments.size()];
        STELLARIUM_ASSERT_OK(write_all(segment, page, (round * 4'096) % (64U << 20)));
        const FileSystemPtr machine = files_.crashed_copy(round);
        ASSERT_EQ(open_file(*machine, "/segment3", OpenMode::kReadOnly)->size_bytes().value(),
                  64U << 20);
        if (round % 10 == 0) {
            STELLARIUM_ASSERT_OK(segment.datasync());
        }
    }
}

TEST_F(SimulatedTest, CopiesAreUsedOnOtherThreadsWhileTheMachineGoesOn) {
    const auto file = open_file(files_, "/a");
    STELLARIUM_ASSERT_OK(write_all(*file, filled(100'000, 1), 0));
    STELLARIUM_ASSERT_OK(file->datasync());
    STELLARIUM_ASSERT_OK(files_.sync_directory("/"));
    std::vector<std::thread> threads;
    threads.reserve(3);
    for (uint64_t t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
            for (uint64_t i = 0; i < 30; ++i) {
                const FileSystemPtr machine = files_.crashed_copy(t * 100 + i);
                const auto copied = open_file(*machine, "/a");
                STELLARIUM_EXPECT_OK(write_all(*copied, filled(50'000, 9), 25'000));
                EXPECT_EQ(contents(*copied).size(), 100'000U);
            }
        });
    }
    for (uint8_t i = 0; i < 60; ++i) {
        STELLARIUM_EXPECT_OK(write_all(*file, filled(100'000, i), 0));
        EXPECT_EQ(contents(*file), filled(100'000, i));
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

// ---- Clock and randomness -----------------------------------------------------------------------

TEST(SimulatedMachineTest, TheClockMovesWhenTold) {
    SimulatedMachine machine(1);
    Clock& clock = *machine.env().clock;
    const auto start = clock.monotonic();
    const auto wall = clock.wall();
    EXPECT_EQ(clock.monotonic(), start);
    machine.clock().advance(std::chrono::seconds(5));
    EXPECT_EQ(clock.monotonic() - start, std::chrono::seconds(5));
    EXPECT_EQ(clock.wall() - wall, std::chrono::seconds(5));
    machine.clock().set_auto_step(std::chrono::milliseconds(1));
    EXPECT_EQ(clock.monotonic() - start, std::chrono::milliseconds(5'001));
    EXPECT_EQ(clock.monotonic() - start, std::chrono::milliseconds(5'002));
    machine.clock().set_wall(std::chrono::seconds(10));
    EXPECT_EQ(clock.wall(), std::chrono::seconds(10));
}

TEST(SimulatedMachineTest, ADeadProcessCanDoNothing) {
    for (const bool power : {false, true}) {
        SimulatedMachine machine(1);
        machine.files().make_directories("/dir");
        make_durable(machine.files(), "/file", filled(10, 1));
        FileSystem& dead = *machine.process_env().files;
        STELLARIUM_ASSERT_OK(dead.list("/"));
        if (power) {
            machine.crash(3);
        } else {
            machine.kill_process();
        }
        FileSystem& alive = *machine.process_env().files;
        const OperationCounts before = machine.files().counts();
        EXPECT_EQ(dead.open("/file", OpenMode::kReadOnly).error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.open("/new", OpenMode::kCreate).error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.make_directory("/new").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.rename("/file", "/new").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.remove("/file").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.list("/").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.exists("/file").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.sync_directory("/").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.space("/").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.type("/").error().code(), ErrorCode::kIo);
        EXPECT_EQ(dead.lock("/lock").error().code(), ErrorCode::kIo);
        EXPECT_EQ(machine.files().counts().total, before.total);
        EXPECT_EQ(alive.list("/").value().size(), 3U) << "the directory, the file, and /proc";
        STELLARIUM_EXPECT_OK(alive.lock("/lock"));
    }
}

TEST(SimulatedMachineTest, TheSeedDecidesTheRandomness) {
    const auto draw = [](uint64_t seed) {
        SimulatedMachine machine(seed);
        std::vector<std::byte> bytes(48);
        machine.env().random->fill(bytes);
        std::vector<std::byte> more(48);
        machine.env().random->fill(more);
        EXPECT_NE(bytes, more);
        bytes.insert(bytes.end(), more.begin(), more.end());
        return bytes;
    };
    EXPECT_EQ(draw(1), draw(1));
    EXPECT_NE(draw(1), draw(2));
}

}  // namespace
}  // namespace stellarium::io
