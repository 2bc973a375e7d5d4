// Every bound of the FUSE frontend. docs/internals/limits.md adds them up.
//
// Thread rule: constants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stellarium::fuse {

/// Threads that do requests, each waiting for the disk as long as it takes. Guests that keep more
/// requests in flight have the rest wait in the kernel.
inline constexpr unsigned kFileWorkers = 16;
/// Of these, for requests that wait for room: of one file's, and of all. The rest is kept until one
/// of them comes back (waiting.h), in copies of so many bytes in all.
inline constexpr unsigned kMaxWaitingOfFile = kFileWorkers / 4;
inline constexpr unsigned kMaxWaitingOfFiles = kFileWorkers * 3 / 4;
inline constexpr size_t kMaxKeptBytes = size_t{64} << 20;
/// Of a read or write; what the kernel splits longer ones into.
inline constexpr size_t kMaxFileTransferBytes = size_t{1} << 20;
/// Before the data of a write: the kernel's headers, and some more (libfuse's own allowance).
inline constexpr size_t kRequestHeaderBytes = 4096;
/// What a thread has for a request, and for its answer with whole sectors around it.
inline constexpr size_t kRequestBufferBytes = kMaxFileTransferBytes + kRequestHeaderBytes;
inline constexpr size_t kAnswerBufferBytes = kMaxFileTransferBytes + kRequestHeaderBytes;
inline constexpr uint64_t kWorkerBytes = kRequestBufferBytes + kAnswerBufferBytes;

/// Requests that the kernel has under way for readahead and asynchronous I/O; its own default, 12,
/// is less than a guest's queue.
inline constexpr unsigned kMaxBackgroundRequests = 128;

/// Open files at once, over all of them. A power of two: a slot is part of a file's handle.
inline constexpr uint32_t kMaxOpenFiles = 65'536;
/// Listings of folders that are kept for their readers; an older one is made again.
inline constexpr size_t kMaxListings = 64;

/// Names of open files in a message or an answer.
inline constexpr size_t kMaxOpenNames = 20;

/// A session: /dev/fuse, the table of open files, the holder's socket.
inline constexpr uint64_t kDescriptorsOfMount = 8;

}  // namespace stellarium::fuse
