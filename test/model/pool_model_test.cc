// Random programs of everything that a pool can do, on a simulated machine, against a shadow.
//
// A program works on a few images and volumes: guest writes, reads, discards and flushes at sector
// granularity, every catalog operation, imports, exports and differences, checkpoints, clean
// restarts, deaths of the process, losses of power, full disks, and operations that are cut off in
// the middle. Garbage is collected now and then, with exports and an import in progress, whose
// content is about to die. What was acknowledged must be there: after the death of a process
// exactly, after a loss of power with every unflushed sector old or new.
//
//     STELLARIUM_TEST_SEED=17    begin with program 17, the one that failed
//     STELLARIUM_TEST_SCALE=10   run ten times as many
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "nova/testing/test_pool.h"
#include "test/model/pool_check.h"
#include "test/model/pool_commands.h"
#include "test/model/pool_shadow.h"

namespace stellarium::nova::model {
namespace {

using testing::must;
using testing::TestPool;

constexpr int kOperationsPerProgram = 160;
constexpr size_t kMaxThings = 12;

PoolOptions options_for(uint64_t seed) {
    PoolOptions options = TestPool::small_options();
    // Small bounds reach the rare paths: full arenas, evicted nodes, checkpoints of their own.
    options.dirty_budget_bytes = seed % 3 == 0 ? 512 * kKiB : 4 * kMiB;
    options.node_cache_bytes = seed % 4 == 0 ? 64 * kKiB : 4 * kMiB;
    options.checkpoint_bytes = seed % 5 == 0 ? 2 * kMiB : 512 * kMiB;
    if (seed % 7 == 0) {
        options.runtime_directory.clear();
    }
    return options;
}

class Program {
  public:
    explicit Program(uint64_t seed)
        : random_(seed), pool_(seed, options_for(seed)), keeps_arena_(seed % 7 != 0) {}

    void run() {
        try {
            run_all();
        } catch (const std::exception& error) {
            ADD_FAILURE() << error.what();
        }
        if (failed()) {
            fmt::print(stderr, "operations of the failed program:\n  {}\n",
                       fmt::join(history_, "\n  "));
        }
    }

  private:
    void run_all() {
        for (int i = 0; i < kOperationsPerProgram && !failed(); ++i) {
            step();
        }
        if (!failed()) {
            log("final check");
            heal();
            check_everything();
        }
        if (!failed()) {
            log("final restart");
            abandon();
            for (auto& [name, volume] : shadow_) {
                volume.flushed();
            }
            pool_.reopen();
            check_everything();
            check_structure(pool_.machine().files(), /*recovered=*/true, /*data=*/true);
        }
    }

    bool failed() const { return ::testing::Test::HasFailure(); }
    void log(std::string what) { history_.push_back(std::move(what)); }

    uint64_t below(uint64_t bound) {
        return std::uniform_int_distribution<uint64_t>(0, bound - 1)(random_);
    }
    bool chance(uint64_t percent) { return below(100) < percent; }

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
        return names[below(names.size())];
    }

    /// An image, volume or snapshot.
    std::optional<std::string> any_source() {
        auto name = any(/*image_too=*/true);
        if (name && chance(40) && !shadow_[*name].snapshots.empty()) {
            auto it = shadow_[*name].snapshots.begin();
            std::advance(it, below(shadow_[*name].snapshots.size()));
            return *name + "@" + it->first;
        }
        return name;
    }

    const Content& content_of(const std::string& source) {
        return model::content_of(shadow_, source);
    }

    uint64_t random_size() {
        switch (below(8)) {
            case 0:
                return 0;
            case 1:
                return below(20) * kSectorBytes;
            case 2:
                return chance(70)
                           ? kMiB
                           : 36 * kMiB +
                                 below(9) * kSectorBytes;  // More leaves than a buffered discard.
            default:
                return below(4 * kMiB / kSectorBytes) * kSectorBytes;
        }
    }

    std::vector<std::byte> random_data(size_t size) {
        std::vector<std::byte> data(size);
        // Page by page: new, one of a few that recur, or zeros.
        for (size_t offset = 0; offset < size; offset += kPageBytes) {
            const auto page =
                MutableBytes(data).subspan(offset, std::min(size - offset, kPageBytes));
            const uint64_t kind = below(10);
            if (kind >= 3) {
                io::SeededRandom(kind < 6 ? below(5) : random_()).fill(page);
                if (chance(30)) {
                    std::memset(page.data() + page.size() - std::min<size_t>(64, page.size()), 0,
                                std::min<size_t>(64, page.size()));
                }
            }
        }
        return data;
    }

    /// A range of sectors of a volume; small ones are likely.
    std::optional<std::pair<uint64_t, uint64_t>> random_range(const Content& content) {
        const uint64_t sectors = content.size_bytes() / kSectorBytes;
        if (sectors == 0) {
            return std::nullopt;
        }
        const uint64_t most = chance(50) ? 8 : chance(80) ? 200 : 3000;
        const uint64_t count = 1 + below(std::min(most, sectors));
        uint64_t first = below(sectors - count + 1);
        if (chance(40)) {
            first = std::min<uint64_t>(first / 8 * 8, sectors - count);
        }
        return std::pair(first * kSectorBytes, count * kSectorBytes);
    }

    BlockDevice& device(const std::string& name) {
        auto& device = devices_[name];
        if (!device) {
            device = must(pool_->attach(name, {.label = "model of " + name}));
        }
        return *device;
    }

    // --- Outcomes --------------------------------------------------------------------------------

    /// True when the operation happened. A full disk is the only excuse.
    bool happened(const auto& result) {
        if (result) {
            return true;
        }
        if (tight_ && result.error().code() == ErrorCode::kNoSpace) {
            log("  refused: " + result.error().message());
            return false;
        }
        ADD_FAILURE() << "after: " << history_.back() << ": " << result.error().message();
        return false;
    }

    void check_content(const std::string& name) {
        check_.content(name, shadow_[name].content, device(name), &shadow_[name], false);
    }

    void check_everything(bool after_crash = false) {
        for (const std::string& warning : pool_->warnings()) {
            log("  warning: " + warning);
        }
        check_.everything(*pool_, shadow_, after_crash);
    }

    void heal() {
        if (tight_) {
            log("space is there again");
            pool_.machine().files().set_space_limit(uint64_t{1} << 44);
            tight_ = false;
        }
    }

    // --- Operations ------------------------------------------------------------------------------

    void step() {
        struct Choice {
            unsigned weight;
            void (Program::*run)();
        };
        static constexpr Choice kChoices[] = {
            {40, &Program::write},
            {15, &Program::read},
            {8, &Program::discard},
            {6, &Program::flush},
            {3, &Program::create},
            {2, &Program::import},
            {4, &Program::clone},
            {5, &Program::snapshot},
            {3, &Program::rollback},
            {4, &Program::resize},
            {2, &Program::rename},
            {3, &Program::remove},
            {2, &Program::remove_snapshot},
            {3, &Program::export_one},
            {3, &Program::diff},
            {3, &Program::checkpoint},
            {3, &Program::detach},
            {2, &Program::detail},
            {2, &Program::reopen},
            {3, &Program::kill},
            {3, &Program::lose_power},
            {2, &Program::fill_disk},
            {3, &Program::cut_off},
            {6, &Program::collect},
            {3, &Program::hold},
            {3, &Program::let_go},
            {6, &Program::import_more},
        };
        unsigned total = 0;
        for (const Choice& choice : kChoices) {
            total += choice.weight;
        }
        uint64_t pick = below(total);
        for (const Choice& choice : kChoices) {
            if (pick < choice.weight) {
                (this->*choice.run)();
                return;
            }
            pick -= choice.weight;
        }
    }

    void write() {
        const auto name = any(false);
        const auto range = name ? random_range(shadow_[*name].content) : std::nullopt;
        if (!range) {
            return create();
        }
        log(fmt::format("write {} [{}, +{})", *name, range->first, range->second));
        const auto data = random_data(range->second);
        auto result = testing::write(device(*name), range->first, data,
                                     chance(50) ? IoMode::kNoWait : IoMode::kMayBlock);
        if (!result && result.error().code() == ErrorCode::kWouldBlock) {
            result = testing::write(device(*name), range->first, data);
        }
        if (happened(result)) {
            shadow_[*name].write(range->first, data);
        } else if (!failed()) {
            // Part of it may have found room.
            shadow_[*name].may_have_written(range->first, data);
            check_content(*name);
        }
    }

    void read() {
        const auto name = any(true);
        const auto range = name ? random_range(shadow_[*name].content) : std::nullopt;
        if (!range) {
            return;
        }
        log(fmt::format("read {} [{}, +{})", *name, range->first, range->second));
        std::shared_ptr<BlockDevice> reader;
        if (shadow_[*name].is_image || chance(10)) {
            reader = must(pool_->attach(*name, {.read_only = true}));
        }
        BlockDevice& from = reader ? *reader : device(*name);
        // Scattered, to buffers that cut pages anywhere.
        std::vector<std::byte> data(range->second, std::byte{0xee});
        std::vector<iovec> parts;
        for (size_t done = 0; done < data.size();) {
            const size_t step = std::min<size_t>(data.size() - done, 1 + below(20'000));
            parts.push_back({.iov_base = data.data() + done, .iov_len = step});
            done += step;
        }
        const IoMode mode = chance(50) ? IoMode::kNoWait : IoMode::kMayBlock;
        auto result = from.read(range->first, parts, mode);
        if (!result && mode == IoMode::kNoWait && result.error().code() == ErrorCode::kWouldBlock) {
            result = from.read(range->first, parts, IoMode::kMayBlock);
        }
        ASSERT_TRUE(happened(result));
        EXPECT_TRUE(data == shadow_[*name].content.read(range->first, range->second))
            << *name << " [" << range->first << ", +" << range->second << ") reads wrong";
    }

    void discard() {
        const auto name = any(false);
        auto range = name ? random_range(shadow_[*name].content) : std::nullopt;
        if (!range) {
            return;
        }
        if (chance(20)) {
            range = std::pair(uint64_t{0}, shadow_[*name].content.size_bytes());
            if (chance(50) && range->second > 3 * kSectorBytes) {
                range = std::pair(kSectorBytes, range->second - 3 * kSectorBytes);
            }
        }
        log(fmt::format("discard {} [{}, +{})", *name, range->first, range->second));
        auto result = device(*name).discard(range->first, range->second, IoMode::kMayBlock);
        if (happened(result)) {
            shadow_[*name].zero(range->first, range->second);
        } else if (!failed()) {
            shadow_[*name].may_have_written(range->first, std::vector<std::byte>(range->second));
            check_content(*name);
        }
    }

    void flush() {
        const auto name = any(false);
        if (!name) {
            return;
        }
        log("flush " + *name);
        if (happened(testing::flush(device(*name)))) {
            shadow_[*name].flushed();
        }
    }

    void create() {
        if (shadow_.size() >= kMaxThings) {
            return;
        }
        const std::string name = fresh_name();
        const uint64_t size = random_size();
        log(fmt::format("create {} of {} bytes", name, size));
        if (happened(pool_->create_volume(name, size))) {
            shadow_[name].content.resize(size);
        }
    }

    void import() {
        if (shadow_.size() >= kMaxThings) {
            return;
        }
        const std::string name = fresh_name();
        const uint64_t size = chance(20) ? below(2000) : below(3 * kMiB);
        log(fmt::format("import {} of {} bytes", name, size));
        Content content;
        content.resize(size);
        auto import = pool_->begin_import(name);
        if (!happened(import)) {
            return;
        }
        for (uint64_t offset = 0; offset < size;) {
            const uint64_t length = std::min(size - offset, 1 + below(700'000));
            if (chance(75)) {
                const auto data = random_data(length);
                content.write(offset, data);
                if (!happened((*import)->append(offset, data))) {
                    return;
                }
            }
            offset += length;
        }
        if (happened((*import)->finish(size))) {
            shadow_[name] = ShadowVolume{.content = content,
                                         .parent = {},
                                         .parent_removed = false,
                                         .is_image = true,
                                         .attachment = {},
                                         .snapshots = {},
                                         .older = {},
                                         .uncertain = {}};
        }
    }

    /// The durable operations on a volume append and sync what was dirty in it.
    void flushed(const std::string& source) {
        shadow_[source.substr(0, source.find('@'))].flushed();
    }

    void clone() {
        const auto source = any_source();
        if (!source || shadow_.size() >= kMaxThings) {
            return;
        }
        std::vector<std::string> names = {fresh_name()};
        if (chance(30)) {
            names.push_back(fresh_name());
        }
        log(fmt::format("clone {} to {}", *source, fmt::join(names, ", ")));
        if (happened(pool_->clone(*source, names))) {
            if (source->find('@') == std::string::npos) {
                flushed(*source);
            }
            for (const std::string& name : names) {
                ShadowVolume volume;
                volume.content = content_of(*source);
                volume.content.resize((volume.content.size_bytes() + kSectorBytes - 1) /
                                      kSectorBytes * kSectorBytes);
                volume.parent = *source;
                shadow_[name] = std::move(volume);
            }
        }
    }

    void snapshot() {
        const auto name = any(false);
        if (!name || shadow_[*name].snapshots.size() > 4) {
            return;
        }
        const std::string snapshot = fresh_name();
        log(fmt::format("snapshot {}@{}", *name, snapshot));
        if (happened(pool_->create_snapshot(*name, snapshot))) {
            flushed(*name);
            shadow_[*name].snapshots[snapshot] = shadow_[*name].content;
        }
    }

    /// Some operations are refused while attached. Tries that, then detaches.
    void free_of_device(const std::string& name, const std::function<Result<void>()>& attempt) {
        if (devices_[name]) {
            auto result = attempt();
            EXPECT_FALSE(result.has_value()) << history_.back() << " was not refused";
            if (!result) {
                EXPECT_EQ(result.error().code(), ErrorCode::kBusy) << result.error().message();
                EXPECT_NE(result.error().message().find("model of " + name), std::string::npos);
            }
            release(name);
        }
        devices_.erase(name);
    }

    void release(const std::string& name) {
        if (devices_[name] && !tight_) {
            shadow_[name].flushed();
        }
        devices_.erase(name);
    }

    void rollback() {
        const auto name = any(false);
        if (!name || shadow_[*name].snapshots.empty()) {
            return;
        }
        auto it = shadow_[*name].snapshots.begin();
        std::advance(it, below(shadow_[*name].snapshots.size()));
        log(fmt::format("rollback {} to {}", *name, it->first));
        free_of_device(*name, [&] { return pool_->rollback(*name, it->first); });
        if (happened(pool_->rollback(*name, it->first))) {
            shadow_[*name].content = it->second;
            shadow_[*name].flushed();
        }
    }

    void resize() {
        const auto name = any(false);
        if (!name) {
            return;
        }
        const uint64_t size = random_size();
        log(fmt::format("resize {} to {}", *name, size));
        const auto attempt = [&]() -> Result<void> {
            STELLARIUM_TRY(pool_->resize(*name, size));
            return {};
        };
        if (size < shadow_[*name].content.size_bytes()) {
            free_of_device(*name, attempt);
        }
        if (happened(attempt())) {
            ShadowVolume& volume = shadow_[*name];
            if (size < volume.content.size_bytes()) {
                volume.flushed();
            }
            volume.content.resize(size);
            if (devices_[*name]) {
                EXPECT_EQ(devices_[*name]->size_bytes(), size);
            }
        }
    }

    void rename() {
        const auto from = any(true);
        if (!from) {
            return;
        }
        const std::string to = fresh_name();
        log(fmt::format("rename {} to {}", *from, to));
        release(*from);
        if (happened(pool_->rename(*from, to))) {
            auto node = shadow_.extract(*from);
            node.key() = to;
            shadow_.insert(std::move(node));
            parent_renamed(shadow_, *from, to);
        }
    }

    void remove() {
        const auto name = any(true);
        if (!name || shadow_.size() < 3) {
            return;
        }
        log("remove " + *name);
        free_of_device(*name, [&] { return pool_->remove({*name}); });
        if (happened(pool_->remove({*name}))) {
            shadow_.erase(*name);
            parent_removed(shadow_, *name);
        }
    }

    void remove_snapshot() {
        const auto name = any(false);
        if (!name || shadow_[*name].snapshots.empty()) {
            return;
        }
        const std::string snapshot = shadow_[*name].snapshots.begin()->first;
        log(fmt::format("remove snapshot {}@{}", *name, snapshot));
        if (happened(pool_->remove_snapshot(*name, snapshot))) {
            shadow_[*name].snapshots.erase(snapshot);
            parent_removed(shadow_, *name + "@" + snapshot);
        }
    }

    void export_one() {
        const auto source = any_source();
        if (!source) {
            return;
        }
        log("export " + *source);
        auto reader = pool_->open_reader(*source);
        if (!happened(reader)) {
            return;
        }
        const Content& content = content_of(*source);
        ASSERT_EQ((*reader)->size_bytes(), content.size_bytes());
        std::vector<std::byte> actual(content.size_bytes());
        uint64_t offset = 0;
        while (const auto range = must((*reader)->next_data(offset))) {
            ASSERT_GE(range->first, offset);
            ASSERT_GT(range->second, 0U);
            ASSERT_LE(range->first + range->second, actual.size());
            must((*reader)->read(range->first,
                                 MutableBytes(actual).subspan(range->first, range->second)));
            offset = range->first + range->second;
        }
        EXPECT_TRUE(actual == content.read(0, actual.size())) << *source << " exports wrong";
    }

    void diff() {
        const auto a = any_source();
        const auto b = any_source();
        if (!a || !b) {
            return;
        }
        log(fmt::format("diff {} {}", *a, *b));
        const uint64_t end = std::max(content_of(*a).size_bytes(), content_of(*b).size_bytes());
        std::set<uint64_t> pages;
        uint64_t last_end = 0;
        const auto result = pool_->diff(*a, *b, [&](DiffRange range) -> Result<void> {
            EXPECT_TRUE(range.offset_bytes >= last_end && range.length_bytes > 0);
            last_end = range.offset_bytes + range.length_bytes;
            EXPECT_LE(last_end, end);
            for (uint64_t page = range.offset_bytes / kPageBytes; page * kPageBytes < last_end;
                 ++page) {
                pages.insert(page);
            }
            return {};
        });
        if (happened(result)) {
            EXPECT_EQ(pages, Content::differing_pages(content_of(*a), content_of(*b)));
        }
    }

    void detail() {
        const auto source = any_source();
        if (!source) {
            return;
        }
        log("detail " + *source);
        const auto result = pool_->detail(*source);
        if (!happened(result)) {
            return;
        }
        EXPECT_EQ(result->data_bytes, content_of(*source).data_pages().size() * kPageBytes);
        EXPECT_EQ(result->root == Hash256{}, result->data_bytes == 0);
    }

    void collect() {
        const bool dry_run = chance(15);
        log(dry_run ? "collect garbage, dry run" : "collect garbage");
        const auto report = pool_->gc({.dry_run = dry_run});
        if (happened(report) && dry_run) {
            EXPECT_EQ(report->moved_bytes + report->rewritten_bytes, 0U);
        }
    }

    // --- What goes on across many operations -----------------------------------------------------

    struct Held {
        std::string source;
        std::unique_ptr<Reader> reader;
        std::vector<std::byte> content;
    };

    /// Begins an export, to go on with when the source has changed or gone.
    void hold() {
        const auto source = any_source();
        if (!source || held_.size() >= 3) {
            return;
        }
        log("hold a reader of " + *source);
        auto reader = pool_->open_reader(*source);
        if (happened(reader)) {
            const Content& content = content_of(*source);
            held_.push_back({*source, *std::move(reader), content.read(0, content.size_bytes())});
        }
    }

    void let_go() {
        if (held_.empty()) {
            return;
        }
        const Held held = std::move(held_.front());
        held_.erase(held_.begin());
        log("read what a reader of " + held.source + " has held");
        ASSERT_EQ(held.reader->size_bytes(), held.content.size());
        std::vector<std::byte> actual(held.content.size());
        ASSERT_TRUE(happened(held.reader->read(0, actual)));
        EXPECT_TRUE(actual == held.content) << held.source << ": a held reader reads wrong";
    }

    struct Importing {
        std::string name;
        std::unique_ptr<ImageImport> import;
        Content content;
    };

    /// Begins a long import, or gives it more, or finishes it. Much of it is what volumes hold.
    void import_more() {
        if (!importing_) {
            if (shadow_.size() >= kMaxThings) {
                return;
            }
            const std::string name = fresh_name();
            log("begin the import of " + name);
            auto import = pool_->begin_import(name);
            if (happened(import)) {
                importing_.emplace(Importing{name, *std::move(import), {}});
            }
            return;
        }
        const uint64_t offset =
            (importing_->content.size_bytes() + kPageBytes - 1) / kPageBytes * kPageBytes;
        if (offset > 2 * kMiB || chance(15)) {
            log("finish the import of " + importing_->name);
            Importing done = *std::move(importing_);
            importing_.reset();
            if (shadow_.size() < kMaxThings &&
                happened(done.import->finish(done.content.size_bytes()))) {
                ShadowVolume& image = shadow_[done.name];
                image.content = std::move(done.content);
                image.is_image = true;
            }
            return;
        }
        std::vector<std::byte> data;
        const auto source = any_source();
        if (source && chance(70)) {
            const Content& content = content_of(*source);
            data = content.read(0, std::min<uint64_t>(content.size_bytes(), kMiB));
        }
        if (data.empty()) {
            data = random_data(1 + below(300'000));
        }
        log(fmt::format("import {} more bytes to {}", data.size(), importing_->name));
        importing_->content.resize(offset + data.size());
        importing_->content.write(offset, data);
        if (!happened(importing_->import->append(offset, data))) {
            importing_.reset();
        }
    }

    /// The process ends, and with it what was going on.
    void abandon() {
        devices_.clear();
        held_.clear();
        importing_.reset();
    }

    void checkpoint() {
        log("checkpoint");
        happened(pool_->checkpoint());
    }

    void detach() {
        const auto name = any(false);
        if (name && devices_[*name]) {
            log("detach " + *name);
            release(*name);
        }
    }

    void all_flushed() {
        for (auto& [name, volume] : shadow_) {
            volume.flushed();
        }
    }

    // --- Ends ------------------------------------------------------------------------------------

    void reopen() {
        heal();
        log("close and open");
        abandon();
        pool_.reopen();
        all_flushed();
        check_everything();
        check_structure(pool_.machine().files(), /*recovered=*/true);
    }

    void kill() {
        log("the process dies");
        pool_.machine().kill_process();
        abandon();
        pool_.kill();
        check_structure(pool_.machine().files(), /*recovered=*/true);
        check_everything(/*after_crash=*/!keeps_arena_);
    }

    void lose_power() {
        const uint64_t seed = random_();
        log(fmt::format("power fails, seed {}", seed));
        pool_.machine().files().crash(seed);
        check_structure(pool_.machine().files(), /*recovered=*/false);
        abandon();
        pool_.kill();
        check_structure(pool_.machine().files(), /*recovered=*/true);
        check_everything(/*after_crash=*/true);
    }

    void fill_disk() {
        if (tight_) {
            return heal();
        }
        const auto space = must(pool_.machine().files().space(TestPool::kDirectory));
        const uint64_t used = space.total_bytes - space.free_bytes;
        const uint64_t left = below(600'000);
        log(fmt::format("the disk is full after {} more bytes", left));
        pool_.machine().files().set_space_limit(used + left);
        tight_ = true;
    }

    PoolCommand choose_cut(const std::string& name) {
        const std::string fresh = fresh_name();
        const bool has_room = shadow_.size() < kMaxThings;
        switch (below(11)) {
            case 0:
                return checkpoint_command();
            case 8:
                return cut_boot();
            case 1:
                return has_room ? clone_command(name, {fresh}) : checkpoint_command();
            case 2:
                return shadow_[name].snapshots.empty() ? snapshot_command(name, fresh)
                                                       : cut_rollback(name);
            case 3:
                return rename_command(name, fresh);
            case 4:
                if (shadow_.size() < 3) {
                    return snapshot_command(name, fresh);
                }
                release(name);
                return remove_command(name);
            case 5:
                return has_room ? import_command(fresh, random_data(1 + below(700'000)))
                                : checkpoint_command();
            case 6:
                return cut_resize(name);
            case 7:
                return snapshot_command(name, fresh);
            default:
                return collect_command();
        }
    }

    PoolCommand cut_boot() {
        for (const auto& [name, volume] : shadow_) {
            const Result<Hash256> root =
                volume.is_image ? pool_->boot_root(name) : Result<Hash256>(Hash256{});
            if (root && *root != Hash256{}) {
                const size_t bytes = below(4) == 0 ? 0 : 1 + below(150'000);
                return boot_command(name, *root, random_data(bytes));
            }
        }
        return checkpoint_command();
    }
    PoolCommand cut_resize(const std::string& name) {
        const uint64_t old_size = shadow_[name].content.size_bytes();
        const uint64_t size = random_size();
        if (size < old_size) {
            release(name);
        }
        return resize_command(name, old_size, size);
    }
    PoolCommand cut_rollback(const std::string& name) {
        release(name);
        const auto snapshot = shadow_[name].snapshots.begin();
        return rollback_command(name, snapshot->first, snapshot->second);
    }

    /// Stops the machine at some write of the next operation, which then happened or did not; also
    /// when the disk is full.
    void cut_off() {
        const auto name = any(false);
        if (!name) {
            return;
        }
        // Something for the operation to append.
        if (const auto range = random_range(shadow_[*name].content)) {
            const auto data = random_data(range->second);
            log(fmt::format("write {} [{}, +{})", *name, range->first, range->second));
            if (happened(testing::write(device(*name), range->first, data))) {
                shadow_[*name].write(range->first, data);
            } else if (!failed()) {
                shadow_[*name].may_have_written(range->first, data);
                check_content(*name);
            }
        }
        const bool power = chance(50);
        if (chance(25)) {
            cut_off_guest_request(*name, power);
        } else {
            cut_off_command(*name, power);
        }
        check_everything(power || !keeps_arena_);
    }

    void halt_soon(uint64_t bound, std::string_view what, bool power) {
        const uint64_t at = 1 + below(bound);
        const auto side = static_cast<io::HaltSide>(below(3));
        log(fmt::format("cut off at mutation {}, side {}, {}: {}", at, static_cast<int>(side),
                        power ? "power" : "process", what));
        pool_.machine().files().halt_at_mutation(at, side);
    }

    void die(bool power) {
        const uint64_t seed = random_();
        if (power) {
            pool_.machine().files().crash(seed);
        } else {
            pool_.machine().kill_process();
        }
        check_structure(pool_.machine().files(), /*recovered=*/false);
        abandon();
        pool_.kill();
        check_structure(pool_.machine().files(), /*recovered=*/true);
    }

    void cut_off_command(const std::string& name, bool power) {
        const PoolCommand cut = choose_cut(name);
        halt_soon(cut.what == "collect garbage" ? 60 : 12, cut.what, power);
        const bool done = cut.run(*pool_).has_value();
        die(power);
        if (done || cut.has_happened(*pool_)) {
            log(done ? "  it was done" : "  it had happened");
            cut.apply(shadow_);
        }
    }

    /// Such a request may have happened in part.
    void cut_off_guest_request(const std::string& name, bool power) {
        const uint64_t size = shadow_[name].content.size_bytes();
        BlockDevice& on = device(name);
        if (size == 0 || chance(40)) {
            halt_soon(12, "flush " + name, power);
            if (testing::flush(on)) {
                shadow_[name].flushed();
            }
        } else {
            halt_soon(6, "discard all of " + name, power);
            const Content before = shadow_[name].content;
            const bool done = on.discard(0, size, IoMode::kMayBlock).has_value();
            if (done) {
                shadow_[name].zero(0, size);
            } else {
                for (const uint64_t page : before.data_pages()) {
                    const uint64_t start = page * kPageBytes;
                    shadow_[name].may_have_written(
                        start, std::vector<std::byte>(std::min(kPageBytes, size - start)));
                }
            }
        }
        die(power);
    }

    std::mt19937_64 random_;
    TestPool pool_;
    const bool keeps_arena_;
    Shadow shadow_;
    std::map<std::string, std::shared_ptr<BlockDevice>> devices_;
    std::vector<Held> held_;
    std::optional<Importing> importing_;
    std::vector<std::string> history_;
    uint64_t next_name_ = 0;
    PoolCheck check_;
    bool tight_ = false;
};

TEST(PoolModel, RandomProgramsAgreeWithTheShadow) {
    const uint64_t first = first_seed();
    const uint64_t end = first + scaled(60, 6);
    for (uint64_t seed = first; seed != end; ++seed) {
        SCOPED_TRACE(fmt::format("reproduce with STELLARIUM_TEST_SEED={}", seed));
        try {
            Program(seed).run();
        } catch (const std::exception& error) {
            ADD_FAILURE() << error.what();
        }
        if (HasFailure()) {
            fmt::print(stderr, "STELLARIUM_TEST_SEED={}\n", seed);
            return;
        }
    }
}

}  // namespace
}  // namespace stellarium::nova::model
