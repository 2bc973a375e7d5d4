// The store on damaged, truncated, foreign and newer files: never a crash, never wrong data, never
// a silent end of the log; errors name file, offset and reason.
#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "io/simulated.h"
#include "nebula/dump.h"
#include "nebula/format.h"
#include "nebula/store.h"
#include "nebula/test_support.h"

namespace stellarium::nebula {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

constexpr const char* kSuperblock = "/pool/superblock";

std::string segment_path(uint32_t number) {
    return fmt::format("/pool/segments/{:07}.seg", number);
}

/// A store with a known content in several small segments, closed, on a machine that is copied for
/// each damage.
class Sample {
  public:
    static constexpr uint64_t kBatches = 36;

    /// With `closed` false the process died, after everything was synced.
    explicit Sample(uint64_t checkpoint_at, uint64_t batches = kBatches, bool closed = true)
        : machine_(1) {
        auto opened = open_store(machine_.env(), "/pool", options());
        EXPECT_OK(opened);
        Store& store = *opened->store;
        for (uint64_t i = 0; i < batches; ++i) {
            WriteBatch batch;
            chunks_.push_back(make_chunk(10 + i, static_cast<uint32_t>(1 + i % 5)));
            objects_.push_back(make_blob(500 + i, 40 + 30 * i));
            batch.add_chunk(chunks_.back().id, chunks_.back().bytes);
            batch.add_object(objects_.back().id, objects_.back().bytes);
            batch.add_record(1, bytes_of(U32Le(static_cast<uint32_t>(i))));
            const auto appended = store.append(batch);
            EXPECT_OK(appended);
            EXPECT_OK(store.sync(appended->sequence));
            places_.push_back(appended->locations[0].address);
            if (i + 1 == checkpoint_at) {
                EXPECT_OK(store.checkpoint(appended->sequence, bytes_of(std::string_view("cp"))));
            }
        }
        if (closed) {
            EXPECT_OK(store.close());
        }
    }

    static StoreOptions options() {
        return {.segment_bytes = kMinSegmentBytes, .index_rewrite_factor = 0};
    }
    /// The same store on a machine of its own.
    std::unique_ptr<io::SimulatedMachine> copy() const {
        return std::make_unique<io::SimulatedMachine>(machine_.files().fork(), 2);
    }
    io::SimulatedMachine& machine() { return machine_; }
    const std::vector<Blob>& chunks() const { return chunks_; }
    const std::vector<Blob>& objects() const { return objects_; }
    PageAddress place(size_t chunk) const { return places_[chunk]; }
    uint32_t last_segment() const { return places_.back().segment(); }

    /// Everything that can be read is right; returns how many chunks and objects could not.
    size_t unreadable(Store& store) const {
        size_t count = 0;
        for (const Blob& chunk : chunks_) {
            const auto read = read_chunk(store, chunk.id);
            EXPECT_TRUE(!read || *read == chunk.bytes) << "wrong data";
            count += read ? 0 : 1;
        }
        for (const Blob& object : objects_) {
            const auto read = store.get_object(object.id);
            EXPECT_TRUE(!read || read->content == object.bytes) << "wrong data";
            count += read ? 0 : 1;
        }
        return count;
    }

  private:
    mutable io::SimulatedMachine machine_;
    std::vector<Blob> chunks_;
    std::vector<Blob> objects_;
    std::vector<PageAddress> places_;
};

ByteVector read_file(io::SimulatedMachine& machine, const std::string& path) {
    const auto file = machine.files().open(path, io::OpenMode::kReadOnly);
    EXPECT_OK(file);
    ByteVector bytes((*file)->size_bytes().value_or(0));
    EXPECT_OK(io::read_exact(**file, bytes, 0));
    return bytes;
}

void write_file(io::SimulatedMachine& machine, const std::string& path, Bytes bytes) {
    const auto file = machine.files().open(path, io::OpenMode::kCreate);
    EXPECT_OK(file);
    EXPECT_OK((*file)->truncate(0));
    EXPECT_OK(io::write_all(**file, bytes, 0));
}

void flip(io::SimulatedMachine& machine, const std::string& path, uint64_t offset) {
    const auto file = machine.files().open(path, io::OpenMode::kReadWrite);
    EXPECT_OK(file);
    std::byte byte{};
    EXPECT_OK(io::read_exact(**file, MutableBytes(&byte, 1), offset));
    byte ^= std::byte{0x20};
    EXPECT_OK(io::write_all(**file, Bytes(&byte, 1), offset));
}

uint64_t file_size(io::SimulatedMachine& machine, const std::string& path) {
    const auto file = machine.files().open(path, io::OpenMode::kReadOnly);
    EXPECT_OK(file);
    return (*file)->size_bytes().value_or(0);
}

void truncate(io::SimulatedMachine& machine, const std::string& path, uint64_t size) {
    const auto file = machine.files().open(path, io::OpenMode::kReadWrite);
    EXPECT_OK(file);
    EXPECT_OK((*file)->truncate(size));
}

/// Changes every slot of the superblock and seals it again.
void rewrite_superblock(io::SimulatedMachine& machine,
                        const std::function<void(SuperblockSlot&)>& change) {
    ByteVector bytes = read_file(machine, kSuperblock);
    for (size_t i = 0; i < kSuperblockSlots; ++i) {
        auto slot = load<SuperblockSlot>(Bytes(bytes).subspan(i * kPageBytes));
        change(slot);
        slot.checksum = checksum64(bytes_of(slot).subspan(16));
        std::ranges::copy(bytes_of(slot),
                          bytes.begin() + static_cast<std::ptrdiff_t>(i * kPageBytes));
    }
    write_file(machine, kSuperblock, bytes);
}

bool mentions(const std::string& text, std::string_view part) {
    return text.find(part) != std::string::npos;
}

bool any_mentions(const std::vector<std::string>& texts, std::string_view part) {
    return std::ranges::any_of(texts, [&](const auto& text) { return mentions(text, part); });
}

// ---- Superblock -------------------------------------------------------------------------------

TEST(DamagedSuperblock, OneGoodCopyIsEnough) {
    const Sample sample(8);
    for (size_t slot = 0; slot < kSuperblockSlots; ++slot) {
        const auto machine = sample.copy();
        flip(*machine, kSuperblock, slot * kPageBytes + 72);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
        EXPECT_FALSE(opened->store->read_only_reason());
        ASSERT_EQ(opened->store->warnings().size(), 1U);
        EXPECT_TRUE(mentions(opened->store->warnings()[0],
                             fmt::format("{} at offset {}", kSuperblock, slot * kPageBytes)));
    }
}

TEST(DamagedSuperblock, AnOlderPairMeansALongerReplay) {
    const Sample sample(8, Sample::kBatches, /*closed=*/false);
    const auto machine = sample.copy();
    // Creation wrote generations 0 and 1; the checkpoint is generation 2, in slots 0 and 1.
    machine->files().damage(kSuperblock, 0, 2 * kPageBytes, 1);
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    EXPECT_EQ(opened->replay.records.size(), Sample::kBatches);
    EXPECT_EQ(sample.unreadable(*opened->store), 0U);
}

TEST(DamagedSuperblock, NoGoodCopyIsRefusedWithFileAndOffset) {
    const Sample sample(8);
    const std::vector<std::function<void(io::SimulatedMachine&)>> damages{
        [](auto& machine) { machine.files().damage(kSuperblock, 0, kSuperblockBytes, 3); },
        [](auto& machine) { truncate(machine, kSuperblock, 0); },
        [](auto& machine) { truncate(machine, kSuperblock, 100); },
        [](auto& machine) { write_file(machine, kSuperblock, ByteVector(kSuperblockBytes)); },
        [](auto& machine) {
            write_file(machine, kSuperblock, bytes_of(std::string_view("MZ something else")));
        },
    };
    for (const auto& damage : damages) {
        const auto machine = sample.copy();
        damage(*machine);
        const auto opened = Store::open(machine->env(), "/pool", {});
        ASSERT_FALSE(opened);
        EXPECT_EQ(opened.error().code(), ErrorCode::kCorrupt);
        EXPECT_TRUE(mentions(opened.error().message(), kSuperblock)) << opened.error().message();
        EXPECT_TRUE(mentions(opened.error().message(), "offset 0")) << opened.error().message();
    }
}

TEST(NewerSuperblock, IsRefusedOrReadOnlyByItsWords) {
    const Sample sample(8);
    const auto refused = [&](const std::function<void(SuperblockSlot&)>& change) {
        const auto machine = sample.copy();
        rewrite_superblock(*machine, change);
        const auto opened = Store::open(machine->env(), "/pool", {});
        EXPECT_FALSE(opened);
        return opened ? Error(ErrorCode::kIo, "") : opened.error();
    };
    for (const Error& error :
         {refused([](auto& slot) { slot.read_version = 2; }),
          refused([](auto& slot) { slot.features_refuse = 2; }),
          // A newer format may have changed everything behind the feature words.
          refused([](auto& slot) {
              slot.read_version = 9;
              slot.payload_bytes = 0xFFFFFFFF;
          })}) {
        EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
        EXPECT_TRUE(mentions(error.message(), kSuperblock)) << error.message();
        EXPECT_TRUE(mentions(error.message(), "newer program")) << error.message();
    }
    EXPECT_EQ(refused([](auto& slot) { slot.page_bytes = 16384; }).code(), ErrorCode::kUnsupported);

    for (const auto& change : std::vector<std::function<void(SuperblockSlot&)>>{
             [](auto& slot) { slot.write_version = 2; },
             [](auto& slot) { slot.features_read_only = 2; }}) {
        const auto machine = sample.copy();
        rewrite_superblock(*machine, change);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_TRUE(mentions(opened->store->read_only_reason().value_or(""), kSuperblock));
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
    }
    const auto machine = sample.copy();
    rewrite_superblock(*machine, [](auto& slot) { slot.features_ignore = ~uint64_t{0}; });
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    EXPECT_FALSE(opened->store->read_only_reason());
}

// ---- The log ----------------------------------------------------------------------------------

TEST(DamagedLog, AnyFlippedByteIsHarmlessOrReported) {
    // With the whole log after the checkpoint, and with most of it before.
    const uint64_t step = under_sanitizer() ? 20'011 : 1531;
    for (const uint64_t checkpoint_at : {uint64_t{0}, uint64_t{20}}) {
        Sample sample(checkpoint_at);
        for (uint32_t number = 1; number <= sample.last_segment(); ++number) {
            const uint64_t size = file_size(sample.machine(), segment_path(number));
            for (uint64_t offset = 5; offset < size; offset += step) {
                SCOPED_TRACE(fmt::format("segment {} offset {}", number, offset));
                const auto machine = sample.copy();
                flip(*machine, segment_path(number), offset);
                const auto opened = open_store(machine->env(), "/pool", Sample::options());
                ASSERT_OK(opened);
                Store& store = *opened->store;
                const size_t unreadable = sample.unreadable(store);
                const size_t expected =
                    checkpoint_at == 0 ? Sample::kBatches : Sample::kBatches - checkpoint_at;
                const bool tail_was_cut = opened->replay.records.size() < expected;
                // The store was closed, so that all of it is known to have been durable. What lies
                // before the checkpoint is looked at when it is read.
                if (unreadable > 0) {
                    EXPECT_TRUE(store.read_only_reason() || !store.warnings().empty() ||
                                (checkpoint_at != 0 && unreadable <= 2));
                }
                if (tail_was_cut) {
                    EXPECT_TRUE(store.read_only_reason()) << "a silent end of the log";
                }
                if (store.read_only_reason()) {
                    EXPECT_TRUE(mentions(*store.read_only_reason(), ".seg at offset"))
                        << *store.read_only_reason();
                }
                if (HasFailure()) {
                    return;
                }
            }
        }
    }
}

TEST(DamagedLog, AnyTruncationIsHarmlessOrReported) {
    const uint64_t step = kPageBytes * (under_sanitizer() ? 8 : 1) + 300;
    for (const uint64_t checkpoint_at : {uint64_t{0}, uint64_t{20}}) {
        Sample sample(checkpoint_at);
        for (uint32_t number = 1; number <= sample.last_segment(); ++number) {
            const uint64_t size = file_size(sample.machine(), segment_path(number));
            for (uint64_t end = 0; end < size; end += step) {
                SCOPED_TRACE(fmt::format("segment {} ends at {}", number, end));
                const auto machine = sample.copy();
                truncate(*machine, segment_path(number), end);
                const auto opened = open_store(machine->env(), "/pool", Sample::options());
                ASSERT_OK(opened);
                Store& store = *opened->store;
                const size_t unreadable = sample.unreadable(store);
                if (unreadable > 0 && number != sample.last_segment()) {
                    EXPECT_TRUE(store.read_only_reason() || !store.warnings().empty());
                }
                if (HasFailure()) {
                    return;
                }
            }
        }
    }
}

TEST(DamagedLog, AMissingSegmentIsReported) {
    const Sample sample(0);
    const auto machine = sample.copy();
    ASSERT_OK(machine->files().remove(segment_path(2)));
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    EXPECT_TRUE(opened->store->read_only_reason());
    EXPECT_LT(opened->replay.records.size(), Sample::kBatches);
    EXPECT_GT(sample.unreadable(*opened->store), 0U);
}

TEST(DamagedLog, RotInTheMiddleOpensReadOnlyAndServesTheRest) {
    const Sample sample(0);
    const auto machine = sample.copy();
    const uint64_t offset = sample.place(5).offset_bytes() + 77;
    const std::string path = segment_path(sample.place(5).segment());
    flip(*machine, path, offset);
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    Store& store = *opened->store;
    ASSERT_TRUE(store.read_only_reason());
    EXPECT_TRUE(mentions(*store.read_only_reason(), path)) << *store.read_only_reason();
    EXPECT_TRUE(mentions(*store.read_only_reason(), sample.chunks()[5].id.hex()));
    EXPECT_EQ(opened->replay.records.size(), Sample::kBatches) << "no record was damaged";
    EXPECT_EQ(sample.unreadable(store), 1U);
    const auto damaged = read_chunk(store, sample.chunks()[5].id);
    ASSERT_FALSE(damaged);
    EXPECT_EQ(damaged.error().code(), ErrorCode::kCorrupt);
    EXPECT_TRUE(mentions(damaged.error().message(), path));
    EXPECT_TRUE(mentions(damaged.error().message(),
                         fmt::format("offset {}", sample.place(5).offset_bytes())));
    EXPECT_TRUE(mentions(damaged.error().message(), sample.chunks()[5].id.hex()));
    const Blob more = make_chunk(1, 1);
    WriteBatch batch;
    batch.add_chunk(more.id, more.bytes);
    EXPECT_EQ(store.append(batch).error().code(), ErrorCode::kReadOnly);
    // Nothing was cut off: looking again shows the same.
    ASSERT_OK(store.close());
    const auto again = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(again);
    EXPECT_EQ(again->replay.records.size(), Sample::kBatches);
}

TEST(DamagedLog, ARottenHeaderInTheMiddleStopsTheReplayThere) {
    const Sample sample(0);
    const auto machine = sample.copy();
    // Batch i has one header page right before its chunk.
    const PageAddress chunk = sample.place(9);
    flip(*machine, segment_path(chunk.segment()), chunk.offset_bytes() - kPageBytes + 60);
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    EXPECT_EQ(opened->replay.records.size(), 9U);
    ASSERT_TRUE(opened->store->read_only_reason());
    EXPECT_TRUE(mentions(*opened->store->read_only_reason(), "batch header"));
    EXPECT_TRUE(mentions(*opened->store->read_only_reason(), "proves"));
}

TEST(DamagedLog, RotInTheLastBatchAfterACleanStopIsNoTornEnd) {
    Sample sample(0);
    const PageAddress last = sample.place(Sample::kBatches - 1);
    const std::string path = segment_path(last.segment());
    const uint64_t size = file_size(sample.machine(), path);
    // Its data, and its header.
    for (const uint64_t offset : {last.offset_bytes(), last.offset_bytes() - kPageBytes}) {
        const auto machine = sample.copy();
        flip(*machine, path, offset);
        for (int opens = 0; opens < 2; ++opens) {
            const auto opened = open_store(machine->env(), "/pool", Sample::options());
            ASSERT_OK(opened);
            ASSERT_TRUE(opened->store->read_only_reason());
            EXPECT_TRUE(mentions(*opened->store->read_only_reason(), "superblock"))
                << *opened->store->read_only_reason();
            EXPECT_EQ(file_size(*machine, path), size) << "nothing is cut off";
        }
    }
}

TEST(DamagedLog, ATornEndIsCutOffForGood) {
    Sample sample(0, Sample::kBatches, /*closed=*/false);
    const uint32_t segment = sample.last_segment();
    const PageAddress last = sample.place(Sample::kBatches - 1);
    const auto machine = sample.copy();
    flip(*machine, segment_path(segment), last.offset_bytes());
    uint64_t sequence = 0;
    {
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        Store& store = *opened->store;
        EXPECT_FALSE(store.read_only_reason());
        EXPECT_EQ(opened->replay.records.size(), Sample::kBatches - 1);
        EXPECT_TRUE(any_mentions(store.warnings(), "never acknowledged"));
        EXPECT_EQ(file_size(*machine, segment_path(segment)), last.offset_bytes() - kPageBytes);
        WriteBatch batch;
        batch.add_record(9, {});
        const auto appended = store.append(batch);
        ASSERT_OK(appended);
        sequence = appended->sequence;
        EXPECT_EQ(sequence, Sample::kBatches + 1) << "a number that was seen is not used again";
        ASSERT_OK(store.close());
    }
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    ASSERT_EQ(opened->replay.records.size(), Sample::kBatches);
    EXPECT_EQ(opened->replay.records.back().sequence, sequence);
    EXPECT_TRUE(opened->store->warnings().empty());
}

TEST(DamagedLog, BytesBehindTheEndAreIgnored) {
    Sample sample(0);
    const std::string path = segment_path(sample.last_segment());
    const ByteVector log = read_file(sample.machine(), path);
    // Among them a copy of a batch, which names another place.
    for (const ByteVector& tail :
         {ByteVector(kPageBytes), make_bytes(7, 3 * kPageBytes), make_bytes(8, 100),
          ByteVector(log.begin() + kPageBytes, log.begin() + 5 * kPageBytes)}) {
        const auto machine = sample.copy();
        ByteVector bytes = log;
        bytes.insert(bytes.end(), tail.begin(), tail.end());
        write_file(*machine, path, bytes);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_FALSE(opened->store->read_only_reason());
        EXPECT_EQ(opened->replay.records.size(), Sample::kBatches);
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
        EXPECT_EQ(file_size(*machine, path), log.size());
    }
}

TEST(DamagedLog, AForeignSegmentIsNotTakenForOurs) {
    const Sample sample(0);
    io::SimulatedMachine other(77);
    auto foreign = open_store(other.env(), "/pool", Sample::options());
    ASSERT_OK(foreign);
    const Blob chunk = make_chunk(4321, 3);
    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    batch.add_record(1, {});
    ASSERT_OK(foreign->store->append(batch));
    const ByteVector bytes = read_file(other, segment_path(1));
    {
        // In place of one of ours: ours is missing.
        const auto machine = sample.copy();
        write_file(*machine, segment_path(2), bytes);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        ASSERT_TRUE(opened->store->read_only_reason());
        EXPECT_FALSE(read_chunk(*opened->store, chunk.id));
    }
    {
        // Behind ours: it never belonged to the log.
        const auto machine = sample.copy();
        write_file(*machine, segment_path(90), bytes);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_EQ(opened->replay.records.size(), Sample::kBatches);
        EXPECT_FALSE(read_chunk(*opened->store, chunk.id));
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
    }
}

TEST(DamagedLog, ASegmentHeaderIsWrittenAnew) {
    Sample sample(0);
    const auto machine = sample.copy();
    const ByteVector before = read_file(*machine, segment_path(2));
    machine->files().damage(segment_path(2), 0, kPageBytes, 1);
    for (const bool repaired : {false, true}) {
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_FALSE(opened->store->read_only_reason());
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
        EXPECT_EQ(any_mentions(opened->store->warnings(), segment_path(2)), !repaired);
    }
    EXPECT_EQ(read_file(*machine, segment_path(2)), before);
}

TEST(NewerSegment, IsRefused) {
    const Sample sample(0);
    const auto machine = sample.copy();
    ByteVector bytes = read_file(*machine, segment_path(1));
    ASSERT_FALSE(bytes.empty());
    auto header = load<SegmentHeader>(bytes);
    header.read_version = 2;
    header.checksum = checksum64(bytes_of(header).subspan(16));
    std::ranges::copy(bytes_of(header), bytes.begin());
    write_file(*machine, segment_path(1), bytes);
    const auto opened = Store::open(machine->env(), "/pool", Sample::options());
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code(), ErrorCode::kUnsupported);
    EXPECT_TRUE(mentions(opened.error().message(), segment_path(1))) << opened.error().message();
}

TEST(DamagedLog, AnUnreadableLogIsNotCutOff) {
    // The medium fails to read: that says nothing about what was written.
    const Sample sample(0);
    const auto machine = sample.copy();
    io::Fault fault;
    fault.kind = io::OperationKind::kRead;
    fault.path_part = "0000002.seg";
    fault.for_ever = true;
    machine->files().inject(fault);
    const auto opened = Store::open(machine->env(), "/pool", Sample::options());
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code(), ErrorCode::kIo);
    machine->files().clear_faults();
    const auto again = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(again);
    EXPECT_EQ(again->replay.records.size(), Sample::kBatches);
}

// ---- Data that is read ------------------------------------------------------------------------

TEST(DamagedData, IsFoundAtTheFirstReadAndWithVerifyAlwaysAtAny) {
    const Sample sample(Sample::kBatches);
    const auto machine = sample.copy();
    StoreOptions options = Sample::options();
    options.verify_always = true;
    const auto opened = open_store(machine->env(), "/pool", options);
    ASSERT_OK(opened);
    Store& store = *opened->store;
    EXPECT_EQ(sample.unreadable(store), 0U);
    const PageAddress place = sample.place(3);
    flip(*machine, segment_path(place.segment()), place.offset_bytes() + 1);
    EXPECT_EQ(read_chunk(store, sample.chunks()[3].id).error().code(), ErrorCode::kCorrupt);
    EXPECT_EQ(sample.unreadable(store), 1U);
}

TEST(DamagedData, LostByAFailedSyncIsNotServedAsZeros) {
    io::SimulatedMachine machine(1);
    const auto opened = open_store(machine.env(), "/pool");
    ASSERT_OK(opened);
    Store& store = *opened->store;
    const Blob chunk = make_chunk(1, 4);
    WriteBatch batch;
    batch.add_chunk(chunk.id, chunk.bytes);
    const auto appended = store.append(batch);
    ASSERT_OK(appended);
    ASSERT_OK(read_chunk(store, chunk.id));
    io::Fault fault;
    fault.kind = io::OperationKind::kDatasync;
    fault.lose_unsynced = true;
    machine.files().inject(fault);
    EXPECT_FALSE(store.sync(appended->sequence));
    const auto read = read_chunk(store, chunk.id);
    ASSERT_FALSE(read) << "bytes that the file does not hold any more were served";
    EXPECT_EQ(read.error().code(), ErrorCode::kCorrupt);
}

TEST(DamagedData, BehindARottenHeaderBeforeTheCheckpointIsCorrupt) {
    const Sample sample(Sample::kBatches);
    const auto machine = sample.copy();
    const PageAddress place = sample.place(Sample::kBatches - 1);
    // The batch's header is the page before its first chunk.
    flip(*machine, segment_path(place.segment()), place.offset_bytes() - 4096);
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    ASSERT_TRUE(opened->store->read_only_reason());
    ByteVector page(4096);
    const iovec into{page.data(), page.size()};
    const auto read = opened->store->read(place, std::span(&into, 1), IoMode::kMayBlock);
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().code(), ErrorCode::kCorrupt) << read.error().message();
    EXPECT_EQ(read_chunk(*opened->store, sample.chunks().back().id).error().code(),
              ErrorCode::kCorrupt);
}

TEST(DamagedData, OfAPackCostsOneObject) {
    io::SimulatedMachine machine(1);
    std::vector<Blob> objects;
    const ByteVector hints = make_bytes(77, 30);
    PageAddress place;
    {
        auto opened = open_store(machine.env(), "/pool");
        ASSERT_OK(opened);
        WriteBatch batch;
        for (uint64_t i = 0; i < 3; ++i) {
            objects.push_back(make_blob(i, 500));
        }
        for (const Blob& object : objects) {
            batch.add_object(object.id, object.bytes, hints);
        }
        ASSERT_OK(opened->store->append(batch));
        ASSERT_OK(opened->store->checkpoint(1, {}));
        place = opened->store->object_address(objects[0].id).value_or(PageAddress());
        ASSERT_OK(opened->store->close());
    }
    const uint64_t first_member = sizeof(PackHeader) + 3 * sizeof(PackEntry);
    const uint64_t stride = sizeof(PackMember) + 500 + hints.size();
    const uint64_t second = place.offset_bytes() + first_member + stride;
    flip(machine, segment_path(1), second + sizeof(PackMember) + 10);
    // The hints of the third.
    flip(machine, segment_path(1), second + stride + sizeof(PackMember) + 500 + 2);
    const auto opened = open_store(machine.env(), "/pool");
    ASSERT_OK(opened);
    const auto first = opened->store->get_object(objects[0].id);
    ASSERT_OK(first);
    EXPECT_EQ(first->aux, hints);
    const auto damaged = opened->store->get_object(objects[1].id);
    ASSERT_FALSE(damaged);
    EXPECT_EQ(damaged.error().code(), ErrorCode::kCorrupt);
    EXPECT_TRUE(mentions(damaged.error().message(), objects[1].id.hex()));
    const auto third = opened->store->get_object(objects[2].id);
    ASSERT_OK(third);
    EXPECT_EQ(third->content, objects[2].bytes);
    EXPECT_TRUE(third->aux.empty()) << "damaged hints are no hints";
}

TEST(DamagedData, OfAPacksHeaderIsNoProofThatItsMembersWereNeverStored) {
    // Known from the batches alone: of a segment whose footer is damaged too, and of the last one,
    // which has none.
    for (const bool last_segment : {false, true}) {
        SCOPED_TRACE(last_segment);
        io::SimulatedMachine machine(1);
        const StoreOptions options{.segment_bytes = kMinSegmentBytes};
        const Blob object = make_blob(1, 500);
        PageAddress place;
        {
            auto opened = open_store(machine.env(), "/pool", options);
            ASSERT_OK(opened);
            Store& store = *opened->store;
            WriteBatch batch;
            batch.add_object(object.id, object.bytes);
            ASSERT_OK(store.append(batch));
            place = store.object_address(object.id).value_or(PageAddress());
            for (uint64_t i = 0; !last_segment && store.stats().segments < 2; ++i) {
                WriteBatch more;
                const Blob chunk = make_chunk(10 + i, kMaxChunkPages);
                more.add_chunk(chunk.id, chunk.bytes);
                ASSERT_OK(store.append(more));
            }
            ASSERT_OK(store.checkpoint(store.sequence(), {}));
            ASSERT_OK(store.close());
        }
        flip(machine, segment_path(1), place.offset_bytes() + 1);
        if (!last_segment) {
            flip(machine, segment_path(1), file_size(machine, segment_path(1)) - 10);
        }
        const auto opened = open_store(machine.env(), "/pool", options);
        ASSERT_OK(opened);
        const auto damaged = opened->store->get_object(object.id);
        ASSERT_FALSE(damaged);
        EXPECT_EQ(damaged.error().code(), ErrorCode::kCorrupt) << damaged.error().message();
        EXPECT_TRUE(mentions(damaged.error().message(), segment_path(1)));
    }
}

// ---- What is derived --------------------------------------------------------------------------

TEST(DerivedData, AMissingOrDamagedIndexIsRebuilt) {
    Sample sample(Sample::kBatches);
    const std::string path = "/pool/index-1.ckpt";
    const uint64_t size = file_size(sample.machine(), path);
    std::vector<std::function<void(io::SimulatedMachine&)>> damages{
        [&](auto& machine) { EXPECT_OK(machine.files().remove(path)); },
        [&](auto& machine) { truncate(machine, path, 10); },
        [&](auto& machine) { write_file(machine, path, make_bytes(1, 9999)); },
    };
    // Everywhere: header, shard table, shards.
    for (uint64_t offset = 0; offset < size; offset += 9001) {
        damages.emplace_back([&, offset](auto& machine) {
            machine.files().damage(path, offset, std::min<uint64_t>(4000, size - offset), 1);
        });
    }
    for (const auto& damage : damages) {
        const auto machine = sample.copy();
        damage(*machine);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_FALSE(opened->store->read_only_reason());
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
        EXPECT_EQ(opened->store->stats().index_misses_recovered, 0U);
        WriteBatch batch;
        batch.add_chunk(sample.chunks()[0].id, sample.chunks()[0].bytes);
        const auto appended = opened->store->append(batch);
        ASSERT_OK(appended);
        EXPECT_EQ(appended->new_bytes, 0U) << "dedup must not suffer either";
        EXPECT_OK(opened->store->checkpoint(appended->sequence, {}));
    }
}

TEST(DerivedData, AnIndexThatMissesEntriesIsCompletedFromFooters) {
    const Sample sample(Sample::kBatches);
    const auto machine = sample.copy();
    // The superblock claims that the index has all; but it is the one of an empty store.
    io::SimulatedMachine other(1);
    auto empty = open_store(other.env(), "/pool", Sample::options());
    ASSERT_OK(empty);
    WriteBatch batch;
    batch.add_record(1, {});
    ASSERT_OK(empty->store->append(batch));
    ASSERT_OK(empty->store->checkpoint(1, {}));
    ASSERT_OK(empty->store->close());
    write_file(*machine, "/pool/index-1.ckpt", read_file(other, "/pool/index-1.ckpt"));
    rewrite_superblock(*machine, [](auto& slot) { slot.index_segment = 1000; });

    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    EXPECT_EQ(sample.unreadable(*opened->store), 0U);
    EXPECT_EQ(opened->store->stats().index_misses_recovered, 2 * Sample::kBatches);
    EXPECT_TRUE(any_mentions(opened->store->warnings(), "missing in the index"));
    EXPECT_EQ(opened->store->resolve(make_chunk(1, 1).id).error().code(), ErrorCode::kNotFound);
}

TEST(DerivedData, ADamagedFooterIsReadFromTheBatches) {
    Sample sample(Sample::kBatches);
    const uint64_t size = file_size(sample.machine(), segment_path(1));
    for (const uint64_t offset : {size - 10, size - 64, size - kPageBytes}) {
        const auto machine = sample.copy();
        flip(*machine, segment_path(1), offset);
        const auto opened = open_store(machine->env(), "/pool", Sample::options());
        ASSERT_OK(opened);
        EXPECT_EQ(sample.unreadable(*opened->store), 0U);
        EXPECT_EQ(opened->store->stats().index_misses_recovered, 0U);
        EXPECT_TRUE(any_mentions(opened->store->warnings(), segment_path(1)));
        EXPECT_TRUE(any_mentions(opened->store->warnings(), "footer"));
    }
}

// ---- Dump -------------------------------------------------------------------------------------

struct Dumped {
    std::string text;
    uint64_t damages = 0;
};

Dumped dump(io::SimulatedMachine& machine, const std::string& path) {
    Dumped out;
    const auto result = dump_file(
        machine.env(), path, [&](std::string_view line) { out.text += fmt::format("{}\n", line); },
        {.check_data = true, .format_record = [](uint16_t, Bytes payload) {
             return fmt::format("number {}", load<U32Le>(payload).get());
         }});
    EXPECT_OK(result);
    out.damages = result.value_or(0);
    return out;
}

TEST(Dump, SaysWhatTheFilesHold) {
    Sample sample(8);
    const Dumped superblock = dump(sample.machine(), kSuperblock);
    EXPECT_EQ(superblock.damages, 0U) << superblock.text;
    EXPECT_TRUE(mentions(superblock.text, "generation 2")) << superblock.text;
    EXPECT_TRUE(mentions(superblock.text, "checkpoint at batch 8")) << superblock.text;
    const Dumped segment = dump(sample.machine(), segment_path(1));
    EXPECT_EQ(segment.damages, 0U) << segment.text;
    EXPECT_TRUE(mentions(segment.text, sample.chunks()[0].id.hex())) << segment.text;
    EXPECT_TRUE(mentions(segment.text, sample.objects()[0].id.hex())) << segment.text;
    EXPECT_TRUE(mentions(segment.text, "number 0")) << segment.text;
    EXPECT_TRUE(mentions(segment.text, "footer with")) << segment.text;
    const Dumped index = dump(sample.machine(), "/pool/index-1.ckpt");
    EXPECT_EQ(index.damages, 0U) << index.text;
    EXPECT_TRUE(mentions(index.text, "16 entries")) << index.text;
    EXPECT_TRUE(mentions(dump(sample.machine(), "/pool/lock").text, "process"));

    write_file(sample.machine(), "/pool/readme", bytes_of(std::string_view("hello")));
    const auto other = dump_file(sample.machine().env(), "/pool/readme", [](std::string_view) {});
    ASSERT_FALSE(other);
    EXPECT_EQ(other.error().code(), ErrorCode::kUnsupported);
}

TEST(NewerSegment, IsReadAndNotWrittenByItsWords) {
    // The feature says that whoever does not know it must not write the segment.
    const Sample sample(8);
    const auto machine = sample.copy();
    const uint32_t last = sample.last_segment();
    {
        const auto file = machine->files().open(segment_path(last), io::OpenMode::kReadWrite);
        ASSERT_OK(file);
        ByteVector page(kPageBytes);
        ASSERT_OK(io::read_exact(**file, page, 0));
        auto header = load<SegmentHeader>(page);
        header.features_read_only = 1;
        header.checksum = checksum64(bytes_of(header).subspan(kSealBytes));
        ASSERT_OK(io::write_all(**file, bytes_of(header), 0));
    }
    const auto opened = open_store(machine->env(), "/pool", Sample::options());
    ASSERT_OK(opened);
    const std::string why = opened->store->read_only_reason().value_or("");
    EXPECT_NE(why.find(segment_path(last)), std::string::npos) << why;
    EXPECT_NE(why.find("feature bits"), std::string::npos) << why;
    EXPECT_EQ(sample.unreadable(*opened->store), 0U);
    WriteBatch batch;
    batch.add_record(1, {});
    EXPECT_EQ(opened->store->append(batch).error().code(), ErrorCode::kReadOnly);
}

TEST(Dump, GoesOnBehindDamage) {
    Sample sample(8);
    {
        const auto machine = sample.copy();
        flip(*machine, kSuperblock, 50);
        const Dumped text = dump(*machine, kSuperblock);
        EXPECT_EQ(text.damages, 1U);
        EXPECT_TRUE(mentions(text.text, "slot 3")) << text.text;
    }
    {
        // A rotten segment header, a rotten batch header, a rotten chunk.
        const auto machine = sample.copy();
        flip(*machine, segment_path(1), 70);
        flip(*machine, segment_path(1), sample.place(1).offset_bytes() - kPageBytes + 50);
        flip(*machine, segment_path(1), sample.place(2).offset_bytes() + 50);
        const Dumped text = dump(*machine, segment_path(1));
        EXPECT_GE(text.damages, 3U) << text.text;
        EXPECT_TRUE(mentions(text.text, sample.chunks()[0].id.hex())) << text.text;
        EXPECT_TRUE(mentions(text.text, sample.chunks()[2].id.hex() + " of")) << text.text;
        EXPECT_TRUE(mentions(text.text, sample.chunks()[3].id.hex())) << text.text;
    }
    for (const std::string& path :
         {std::string(kSuperblock), segment_path(1), std::string("/pool/index-1.ckpt")}) {
        const uint64_t size = file_size(sample.machine(), path);
        for (uint64_t end = 0; end < size; end += 1 + size / 13) {
            const auto machine = sample.copy();
            truncate(*machine, path, end);
            EXPECT_GT(dump(*machine, path).damages +
                          (path == segment_path(1) && end % kPageBytes == 0 ? 1 : 0),
                      0U)
                << path << " of " << end;
        }
        const auto machine = sample.copy();
        machine->files().damage(path, 0, size, 4);
        EXPECT_GT(dump(*machine, path).damages, 0U) << path;
    }
}

}  // namespace
}  // namespace stellarium::nebula
