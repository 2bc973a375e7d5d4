// The boot manifest's on-disk structs (docs/formats/boot-manifest.md; a test compares the page with
// these). All integers are little-endian; reserved bytes are written as zeros and must be zeros.
//
// Thread rule: values.
#pragma once

#include <array>
#include <cstdint>

#include "base/bytes.h"
#include "base/hash.h"

namespace stellarium::boot::format {

inline constexpr std::array<uint8_t, 8> kManifestMagic = {'S', 'T', 'L', 'B', 'O', 'O', 'T', 'M'};
inline constexpr uint32_t kManifestVersion = 1;

/// An image that a boot needs beside its disk. Zeros: none.
struct File {
    Hash256 root;
    U64Le size_bytes;
};
static_assert(sizeof(File) == 40);

/// Hints, runs of the prefetch list and traces follow.
struct Manifest {
    std::array<uint8_t, 8> magic;
    U16Le read_version;
    U16Le write_version;
    U32Le merged_traces;
    Hash256 root;
    U64Le size_bytes;
    U64Le created_ns;
    U64Le updated_ns;
    U32Le run_count;
    U16Le hints_bytes;
    U8 trace_count;
    U8 reserved;
    File kernel;
    File initrd;
};
static_assert(sizeof(Manifest) == 160);

struct Run {
    U40Le page;
    U24Le pages;
};
static_assert(sizeof(Run) == 8);

/// Runs follow.
struct Trace {
    U64Le recorded_ns;
    U32Le run_count;
    U8 cut;
    std::array<uint8_t, 3> reserved;
};
static_assert(sizeof(Trace) == 16);

}  // namespace stellarium::boot::format
