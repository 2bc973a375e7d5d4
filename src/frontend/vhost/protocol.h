// The vhost-user protocol and the virtio structures it carries, as byte layouts.
//
// Sources: "Vhost-user Protocol" (QEMU, docs/interop/vhost-user.rst) and "Virtual I/O Device
// (VIRTIO) Version 1.2", sections 2.7 (split virtqueues) and 5.2 (block device). Control messages
// are in the host's byte order, rings and requests little-endian; this code runs on little-endian
// hosts, where the two are one.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "base/bytes.h"

namespace stellarium::vhost {

static_assert(std::endian::native == std::endian::little);

// ---- Control messages ---------------------------------------------------------------------------

enum class MessageType : uint32_t {
    kGetFeatures = 1,
    kSetFeatures = 2,
    kSetOwner = 3,
    kResetOwner = 4,
    kSetMemTable = 5,
    kSetVringNum = 8,
    kSetVringAddr = 9,
    kSetVringBase = 10,
    kGetVringBase = 11,
    kSetVringKick = 12,
    kSetVringCall = 13,
    kSetVringErr = 14,
    kGetProtocolFeatures = 15,
    kSetProtocolFeatures = 16,
    kGetQueueNum = 17,
    kSetVringEnable = 18,
    kSetBackendReqFd = 21,
    kGetConfig = 24,
    kSetConfig = 25,
    kGetInflightFd = 31,
    kSetInflightFd = 32,
    kResetDevice = 34,
    kGetMaxMemSlots = 36,
    kAddMemReg = 37,
    kRemMemReg = 38,
    kSetStatus = 39,
    kGetStatus = 40,
};

/// Sent by the backend on the channel that SET_BACKEND_REQ_FD set up.
inline constexpr uint32_t kBackendConfigChange = 2;

inline constexpr uint32_t kFlagVersionMask = 0x3;
inline constexpr uint32_t kFlagVersion = 0x1;
inline constexpr uint32_t kFlagReply = 0x4;
inline constexpr uint32_t kFlagNeedReply = 0x8;

enum class ProtocolFeature : unsigned {
    kMultiQueue = 0,
    kReplyAck = 3,
    kBackendReq = 5,
    kConfig = 9,
    kInflightShmfd = 12,
    kResetDevice = 13,
    kConfigureMemSlots = 15,
    kStatus = 16,
};
constexpr uint64_t bit(ProtocolFeature feature) {
    return uint64_t{1} << static_cast<unsigned>(feature);
}

struct MessageHeader {
    U32Le type;
    U32Le flags;
    U32Le size;  ///< Of the payload.
};
static_assert(sizeof(MessageHeader) == 12);

struct VringState {
    U32Le index;
    U32Le num;
};
static_assert(sizeof(VringState) == 8);

struct VringAddress {
    U32Le index;
    U32Le flags;
    U64Le descriptor;
    U64Le used;
    U64Le available;
    U64Le log;
};
static_assert(sizeof(VringAddress) == 40);

/// u64 payload of SET_VRING_KICK, _CALL and _ERR.
inline constexpr uint64_t kVringIndexMask = 0xff;
inline constexpr uint64_t kVringNoFd = 0x100;

struct RegionDescription {
    U64Le guest_address;
    U64Le size;
    U64Le user_address;
    U64Le mmap_offset;
};
static_assert(sizeof(RegionDescription) == 32);

struct MemoryTableHeader {
    U32Le regions;
    U32Le padding;
};
static_assert(sizeof(MemoryTableHeader) == 8);

struct SingleRegion {
    U64Le padding;
    RegionDescription region;
};
static_assert(sizeof(SingleRegion) == 40);

struct ConfigHeader {
    U32Le offset;
    U32Le size;
    U32Le flags;
};
static_assert(sizeof(ConfigHeader) == 12);

inline constexpr uint32_t kConfigForMigration = 1;

struct InflightDescription {
    U64Le mmap_size;
    U64Le mmap_offset;
    U16Le queues;
    U16Le queue_size;
};
/// Some front-ends count 20 bytes, others (QEMU) pad to 24; a reply has the size of its request.
static_assert(sizeof(InflightDescription) == 20);
inline constexpr size_t kInflightPaddedBytes = 24;

// ---- Virtio -------------------------------------------------------------------------------------

inline constexpr unsigned kFeatureIndirectDesc = 28;
inline constexpr unsigned kFeatureEventIdx = 29;
inline constexpr unsigned kFeatureProtocolFeatures = 30;  // VHOST_USER_F_PROTOCOL_FEATURES
inline constexpr unsigned kFeatureVersion1 = 32;

inline constexpr unsigned kBlkFeatureSizeMax = 1;
inline constexpr unsigned kBlkFeatureSegMax = 2;
inline constexpr unsigned kBlkFeatureReadOnly = 5;
inline constexpr unsigned kBlkFeatureBlkSize = 6;
inline constexpr unsigned kBlkFeatureFlush = 9;
inline constexpr unsigned kBlkFeatureTopology = 10;
inline constexpr unsigned kBlkFeatureMultiQueue = 12;
inline constexpr unsigned kBlkFeatureDiscard = 13;
inline constexpr unsigned kBlkFeatureWriteZeroes = 14;

constexpr uint64_t feature_bit(unsigned number) {
    return uint64_t{1} << number;
}

/// One entry of a descriptor table. Native integers: it is copied out of guest memory as a whole.
struct Descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};
static_assert(sizeof(Descriptor) == 16 && offsetof(Descriptor, next) == 14);

inline constexpr uint16_t kDescriptorNext = 1;
inline constexpr uint16_t kDescriptorWrite = 2;
inline constexpr uint16_t kDescriptorIndirect = 4;

struct UsedElement {
    uint32_t id;
    uint32_t length;
};
static_assert(sizeof(UsedElement) == 8);

inline constexpr uint16_t kAvailNoInterrupt = 1;
inline constexpr uint16_t kUsedNoNotify = 1;

inline constexpr uint32_t kBlkIn = 0;
inline constexpr uint32_t kBlkOut = 1;
inline constexpr uint32_t kBlkFlush = 4;
inline constexpr uint32_t kBlkGetId = 8;
inline constexpr uint32_t kBlkDiscard = 11;
inline constexpr uint32_t kBlkWriteZeroes = 13;

inline constexpr uint8_t kBlkStatusOk = 0;
inline constexpr uint8_t kBlkStatusIoError = 1;
inline constexpr uint8_t kBlkStatusUnsupported = 2;

inline constexpr unsigned kSectorShift = 9;
inline constexpr uint64_t kSectorBytes = 512;

struct BlkRequestHeader {
    U32Le type;
    U32Le priority;
    U64Le sector;
};
static_assert(sizeof(BlkRequestHeader) == 16);

struct BlkRange {
    U64Le sector;
    U32Le sectors;
    U32Le flags;
};
static_assert(sizeof(BlkRange) == 16);
inline constexpr uint32_t kBlkRangeUnmap = 1;

struct BlkConfig {
    U64Le capacity_sectors;
    U32Le size_max;
    U32Le seg_max;
    U16Le cylinders;
    U8 heads;
    U8 sectors;
    U32Le blk_size;
    U8 physical_block_exp;
    U8 alignment_offset;
    U16Le min_io_blocks;
    U32Le opt_io_blocks;
    U8 writeback;
    U8 unused0;
    U16Le queues;
    U32Le max_discard_sectors;
    U32Le max_discard_segments;
    U32Le discard_alignment_sectors;
    U32Le max_write_zeroes_sectors;
    U32Le max_write_zeroes_segments;
    U8 write_zeroes_may_unmap;
    U8 unused1[3];
};
static_assert(sizeof(BlkConfig) == 60);
static_assert(offsetof(BlkConfig, writeback) == 32 && offsetof(BlkConfig, queues) == 34);

// ---- The in-flight region of a split virtqueue --------------------------------------------------

/// Native integers: both sides of a crash are this host, and each field is stored atomically.
struct InflightState {
    uint8_t in_flight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};
static_assert(sizeof(InflightState) == 16 && offsetof(InflightState, counter) == 8);

struct InflightHeader {
    uint64_t features;
    uint16_t version;
    uint16_t descriptors;
    uint16_t last_batch_head;
    uint16_t used_index;
};
static_assert(sizeof(InflightHeader) == 16);

inline constexpr uint16_t kInflightVersion = 1;

constexpr uint64_t inflight_queue_bytes(uint64_t queue_size) {
    uint64_t bytes = sizeof(InflightHeader) + queue_size * sizeof(InflightState);
    return (bytes + 63) / 64 * 64;
}

}  // namespace stellarium::vhost
