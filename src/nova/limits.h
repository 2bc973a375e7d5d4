// Every bound of the volumes layer, in one place, with the relations that must hold between them.
//
// Thread rule: constants and pure functions.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "nebula/types.h"

namespace stellarium::nova {

inline constexpr uint64_t kMaxVolumeBytes = uint64_t{1} << 50;  ///< 1 PiB.
inline constexpr uint64_t kSectorBytes = 512;
inline constexpr uint64_t kPageBytes = nebula::kPageBytes;
inline constexpr uint64_t kLeafBytes = uint64_t{nebula::kLeafPages} * kPageBytes;
inline constexpr uint64_t kMaxPages = kMaxVolumeBytes / kPageBytes;
static_assert(kPageBytes % kSectorBytes == 0);

/// What a device of something that is so long has.
constexpr uint64_t round_up_to_sectors(uint64_t bytes) {
    return (bytes + kSectorBytes - 1) / kSectorBytes * kSectorBytes;
}
static_assert(kMaxPages < uint64_t{1} << 40, "map entries hold 40-bit page numbers");

// Names and their company.
inline constexpr size_t kMaxNameBytes = 128;
inline constexpr size_t kMaxFullNameBytes = 2 * kMaxNameBytes + 1;  ///< VOLUME@SNAPSHOT.
inline constexpr size_t kMaxLabelBytes = 4096;
inline constexpr size_t kMaxAttachmentOptionsBytes = 4096;
inline constexpr size_t kMaxSerialBytes = 20;
inline constexpr size_t kMaxDamageReasonBytes = 2048;
inline constexpr size_t kMaxClonesPerCall = 100'000;
inline constexpr size_t kMaxEntities = 4'000'000;  ///< Images, volumes and snapshots of a pool.
inline constexpr size_t kMaxLineage = 10'000;      ///< Ancestors that detail() lists.

// Records of the log. A record stays well below a batch header's room, so a call that says more
// writes several records in one batch.
inline constexpr size_t kMaxRecordBytes = size_t{48} << 10;
inline constexpr size_t kMaxMapEntriesPerRecord = 1024;
inline constexpr size_t kMaxHoleEntriesPerRecord = 1024;
inline constexpr size_t kMaxFoldLeavesPerRecord = 8192;
inline constexpr size_t kMaxIdsPerRecord = 4096;
/// Names of all clones of one call, which are made in one batch.
inline constexpr size_t kMaxCloneNamesBytes = nebula::kMaxRecordBytes / 2;
static_assert(kMaxRecordBytes <= nebula::kMaxRecordBytes / 16);

// Boot manifests.
inline constexpr size_t kMaxBootManifestBytes = size_t{2} << 20;
inline constexpr size_t kMaxBootManifests = 65'536;  ///< Of a pool.
/// Lists of pieces above a manifest's content.
inline constexpr uint32_t kMaxBootManifestLevels = 1;
static_assert(kMaxBootManifestBytes <=
              nebula::kMaxObjectBytes / sizeof(ChunkId) * nebula::kMaxObjectBytes);

// Guest writes on their way into the log.
inline constexpr uint64_t kMinDirtyBudgetBytes = uint64_t{256} << 10;
inline constexpr uint64_t kMaxDirtyBudgetBytes = uint64_t{1} << 40;
/// Largest part of a request that takes arena slots at once.
inline constexpr uint64_t kMaxWritePieceBytes = uint64_t{2} << 20;
/// A discard of more leaves goes straight to the log instead of through the arena.
inline constexpr uint64_t kMaxBufferedDiscardLeaves = 16;
/// Pages gathered for one append of the flusher.
inline constexpr uint64_t kCommitBytes = uint64_t{8} << 20;
/// Pages and runs of zeros gathered for it, which bounds its records.
inline constexpr uint64_t kMaxRunsPerBatch = 65'536;
static_assert(kMaxRunsPerBatch * 32 <= nebula::kMaxRecordBytes / 2);
static_assert(kMaxRunsPerBatch >= kCommitBytes / kPageBytes);
static_assert(kCommitBytes % kLeafBytes == 0 && kMaxWritePieceBytes % kPageBytes == 0);

// Folding.
/// A leaf with fewer extents in its delta is not worth rewriting by itself.
inline constexpr uint64_t kMinFoldExtents = 32;
/// Delta extents of all volumes in memory beyond which the largest deltas are folded whole.
inline constexpr uint64_t kMaxDeltaExtents = 1'000'000;
inline constexpr size_t kFoldBatchLeaves = 256;
static_assert(kFoldBatchLeaves <= kMaxFoldLeavesPerRecord);

// Garbage collection and scrub.
/// Whoever asks for a bounded rate gets at least this much a second: a store of 1 TiB takes twelve
/// days then, and less is more likely a unit that was forgotten.
inline constexpr uint64_t kMinRateBytes = uint64_t{1} << 20;

// Garbage collection.
/// What one run stores anew at most: 64 KiB a chunk, so 4 GiB, and what the plan of it takes.
inline constexpr uint64_t kMaxRewrittenChunks = 65'536;
inline constexpr uint64_t kMaxRewrittenLeaves = 16'384;
/// Rewriting a leaf that gives back less is not worth its new nodes: up to 18 KiB for the leaf and
/// 13 KiB for the path to it.
inline constexpr uint64_t kMinRewriteGainBytes = uint64_t{64} << 10;
/// Leaves rewritten while a volume's commits wait: at most 32 MiB, in one record.
inline constexpr size_t kRewriteBatchLeaves = 16;
static_assert(kRewriteBatchLeaves <= kMaxFoldLeavesPerRecord);
/// Garbage of more than one part in so many of the store is collected by the run that made it.
inline constexpr uint64_t kSecondCollectionShare = 32;

// Damage.
/// Nodes below which nothing is damaged, remembered while users of damaged chunks are looked for:
/// leaves, and as many others; 16 to 40 MiB each.
inline constexpr uint64_t kMaxRememberedNodes = uint64_t{1} << 20;
/// Damaged ranges of one volume that are looked for.
inline constexpr uint64_t kMaxBadRanges = 65'536;

/// Damaged chunks that are listed with their users.
inline constexpr size_t kMaxDamageListed = 1000;

// Scrub.
inline constexpr uint64_t kScrubStepBytes = uint64_t{1} << 20;  ///< Read without a pause.
/// The position is written down after so much, and at the end.
inline constexpr uint64_t kScrubSaveBytes = uint64_t{64} << 20;
inline constexpr std::chrono::seconds kScrubSaveInterval{10};
/// The schedule is looked at so often.
inline constexpr std::chrono::seconds kScrubCheckInterval{60};

// Reading.
inline constexpr uint64_t kMaxReadRunBytes = uint64_t{2} << 20;  ///< One read of the store.
/// How often one read looks up addresses that a garbage collection has made stale meanwhile. Each
/// time takes a whole collection.
inline constexpr int kMaxStaleReads = 8;
/// How often a lease is tried again while a collection frees parts of the segment, with pauses of a
/// millisecond.
inline constexpr int kMaxBusyLeases = 10'000;
/// Reader::next_data looks no further than this for the end of a range.
inline constexpr uint64_t kMaxDataRangeBytes = uint64_t{1} << 30;

/// What is durable is said in the superblock after at most this time.
inline constexpr std::chrono::seconds kProofInterval{5};
/// close() checkpoints when a restart would have to replay more than this.
inline constexpr uint64_t kCloseCheckpointBytes = uint64_t{16} << 20;

}  // namespace stellarium::nova
