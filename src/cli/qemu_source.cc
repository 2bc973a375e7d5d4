// qemu-nbd serves the image on a socket that libnbd makes in a private folder and hands over by
// systemd's socket activation; it ends when the connection does, also when this process dies.
#include "cli/qemu_source.h"

#include <array>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <libnbd.h>
#include <sys/stat.h>

#include "cli/file_handle.h"
#include "cli/interrupt.h"
#include "cli/process.h"
#include "control/json.h"

namespace stellarium::cli {
namespace {

using control::Json;
using control::kMaxFrameBytes;
using control::SparseExtent;

constexpr const char* kPackage = "qemu-utils";
constexpr size_t kReadsInFlight = 8;
constexpr uint64_t kStatusBytes = uint64_t{2} << 30;  ///< Asked about at once; NBD has 32 bits.
constexpr uint32_t kZeroFlag = LIBNBD_STATE_ZERO;

/// In qemu's option strings a comma within a value is doubled.
std::string escape_commas(const std::string& text) {
    std::string escaped;
    for (const char c : text) {
        escaped += c == ',' ? std::string(",,") : std::string(1, c);
    }
    return escaped;
}

std::string image_options(const std::string& path, ImageFormat format) {
    return fmt::format("driver={},file.driver=file,file.filename={}", format_name(format),
                       escape_commas(path));
}

/// A file for a tool's messages, removed with this object.
class MessageFile {
  public:
    ~MessageFile() {
        if (!path_.empty()) {
            unlink(path_.c_str());
        }
    }
    MessageFile() = default;
    MessageFile(const MessageFile&) = delete;
    MessageFile& operator=(const MessageFile&) = delete;

    Result<void> make() {
        const char* const folder = std::getenv("TMPDIR");
        path_ = std::string(folder == nullptr ? "/tmp" : folder) + "/stellarctl-XXXXXX";
        const FileHandle file(mkostemp(path_.data(), O_CLOEXEC));
        if (file.get() < 0) {
            const int failed = errno;
            path_.clear();
            return std::unexpected(Error::from_errno(failed, "make a temporary file"));
        }
        return {};
    }
    const std::string& path() const { return path_; }
    std::string text() const {
        std::ifstream file(path_);
        std::ostringstream text;
        text << file.rdbuf();
        return one_line(text.str());
    }

  private:
    std::string path_;
};

struct NbdCloser {
    void operator()(nbd_handle* handle) const { nbd_close(handle); }
};

class QemuSource final : public control::SparseSource {
  public:
    QemuSource(std::string path, std::string name)
        : path_(std::move(path)), name_(std::move(name)) {}

    Result<void> open(ImageFormat format) {
        if (stat(path_.c_str(), &before_) != 0) {
            return std::unexpected(Error::from_errno(errno, "look at " + name_));
        }
        STELLARIUM_TRY(messages_.make());
        nbd_.reset(nbd_create());
        if (!nbd_) {
            return nbd_error("start libnbd");
        }
        // The shell only sends qemu-nbd's messages into the file ($0); nothing is expanded.
        std::string options = image_options(path_, format);
        std::array<std::string, 8> words{"/bin/sh",
                                         "-c",
                                         "exec qemu-nbd \"$@\" 2>\"$0\"",
                                         messages_.path(),
                                         "--read-only",
                                         "--cache=writeback",
                                         "--image-opts",
                                         std::move(options)};
        std::vector<char*> argv;
        argv.reserve(words.size() + 1);
        for (std::string& word : words) {
            argv.push_back(word.data());
        }
        argv.push_back(nullptr);
        if (nbd_add_meta_context(nbd_.get(), LIBNBD_CONTEXT_BASE_ALLOCATION) != 0 ||
            nbd_connect_systemd_socket_activation(nbd_.get(), argv.data()) != 0) {
            return nbd_error("open");
        }
        const int64_t size = nbd_get_size(nbd_.get());
        if (size < 0) {
            return nbd_error("find the size");
        }
        size_bytes_ = static_cast<uint64_t>(size);
        has_status_ = nbd_can_meta_context(nbd_.get(), LIBNBD_CONTEXT_BASE_ALLOCATION) == 1;
        return {};
    }

    std::optional<uint64_t> size_hint() const override { return size_bytes_; }
    uint64_t size_bytes() const override { return size_bytes_; }

    Result<std::optional<SparseExtent>> next() override {
        while (true) {
            STELLARIUM_TRY(check_interrupt());
            STELLARIUM_TRY(fill());
            if (reads_.empty()) {
                STELLARIUM_TRY(check_unchanged());
                return std::nullopt;
            }
            STELLARIUM_TRY(wait_for_first());
            current_ = std::move(reads_.front());
            reads_.pop_front();
            if (!all_zero(current_.data)) {
                return SparseExtent{current_.offset, current_.data};
            }
        }
    }

  private:
    struct Read {
        uint64_t offset = 0;
        std::vector<std::byte> data;
        int64_t cookie = 0;
    };
    struct Range {
        uint64_t offset = 0;
        uint64_t end = 0;
    };

    std::unexpected<Error> nbd_error(std::string_view what) const {
        if (interrupted()) {
            return std::unexpected(Error(ErrorCode::kCancelled, "interrupted"));
        }
        const std::string tool_says = messages_.text();
        const char* const library_says = nbd_get_error();
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} {} through qemu-nbd: {}", what, name_,
                                !tool_says.empty()        ? tool_says
                                : library_says != nullptr ? library_says
                                                          : "unknown error"));
    }

    static int on_extents(void* user_data, const char*, uint64_t offset, uint32_t* entries,
                          size_t entry_count, int*) {
        auto* const self = static_cast<QemuSource*>(user_data);
        for (size_t i = 0; i + 1 < entry_count; i += 2) {
            const uint64_t end = std::min(offset + entries[i], self->size_bytes_);
            if ((entries[i + 1] & kZeroFlag) == 0 && offset < end) {
                if (!self->ranges_.empty() && self->ranges_.back().end == offset) {
                    self->ranges_.back().end = end;
                } else {
                    self->ranges_.push_back({offset, end});
                }
            }
            offset = end;
        }
        self->status_end_ = std::max(self->status_end_, offset);
        return 0;
    }

    /// Learns where data is, until there is some or the end is reached.
    Result<void> find_ranges() {
        while (ranges_.empty() && status_end_ < size_bytes_) {
            if (!has_status_) {
                ranges_.push_back({status_end_, size_bytes_});
                status_end_ = size_bytes_;
                break;
            }
            STELLARIUM_TRY(check_interrupt());
            const uint64_t from = status_end_;
            const uint64_t count = std::min(kStatusBytes, size_bytes_ - from);
            nbd_extent_callback callback{};
            callback.callback = on_extents;
            callback.user_data = this;
            if (nbd_block_status(nbd_.get(), count, from, callback, 0) != 0) {
                return nbd_error("find the holes of");
            }
            if (status_end_ == from) {
                return fail(ErrorCode::kProtocol, "qemu-nbd told nothing about a range");
            }
        }
        return {};
    }

    /// Keeps reads going ahead of what was asked for.
    Result<void> fill() {
        while (reads_.size() < kReadsInFlight) {
            STELLARIUM_TRY(find_ranges());
            if (ranges_.empty()) {
                return {};
            }
            Range& range = ranges_.front();
            const uint64_t end = std::min(
                range.end, range.offset / kMaxFrameBytes * kMaxFrameBytes + kMaxFrameBytes);
            Read read;
            read.offset = range.offset;
            read.data.resize(static_cast<size_t>(end - range.offset));
            read.cookie = nbd_aio_pread(nbd_.get(), read.data.data(), read.data.size(), read.offset,
                                        NBD_NULL_COMPLETION, 0);
            if (read.cookie < 0) {
                return nbd_error("read");
            }
            reads_.push_back(std::move(read));
            range.offset = end;
            if (range.offset == range.end) {
                ranges_.pop_front();
            }
        }
        return {};
    }

    Result<void> wait_for_first() {
        while (true) {
            const int completed =
                nbd_aio_command_completed(nbd_.get(), static_cast<uint64_t>(reads_.front().cookie));
            if (completed < 0) {
                return nbd_error(fmt::format("read byte {} of", reads_.front().offset));
            }
            if (completed == 1) {
                return {};
            }
            if (nbd_poll(nbd_.get(), -1) < 0) {
                return nbd_error("read");
            }
        }
    }

    Result<void> check_unchanged() const {
        struct stat after{};
        if (stat(path_.c_str(), &after) != 0) {
            return std::unexpected(Error::from_errno(errno, "look at " + name_));
        }
        if (after.st_size != before_.st_size || after.st_ino != before_.st_ino ||
            after.st_mtim.tv_sec != before_.st_mtim.tv_sec ||
            after.st_mtim.tv_nsec != before_.st_mtim.tv_nsec) {
            return fail(ErrorCode::kBusy,
                        fmt::format("{} changed while it was read; nothing was imported", name_));
        }
        return {};
    }

    std::string path_;
    std::string name_;
    struct stat before_{};
    MessageFile messages_;
    uint64_t size_bytes_ = 0;
    bool has_status_ = false;
    uint64_t status_end_ = 0;   ///< Ranges before this are known.
    std::deque<Range> ranges_;  ///< Of data, not asked for yet.
    std::deque<Read> reads_;    ///< Under way; their buffers must not move.
    Read current_;
    std::unique_ptr<nbd_handle, NbdCloser> nbd_;  ///< Last: closed before buffers go.
};

Result<void> refuse_reference(const std::string& path, std::string_view kind,
                              const std::string& other) {
    return fail(ErrorCode::kInvalidArgument,
                fmt::format("{} refers to another file, its {} '{}', and whoever made the image "
                            "chose that; if you trust it, import with --allow-backing",
                            path, kind, other));
}

bool same_file(const std::string& a, const std::string& b) {
    std::error_code error;
    return std::filesystem::equivalent(a, b, error) && !error;
}

/// qemu reads what lies past the end of a cut-off image as zeros, without a word.
Result<void> check_whole(const std::string& path, const std::string& options) {
    // 3: clusters that nobody uses, which is no fault of the content. 63: the format has no check.
    auto checked =
        run_tool({"qemu-img", "check", "-q", "--image-opts", options}, kPackage, {0, 3, 63});
    if (!checked) {
        return fail(checked.error().code(),
                    fmt::format("{} is damaged or cut off, so nothing was imported; copy it again, "
                                "or see what 'qemu-img check -r all' can save ({})",
                                path, checked.error().message()));
    }
    return {};
}

}  // namespace

Result<void> check_image_info(std::string_view info_json, const std::string& path,
                              bool allow_backing) {
    STELLARIUM_ASSIGN(const Json info, control::parse_json(info_json, "answer of qemu-img"));
    if (!info.is_object()) {
        return fail(ErrorCode::kProtocol, "qemu-img's answer is not understood");
    }
    if (const auto encrypted = info.find("encrypted");
        encrypted != info.end() && encrypted->is_boolean() && encrypted->get<bool>()) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{} is encrypted; decrypt it with qemu-img convert first", path));
    }
    if (allow_backing) {
        return {};
    }
    if (const std::string backing = control::text_field(info, "backing-filename");
        !backing.empty()) {
        return refuse_reference(path, "backing file", backing);
    }
    const auto specific = info.find("format-specific");
    if (specific == info.end() || !specific->is_object() || !specific->contains("data")) {
        return {};
    }
    const Json& data = specific->at("data");
    if (const std::string file = control::text_field(data, "data-file"); !file.empty()) {
        return refuse_reference(path, "data file", file);
    }
    if (data.is_object() && data.contains("extents") && data.at("extents").is_array()) {
        for (const Json& extent : data.at("extents")) {
            const std::string file = control::text_field(extent, "filename");
            if (!file.empty() && !same_file(file, path)) {
                return refuse_reference(path, "extent", file);
            }
        }
    }
    return {};
}

Result<std::unique_ptr<control::SparseSource>> open_qemu_source(const std::string& path,
                                                                ImageFormat format,
                                                                bool allow_backing) {
    if (!tool_exists("qemu-nbd")) {
        return std::unexpected(missing_tool("qemu-nbd", kPackage));
    }
    // An absolute path: qemu takes "nbd:..." and "json:..." for something else than a file.
    std::error_code error;
    const std::filesystem::path absolute = std::filesystem::canonical(path, error);
    if (error) {
        return std::unexpected(Error::from_errno(error.value(), "find " + path));
    }
    STELLARIUM_ASSIGN(const std::string info,
                      run_tool({"qemu-img", "info", "--output=json", "--image-opts",
                                image_options(absolute.string(), format)},
                               kPackage));
    STELLARIUM_TRY(check_image_info(info, path, allow_backing));
    STELLARIUM_TRY(check_whole(path, image_options(absolute.string(), format)));
    auto source = std::make_unique<QemuSource>(absolute.string(), path);
    STELLARIUM_TRY(source->open(format));
    return source;
}

}  // namespace stellarium::cli
