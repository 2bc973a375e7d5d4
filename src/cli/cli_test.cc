#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/export_target.h"
#include "cli/import_source.h"
#include "cli/output.h"
#include "cli/process.h"
#include "cli/progress.h"
#include "cli/qemu_source.h"

namespace stellarium::cli {
namespace {

using control::SparseExtent;
using control::SparseSource;

/// A folder of its own, removed at the end.
class Folder {
  public:
    Folder() {
        std::string pattern = testing::TempDir() + "/stl-XXXXXX";
        path_ = mkdtemp(pattern.data());
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    std::string file(const std::string& name) const { return path_ + "/" + name; }

  private:
    std::string path_;
};

void write_file(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

Bytes bytes(const std::string& text) {
    return bytes_of(std::string_view(text));
}

TEST(DetectFormat, GoesByContent) {
    using namespace std::string_literals;
    EXPECT_EQ(detect_format(bytes("QFI\xfb\0\0\0\3"s)), ImageFormat::kQcow2);
    EXPECT_EQ(detect_format(bytes("KDMV\1\0\0\0"s)), ImageFormat::kVmdk);
    EXPECT_EQ(detect_format(bytes("COWD"s)), ImageFormat::kVmdk);
    EXPECT_EQ(detect_format(bytes("# Disk DescriptorFile\nversion=1")), ImageFormat::kVmdk);
    EXPECT_EQ(detect_format(bytes("vhdxfile")), ImageFormat::kVhdx);
    EXPECT_EQ(detect_format(bytes("conectix\0\0"s)), ImageFormat::kVpc);
    EXPECT_EQ(detect_format(bytes(std::string(64, 'x') + "\x7f\x10\xda\xbe")), ImageFormat::kVdi);
    EXPECT_EQ(detect_format(bytes("QFI")), ImageFormat::kRaw);
    EXPECT_EQ(detect_format({}), ImageFormat::kRaw);
    EXPECT_EQ(detect_format(bytes(std::string(1024, '\0'))), ImageFormat::kRaw);
    for (const ImageFormat format : {ImageFormat::kRaw, ImageFormat::kQcow2, ImageFormat::kVpc}) {
        EXPECT_EQ(format_from_name(format_name(format)), format);
    }
    EXPECT_EQ(format_from_name("floppy"), std::nullopt);
}

TEST(DetectForeign, KnowsCompressedContentAndArchives) {
    using namespace std::string_literals;
    const auto what = [](const std::string& head) {
        const auto found = detect_foreign(bytes(head));
        return found ? std::string(found->what) : std::string();
    };
    EXPECT_EQ(what("\x1f\x8b\x08\0"s), "compressed with gzip");
    EXPECT_EQ(what("\xfd"
                   "7zXZ\0"s),
              "compressed with xz");
    EXPECT_EQ(what("\x28\xb5\x2f\xfd"), "compressed with zstd");
    EXPECT_EQ(what("BZh91AY&SY"), "compressed with bzip2");
    EXPECT_EQ(what(std::string(257, '\0') + "ustar"), "a tar archive");
    EXPECT_EQ(what("BZh"), "");
    EXPECT_EQ(what(std::string(1024, '\0')), "");
    EXPECT_EQ(what(""), "");
}

TEST(ImportSource, RefusesEmptyStreamsAndNames) {
    EXPECT_FALSE(open_import_source("", {}));
    const auto source = open_import_source("/dev/null", {});
    ASSERT_TRUE(source);
    const auto next = source->content->next();
    ASSERT_FALSE(next);
    EXPECT_EQ(next.error().code(), ErrorCode::kInvalidArgument);
    const auto allowed = open_import_source(
        "/dev/null", {.format = {}, .allow_backing = false, .allow_empty = true});
    ASSERT_TRUE(allowed);
    EXPECT_EQ(allowed->content->next().value(), std::nullopt);
}

TEST(AllZero, SeesEveryByte) {
    for (const size_t size :
         {size_t{0}, size_t{1}, size_t{15}, size_t{16}, size_t{17}, size_t{4096}}) {
        std::vector<std::byte> data(size);
        EXPECT_TRUE(all_zero(data));
        for (size_t i = 0; i < size; ++i) {
            data[i] = std::byte{1};
            EXPECT_FALSE(all_zero(data)) << size << ' ' << i;
            data[i] = std::byte{0};
        }
    }
}

TEST(CheckImageInfo, RefusesWhatRefersElsewhere) {
    EXPECT_TRUE(check_image_info(R"({"virtual-size": 5})", "x", false));
    const std::string backing = R"({"backing-filename": "/etc/passwd"})";
    const auto refused = check_image_info(backing, "x.qcow2", false);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(refused.error().message().find("/etc/passwd"), std::string::npos);
    EXPECT_TRUE(check_image_info(backing, "x.qcow2", true));
    EXPECT_FALSE(check_image_info(
        R"({"format-specific": {"type": "qcow2", "data": {"data-file": "/dev/sda"}}})", "x",
        false));
    EXPECT_FALSE(check_image_info(
        R"({"format-specific": {"data": {"extents": [{"filename": "/etc/shadow"}]}}})", "x",
        false));
    EXPECT_EQ(check_image_info(R"({"encrypted": true})", "x", true).error().code(),
              ErrorCode::kUnsupported);
    EXPECT_FALSE(check_image_info("not json", "x", false));
    EXPECT_FALSE(check_image_info("[]", "x", false));
    EXPECT_TRUE(check_image_info(R"({"format-specific": 7})", "x", false));
}

TEST(RawSource, NoticesAFileThatShrinksOrChanges) {
    const Folder folder;
    const std::string path = folder.file("x.raw");
    const std::string content(3 << 20, 'x');
    write_file(path, content);
    {
        auto source = open_import_source(path, {});
        ASSERT_TRUE(source);
        ASSERT_TRUE(source->content->next());
        ASSERT_EQ(truncate(path.c_str(), (1 << 20) + 100), 0);
        const auto next = source->content->next();
        ASSERT_FALSE(next);
        EXPECT_EQ(next.error().code(), ErrorCode::kBusy);
        EXPECT_NE(next.error().message().find("became shorter"), std::string::npos);
    }
    write_file(path, content);
    auto source = open_import_source(path, {});
    ASSERT_TRUE(source);
    ASSERT_TRUE(source->content->next());
    const timespec old_times[2] = {{.tv_sec = 1, .tv_nsec = 0}, {.tv_sec = 1, .tv_nsec = 0}};
    ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), old_times, 0), 0);
    while (true) {
        const auto next = source->content->next();
        if (!next) {
            EXPECT_EQ(next.error().code(), ErrorCode::kBusy);
            EXPECT_NE(next.error().message().find("changed while it was read"), std::string::npos);
            break;
        }
        ASSERT_TRUE(*next) << "the change was not noticed";
    }
}

/// Extents as they are given, or an error after them.
class ListSource final : public SparseSource {
  public:
    ListSource(std::vector<std::pair<uint64_t, std::string>> extents, uint64_t size)
        : extents_(std::move(extents)), size_(size) {}
    std::optional<uint64_t> size_hint() const override { return size_; }
    uint64_t size_bytes() const override { return size_; }
    Result<std::optional<SparseExtent>> next() override {
        if (at_ == extents_.size()) {
            if (broken_) {
                return fail(ErrorCode::kIo, "broken");
            }
            return std::nullopt;
        }
        const auto& [offset, text] = extents_[at_++];
        return SparseExtent{offset, bytes(text)};
    }
    void break_at_end() { broken_ = true; }

  private:
    std::vector<std::pair<uint64_t, std::string>> extents_;
    uint64_t size_;
    size_t at_ = 0;
    bool broken_ = false;
};

TEST(ExportTarget, AppearsWholeOrNotAtAll) {
    const Folder folder;
    const std::string path = folder.file("out");
    ListSource good({{3, "abc"}, {10, "d"}}, 20);
    auto target = ExportTarget::open(path, {.size_bytes = 20, .data_bytes = 4, .force = false});
    ASSERT_TRUE(target);
    EXPECT_FALSE(std::filesystem::exists(path));
    ASSERT_TRUE((*target)->write_all(good));
    using namespace std::string_literals;
    EXPECT_EQ(read_file(path), "\0\0\0abc\0\0\0\0d\0\0\0\0\0\0\0\0\0"s);

    ListSource bad({{0, "zzz"}}, 20);
    bad.break_at_end();
    target = ExportTarget::open(path, {.size_bytes = 20, .data_bytes = 4, .force = true});
    ASSERT_TRUE(target);
    EXPECT_FALSE((*target)->write_all(bad));
    target->reset();
    EXPECT_EQ(read_file(path)[3], 'a');
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.file("")), {}), 1);
}

TEST(ExportTarget, DoesNotReplaceAFileThatCameMeanwhile) {
    const Folder folder;
    const std::string path = folder.file("out");
    auto target = ExportTarget::open(path, {.size_bytes = 4, .data_bytes = 4, .force = false});
    ASSERT_TRUE(target);
    write_file(path, "precious");
    ListSource source({{0, "data"}}, 4);
    const auto written = (*target)->write_all(source);
    ASSERT_FALSE(written);
    EXPECT_EQ(written.error().code(), ErrorCode::kAlreadyExists);
    EXPECT_EQ(read_file(path), "precious");
}

TEST(ExportTarget, SizesAreCheckedBeforeAnythingIsWritten) {
    const Folder folder;
    const auto too_long = ExportTarget::open(
        folder.file("out"), {.size_bytes = uint64_t{1} << 60, .data_bytes = 0, .force = false});
    ASSERT_FALSE(too_long);
    EXPECT_EQ(too_long.error().code(), ErrorCode::kLimitExceeded);
    const auto too_much = ExportTarget::open(
        folder.file("out"),
        {.size_bytes = uint64_t{1} << 30, .data_bytes = uint64_t{1} << 60, .force = false});
    ASSERT_FALSE(too_much);
    EXPECT_EQ(too_much.error().code(), ErrorCode::kNoSpace);
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.file("")), {}), 0);
}

TEST(Table, IsAligned) {
    Table table({{"NAME"}, {"SIZE", Align::kRight}, {"NOTE"}});
    table.add({"a", "1.50 GiB", ""});
    table.add({"long-name", "7 B", "x"});
    EXPECT_EQ(table.text(),
              "NAME           SIZE  NOTE\n"
              "a          1.50 GiB\n"
              "long-name       7 B  x\n");
}

TEST(ProgressLine, SaysHowFarAndHowLong) {
    EXPECT_EQ(progress_line({.title = "importing x",
                             .total_bytes = uint64_t{4} << 30,
                             .position_bytes = uint64_t{1} << 30,
                             .data_bytes = uint64_t{512} << 20,
                             .seconds = 2,
                             .dedup_ratio = 1.5}),
              "importing x  [#####---------------]  25 %  512 MiB  256 MiB/s  ETA 0:06  dedup "
              "1.50");
    EXPECT_EQ(progress_line({.title = "importing x",
                             .total_bytes = {},
                             .position_bytes = 100,
                             .data_bytes = 100,
                             .seconds = 0,
                             .dedup_ratio = {}}),
              "importing x  100 B");
    EXPECT_EQ(progress_line({.title = "t",
                             .total_bytes = 0,
                             .position_bytes = 0,
                             .data_bytes = 0,
                             .seconds = 1,
                             .dedup_ratio = {}}),
              "t  0 B  0 B/s");
    ProgressState things{.title = "looking", .total_bytes = {}, .dedup_ratio = {}};
    things.seconds = 61;
    things.items.emplace(30, 40);
    EXPECT_EQ(progress_line(things), "looking  [###############-----]  75 %  1:01");
    things.items.emplace(30, 0);
    EXPECT_EQ(progress_line(things), "looking  1:01");
}

TEST(ExpandNames, PutsNumbersIn) {
    EXPECT_EQ(*expand_names("vm", 1), (std::vector<std::string>{"vm"}));
    EXPECT_EQ(*expand_names("vm-{n}", 1), (std::vector<std::string>{"vm-1"}));
    EXPECT_EQ(*expand_names("{n}-of-{n}", 3),
              (std::vector<std::string>{"1-of-1", "2-of-2", "3-of-3"}));
    EXPECT_FALSE(expand_names("vm", 2));
    EXPECT_FALSE(expand_names("vm-{n}", 0));
    EXPECT_FALSE(expand_names("vm-{n}", 100'001));
}

TEST(RunTool, GivesOutputAndTheToolsOwnWords) {
    EXPECT_EQ(*run_tool({"printf", "a b"}, "coreutils"), "a b");
    const auto failed = run_tool({"sh", "-c", "echo first >&2; echo second >&2; exit 3"}, "dash");
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().message(), "sh failed: first; second");
    const auto missing = run_tool({"no-such-tool-here"}, "some-package");
    ASSERT_FALSE(missing);
    EXPECT_EQ(missing.error().code(), ErrorCode::kUnavailable);
    EXPECT_NE(missing.error().message().find("some-package"), std::string::npos);
    // More than a pipe holds, on both streams.
    const auto large =
        run_tool({"sh", "-c", "head -c 300000 /dev/zero >&2; head -c 300000 /dev/zero"}, "dash");
    ASSERT_TRUE(large);
    EXPECT_EQ(large->size(), 300'000U);
}

}  // namespace
}  // namespace stellarium::cli
