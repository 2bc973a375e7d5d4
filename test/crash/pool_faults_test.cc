// Every operation of the seam fails once: SQLite's way of testing, for a whole pool.
//
// A program, in parts, does everything that a pool can do: it is created, an image is imported and
// cloned, two guests write what the other one has, flush, discard and die; the next process adopts
// their buffers, takes snapshots, rolls back, renames, resizes, removes, collects garbage, moves
// what is left, scrubs, checkpoints and closes. Each part runs again and again on a copy of the
// machine as the part before left it. In run N the Nth operation of one kind fails, in one of the
// ways in which it can, once or from then on, until a part completes without reaching it.
//
// After each run, on a disk that is well again, and as the death of the process or a loss of power
// left it:
//
//   - nothing crashed or hung, and what failed said which file;
//   - what was acknowledged is there, and durable where it was flushed; a command that failed has
//     not happened, or wholly, if only its sync failed; sectors of a failed write are old or new;
//   - no read gave other bytes, not even by the process that saw the fault;
//   - interruptions and short transfers made nothing fail;
//   - the pool works on: what it is given then is there after the next restart.
//
// In `make test` each N of a small program is tried, and some of a larger one.
// STELLARIUM_TEST_SCALE tries that many times as many of the larger one, up to all.
// STELLARIUM_TEST_SEED chooses contents, crashes, and which those are.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>
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

using io::OperationKind;
using testing::must;
using testing::TestPool;

PoolOptions options() {
    PoolOptions options = TestPool::small_options();
    options.store.segment_bytes = nebula::kMinSegmentBytes;
    options.store.index_rewrite_factor = 0;  // Each checkpoint writes the index.
    options.dirty_budget_bytes = kMinDirtyBudgetBytes;
    options.node_cache_bytes = 64 * kKiB;
    return options;
}

// --- What can go wrong ---------------------------------------------------------------------------

/// One way in which operations of a kind fail.
struct Failure {
    std::string_view name;
    OperationKind kind;
    int errno_value = EIO;
    bool short_transfer = false;
    bool lose_unsynced = false;
    /// A short transfer, and the next operation of the kind fails.
    bool then_fails = false;
    /// Nothing may fail because of it: when it is there once, or even for ever.
    bool harmless_once = false;
    bool harmless_for_ever = false;
};

const std::vector<Failure>& failures() {
    using enum OperationKind;
    static const std::vector<Failure> kAll = {
        {.name = "open: EIO", .kind = kOpen},
        {.name = "open: ENOSPC", .kind = kOpen, .errno_value = ENOSPC},
        {.name = "open: EMFILE", .kind = kOpen, .errno_value = EMFILE},
        {.name = "read: EIO", .kind = kRead},
        {.name = "read: EINTR", .kind = kRead, .errno_value = EINTR, .harmless_once = true},
        {.name = "read: short",
         .kind = kRead,
         .short_transfer = true,
         .harmless_once = true,
         .harmless_for_ever = true},
        {.name = "read without waiting: EIO", .kind = kReadNoWait},
        {.name = "read without waiting: short",
         .kind = kReadNoWait,
         .short_transfer = true,
         .harmless_once = true,
         .harmless_for_ever = true},
        {.name = "write: EIO", .kind = kWrite},
        {.name = "write: ENOSPC", .kind = kWrite, .errno_value = ENOSPC},
        {.name = "write: EINTR", .kind = kWrite, .errno_value = EINTR, .harmless_once = true},
        {.name = "write: short",
         .kind = kWrite,
         .short_transfer = true,
         .harmless_once = true,
         .harmless_for_ever = true},
        {.name = "write: short, then EIO",
         .kind = kWrite,
         .short_transfer = true,
         .then_fails = true},
        {.name = "write: short, then ENOSPC",
         .kind = kWrite,
         .errno_value = ENOSPC,
         .short_transfer = true,
         .then_fails = true},
        {.name = "datasync: EIO", .kind = kDatasync},
        {.name = "datasync: EIO, data lost", .kind = kDatasync, .lose_unsynced = true},
        {.name = "datasync: ENOSPC", .kind = kDatasync, .errno_value = ENOSPC},
        {.name = "truncate: EIO", .kind = kTruncate},
        {.name = "truncate: ENOSPC", .kind = kTruncate, .errno_value = ENOSPC},
        {.name = "punch: EIO", .kind = kPunchHole},
        {.name = "punch: ENOSPC", .kind = kPunchHole, .errno_value = ENOSPC},
        {.name = "punch: EOPNOTSUPP", .kind = kPunchHole, .errno_value = EOPNOTSUPP},
        {.name = "allocate: EIO", .kind = kAllocate},
        {.name = "allocate: ENOSPC", .kind = kAllocate, .errno_value = ENOSPC},
        {.name = "map: EIO", .kind = kMap},
        {.name = "map: ENOMEM", .kind = kMap, .errno_value = ENOMEM},
        {.name = "map shared: ENOMEM", .kind = kMapShared, .errno_value = ENOMEM},
        {.name = "make directory: EIO", .kind = kMakeDirectory},
        {.name = "make directory: ENOSPC", .kind = kMakeDirectory, .errno_value = ENOSPC},
        {.name = "rename: EIO", .kind = kRename},
        {.name = "rename: ENOSPC", .kind = kRename, .errno_value = ENOSPC},
        {.name = "remove: EIO", .kind = kRemove},
        {.name = "list: EIO", .kind = kList},
        {.name = "sync directory: EIO", .kind = kSyncDirectory},
        {.name = "lock: EIO", .kind = kLock},
        {.name = "lock: ENOLCK", .kind = kLock, .errno_value = ENOLCK},
        {.name = "query: EIO", .kind = kQuery},
    };
    return kAll;
}

struct Injection {
    const Failure* failure = nullptr;
    uint64_t nth = 1;
    bool for_ever = false;

    bool is_harmless() const {
        return for_ever ? failure->harmless_for_ever : failure->harmless_once;
    }
    std::string text() const {
        return fmt::format("{}, operation {}{}", failure->name, nth, for_ever ? " and on" : "");
    }
    void into(io::SimulatedFileSystem& files) const {
        io::Fault fault{.kind = failure->kind,
                        .path_part = {},
                        .nth = nth,
                        .for_ever = for_ever,
                        .errno_value = failure->errno_value,
                        .short_transfer = failure->short_transfer,
                        .lose_unsynced = failure->lose_unsynced};
        if (failure->then_fails) {
            fault.for_ever = false;
            files.inject(fault);
            fault.short_transfer = false;
            fault.for_ever = for_ever;
            ++fault.nth;
        }
        files.inject(fault);
    }
};

struct Tally {
    uint64_t runs = 0;
    uint64_t faults = 0;   ///< Operations that failed.
    uint64_t errors = 0;   ///< Calls of the pool that said so.
    uint64_t endings = 0;  ///< Machines opened and compared afterwards.
    std::map<OperationKind, uint64_t> reached;
};

/// A machine between two parts of the program, and what its pool ought to hold.
struct Start {
    std::unique_ptr<io::SimulatedFileSystem> files;
    Shadow shadow;
};

// --- One run of one part -------------------------------------------------------------------------

/// A process in trouble: goes on as far as it can, and keeps the books.
class Session {
  public:
    Session(const Start& start, uint64_t seed, const Injection* injection)
        : pool_(start.files->fork(), seed, options()),
          shadow_(start.shadow),
          seed_(seed),
          injection_(injection) {
        if (injection_ != nullptr) {
            injection_->into(files());
        }
    }

    io::SimulatedFileSystem& files() { return pool_.machine().files(); }
    uint64_t errors() const { return errors_; }
    bool is_open() const { return pool_.is_open(); }
    const std::vector<std::byte>& data(uint64_t which, size_t pages) const;

    /// What a supervisor does: once more, when it did not work.
    bool create();
    bool open();
    void scrub();
    void run(const PoolCommand& command);
    void remove(const std::string& name);
    void rollback(const std::string& name, const std::string& snapshot);
    void remove_snapshot(const std::string& name, const std::string& snapshot) {
        run_on(name + "@" + snapshot, remove_snapshot_command(name, snapshot));
    }
    void clone(const std::string& source, const std::string& name) {
        run_on(source, clone_command(source, {name}));
    }
    void snapshot(const std::string& name, const std::string& fresh) {
        run_on(name, snapshot_command(name, fresh));
    }
    void attachment(const std::string& name, const std::string& label) {
        run_on(name, attachment_command(name, label));
    }
    void rename(const std::string& from, const std::string& to) {
        detach(from);
        run_on(from, rename_command(from, to));
    }
    void resize(const std::string& name, uint64_t pages);
    void write(const std::string& name, uint64_t sector, Bytes bytes);
    void write_pages(const std::string& name, uint64_t page, Bytes bytes) {
        write(name, page * kPageBytes / kSectorBytes, bytes);
    }
    void zero(const std::string& name, uint64_t page, uint64_t pages);
    void flush(const std::string& name);
    void detach(const std::string& name);
    void read_all();
    void collect();
    void close();
    bool has_buffer_file();

    /// The process is gone, and its disk well.
    Start end();
    /// What that left is one of the states that are allowed, and can be worked with.
    void check(Tally& tally, bool go_on);

  private:
    BlockDevice* device(const std::string& name);
    bool has(const std::string& source) const;
    bool settle(const std::string& name);
    bool release(const std::string& name);
    void run_on(const std::string& source, const PoolCommand& command);
    void note_error(const std::string& what, const Error& error);
    void check_machine(std::unique_ptr<io::SimulatedFileSystem> files, bool lost_power, bool go_on);
    void go_on_with(TestPool& pool, Shadow& shadow);

    TestPool pool_;
    Shadow shadow_;
    const uint64_t seed_;
    const Injection* injection_;
    uint64_t errors_ = 0;
    std::map<std::string, std::shared_ptr<BlockDevice>> devices_;
    /// Commands that failed when the store could not be written any more: they may be in the log.
    std::vector<PoolCommand> unsure_;
    PoolCheck check_;
};

void Session::note_error(const std::string& what, const Error& error) {
    ++errors_;
    if (injection_ == nullptr || injection_->is_harmless()) {
        ADD_FAILURE() << what << ": " << error.message();
        return;
    }
    EXPECT_NE(error.message().find('/'), std::string::npos)
        << what << ": the error names no file: " << error.message();
}

/// Made once, for all sessions.
const std::vector<std::byte>& Session::data(uint64_t which, size_t pages) const {
    static std::map<std::pair<uint64_t, uint64_t>, std::vector<std::byte>> made;
    auto& bytes = made[{seed_ * 1000 + which, pages}];
    if (bytes.empty()) {
        bytes = testing::random_bytes(pages * kPageBytes, seed_ * 1000 + which);
    }
    return bytes;
}

bool Session::has(const std::string& source) const {
    const size_t at = source.find('@');
    const auto entity = shadow_.find(source.substr(0, at));
    return entity != shadow_.end() &&
           (at == std::string::npos || entity->second.snapshots.contains(source.substr(at + 1)));
}

bool Session::create() {
    for (int attempt = 0; attempt < 2; ++attempt) {
        const auto made =
            Pool::create(pool_.machine().process_env(), TestPool::kDirectory, options());
        if (made) {
            return true;
        }
        if (made.error().code() == ErrorCode::kAlreadyExists) {
            // Only the last syncs failed, so that it may or may not be there after a crash.
            return false;
        }
        note_error("create", made.error());
        pool_.machine().kill_process();
        if (injection_->for_ever) {
            injection_->into(files());
        }
    }
    return false;
}

bool Session::open() {
    for (int attempt = 0; attempt < 2; ++attempt) {
        if (const auto opened = pool_.try_open()) {
            if (const auto reason = pool_->read_only_reason()) {
                note_error("open", Error(ErrorCode::kReadOnly, *reason));
            }
            return true;
        } else {
            note_error("open", opened.error());
        }
    }
    return false;
}

void Session::run(const PoolCommand& command) {
    if (!is_open()) {
        return;
    }
    const auto done = command.run(*pool_);
    if (done) {
        command.apply(shadow_);
        return;
    }
    note_error(command.what, done.error());
    if (pool_->read_only_reason()) {
        unsure_.push_back(command);
        return;
    }
    try {
        EXPECT_FALSE(command.has_happened(*pool_))
            << command.what << " has happened, though it failed: " << done.error().message();
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
        // Reading fails, too. The endings will tell.
    }
}

/// Finds out what a failed write has done. False: that cannot be read now.
bool Session::settle(const std::string& name) {
    ShadowVolume& volume = shadow_.at(name);
    if (volume.uncertain.empty()) {
        return true;
    }
    try {
        const auto device = must(pool_->attach(name, {.read_only = true}));
        ShadowVolume as_read = volume;
        check_.content(name, volume.content, *device, &as_read, false);
        volume = std::move(as_read);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

void Session::run_on(const std::string& source, const PoolCommand& command) {
    if (is_open() && has(source) && settle(source.substr(0, source.find('@')))) {
        run(command);
    }
}

/// Detaches it, also on record. False: that failed.
bool Session::release(const std::string& name) {
    detach(name);
    if (!shadow_.at(name).attachment.empty()) {
        run(attachment_command(name, ""));
    }
    return shadow_.at(name).attachment.empty();
}

void Session::remove(const std::string& name) {
    if (has(name) && release(name)) {
        run(remove_command(name));
    }
}

void Session::rollback(const std::string& name, const std::string& snapshot) {
    if (has(name + "@" + snapshot) && release(name)) {
        run_on(name, rollback_command(name, snapshot, shadow_.at(name).snapshots.at(snapshot)));
    }
}

void Session::resize(const std::string& name, uint64_t pages) {
    if (!has(name)) {
        return;
    }
    const uint64_t now = shadow_.at(name).content.size_bytes();
    if (pages * kPageBytes >= now || release(name)) {
        run_on(name, resize_command(name, now, pages * kPageBytes));
    }
}

BlockDevice* Session::device(const std::string& name) {
    if (!is_open() || !has(name)) {
        return nullptr;
    }
    auto& device = devices_[name];
    if (!device) {
        auto attached = pool_->attach(name, {.label = "faults"});
        if (!attached) {
            note_error("attach " + name, attached.error());
            return nullptr;
        }
        device = *std::move(attached);
    }
    return device.get();
}

void Session::write(const std::string& name, uint64_t sector, Bytes bytes) {
    BlockDevice* to = device(name);
    if (to == nullptr) {
        return;
    }
    const uint64_t offset = sector * kSectorBytes;
    auto written = testing::write(*to, offset, bytes, IoMode::kNoWait);
    if (!written && written.error().code() == ErrorCode::kWouldBlock) {
        written = testing::write(*to, offset, bytes);
    }
    if (written) {
        shadow_.at(name).write(offset, bytes);
    } else {
        note_error("write " + name, written.error());
        shadow_.at(name).may_have_written(offset, bytes);
    }
}

void Session::zero(const std::string& name, uint64_t page, uint64_t pages) {
    BlockDevice* on = device(name);
    if (on == nullptr) {
        return;
    }
    const uint64_t offset = page * kPageBytes;
    const uint64_t length = pages * kPageBytes;
    const auto done = on->write_zeroes(offset, length, IoMode::kMayBlock);
    if (done) {
        shadow_.at(name).zero(offset, length);
    } else {
        note_error("write zeroes to " + name, done.error());
        shadow_.at(name).may_have_written(offset, std::vector<std::byte>(length));
    }
}

void Session::flush(const std::string& name) {
    BlockDevice* on = device(name);
    if (on == nullptr) {
        return;
    }
    if (const auto flushed = testing::flush(*on)) {
        shadow_.at(name).flushed();
    } else {
        note_error("flush " + name, flushed.error());
    }
}

void Session::detach(const std::string& name) {
    if (devices_[name]) {
        flush(name);
    }
    devices_.erase(name);
}

/// No read gives other bytes, whatever happened; most give the right ones.
void Session::read_all() {
    if (!is_open()) {
        return;
    }
    Shadow as_read = shadow_;
    try {
        // What is not durable for want of a sync can be seen all the same.
        for (const PoolCommand& command : unsure_) {
            if (command.has_happened(*pool_)) {
                command.apply(as_read);
            }
        }
    } catch (const std::exception& error) {
        note_error("read", Error(ErrorCode::kIo, error.what()));
        return;
    }
    const auto look = [&](const std::string& source, const Content& content, ShadowVolume* volume) {
        try {
            const auto device = must(pool_->attach(source, {.read_only = true}));
            check_.content(source, content, *device, volume, false);
        } catch (const std::exception& error) {
            note_error("read " + source, Error(ErrorCode::kIo, error.what()));
        }
    };
    for (auto& [name, volume] : as_read) {
        look(name, volume.content, &volume);
        for (const auto& [snapshot, content] : volume.snapshots) {
            look(name + "@" + snapshot, content, nullptr);
        }
    }
}

void Session::collect() {
    if (!is_open()) {
        return;
    }
    // Twice: what the first one moves is freed by the second.
    run(collect_command());
    run(collect_command());
}

void Session::scrub() {
    class Nothing final : public nebula::ReplaySink {
      public:
        Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
    };
    const auto work = [&]() -> Result<void> {
        STELLARIUM_ASSIGN(const auto store,
                          nebula::Store::open(pool_.machine().process_env(), TestPool::kDirectory,
                                              options().store));
        Nothing sink;
        STELLARIUM_TRY(store->replay(sink));
        nebula::PageAddress from;
        while (true) {
            STELLARIUM_ASSIGN(const nebula::ScrubStep step,
                              store->scrub(from, 64 * kKiB, [&](const nebula::DamagedChunk& chunk) {
                                  note_error("scrub", Error(ErrorCode::kCorrupt, chunk.reason));
                              }));
            if (!step.next) {
                break;
            }
            from = step.next;
        }
        return store->close();
    };
    for (int attempt = 0; attempt < 2; ++attempt) {
        const auto done = work();
        if (done) {
            return;
        }
        note_error("scrub", done.error());
    }
}

/// On a full disk a pool that was closed leaves what it could not flush in its buffer's file.
bool Session::has_buffer_file() {
    const auto copy = files().fork();  // Looking must not meet a fault, nor count as an operation.
    copy->clear_faults();
    const auto entries = must(copy->list(TestPool::kRuntime));
    return std::ranges::any_of(
        entries, [](const io::DirectoryEntry& entry) { return entry.name.ends_with(".arena"); });
}

void Session::close() {
    if (!is_open()) {
        return;
    }
    for (const auto& [name, volume] : shadow_) {
        detach(name);
    }
    const auto closed = pool_->close();
    if (!closed) {
        note_error("close", closed.error());
    } else if (!pool_->read_only_reason() && !has_buffer_file()) {
        for (auto& [name, volume] : shadow_) {
            volume.flushed();
        }
    }
    pool_.drop();
}

Start Session::end() {
    // As the death of the process: nothing is told to the pool any more.
    pool_.machine().kill_process();
    devices_.clear();
    pool_.drop();
    return {.files = files().fork(), .shadow = shadow_};
}

void Session::check(Tally& tally, bool go_on) {
    const uint64_t fired = files().faults_fired();
    tally.faults += fired;
    tally.errors += errors_;
    pool_.machine().kill_process();
    devices_.clear();
    pool_.drop();
    const bool lost = injection_->failure->lose_unsynced;
    tally.endings += 2;
    {
        SCOPED_TRACE("after the death of the process");
        check_machine(files().fork(), lost, go_on);
    }
    SCOPED_TRACE("after a loss of power");
    check_machine(files().crashed_copy(seed_ + tally.runs), true, go_on);
}

void Session::check_machine(std::unique_ptr<io::SimulatedFileSystem> files, bool lost_power,
                            bool go_on) {
    try {
        PoolOptions careful = options();
        careful.store.verify_always = true;
        TestPool pool(std::move(files), seed_, careful);
        if (!must(pool.machine().files().exists(
                fmt::format("{}/superblock", TestPool::kDirectory)))) {
            // Only creation leaves that, and it can be repeated.
            ASSERT_TRUE(shadow_.empty());
            must(Pool::create(pool.machine().env(), TestPool::kDirectory, careful));
        }
        pool.open();
        EXPECT_EQ(pool->read_only_reason().value_or(""), "");
        Shadow shadow = shadow_;
        for (const PoolCommand& command : unsure_) {
            if (command.has_happened(*pool)) {
                command.apply(shadow);
            }
        }
        check_.everything(*pool, shadow, lost_power);
        if (go_on && !::testing::Test::HasFailure()) {
            go_on_with(pool, shadow);
        }
    } catch (const std::exception& error) {
        ADD_FAILURE() << error.what();
    }
}

void Session::go_on_with(TestPool& pool, Shadow& shadow) {
    for (auto& [name, volume] : shadow) {
        if (volume.is_image || volume.content.size_bytes() < 2 * kPageBytes) {
            continue;
        }
        const auto device = must(pool->attach(name, {}));
        must(testing::write(*device, kPageBytes, Bytes(data(99, 1)).first(kPageBytes)));
        volume.write(kPageBytes, Bytes(data(99, 1)).first(kPageBytes));
        must(testing::flush(*device));
    }
    must(import_command("afterwards", data(98, 20)).run(*pool));
    import_command("afterwards", data(98, 20)).apply(shadow);
    must(pool->gc({}));
    check_.everything(*pool, shadow, false);
    pool.reopen();
    for (auto& [name, volume] : shadow) {
        volume.flushed();
    }
    check_.everything(*pool, shadow, false);
}

// --- The program ---------------------------------------------------------------------------------

struct Part {
    std::string_view name;
    /// `size`: 1 for the small program.
    void (*run)(Session& session, uint64_t size);
};

void create_part(Session& session, uint64_t /*size*/) {
    session.create();
}

void import_part(Session& session, uint64_t size) {
    session.open();
    // A part of it twice, and a hole.
    std::vector<std::byte> image(session.data(1, 24 * size));
    std::copy_n(image.begin(), 4 * kPageBytes,
                image.end() - static_cast<ptrdiff_t>(4 * kPageBytes));
    std::fill_n(image.begin() + static_cast<ptrdiff_t>(8 * kPageBytes), 3 * kPageBytes,
                std::byte{0});
    session.run(import_command("image", std::move(image)));
    session.clone("image", "a");
    session.clone("image", "b");
    session.run(create_command("empty", 40 * size * kPageBytes));
    session.attachment("a", "socket of a");
    session.read_all();
    session.close();
}

void write_part(Session& session, uint64_t size) {
    session.open();
    const Bytes fresh(session.data(2, 12 * size));
    for (uint64_t round = 0; round < size; ++round) {
        const Bytes piece = fresh.subspan(round * 12 * kPageBytes, 12 * kPageBytes);
        session.write_pages("a", 2 + 12 * round, piece);
        // What the other one is about to store, and a little more.
        session.write_pages("b", 1 + 12 * round, piece.first(6 * kPageBytes));
        session.write("b", 9 + 96 * round, piece.first(3 * kSectorBytes));
        session.flush("a");
        session.zero("a", 4 + 12 * round, 3);
        session.write_pages("empty", 20 * round, piece.subspan(2 * kPageBytes, 9 * kPageBytes));
        session.flush("b");
        session.write("a", 3 + 96 * round, piece.first(2 * kSectorBytes));
    }
    session.read_all();
    session.flush("empty");
    session.write_pages("empty", 12, fresh.first(2 * kPageBytes));
    session.write_pages("a", 0, fresh.first(kPageBytes));
    session.zero("b", 0, 2);
}

void history_part(Session& session, uint64_t size) {
    session.open();
    session.snapshot("a", "one");
    session.write_pages("a", 5, Bytes(session.data(3, 4 * size)));
    session.snapshot("a", "two");
    session.clone("a@one", "c");
    session.write_pages("c", 1, Bytes(session.data(4, 3 * size)));
    session.rollback("a", "one");
    session.rename("c", "d");
    session.resize("empty", 50 * size);
    session.resize("b", 16 * size);
    session.remove_snapshot("a", "two");
    session.run(checkpoint_command());
    session.write_pages("d", 7, Bytes(session.data(3, 2 * size)));
    session.flush("d");
    session.read_all();
    session.close();
}

void collect_part(Session& session, uint64_t size) {
    session.open();
    session.remove("image");
    session.remove("b");
    session.write_pages("d", 0, Bytes(session.data(5, 9 * size)));
    session.flush("d");
    session.collect();
    // What has just died, and what was moved.
    session.write_pages("empty", 0, Bytes(session.data(2, 12 * size)));
    session.write_pages("a", 8, Bytes(session.data(1, 4 * size)));
    session.flush("empty");
    session.read_all();
    session.run(checkpoint_command());
    session.remove("d");
    session.collect();
    session.read_all();
}

void scrub_part(Session& session, uint64_t /*size*/) {
    session.scrub();
}

void last_part(Session& session, uint64_t size) {
    session.open();
    session.write_pages("a", 3, Bytes(session.data(6, 2 * size)));
    session.flush("a");
    session.collect();
    session.close();
}

constexpr Part kParts[] = {
    {"create", create_part},   {"import", import_part},   {"write", write_part},
    {"history", history_part}, {"collect", collect_part}, {"scrub", scrub_part},
    {"last", last_part},
};

/// One program, with each part from where the one before left off.
class Program {
  public:
    explicit Program(uint64_t seed, uint64_t size) : seed_(seed), size_(size) {
        Start start{.files = std::make_unique<io::SimulatedFileSystem>(), .shadow = {}};
        start.files->mount(TestPool::kRuntime,
                           {.kind = io::FileSystemKind::kMemory, .name = "tmpfs"});
        for (const Part& part : kParts) {
            Session session(start, seed_, nullptr);
            session.files().reset_counts();
            part.run(session, size_);
            counts_.push_back(session.files().counts());
            starts_.push_back(std::exchange(start, session.end()));
        }
    }

    const io::OperationCounts& counts(size_t part) const { return counts_[part]; }

    /// False: the part completed without reaching the fault.
    bool run(size_t part, const Injection& injection, Tally& tally) const {
        SCOPED_TRACE(fmt::format("part '{}' of the program of size {}: {}", kParts[part].name,
                                 size_, injection.text()));
        Session session(starts_[part], seed_, &injection);
        kParts[part].run(session, size_);
        if (session.files().faults_fired() == 0) {
            return false;
        }
        ++tally.runs;
        ++tally.reached[injection.failure->kind];
        session.check(tally, /*go_on=*/tally.runs % 16 == 0);
        return true;
    }

  private:
    const uint64_t seed_;
    const uint64_t size_;
    std::vector<Start> starts_;
    std::vector<io::OperationCounts> counts_;
};

/// What the program must reach at least: kinds that the store uses at all.
void expect_all_kinds(const Tally& tally) {
    using enum OperationKind;
    for (const OperationKind kind :
         {kOpen, kRead, kReadNoWait, kWrite, kDatasync, kTruncate, kPunchHole, kAllocate, kMap,
          kMapShared, kMakeDirectory, kRename, kRemove, kList, kSyncDirectory, kLock, kQuery}) {
        EXPECT_TRUE(tally.reached.contains(kind))
            << "no operation of kind " << static_cast<int>(kind) << " was reached";
    }
}

void print(std::string_view what, const Tally& tally) {
    fmt::print("count faults {} in {} runs of {}: {} calls failed, {} endings compared\n",
               tally.faults, tally.runs, what, tally.errors, tally.endings);
}

/// Each failure of each part at each Nth operation, from `first` in steps of `step`.
void run_all(const Program& program, uint64_t first, uint64_t step, Tally& tally) {
    for (size_t part = 0; part < std::size(kParts); ++part) {
        for (const Failure& failure : failures()) {
            for (const bool for_ever : {false, true}) {
                // An endless interruption is tried a thousand times at each operation: some will
                // do.
                const uint64_t sparser = for_ever && failure.errno_value == EINTR ? 8 : 1;
                for (uint64_t nth = first; !::testing::Test::HasFailure(); nth += step * sparser) {
                    if (!program.run(part, {.failure = &failure, .nth = nth, .for_ever = for_ever},
                                     tally)) {
                        break;
                    }
                }
            }
        }
    }
}

TEST(PoolFaults, EachOperationOfASmallProgramFails) {
    const uint64_t seed = first_seed();
    SCOPED_TRACE(fmt::format("reproduce with STELLARIUM_TEST_SEED={}", seed));
    const Program program(seed, 1);
    ASSERT_FALSE(HasFailure());
    Tally tally;
    // A sanitizer makes everything slow: then some.
    run_all(program, 1, under_sanitizer() ? 17 : 1, tally);
    print("a small program", tally);
    if (!HasFailure() && !under_sanitizer()) {
        expect_all_kinds(tally);
    }
}

TEST(PoolFaults, SomeOperationsOfALargeProgramFail) {
    const uint64_t seed = first_seed();
    SCOPED_TRACE(fmt::format("reproduce with STELLARIUM_TEST_SEED={}", seed));
    const Program program(seed, 4);
    ASSERT_FALSE(HasFailure());
    Tally tally;
    const uint64_t step = std::max<uint64_t>(1, (under_sanitizer() ? 397 : 97) / scaled(1, 1));
    run_all(program, 1 + seed % step, step, tally);
    print("a large program", tally);
}

}  // namespace
}  // namespace stellarium::nova::model
