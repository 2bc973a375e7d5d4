// Crash test of garbage collection in the content store.
//
// A layer above that is as small as can be keeps a set of references: records add and drop them,
// checkpoints hold the set, collections mark it. Random programs run on the simulated machine, with
// appends between the steps of each sweep that deduplicate against what is about to die. Before
// every operation that changes the disk the machine is copied, as a loss of power would leave it or
// the death of the process, and a store opened on the copy is held against these promises:
//
//   - it opens for writing: what a collection has freed is not taken for damage;
//   - the set of references is one that was reached, and not older than what a sync covered;
//   - everything that the set refers to is there, and is what was stored;
//   - whatever else can be found is what was stored, too: nothing dead is served as zeros, by its
//     id or by any address that it ever had;
//   - what is appended afterwards, also over what was dead, is there after the next crash.
//
// STELLARIUM_TEST_SEED reproduces a failure, STELLARIUM_TEST_SCALE multiplies the crash points.
#include <algorithm>
#include <bitset>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "io/simulated.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

constexpr const char* kDirectory = "/pool";
constexpr size_t kBlobs = 96;  // The last third are objects.
constexpr size_t kFirstObject = 64;
constexpr uint16_t kAdd = 1;
constexpr uint16_t kDrop = 2;

using Set = std::bitset<kBlobs>;

const std::vector<Blob>& blobs() {
    static const std::vector<Blob> kAll = [] {
        std::vector<Blob> made;
        for (uint64_t i = 0; i < kBlobs; ++i) {
            if (i < kFirstObject) {
                made.push_back(make_chunk(i, static_cast<uint32_t>(i % 11 == 0 ? 16 : 1 + i % 4)));
            } else {
                made.push_back(make_blob(i, i % 13 == 0 ? 40000 : 100 + 37 * (i - kFirstObject)));
            }
        }
        return made;
    }();
    return kAll;
}

ByteVector encode_set(const Set& set) {
    ByteVector out;
    for (size_t i = 0; i < kBlobs; ++i) {
        out.push_back(std::byte{set.test(i)});
    }
    return out;
}

/// The layer above, after a crash.
class Replayed final : public ReplaySink {
  public:
    explicit Replayed(Bytes checkpoint) {
        for (size_t i = 0; i < checkpoint.size(); ++i) {
            set.set(i, checkpoint[i] != std::byte{0});
        }
    }
    Result<void> replay(uint64_t /*sequence*/, uint16_t kind, Bytes payload) override {
        for (const std::byte number : payload) {
            set.set(std::to_integer<size_t>(number), kind == kAdd);
        }
        return {};
    }
    Set set;
};

struct State {
    uint64_t sequence = 0;
    Set set;
};

/// What may be found after a crash.
struct Model {
    std::vector<State> states{State{}};  ///< By ascending sequence.
    std::optional<Set> in_flight;
    uint64_t durable = 0;
    /// Every address that a blob ever had. Those of batches that a crash cut off are given to
    /// others afterwards: nobody who could know them is left.
    struct Known {
        size_t blob = 0;
        uint64_t sequence = 0;  ///< It was known at.
    };
    std::map<PageAddress, Known> addresses;

    const Set& current() const { return states.back().set; }
    /// The states that a loss of power may leave.
    bool allows(const Set& set, bool lost_power) const {
        if (in_flight && set == *in_flight) {
            return true;
        }
        if (!lost_power) {
            return set == current();
        }
        for (auto state = states.rbegin(); state != states.rend(); ++state) {
            if (state->set == set) {
                return true;
            }
            if (state->sequence <= durable) {
                break;
            }
        }
        return false;
    }
};

Result<ByteVector> read_blob(Store& store, size_t number) {
    if (number < kFirstObject) {
        return read_chunk(store, blobs()[number].id);
    }
    STELLARIUM_ASSIGN(ObjectBytes object, store.get_object(blobs()[number].id));
    return std::move(object.content);
}

void check_content(Store& store, const Set& set, const Model& model, bool lost_power) {
    for (size_t i = 0; i < kBlobs; ++i) {
        const auto read = read_blob(store, i);
        if (read) {
            EXPECT_TRUE(*read == blobs()[i].bytes) << "blob " << i << " has other bytes";
        } else {
            EXPECT_FALSE(set.test(i)) << "blob " << i << ": " << read.error().message();
            EXPECT_EQ(read.error().code(), ErrorCode::kNotFound) << read.error().message();
        }
    }
    ByteVector page(kPageBytes);
    const iovec into{page.data(), page.size()};
    for (const auto& [address, known] : model.addresses) {
        if (lost_power && known.sequence > model.durable) {
            continue;
        }
        const auto read = store.read(address, std::span(&into, 1), IoMode::kMayBlock);
        if (read) {
            EXPECT_TRUE(
                std::ranges::equal(page, Bytes(blobs()[known.blob].bytes).first(kPageBytes)))
                << "blob " << known.blob << " at its address";
        }
    }
}

void append_blob(WriteBatch& batch, size_t number) {
    const Blob& blob = blobs()[number];
    if (number < kFirstObject) {
        batch.add_chunk(blob.id, blob.bytes);
    } else {
        batch.add_object(blob.id, blob.bytes);
    }
}

/// Opens the store on a machine after a crash and checks it; goes on with it a little when asked.
void check_machine(std::unique_ptr<io::SimulatedFileSystem> files, const StoreOptions& options,
                   const Model& model, bool lost_power, uint64_t seed, bool go_on) {
    io::SimulatedMachine machine(std::move(files), seed);
    Set set;
    const auto open = [&](std::unique_ptr<Store>& store) {
        auto opened = Store::open(machine.env(), kDirectory, options);
        ASSERT_OK(opened);
        store = std::move(*opened);
        EXPECT_EQ(store->read_only_reason().value_or(""), "");
        Replayed replayed(store->checkpoint_payload());
        ASSERT_OK(store->replay(replayed));
        set = replayed.set;
    };
    std::unique_ptr<Store> store;
    open(store);
    if (::testing::Test::HasFatalFailure()) {
        return;
    }
    EXPECT_TRUE(model.allows(set, lost_power))
        << "a state that was never reached, or is too old; power lost: " << lost_power << "\n"
        << set << " found at " << store->sequence() << "\n"
        << model.current() << " at " << model.states.back().sequence << ", durable "
        << model.durable;
    check_content(*store, set, model, lost_power);
    EXPECT_EQ(store->stats().index_misses_recovered, 0U);
    if (!go_on || ::testing::Test::HasFailure()) {
        return;
    }
    // Every third blob again, over what is dead and what is not.
    WriteBatch batch;
    ByteVector numbers;
    for (size_t i = seed % 3; i < kBlobs; i += 3) {
        append_blob(batch, i);
        numbers.push_back(static_cast<std::byte>(i));
    }
    batch.add_record(kAdd, numbers);
    const auto appended = store->append(batch);
    ASSERT_OK(appended);
    ASSERT_OK(store->sync(appended->sequence));
    store.reset();
    machine.crash(seed + 1);
    Set expected = set;
    for (const std::byte number : numbers) {
        expected.set(std::to_integer<size_t>(number));
    }
    open(store);
    if (!::testing::Test::HasFatalFailure()) {
        EXPECT_EQ(set, expected);
        check_content(*store, set, model, lost_power);
    }
}

bool may_change_disk(io::OperationKind kind) {
    using enum io::OperationKind;
    switch (kind) {
        case kOpen:
        case kWrite:
        case kDatasync:
        case kTruncate:
        case kPunchHole:
        case kRename:
        case kRemove:
        case kSyncDirectory:
            return true;
        default:
            return false;
    }
}

struct Tally {
    uint64_t crash_points = 0;
    uint64_t crashed_in_sweeps = 0;
    uint64_t freed_bytes = 0;
    uint64_t moved_bytes = 0;
    uint64_t segments_freed = 0;
};

/// One random program on one machine.
class Program {
  public:
    Program(uint64_t seed, Tally& tally)
        : seed_(seed), random_(seed), tally_(tally), machine_(seed) {
        options_.segment_bytes = seed % 3 == 0 ? 2 * kMinSegmentBytes : kMinSegmentBytes;
        options_.index_rewrite_factor = seed % 2 == 0 ? 0 : 1;
    }

    void run() {
        SCOPED_TRACE(fmt::format("reproduce with STELLARIUM_TEST_SEED={}", seed_));
        ASSERT_OK(Store::create(machine_.env(), kDirectory, options_));
        machine_.files().set_observer([this](io::OperationKind kind, std::string_view path) {
            if (may_change_disk(kind) && !::testing::Test::HasFailure()) {
                crash_here(kind, path);
            }
        });
        open();
        const uint64_t steps = 12 + random_.below(20);
        for (uint64_t step = 0; step < steps && !::testing::Test::HasFailure(); ++step) {
            do_step();
        }
        machine_.files().set_observer({});
        handle_.reset();
    }

  private:
    void crash_here(io::OperationKind kind, std::string_view path) {
        // Most operations are those of appends, which have a crash test of their own.
        if (!sweeping_ && !random_.one_in(8)) {
            return;
        }
        SCOPED_TRACE(fmt::format("crash point {} before operation {} on {}", tally_.crash_points,
                                 static_cast<int>(kind), path));
        ++tally_.crash_points;
        tally_.crashed_in_sweeps += sweeping_ ? 1 : 0;
        const uint64_t crash_seed = random_.next();
        const bool go_on = random_.one_in(4);
        if (random_.one_in(4)) {
            check_machine(machine_.files().fork(), options_, model_, lost_power_ || sync_failed_,
                          crash_seed, go_on);
        } else {
            check_machine(machine_.files().crashed_copy(crash_seed), options_, model_, true,
                          crash_seed, go_on);
        }
    }

    void open() {
        auto opened = Store::open(machine_.env(), kDirectory, options_);
        ASSERT_OK(opened);
        store_ = std::move(*opened);
        EXPECT_EQ(store_->read_only_reason().value_or(""), "");
        Replayed replayed(store_->checkpoint_payload());
        ASSERT_OK(store_->replay(replayed));
        EXPECT_TRUE(model_.allows(replayed.set, lost_power_ || sync_failed_));
        const bool lost = lost_power_ || sync_failed_;
        check_content(*store_, replayed.set, model_, lost);
        std::erase_if(model_.addresses, [&](const auto& known) {
            return lost && known.second.sequence > model_.durable;
        });
        model_.states = {{.sequence = store_->sequence(), .set = replayed.set}};
        model_.in_flight.reset();
        model_.durable = store_->sequence();
        lost_power_ = false;
        sync_failed_ = false;
    }

    void do_step() {
        if (random_.one_in(10)) {
            inject_fault();
        }
        const uint64_t what = random_.below(100);
        if (what < 40) {
            add();
        } else if (what < 58) {
            drop();
        } else if (what < 66) {
            sync();
        } else if (what < 72) {
            protected_work();
        } else if (what < 78) {
            checkpoint();
        } else if (what < 94) {
            collect();
        } else {
            reopen(random_.below(3));
        }
        if (store_->read_only_reason()) {
            EXPECT_TRUE(sync_failed_) << store_->read_only_reason().value_or("");
            reopen(0);
        }
    }

    void inject_fault() {
        io::Fault fault;
        fault.nth = 1 + random_.below(6);
        switch (random_.below(4)) {
            case 0:
                fault.kind = io::OperationKind::kWrite;
                fault.errno_value = ENOSPC;
                break;
            case 1:
                fault.kind = io::OperationKind::kDatasync;
                fault.lose_unsynced = random_.one_in(2);
                break;
            case 2:
                fault.kind = io::OperationKind::kPunchHole;
                break;
            default:
                fault.kind = io::OperationKind::kRemove;
                break;
        }
        machine_.files().inject(fault);
    }

    /// Appends blobs, new or stored, and a record that refers to them.
    void add() {
        WriteBatch batch;
        Set next = model_.current();
        ByteVector numbers;
        const uint64_t count = random_.one_in(6) ? 20 : 1 + random_.below(5);
        for (uint64_t i = 0; i < count; ++i) {
            const size_t number = random_.below(kBlobs);
            append_blob(batch, number);
            numbers.push_back(static_cast<std::byte>(number));
            next.set(number);
        }
        batch.add_record(kAdd, numbers);
        append(batch, next);
        note_addresses();
    }

    void drop() {
        WriteBatch batch;
        Set next = model_.current();
        ByteVector numbers;
        const bool most = random_.one_in(4);
        for (size_t i = 0; i < kBlobs; ++i) {
            if (next.test(i) && (most ? !random_.one_in(8) : random_.one_in(5))) {
                numbers.push_back(static_cast<std::byte>(i));
                next.reset(i);
            }
        }
        batch.add_record(kDrop, numbers);
        append(batch, next);
    }

    bool append(WriteBatch& batch, const Set& next) {
        model_.in_flight = next;
        const auto appended = store_->append(batch);
        model_.in_flight.reset();
        if (!appended) {
            EXPECT_TRUE(appended.error().code() == ErrorCode::kNoSpace ||
                        appended.error().code() == ErrorCode::kReadOnly)
                << appended.error().message();
            return false;
        }
        model_.states.push_back({.sequence = appended->sequence, .set = next});
        return true;
    }

    void note_addresses() {
        for (size_t i = 0; i < kFirstObject; ++i) {
            if (const auto location = store_->resolve(blobs()[i].id)) {
                const auto [known, is_new] = model_.addresses.try_emplace(
                    location->address, Model::Known{.blob = i, .sequence = store_->sequence()});
                EXPECT_EQ(known->second.blob, i) << "an address came to mean something else";
            }
        }
    }

    void note_sync(const Result<void>& synced, uint64_t sequence) {
        if (synced) {
            model_.durable = std::max(model_.durable, sequence);
        } else if (synced.error().code() != ErrorCode::kNoSpace) {
            sync_failed_ = true;
        }
    }

    void sync() {
        const uint64_t sequence = store_->sequence();
        note_sync(store_->sync(sequence), sequence);
    }

    bool checkpoint() {
        const uint64_t sequence = store_->sequence();
        const auto done = store_->checkpoint(sequence, encode_set(model_.current()));
        note_sync(done, sequence);
        return done.has_value();
    }

    /// Begins an import, or makes what it appended reachable without appending it again.
    void protected_work() {
        if (handle_ == nullptr) {
            handle_ = store_->protect();
            WriteBatch batch;
            protected_.reset();
            for (int i = 0; i < 6; ++i) {
                const size_t number = random_.below(kBlobs);
                append_blob(batch, number);
                protected_.set(number);
            }
            if (!handle_->append(batch)) {
                handle_.reset();
            }
            note_addresses();
            return;
        }
        WriteBatch batch;
        ByteVector numbers;
        for (size_t i = 0; i < kBlobs; ++i) {
            if (protected_.test(i)) {
                numbers.push_back(static_cast<std::byte>(i));
            }
        }
        batch.add_record(kAdd, numbers);
        append(batch, model_.current() | protected_);
        handle_.reset();
    }

    void collect() {
        auto begun = store_->begin_collection();
        if (!begun) {
            EXPECT_EQ(begun.error().code(), ErrorCode::kReadOnly);
            return;
        }
        const auto collection = std::move(*begun);
        if (random_.one_in(2)) {
            add();
        }
        const Set frozen = model_.current();
        if (!checkpoint()) {
            return;
        }
        ASSERT_OK(collection->fix_position());
        for (size_t i = 0; i < kBlobs; ++i) {
            if (random_.one_in(30)) {
                random_.one_in(2) ? add() : drop();
            }
            if (!frozen.test(i)) {
                continue;
            }
            if (i < kFirstObject) {
                ASSERT_OK(collection->mark_pages(blobs()[i].id, {}, 1));
            } else {
                ASSERT_OK(collection->mark_object(blobs()[i].id, {}));
            }
        }
        sweeping_ = true;
        const uint64_t stop_at = random_.one_in(5) ? random_.below(20) : UINT64_MAX;
        uint64_t looks = 0;
        const auto swept =
            collection->sweep({.move_below = random_.one_in(2) ? 0.25 : 0.8, .cancelled = [&] {
                                   if (random_.one_in(6)) {
                                       random_.one_in(2) ? add() : protected_work();
                                   }
                                   return looks++ == stop_at;
                               }});
        sweeping_ = false;
        if (!swept) {
            const ErrorCode code = swept.error().code();
            // What was injected, or asked for.
            EXPECT_TRUE(code == ErrorCode::kCancelled || code == ErrorCode::kNoSpace ||
                        code == ErrorCode::kIo || code == ErrorCode::kReadOnly)
                << swept.error().message();
            sync_failed_ = sync_failed_ || store_->read_only_reason().has_value();
            return;
        }
        tally_.freed_bytes += swept->freed_bytes;
        tally_.moved_bytes += swept->moved_bytes;
        tally_.segments_freed += swept->segments_freed;
        check_content(*store_, model_.current(), model_, false);
    }

    void reopen(uint64_t how) {
        machine_.files().clear_faults();
        handle_.reset();
        if (how == 0) {
            const uint64_t sequence = store_->sequence();
            const bool syncs = !store_->read_only_reason();
            const auto closed = store_->close();
            if (syncs) {
                note_sync(closed, sequence);
            }
            store_.reset();
        } else if (how == 1) {
            store_.reset();
            machine_.kill_process();
        } else {
            store_.reset();
            machine_.crash(random_.next());
            lost_power_ = true;
        }
        open();
    }

    const uint64_t seed_;
    Sequence random_;
    Tally& tally_;
    io::SimulatedMachine machine_;
    StoreOptions options_;
    std::unique_ptr<Store> store_;
    std::unique_ptr<Store> handle_;
    Set protected_;
    Model model_;
    bool sweeping_ = false;
    bool lost_power_ = false;
    bool sync_failed_ = false;
};

TEST(CollectionCrash, RandomProgramsCrashAnywhere) {
    const uint64_t first = first_seed();
    Tally tally;
    uint64_t seed = first;
    for (; tally.crash_points < scaled(2500, 200) && !HasFailure(); ++seed) {
        Program(seed, tally).run();
    }
    fmt::print("count crash_points {} in {} programs\n", tally.crash_points, seed - first);
    if (first == first_seed(first) && !HasFailure()) {
        // The programs do what they are for.
        EXPECT_GT(tally.crashed_in_sweeps, tally.crash_points / 2);
        EXPECT_GT(tally.freed_bytes, 0U);
        EXPECT_GT(tally.moved_bytes, 0U);
        EXPECT_GT(tally.segments_freed, 0U);
    }
}

}  // namespace
}  // namespace stellarium::nebula
