// Any of the store's files in words, for people: superblock, segments, index checkpoints, dead map.
//
// Made for damaged files too: what is wrong is said where it stands, and the dump goes on behind
// it. Nothing is changed, no lock is taken, and no other file is needed: a segment copied out of a
// broken store can be looked at alone. What garbage collection has freed of a segment is known from
// the store around it, and looks damaged without that. (A writer may be appending to the file
// meanwhile; its end may then look torn.)
//
// Thread rule: any thread. Ownership: nothing is kept. Durability: only reads.
// Errors: kUnsupported for a file that is none of the store's; what the system reports. Damage is
// no error: the result counts it.
//
//     auto damages = dump_file(env, path, [](std::string_view line) { fmt::print("{}\n", line); });
//     if (damages && *damages > 0) { /* exit code: corrupt */ }
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "base/bytes.h"
#include "base/error.h"
#include "io/io.h"

namespace stellarium::nebula {

/// Receives the dump line by line, without line ends.
using PrintLine = std::function<void(std::string_view line)>;
/// Says in one line what a record of the layers above means; empty: not known.
using RecordFormatter = std::function<std::string(uint16_t kind, Bytes payload)>;

struct DumpOptions {
    /// Check every chunk, object and pack of a segment against its id (reads all data).
    bool check_data = true;
    RecordFormatter format_record;
};

/// Prints the file at `path`; returns how many faults were found in it.
Result<uint64_t> dump_file(const io::Env& env, const std::string& path, const PrintLine& print,
                           const DumpOptions& options = {});

}  // namespace stellarium::nebula
