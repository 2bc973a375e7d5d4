#include "cli/export_target.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <random>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "base/units.h"
#include "cli/interrupt.h"
#include "nova/limits.h"

namespace stellarium::cli {
namespace {

using control::SparseExtent;
using control::SparseSource;

std::unexpected<Error> system_error(const std::string& what) {
    return std::unexpected(Error::from_errno(errno, what));
}

Result<void> write_zeros(int descriptor, uint64_t length, int64_t offset, const std::string& name) {
    static const std::array<std::byte, 65536> kZeros{};
    while (length > 0) {
        const size_t piece = static_cast<size_t>(std::min<uint64_t>(length, kZeros.size()));
        STELLARIUM_TRY(write_fully(descriptor, Bytes(kZeros).first(piece), offset, name));
        length -= piece;
        offset = offset < 0 ? offset : offset + static_cast<int64_t>(piece);
    }
    return {};
}

/// A new file in the target's folder that gets its name at the end. Until then it has none, so that
/// nothing is left of it however the process ends, where the file system can do that.
class FileTarget final : public ExportTarget {
  public:
    FileTarget(std::string path, const ExportOptions& options)
        : path_(std::move(path)), options_(options) {}

    ~FileTarget() override {
        if (!temporary_.empty()) {
            unlink(temporary_.c_str());
        }
    }

    Result<void> open() {
        const std::filesystem::path target(path_);
        folder_ = target.has_parent_path() ? target.parent_path().string() : ".";
        struct stat status{};
        if (!options_.force && lstat(path_.c_str(), &status) == 0) {
            return exists();
        }
        file_ = FileHandle(::open(folder_.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
        if (file_.get() < 0) {
            std::string name = temporary_name();
            file_ = FileHandle(mkostemp(name.data(), O_CLOEXEC));
            if (file_.get() < 0) {
                return system_error("make a file in " + folder_);
            }
            temporary_ = name;
        }
        return reserve();
    }

    Result<void> write_all(SparseSource& source) override {
        while (true) {
            STELLARIUM_ASSIGN(const std::optional<SparseExtent> extent, source.next());
            if (!extent) {
                break;
            }
            STELLARIUM_TRY(write_fully(file_.get(), extent->data,
                                       static_cast<int64_t>(extent->offset_bytes), path_));
        }
        // The size was set before; the source's last word counts.
        if (source.size_bytes() != options_.size_bytes &&
            ftruncate(file_.get(), static_cast<off_t>(source.size_bytes())) != 0) {
            return system_error("set the size of " + path_);
        }
        return publish();
    }

  private:
    std::string temporary_name() const {
        return folder_ + "/." + std::filesystem::path(path_).filename().string() +
               ".stellarium-XXXXXX";
    }

    /// linkat() of the file that has no name yet; /proc leads to it without privileges.
    bool link_as(const std::string& name) const {
        return linkat(AT_FDCWD, fmt::format("/proc/self/fd/{}", file_.get()).c_str(), AT_FDCWD,
                      name.c_str(), AT_SYMLINK_FOLLOW) == 0;
    }

    /// A name to be replaced with, for rename() replaces and linkat() does not.
    Result<void> give_temporary_name() {
        std::random_device random;
        do {
            std::string name = temporary_name();
            name.replace(name.size() - 6, 6, fmt::format("{:06x}", random() & 0xFFFFFF));
            if (link_as(name)) {
                temporary_ = name;
                return {};
            }
        } while (errno == EEXIST);
        return system_error("give a file in " + folder_ + " a name");
    }

    std::unexpected<Error> exists() const {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("{} exists; give --force to replace it", path_));
    }

    /// Fails now rather than after hours.
    Result<void> reserve() {
        if (ftruncate(file_.get(), static_cast<off_t>(options_.size_bytes)) != 0) {
            if (errno == EFBIG || errno == EINVAL) {
                return fail(
                    ErrorCode::kLimitExceeded,
                    fmt::format("{}: the file system (or a limit on file sizes) cannot hold "
                                "a file of {} ({} bytes); nothing was written",
                                path_, format_size(options_.size_bytes), options_.size_bytes));
            }
            return system_error("set the size of " + path_);
        }
        struct statvfs space{};
        if (fstatvfs(file_.get(), &space) == 0) {
            const uint64_t free_bytes = uint64_t{space.f_bavail} * space.f_frsize;
            if (free_bytes < options_.data_bytes) {
                return fail(ErrorCode::kNoSpace,
                            fmt::format("{}: the data needs {}, and {} are free in {}; nothing was "
                                        "written",
                                        path_, format_size(options_.data_bytes),
                                        format_size(free_bytes), folder_));
            }
        }
        return {};
    }

    Result<void> publish() {
        // mkostemp gave 0600; the file gets what the umask allows, as any new file.
        const mode_t mask = umask(0);
        umask(mask);
        if (fchmod(file_.get(), 0666 & ~mask) != 0 || fsync(file_.get()) != 0) {
            return system_error("write " + path_);
        }
        if (temporary_.empty() && options_.force) {
            STELLARIUM_TRY(give_temporary_name());
        }
        if (temporary_.empty()) {
            if (!link_as(path_)) {
                return errno == EEXIST ? exists() : system_error("give " + path_ + " its name");
            }
        } else if (options_.force) {
            if (rename(temporary_.c_str(), path_.c_str()) != 0) {
                return system_error("give " + path_ + " its name");
            }
        } else if (renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(),
                             RENAME_NOREPLACE) != 0) {
            if (errno == EEXIST) {
                return exists();
            }
            // Not every file system knows RENAME_NOREPLACE; link() does not replace either.
            if (link(temporary_.c_str(), path_.c_str()) != 0) {
                return errno == EEXIST ? exists() : system_error("give " + path_ + " its name");
            }
            unlink(temporary_.c_str());
        }
        temporary_.clear();
        if (::close(file_.release()) != 0) {
            return system_error("write " + path_);
        }
        const FileHandle folder(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (folder.get() < 0 || fsync(folder.get()) != 0) {
            return system_error("sync the folder " + folder_);
        }
        return {};
    }

    std::string path_;
    std::string folder_;
    ExportOptions options_;
    std::string temporary_;
    FileHandle file_;
};

/// A block device: holes are made, since what was there before must not show through.
class DeviceTarget final : public ExportTarget {
  public:
    DeviceTarget(std::string path, const ExportOptions& options)
        : path_(std::move(path)), options_(options) {}

    Result<void> open() {
        if (!options_.force) {
            return fail(ErrorCode::kAlreadyExists,
                        fmt::format("{} is a block device; give --force to overwrite it", path_));
        }
        // O_EXCL: refused while it is mounted.
        file_ = FileHandle(::open(path_.c_str(), O_WRONLY | O_EXCL | O_CLOEXEC));
        if (file_.get() < 0) {
            return system_error("open " + path_);
        }
        const off_t size = lseek(file_.get(), 0, SEEK_END);
        if (size < 0) {
            return system_error("find the size of " + path_);
        }
        device_bytes_ = static_cast<uint64_t>(size);
        if (device_bytes_ < options_.size_bytes) {
            return fail(ErrorCode::kNoSpace,
                        fmt::format("{} has {}, and the disk has {}; nothing was written", path_,
                                    format_size(device_bytes_), format_size(options_.size_bytes)));
        }
        return {};
    }

    Result<void> write_all(SparseSource& source) override {
        uint64_t position = 0;
        while (true) {
            STELLARIUM_ASSIGN(const std::optional<SparseExtent> extent, source.next());
            const uint64_t next = extent ? extent->offset_bytes : source.size_bytes();
            STELLARIUM_TRY(make_hole(position, next));
            if (!extent) {
                break;
            }
            STELLARIUM_TRY(
                write_fully(file_.get(), extent->data, static_cast<int64_t>(next), path_));
            position = next + extent->data.size();
        }
        if (fsync(file_.get()) != 0 || ::close(file_.release()) != 0) {
            return system_error("write " + path_);
        }
        return {};
    }

  private:
    Result<void> make_hole(uint64_t from, uint64_t to) {
        // Whole sectors can be zeroed by the device; the rest is written.
        const uint64_t first =
            (from + nova::kSectorBytes - 1) / nova::kSectorBytes * nova::kSectorBytes;
        const uint64_t last = to / nova::kSectorBytes * nova::kSectorBytes;
        if (first < last &&
            fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      static_cast<off_t>(first), static_cast<off_t>(last - first)) == 0) {
            STELLARIUM_TRY(
                write_zeros(file_.get(), first - from, static_cast<int64_t>(from), path_));
            return write_zeros(file_.get(), to - last, static_cast<int64_t>(last), path_);
        }
        return write_zeros(file_.get(), to - from, static_cast<int64_t>(from), path_);
    }

    std::string path_;
    ExportOptions options_;
    FileHandle file_;
    uint64_t device_bytes_ = 0;
};

/// A pipe or terminal device: every byte, zeros for holes.
class StreamTarget final : public ExportTarget {
  public:
    StreamTarget(FileHandle file, std::string name)
        : file_(std::move(file)), name_(std::move(name)) {}

    Result<void> write_all(SparseSource& source) override {
        uint64_t position = 0;
        while (true) {
            STELLARIUM_ASSIGN(const std::optional<SparseExtent> extent, source.next());
            const uint64_t next = extent ? extent->offset_bytes : source.size_bytes();
            STELLARIUM_TRY(write_zeros(file_.get(), next - position, -1, name_));
            if (!extent) {
                break;
            }
            STELLARIUM_TRY(write_fully(file_.get(), extent->data, -1, name_));
            position = next + extent->data.size();
        }
        if (::close(file_.release()) != 0) {
            return system_error("write " + name_);
        }
        return {};
    }

  private:
    FileHandle file_;
    std::string name_;
};

}  // namespace

Result<std::unique_ptr<ExportTarget>> ExportTarget::open(const std::string& path,
                                                         const ExportOptions& options) {
    if (path.empty()) {
        return fail(ErrorCode::kInvalidArgument,
                    "the file to write has an empty name; '-' is standard output");
    }
    if (path == "-") {
        FileHandle file(fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0));
        if (file.get() < 0) {
            return system_error("open standard output");
        }
        if (isatty(file.get()) == 1) {
            return fail(ErrorCode::kInvalidArgument,
                        "standard output is a terminal; redirect or pipe the disk's content");
        }
        return std::make_unique<StreamTarget>(std::move(file), "standard output");
    }
    // A link is followed: what it points to is replaced, not the link.
    std::error_code error;
    const std::filesystem::path real = std::filesystem::canonical(path, error);
    const std::string target = error ? path : real.string();
    struct stat status{};
    if (stat(target.c_str(), &status) == 0) {
        if (S_ISDIR(status.st_mode)) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("{} is a directory; name a file in it", path));
        }
        if (S_ISBLK(status.st_mode)) {
            auto device = std::make_unique<DeviceTarget>(target, options);
            STELLARIUM_TRY(device->open());
            return device;
        }
        if (!S_ISREG(status.st_mode)) {
            FileHandle file(::open(target.c_str(), O_WRONLY | O_CLOEXEC));
            if (file.get() < 0) {
                return system_error("open " + path);
            }
            return std::make_unique<StreamTarget>(std::move(file), path);
        }
    }
    auto file = std::make_unique<FileTarget>(target, options);
    STELLARIUM_TRY(file->open());
    return file;
}

}  // namespace stellarium::cli
