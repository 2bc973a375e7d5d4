#include "boot/manifest.h"

#include <algorithm>
#include <cassert>

#include <fmt/format.h>

#include "boot/format.h"
#include "boot/limits.h"

namespace stellarium::boot {
namespace {

template <typename Struct>
void put(std::vector<std::byte>& out, const Struct& value) {
    append_bytes(out, bytes_of(value));
}

void put_runs(std::vector<std::byte>& out, std::span<const PageRange> runs) {
    for (const PageRange& run : runs) {
        format::Run packed{};
        packed.page = run.page;
        packed.pages = static_cast<uint32_t>(run.pages);
        put(out, packed);
    }
}

format::File to_format(const std::optional<BootFile>& file) {
    format::File packed{};
    if (file) {
        packed.root = file->root;
        packed.size_bytes = file->size_bytes;
    }
    return packed;
}

/// Takes structs from the front of a manifest's bytes.
class Parser {
  public:
    explicit Parser(Bytes bytes) : rest_(bytes) {}

    std::unexpected<Error> bad(std::string_view why) const {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("boot manifest, {} bytes before its end: {}", rest_.size(), why));
    }
    Result<Bytes> take(size_t count) {
        if (rest_.size() < count) {
            return bad("it ends early");
        }
        const Bytes bytes = rest_.first(count);
        rest_ = rest_.subspan(count);
        return bytes;
    }
    template <typename Struct>
    Result<Struct> get() {
        STELLARIUM_ASSIGN(const Bytes bytes, take(sizeof(Struct)));
        return load<Struct>(bytes);
    }
    Result<std::vector<PageRange>> runs(size_t count, size_t most) {
        if (count > most || count > rest_.size() / sizeof(format::Run)) {
            return bad(fmt::format("{} runs are too many", count));
        }
        std::vector<PageRange> runs;
        runs.reserve(count);
        uint64_t pages = 0;
        for (size_t i = 0; i < count; ++i) {
            STELLARIUM_ASSIGN(const auto packed, get<format::Run>());
            const PageRange run{.page = packed.page, .pages = packed.pages};
            pages += run.pages;
            if (run.pages == 0 || run.page > nova::kMaxPages - run.pages ||
                pages > kMaxTraces * kMaxTracePages) {
                return bad(fmt::format("run {} of {} pages from {} is out of range", i, run.pages,
                                       run.page));
            }
            runs.push_back(run);
        }
        return runs;
    }
    Result<std::optional<BootFile>> file(const format::File& packed) const {
        if (packed.root == Hash256{}) {
            if (packed.size_bytes != 0) {
                return bad("a file without content has a size");
            }
            return std::nullopt;
        }
        if (packed.size_bytes > nova::kMaxVolumeBytes) {
            return bad("the size of a file is out of range");
        }
        return BootFile{.root = packed.root, .size_bytes = packed.size_bytes};
    }
    bool at_end() const { return rest_.empty(); }

  private:
    Bytes rest_;
};

/// Where a page comes in one trace.
struct Touch {
    uint64_t page = 0;
    uint64_t position = 0;
};

}  // namespace

uint64_t pages_of(std::span<const PageRange> runs) {
    uint64_t pages = 0;
    for (const PageRange& run : runs) {
        pages += run.pages;
    }
    return pages;
}

std::vector<PageRange> merge_traces(std::span<const BootTrace> traces) {
    std::vector<Touch> touches;
    for (const BootTrace& trace : traces) {
        uint64_t position = 0;
        for (const PageRange& run : trace.runs) {
            for (uint64_t i = 0; i < run.pages; ++i) {
                touches.push_back({.page = run.page + i, .position = position++});
            }
        }
    }
    std::ranges::sort(touches, [](const Touch& a, const Touch& b) {
        return std::pair(a.page, a.position) < std::pair(b.page, b.position);
    });
    std::vector<Touch> medians;
    for (size_t i = 0; i < touches.size();) {
        size_t end = i + 1;
        while (end < touches.size() && touches[end].page == touches[i].page) {
            ++end;
        }
        if ((end - i) * 2 >= traces.size()) {
            medians.push_back(touches[i + (end - i - 1) / 2]);
        }
        i = end;
    }
    std::ranges::sort(medians, [](const Touch& a, const Touch& b) {
        return std::pair(a.position, a.page) < std::pair(b.position, b.page);
    });
    std::vector<PageRange> runs;
    for (const Touch& touch : medians) {
        if (!runs.empty() && runs.back().page + runs.back().pages == touch.page) {
            ++runs.back().pages;
        } else if (runs.size() == kMaxPrefetchRuns) {
            break;
        } else {
            runs.push_back({.page = touch.page, .pages = 1});
        }
    }
    return runs;
}

void add_trace(BootManifest& manifest, BootTrace trace, uint64_t now_ns) {
    manifest.traces.push_back(std::move(trace));
    if (manifest.traces.size() > kMaxTraces) {
        manifest.traces.erase(manifest.traces.begin());
    }
    if (manifest.merged_traces != UINT32_MAX) {
        ++manifest.merged_traces;
    }
    if (manifest.created_ns == 0) {
        manifest.created_ns = now_ns;
    }
    manifest.updated_ns = now_ns;
    manifest.prefetch = merge_traces(manifest.traces);
}

std::vector<std::byte> encode(const BootManifest& manifest) {
    assert(manifest.prefetch.size() <= kMaxPrefetchRuns && manifest.traces.size() <= kMaxTraces &&
           manifest.hints.size() <= kMaxHintsBytes);
    format::Manifest head{};
    head.magic = format::kManifestMagic;
    head.read_version = static_cast<uint16_t>(format::kManifestVersion);
    head.write_version = static_cast<uint16_t>(format::kManifestVersion);
    head.merged_traces = manifest.merged_traces;
    head.root = manifest.root;
    head.size_bytes = manifest.size_bytes;
    head.created_ns = manifest.created_ns;
    head.updated_ns = manifest.updated_ns;
    head.run_count = static_cast<uint32_t>(manifest.prefetch.size());
    head.hints_bytes = static_cast<uint16_t>(manifest.hints.size());
    head.trace_count = static_cast<uint8_t>(manifest.traces.size());
    head.kernel = to_format(manifest.kernel);
    head.initrd = to_format(manifest.initrd);
    std::vector<std::byte> out;
    put(out, head);
    append_bytes(out, bytes_of(std::string_view(manifest.hints)));
    put_runs(out, manifest.prefetch);
    for (const BootTrace& trace : manifest.traces) {
        assert(trace.runs.size() <= kMaxTraceRuns);
        format::Trace packed{};
        packed.recorded_ns = trace.recorded_ns;
        packed.run_count = static_cast<uint32_t>(trace.runs.size());
        packed.cut = static_cast<uint8_t>(trace.cut ? 1 : 0);
        put(out, packed);
        put_runs(out, trace.runs);
    }
    return out;
}

Result<BootManifest> decode(Bytes content) {
    Parser in(content);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Manifest>());
    if (head.magic != format::kManifestMagic) {
        return in.bad("it does not begin as one");
    }
    if (head.read_version > format::kManifestVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("the boot manifest has format {}, and this version reads up to {}: "
                                "use a newer version, or remove it (stellarctl boot rm)",
                                head.read_version.get(), format::kManifestVersion));
    }
    if (head.read_version == 0 || head.write_version < head.read_version ||
        head.root == Hash256{} || head.size_bytes > nova::kMaxVolumeBytes || head.reserved != 0 ||
        head.hints_bytes > kMaxHintsBytes || head.trace_count > kMaxTraces) {
        return in.bad("versions, root, size, counts or reserved bytes are out of range");
    }
    if (head.write_version > format::kManifestVersion) {
        return fail(ErrorCode::kUnsupported,
                    "the boot manifest is of a newer version, which keeps more in it: use that "
                    "version, or remove it (stellarctl boot rm)");
    }
    BootManifest manifest{.root = head.root,
                          .size_bytes = head.size_bytes,
                          .created_ns = head.created_ns,
                          .updated_ns = head.updated_ns,
                          .merged_traces = head.merged_traces,
                          .prefetch = {},
                          .traces = {},
                          .kernel = {},
                          .initrd = {},
                          .hints = {}};
    STELLARIUM_ASSIGN(manifest.kernel, in.file(head.kernel));
    STELLARIUM_ASSIGN(manifest.initrd, in.file(head.initrd));
    STELLARIUM_ASSIGN(const Bytes hints, in.take(head.hints_bytes));
    for (const std::byte letter : hints) {
        manifest.hints += static_cast<char>(letter);
    }
    STELLARIUM_ASSIGN(manifest.prefetch, in.runs(head.run_count, kMaxPrefetchRuns));
    for (uint32_t i = 0; i < head.trace_count; ++i) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::Trace>());
        if (packed.cut > 1 || packed.reserved != std::array<uint8_t, 3>{}) {
            return in.bad("a trace's flag or reserved bytes are out of range");
        }
        BootTrace trace{.recorded_ns = packed.recorded_ns, .cut = packed.cut != 0, .runs = {}};
        STELLARIUM_ASSIGN(trace.runs, in.runs(packed.run_count, kMaxTraceRuns));
        if (pages_of(trace.runs) > kMaxTracePages) {
            return in.bad(fmt::format("trace {} has too many pages", i));
        }
        manifest.traces.push_back(std::move(trace));
    }
    if (!in.at_end()) {
        return in.bad("something follows its end");
    }
    return manifest;
}

}  // namespace stellarium::boot
