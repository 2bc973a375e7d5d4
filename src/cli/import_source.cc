#include "cli/import_source.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
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

/// A pipe: as many bytes as come.
class StreamSource final : public control::SparseSource {
  public:
    StreamSource(FileHandle file, std::string name)
        : file_(std::move(file)), name_(std::move(name)), buffer_(kMaxFrameBytes) {}

    std::optional<uint64_t> size_hint() const override { return std::nullopt; }
    uint64_t size_bytes() const override { return position_; }

    Result<std::optional<SparseExtent>> next() override {
        while (true) {
            STELLARIUM_ASSIGN(const size_t got, read_fully(file_.get(), buffer_, -1, name_));
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
    FileHandle file_;
    std::string name_;
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

Result<ImportSource> open_import_source(const std::string& path,
                                        const ImportSourceOptions& options) {
    ImportSource source;
    const bool is_stdin = path == "-";
    const std::string name = is_stdin ? "standard input" : path;
    FileHandle file(is_stdin ? fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0)
                             : open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) {
        return std::unexpected(Error::from_errno(errno, "open " + name));
    }
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
            STELLARIUM_ASSIGN(source.content, RawFileSource::open(std::move(file), name));
            return source;
        }
        if (isatty(file.get()) == 1) {
            return fail(ErrorCode::kInvalidArgument,
                        "standard input is a terminal; pipe or redirect a disk image into it");
        }
        source.content = std::make_unique<StreamSource>(std::move(file), name);
        return source;
    }
    std::array<std::byte, kDetectBytes> head{};
    STELLARIUM_ASSIGN(const size_t got, read_fully(file.get(), head, 0, name));
    source.format = options.format.value_or(detect_format(Bytes(head).first(got)));
    if (source.format == ImageFormat::kRaw) {
        STELLARIUM_ASSIGN(source.content, RawFileSource::open(std::move(file), name));
        return source;
    }
    STELLARIUM_ASSIGN(source.content, open_qemu_source(path, source.format, options.allow_backing));
    return source;
}

}  // namespace stellarium::cli
