#include "cli/import_source.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/stat.h>

#include "cli/file_handle.h"
#include "cli/interrupt.h"
#include "cli/qemu_source.h"

namespace stellarium::cli {
namespace {

using control::kMaxFrameBytes;
using control::SparseExtent;

struct FormatName {
    ImageFormat format;
    std::string_view name;
};
constexpr std::array<FormatName, 6> kFormats{{{ImageFormat::kRaw, "raw"},
                                              {ImageFormat::kQcow2, "qcow2"},
                                              {ImageFormat::kVmdk, "vmdk"},
                                              {ImageFormat::kVhdx, "vhdx"},
                                              {ImageFormat::kVdi, "vdi"},
                                              {ImageFormat::kVpc, "vpc"}}};

bool has_at(Bytes head, size_t offset, std::string_view magic) {
    return head.size() >= offset + magic.size() &&
           std::memcmp(head.data() + offset, magic.data(), magic.size()) == 0;
}

struct ForeignMagic {
    size_t offset;
    std::string_view magic;
    ForeignContent content;
};
using namespace std::string_view_literals;
constexpr std::array<ForeignMagic, 9> kForeign{
    {{0, "\x1f\x8b\x08"sv, {"compressed with gzip", "gzip -dc", "gzip -dc"}},
     {0,
      "\xfd"
      "7zXZ\0"sv,
      {"compressed with xz", "xz -dc", "xz -dc"}},
     {0, "\x28\xb5\x2f\xfd"sv, {"compressed with zstd", "zstd -dc", "zstd -dc"}},
     {4, "1AY&SY"sv, {"compressed with bzip2", "bzip2 -dc", "bzip2 -dc"}},
     {0, "\x04\x22\x4d\x18"sv, {"compressed with lz4", "lz4 -dc", "lz4 -dc"}},
     {0, "LZIP"sv, {"compressed with lzip", "lzip -dc", "lzip -dc"}},
     {0, "PK\x03\x04"sv, {"a zip archive", "funzip", "unzip -p"}},
     {0, "7z\xbc\xaf\x27\x1c"sv, {"a 7-Zip archive", {}, "7z x -so"}},
     {257, "ustar"sv, {"a tar archive", "tar -xO", "tar -xOf"}}}};

/// Of content that is read as raw because nobody said otherwise. `name` is the file's, or that of
/// the stream.
Result<void> check_foreign(Bytes head, const std::string& name, bool is_stream) {
    if (const std::optional<ForeignContent> foreign = detect_foreign(head)) {
        const std::string how =
            !is_stream ? fmt::format("{} {} | stellarctl image import NAME -", foreign->from, name)
            : foreign->through.empty()
                ? std::string("unpack it first")
                : fmt::format("... | {} | stellarctl image import NAME -", foreign->through);
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} is {}, and no disk image: {}; --format raw takes it as it is",
                                name, foreign->what, how));
    }
    if (const ImageFormat format = detect_format(head); is_stream && format != ImageFormat::kRaw) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} is a {} image, which can only be read from a file: save it, "
                                "and import the file; --format raw takes the bytes as they are",
                                name, format_name(format)));
    }
    return {};
}

/// A file or block device whose size is known; holes are skipped without reading them.
class RawFileSource final : public control::SparseSource {
  public:
    static Result<std::unique_ptr<control::SparseSource>> open(FileHandle file, std::string path) {
        auto source =
            std::unique_ptr<RawFileSource>(new RawFileSource(std::move(file), std::move(path)));
        if (fstat(source->file_.get(), &source->before_) != 0) {
            return std::unexpected(Error::from_errno(errno, "look at " + source->path_));
        }
        const off_t size = lseek(source->file_.get(), 0, SEEK_END);
        if (size < 0) {
            return std::unexpected(Error::from_errno(errno, "find the size of " + source->path_));
        }
        source->size_bytes_ = static_cast<uint64_t>(size);
        posix_fadvise(source->file_.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
        return source;
    }

    std::optional<uint64_t> size_hint() const override { return size_bytes_; }
    uint64_t size_bytes() const override { return size_bytes_; }

    Result<std::optional<SparseExtent>> next() override {
        while (true) {
            if (position_ == data_end_) {
                STELLARIUM_ASSIGN(const bool more, find_data());
                if (!more) {
                    STELLARIUM_TRY(check_unchanged());
                    return std::nullopt;
                }
            }
            // Whole MiBs of the file, so that frames and pages stay aligned.
            const uint64_t end =
                std::min(data_end_, position_ / kMaxFrameBytes * kMaxFrameBytes + kMaxFrameBytes);
            const MutableBytes data =
                MutableBytes(buffer_).first(static_cast<size_t>(end - position_));
            STELLARIUM_ASSIGN(const size_t got, read_fully(file_.get(), data,
                                                           static_cast<int64_t>(position_), path_));
            if (got != data.size()) {
                return fail(ErrorCode::kBusy,
                            fmt::format("{} became shorter while it was read (it ends at byte {}, "
                                        "and had {}); nothing was imported",
                                        path_, position_ + got, size_bytes_));
            }
            const uint64_t offset = position_;
            position_ = end;
            if (!all_zero(data)) {
                return SparseExtent{offset, data};
            }
        }
    }

  private:
    RawFileSource(FileHandle file, std::string path)
        : file_(std::move(file)), path_(std::move(path)), buffer_(kMaxFrameBytes) {}

    /// Moves to the next range of data; false at the end.
    Result<bool> find_data() {
        if (position_ >= size_bytes_) {
            return false;
        }
        const off_t data = lseek(file_.get(), static_cast<off_t>(position_), SEEK_DATA);
        if (data < 0) {
            if (errno == ENXIO) {
                return false;
            }
            // No hole tracking (block devices, some file systems): all of it is data.
            data_end_ = size_bytes_;
            return true;
        }
        const off_t hole = lseek(file_.get(), data, SEEK_HOLE);
        if (hole < 0) {
            return std::unexpected(Error::from_errno(errno, "find the holes of " + path_));
        }
        position_ = std::min(static_cast<uint64_t>(data), size_bytes_);
        data_end_ = std::min(static_cast<uint64_t>(hole), size_bytes_);
        return position_ < data_end_;
    }

    Result<void> check_unchanged() const {
        struct stat after{};
        if (fstat(file_.get(), &after) != 0) {
            return std::unexpected(Error::from_errno(errno, "look at " + path_));
        }
        if (S_ISREG(after.st_mode) &&
            (after.st_size != before_.st_size || after.st_mtim.tv_sec != before_.st_mtim.tv_sec ||
             after.st_mtim.tv_nsec != before_.st_mtim.tv_nsec)) {
            return fail(ErrorCode::kBusy,
                        fmt::format("{} changed while it was read; nothing was imported", path_));
        }
        return {};
    }

    FileHandle file_;
    std::string path_;
    struct stat before_{};
    std::vector<std::byte> buffer_;
    uint64_t size_bytes_ = 0;
    uint64_t position_ = 0;
    uint64_t data_end_ = 0;
};

/// Opens a named pipe. To wait for somebody who writes to it, which open() does in a way that an
/// interruption just before is not seen, is left to poll().
Result<FileHandle> open_pipe(const std::string& path) {
    constexpr int kLookEveryMs = 100;
    FileHandle file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (file.get() < 0) {
        return std::unexpected(Error::from_errno(errno, "open " + path));
    }
    pollfd waiting{.fd = file.get(), .events = POLLIN, .revents = 0};
    while (true) {
        STELLARIUM_TRY(check_interrupt());
        const int ready = poll(&waiting, 1, kLookEveryMs);
        if (ready > 0) {
            break;
        }
        if (ready < 0 && errno != EINTR) {
            return std::unexpected(Error::from_errno(errno, "wait for " + path));
        }
    }
    if (fcntl(file.get(), F_SETFL, O_RDONLY) != 0) {
        return std::unexpected(Error::from_errno(errno, "open " + path));
    }
    return file;
}

/// Opens what is to be imported.
Result<FileHandle> open_file(const std::string& path) {
    struct stat status{};
    if (path != "-" && stat(path.c_str(), &status) == 0 && S_ISFIFO(status.st_mode) &&
        !path.starts_with("/dev/fd/") && !path.starts_with("/proc/")) {
        return open_pipe(path);
    }
    FileHandle file(path == "-" ? fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0)
                                : open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) {
        return std::unexpected(
            Error::from_errno(errno, path == "-" ? "open standard input" : "open " + path));
    }
    return file;
}

Error empty_stream(const std::string& name) {
    return {ErrorCode::kInvalidArgument,
            fmt::format("{} is empty, so nothing was imported: most likely the command before the "
                        "pipe failed; --allow-empty makes an image of 0 bytes",
                        name)};
}

/// A pipe: as many bytes as come.
class StreamSource final : public control::SparseSource {
  public:
    StreamSource(FileHandle file, std::string name, const ImportSourceOptions& options)
        : file_(std::move(file)),
          name_(std::move(name)),
          options_(options),
          buffer_(kMaxFrameBytes) {}

    std::optional<uint64_t> size_hint() const override { return std::nullopt; }
    uint64_t size_bytes() const override { return position_; }

    Result<std::optional<SparseExtent>> next() override {
        while (true) {
            STELLARIUM_ASSIGN(const size_t got, read_fully(file_.get(), buffer_, -1, name_));
            if (position_ == 0) {
                STELLARIUM_TRY(check_begin(Bytes(buffer_).first(std::min(got, kDetectBytes))));
            }
            if (got == 0) {
                return std::nullopt;
            }
            const uint64_t offset = position_;
            position_ += got;
            const Bytes data = Bytes(buffer_).first(got);
            if (!all_zero(data)) {
                return SparseExtent{offset, data};
            }
        }
    }

  private:
    Result<void> check_begin(Bytes head) const {
        if (head.empty() && !options_.allow_empty) {
            return std::unexpected(empty_stream(name_));
        }
        return options_.format ? Result<void>() : check_foreign(head, name_, true);
    }

    FileHandle file_;
    std::string name_;
    ImportSourceOptions options_;
    std::vector<std::byte> buffer_;
    uint64_t position_ = 0;
};

}  // namespace

bool all_zero(Bytes bytes) {
    // The first 16 bytes by hand, the rest by comparing the buffer with itself, shifted: memcmp
    // stops at the first byte that differs and runs at memory speed.
    const size_t head = std::min<size_t>(bytes.size(), 16);
    for (size_t i = 0; i < head; ++i) {
        if (bytes[i] != std::byte{0}) {
            return false;
        }
    }
    return bytes.size() <= head ||
           std::memcmp(bytes.data(), bytes.data() + head, bytes.size() - head) == 0;
}

std::string_view format_name(ImageFormat format) {
    return kFormats[static_cast<size_t>(format)].name;
}

std::optional<ImageFormat> format_from_name(std::string_view name) {
    for (const FormatName& entry : kFormats) {
        if (entry.name == name) {
            return entry.format;
        }
    }
    return std::nullopt;
}

ImageFormat detect_format(Bytes head) {
    using namespace std::string_view_literals;
    if (has_at(head, 0, "QFI\xfb"sv)) {
        return ImageFormat::kQcow2;
    }
    if (has_at(head, 0, "KDMV"sv) || has_at(head, 0, "COWD"sv) ||
        has_at(head, 0, "# Disk DescriptorFile"sv)) {
        return ImageFormat::kVmdk;
    }
    if (has_at(head, 0, "vhdxfile"sv)) {
        return ImageFormat::kVhdx;
    }
    if (has_at(head, 64, "\x7f\x10\xda\xbe"sv)) {
        return ImageFormat::kVdi;
    }
    if (has_at(head, 0, "conectix"sv)) {
        return ImageFormat::kVpc;
    }
    return ImageFormat::kRaw;
}

std::optional<ForeignContent> detect_foreign(Bytes head) {
    const auto* const found = std::ranges::find_if(kForeign, [&](const ForeignMagic& foreign) {
        return has_at(head, foreign.offset, foreign.magic);
    });
    return found == kForeign.end() ? std::nullopt : std::optional(found->content);
}

Result<ImportSource> open_import_source(const std::string& path,
                                        const ImportSourceOptions& options) {
    ImportSource source;
    if (path.empty()) {
        return fail(ErrorCode::kInvalidArgument,
                    "the file to import has an empty name; '-' is standard input");
    }
    const bool is_stdin = path == "-";
    const std::string name = is_stdin ? "standard input" : path;
    STELLARIUM_ASSIGN(FileHandle file, open_file(path));
    struct stat status{};
    if (fstat(file.get(), &status) != 0) {
        return std::unexpected(Error::from_errno(errno, "look at " + name));
    }
    if (S_ISDIR(status.st_mode)) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("{} is a directory", name));
    }
    const bool has_size = S_ISREG(status.st_mode) || S_ISBLK(status.st_mode);
    if (is_stdin && options.format.value_or(ImageFormat::kRaw) != ImageFormat::kRaw) {
        return fail(ErrorCode::kInvalidArgument,
                    "standard input is read as raw; other formats need a file");
    }
    if (is_stdin || !has_size) {
        // A redirected file is read from its start to its end, holes and all, when it can be.
        if (S_ISREG(status.st_mode) && lseek(file.get(), 0, SEEK_CUR) == 0) {
            if (status.st_size == 0 && !options.allow_empty) {
                return std::unexpected(empty_stream(name));
            }
            if (!options.format) {
                std::array<std::byte, kDetectBytes> head{};
                STELLARIUM_ASSIGN(const size_t got, read_fully(file.get(), head, 0, name));
                STELLARIUM_TRY(check_foreign(Bytes(head).first(got), name, true));
            }
            STELLARIUM_ASSIGN(source.content, RawFileSource::open(std::move(file), name));
            return source;
        }
        if (isatty(file.get()) == 1) {
            return fail(ErrorCode::kInvalidArgument,
                        "standard input is a terminal; pipe or redirect a disk image into it");
        }
        source.content = std::make_unique<StreamSource>(std::move(file), name, options);
        return source;
    }
    std::array<std::byte, kDetectBytes> head{};
    STELLARIUM_ASSIGN(const size_t got, read_fully(file.get(), head, 0, name));
    source.format = options.format.value_or(detect_format(Bytes(head).first(got)));
    if (source.format == ImageFormat::kRaw) {
        if (!options.format) {
            STELLARIUM_TRY(check_foreign(Bytes(head).first(got), name, false));
        }
        STELLARIUM_ASSIGN(source.content, RawFileSource::open(std::move(file), name));
        return source;
    }
    STELLARIUM_ASSIGN(source.content, open_qemu_source(path, source.format, options.allow_backing));
    return source;
}

}  // namespace stellarium::cli
