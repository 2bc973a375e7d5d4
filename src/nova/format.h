// The volumes layer's on-disk structs: records of the log, the catalog, the dirty arena.
//
// The formats, with the duties of a reader, are in docs/formats/records.md, catalog.md and
// arena.md; a test compares their tables with these structs. All integers are little-endian;
// reserved bytes are written as zeros and must be read as zeros.
//
// Thread rule: values.
#pragma once

#include <array>
#include <cstddef>

#include "base/bytes.h"
#include "base/hash.h"

namespace stellarium::nova::format {

// --- Records (records.md) ------------------------------------------------------------------------

/// A stored node: its id, zero for none, and where it was when the record was written, 0 unknown.
struct NodeName {
    Hash256 id;
    U64Le hint;
};
static_assert(sizeof(NodeName) == 40);

struct Create {
    U64Le id;
    U8 kind;
    U8 name_bytes;
    std::array<uint8_t, 6> reserved;
    U64Le size_bytes;
    U64Le created_ns;
    U64Le data_bytes;
    NodeName root;
};
static_assert(sizeof(Create) == 80);

struct Clone {
    U64Le source;
    U64Le first_id;
    U64Le size_bytes;
    U64Le created_ns;
    U32Le count;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(Clone) == 40);

struct Snapshot {
    U64Le id;
    U64Le volume;
    U64Le created_ns;
    U8 name_bytes;
    std::array<uint8_t, 7> reserved;
};
static_assert(sizeof(Snapshot) == 32);

struct Rollback {
    U64Le volume;
    U64Le snapshot;
};
static_assert(sizeof(Rollback) == 16);

struct Resize {
    U64Le volume;
    U64Le size_bytes;
    NodeName root;
};
static_assert(sizeof(Resize) == 56);

struct Rename {
    U64Le id;
    U8 name_bytes;
    std::array<uint8_t, 7> reserved;
};
static_assert(sizeof(Rename) == 16);

struct Remove {
    U32Le count;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(Remove) == 8);

struct Attachment {
    U64Le id;
    U8 present;
    U8 reserved0;
    U16Le label_bytes;
    U16Le options_bytes;
    std::array<uint8_t, 2> reserved;
};
static_assert(sizeof(Attachment) == 16);

struct Map {
    U64Le volume;
    U32Le count;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(Map) == 16);

struct MapEntry {
    U40Le page;
    U8 chunk_pages;  ///< Low nibble: pages - 1. High nibble: first page within the chunk.
    Hash256 id;
};
static_assert(sizeof(MapEntry) == 38, "at most 48 bytes for a chunk written");

struct Hole {
    U64Le volume;
    U32Le count;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(Hole) == 16);

struct HoleEntry {
    U40Le page;
    U40Le pages;
};
static_assert(sizeof(HoleEntry) == 10);

struct Fold {
    U64Le volume;
    NodeName root;
    U32Le count;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(Fold) == 56);

struct Arena {
    std::array<uint8_t, 16> id;
    U16Le path_bytes;
    U8 closed;
    std::array<uint8_t, 5> reserved;
};
static_assert(sizeof(Arena) == 24);

/// What binds a boot manifest to a root, as a record and in the catalog.
struct Boot {
    Hash256 root;
    NodeName pieces;
    U32Le levels;  ///< How often ids are followed from `pieces` to the content.
    U32Le bytes;   ///< Of the content; 0: there is none any more, and the fields before are zeros.
};
static_assert(sizeof(Boot) == 80);

/// Whether an image may be mapped where it lies.
struct Sharing {
    U64Le id;
    U8 shareable;
    std::array<uint8_t, 7> reserved;
};
static_assert(sizeof(Sharing) == 16);

// --- Catalog (catalog.md) ------------------------------------------------------------------------

inline constexpr std::array<uint8_t, 8> kCatalogMagic = {'S', 'T', 'L', 'C', 'A', 'T', 'A', 'L'};
/// What a catalog without boot manifests is written as.
inline constexpr uint32_t kCatalogVersion = 1;
/// What one with boot manifests is written as.
inline constexpr uint32_t kCatalogVersionWithBoots = 2;
/// What one with shareable images is written as, and the highest that is read.
inline constexpr uint32_t kCatalogVersionWithSharing = 3;

/// The payload of a checkpoint: names the object that lists the catalog's pieces.
struct CatalogRoot {
    std::array<uint8_t, 8> magic;
    U16Le read_version;
    U16Le write_version;
    U32Le levels;  ///< How often ids are followed from `pieces` to the content.
    U64Le catalog_bytes;
    NodeName pieces;  ///< An object.
    U64Le checksum;   ///< Of the bytes before it.
};
static_assert(sizeof(CatalogRoot) == 72);

/// The front of the catalog's bytes; states, entities, attachments, in version 2 what concerns
/// boots, and damages follow.
struct CatalogHeader {
    U64Le next_id;
    U64Le imported_bytes;
    U64Le written_bytes;
    U32Le state_count;
    U32Le entity_count;
    U32Le attachment_count;
    U16Le arena_path_bytes;
    U8 arena_closed;
    U8 reserved;
    std::array<uint8_t, 16> arena_id;
};
static_assert(sizeof(CatalogHeader) == 56);

/// What one or many entities hold.
struct CatalogState {
    NodeName root;
    NodeName delta;
    U64Le delta_leaves;
    U64Le delta_extents;
};
static_assert(sizeof(CatalogState) == 96);

struct CatalogEntity {
    U64Le id;
    U64Le parent;
    U64Le size_bytes;
    U64Le created_ns;
    U32Le state;
    U8 kind;
    U8 name_bytes;
    U16Le parent_name_bytes;  ///< 0 while the parent is there.
};
static_assert(sizeof(CatalogEntity) == 40, "at most 64 bytes for a clone beyond its name");

struct CatalogAttachment {
    U64Le id;
    U16Le label_bytes;
    U16Le options_bytes;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(CatalogAttachment) == 16);

/// Behind the attachments of a catalog of version 2; `Boot` and `CatalogOrigin` follow.
struct CatalogBootHeader {
    U32Le boot_count;
    U32Le origin_count;
};
static_assert(sizeof(CatalogBootHeader) == 8);

/// The root that an entity descends from, where its parent is not there any more to say it.
struct CatalogOrigin {
    U64Le id;
    Hash256 root;
};
static_assert(sizeof(CatalogOrigin) == 40);

/// Behind what concerns boots in a catalog of version 3; an id (8 bytes) for each follows.
struct CatalogSharingHeader {
    U32Le shareable_count;
    std::array<uint8_t, 4> reserved;
};
static_assert(sizeof(CatalogSharingHeader) == 8);

/// Up to the end of the catalog: entities whose content could not be replayed, and why.
struct CatalogDamage {
    U64Le id;
    U16Le reason_bytes;
    std::array<uint8_t, 6> reserved;
};
static_assert(sizeof(CatalogDamage) == 16);

// --- Arena (arena.md) ----------------------------------------------------------------------------

inline constexpr std::array<uint8_t, 8> kArenaMagic = {'S', 'T', 'L', 'A', 'R', 'E', 'N', 'A'};
inline constexpr uint32_t kArenaVersion = 2;

/// First page of the file; slot headers follow, then, at a page boundary, the slots' data.
struct ArenaHeader {
    std::array<uint8_t, 8> magic;
    U32Le version;
    U32Le slot_count;
    std::array<uint8_t, 16> store;
    std::array<uint8_t, 16> arena;
    std::array<uint8_t, 16> previous;  ///< The arena that the log named when this one was made.
    std::array<uint8_t, 16> boot;      ///< Zeros when the system has no boot id.
    U64Le device;                      ///< Of the store's superblock; a copy's is another one.
    U64Le inode;
    U64Le checksum;  ///< Of the bytes before it.
};
static_assert(sizeof(ArenaHeader) == 104);

enum class ArenaSlotKind : uint32_t {
    kFree = 0,
    kPage = 1,   ///< The slot's data is the content of one page.
    kZeros = 2,  ///< The first 64 bytes of the slot's data say which pages of a leaf are zeros.
};

struct ArenaSlot {
    U64Le volume;
    U64Le page;      ///< For kZeros: the first page of the leaf.
    U64Le sequence;  ///< Newer slots have higher numbers.
    U64Le data_checksum;
    U32Le kind;
    std::array<uint8_t, 20> reserved;
    U64Le checksum;  ///< Of the bytes before it. Written last; zero while the slot is free.
};
static_assert(sizeof(ArenaSlot) == 64 && offsetof(ArenaSlot, checksum) == 56);

// --- Scrub (scrub.md) ----------------------------------------------------------------------------

inline constexpr std::array<uint8_t, 8> kScrubMagic = {'S', 'T', 'L', 'S', 'C', 'R', 'U', 'B'};
inline constexpr uint32_t kScrubVersion = 1;

/// One pass over the store, as far as it has come.
struct ScrubPassRecord {
    U64Le started_ns;  ///< Since 1970, UTC; 0: there was none.
    U64Le ended_ns;    ///< 0: it is not complete.
    U64Le bytes;       ///< Read.
    U64Le entries;     ///< Chunks and objects checked.
    U64Le damaged;     ///< Of those.
};
static_assert(sizeof(ScrubPassRecord) == 40);

/// The whole of the file.
struct ScrubFile {
    std::array<uint8_t, 8> magic;
    U32Le version;
    U32Le end_segment;  ///< The present pass ends with this one.
    std::array<uint8_t, 16> store;
    U64Le next;      ///< Address at which the present pass goes on; 0: there is none.
    U64Le first_ns;  ///< When the schedule began, since 1970, UTC.
    ScrubPassRecord present;
    ScrubPassRecord last;  ///< The last one that was completed.
    U64Le checksum;        ///< Of the bytes before it.
};
static_assert(sizeof(ScrubFile) == 136, "below one sector, so that it is written whole or not");

}  // namespace stellarium::nova::format
