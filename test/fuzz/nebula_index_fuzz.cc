// The index checkpoint: a real one with changes. Whatever opens answers, or says that a shard is
// damaged; after the damaged shards were emptied and filled again, every pair is there, and a
// checkpoint of that opens as the same.
//
// Input: how many pairs; flags (1: checksums are made right again, 2: every pair in one shard);
// then changes, each of place and bytes.
#include <array>
#include <set>

#include "io/simulated.h"
#include "nebula/index.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace nebula;  // NOLINT(google-build-using-namespace)

constexpr std::array<uint8_t, 16> kStore = {1, 2, 3};
constexpr size_t kHeaderBytes = sizeof(IndexCheckpointHeader);
constexpr size_t kTableBytes = kIndexShards * sizeof(IndexShardRow);

ChunkIndex::Entry pair(uint32_t number, bool one_shard) {
    ChunkIndex::Entry entry{.id = hash(bytes_of(U32Le(number))),
                            .address = PageAddress::make(1 + number / 100, 1 + number % 100)};
    if (one_shard) {
        // The top 12 bits of the prefix, which is read as a little-endian number.
        entry.id.bytes[7] = 0;
        entry.id.bytes[6] &= 0x0F;
    }
    return entry;
}

Input write(const ChunkIndex& index) {
    io::SimulatedMachine machine(1);
    const auto file = must(machine.files().open("/index", io::OpenMode::kCreateNew));
    must(index.write_checkpoint(*file, {.store_uuid = kStore, .sequence = 5}));
    Input bytes(must(file->size_bytes()));
    must(io::read_exact(*file, bytes, 0));
    return bytes;
}

Result<ChunkIndex::Opened> open(const Input& bytes) {
    io::SimulatedMachine machine(1);
    const auto file = must(machine.files().open("/index", io::OpenMode::kCreateNew));
    must(io::write_all(*file, bytes, 0));
    return ChunkIndex::open_checkpoint(*file, kStore);
}

template <typename Number>
void put(Input& bytes, size_t at, Number value) {
    std::memcpy(bytes.data() + at, &value, sizeof(value));
}

void fix_checksums(Input& bytes) {
    if (bytes.size() < kHeaderBytes + kTableBytes) {
        return;
    }
    for (uint32_t i = 0; i < kIndexShards; ++i) {
        const size_t at = kHeaderBytes + i * sizeof(IndexShardRow);
        const auto row = load<IndexShardRow>(Bytes(bytes).subspan(at));
        const uint64_t length =
            (uint64_t{row.buckets} * 64 + uint64_t{row.overflow_slots} * 8 + 63) / 64 * 64;
        if (row.offset_bytes <= bytes.size() && length <= bytes.size() - row.offset_bytes) {
            put(bytes, at + offsetof(IndexShardRow, checksum),
                U64Le(checksum64(Bytes(bytes).subspan(row.offset_bytes, length), i)));
        }
    }
    put(bytes, offsetof(IndexCheckpointHeader, table_checksum),
        U64Le(checksum64(Bytes(bytes).subspan(kHeaderBytes, kTableBytes))));
    constexpr size_t kSum = offsetof(IndexCheckpointHeader, checksum);
    put(bytes, kSum, U64Le(checksum64(Bytes(bytes).first(kSum))));
}

std::multiset<uint64_t> addresses(const ChunkIndex& index) {
    std::multiset<uint64_t> out;
    must(index.for_each([&](PageAddress address) { out.insert(address.value()); }));
    return out;
}

void run(Feed& feed) {
    const uint32_t count = feed.u16() % 600;
    const uint8_t flags = feed.u8();
    const bool one_shard = (flags & 2) != 0;
    ChunkIndex index;
    for (uint32_t i = 0; i < count; ++i) {
        must(index.insert(pair(i, one_shard).id, pair(i, one_shard).address));
    }
    Input bytes = write(index);
    bool changed = false;
    while (!feed.empty()) {
        // Header, table, the first shards, or anywhere.
        const uint32_t part = feed.below(4);
        const uint32_t where = feed.u32();
        size_t at = where % bytes.size();
        if (part == 0) {
            at = where % 104;
        } else if (part == 1) {
            const uint32_t shard = one_shard ? 0 : where % kIndexShards;
            at = kHeaderBytes + shard * sizeof(IndexShardRow) +
                 (where >> 16) % sizeof(IndexShardRow);
        } else if (part == 2 && bytes.size() > kHeaderBytes + kTableBytes) {
            at = kHeaderBytes + kTableBytes + where % (bytes.size() - kHeaderBytes - kTableBytes);
        }
        const Bytes patch = feed.bytes(1 + feed.below(12));
        for (size_t i = 0; i < patch.size() && at + i < bytes.size(); ++i) {
            changed = changed || bytes[at + i] != patch[i];
            bytes[at + i] = patch[i];
        }
        if (where % 64 == 63) {
            bytes.resize(at + 1);
            changed = true;
        }
    }
    if ((flags & 1) != 0) {
        fix_checksums(bytes);
    }
    auto opened = open(bytes);
    if (!opened) {
        require(changed && !opened.error().message().empty(), "an unchanged checkpoint opens");
        return;
    }
    ChunkIndex& found = *opened->index;
    std::vector<PageAddress> candidates;
    for (uint32_t i = 0; i < count; i += 7) {
        candidates.clear();
        const auto answer = found.candidates(pair(i, one_shard).id, candidates);
        require(answer.has_value() || changed, "an unchanged checkpoint answers");
        for (const PageAddress address : candidates) {
            require(static_cast<bool>(address), "nowhere is no answer");
        }
        require(changed ||
                    std::ranges::find(candidates, pair(i, one_shard).address) != candidates.end(),
                "an unchanged checkpoint has every pair");
    }
    // It stops at the first damaged shard.
    while (!found.verify()) {
        require(changed && !found.clear_damaged().empty(), "what fails its check is emptied");
    }
    // As the store does: what the segments know is inserted, whether it is there or not.
    for (uint32_t i = 0; i < count; ++i) {
        must(found.insert(pair(i, one_shard).id, pair(i, one_shard).address));
    }
    for (uint32_t i = 0; i < count; ++i) {
        candidates.clear();
        must(found.candidates(pair(i, one_shard).id, candidates));
        require(std::ranges::find(candidates, pair(i, one_shard).address) != candidates.end(),
                "a rebuilt index has every pair");
    }
    const auto again = must(open(write(found)));
    must(again.index->verify());
    require(again.index->size() == found.size() && addresses(*again.index) == addresses(found),
            "an index that was written is opened as the same");
    must(found.erase_if([](PageAddress address) { return address.page() % 2 == 0; }));
    for (const uint64_t address : addresses(found)) {
        require(PageAddress(address).page() % 2 == 1, "what was erased is gone");
    }
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    for (const unsigned flags : {0U, 1U, 2U, 3U}) {
        for (const unsigned count : {0U, 1U, 100U, 599U}) {
            for (unsigned part = 0; part < 5; ++part) {
                Input input;
                append_number(input, static_cast<uint16_t>(count));
                append_byte(input, flags);
                if (part < 4) {
                    append_byte(input, part);
                    append_number(input, 0x0005'0008U + 97 * count);
                    append_byte(input, 0);
                    append_byte(input, 0x41);
                }
                out.push_back(std::move(input));
            }
        }
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    stellarium::fuzz::Feed feed(data, size);
    stellarium::fuzz::run(feed);
    return 0;
}
