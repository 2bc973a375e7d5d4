// Whether a call may wait, and whether what it reads is kept in memory twice.
//
// Thread rule: a value.
#pragma once

#include <cstdint>

namespace stellarium {

enum class IoMode : uint8_t {
    kMayBlock,  ///< Wait for the disk or for buffer space as long as it takes.
    kNoWait,    ///< Return kWouldBlock instead of waiting; nothing has happened then.
    /// Like kMayBlock, for a caller who keeps what it reads: what had to come from the disk for it
    /// does not stay in the page cache (RWF_DONTCACHE, Linux 6.14; elsewhere it stays). What was
    /// there before stays there for others. For anything but reads: kMayBlock.
    kMayBlockOnce,
};

}  // namespace stellarium
