// Crash test of a whole pool.
//
// Random programs of several writers run on the simulated machine: guests write, discard and flush
// volumes that share content, an import goes on across everything else, snapshots, clones and names
// come and go, checkpoints are made, garbage is collected, and between the steps of a collection
// the others go on, with content that is about to die. Before every sync, before other operations
// that change the disk now and then, and between requests, the machine is copied, as a loss of
// power would leave it or the death of the process. A pool opened on the copy is held against what
// docs/internals/crash-model.md promises:
//
//   - it opens for writing; if opening is cut off, too, the next opening finds the same;
//   - after the death of the process each sector is what was written last; after a loss of power it
//     is what was there at the last flush or was written since, never a third thing; where a
//     request was under way it is old or new;
//   - commands that returned have happened, the one under way wholly or not at all;
//   - snapshots, names, parents and attachments are exact;
//   - every byte can be read and hashes to what its volume refers to;
//   - fsck finds nothing wrong with it, before recovery (but for torn copies of the superblock) and
//     after;
//   - the pool works on, collects garbage, and what it is given then survives the next crash;
//   - rot in what later batches prove durable is never taken for the end of the log, and no read
//     gives what is not allowed.
//
//     STELLARIUM_TEST_SEED=17    begin with program 17, the one that failed
//     STELLARIUM_TEST_SCALE=10   ten times as many crash points
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "io/simulated.h"
#include "nebula/store.h"
#include "nova/pool.h"
#include "nova/testing/test_pool.h"
#include "test/model/pool_check.h"
#include "test/model/pool_commands.h"
#include "test/model/pool_shadow.h"

namespace stellarium::nova::model {
namespace {

using testing::must;
using testing::TestPool;

constexpr int kStepsPerProgram = 70;
constexpr size_t kMaxThings = 7;
constexpr uint64_t kMaxVolumePages = 160;
/// Recurring pages, so that volumes share chunks.
constexpr uint64_t kCommonPages = 24;

PoolOptions options_for(uint64_t seed) {
    PoolOptions options = TestPool::small_options();
    options.store.segment_bytes = seed % 3 == 0 ? kMiB : nebula::kMinSegmentBytes;
    options.store.index_rewrite_factor = seed % 2 == 0 ? 0 : 1;
    options.dirty_budget_bytes = seed % 3 == 1 ? kMinDirtyBudgetBytes : kMiB;
    options.node_cache_bytes = seed % 4 == 0 ? 64 * kKiB : kMiB;
    options.checkpoint_bytes = seed % 5 == 0 ? kMiB : 512 * kMiB;
    if (seed % 7 == 0) {
        options.runtime_directory.clear();
    }
    return options;
}

/// Uniform numbers by a seed.
class Dice {
  public:
    explicit Dice(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        state_ += 0x9e3779b97f4a7c15;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t bound) { return next() % bound; }
    bool chance(uint64_t percent) { return below(100) < percent; }
    bool one_in(uint64_t n) { return below(n) == 0; }

  private:
    uint64_t state_;
};

struct Tally {
    uint64_t crash_points = 0;  ///< Copies of a machine that were opened and compared.
    uint64_t at_syncs = 0;      ///< Of those, before a datasync, sync_directory or rename.
    uint64_t in_collections = 0;
    uint64_t in_recoveries = 0;
    uint64_t process_deaths = 0;
    uint64_t rotten = 0;
    uint64_t programs = 0;
    uint64_t bytes = 0;
};

/// A request that has not returned: may have happened, or not, or a guest's in part.
struct InFlight {
    const PoolCommand* command = nullptr;  ///< Else of a guest:
    std::string volume{};
    uint64_t offset_bytes = 0;
    std::vector<std::byte> data{};
};

/// How far each segment is known to be durable.
using SegmentSizes = std::map<std::string, uint64_t>;

class Program {
  public:
    Program(uint64_t seed, Tally& tally)
        : dice_(seed),
          crash_dice_(~seed),
          tally_(tally),
          options_(options_for(seed)),
          keeps_arena_(!options_.runtime_directory.empty()),
          pool_(seed, options_) {
        careful_ = options_;
        careful_.store.verify_always = true;
    }

    void run() {
        try {
            pool_.machine().files().set_observer(
                [this](io::OperationKind kind, std::string_view path) { observe(kind, path); });
            for (int i = 0; i < 3; ++i) {
                create();
            }
            for (int i = 0; i < kStepsPerProgram && !failed(); ++i) {
                step();
                if (crash_dice_.one_in(3)) {
                    crash_here("between requests");
                }
            }
            pool_.machine().files().set_observer({});
        } catch (const std::exception& error) {
            ADD_FAILURE() << error.what();
        }
        ++tally_.programs;
        tally_.bytes += check_.bytes() + check_copy_.bytes();
        if (failed()) {
            fmt::print(stderr, "operations of the failed program:\n  {}\n",
                       fmt::join(history_, "\n  "));
        }
        abandon();
    }

  private:
    static bool failed() { return ::testing::Test::HasFailure(); }
    void log(std::string what) { history_.push_back(std::move(what)); }

    // --- Crashes ---------------------------------------------------------------------------------

    void observe(io::OperationKind kind, std::string_view path) {
        using enum io::OperationKind;
        if (failed()) {
            return;
        }
        switch (kind) {
            case kDatasync:
            case kSyncDirectory:
            case kRename:
                ++tally_.at_syncs;
                break;
            case kOpen:
            case kWrite:
            case kTruncate:
            case kPunchHole:
            case kAllocate:
            case kRemove:
                if (!crash_dice_.one_in(collecting_ ? 2 : 4)) {
                    return;
                }
                break;
            default:
                return;
        }
        interleave();
        crash_here(fmt::format("before operation {} on {}", static_cast<int>(kind), path));
    }

    /// While one request is in the middle of its work another guest's write completes.
    void interleave() {
        if (in_flight_.empty() || in_flight_.back().command != nullptr || interleaving_ ||
            !crash_dice_.one_in(4)) {
            return;
        }
        interleaving_ = true;
        for (const auto& [name, device] : devices_) {
            if (device && name != in_flight_.back().volume && shadow_.contains(name)) {
                const uint64_t pages = shadow_.at(name).content.size_bytes() / kPageBytes;
                if (pages > 0) {
                    const uint64_t page = crash_dice_.below(pages);
                    const auto data = testing::random_bytes(kPageBytes, crash_dice_.next());
                    if (testing::write(*device, page * kPageBytes, data, IoMode::kNoWait)) {
                        log(fmt::format("  meanwhile: write {} page {}", name, page));
                        shadow_.at(name).write(page * kPageBytes, data);
                    }
                }
                break;
            }
        }
        interleaving_ = false;
    }

    void crash_here(const std::string& where) {
        const bool power = !crash_dice_.one_in(4);
        const uint64_t seed = crash_dice_.next();
        SCOPED_TRACE(fmt::format("crash point {}, {}, {}: {}", tally_.crash_points,
                                 power ? "power" : "process", where, history_.back()));
        tally_.process_deaths += power ? 0 : 1;
        tally_.in_collections += collecting_ ? 1 : 0;
        Shadow shadow = shadow_;
        for (const InFlight& request : in_flight_) {
            if (request.command == nullptr && !request.data.empty()) {
                shadow.at(request.volume).may_have_written(request.offset_bytes, request.data);
            }
        }
        const io::SimulatedFileSystem& files = pool_.machine().files();
        try {
            check_copy(power ? files.crashed_copy(seed) : files.fork(), shadow,
                       power || lost_ || !keeps_arena_, seed);
            if (power && crash_dice_.one_in(10) && !failed()) {
                check_rotten_copy(files.crashed_copy(seed), std::move(shadow), seed);
            }
        } catch (const std::exception& error) {
            ADD_FAILURE() << error.what();
        }
    }

    /// Opens a pool after a crash, also when opening is cut off by another one.
    void open_copy(TestPool& copy, bool& lost) {
        for (int i = 0; i < 3 && crash_dice_.one_in(4); ++i) {
            io::SimulatedFileSystem& files = copy.machine().files();
            files.halt_at_mutation(1 + crash_dice_.below(10),
                                   static_cast<io::HaltSide>(crash_dice_.below(4)));
            const auto opened = copy.try_open();
            if (!files.halted()) {
                files.halt_at_mutation(0);
                must(opened);
                return;
            }
            ++tally_.crash_points;
            ++tally_.in_recoveries;
            if (crash_dice_.one_in(2)) {
                copy.machine().crash(crash_dice_.next());
                lost = true;
            } else {
                copy.machine().kill_process();
            }
            copy.drop();
        }
        copy.open();
    }

    void check_copy(std::unique_ptr<io::SimulatedFileSystem> files, Shadow shadow, bool lost,
                    uint64_t seed) {
        ++tally_.crash_points;
        const bool with_fsck = tally_.crash_points % 4 == 0;
        if (with_fsck) {
            check_structure(*files, /*recovered=*/false);
        }
        TestPool copy(std::move(files), seed, careful_);
        open_copy(copy, lost);
        if (with_fsck) {
            check_structure(copy.machine().files(), /*recovered=*/true);
        }
        EXPECT_EQ(copy->read_only_reason().value_or(""), "");
        for (const InFlight& request : in_flight_) {
            if (request.command != nullptr && request.command->has_happened(*copy)) {
                request.command->apply(shadow);
            }
        }
        check_copy_.everything(*copy, shadow, lost);
        EXPECT_EQ(copy->stats().store.index_misses_recovered, 0U);
        if (!failed() && crash_dice_.one_in(5)) {
            go_on_with(copy, shadow);
        }
    }

    /// The copy is a pool like any other.
    void go_on_with(TestPool& copy, Shadow& shadow) {
        ++tally_.crash_points;
        std::shared_ptr<BlockDevice> device;
        for (auto& [name, volume] : shadow) {
            const uint64_t pages = volume.content.size_bytes() / kPageBytes;
            if (volume.is_image || pages == 0) {
                continue;
            }
            device = must(copy->attach(name, {}));
            for (int i = 0; i < 2; ++i) {
                const uint64_t page = crash_dice_.below(pages);
                const auto data =
                    testing::random_bytes(kPageBytes, crash_dice_.below(kCommonPages));
                must(testing::write(*device, page * kPageBytes, data));
                volume.write(page * kPageBytes, data);
                if (i == 0) {
                    must(testing::flush(*device));
                    volume.flushed();
                }
            }
            if (crash_dice_.one_in(4)) {
                break;  // And dies with what is in the buffer.
            }
            volume.flushed();  // Detaching flushes.
            device.reset();
            if (crash_dice_.one_in(4)) {
                must(copy->gc({}));
            }
        }
        const bool power = crash_dice_.one_in(2);
        if (power) {
            copy.machine().crash(crash_dice_.next());
        } else {
            copy.machine().kill_process();
        }
        device.reset();
        copy.drop();
        copy.open();
        check_structure(copy.machine().files(), /*recovered=*/true, /*data=*/true);
        check_copy_.everything(*copy, shadow, power || !keeps_arena_);
    }

    // --- Rot -------------------------------------------------------------------------------------

    SegmentSizes segment_sizes() {
        SegmentSizes sizes;
        io::SimulatedFileSystem& files = pool_.machine().files();
        const std::string directory = fmt::format("{}/segments", TestPool::kDirectory);
        for (const io::DirectoryEntry& entry : must(files.list(directory))) {
            const std::string path = directory + "/" + entry.name;
            const auto file = must(files.open(path, io::OpenMode::kReadOnly));
            sizes[path] = must(file->size_bytes());
        }
        return sizes;
    }

    /// Something was acknowledged as durable: what had been before is proven by it.
    void note_durable() {
        const nebula::StoreStats store = pool_->stats().store;
        if (store.durable_sequence == store.sequence && store.sequence > durable_sequence_) {
            durable_sequence_ = store.sequence;
            proven_ = std::exchange(durable_, segment_sizes());
        }
    }

    void check_rotten_copy(std::unique_ptr<io::SimulatedFileSystem> files, Shadow shadow,
                           uint64_t seed) {
        std::vector<std::pair<std::string, uint64_t>> candidates;
        for (const auto& [path, size] : proven_) {
            if (size > kPageBytes && must(files->exists(path))) {
                const auto file = must(files->open(path, io::OpenMode::kReadOnly));
                const uint64_t now = std::min(size, must(file->size_bytes()));
                if (now > kPageBytes) {
                    candidates.emplace_back(path, now);
                }
            }
        }
        if (candidates.empty()) {
            return;
        }
        ++tally_.rotten;
        const auto& [path, size] = candidates[crash_dice_.below(candidates.size())];
        const uint64_t offset = kPageBytes + crash_dice_.below(size - kPageBytes);
        const uint64_t length = std::min(size - offset, uint64_t{1} << crash_dice_.below(14));
        SCOPED_TRACE(fmt::format("{} bytes of {} rot at offset {}", length, path, offset));
        files->damage(path, offset, length, seed);
        TestPool copy(std::move(files), seed, careful_);
        if (const auto opened = copy.try_open(); !opened) {
            EXPECT_EQ(opened.error().code(), ErrorCode::kCorrupt) << opened.error().message();
            return;
        }
        const bool whole = !copy->stats().store.records_lost;
        if (whole) {
            for (const InFlight& request : in_flight_) {
                try {
                    if (request.command != nullptr && request.command->has_happened(*copy)) {
                        request.command->apply(shadow);
                    }
                } catch (const std::exception&) {
                    return;  // Damaged where one would have to look.
                }
            }
        } else {
            EXPECT_NE(copy->read_only_reason().value_or(""), "");
        }
        for (auto& [name, volume] : shadow) {
            if (!whole && (volume.is_image || !copy->find(name))) {
                continue;  // Names may be those of an earlier moment, as the warnings say.
            }
            check_readable(*copy, name, volume.content, &volume);
            if (whole) {
                for (const auto& [snapshot, content] : volume.snapshots) {
                    check_readable(*copy, name + "@" + snapshot, content, nullptr);
                }
            }
        }
    }

    /// What can be read is right; what cannot says that it is corrupt.
    void check_readable(Pool& copy, const std::string& source, const Content& content,
                        ShadowVolume* volume) {
        const auto device = copy.attach(source, {.read_only = true});
        if (!device) {
            EXPECT_EQ(device.error().code(), ErrorCode::kCorrupt) << device.error().message();
            return;
        }
        ASSERT_EQ((*device)->size_bytes(),
                  (content.size_bytes() + kSectorBytes - 1) / kSectorBytes * kSectorBytes);
        std::vector<std::byte> page(kPageBytes);
        for (uint64_t offset = 0; offset < content.size_bytes(); offset += kPageBytes) {
            const uint64_t length = std::min(kPageBytes, (*device)->size_bytes() - offset);
            const iovec part{.iov_base = page.data(), .iov_len = length};
            const auto read = (*device)->read(offset, std::span(&part, 1), IoMode::kMayBlock);
            if (!read) {
                ASSERT_EQ(read.error().code(), ErrorCode::kCorrupt) << read.error().message();
                continue;
            }
            for (uint64_t done = 0; done < length; done += kSectorBytes) {
                const uint64_t number = (offset + done) / kSectorBytes;
                const auto is = [&](const Sector& sector) {
                    return std::memcmp(sector.data(), page.data() + done, kSectorBytes) == 0;
                };
                const auto any_of = [&](const std::map<uint64_t, std::vector<Sector>>& versions) {
                    const auto found = versions.find(number);
                    return found != versions.end() &&
                           std::any_of(found->second.begin(), found->second.end(), is);
                };
                ASSERT_TRUE(
                    is(content.sector(number)) ||
                    (volume != nullptr && (any_of(volume->older) || any_of(volume->uncertain))))
                    << source << " reads wrong in sector " << number;
            }
        }
    }

    // --- Choosing --------------------------------------------------------------------------------

    std::string fresh_name() { return fmt::format("n{}", next_name_++); }

    std::optional<std::string> any(bool image_too) {
        std::vector<std::string> names;
        for (const auto& [name, volume] : shadow_) {
            if (image_too || !volume.is_image) {
                names.push_back(name);
            }
        }
        if (names.empty()) {
            return std::nullopt;
        }
        return names[dice_.below(names.size())];
    }

    /// An image, volume or snapshot.
    std::optional<std::string> any_source() {
        auto name = any(/*image_too=*/true);
        if (name && dice_.chance(40) && !shadow_[*name].snapshots.empty()) {
            auto it = shadow_[*name].snapshots.begin();
            std::advance(it, dice_.below(shadow_[*name].snapshots.size()));
            return *name + "@" + it->first;
        }
        return name;
    }

    /// Page by page: new, one of a few that recur, or zeros.
    std::vector<std::byte> random_data(size_t size) {
        std::vector<std::byte> data(size);
        for (size_t offset = 0; offset < size; offset += kPageBytes) {
            const auto page =
                MutableBytes(data).subspan(offset, std::min(size - offset, kPageBytes));
            const uint64_t kind = dice_.below(10);
            if (kind > 0) {
                io::SeededRandom(kind < 5 ? dice_.below(kCommonPages) : dice_.next()).fill(page);
                if (dice_.one_in(3)) {
                    std::memset(page.data() + page.size() - std::min<size_t>(64, page.size()), 0,
                                std::min<size_t>(64, page.size()));
                }
            }
        }
        return data;
    }

    std::optional<std::pair<uint64_t, uint64_t>> random_range(const Content& content) {
        const uint64_t sectors = content.size_bytes() / kSectorBytes;
        if (sectors == 0) {
            return std::nullopt;
        }
        const uint64_t most = dice_.chance(40) ? 8 : dice_.chance(80) ? 64 : 400;
        const uint64_t count = 1 + dice_.below(std::min(most, sectors));
        uint64_t first = dice_.below(sectors - count + 1);
        if (dice_.chance(60)) {
            first = std::min<uint64_t>(first / 8 * 8, sectors - count);
        }
        return std::pair(first * kSectorBytes, count * kSectorBytes);
    }

    BlockDevice& device(const std::string& name) {
        auto& device = devices_[name];
        if (!device) {
            device = must(pool_->attach(name, {.label = "crash test"}));
        }
        return *device;
    }

    void release(const std::string& name) {
        if (devices_[name]) {
            in_flight_.push_back({.volume = name});
            devices_[name].reset();
            in_flight_.pop_back();
            shadow_.at(name).flushed();
        }
        devices_.erase(name);
    }

    void abandon() {
        pool_.machine().kill_process();
        devices_.clear();
        importing_.reset();
        pool_.drop();
    }

    // --- Requests --------------------------------------------------------------------------------

    void step() {
        struct Choice {
            unsigned weight;
            void (Program::*run)();
        };
        static constexpr Choice kGuest[] = {
            {40, &Program::write},      {14, &Program::flush}, {6, &Program::discard},
            {8, &Program::import_more}, {3, &Program::clone},  {3, &Program::snapshot},
            {3, &Program::remove},      {2, &Program::create},
        };
        static constexpr Choice kOther[] = {
            {3, &Program::rollback},
            {3, &Program::resize},
            {3, &Program::rename},
            {3, &Program::attachment},
            {3, &Program::remove_snapshot},
            {4, &Program::checkpoint},
            {7, &Program::collect},
            {2, &Program::reopen},
            {2, &Program::kill},
            {2, &Program::lose_power},
            {2, &Program::boot},
        };
        const auto choose = [&](std::span<const Choice> choices) {
            unsigned total = 0;
            for (const Choice& choice : choices) {
                total += choice.weight;
            }
            uint64_t pick = dice_.below(total);
            for (const Choice& choice : choices) {
                if (pick < choice.weight) {
                    (this->*choice.run)();
                    return;
                }
                pick -= choice.weight;
            }
        };
        // Others go on while garbage is collected.
        choose(!collecting_ && dice_.chance(30) ? std::span<const Choice>(kOther)
                                                : std::span<const Choice>(kGuest));
    }

    void run(const PoolCommand& command) {
        log(command.what);
        in_flight_.push_back({.command = &command});
        const auto done = command.run(*pool_);
        in_flight_.pop_back();
        must(done);
        command.apply(shadow_);
        if (!collecting_) {
            note_durable();
        }
    }

    void write() {
        const auto name = any(false);
        const auto range = name ? random_range(shadow_[*name].content) : std::nullopt;
        if (!range) {
            return create();
        }
        log(fmt::format("write {} [{}, +{})", *name, range->first, range->second));
        BlockDevice& to = device(*name);
        auto data = random_data(range->second);
        in_flight_.push_back({.volume = *name, .offset_bytes = range->first, .data = data});
        const auto written = testing::write(to, range->first, data);
        in_flight_.pop_back();
        must(written);
        shadow_[*name].write(range->first, data);
    }

    void discard() {
        const auto name = any(false);
        auto range = name ? random_range(shadow_[*name].content) : std::nullopt;
        if (!range) {
            return;
        }
        if (dice_.one_in(8)) {
            range = std::pair(uint64_t{0}, shadow_[*name].content.size_bytes());
        }
        log(fmt::format("discard {} [{}, +{})", *name, range->first, range->second));
        BlockDevice& on = device(*name);
        in_flight_.push_back({.volume = *name,
                              .offset_bytes = range->first,
                              .data = std::vector<std::byte>(range->second)});
        const auto done = on.discard(range->first, range->second, IoMode::kMayBlock);
        in_flight_.pop_back();
        must(done);
        shadow_[*name].zero(range->first, range->second);
    }

    void flush() {
        const auto name = any(false);
        if (!name) {
            return;
        }
        log("flush " + *name);
        BlockDevice& on = device(*name);
        in_flight_.push_back({.volume = *name});
        const auto done = testing::flush(on);
        in_flight_.pop_back();
        must(done);
        shadow_[*name].flushed();
        if (!collecting_) {
            note_durable();
        }
    }

    void create() {
        if (shadow_.size() < kMaxThings) {
            run(create_command(fresh_name(), dice_.below(kMaxVolumePages * 8 + 1) * kSectorBytes));
        }
    }

    void clone() {
        const auto source = any_source();
        if (!source || shadow_.size() >= kMaxThings) {
            return;
        }
        std::vector<std::string> names = {fresh_name()};
        if (dice_.one_in(4)) {
            names.push_back(fresh_name());
        }
        run(clone_command(*source, names));
    }

    void snapshot() {
        const auto name = any(false);
        if (name && shadow_[*name].snapshots.size() < 3) {
            run(snapshot_command(*name, fresh_name()));
        }
    }

    /// Takes its attachments away, also the one on record.
    void free_of_attachments(const std::string& name) {
        release(name);
        if (!shadow_[name].attachment.empty()) {
            run(attachment_command(name, ""));
        }
    }

    void rollback() {
        const auto name = any(false);
        if (name && !shadow_[*name].snapshots.empty()) {
            free_of_attachments(*name);
            const auto& [snapshot, content] = *shadow_[*name].snapshots.begin();
            run(rollback_command(*name, snapshot, content));
        }
    }

    void resize() {
        const auto name = any(false);
        if (name) {
            const uint64_t now = shadow_[*name].content.size_bytes();
            const uint64_t size = dice_.below(kMaxVolumePages * 8 + 1) * kSectorBytes;
            if (size < now) {
                free_of_attachments(*name);
            }
            run(resize_command(*name, now, size));
        }
    }

    void rename() {
        if (const auto name = any(true)) {
            release(*name);
            run(rename_command(*name, fresh_name()));
        }
    }

    void attachment() {
        if (const auto name = any(true)) {
            run(attachment_command(*name, dice_.one_in(3) ? "" : fresh_name()));
        }
    }

    /// Sets or removes the boot manifest of an image; sometimes one of several objects.
    void boot() {
        const auto name = any(true);
        if (!name || !shadow_[*name].is_image) {
            return;
        }
        if (const auto root = pool_->boot_root(*name)) {
            const size_t bytes = dice_.one_in(4) ? 0 : 1 + dice_.below(150'000);
            run(boot_command(*name, *root, testing::random_bytes(bytes, dice_.below(1 << 30))));
        }
    }

    void remove() {
        const auto name = any(true);
        if (name && shadow_.size() > 2) {
            free_of_attachments(*name);
            run(remove_command(*name));
        }
    }

    void remove_snapshot() {
        const auto name = any(false);
        if (name && !shadow_[*name].snapshots.empty()) {
            run(remove_snapshot_command(*name, shadow_[*name].snapshots.begin()->first));
        }
    }

    void checkpoint() { run(checkpoint_command()); }

    void collect() {
        GcOptions options;
        options.dry_run = dice_.one_in(8);
        options.cancelled = [this] {
            if (!failed() && dice_.one_in(2)) {
                step();
            }
            return false;
        };
        const PoolCommand command = collect_command(options);
        log(options.dry_run ? "collect garbage, dry run" : "collect garbage");
        in_flight_.push_back({.command = &command});
        collecting_ = true;
        const auto done = command.run(*pool_);
        collecting_ = false;
        in_flight_.pop_back();
        must(done);
        log("  collected");
        // What was freed may be given to new segments, so that nothing of before counts.
        durable_.clear();
        proven_.clear();
    }

    /// Begins an import, gives it more, or finishes it. Much of it is what volumes hold.
    void import_more() {
        if (!importing_) {
            if (shadow_.size() < kMaxThings) {
                const std::string name = fresh_name();
                log("begin the import of " + name);
                importing_.emplace(Importing{name, must(pool_->begin_import(name)), {}});
            }
            return;
        }
        const uint64_t offset =
            (importing_->content.size_bytes() + kPageBytes - 1) / kPageBytes * kPageBytes;
        if (offset > kMaxVolumePages * kPageBytes || dice_.one_in(4)) {
            finish_import();
            return;
        }
        std::vector<std::byte> data;
        const auto source = any_source();
        if (source && dice_.chance(70)) {
            const Content& content = content_of(shadow_, *source);
            data = content.read(0, std::min<uint64_t>(content.size_bytes(), 200'000));
        }
        if (data.empty()) {
            data = random_data(1 + dice_.below(150'000));
        }
        log(fmt::format("import {} more bytes to {}", data.size(), importing_->name));
        importing_->content.resize(offset + data.size());
        importing_->content.write(offset, data);
        must(importing_->import->append(offset, data));
    }

    void finish_import() {
        Importing done = *std::move(importing_);
        importing_.reset();
        if (shadow_.size() >= kMaxThings) {
            return;
        }
        run({.what = "finish the import of " + done.name,
             .run = [&](Pool&) -> Result<void> {
                 STELLARIUM_TRY(done.import->finish(done.content.size_bytes()));
                 return {};
             },
             .effect =
                 [&](Shadow& shadow) {
                     shadow[done.name].content = done.content;
                     shadow[done.name].is_image = true;
                 },
             .has_happened = [&](const Pool& pool) { return pool.find(done.name).has_value(); }});
    }

    // --- Ends ------------------------------------------------------------------------------------

    void ended() {
        durable_.clear();
        proven_.clear();
        importing_.reset();
    }

    void reopen() {
        log("close and open");
        importing_.reset();
        std::vector<std::string> attached;
        for (const auto& [name, device] : devices_) {
            attached.push_back(name);
        }
        for (const std::string& name : attached) {
            release(name);
        }
        ended();
        pool_.close();
        for (auto& [name, volume] : shadow_) {
            volume.flushed();
        }
        pool_.open();
        check_.everything(*pool_, shadow_, false);
    }

    void kill() {
        log("the process dies");
        pool_.machine().kill_process();
        die(!keeps_arena_);
    }

    void lose_power() {
        const uint64_t seed = dice_.next();
        log(fmt::format("power fails, seed {}", seed));
        pool_.machine().crash(seed);
        die(true);
    }

    void die(bool lost) {
        lost_ = lost;
        devices_.clear();
        ended();
        pool_.drop();
        pool_.open();
        check_.everything(*pool_, shadow_, lost);
        lost_ = false;
    }

    struct Importing {
        std::string name;
        std::unique_ptr<ImageImport> import;
        Content content;
    };

    Dice dice_;        ///< Of the program.
    Dice crash_dice_;  ///< Of crashes, which do not change the program, but for interleaved writes.
    Tally& tally_;
    const PoolOptions options_;
    PoolOptions careful_;
    const bool keeps_arena_;
    TestPool pool_;
    Shadow shadow_;
    std::map<std::string, std::shared_ptr<BlockDevice>> devices_;
    std::optional<Importing> importing_;
    std::vector<InFlight> in_flight_;
    std::vector<std::string> history_ = {"begin"};
    uint64_t next_name_ = 0;
    PoolCheck check_;
    PoolCheck check_copy_;  ///< Another one: reading may open files, which is a crash point.
    uint64_t durable_sequence_ = 0;
    SegmentSizes durable_;  ///< As of the last acknowledgement of something new.
    SegmentSizes proven_;   ///< As of the one before, which the last one proves.
    bool collecting_ = false;
    bool interleaving_ = false;
    /// The pool is being opened after a loss of power (or of private buffers).
    bool lost_ = false;
};

TEST(PoolCrash, RandomProgramsCrashAnywhere) {
    const uint64_t first = first_seed();
    const uint64_t wanted = scaled(8000, 500);
    Tally tally;
    for (uint64_t seed = first; tally.crash_points < wanted && !HasFailure(); ++seed) {
        SCOPED_TRACE(fmt::format("reproduce with STELLARIUM_TEST_SEED={}", seed));
        Program(seed, tally).run();
        if (HasFailure()) {
            fmt::print(stderr, "STELLARIUM_TEST_SEED={}\n", seed);
        }
    }
    fmt::print(
        "count crash_points {} in {} programs: {} at syncs, {} in collections, {} in recoveries, "
        "{} deaths of the process, {} with rot, {} MiB compared\n",
        tally.crash_points, tally.programs, tally.at_syncs, tally.in_collections,
        tally.in_recoveries, tally.process_deaths, tally.rotten, tally.bytes / kMiB);
    if (!HasFailure()) {
        // The programs do what they are for.
        EXPECT_GT(tally.at_syncs, tally.crash_points / 8);
        EXPECT_GT(tally.in_collections, tally.crash_points / 20);
        EXPECT_GT(tally.in_recoveries, tally.crash_points / 50);
        EXPECT_GT(tally.rotten, 0U);
    }
}

}  // namespace
}  // namespace stellarium::nova::model
