// The NBD protocol's numbers and layouts, as the server uses them.
//
// Source: doc/proto.md of the NBD project (github.com/NetworkBlockDevice/nbd), sections "Fixed
// newstyle negotiation", "Option types", "Transmission phase", "Structured reply types", "Error
// values". Integers are big-endian; the structs are their own wire format.
//
// Thread rule: constants and values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"

namespace stellarium::nbd {

// --- Handshake -----------------------------------------------------------------------------------

inline constexpr uint64_t kServerMagic = 0x4e42444d41474943;  ///< "NBDMAGIC"
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;  ///< "IHAVEOPT"
inline constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;

inline constexpr uint16_t kHandshakeFixedNewstyle = 1;
inline constexpr uint16_t kHandshakeNoZeroes = 2;

struct Greeting {
    U64Be magic{kServerMagic};
    U64Be option_magic{kOptionMagic};
    U16Be flags{static_cast<uint16_t>(kHandshakeFixedNewstyle | kHandshakeNoZeroes)};
};
static_assert(sizeof(Greeting) == 18);

struct OptionHeader {
    U64Be magic{kOptionMagic};
    U32Be option;
    U32Be length_bytes;
};
static_assert(sizeof(OptionHeader) == 16);

struct OptionReplyHeader {
    U64Be magic{kOptionReplyMagic};
    U32Be option;
    U32Be type;
    U32Be length_bytes;
};
static_assert(sizeof(OptionReplyHeader) == 20);

enum Option : uint32_t {
    kOptExportName = 1,
    kOptAbort = 2,
    kOptList = 3,
    kOptStartTls = 5,
    kOptInfo = 6,
    kOptGo = 7,
    kOptStructuredReply = 8,
    kOptListMetaContext = 9,
    kOptSetMetaContext = 10,
};

enum OptionReply : uint32_t {
    kRepAck = 1,
    kRepServer = 2,
    kRepInfo = 3,
    kRepMetaContext = 4,
    kRepErrUnsupported = 0x8000'0001,
    kRepErrPolicy = 0x8000'0002,
    kRepErrInvalid = 0x8000'0003,
    kRepErrUnknown = 0x8000'0006,
    kRepErrTooBig = 0x8000'0009,
};

enum Info : uint16_t {
    kInfoExport = 0,
    kInfoName = 1,
    kInfoDescription = 2,
    kInfoBlockSize = 3,
};

struct InfoExport {
    U16Be type{kInfoExport};
    U64Be size_bytes;
    U16Be flags;
};
static_assert(sizeof(InfoExport) == 12);

struct InfoBlockSize {
    U16Be type{kInfoBlockSize};
    U32Be minimum_bytes;
    U32Be preferred_bytes;
    U32Be maximum_bytes;
};
static_assert(sizeof(InfoBlockSize) == 14);

/// Answer to NBD_OPT_EXPORT_NAME, without its zeros.
struct ExportNameReply {
    U64Be size_bytes;
    U16Be flags;
};
static_assert(sizeof(ExportNameReply) == 10);
inline constexpr size_t kExportNameZeroes = 124;

// Transmission flags.
inline constexpr uint16_t kFlagHasFlags = 1 << 0;
inline constexpr uint16_t kFlagReadOnly = 1 << 1;
inline constexpr uint16_t kFlagSendFlush = 1 << 2;
inline constexpr uint16_t kFlagSendFua = 1 << 3;
inline constexpr uint16_t kFlagSendTrim = 1 << 5;
inline constexpr uint16_t kFlagSendWriteZeroes = 1 << 6;
inline constexpr uint16_t kFlagSendDf = 1 << 7;
inline constexpr uint16_t kFlagCanMultiConn = 1 << 8;
inline constexpr uint16_t kFlagSendCache = 1 << 10;

inline constexpr const char* kContextAllocation = "base:allocation";
inline constexpr uint32_t kContextAllocationId = 1;
inline constexpr uint32_t kStateHole = 1;
inline constexpr uint32_t kStateZero = 2;

// --- Transmission --------------------------------------------------------------------------------

inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;

enum Command : uint16_t {
    kCmdRead = 0,
    kCmdWrite = 1,
    kCmdDisconnect = 2,
    kCmdFlush = 3,
    kCmdTrim = 4,
    kCmdCache = 5,
    kCmdWriteZeroes = 6,
    kCmdBlockStatus = 7,
};

inline constexpr uint16_t kCmdFlagFua = 1 << 0;
inline constexpr uint16_t kCmdFlagNoHole = 1 << 1;
inline constexpr uint16_t kCmdFlagDf = 1 << 2;
inline constexpr uint16_t kCmdFlagReqOne = 1 << 3;

struct RequestHeader {
    U32Be magic{kRequestMagic};
    U16Be flags;
    U16Be command;
    U64Be cookie;
    U64Be offset_bytes;
    U32Be length_bytes;
};
static_assert(sizeof(RequestHeader) == 28);

struct SimpleReply {
    U32Be magic{kSimpleReplyMagic};
    U32Be error;
    U64Be cookie;
};
static_assert(sizeof(SimpleReply) == 16);

inline constexpr uint16_t kReplyFlagDone = 1;

enum ChunkType : uint16_t {
    kChunkNone = 0,
    kChunkOffsetData = 1,
    kChunkOffsetHole = 2,
    kChunkBlockStatus = 5,
    kChunkError = 0x8001,
};

struct ChunkHeader {
    U32Be magic{kStructuredReplyMagic};
    U16Be flags;
    U16Be type;
    U64Be cookie;
    U32Be length_bytes;
};
static_assert(sizeof(ChunkHeader) == 20);

struct DataChunk {
    ChunkHeader header;
    U64Be offset_bytes;
};
static_assert(sizeof(DataChunk) == 28);

struct HoleChunk {
    ChunkHeader header;
    U64Be offset_bytes;
    U32Be hole_bytes;
};
static_assert(sizeof(HoleChunk) == 32);

struct ErrorChunk {
    ChunkHeader header;
    U32Be error;
    U16Be message_bytes;
};
static_assert(sizeof(ErrorChunk) == 26);

struct StatusChunk {
    ChunkHeader header;
    U32Be context;
};
static_assert(sizeof(StatusChunk) == 24);

struct StatusExtent {
    U32Be length_bytes;
    U32Be flags;
};
static_assert(sizeof(StatusExtent) == 8);

/// What an error field may say; the same as Linux's errno values, which proto.md lists.
enum WireError : uint32_t {
    kErrPermission = 1,
    kErrIo = 5,
    kErrNoMemory = 12,
    kErrInvalid = 22,
    kErrNoSpace = 28,
    kErrOverflow = 75,
    kErrNotSupported = 95,
    kErrShutdown = 108,
};

}  // namespace stellarium::nbd
