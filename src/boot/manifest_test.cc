// Boot manifests: how traces merge, and their bytes against docs/formats/boot-manifest.md.
#include "boot/manifest.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "boot/format.h"
#include "boot/limits.h"

namespace stellarium::boot {
namespace {

BootTrace trace_of(std::vector<PageRange> runs, uint64_t recorded_ns = 1) {
    return {.recorded_ns = recorded_ns, .cut = false, .runs = std::move(runs)};
}

Hash256 hash_of(uint8_t byte) {
    Hash256 hash;
    hash.bytes.fill(byte);
    return hash;
}

BootManifest sample() {
    BootManifest manifest;
    manifest.root = hash_of(0x11);
    manifest.size_bytes = uint64_t{1} << 30;
    add_trace(manifest, trace_of({{.page = 0, .pages = 1}, {.page = 513, .pages = 2}}, 5),
              1'700'000'000'000'000'000);
    manifest.kernel = BootFile{.root = hash_of(0x22), .size_bytes = 7'000'000};
    manifest.hints = "console=ttyS0";
    return manifest;
}

TEST(MergeTraces, OneTraceIsTheList) {
    const std::vector<PageRange> runs{
        {.page = 9, .pages = 3}, {.page = 0, .pages = 1}, {.page = 4, .pages = 2}};
    EXPECT_EQ(merge_traces(std::vector{trace_of(runs)}), runs);
    EXPECT_TRUE(merge_traces({}).empty());
}

TEST(MergeTraces, PagesOfAtLeastHalfOfTheTracesStay) {
    const std::vector<BootTrace> traces{
        trace_of({{.page = 10, .pages = 4}, {.page = 100, .pages = 1}}),
        trace_of({{.page = 12, .pages = 4}, {.page = 200, .pages = 1}}),
        trace_of({{.page = 12, .pages = 2}, {.page = 300, .pages = 1}})};
    EXPECT_EQ(merge_traces(traces), (std::vector<PageRange>{{.page = 12, .pages = 2}}))
        << "10, 11, 14, 15 and the rest come in one of three";
    // Of two, one is half.
    EXPECT_EQ(pages_of(merge_traces(std::span(traces).first(2))), 8U);
}

TEST(MergeTraces, TheMedianTellsTheOrder) {
    // Page 50 comes first in two of three boots, and last in one.
    const std::vector<BootTrace> traces{
        trace_of({{.page = 50, .pages = 1}, {.page = 10, .pages = 5}}),
        trace_of({{.page = 10, .pages = 5}, {.page = 50, .pages = 1}}),
        trace_of({{.page = 50, .pages = 1}, {.page = 10, .pages = 5}})};
    EXPECT_EQ(merge_traces(traces),
              (std::vector<PageRange>{{.page = 50, .pages = 1}, {.page = 10, .pages = 5}}));
}

TEST(MergeTraces, RunsAreMergedAcrossTheirBordersInATrace) {
    const std::vector<BootTrace> traces{
        trace_of({{.page = 10, .pages = 2}, {.page = 90, .pages = 1}}),
        trace_of({{.page = 10, .pages = 1}, {.page = 11, .pages = 1}, {.page = 90, .pages = 1}})};
    EXPECT_EQ(merge_traces(traces),
              (std::vector<PageRange>{{.page = 10, .pages = 2}, {.page = 90, .pages = 1}}));
}

TEST(MergeTraces, TheListIsBounded) {
    std::vector<BootTrace> traces(3);
    for (uint64_t i = 0; i < kMaxTraceRuns; ++i) {
        for (uint64_t each = 0; each < traces.size(); ++each) {
            // Every page is in two of the three.
            traces[each].runs.push_back({.page = (i * 3 + each) * 4, .pages = 1});
            traces[each].runs.push_back({.page = (i * 3 + (each + 1) % 3) * 4, .pages = 1});
        }
    }
    EXPECT_EQ(merge_traces(traces).size(), kMaxPrefetchRuns);
}

TEST(BootManifest, KeepsTheLastTracesAndCountsAll) {
    BootManifest manifest;
    manifest.root = hash_of(1);
    for (uint64_t i = 0; i < kMaxTraces + 3; ++i) {
        add_trace(manifest, trace_of({{.page = i * 10, .pages = 1}, {.page = 1000, .pages = 2}}, i),
                  100 + i);
    }
    EXPECT_EQ(manifest.traces.size(), kMaxTraces);
    EXPECT_EQ(manifest.traces.front().recorded_ns, 3U);
    EXPECT_EQ(manifest.traces.back().recorded_ns, kMaxTraces + 2);
    EXPECT_EQ(manifest.merged_traces, kMaxTraces + 3);
    EXPECT_EQ(manifest.created_ns, 100U);
    EXPECT_EQ(manifest.updated_ns, 100 + kMaxTraces + 2);
    EXPECT_EQ(manifest.prefetch, (std::vector<PageRange>{{.page = 1000, .pages = 2}}));
}

TEST(BootManifest, ComesBackAsItWas) {
    BootManifest manifest = sample();
    manifest.initrd = BootFile{.root = hash_of(3), .size_bytes = 1};
    BootTrace cut = trace_of({{.page = nova::kMaxPages - 1, .pages = 1}});
    cut.cut = true;
    add_trace(manifest, cut, 9);
    const auto decoded = decode(encode(manifest));
    ASSERT_TRUE(decoded) << decoded.error().message();
    EXPECT_EQ(*decoded, manifest);
}

TEST(BootManifest, TheLargestFitsTheStore) {
    BootManifest manifest = sample();
    manifest.hints.assign(kMaxHintsBytes, 'x');
    manifest.prefetch.assign(kMaxPrefetchRuns, {.page = 1, .pages = 1});
    BootTrace trace;
    trace.runs.assign(kMaxTraceRuns, {.page = 1, .pages = 1});
    manifest.traces.assign(kMaxTraces, trace);
    const std::vector<std::byte> bytes = encode(manifest);
    EXPECT_LE(bytes.size(), nova::kMaxBootManifestBytes);
    ASSERT_TRUE(decode(bytes));
    // One more of anything is refused.
    trace.runs.push_back({.page = 9, .pages = 1});
    manifest.prefetch.push_back({.page = 9, .pages = 1});
    std::vector<std::byte> more = bytes;
    const auto set = [&](size_t offset, const auto& value) {
        std::ranges::copy(bytes_of(value), more.begin() + static_cast<std::ptrdiff_t>(offset));
    };
    set(offsetof(format::Manifest, run_count), U32Le(kMaxPrefetchRuns + 1));
    EXPECT_FALSE(decode(more));
}

TEST(BootManifest, NothingThatIsCutOffOrLongerIsTaken) {
    const std::vector<std::byte> bytes = encode(sample());
    for (size_t length = 0; length < bytes.size(); ++length) {
        const auto decoded = decode(Bytes(bytes).first(length));
        ASSERT_FALSE(decoded) << length;
        EXPECT_EQ(decoded.error().code(), ErrorCode::kCorrupt) << length;
    }
    std::vector<std::byte> longer = bytes;
    longer.push_back(std::byte{0});
    EXPECT_FALSE(decode(longer));
}

TEST(BootManifest, WhatIsOutOfRangeIsRefused) {
    const std::vector<std::byte> bytes = encode(sample());
    struct Change {
        const char* what;
        size_t offset;
        std::vector<uint8_t> to;
        ErrorCode code = ErrorCode::kCorrupt;
    };
    const size_t runs = sizeof(format::Manifest) + sample().hints.size();
    const size_t trace = runs + 2 * sizeof(format::Run);
    const std::vector<Change> changes{
        {"magic", 0, {'X'}},
        {"version 0", offsetof(format::Manifest, read_version), {0, 0}},
        {"a newer version",
         offsetof(format::Manifest, read_version),
         {2, 0, 2, 0},
         ErrorCode::kUnsupported},
        {"a newer version to write",
         offsetof(format::Manifest, write_version),
         {2, 0},
         ErrorCode::kUnsupported},
        {"root", offsetof(format::Manifest, root), std::vector<uint8_t>(32, 0)},
        {"size", offsetof(format::Manifest, size_bytes) + 7, {0xff}},
        {"reserved", offsetof(format::Manifest, reserved), {1}},
        {"traces", offsetof(format::Manifest, trace_count), {kMaxTraces + 1}},
        {"hints", offsetof(format::Manifest, hints_bytes), {0xff, 0xff}},
        {"a file of a size without content", offsetof(format::Manifest, initrd) + 32, {1}},
        {"a run of no pages", runs + 5, {0, 0, 0}},
        {"a run beyond every volume", runs, {0xff, 0xff, 0xff, 0xff, 0xff}},
        {"a run that is too long", runs + 5, {0xff, 0xff, 0xff}},
        {"a trace's flag", trace + offsetof(format::Trace, cut), {2}},
        {"a trace's reserved bytes", trace + offsetof(format::Trace, reserved), {0, 0, 1}},
        {"a trace that is too long", trace + sizeof(format::Trace) + 5, {1, 0, 4}},
    };
    for (const Change& change : changes) {
        std::vector<std::byte> changed = bytes;
        for (size_t i = 0; i < change.to.size(); ++i) {
            changed[change.offset + i] = static_cast<std::byte>(change.to[i]);
        }
        const auto decoded = decode(changed);
        ASSERT_FALSE(decoded) << change.what;
        EXPECT_EQ(decoded.error().code(), change.code)
            << change.what << ": " << decoded.error().message();
    }
}

// --- The page ------------------------------------------------------------------------------------

class Page {
  public:
    Page() {
        std::ifstream file(STELLARIUM_SOURCE_DIR "/docs/formats/boot-manifest.md");
        std::string heading;
        for (std::string line; std::getline(file, line);) {
            if (line.starts_with("## ") || line.starts_with("### ")) {
                heading = line.substr(line.find(' ') + 1);
            } else {
                sections_[heading].push_back(line);
            }
        }
    }
    const std::vector<std::string>& lines(const std::string& heading) {
        EXPECT_TRUE(sections_.contains(heading)) << heading;
        return sections_[heading];
    }

  private:
    std::map<std::string, std::vector<std::string>> sections_;
};

struct Field {
    std::string name;
    size_t offset;
    size_t size;
};

#define STELLARIUM_FIELD(Struct, field)                        \
    Field {                                                    \
        #field, offsetof(Struct, field), sizeof(Struct::field) \
    }

void expect_struct(Page& page, const std::string& name, size_t size,
                   const std::vector<Field>& fields) {
    std::vector<std::string> rows;
    for (const std::string& line : page.lines(fmt::format("`{}` ({} bytes)", name, size))) {
        if (line.starts_with("| ") && !line.starts_with("| offset") && !line.starts_with("| ---")) {
            rows.push_back(line);
        }
    }
    ASSERT_EQ(rows.size(), fields.size()) << name;
    for (size_t i = 0; i < fields.size(); ++i) {
        const std::string start =
            fmt::format("| {} | {} | `{}` |", fields[i].offset, fields[i].size, fields[i].name);
        EXPECT_TRUE(rows[i].starts_with(start)) << rows[i] << " instead of " << start;
    }
}

TEST(BootManifestFormatPage, StructsAreAsDocumented) {
    Page page;
    expect_struct(
        page, "Manifest", sizeof(format::Manifest),
        {STELLARIUM_FIELD(format::Manifest, magic),
         STELLARIUM_FIELD(format::Manifest, read_version),
         STELLARIUM_FIELD(format::Manifest, write_version),
         STELLARIUM_FIELD(format::Manifest, merged_traces),
         STELLARIUM_FIELD(format::Manifest, root), STELLARIUM_FIELD(format::Manifest, size_bytes),
         STELLARIUM_FIELD(format::Manifest, created_ns),
         STELLARIUM_FIELD(format::Manifest, updated_ns),
         STELLARIUM_FIELD(format::Manifest, run_count),
         STELLARIUM_FIELD(format::Manifest, hints_bytes),
         STELLARIUM_FIELD(format::Manifest, trace_count),
         STELLARIUM_FIELD(format::Manifest, reserved), STELLARIUM_FIELD(format::Manifest, kernel),
         STELLARIUM_FIELD(format::Manifest, initrd)});
    expect_struct(
        page, "File", sizeof(format::File),
        {STELLARIUM_FIELD(format::File, root), STELLARIUM_FIELD(format::File, size_bytes)});
    expect_struct(page, "Run", sizeof(format::Run),
                  {STELLARIUM_FIELD(format::Run, page), STELLARIUM_FIELD(format::Run, pages)});
    expect_struct(
        page, "Trace", sizeof(format::Trace),
        {STELLARIUM_FIELD(format::Trace, recorded_ns), STELLARIUM_FIELD(format::Trace, run_count),
         STELLARIUM_FIELD(format::Trace, cut), STELLARIUM_FIELD(format::Trace, reserved)});
}

TEST(BootManifestFormatPage, TheDumpIsWhatIsWritten) {
    Page page;
    std::vector<std::byte> dumped;
    bool inside = false;
    for (const std::string& line : page.lines("Example")) {
        if (line.starts_with("```")) {
            inside = !inside;
        } else if (inside) {
            std::istringstream stream(line.substr(4));
            for (std::string digits; stream >> digits;) {
                dumped.push_back(static_cast<std::byte>(std::stoul(digits, nullptr, 16)));
            }
        }
    }
    const std::vector<std::byte> written = encode(sample());
    std::string text;
    for (size_t i = 0; i < written.size(); ++i) {
        text += i % 16 == 0 ? fmt::format("\n{:04x}", i) : std::string();
        text += fmt::format(" {:02x}", static_cast<unsigned>(written[i]));
    }
    EXPECT_EQ(dumped, written) << "written now:" << text;
}

}  // namespace
}  // namespace stellarium::boot
