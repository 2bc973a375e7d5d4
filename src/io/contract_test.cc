// The contract of io.h, held against both implementations: whatever one promises, the other does.
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "io/io.h"
#include "io/posix.h"
#include "io/simulated.h"
#include "io/test_support.h"

namespace stellarium::io {
namespace {

class PosixWorld {
  public:
    PosixWorld() {
        std::string name = (std::filesystem::temp_directory_path() / "stellarium-io-XXXXXX");
        if (::mkdtemp(name.data()) == nullptr) {
            std::perror("mkdtemp");
            std::abort();
        }
        root_ = name;
    }
    ~PosixWorld() { std::filesystem::remove_all(root_); }
    PosixWorld(const PosixWorld&) = delete;
    PosixWorld& operator=(const PosixWorld&) = delete;

    Env env() { return real_env(); }
    const std::string& root() const { return root_; }

  private:
    std::string root_;
};

class SimulatedWorld {
  public:
    SimulatedWorld() { machine_.files().make_directories(root_); }
    Env env() { return machine_.env(); }
    const std::string& root() const { return root_; }

  private:
    SimulatedMachine machine_{1};
    std::string root_ = "/srv/test";
};

template <typename World>
class ContractTest : public testing::Test {
  protected:
    FileSystem& files() { return *world_.env().files; }
    Env env() { return world_.env(); }
    std::string path(std::string_view name) const {
        return fmt::format("{}/{}", world_.root(), name);
    }
    std::unique_ptr<File> create(std::string_view name) {
        auto file = files().open(path(name), OpenMode::kCreateNew);
        EXPECT_TRUE(file) << file.error().message();
        return file ? std::move(*file) : nullptr;
    }

    World world_;
};

struct WorldNames {
    template <typename World>
    // NOLINTNEXTLINE(readability-identifier-naming): GoogleTest asks for this name.
    static std::string GetName(int /*index*/) {
        return std::is_same_v<World, PosixWorld> ? "Posix" : "Simulated";
    }
};
using Worlds = testing::Types<PosixWorld, SimulatedWorld>;
TYPED_TEST_SUITE(ContractTest, Worlds, WorldNames);

TYPED_TEST(ContractTest, OpenModesSayWhatMustExist) {
    const std::string path = this->path("a");
    STELLARIUM_EXPECT_FAILS(this->files().open(path, OpenMode::kReadOnly), ErrorCode::kNotFound);
    STELLARIUM_EXPECT_FAILS(this->files().open(path, OpenMode::kReadWrite), ErrorCode::kNotFound);
    STELLARIUM_EXPECT_OK(this->files().open(path, OpenMode::kCreate));
    STELLARIUM_EXPECT_OK(this->files().open(path, OpenMode::kCreate));
    STELLARIUM_EXPECT_FAILS(this->files().open(path, OpenMode::kCreateNew),
                            ErrorCode::kAlreadyExists);
    STELLARIUM_EXPECT_OK(this->files().open(path, OpenMode::kReadWrite));
    STELLARIUM_EXPECT_FAILS(this->files().open(this->path("missing/a"), OpenMode::kCreate),
                            ErrorCode::kNotFound);
    STELLARIUM_EXPECT_FAILS(this->files().open(this->path("a/b"), OpenMode::kCreate),
                            ErrorCode::kInvalidArgument);
    STELLARIUM_EXPECT_FAILS(this->files().open(this->world_.root(), OpenMode::kReadOnly),
                            ErrorCode::kInvalidArgument);
}

TYPED_TEST(ContractTest, ErrorsNameTheFile) {
    const auto missing = this->files().open(this->path("nobody"), OpenMode::kReadOnly);
    ASSERT_FALSE(missing);
    EXPECT_NE(missing.error().message().find(this->path("nobody")), std::string::npos);
}

TYPED_TEST(ContractTest, ReadsWhatWasWrittenAndZerosBetween) {
    const auto file = this->create("a");
    EXPECT_EQ(file->path(), this->path("a"));
    const auto first = pattern(10'000, 1);
    const auto second = pattern(5'000, 2);
    STELLARIUM_ASSERT_OK(write_all(*file, first, 100));
    STELLARIUM_ASSERT_OK(write_all(*file, second, 1 << 20));
    EXPECT_EQ(file->size_bytes().value(), (1U << 20) + 5'000U);
    const auto all = contents(*file);
    ASSERT_EQ(all.size(), (1U << 20) + 5'000U);
    EXPECT_TRUE(all_zero(Bytes(all).first(100)));
    EXPECT_EQ(std::memcmp(all.data() + 100, first.data(), first.size()), 0);
    EXPECT_TRUE(all_zero(Bytes(all).subspan(10'100, (1 << 20) - 10'100)));
    EXPECT_EQ(std::memcmp(all.data() + (1 << 20), second.data(), second.size()), 0);
}

TYPED_TEST(ContractTest, ReadsAreShortAtTheEndAndEmptyPastIt) {
    const auto file = this->create("a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100, 1), 0));
    std::vector<std::byte> into(64);
    EXPECT_EQ(file->pread(into, 60).value(), 40U);
    EXPECT_EQ(file->pread(into, 100).value(), 0U);
    EXPECT_EQ(file->pread(into, 5'000).value(), 0U);
    const auto past_end = read_exact(*file, into, 60);
    STELLARIUM_EXPECT_FAILS(past_end, ErrorCode::kCorrupt);
    EXPECT_NE(past_end.error().message().find("offset 100"), std::string::npos);
}

TYPED_TEST(ContractTest, ScatteredAndGatheredTransfers) {
    const auto file = this->create("a");
    auto a = pattern(3, 1);
    auto b = pattern(8'190, 2);
    auto c = pattern(5'000, 3);
    std::vector<iovec> from{{.iov_base = a.data(), .iov_len = a.size()},
                            {.iov_base = nullptr, .iov_len = 0},
                            {.iov_base = b.data(), .iov_len = b.size()},
                            {.iov_base = c.data(), .iov_len = c.size()}};
    STELLARIUM_ASSERT_OK(write_all(*file, from, 4'000));
    std::vector<std::byte> x(8'193);
    std::vector<std::byte> y(5'000);
    const std::vector<iovec> into{{.iov_base = x.data(), .iov_len = x.size()},
                                  {.iov_base = y.data(), .iov_len = y.size()}};
    EXPECT_EQ(file->preadv(into, 4'000, IoMode::kMayBlock).value(), 13'193U);
    EXPECT_EQ(std::memcmp(x.data(), a.data(), 3), 0);
    EXPECT_EQ(std::memcmp(x.data() + 3, b.data(), b.size()), 0);
    EXPECT_EQ(y, c);
}

TYPED_TEST(ContractTest, MoreBuffersThanTheSystemTakesAtOnce) {
    const auto file = this->create("a");
    auto bytes = pattern(5'000, 1);
    std::vector<iovec> from;
    from.reserve(bytes.size());
    for (std::byte& byte : bytes) {
        from.push_back({.iov_base = &byte, .iov_len = 1});
    }
    STELLARIUM_ASSERT_OK(write_all(*file, from, 0));
    EXPECT_EQ(contents(*file), bytes);
}

TYPED_TEST(ContractTest, ReadsOfACallerWhoKeepsTheBytesGiveThem) {
    const auto file = this->create("a");
    const auto bytes = pattern(10'000, 1);
    STELLARIUM_ASSERT_OK(write_all(*file, bytes, 0));
    std::vector<std::byte> into(10'000);
    const iovec part{.iov_base = into.data(), .iov_len = into.size()};
    EXPECT_EQ(file->preadv(std::span(&part, 1), 0, IoMode::kMayBlockOnce).value(), 10'000U);
    EXPECT_EQ(into, bytes);
}

TYPED_TEST(ContractTest, NoWaitReadsGiveTheBytesOrSayThatTheyWouldBlock) {
    const auto file = this->create("a");
    const auto bytes = pattern(4'096, 1);
    STELLARIUM_ASSERT_OK(write_all(*file, bytes, 0));
    std::vector<std::byte> into(4'096);
    const iovec part{.iov_base = into.data(), .iov_len = into.size()};
    const auto got = file->preadv(std::span(&part, 1), 0, IoMode::kNoWait);
    if (got) {
        ASSERT_GT(*got, 0U);
        EXPECT_EQ(std::memcmp(into.data(), bytes.data(), *got), 0);
    } else {
        EXPECT_EQ(got.error().code(), ErrorCode::kWouldBlock);
    }
}

TYPED_TEST(ContractTest, TruncateCutsAndExtendsWithZeros) {
    const auto file = this->create("a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(10'000, 1), 0));
    STELLARIUM_ASSERT_OK(file->truncate(5'000));
    EXPECT_EQ(file->size_bytes().value(), 5'000U);
    STELLARIUM_ASSERT_OK(file->truncate(12'000));
    const auto all = contents(*file);
    ASSERT_EQ(all.size(), 12'000U);
    EXPECT_EQ(std::memcmp(all.data(), pattern(10'000, 1).data(), 5'000), 0);
    EXPECT_TRUE(all_zero(Bytes(all).subspan(5'000)));
}

TYPED_TEST(ContractTest, HolesReadAsZerosAndKeepTheSize) {
    const auto file = this->create("a");
    const auto bytes = pattern(40'000, 1);
    STELLARIUM_ASSERT_OK(write_all(*file, bytes, 0));
    STELLARIUM_ASSERT_OK(file->punch_hole(5'000, 20'000));
    STELLARIUM_ASSERT_OK(file->punch_hole(39'000, 1'000'000));
    STELLARIUM_ASSERT_OK(file->punch_hole(100, 0));
    const auto all = contents(*file);
    ASSERT_EQ(all.size(), 40'000U);
    EXPECT_EQ(std::memcmp(all.data(), bytes.data(), 5'000), 0);
    EXPECT_TRUE(all_zero(Bytes(all).subspan(5'000, 20'000)));
    EXPECT_EQ(std::memcmp(all.data() + 25'000, bytes.data() + 25'000, 14'000), 0);
    EXPECT_TRUE(all_zero(Bytes(all).subspan(39'000)));
}

TYPED_TEST(ContractTest, AllocateChangesNeitherSizeNorContent) {
    const auto file = this->create("a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(5'000, 1), 0));
    STELLARIUM_ASSERT_OK(file->allocate(0, 1 << 20));
    EXPECT_EQ(contents(*file), pattern(5'000, 1));
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100, 2), 100'000));
    const auto all = contents(*file);
    EXPECT_TRUE(all_zero(Bytes(all).subspan(5'000, 95'000)));
}

TYPED_TEST(ContractTest, DataExtentsCoverWhatWasWritten) {
    const auto file = this->create("a");
    EXPECT_FALSE(file->next_data(0).value());
    constexpr uint64_t kFar = 8U << 20;
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(4'096, 1), 1U << 20));
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100'000, 2), kFar));
    STELLARIUM_ASSERT_OK(file->truncate(16U << 20));
    // Walks the extents: they ascend, and every byte outside them is zero.
    uint64_t covered = 0;
    uint64_t offset = 0;
    const auto all = contents(*file);
    while (true) {
        const auto extent = file->next_data(offset);
        STELLARIUM_ASSERT_OK(extent);
        const uint64_t begin = *extent ? (*extent)->first : all.size();
        ASSERT_GE(begin, offset);
        EXPECT_TRUE(all_zero(Bytes(all).subspan(offset, begin - offset)));
        if (!*extent) {
            break;
        }
        ASSERT_GT((*extent)->second, 0U);
        offset = begin + (*extent)->second;
        ASSERT_LE(offset, all.size());
        covered += (*extent)->second;
    }
    EXPECT_GE(covered, 104'096U);
    // From within an extent, the rest of it.
    const auto rest = file->next_data(kFar + 1'000).value();
    EXPECT_EQ(rest.value_or(std::pair<uint64_t, uint64_t>()).first, kFar + 1'000);
}

TYPED_TEST(ContractTest, MapsShowTheBytes) {
    const auto file = this->create("a");
    const auto bytes = pattern(20'000, 1);
    STELLARIUM_ASSERT_OK(write_all(*file, bytes, 0));
    auto map = file->map(4'096, 10'000);
    STELLARIUM_ASSERT_OK(map);
    EXPECT_EQ((*map)->bytes().size(), 10'000U);
    EXPECT_EQ(std::memcmp((*map)->bytes().data(), bytes.data() + 4'096, 10'000), 0);
    EXPECT_TRUE(file->map(0, 0).value()->bytes().empty());
    STELLARIUM_EXPECT_FAILS(file->map(4'096, 16'000), ErrorCode::kInvalidArgument);
    STELLARIUM_EXPECT_FAILS(file->map(100, 100), ErrorCode::kInvalidArgument);
    STELLARIUM_EXPECT_FAILS(file->map(UINT64_MAX, 2), ErrorCode::kInvalidArgument);
}

TYPED_TEST(ContractTest, SharedMapsAndTransfersAgree) {
    const auto file = this->create("a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(4'096, 1), 0));
    STELLARIUM_ASSERT_OK(file->truncate(8'192));
    auto map = file->map_shared(0, 8'192);
    STELLARIUM_ASSERT_OK(map);
    EXPECT_EQ(std::memcmp(map->data(), pattern(4'096, 1).data(), 4'096), 0);
    (*map)[5'000] = std::byte{42};
    std::vector<std::byte> one(1);
    STELLARIUM_ASSERT_OK(read_exact(*file, one, 5'000));
    EXPECT_EQ(one[0], std::byte{42});
    STELLARIUM_ASSERT_OK(write_all(*file, filled(1, 43), 5'001));
    EXPECT_EQ((*map)[5'001], std::byte{43});
    // A second opening maps the same bytes, and a file may grow while it is mapped.
    auto again = this->files().open(this->path("a"), OpenMode::kReadWrite);
    STELLARIUM_ASSERT_OK(again);
    STELLARIUM_ASSERT_OK((*again)->truncate(1U << 20));
    auto other = (*again)->map_shared(4'096, 4'096);
    STELLARIUM_ASSERT_OK(other);
    EXPECT_EQ((*other)[904], std::byte{42});
    (*other)[904] = std::byte{44};
    EXPECT_EQ((*map)[5'000], std::byte{44});
    STELLARIUM_EXPECT_OK(file->datasync());
    STELLARIUM_EXPECT_FAILS(file->map_shared(1U << 20, 4'096), ErrorCode::kInvalidArgument);
}

TYPED_TEST(ContractTest, ReadOnlyFilesCannotBeChanged) {
    STELLARIUM_ASSERT_OK(write_all(*this->create("a"), pattern(4'096, 1), 0));
    const auto file = this->files().open(this->path("a"), OpenMode::kReadOnly).value();
    EXPECT_FALSE(file->pwrite(filled(1, 0), 0));
    EXPECT_FALSE(file->truncate(0));
    EXPECT_FALSE(file->punch_hole(0, 4'096));
    EXPECT_FALSE(file->allocate(0, 1U << 20));
    EXPECT_FALSE(file->map_shared(0, 4'096));
    EXPECT_EQ(contents(*file), pattern(4'096, 1));
}

TYPED_TEST(ContractTest, HintsChangeNothing) {
    const auto file = this->create("a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100'000, 1), 0));
    file->drop_cache(0, 100'000);
    file->read_ahead(0, 1'000'000);
    EXPECT_EQ(contents(*file), pattern(100'000, 1));
    STELLARIUM_EXPECT_OK(file->datasync());
}

TYPED_TEST(ContractTest, StreamedWritesAreReadAndSyncedLikeOthers) {
    const auto file = this->create("a");
    std::vector<std::byte> expected;
    for (uint8_t turn = 0; turn < 4; ++turn) {
        std::vector<std::byte> part = pattern(700'000 + turn, turn);
        const uint64_t offset_bytes = expected.size();
        expected.insert(expected.end(), part.begin(), part.end());
        STELLARIUM_ASSERT_OK(write_all(*file,
                                       {{part.data(), 4096}, {&part[4096], part.size() - 4096}},
                                       offset_bytes, Caching::kStream));
        EXPECT_EQ(contents(*file), expected);
    }
    STELLARIUM_EXPECT_OK(file->datasync());
    EXPECT_EQ(contents(*file), expected);
    // Over what is there, and next to what is kept.
    std::vector<std::byte> over = pattern(8192, 9);
    STELLARIUM_ASSERT_OK(write_all(*file, {{over.data(), over.size()}}, 100'000, Caching::kStream));
    STELLARIUM_ASSERT_OK(write_all(*file, Bytes(over), 200'000));
    std::ranges::copy(over, expected.begin() + 100'000);
    std::ranges::copy(over, expected.begin() + 200'000);
    STELLARIUM_EXPECT_OK(file->datasync());
    EXPECT_EQ(contents(*file), expected);
}

TYPED_TEST(ContractTest, ImpossibleOffsetsAreErrors) {
    const auto file = this->create("a");
    std::vector<std::byte> one(1);
    EXPECT_FALSE(file->pwrite(one, UINT64_MAX));
    EXPECT_FALSE(file->truncate(UINT64_MAX));
    EXPECT_FALSE(file->punch_hole(UINT64_MAX, 1));
    EXPECT_FALSE(file->allocate(0, UINT64_MAX));
    EXPECT_EQ(file->size_bytes().value(), 0U);
}

TYPED_TEST(ContractTest, DirectoriesAreMadeListedAndRemoved) {
    STELLARIUM_ASSERT_OK(this->files().make_directory(this->path("d")));
    STELLARIUM_EXPECT_FAILS(this->files().make_directory(this->path("d")),
                            ErrorCode::kAlreadyExists);
    STELLARIUM_EXPECT_FAILS(this->files().make_directory(this->path("x/y")), ErrorCode::kNotFound);
    this->create("d/two");
    this->create("d/one");
    STELLARIUM_ASSERT_OK(this->files().make_directory(this->path("d/three")));
    const auto entries = this->files().list(this->path("d"));
    STELLARIUM_ASSERT_OK(entries);
    ASSERT_EQ(entries->size(), 3U);
    EXPECT_EQ((*entries)[0].name, "one");
    EXPECT_EQ((*entries)[1].name, "three");
    EXPECT_EQ((*entries)[2].name, "two");
    EXPECT_TRUE((*entries)[1].is_directory);
    EXPECT_FALSE((*entries)[2].is_directory);
    STELLARIUM_EXPECT_OK(this->files().sync_directory(this->path("d")));
    EXPECT_FALSE(this->files().remove(this->path("d")));
    STELLARIUM_EXPECT_OK(this->files().remove(this->path("d/one")));
    STELLARIUM_EXPECT_OK(this->files().remove(this->path("d/two")));
    STELLARIUM_EXPECT_OK(this->files().remove(this->path("d/three")));
    STELLARIUM_EXPECT_OK(this->files().remove(this->path("d")));
    STELLARIUM_EXPECT_FAILS(this->files().remove(this->path("d")), ErrorCode::kNotFound);
    STELLARIUM_EXPECT_FAILS(this->files().list(this->path("d")), ErrorCode::kNotFound);
    STELLARIUM_EXPECT_FAILS(this->files().sync_directory(this->path("d")), ErrorCode::kNotFound);
}

TYPED_TEST(ContractTest, ExistsTellsNamesFromNothing) {
    this->create("a");
    EXPECT_TRUE(this->files().exists(this->path("a")).value());
    EXPECT_TRUE(this->files().exists(this->world_.root()).value());
    EXPECT_FALSE(this->files().exists(this->path("b")).value());
    EXPECT_FALSE(this->files().exists(this->path("a/b")).value());
}

TYPED_TEST(ContractTest, RenameReplaces) {
    const auto a = this->create("a");
    const auto b = this->create("b");
    STELLARIUM_ASSERT_OK(write_all(*a, pattern(100, 1), 0));
    STELLARIUM_ASSERT_OK(write_all(*b, pattern(100, 2), 0));
    STELLARIUM_ASSERT_OK(this->files().rename(this->path("a"), this->path("b")));
    EXPECT_FALSE(this->files().exists(this->path("a")).value());
    EXPECT_EQ(contents(*this->files().open(this->path("b"), OpenMode::kReadOnly).value()),
              pattern(100, 1));
    EXPECT_EQ(contents(*b), pattern(100, 2)) << "an open file outlives its name";
    STELLARIUM_EXPECT_FAILS(this->files().rename(this->path("a"), this->path("c")),
                            ErrorCode::kNotFound);
    STELLARIUM_ASSERT_OK(this->files().make_directory(this->path("d")));
    STELLARIUM_ASSERT_OK(this->files().rename(this->path("b"), this->path("d/e")));
    EXPECT_TRUE(this->files().exists(this->path("d/e")).value());
    STELLARIUM_EXPECT_FAILS(this->files().rename(this->path("d"), this->path("d/f")),
                            ErrorCode::kInvalidArgument);
    this->create("g");
    STELLARIUM_EXPECT_FAILS(this->files().rename(this->path("g"), this->path("d")),
                            ErrorCode::kInvalidArgument);
    STELLARIUM_ASSERT_OK(this->files().rename(this->path("d"), this->path("h")));
    EXPECT_TRUE(this->files().exists(this->path("h/e")).value());
}

TYPED_TEST(ContractTest, RemovedFilesLiveWhileTheyAreOpen) {
    const auto file = this->create("a");
    STELLARIUM_ASSERT_OK(write_all(*file, pattern(100, 1), 0));
    STELLARIUM_ASSERT_OK(this->files().remove(this->path("a")));
    EXPECT_FALSE(this->files().exists(this->path("a")).value());
    EXPECT_EQ(contents(*file), pattern(100, 1));
    STELLARIUM_EXPECT_OK(file->datasync());
}

TYPED_TEST(ContractTest, LocksExcludeAndNameTheHolder) {
    const std::string path = this->path("lock");
    auto lock = this->files().lock(path);
    STELLARIUM_ASSERT_OK(lock);
    const auto text = contents(*this->files().open(path, OpenMode::kReadOnly).value());
    std::string pid;
    for (const std::byte byte : text) {
        pid.push_back(static_cast<char>(byte));
    }
    ASSERT_FALSE(pid.empty());
    EXPECT_EQ(pid.back(), '\n');
    pid.pop_back();
    const auto second = this->files().lock(path);
    STELLARIUM_EXPECT_FAILS(second, ErrorCode::kBusy);
    EXPECT_EQ(second.error().message(), fmt::format("{} is held by process {}", path, pid));
    lock->reset();
    STELLARIUM_EXPECT_OK(this->files().lock(path));
    STELLARIUM_EXPECT_FAILS(this->files().lock(this->path("missing/lock")), ErrorCode::kNotFound);
}

TYPED_TEST(ContractTest, AFileIsLockedByOneOpenFileAtATime) {
    auto first = this->files().open(this->path("a"), OpenMode::kCreateNew);
    STELLARIUM_ASSERT_OK(first);
    auto second = this->files().open(this->path("a"), OpenMode::kReadWrite);
    STELLARIUM_ASSERT_OK(second);
    STELLARIUM_ASSERT_OK((*first)->lock());
    STELLARIUM_EXPECT_OK((*first)->lock());
    STELLARIUM_EXPECT_FAILS((*second)->lock(), ErrorCode::kBusy);
    // Whatever it is called.
    STELLARIUM_ASSERT_OK(this->files().rename(this->path("a"), this->path("b")));
    STELLARIUM_EXPECT_FAILS((*second)->lock(), ErrorCode::kBusy);
    first->reset();
    STELLARIUM_EXPECT_OK((*second)->lock());
}

TYPED_TEST(ContractTest, SharedLocksStandBesideEachOtherAndAgainstAnExclusiveOne) {
    auto first = this->files().open(this->path("a"), OpenMode::kCreateNew);
    STELLARIUM_ASSERT_OK(first);
    auto second = this->files().open(this->path("a"), OpenMode::kReadOnly);
    STELLARIUM_ASSERT_OK(second);
    auto third = this->files().open(this->path("a"), OpenMode::kReadWrite);
    STELLARIUM_ASSERT_OK(third);
    STELLARIUM_ASSERT_OK((*first)->lock_shared());
    STELLARIUM_EXPECT_OK((*second)->lock_shared());
    STELLARIUM_EXPECT_FAILS((*third)->lock(), ErrorCode::kBusy);
    STELLARIUM_EXPECT_FAILS((*first)->lock(), ErrorCode::kBusy);
    second->reset();
    STELLARIUM_EXPECT_FAILS((*third)->lock(), ErrorCode::kBusy);
    STELLARIUM_EXPECT_OK((*first)->lock());
    STELLARIUM_EXPECT_FAILS((*third)->lock_shared(), ErrorCode::kBusy);
    first->reset();
    STELLARIUM_EXPECT_OK((*third)->lock());
}

TYPED_TEST(ContractTest, AFileKeepsItsIdentityAndACopyHasAnother) {
    auto file = this->files().open(this->path("a"), OpenMode::kCreateNew);
    STELLARIUM_ASSERT_OK(file);
    const auto identity = (*file)->identity();
    STELLARIUM_ASSERT_OK(identity);
    STELLARIUM_ASSERT_OK(this->files().rename(this->path("a"), this->path("b")));
    auto again = this->files().open(this->path("b"), OpenMode::kReadOnly);
    STELLARIUM_ASSERT_OK(again);
    EXPECT_EQ((*again)->identity().value(), *identity);
    auto other = this->files().open(this->path("a"), OpenMode::kCreateNew);
    STELLARIUM_ASSERT_OK(other);
    EXPECT_NE((*other)->identity().value(), *identity);
}

TYPED_TEST(ContractTest, SpaceAndTypeAreReported) {
    const auto space = this->files().space(this->world_.root());
    STELLARIUM_ASSERT_OK(space);
    EXPECT_GT(space->total_bytes, 0U);
    EXPECT_LE(space->free_bytes, space->total_bytes);
    const auto type = this->files().type(this->world_.root());
    STELLARIUM_ASSERT_OK(type);
    EXPECT_FALSE(type->name.empty());
    STELLARIUM_EXPECT_FAILS(this->files().space(this->path("x")), ErrorCode::kNotFound);
    STELLARIUM_EXPECT_FAILS(this->files().type(this->path("x")), ErrorCode::kNotFound);
}

TYPED_TEST(ContractTest, ClockAndRandomness) {
    const auto before = this->env().clock->monotonic();
    EXPECT_GE(this->env().clock->monotonic(), before);
    EXPECT_GT(this->env().clock->wall(), std::chrono::hours(24 * 365 * 50));
    std::vector<std::byte> a(64);
    std::vector<std::byte> b(64);
    this->env().random->fill(a);
    this->env().random->fill(b);
    EXPECT_NE(a, b);
}

TYPED_TEST(ContractTest, ThreadsShareAFile) {
    const auto file = this->create("a");
    constexpr size_t kThreads = 4;
    constexpr size_t kBlocks = 50;
    constexpr size_t kBlockBytes = 3'000;
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (size_t t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            for (size_t i = 0; i < kBlocks; ++i) {
                const uint64_t block = i * kThreads + t;
                STELLARIUM_EXPECT_OK(
                    write_all(*file, pattern(kBlockBytes, block), block * kBlockBytes));
                std::vector<std::byte> back(kBlockBytes);
                STELLARIUM_EXPECT_OK(read_exact(*file, back, block * kBlockBytes));
                EXPECT_EQ(back, pattern(kBlockBytes, block));
                if (i % 25 == 0) {
                    STELLARIUM_EXPECT_OK(file->datasync());
                    STELLARIUM_EXPECT_OK(this->files().open(this->path(fmt::format("{}", block)),
                                                            OpenMode::kCreateNew));
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_EQ(file->size_bytes().value(), kThreads * kBlocks * kBlockBytes);
    EXPECT_EQ(this->files().list(this->world_.root()).value().size(), 1 + kThreads * 2);
}

}  // namespace
}  // namespace stellarium::io
