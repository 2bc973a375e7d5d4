// Crash test of the content store.
//
// Random programs (appends with duplicates, objects and records, syncs, checkpoints, faults,
// reopening, real crashes) run on the simulated machine. Before every operation that changes the
// disk, the machine is copied as a loss of power would leave it, or as the death of the process
// would, and what a store opened on the copy shows is held against docs/internals/crash-model.md:
//
//   - it opens for writing: no crash looks like corruption;
//   - the checkpoint is one that was published, or was being published, and not older than the
//     last published one;
//   - the replayed records are those that were appended, in order, those of one append all or none;
//   - every record and chunk that a sync covered is there; after the death of the process alone,
//     everything that append returned for;
//   - every chunk and object that a record refers to is there, and is what was stored;
//   - what is appended afterwards is there after the next crash.
//
// STELLARIUM_TEST_SEED reproduces a failure, STELLARIUM_TEST_SCALE multiplies the crash points.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "io/simulated.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

constexpr const char* kDirectory = "/pool";
constexpr uint64_t kChunkKinds = 80;
constexpr uint64_t kObjectKinds = 60;
constexpr uint16_t kRecordKind = 3;

uint64_t wanted_crash_points() {
    return scaled(2500, 300);
}

/// The chunks and objects that programs use, named by small numbers.
class Universe {
  public:
    Universe() {
        for (uint64_t i = 0; i < kChunkKinds; ++i) {
            const auto pages = static_cast<uint32_t>(i % 13 == 0 ? kMaxChunkPages : 1 + i % 3);
            chunks.push_back(make_chunk(1000 + i, pages));
        }
        for (uint64_t i = 0; i < kObjectKinds; ++i) {
            const size_t size = i % 15 == 1 ? 40000 + i : i * i * 3;
            objects.push_back(make_blob(5000 + i, size));
            hints.push_back(i % 15 == 1 ? ByteVector()
                                        : make_bytes(9000 + i, i % 7 == 0 ? 900 : i));
        }
    }
    std::vector<Blob> chunks;
    std::vector<Blob> objects;
    std::vector<ByteVector> hints;
};

const Universe& universe() {
    static const Universe instance;
    return instance;
}

struct References {
    std::vector<uint32_t> chunks;
    std::vector<uint32_t> objects;
};

/// A record names itself and what it refers to.
ByteVector encode_record(uint64_t number, const References& references) {
    ByteVector out;
    const auto put = [&](uint32_t value) {
        const U32Le word(value);
        const Bytes bytes = bytes_of(word);
        out.insert(out.end(), bytes.begin(), bytes.end());
    };
    put(static_cast<uint32_t>(number));
    put(static_cast<uint32_t>(references.chunks.size()));
    for (const uint32_t chunk : references.chunks) {
        put(chunk);
    }
    for (const uint32_t object : references.objects) {
        put(object);
    }
    return out;
}

struct ModelRecord {
    uint64_t sequence = 0;  ///< Of its append.
    std::string payload;
    References references;
};

/// One append that returned.
struct ModelAppend {
    uint64_t sequence = 0;
    References references;
    size_t records_after = 0;  ///< Records up to and with this one.
};

/// One append that failed. What it wrote may be whole on the disk all the same, until what takes
/// its number is durable.
struct FailedAppend {
    uint64_t sequence = 0;  ///< The number that it did not take.
    size_t records_before = 0;
    std::vector<ModelRecord> records;
};

/// What may be found after a crash.
struct Model {
    std::vector<ModelRecord> records;
    std::vector<ModelAppend> appends;
    std::vector<FailedAppend> failed;
    uint64_t durable = 0;   ///< Highest sequence that a sync returned for.
    size_t checkpoint = 0;  ///< Records in the published checkpoint.
    uint64_t checkpoint_sequence = 0;
    std::optional<size_t> checkpoint_in_flight;
    std::vector<ModelRecord> in_flight;  ///< Of an append that has not returned.

    size_t records_through(uint64_t sequence) const {
        size_t count = 0;
        while (count < records.size() && records[count].sequence <= sequence) {
            ++count;
        }
        return count;
    }
    /// What there is when the failed append has happened after all, and what followed has not.
    Model with(const FailedAppend& append) const {
        Model other = *this;
        other.failed.clear();
        other.in_flight.clear();
        other.records.resize(append.records_before);
        other.records.insert(other.records.end(), append.records.begin(), append.records.end());
        std::erase_if(other.appends,
                      [&](const ModelAppend& each) { return each.sequence >= append.sequence; });
        other.appends.push_back(
            {.sequence = append.sequence, .references = {}, .records_after = other.records.size()});
        return other;
    }
    /// This model, or the one with the failed append that the replay ends with.
    Model as_found(const RecordedReplay& replay, size_t base) const {
        const size_t total = base + replay.records.size();
        for (const FailedAppend& append : failed) {
            if (append.sequence > durable && !append.records.empty() && !replay.records.empty() &&
                total == append.records_before + append.records.size() &&
                replay.records.back().sequence == append.sequence &&
                replay.records.back().payload == append.records.back().payload) {
                return with(append);
            }
        }
        return *this;
    }
};

enum class Death : uint8_t { kPower, kProcess };

/// The largest payload there is, so that a torn superblock is torn within it.
ByteVector encode_payload(size_t records) {
    ByteVector payload = make_bytes(records, kMaxCheckpointPayload);
    const U32Le count(static_cast<uint32_t>(records));
    std::ranges::copy(bytes_of(count), payload.begin());
    return payload;
}

size_t payload_records(Store& store) {
    const Bytes payload = store.checkpoint_payload();
    if (payload.empty()) {
        return 0;
    }
    const size_t records = load<U32Le>(payload);
    EXPECT_TRUE(std::ranges::equal(payload, encode_payload(records)));
    return records;
}

StoreOptions small_options(uint64_t seed) {
    StoreOptions options;
    options.segment_bytes = seed % 3 == 0 ? kMinSegmentBytes : kMinSegmentBytes * 2;
    options.index_rewrite_factor = seed % 2 == 0 ? 0 : 1;
    return options;
}

::testing::AssertionResult holds(Store& store, const References& references) {
    for (const uint32_t number : references.chunks) {
        const Blob& chunk = universe().chunks[number];
        const auto read = read_chunk(store, chunk.id);
        if (!read) {
            return ::testing::AssertionFailure()
                   << "chunk " << number << ": " << read.error().message();
        }
        if (*read != chunk.bytes) {
            return ::testing::AssertionFailure() << "chunk " << number << " has other bytes";
        }
    }
    for (const uint32_t number : references.objects) {
        const Blob& object = universe().objects[number];
        const auto read = store.get_object(object.id);
        if (!read) {
            return ::testing::AssertionFailure()
                   << "object " << number << ": " << read.error().message();
        }
        if (read->content != object.bytes || read->aux != universe().hints[number]) {
            return ::testing::AssertionFailure() << "object " << number << " has other bytes";
        }
    }
    return ::testing::AssertionSuccess();
}

/// Holds an opened store against the model. Returns how many records it has, checkpoint included.
size_t check_state(Store& store, const RecordedReplay& replay, size_t base,
                   const Model& expected_model, Death death) {
    const Model model =
        death == Death::kPower ? expected_model.as_found(replay, base) : expected_model;
    EXPECT_EQ(store.read_only_reason().value_or(""), "");
    EXPECT_TRUE(base == model.checkpoint || base == model.checkpoint_in_flight)
        << "a checkpoint with " << base << " records was never published";
    const size_t total = base + replay.records.size();
    EXPECT_LE(total, model.records.size() + model.in_flight.size());
    const size_t least =
        death == Death::kProcess ? model.records.size() : model.records_through(model.durable);
    EXPECT_GE(total, least) << "acknowledged records are missing";

    std::set<size_t> borders{model.checkpoint, model.records.size(),
                             model.records.size() + model.in_flight.size()};
    for (const ModelAppend& append : model.appends) {
        borders.insert(append.records_after);
    }
    EXPECT_TRUE(borders.contains(total)) << "part of an append: " << total << " records";

    References needed;
    const auto need = [&](const References& references) {
        needed.chunks.insert(needed.chunks.end(), references.chunks.begin(),
                             references.chunks.end());
        needed.objects.insert(needed.objects.end(), references.objects.begin(),
                              references.objects.end());
    };
    for (size_t i = 0; i < total; ++i) {
        const bool returned = i < model.records.size();
        if (!returned && i - model.records.size() >= model.in_flight.size()) {
            break;
        }
        const ModelRecord& expected =
            returned ? model.records[i] : model.in_flight[i - model.records.size()];
        need(expected.references);
        if (i < base) {
            continue;
        }
        const RecordedReplay::Record& found = replay.records[i - base];
        EXPECT_EQ(found.kind, kRecordKind);
        EXPECT_EQ(found.payload, expected.payload) << "record " << i;
        if (returned) {
            EXPECT_EQ(found.sequence, expected.sequence) << "record " << i;
        }
    }
    for (const ModelAppend& append : model.appends) {
        if (death == Death::kProcess || append.sequence <= model.durable) {
            need(append.references);
        }
    }
    for (auto* list : {&needed.chunks, &needed.objects}) {
        std::ranges::sort(*list);
        list->erase(std::unique(list->begin(), list->end()), list->end());
    }
    EXPECT_TRUE(holds(store, needed));
    EXPECT_EQ(store.stats().index_misses_recovered, 0U);
    return total;
}

/// Opens the store on a machine after a crash and checks it; goes on with it a little when asked.
void check_machine(std::unique_ptr<io::SimulatedFileSystem> files, const StoreOptions& options,
                   const Model& model, Death death, uint64_t seed, bool go_on) {
    io::SimulatedMachine machine(std::move(files), seed);
    size_t total = 0;
    uint64_t sequence = 0;
    {
        auto opened = Store::open(machine.env(), kDirectory, options);
        ASSERT_OK(opened);
        Store& store = **opened;
        const size_t base = payload_records(store);
        RecordedReplay replay;
        ASSERT_OK(store.replay(replay));
        total = check_state(store, replay, base, model, death);
        sequence = store.sequence();
        if (!go_on || ::testing::Test::HasFailure()) {
            return;
        }
        // Something new after the cut-off tail, which must not come back behind it.
        WriteBatch batch;
        const Blob chunk = make_chunk(seed, 2);
        batch.add_chunk(chunk.id, chunk.bytes);
        batch.add_record(kRecordKind, bytes_of(std::string_view("new")));
        const auto appended = store.append(batch);
        ASSERT_OK(appended);
        EXPECT_GT(appended->sequence, sequence);
        ASSERT_OK(store.sync(appended->sequence));
    }
    machine.crash(seed + 1);
    auto opened = Store::open(machine.env(), kDirectory, options);
    ASSERT_OK(opened);
    EXPECT_EQ((*opened)->read_only_reason().value_or(""), "");
    const size_t base = payload_records(**opened);
    RecordedReplay replay;
    ASSERT_OK((*opened)->replay(replay));
    ASSERT_EQ(base + replay.records.size(), total + 1);
    EXPECT_EQ(replay.records.back().payload, "new");
    EXPECT_OK(read_chunk(**opened, make_chunk(seed, 2).id));
}

bool may_change_disk(io::OperationKind kind) {
    using enum io::OperationKind;
    switch (kind) {
        case kOpen:
        case kWrite:
        case kDatasync:
        case kTruncate:
        case kPunchHole:
        case kAllocate:
        case kMakeDirectory:
        case kRename:
        case kRemove:
        case kSyncDirectory:
            return true;
        default:
            return false;
    }
}

/// One random program on one machine.
class Program {
  public:
    Program(uint64_t seed, uint64_t& crash_points)
        : seed_(seed),
          random_(seed),
          crash_points_(crash_points),
          machine_(seed),
          options_(small_options(seed)) {}

    void run() {
        SCOPED_TRACE(fmt::format("reproduce with STELLARIUM_TEST_SEED={}", seed_));
        ASSERT_OK(Store::create(machine_.env(), kDirectory, options_));
        watch();
        open();
        const uint64_t steps = 20 + random_.below(30);
        for (uint64_t step = 0; step < steps && !::testing::Test::HasFailure(); ++step) {
            do_step();
        }
        machine_.files().set_observer({});
    }

  private:
    void watch() {
        machine_.files().set_observer([this](io::OperationKind kind, std::string_view path) {
            if (may_change_disk(kind) && !::testing::Test::HasFailure()) {
                crash_here(kind, path);
            }
        });
    }

    void crash_here(io::OperationKind kind, std::string_view path) {
        const uint64_t crash_seed = random_.next();
        SCOPED_TRACE(fmt::format("crash point {} before operation {} on {}", crash_points_,
                                 static_cast<int>(kind), path));
        ++crash_points_;
        const bool go_on = random_.one_in(3);
        if (random_.one_in(5)) {
            check_machine(machine_.files().fork(), options_, model_, deaths_so_far(), crash_seed,
                          go_on);
        } else {
            check_machine(machine_.files().crashed_copy(crash_seed), options_, model_,
                          Death::kPower, crash_seed, go_on);
        }
    }

    /// Before the store is open again after a loss of power, or when a sync has failed, the death
    /// of the process cannot keep what is lost already.
    Death deaths_so_far() const {
        return lost_power_ || sync_failed_ ? Death::kPower : Death::kProcess;
    }

    /// Opens what is there and makes it the model's state.
    void open() {
        auto opened = Store::open(machine_.env(), kDirectory, options_);
        ASSERT_OK(opened);
        store_ = std::move(*opened);
        base_ = payload_records(*store_);
        RecordedReplay replay;
        ASSERT_OK(store_->replay(replay));
        const size_t total = check_state(*store_, replay, base_, model_, deaths_so_far());
        if (::testing::Test::HasFailure()) {
            return;
        }
        std::set<uint64_t> contested;
        for (const FailedAppend& failed : model_.failed) {
            contested.insert(failed.sequence);
        }
        model_ = model_.as_found(replay, base_);
        model_.failed.clear();
        for (ModelRecord& record : model_.in_flight) {
            model_.records.push_back(std::move(record));
        }
        model_.in_flight.clear();
        model_.records.resize(std::min(total, model_.records.size()));
        std::erase_if(model_.appends, [&](const ModelAppend& append) {
            // One without records may have lost against a failed one without records.
            return append.sequence > store_->sequence() ||
                   (contested.contains(append.sequence) && append.sequence > model_.durable &&
                    !holds(*store_, append.references));
        });
        model_.checkpoint = base_;
        model_.checkpoint_in_flight.reset();
        model_.durable = store_->sequence();
        lost_power_ = false;
        sync_failed_ = false;
    }

    void do_step() {
        if (random_.one_in(12)) {
            inject_fault();
        }
        const uint64_t what = random_.below(100);
        if (what < 55) {
            append();
        } else if (what < 75) {
            sync();
        } else if (what < 87) {
            checkpoint();
        } else {
            machine_.files().clear_faults();
            reopen(what);
        }
        if (store_ != nullptr && store_->read_only_reason()) {
            // A failed sync has poisoned it.
            EXPECT_TRUE(sync_failed_) << store_->read_only_reason().value_or("");
            machine_.files().clear_faults();
            reopen(99);
        }
    }

    void inject_fault() {
        io::Fault fault;
        fault.nth = 1 + random_.below(4);
        switch (random_.below(6)) {
            case 0:
                fault.kind = io::OperationKind::kWrite;
                fault.errno_value = ENOSPC;
                break;
            case 4:
                // Half is written, and then no more.
                fault.kind = io::OperationKind::kWrite;
                fault.short_transfer = true;
                machine_.files().inject(fault);
                fault.short_transfer = false;
                fault.errno_value = random_.one_in(2) ? ENOSPC : EIO;
                ++fault.nth;
                if (random_.one_in(2)) {
                    machine_.files().inject(fault);
                    fault = io::Fault();
                    fault.kind = io::OperationKind::kTruncate;
                    fault.for_ever = random_.one_in(2);
                }
                break;
            case 5:
                fault.kind = io::OperationKind::kTruncate;
                fault.for_ever = random_.one_in(4);
                break;
            case 1:
                fault.kind = io::OperationKind::kWrite;
                fault.short_transfer = true;
                break;
            case 2:
                fault.kind = io::OperationKind::kDatasync;
                fault.lose_unsynced = random_.one_in(2);
                break;
            default:
                fault.kind = io::OperationKind::kWrite;
                fault.errno_value = EINTR;
                break;
        }
        machine_.files().inject(fault);
    }

    void append() {
        WriteBatch batch;
        References references;
        const uint64_t chunks = random_.one_in(10) ? 30 : random_.below(6);
        for (uint64_t i = 0; i < chunks; ++i) {
            references.chunks.push_back(static_cast<uint32_t>(random_.below(kChunkKinds)));
            const Blob& chunk = universe().chunks[references.chunks.back()];
            batch.add_chunk(chunk.id, chunk.bytes);
        }
        const uint64_t objects = random_.one_in(10) ? 20 : random_.below(4);
        for (uint64_t i = 0; i < objects; ++i) {
            references.objects.push_back(static_cast<uint32_t>(random_.below(kObjectKinds)));
            const Blob& object = universe().objects[references.objects.back()];
            batch.add_object(object.id, object.bytes, universe().hints[references.objects.back()]);
        }
        // Records may refer to all that was stored before, durable or not.
        const uint64_t records = random_.below(3);
        for (uint64_t i = 0; i < records; ++i) {
            References of_record = references;
            if (!model_.appends.empty()) {
                const References& other =
                    model_.appends[random_.below(model_.appends.size())].references;
                of_record.chunks.insert(of_record.chunks.end(), other.chunks.begin(),
                                        other.chunks.end());
            }
            const ByteVector payload = encode_record(model_.records.size() + i, of_record);
            batch.add_record(kRecordKind, payload);
            model_.in_flight.push_back(
                {.sequence = 0, .payload = text_of(payload), .references = std::move(of_record)});
        }
        const auto appended = store_->append(batch);
        if (!appended) {
            EXPECT_TRUE(appended.error().code() == ErrorCode::kNoSpace ||
                        appended.error().code() == ErrorCode::kReadOnly ||
                        appended.error().code() == ErrorCode::kIo)
                << appended.error().message();
            model_.failed.push_back({.sequence = store_->sequence() + 1,
                                     .records_before = model_.records.size(),
                                     .records = std::exchange(model_.in_flight, {})});
            for (ModelRecord& record : model_.failed.back().records) {
                record.sequence = model_.failed.back().sequence;
            }
            return;
        }
        for (ModelRecord& record : model_.in_flight) {
            record.sequence = appended->sequence;
            model_.records.push_back(std::move(record));
        }
        model_.in_flight.clear();
        model_.appends.push_back({.sequence = appended->sequence,
                                  .references = std::move(references),
                                  .records_after = model_.records.size()});
        for (size_t i = 0; i < appended->locations.size(); ++i) {
            EXPECT_TRUE(appended->locations[i].address);
        }
    }

    void sync() {
        // Sometimes less than everything.
        uint64_t sequence = store_->sequence();
        if (random_.one_in(3) && !model_.appends.empty()) {
            sequence = model_.appends[random_.below(model_.appends.size())].sequence;
        }
        note_sync(store_->sync(sequence), sequence);
    }

    void note_sync(const Result<void>& synced, uint64_t sequence) {
        if (synced) {
            model_.durable = std::max(model_.durable, sequence);
        } else if (synced.error().code() != ErrorCode::kNoSpace) {
            sync_failed_ = true;
        }
    }

    void checkpoint() {
        uint64_t sequence = store_->sequence();
        if (random_.one_in(2) && !model_.appends.empty()) {
            sequence = model_.appends[random_.below(model_.appends.size())].sequence;
        }
        if (sequence < model_.checkpoint_sequence) {
            return;
        }
        const size_t records = model_.records_through(sequence);
        model_.checkpoint_in_flight = records;
        const uint64_t all = store_->sequence();
        const auto done = store_->checkpoint(sequence, encode_payload(records));
        note_sync(done, all);
        if (done) {
            model_.checkpoint = records;
            model_.checkpoint_sequence = sequence;
            model_.checkpoint_in_flight.reset();
        }
    }

    void reopen(uint64_t what) {
        if (what < 90) {
            const uint64_t all = store_->sequence();
            note_sync(store_->close(), all);
            store_.reset();
        } else if (what < 95) {
            machine_.kill_process();
            store_.reset();
        } else {
            machine_.crash(random_.next());
            lost_power_ = true;
            store_.reset();
        }
        watch();
        open();
    }

    const uint64_t seed_;
    Sequence random_;
    uint64_t& crash_points_;
    io::SimulatedMachine machine_;
    const StoreOptions options_;
    std::unique_ptr<Store> store_;
    Model model_;
    size_t base_ = 0;
    bool lost_power_ = false;
    bool sync_failed_ = false;
};

TEST(StoreCrash, RandomProgramsCrashAnywhere) {
    const uint64_t first = first_seed();
    uint64_t crash_points = 0;
    uint64_t seed = first;
    for (; crash_points < wanted_crash_points() && !HasFailure(); ++seed) {
        Program(seed, crash_points).run();
    }
    fmt::print("count crash_points {} in {} programs\n", crash_points, seed - first);
}

}  // namespace
}  // namespace stellarium::nebula
