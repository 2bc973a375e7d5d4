// Boot manifests: what boots of an image read, in the order in which they do.
//
// A trace is one boot: runs of pages in the order of their first touch. A manifest keeps the last
// traces and the list that is made of them: the pages that at least half of the traces have, in the
// order of the median of when they come. It belongs to the image's root, so every clone inherits
// it; where a volume was written to, its own pages are read instead.
//
//     add_trace(manifest, trace, now_ns);
//     pool.set_boot_manifest(root, encode(manifest));
//     STELLARIUM_ASSIGN(BootManifest manifest, decode(*content));
//
// Thread rule: values and pure functions.
// Errors: decode gives kCorrupt with the reason, kUnsupported for a newer format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/hash.h"
#include "nova/records.h"

namespace stellarium::boot {

using nova::PageRange;

struct BootTrace {
    uint64_t recorded_ns = 0;     ///< When it ended, since 1970, UTC.
    bool cut = false;             ///< A limit ended it, so that the boot's end may be missing.
    std::vector<PageRange> runs;  ///< No page twice.
    friend bool operator==(const BootTrace&, const BootTrace&) = default;
};

/// An image, by the root of its content, that a boot needs beside its disk.
struct BootFile {
    Hash256 root;
    uint64_t size_bytes = 0;
    friend bool operator==(const BootFile&, const BootFile&) = default;
};

struct BootManifest {
    Hash256 root;             ///< Of the image that it belongs to.
    uint64_t size_bytes = 0;  ///< Of the volume that was recorded last.
    uint64_t created_ns = 0;
    uint64_t updated_ns = 0;
    uint32_t merged_traces = 0;       ///< Ever; the last kMaxTraces of them are in `traces`.
    std::vector<PageRange> prefetch;  ///< In the order in which it is to be read.
    std::vector<BootTrace> traces;    ///< The newest one last.
    std::optional<BootFile> kernel;
    std::optional<BootFile> initrd;
    std::string hints;  ///< For whoever starts the machine, such as a kernel command line.
    friend bool operator==(const BootManifest&, const BootManifest&) = default;
};

uint64_t pages_of(std::span<const PageRange> runs);

/// The pages that at least half of the traces have, by the median of how many pages come before
/// them, in merged runs; at most kMaxPrefetchRuns.
std::vector<PageRange> merge_traces(std::span<const BootTrace> traces);

/// Adds one, within the limits, and makes the list anew.
void add_trace(BootManifest& manifest, BootTrace trace, uint64_t now_ns);

/// The manifest keeps the limits (asserted).
std::vector<std::byte> encode(const BootManifest& manifest);
Result<BootManifest> decode(Bytes content);

}  // namespace stellarium::boot
