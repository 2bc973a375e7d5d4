// The chunk index: from chunk id to the places where a chunk with such an id may lie.
//
// It remembers 36 of the 256 bits of an id, so an answer is a list of candidates, nearly always of
// none or one (a false one in 0.03 % of the probes at 20 million chunks): the store confirms each
// against the full id in the segment's metadata. In return a chunk costs eight bytes and the spare
// room of its table, 8.2 to 9.3 bytes in all. The index is derived: it can be rebuilt from the
// segments at any time, and is, when its checkpoint is missing or damaged.
//
// It is a set of pairs (remembered bits, address): one id may have several addresses, and inserting
// a pair twice is the same as once, so a replayed log does no harm.
//
// Structure: 4096 shards by the top 12 bits of ChunkId::prefix(). A shard is a cuckoo hash table of
// 64-byte buckets of eight slots (Pagh and Rodler, 2001; buckets after Dietzfelbinger and Weidling,
// 2005). A slot is the next 24 bits r of the prefix and the 40-bit address. Both buckets of a slot
// are functions of r and of the number of buckets alone, so a shard that is full grows by an eighth
// without knowing the ids, under its own lock, in at most some hundred microseconds; the others do
// not notice. A pair that finds no room although its shard is far from full (more than sixteen
// chunks with the same 36 bits: somebody made them) goes to a list beside the table.
//
// Thread rule: every function may be called from any thread at the same time. Each shard has a
// reader-writer lock; no lock is held across a call to the outside, except that the first touch of
// a shard of an opened checkpoint may wait for the disk.
// Ownership: what open_checkpoint() was given may be closed afterwards.
// Errors: kCorrupt, only for an index opened from a checkpoint, when a shard cannot be read or
// fails its check at its first touch; see clear_damaged(). An index that was not opened from a
// checkpoint never fails.
//
//     ChunkIndex index;
//     STELLARIUM_TRY(index.insert(id, PageAddress::make(1, 17)));
//     std::vector<PageAddress> addresses;
//     STELLARIUM_TRY(index.candidates(id, addresses));
//     for (PageAddress address : addresses) { /* compare the full id stored there with `id` */ }
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "io/io.h"
#include "nebula/types.h"

namespace stellarium::nebula {

inline constexpr uint32_t kIndexShards = 4096;

class ChunkIndex {
  public:
    /// A match of find_many: `ids[id_index]` may lie at `address`.
    struct Match {
        size_t id_index = 0;
        PageAddress address;
        friend bool operator==(const Match&, const Match&) = default;
    };
    struct Entry {
        ChunkId id;
        PageAddress address;
    };
    /// What a checkpoint says of itself.
    struct CheckpointInfo {
        std::array<uint8_t, 16> store_uuid{};  ///< The store it belongs to.
        uint64_t sequence = 0;                 ///< The last batch it is sure to contain.
        friend bool operator==(const CheckpointInfo&, const CheckpointInfo&) = default;
    };
    struct Opened {
        std::unique_ptr<ChunkIndex> index;
        CheckpointInfo info;
    };

    ChunkIndex();
    ~ChunkIndex();
    ChunkIndex(const ChunkIndex&) = delete;
    ChunkIndex& operator=(const ChunkIndex&) = delete;

    /// Adds a pair; false when it was there. The address is not "nowhere".
    Result<bool> insert(const ChunkId& id, PageAddress address);
    /// The same for many, with the memory fetched ahead: for rebuilding.
    Result<void> insert_many(std::span<const Entry> entries);
    /// Removes exactly this pair; false when it was not there.
    Result<bool> erase(const ChunkId& id, PageAddress address);
    /// Changes the address of a pair in one step (a chunk that was moved), so that at no time a
    /// reader finds neither; false, and nothing done, when (id, from) was not there.
    Result<bool> replace(const ChunkId& id, PageAddress from, PageAddress to);

    /// Appends every address whose remembered bits match `id`.
    Result<void> candidates(const ChunkId& id, std::vector<PageAddress>& out) const;
    /// Appends the matches of all ids, in the order of the ids. Three to five times as fast as one
    /// by one, because the memory of many probes is fetched at once: give it dozens or more.
    Result<void> find_many(std::span<const ChunkId> ids, std::vector<Match>& out) const;

    /// Calls `visit` for every pair that is there all the time; others may or may not be seen.
    Result<void> for_each(const std::function<void(PageAddress)>& visit) const;
    /// Removes every pair whose address satisfies `dead`; returns how many. `dead` must not call
    /// into the index.
    Result<uint64_t> erase_if(const std::function<bool(PageAddress)>& dead);

    /// Number of pairs.
    uint64_t size() const;
    /// Heap memory. Shards still used in place from a checkpoint's mapping are not in it.
    uint64_t memory_bytes() const;
    /// Bytes of the checkpoint's mapping that are still used in place.
    uint64_t mapped_bytes() const;

    /// Writes the index to `file`, whose former content is lost: give a new file, then rename it.
    /// The content is durable on return. Shards are written one after another, each as it is at
    /// its moment: every pair that is there all the time is in the file; pairs inserted or erased
    /// meanwhile may be or not, so `info.sequence` is a batch whose pairs were inserted before the
    /// call. Other threads wait for the copying of one shard at most.
    Result<void> write_checkpoint(io::File& file, const CheckpointInfo& info) const;

    /// Opens a checkpoint in time independent of its size: maps the file, checks header and shard
    /// table, and uses the shards in place. A shard is checked when it is first touched, and copied
    /// to the heap when it is first changed. The file must never change while the index lives (it
    /// may be unlinked). Errors name file, offset and reason: kCorrupt for damage, truncation, and
    /// files that are no checkpoint or that of another store; kUnsupported for a newer format.
    static Result<Opened> open_checkpoint(io::File& file,
                                          const std::array<uint8_t, 16>& store_uuid);
    /// Checks every shard that has not been touched yet.
    Result<void> verify() const;
    /// Empties the shards that failed their check, and returns their numbers, ascending. The caller
    /// then inserts again the pairs of all ids whose shard_of() is among them.
    std::vector<uint32_t> clear_damaged();
    static uint32_t shard_of(const ChunkId& id);

  private:
    struct Shard;
    struct Mapping;

    Result<void> verify_shard(uint32_t number) const;
    Result<void> copy_shard(uint32_t number, std::vector<std::byte>& out, uint32_t& buckets,
                            uint32_t& entries, uint32_t& overflow_slots) const;

    std::unique_ptr<Shard[]> shards_;
    std::unique_ptr<Mapping> mapping_;  ///< Of an opened checkpoint; null otherwise.
};

/// The checkpoint's format (docs/formats/index-checkpoint.md): header, shard table, shards.
struct IndexCheckpointHeader {
    static constexpr std::array<char, 8> kMagic{'S', 'T', 'L', 'R', 'I', 'D', 'X', '\0'};
    static constexpr uint32_t kVersion = 1;

    std::array<char, 8> magic{};
    U32Le read_version;        ///< Least version that a reader must know.
    U32Le write_version;       ///< Version of the writer.
    U64Le features_refuse;     ///< Unknown bits: do not open.
    U64Le features_read_only;  ///< Unknown bits: do not change. (Checkpoints are never changed.)
    U64Le features_ignore;     ///< Unknown bits: ignore.
    std::array<uint8_t, 16> store_uuid{};
    U64Le sequence;
    U64Le entries;
    U64Le file_bytes;
    U32Le shards;
    U32Le bucket_bytes;
    U64Le table_checksum;  ///< checksum64 of the shard table.
    std::array<uint8_t, 4096 - 104> reserved{};
    U64Le checksum;  ///< checksum64 of all bytes before.
};
static_assert(sizeof(IndexCheckpointHeader) == 4096);

/// One of the kIndexShards rows of the table, which follows the header.
struct IndexShardRow {
    U64Le offset_bytes;  ///< Of the buckets; then come overflow slots, then zeros up to a multiple
                         ///< of 64.
    U32Le buckets;
    U32Le overflow_slots;
    U32Le entries;
    U32Le reserved;
    U64Le checksum;  ///< checksum64 of all these bytes, seeded with the shard's number.
};
static_assert(sizeof(IndexShardRow) == 32);

}  // namespace stellarium::nebula
