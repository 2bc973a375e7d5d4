// fsck on pools that are whole, and on pools damaged in every kind of place: it finds what is
// wrong, changes nothing unless told to, and what a repair leaves is right or refused.
#include "nova/check.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "nebula/dead_map.h"
#include "nebula/format.h"
#include "nebula/segment.h"
#include "nova/format.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

using Content = std::vector<std::byte>;
using Kind = nebula::Finding::Kind;
constexpr const char* kDirectory = TestPool::kDirectory;
constexpr uint64_t kPage = nebula::kPageBytes;

std::string segment_path(uint32_t number) {
    return fmt::format("{}/{}", kDirectory, nebula::segment_file_name(number));
}

std::string describe(const CheckReport& report) {
    std::string text;
    for (const nebula::Finding& finding : report.findings) {
        text += fmt::format("{}{}: {} [{} {}] -> {} ({})\n", finding.harmless ? "(note) " : "",
                            to_string(finding.kind), finding.what, finding.file,
                            finding.offset.value_or(0), finding.consequence, finding.advice);
    }
    for (const LostRange& range : report.lost) {
        text +=
            fmt::format("lost {} {}+{}\n", range.source, range.offset_bytes, range.length_bytes);
    }
    for (const std::string& name : report.unknown) {
        text += fmt::format("unknown {}\n", name);
    }
    return text;
}

bool has(const CheckReport& report, Kind kind) {
    return std::ranges::any_of(report.findings, [kind](const nebula::Finding& finding) {
        return finding.kind == kind && !finding.harmless;
    });
}

PoolOptions check_pool_options() {
    PoolOptions options = TestPool::small_options();
    options.store.segment_bytes = nebula::kMinSegmentBytes;
    return options;
}

Result<CheckReport> look(io::SimulatedMachine& machine, bool data = false, bool repair = false) {
    PoolCheckOptions options;
    options.store = check_pool_options().store;
    options.repair = repair;
    options.check.data = data;
    return check_pool(machine.env(), kDirectory, options);
}

void write_to(TestPool& pool, const std::string& volume, uint64_t offset, uint64_t seed) {
    auto device = must(pool->attach(volume, {}));
    must(write(*device, offset, random_bytes(8192, seed)));
    must(flush(*device));
}

/// A pool with an image, volumes, snapshots, garbage and freed space, whose process is gone.
class Sample {
  public:
    /// With `tail`, changes follow the last checkpoint, synced. With `neighbours`, so many volumes'
    /// maps stand in packs together, and one of them is dead.
    explicit Sample(bool tail, uint64_t neighbours = 0) : pool_(1, check_pool_options()) {
        import_image(*pool_, "debian", random_bytes(600'000, 1));
        import_image(*pool_, "gone", random_bytes(300'000, 2));
        must(pool_->clone("debian", {"a", "b"}));
        must(pool_->create_volume("c", uint64_t{8} << 20));
        for (uint64_t i = 0; i < 12; ++i) {
            write_to(pool_, "a", i * 40'960, 100 + i);
            write_to(pool_, "c", i * 500'000 / 512 * 512, 200 + i);
        }
        must(pool_->create_snapshot("a", "s"));
        for (uint64_t i = 0; i < neighbours; ++i) {
            const std::string name = fmt::format("many-{}", i);
            must(pool_->clone("debian", {name}));
            write_to(pool_, name, i * 4096, 700 + i);
        }
        must(pool_->remove({"gone"}));
        must(pool_->checkpoint());
        must(pool_->gc({}));
        for (uint64_t i = 0; i < 6; ++i) {
            write_to(pool_, "b", i * 20'480, 300 + i);
            write_to(pool_, "a", i * 61'440, 400 + i);
        }
        must(pool_->checkpoint());
        if (neighbours > 0) {
            write_to(pool_, "many-0", 65'536, 800);
            must(pool_->checkpoint());
            must(pool_->gc({}));
        }
        if (tail) {
            for (uint64_t i = 0; i < 4; ++i) {
                write_to(pool_, "b", 200'000 / 512 * 512 + i * 4096, 500 + i);
            }
            must(pool_->clone("debian", {"late"}));
            import_image(*pool_, "last", random_bytes(100'000, 3));
        }
        for (const std::string& source : sources()) {
            contents_[source] = export_all(*pool_, source);
        }
        pool_.close();
        if (tail) {
            // Closing makes a checkpoint: take the machine as it was before.
            machine_ = std::move(before_close_);
        } else {
            machine_ = pool_.machine().files().fork();
        }
    }

    std::unique_ptr<io::SimulatedMachine> copy() const {
        return std::make_unique<io::SimulatedMachine>(machine_->fork(), 2);
    }
    const std::map<std::string, Content>& contents() const { return contents_; }

    std::vector<std::string> sources() {
        std::vector<std::string> names;
        for (const EntityInfo& info : pool_->images()) {
            names.push_back(info.name);
        }
        for (const EntityInfo& info : pool_->volumes()) {
            names.push_back(info.name);
        }
        for (const EntityInfo& info : must(pool_->snapshots(""))) {
            names.push_back(info.name);
        }
        before_close_ = pool_.machine().files().fork();
        return names;
    }

  private:
    TestPool pool_;
    std::unique_ptr<io::SimulatedFileSystem> before_close_;
    std::unique_ptr<io::SimulatedFileSystem> machine_;
    std::map<std::string, Content> contents_;
};

const Sample& closed_sample() {
    static const Sample sample(/*tail=*/false);
    return sample;
}
const Sample& open_sample() {
    static const Sample sample(/*tail=*/true);
    return sample;
}

std::vector<std::string> files_of(io::SimulatedMachine& machine) {
    std::vector<std::string> paths;
    for (const std::string& directory :
         {std::string(kDirectory), fmt::format("{}/segments", kDirectory)}) {
        for (const io::DirectoryEntry& entry : must(machine.files().list(directory))) {
            // The lock and the reserve hold nothing.
            if (!entry.is_directory && entry.name != "lock" && entry.name != "reserve") {
                paths.push_back(directory + "/" + entry.name);
            }
        }
    }
    std::ranges::sort(paths);
    return paths;
}

Content bytes_of_file(io::SimulatedMachine& machine, const std::string& path) {
    const auto file = must(machine.files().open(path, io::OpenMode::kReadOnly));
    Content bytes(must(file->size_bytes()));
    must(io::read_exact(*file, bytes, 0));
    return bytes;
}

void put_file(io::SimulatedMachine& machine, const std::string& path, const Content& bytes) {
    const auto file = must(machine.files().open(path, io::OpenMode::kCreate));
    must(file->truncate(0));
    must(io::write_all(*file, Bytes(bytes), 0));
    must(file->datasync());
}

std::map<std::string, Content> everything(io::SimulatedMachine& machine) {
    std::map<std::string, Content> all;
    for (const std::string& path : files_of(machine)) {
        all[path] = bytes_of_file(machine, path);
    }
    return all;
}

/// Where batches begin in a segment, with the page behind each.
std::vector<nebula::ScannedBatch> batches_of(io::SimulatedMachine& machine, uint32_t number) {
    const Content superblock = bytes_of_file(machine, fmt::format("{}/superblock", kDirectory));
    const auto slot = nebula::decode_superblock_slot(Bytes(superblock).first(kPage));
    const auto file = must(machine.files().open(segment_path(number), io::OpenMode::kReadOnly));
    std::vector<nebula::ScannedBatch> batches;
    for (uint32_t page = 1;;) {
        const auto next = must(nebula::find_batch(*file, slot->store_id, number, page));
        if (!next) {
            return batches;
        }
        batches.push_back(must(
            nebula::read_batch(*file, slot->store_id, number, *next, nebula::DataCheck::kNone)));
        page = batches.back().end_page;
    }
}

nebula::SuperblockSlot newest_slot(io::SimulatedMachine& machine) {
    const Content bytes = bytes_of_file(machine, fmt::format("{}/superblock", kDirectory));
    std::optional<nebula::SuperblockSlot> newest;
    for (size_t i = 0; i < nebula::kSuperblockSlots; ++i) {
        const auto slot = nebula::decode_superblock_slot(Bytes(bytes).subspan(i * kPage, kPage));
        if (slot && (!newest || slot->generation > newest->generation)) {
            newest = *slot;
        }
    }
    return *newest;
}

/// What `report` says of the pool is true: what it does not call lost or unknown reads as it was,
/// and what it does cannot be read. Returns how many bytes were read.
uint64_t expect_true(io::SimulatedMachine& machine, const Sample& sample, const CheckReport& report,
                     const std::string& what) {
    auto opened = Pool::open(machine.env(), kDirectory, check_pool_options());
    if (!opened) {
        ADD_FAILURE() << what << ": " << opened.error().message();
        return 0;
    }
    Pool& pool = **opened;
    EXPECT_EQ(pool.read_only_reason(), std::nullopt) << what;
    uint64_t read_bytes = 0;
    for (const auto& [source, content] : sample.contents()) {
        const bool unknown = std::ranges::find(report.unknown, source) != report.unknown.end();
        auto reader = pool.open_reader(source);
        if (unknown) {
            EXPECT_FALSE(reader) << what << ": " << source;
            continue;
        }
        if (!reader) {
            // Gone with the records that made it.
            EXPECT_TRUE(reader.error().code() == ErrorCode::kNotFound &&
                        (source == "late" || source == "last"))
                << what << ": " << reader.error().message();
            continue;
        }
        const uint64_t size = content.size();
        EXPECT_EQ((*reader)->size_bytes(), size) << what << ": " << source;
        for (uint64_t at = 0; at < size; at += kPage) {
            Content page(std::min(kPage, size - at));
            const bool lost = std::ranges::any_of(report.lost, [&](const LostRange& range) {
                return range.source == source && at >= range.offset_bytes &&
                       at < range.offset_bytes + range.length_bytes;
            });
            const auto read = (*reader)->read(at, page);
            EXPECT_EQ(read.has_value(), !lost)
                << what << ": " << source << " at " << at
                << (read ? std::string() : ": " + read.error().message());
            if (read) {
                EXPECT_TRUE(std::ranges::equal(page, Bytes(content).subspan(at, page.size())))
                    << what << ": other content of " << source << " at " << at;
                read_bytes += page.size();
            }
            if (::testing::Test::HasFailure()) {
                return read_bytes;
            }
        }
    }
    must(pool.close());
    return read_bytes;
}

/// Checks, repairs, checks again, and compares with what the pool held.
void expect_repaired(const Sample& sample, io::SimulatedMachine& machine, const std::string& what,
                     bool must_be_found) {
    const auto before = everything(machine);
    const auto found = look(machine, /*data=*/true);
    ASSERT_TRUE(found) << what << ": " << found.error().message();
    EXPECT_TRUE(before == everything(machine)) << what << ": fsck changed something";
    if (must_be_found) {
        EXPECT_TRUE(found->damaged()) << what;
    }
    if (!found->usable) {
        return;  // Said so. Nothing can be repaired.
    }
    const auto repaired = look(machine, /*data=*/true, /*repair=*/true);
    ASSERT_TRUE(repaired) << what << ": " << repaired.error().message();
    const auto again = look(machine, /*data=*/true);
    ASSERT_TRUE(again) << what << ": " << again.error().message();
    EXPECT_EQ(repaired->repair.has_value(), found->repairable()) << what;
    for (const nebula::Finding& finding : again->findings) {
        EXPECT_TRUE(finding.harmless || finding.kind == Kind::kVolume ||
                    ((finding.kind == Kind::kChunk || finding.kind == Kind::kObject) &&
                     !again->lost.empty()))
            << what << ": left after a repair:\n"
            << describe(*again) << "of:\n"
            << describe(*found);
    }
    expect_true(machine, sample, *again, what + "\n" + describe(*found));
}

// --- Whole pools ---------------------------------------------------------------------------------

TEST(Fsck, APoolThatIsWholeIsClean) {
    for (const Sample* sample : {&closed_sample(), &open_sample()}) {
        const auto machine = sample->copy();
        const auto before = everything(*machine);
        machine->files().reset_counts();
        const auto report = look(*machine, /*data=*/true);
        ASSERT_TRUE(report) << report.error().message();
        EXPECT_FALSE(report->damaged()) << describe(*report);
        EXPECT_TRUE(report->lost.empty() && report->unknown.empty());
        EXPECT_EQ(machine->files().counts().of(io::OperationKind::kWrite), 0U);
        EXPECT_TRUE(before == everything(*machine));
        EXPECT_GE(report->volumes, 3U);
        EXPECT_EQ(report->snapshots, 1U);
        EXPECT_GT(report->counts.data_bytes, 600'000U);
        // A repair of what is whole does nothing.
        const auto repaired = look(*machine, /*data=*/false, /*repair=*/true);
        ASSERT_TRUE(repaired) << repaired.error().message();
        EXPECT_FALSE(repaired->repair);
    }
}

TEST(Fsck, APoolInUseIsLeftAlone) {
    TestPool pool(1, check_pool_options());
    const auto report = look(pool.machine());
    ASSERT_FALSE(report);
    EXPECT_EQ(report.error().code(), ErrorCode::kBusy) << report.error().message();
    const auto repaired = look(pool.machine(), false, /*repair=*/true);
    ASSERT_FALSE(repaired);
    EXPECT_EQ(repaired.error().code(), ErrorCode::kBusy) << repaired.error().message();
}

TEST(Fsck, NoPoolIsNotFound) {
    io::SimulatedMachine machine(1);
    const auto report = look(machine);
    ASSERT_FALSE(report);
    EXPECT_EQ(report.error().code(), ErrorCode::kNotFound);
}

// --- Damage --------------------------------------------------------------------------------------

TEST(Fsck, FlippedBytesAnywhereAreFoundAndRepaired) {
    const uint64_t cases = scaled(80, 12);
    for (const Sample* sample : {&closed_sample(), &open_sample()}) {
        const auto all = everything(*sample->copy());
        uint64_t total = 0;
        for (const auto& [path, bytes] : all) {
            total += bytes.size();
        }
        io::SeededRandom random(first_seed());
        for (uint64_t i = 0; i < cases; ++i) {
            std::array<uint64_t, 2> draw{};
            random.fill(std::as_writable_bytes(std::span(draw)));
            // Half of them in the small files and in headers, where most is at stake.
            auto at = draw[0] % total;
            auto it = all.begin();
            while (at >= it->second.size()) {
                at -= it->second.size();
                ++it;
            }
            if (i % 2 == 0) {
                it = std::next(all.begin(), static_cast<ptrdiff_t>(draw[0] % all.size()));
                at = draw[1] % it->second.size();
            }
            const auto machine = sample->copy();
            machine->files().damage(it->first, at, 1, draw[1]);
            expect_repaired(*sample, *machine, fmt::format("a flip in {} at {}", it->first, at),
                            /*must_be_found=*/false);
            if (HasFatalFailure() || HasNonfatalFailure()) {
                return;
            }
        }
    }
}

TEST(Fsck, AFooterThatIsWrittenAfterObjectsOfPacksDiedIsInOrder) {
    const Sample sample(/*tail=*/false, /*neighbours=*/6);
    const auto whole = sample.copy();
    const nebula::SuperblockSlot slot = newest_slot(*whole);
    const Content bytes = bytes_of_file(
        *whole, kDirectory + ("/" + nebula::dead_map_file_name(slot.dead_map_generation)));
    const nebula::DeadMap map =
        must(nebula::decode_dead_map(bytes, slot.store_id, slot.dead_map_generation));
    size_t tried = 0;
    for (const auto& [number, dead] : map.segments) {
        if (dead.members.empty() || dead.whole) {
            continue;
        }
        ++tried;
        const std::string path = segment_path(number);
        const uint64_t end = bytes_of_file(*whole, path).size();
        for (const uint64_t offset : {uint64_t{0}, end - 1}) {
            const auto machine = sample.copy();
            machine->files().damage(path, offset, 1, 1);
            expect_repaired(sample, *machine, fmt::format("{} at {}", path, offset),
                            /*must_be_found=*/true);
        }
    }
    EXPECT_GT(tried, 0U) << "no object died in a pack that is needed";
}

TEST(Fsck, AFileThatEndsWithinItsLastBatchIsRepaired) {
    uint64_t cuts = 0;
    for (const Sample* sample : {&closed_sample(), &open_sample()}) {
        const auto whole = sample->copy();
        const uint32_t number = newest_slot(*whole).last_segment;
        const std::string path = segment_path(number);
        const Content bytes = bytes_of_file(*whole, path);
        // The last one that has a pack.
        std::vector<nebula::ScannedBatch> batches = batches_of(*whole, number);
        std::erase_if(batches, [](const nebula::ScannedBatch& batch) {
            return std::ranges::none_of(batch.entries, [](const nebula::Entry& entry) {
                return entry.entry_kind() == nebula::EntryKind::kMember;
            });
        });
        ASSERT_FALSE(batches.empty());
        for (uint64_t end = batches.back().page * kPage; end < bytes.size(); end += 1000) {
            ++cuts;
            const auto machine = sample->copy();
            put_file(*machine, path,
                     Content(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(end)));
            expect_repaired(*sample, *machine, fmt::format("{} ends at {}", path, end),
                            /*must_be_found=*/false);
            if (HasFailure()) {
                return;
            }
        }
    }
    EXPECT_GT(cuts, 8U);
}

TEST(Fsck, APackWhoseTableRotsIsRepaired) {
    const Sample& sample = closed_sample();
    const auto whole = sample.copy();
    const uint64_t step = std::max<uint64_t>(1, 40 / scaled(40, 8));
    uint64_t packs = 0;
    for (const std::string& path : files_of(*whole)) {
        const auto number = nebula::parse_segment_file_name(path.substr(path.rfind('/') + 1));
        if (!number) {
            continue;
        }
        for (const nebula::ScannedBatch& batch : batches_of(*whole, *number)) {
            for (const nebula::Entry& entry : batch.entries) {
                if (entry.entry_kind() != nebula::EntryKind::kPack || packs++ % step != 0) {
                    continue;
                }
                // Its header, the id of its first object, that object's place, and its content.
                const uint64_t content =
                    sizeof(nebula::PackHeader) + sizeof(nebula::PackEntry) + 20;
                for (const uint64_t within : {uint64_t{1}, uint64_t{20}, uint64_t{48}, content}) {
                    const auto machine = sample.copy();
                    machine->files().damage(path, entry.offset_bytes() + within, 1, within);
                    expect_repaired(sample, *machine,
                                    fmt::format("{} at {}", path, entry.offset_bytes() + within),
                                    /*must_be_found=*/false);
                    if (HasFailure()) {
                        return;
                    }
                }
            }
        }
    }
    EXPECT_GT(packs, 4U);
}

TEST(Fsck, EveryHeaderThatRotsIsFound) {
    for (const Sample* sample : {&closed_sample(), &open_sample()}) {
        const auto whole = sample->copy();
        for (const std::string& path : files_of(*whole)) {
            const std::string name = path.substr(path.rfind('/') + 1);
            const auto number = nebula::parse_segment_file_name(name);
            std::vector<uint64_t> offsets{0};
            if (number) {
                offsets.push_back(20);  // In the segment's header.
                for (const nebula::ScannedBatch& batch : batches_of(*whole, *number)) {
                    offsets.push_back(uint64_t{batch.page} * kPage + 60);
                }
            }
            for (const uint64_t offset : offsets) {
                const auto machine = sample->copy();
                machine->files().damage(path, offset, 4, offset + 1);
                // A torn end is none: the last batch of an unclean log may be one.
                const auto found = look(*machine);
                ASSERT_TRUE(found) << found.error().message();
                EXPECT_TRUE(found->damaged() || !found->findings.empty())
                    << path << " at " << offset;
                expect_repaired(*sample, *machine, fmt::format("{} at {}", path, offset),
                                /*must_be_found=*/false);
                if (HasFailure()) {
                    return;
                }
            }
        }
    }
}

TEST(Fsck, MissingAndTruncatedFilesAreFoundAndRepaired) {
    for (const Sample* sample : {&closed_sample(), &open_sample()}) {
        for (const auto& [path, bytes] : everything(*sample->copy())) {
            for (const int part : {0, 1, 2, 3}) {
                const auto machine = sample->copy();
                if (part == 3) {
                    must(machine->files().remove(path));
                } else {
                    Content rest = bytes;
                    rest.resize(bytes.size() * static_cast<size_t>(part) / 3 + 17 * part);
                    put_file(*machine, path, rest);
                }
                expect_repaired(*sample, *machine, fmt::format("{} part {}", path, part),
                                /*must_be_found=*/false);
                if (HasFailure()) {
                    return;
                }
            }
        }
    }
}

TEST(Fsck, FilesOfOtherStoresAndPlacesAreFoundAndRepaired) {
    const Sample& sample = closed_sample();
    TestPool other(77, check_pool_options());
    import_image(*other, "other", random_bytes(700'000, 9));
    other.close();
    const auto all = everything(*sample.copy());
    for (const auto& [path, bytes] : all) {
        const auto machine = sample.copy();
        if (!must(other.machine().files().exists(path))) {
            continue;
        }
        put_file(*machine, path, bytes_of_file(other.machine(), path));
        expect_repaired(sample, *machine, "another store's " + path, /*must_be_found=*/true);
        if (HasFailure()) {
            return;
        }
    }
    // Two segments of the store change places.
    const auto machine = sample.copy();
    std::vector<std::string> segments;
    for (const auto& [path, bytes] : all) {
        if (path.ends_with(".seg")) {
            segments.push_back(path);
        }
    }
    ASSERT_GE(segments.size(), 3U);
    put_file(*machine, segments[0], all.at(segments[1]));
    put_file(*machine, segments[1], all.at(segments[0]));
    expect_repaired(sample, *machine, "swapped segments", /*must_be_found=*/true);
}

TEST(Fsck, AMissingFolderOfSegmentsIsDamage) {
    const auto remove_segments = [](io::SimulatedMachine& machine) {
        const std::string folder = fmt::format("{}/segments", kDirectory);
        for (const io::DirectoryEntry& entry : must(machine.files().list(folder))) {
            must(machine.files().remove(folder + "/" + entry.name));
        }
        must(machine.files().remove(folder));
    };
    for (const Sample* sample : {&closed_sample(), &open_sample()}) {
        const auto machine = sample->copy();
        remove_segments(*machine);
        for (const bool repair : {false, true}) {
            const auto report = look(*machine, /*data=*/false, repair);
            ASSERT_TRUE(report) << report.error().message();
            EXPECT_TRUE(report->damaged() && !report->usable && !report->repairable())
                << describe(*report);
            EXPECT_NE(describe(*report).find("segments"), std::string::npos);
        }
        const auto opened = Pool::open(machine->env(), kDirectory, check_pool_options());
        ASSERT_FALSE(opened);
        EXPECT_EQ(opened.error().code(), ErrorCode::kCorrupt) << opened.error().message();
    }
    // Of a store in which nothing ever was, nothing is lost.
    io::SimulatedMachine machine(1);
    machine.files().mount(TestPool::kRuntime,
                          {.kind = io::FileSystemKind::kMemory, .name = "tmpfs"});
    must(nebula::Store::create(machine.env(), kDirectory, check_pool_options().store));
    remove_segments(machine);
    const auto found = look(machine);
    ASSERT_TRUE(found) << found.error().message();
    EXPECT_TRUE(found->damaged() && found->repairable()) << describe(*found);
    const auto repaired = look(machine, /*data=*/false, /*repair=*/true);
    ASSERT_TRUE(repaired) << repaired.error().message();
    EXPECT_FALSE(repaired->damaged()) << describe(*repaired);
    auto pool = must(Pool::open(machine.env(), kDirectory, check_pool_options()));
    import_image(*pool, "new", random_bytes(100'000, 1));
    must(pool->close());
}

TEST(Fsck, AnEmptySegmentFileIsCalledALoss) {
    const Sample& sample = closed_sample();
    const auto machine = sample.copy();
    put_file(*machine, segment_path(1), {});
    const auto found = look(*machine);
    ASSERT_TRUE(found) << found.error().message();
    EXPECT_TRUE(std::ranges::any_of(found->findings, [](const nebula::Finding& finding) {
        return finding.kind == Kind::kSegmentHeader && finding.file == segment_path(1) &&
               finding.consequence.find("is lost") != std::string::npos;
    })) << describe(*found);
}

TEST(Fsck, WhereOnlyLostContentIsLeftThereIsNothingToRepair) {
    const Sample& sample = closed_sample();
    const auto machine = sample.copy();
    must(machine->files().remove(segment_path(1)));
    ASSERT_TRUE(must(look(*machine, /*data=*/true, /*repair=*/true)).damaged());
    const auto before = everything(*machine);
    const auto again = look(*machine, /*data=*/true, /*repair=*/true);
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_FALSE(again->lost.empty()) << describe(*again);
    EXPECT_FALSE(again->repairable() || again->repair) << describe(*again);
    EXPECT_TRUE(before == everything(*machine)) << "a repair for nothing";
}

TEST(Fsck, ADamagedBootManifestIsNamedAndCostsNothingElse) {
    TestPool pool(1, check_pool_options());
    const Content content = random_bytes(75 * kPage, 1);
    import_image(*pool, "debian", content);
    must(pool->clone("debian", {"vm"}));
    const Hash256 root = must(pool->boot_root("debian"));
    const Content manifest = random_bytes(20'000, 9);
    must(pool->set_boot_manifest(root, manifest));
    must(pool->checkpoint());
    pool.close();
    io::SimulatedMachine machine(pool.machine().files().fork(), 2);
    EXPECT_FALSE(must(look(machine, /*data=*/true)).damaged()) << "whole at first";

    // As it lies in a segment, and as any of its bytes may rot.
    size_t found = 0;
    for (const std::string& path : files_of(machine)) {
        Content bytes = bytes_of_file(machine, path);
        const auto at = std::ranges::search(bytes, Bytes(manifest).first(4096)).begin();
        if (at != bytes.end()) {
            *(at + 1234) ^= std::byte{1};
            put_file(machine, path, bytes);
            ++found;
        }
    }
    ASSERT_EQ(found, 1U);
    for (const bool repair : {false, true}) {
        const CheckReport report = must(look(machine, /*data=*/true, repair));
        const std::string text = describe(report);
        EXPECT_NE(text.find("boot manifest of images with root " + root.hex()), std::string::npos)
            << text;
        EXPECT_NE(text.find("stellarctl boot rm"), std::string::npos) << text;
        EXPECT_TRUE(has(report, Kind::kObject)) << text;
        EXPECT_TRUE(report.lost.empty() && report.unknown.empty()) << text;
    }
    {
        const auto opened = must(Pool::open(machine.env(), kDirectory, check_pool_options()));
        EXPECT_EQ(code_of(opened->boot_manifest(root)), ErrorCode::kCorrupt);
        EXPECT_EQ(export_all(*opened, "vm"), content);
        EXPECT_EQ(export_all(*opened, "debian"), content);
        must(opened->set_boot_manifest(root, std::nullopt));
        must(opened->checkpoint());
        must(opened->gc({}));
        must(opened->close());
    }
    const CheckReport healed = must(look(machine, /*data=*/true));
    EXPECT_FALSE(healed.damaged()) << describe(healed);
}

TEST(Fsck, AMissingSegmentIsNamedWithWhatItHeld) {
    const Sample& sample = closed_sample();
    const auto machine = sample.copy();
    must(machine->files().remove(segment_path(1)));
    const auto report = look(*machine);
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_TRUE(report->damaged());
    ASSERT_FALSE(report->lost.empty()) << describe(*report);
    EXPECT_TRUE(std::ranges::any_of(report->findings, [](const nebula::Finding& finding) {
        return finding.file == segment_path(1) && finding.id &&
               finding.consequence.find("image 'debian' bytes ") != std::string::npos;
    })) << describe(*report);
}

// --- No checkpoint -------------------------------------------------------------------------------

/// A pool that never collected garbage, whose process has died or ended.
class WholeLog {
  public:
    explicit WholeLog(bool closed) : pool_(1, check_pool_options()) {
        import_image(*pool_, "debian", random_bytes(600'000, 1));
        must(pool_->clone("debian", {"a", "b"}));
        for (uint64_t i = 0; i < 12; ++i) {
            write_to(pool_, "a", i * 40'960, 100 + i);
        }
        must(pool_->create_snapshot("a", "s"));
        must(pool_->checkpoint());
        must(pool_->rename("b", "c"));
        write_to(pool_, "a", 8192, 300);
        must(pool_->checkpoint());
        import_image(*pool_, "gone", random_bytes(100'000, 2));
        must(pool_->remove({"gone"}));
        write_to(pool_, "c", 8192, 301);
        for (const std::string source : {"debian", "a", "a@s", "c"}) {
            contents_[source] = export_all(*pool_, source);
        }
        if (closed) {
            pool_.close();
        }
        files_ = pool_.machine().files().fork();
    }
    std::unique_ptr<io::SimulatedMachine> copy() const {
        return std::make_unique<io::SimulatedMachine>(files_->fork(), 2);
    }
    void expect_all(io::SimulatedMachine& machine, const std::string& what) const {
        auto pool = must(Pool::open(machine.env(), kDirectory, check_pool_options()));
        EXPECT_EQ(pool->read_only_reason(), std::nullopt) << what;
        EXPECT_EQ(pool->images().size() + pool->volumes().size(), 3U) << what;
        for (const auto& [source, content] : contents_) {
            EXPECT_EQ(export_all(*pool, source), content) << what << ": " << source;
        }
        import_image(*pool, "new", random_bytes(100'000, 9));
        must(pool->close());
    }

  private:
    TestPool pool_;
    std::map<std::string, Content> contents_;
    std::unique_ptr<io::SimulatedFileSystem> files_;
};

/// Every way to be without a checkpoint.
const std::map<std::string, std::function<void(io::SimulatedMachine&)>>& lost_checkpoints() {
    static const std::string superblock = fmt::format("{}/superblock", kDirectory);
    static const std::map<std::string, std::function<void(io::SimulatedMachine&)>> all{
        {"no superblock",
         [](io::SimulatedMachine& machine) { must(machine.files().remove(superblock)); }},
        {"an empty superblock",
         [](io::SimulatedMachine& machine) { put_file(machine, superblock, {}); }},
        {"four rotten copies",
         [](io::SimulatedMachine& machine) {
             for (uint64_t i = 0; i < nebula::kSuperblockSlots; ++i) {
                 machine.files().damage(superblock, i * kPage + 70 + i, 1, 1);
             }
         }},
        {"two rotten catalogs",
         [](io::SimulatedMachine& machine) {
             const Content bytes = bytes_of_file(machine, superblock);
             for (uint64_t i = 0; i < nebula::kSuperblockSlots; i += 2) {
                 const auto slot =
                     must(nebula::decode_superblock_slot(Bytes(bytes).subspan(i * kPage, kPage)));
                 const auto root = load<format::CatalogRoot>(
                     std::as_bytes(std::span(slot.payload)).first(slot.payload_bytes));
                 const nebula::PageAddress at(root.pieces.hint);
                 // The whole of its page: it lies in a pack.
                 machine.files().damage(segment_path(at.segment()), at.offset_bytes(), kPage, i);
             }
         }},
    };
    return all;
}

TEST(Fsck, WithoutACheckpointALogThatIsWholeIsEnough) {
    for (const bool closed : {true, false}) {
        const WholeLog sample(closed);
        for (const auto& [name, lose] : lost_checkpoints()) {
            const std::string what = fmt::format("{}, {}", name, closed ? "closed" : "killed");
            const auto machine = sample.copy();
            lose(*machine);
            const auto before = everything(*machine);
            const auto found = look(*machine, /*data=*/true);
            ASSERT_TRUE(found) << what << ": " << found.error().message();
            EXPECT_TRUE(found->damaged() && found->usable && found->repairable())
                << what << "\n"
                << describe(*found);
            EXPECT_TRUE(found->lost.empty() && found->unknown.empty()) << describe(*found);
            EXPECT_TRUE(before == everything(*machine)) << what << ": fsck changed something";
            const auto opened = Pool::open(machine->env(), kDirectory, check_pool_options());
            ASSERT_FALSE(opened) << what;
            const auto repaired = look(*machine, /*data=*/true, /*repair=*/true);
            ASSERT_TRUE(repaired) << what << ": " << repaired.error().message();
            EXPECT_TRUE(repaired->repair) << what;
            EXPECT_FALSE(repaired->damaged()) << what << "\n" << describe(*repaired);
            sample.expect_all(*machine, what);
            EXPECT_FALSE(must(look(*machine, /*data=*/true)).damaged()) << what;
        }
    }
}

TEST(Fsck, ACrashWhileASuperblockIsMadeAnewLosesNothing) {
    const WholeLog sample(/*closed=*/true);
    for (const auto& [name, lose] : lost_checkpoints()) {
        bool complete = false;
        for (uint64_t nth = 1; !complete && nth < 100; ++nth) {
            const auto machine = sample.copy();
            lose(*machine);
            machine->files().halt_at_mutation(nth, static_cast<io::HaltSide>(nth % 4));
            const auto repaired = look(*machine, false, /*repair=*/true);
            complete = repaired.has_value() && !machine->files().halted();
            machine->crash(first_seed() + nth);
            const std::string what = fmt::format("{}, crash at {}", name, nth);
            const auto again = look(*machine, false, /*repair=*/true);
            ASSERT_TRUE(again) << what << ": " << again.error().message();
            EXPECT_FALSE(again->damaged()) << what << "\n" << describe(*again);
            sample.expect_all(*machine, what);
            if (HasFailure()) {
                return;
            }
        }
        EXPECT_TRUE(complete) << name;
    }
}

TEST(Fsck, WithoutACheckpointWhatLiesBehindTheLogIsNotTakenForTorn) {
    // The last batch has rotted, and nothing says any more that it was acknowledged.
    const WholeLog sample(/*closed=*/true);
    const auto machine = sample.copy();
    uint32_t number = newest_slot(*machine).last_segment;
    while (must(machine->files().exists(segment_path(number + 1)))) {
        ++number;
    }
    const nebula::ScannedBatch last = batches_of(*machine, number).back();
    machine->files().damage(segment_path(number), last.page * kPage + 60, 1, 1);
    must(machine->files().remove(fmt::format("{}/superblock", kDirectory)));
    const auto repaired = look(*machine, /*data=*/false, /*repair=*/true);
    ASSERT_TRUE(repaired) << repaired.error().message();
    EXPECT_EQ(repaired->unknown, (std::vector<std::string>{"a", "c"})) << describe(*repaired);
    const auto pool = must(Pool::open(machine->env(), kDirectory, check_pool_options()));
    EXPECT_FALSE(pool->open_reader("a"));
    EXPECT_TRUE(pool->open_reader("a@s"));
}

TEST(Fsck, WithoutACheckpointALogWithoutItsBeginningIsRefused) {
    // Its first segments were freed.
    const Sample& sample = closed_sample();
    for (const auto& [name, lose] : lost_checkpoints()) {
        const auto machine = sample.copy();
        lose(*machine);
        const auto before = everything(*machine);
        const auto report = look(*machine, /*data=*/false, /*repair=*/true);
        ASSERT_TRUE(report) << name << ": " << report.error().message();
        EXPECT_TRUE(report->damaged() && !report->usable && !report->repair) << describe(*report);
        EXPECT_NE(report->findings.back().advice.find("does not hold every batch"),
                  std::string::npos)
            << report->findings.back().advice;
        EXPECT_TRUE(before == everything(*machine)) << name;
    }
}

// --- Lost records --------------------------------------------------------------------------------

/// The sample with a batch behind the checkpoint gone.
std::unique_ptr<io::SimulatedMachine> without_batch_behind_checkpoint(size_t which) {
    auto machine = open_sample().copy();
    const nebula::SuperblockSlot slot = newest_slot(*machine);
    std::vector<nebula::ScannedBatch> behind;
    for (const nebula::ScannedBatch& batch : batches_of(*machine, slot.log_segment)) {
        if (batch.page >= slot.log_page.get()) {
            behind.push_back(batch);
        }
    }
    EXPECT_GT(behind.size(), which + 1);
    machine->files().damage(segment_path(slot.log_segment),
                            uint64_t{behind.at(which).page} * kPage + 100, 3, 1);
    return machine;
}

TEST(Fsck, ACatalogBehindARottenHeaderIsFound) {
    const auto machine = without_batch_behind_checkpoint(0);
    const auto found = look(*machine);
    ASSERT_TRUE(found) << found.error().message();
    EXPECT_TRUE(found->damaged() && found->usable) << describe(*found);
    EXPECT_TRUE(has(*found, Kind::kLog) && has(*found, Kind::kBatch)) << describe(*found);
    // Nobody knows what the batch held: volumes are refused, images are served.
    EXPECT_EQ(found->unknown, (std::vector<std::string>{"a", "b", "c"})) << describe(*found);
    const auto repaired = look(*machine, false, /*repair=*/true);
    ASSERT_TRUE(repaired) << repaired.error().message();
    ASSERT_TRUE(repaired->repair);
    EXPECT_TRUE(repaired->lost.empty()) << describe(*repaired);
    expect_true(*machine, open_sample(), *repaired, "a rotten header");

    // With the unknown volumes gone, or rolled back, all is well.
    auto pool = must(Pool::open(machine->env(), kDirectory, check_pool_options()));
    must(pool->rollback("a", "s"));
    must(pool->remove({"b", "c"}));
    must(pool->close());
    pool.reset();
    const auto after = look(*machine, /*data=*/true);
    ASSERT_TRUE(after) << after.error().message();
    EXPECT_FALSE(after->damaged()) << describe(*after);
}

TEST(Fsck, WhatFollowsLostRecordsIsKept) {
    const auto machine = without_batch_behind_checkpoint(2);
    const auto repaired = look(*machine, false, /*repair=*/true);
    ASSERT_TRUE(repaired) << repaired.error().message();
    EXPECT_EQ(repaired->unknown, (std::vector<std::string>{"a", "b", "c"})) << describe(*repaired);
    auto pool = must(Pool::open(machine->env(), kDirectory, check_pool_options()));
    EXPECT_TRUE(pool->find("late")) << "made behind the gap, of an image";
    EXPECT_TRUE(pool->find("last"));
}

// --- Repairs that are interrupted
// ------------------------------------------------------------------

TEST(Fsck, ACrashWithinARepairLosesNothing) {
    const std::vector<std::function<void(io::SimulatedMachine&)>> damages{
        [](io::SimulatedMachine& machine) {
            const nebula::SuperblockSlot slot = newest_slot(machine);
            machine.files().damage(segment_path(slot.log_segment),
                                   uint64_t{slot.log_page.get()} * kPage + 100, 3, 1);
        },
        [](io::SimulatedMachine& machine) {
            const auto batches = batches_of(machine, 1);
            machine.files().damage(segment_path(1), uint64_t{batches.at(1).page} * kPage + 90, 3,
                                   1);
            machine.files().damage(segment_path(1), 30, 3, 1);
        },
        [](io::SimulatedMachine& machine) {
            for (const std::string& path : files_of(machine)) {
                if (path.find("dead-") != std::string::npos) {
                    machine.files().damage(path, 40, 1, 1);
                }
            }
        },
    };
    const uint64_t most = scaled(40, 6);
    for (size_t which = 0; which < damages.size(); ++which) {
        const auto damaged = open_sample().copy();
        damages[which](*damaged);
        const auto expected = look(*damaged);
        ASSERT_TRUE(expected && expected->damaged());
        bool complete = false;
        uint64_t step = 1;
        for (uint64_t nth = 1; !complete && nth < most * 4; nth += step) {
            io::SimulatedMachine machine(damaged->files().fork(), 3);
            machine.files().halt_at_mutation(nth, static_cast<io::HaltSide>(nth % 4));
            const auto repaired = look(machine, false, /*repair=*/true);
            complete = repaired.has_value() && !machine.files().halted();
            machine.crash(first_seed() + nth);
            const auto after = look(machine);
            ASSERT_TRUE(after) << after.error().message();
            ASSERT_TRUE(after->usable) << describe(*after);
            EXPECT_EQ(after->unknown, expected->unknown) << which << "/" << nth;
            EXPECT_EQ(after->lost.size(), expected->lost.size()) << which << "/" << nth << "\n"
                                                                 << describe(*after);
            const auto again = look(machine, false, /*repair=*/true);
            ASSERT_TRUE(again) << again.error().message();
            expect_true(machine, open_sample(), *again,
                        fmt::format("damage {}, crash at {}", which, nth));
            if (HasFailure()) {
                return;
            }
            step = nth > most ? 5 : 1;
        }
    }
}

}  // namespace
}  // namespace stellarium::nova
