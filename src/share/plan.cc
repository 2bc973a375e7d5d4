#include "share/plan.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "nebula/types.h"

namespace stellarium::share {
namespace {

using nebula::kPageBytes;

/// Copied at once.
constexpr uint64_t kGatherBytes = uint64_t{1} << 20;

Result<UniqueFd> copy_of(int descriptor, const std::string& path) {
    UniqueFd copy(fcntl(descriptor, F_DUPFD_CLOEXEC, 0));
    if (!copy) {
        return std::unexpected(Error::from_errno(errno, "copy the descriptor of " + path));
    }
    return copy;
}

/// What of the content was not worth a mapping of its own.
class Gatherer {
  public:
    Gatherer(nova::Reader& reader, uint64_t start_bytes, uint64_t length_bytes)
        : reader_(reader), start_bytes_(start_bytes), length_bytes_(length_bytes) {}

    Result<void> create() {
        file_ = UniqueFd(memfd_create("stellarium-gathered", MFD_CLOEXEC | MFD_ALLOW_SEALING));
        if (!file_ || ftruncate(file_.get(), static_cast<off_t>(length_bytes_)) != 0) {
            return std::unexpected(Error::from_errno(errno, "make a memory file"));
        }
        return {};
    }
    /// Whole pages of the range, to the same place in the file.
    Result<void> copy(uint64_t offset_bytes, uint64_t length_bytes) {
        buffer_.resize(kGatherBytes);
        for (uint64_t done = 0; done < length_bytes;) {
            const uint64_t at = start_bytes_ + offset_bytes + done;
            const uint64_t step = std::min(kGatherBytes, length_bytes - done);
            // The last page may reach beyond the end; the rest of it stays zeros.
            const uint64_t known = std::min(step, reader_.size_bytes() - at);
            const MutableBytes bytes = MutableBytes(buffer_).first(known);
            STELLARIUM_TRY(reader_.read(at, bytes));
            STELLARIUM_TRY(write(bytes, offset_bytes + done));
            done += step;
        }
        return {};
    }
    Result<UniqueFd> finish() {
        if (fcntl(file_.get(), F_ADD_SEALS,
                  F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) != 0) {
            return std::unexpected(Error::from_errno(errno, "seal a memory file"));
        }
        return std::move(file_);
    }

  private:
    Result<void> write(Bytes bytes, uint64_t offset_bytes) {
        while (!bytes.empty()) {
            const ssize_t written =
                pwrite(file_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset_bytes));
            if (written <= 0) {
                return std::unexpected(
                    Error::from_errno(written < 0 ? errno : ENOSPC, "write to a memory file"));
            }
            bytes = bytes.subspan(static_cast<size_t>(written));
            offset_bytes += static_cast<uint64_t>(written);
        }
        return {};
    }

    nova::Reader& reader_;
    const uint64_t start_bytes_;
    const uint64_t length_bytes_;
    UniqueFd file_;
    std::vector<std::byte> buffer_;
};

/// Marks the runs that are mapped where they are: all, or the longest ones. With n of them there
/// are n + 1 gaps, of which each may take a hole, a piece of the memory file and a hole.
std::vector<bool> choose_direct(const std::vector<nova::LeasedRun>& runs, size_t max_mappings) {
    if (2 * runs.size() + 1 <= max_mappings) {
        return std::vector<bool>(runs.size(), true);
    }
    std::vector<bool> direct(runs.size(), false);
    std::vector<size_t> order(runs.size());
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = i;
    }
    const size_t count = std::min(runs.size(), (max_mappings - 3) / 4);
    std::ranges::sort(order, [&runs](size_t a, size_t b) {
        return runs[a].pages != runs[b].pages ? runs[a].pages > runs[b].pages : a < b;
    });
    for (size_t i = 0; i < count; ++i) {
        direct[order[i]] = true;
    }
    return direct;
}

struct WholePages {
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
};

Result<WholePages> check_range(const nova::Reader& reader, uint64_t offset_bytes,
                               uint64_t length_bytes) {
    const uint64_t end = (reader.size_bytes() + kPageBytes - 1) / kPageBytes * kPageBytes;
    if (offset_bytes % kPageBytes != 0 || offset_bytes >= end) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a range that is mapped starts at a multiple of {} before the end "
                                "at {}, and not at {}",
                                kPageBytes, reader.size_bytes(), offset_bytes));
    }
    if (length_bytes == 0) {
        return WholePages{.offset_bytes = offset_bytes, .length_bytes = end - offset_bytes};
    }
    if (length_bytes > end - offset_bytes ||
        (length_bytes % kPageBytes != 0 && length_bytes != reader.size_bytes() - offset_bytes)) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} bytes at offset {} are not whole pages up to the end at {}",
                                length_bytes, offset_bytes, reader.size_bytes()));
    }
    return WholePages{.offset_bytes = offset_bytes,
                      .length_bytes = (length_bytes + kPageBytes - 1) / kPageBytes * kPageBytes};
}

}  // namespace

Result<Plan> make_plan(nova::Reader& reader, uint64_t offset_bytes, uint64_t length_bytes,
                       const PlanOptions& options) {
    if (options.max_mappings < kLeastMappings) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a range needs at least {} mappings", kLeastMappings));
    }
    STELLARIUM_ASSIGN(const WholePages range, check_range(reader, offset_bytes, length_bytes));
    const uint64_t first_page = range.offset_bytes / kPageBytes;
    STELLARIUM_ASSIGN(const nova::LeasedRange leased,
                      reader.lease(first_page, range.length_bytes / kPageBytes, options.max_files));
    const std::vector<bool> direct = choose_direct(leased.runs, options.max_mappings);
    Plan plan;
    plan.length_bytes = range.length_bytes;
    Gatherer gatherer(reader, range.offset_bytes, range.length_bytes);
    std::vector<uint32_t> places(leased.files.size(), 0);  // In plan.files, plus 1.
    bool gathers = false;
    bool piece_is_open = false;
    for (size_t i = 0; i < leased.runs.size(); ++i) {
        const nova::LeasedRun& run = leased.runs[i];
        Piece piece{.offset_bytes = (run.page - first_page) * kPageBytes,
                    .length_bytes = uint64_t{run.pages} * kPageBytes,
                    .file_offset_bytes = run.file_offset_bytes,
                    .file = 0};
        if (direct[i]) {
            uint32_t& place = places[run.file];
            if (place == 0) {
                const io::File& file = *leased.files[run.file];
                STELLARIUM_ASSIGN(UniqueFd copy, copy_of(file.descriptor(), file.path()));
                plan.files.push_back(std::move(copy));
                place = static_cast<uint32_t>(plan.files.size());
            }
            piece.file = place - 1;
            plan.pieces.push_back(piece);
            piece_is_open = false;
            continue;
        }
        plan.gathered_bytes += piece.length_bytes;
        if (plan.gathered_bytes > options.max_gathered_bytes) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("more than {} bytes would have to be copied to keep to {} "
                                    "mappings: allow more of them, or map a shorter range",
                                    options.max_gathered_bytes, options.max_mappings));
        }
        if (!std::exchange(gathers, true)) {
            STELLARIUM_TRY(gatherer.create());
        }
        STELLARIUM_TRY(gatherer.copy(piece.offset_bytes, piece.length_bytes));
        if (piece_is_open) {
            Piece& last = plan.pieces.back();
            last.length_bytes = piece.offset_bytes + piece.length_bytes - last.offset_bytes;
        } else {
            piece.file_offset_bytes = piece.offset_bytes;
            piece.file = static_cast<uint32_t>(leased.files.size());  // Set below.
            plan.pieces.push_back(piece);
            piece_is_open = true;
        }
    }
    if (gathers) {
        STELLARIUM_ASSIGN(UniqueFd file, gatherer.finish());
        for (Piece& piece : plan.pieces) {
            if (piece.file == leased.files.size()) {
                piece.file = static_cast<uint32_t>(plan.files.size());
            }
        }
        plan.files.push_back(std::move(file));
    }
    return plan;
}

Result<void> check_plan(const Plan& plan) {
    std::vector<uint64_t> sizes;
    sizes.reserve(plan.files.size());
    for (const UniqueFd& file : plan.files) {
        struct stat status{};
        if (fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_size < 0) {
            return fail(ErrorCode::kProtocol, "a descriptor that was lent is no file");
        }
        sizes.push_back(static_cast<uint64_t>(status.st_size));
    }
    uint64_t end = 0;
    for (const Piece& piece : plan.pieces) {
        if (piece.offset_bytes < end || piece.offset_bytes % kPageBytes != 0 ||
            piece.length_bytes == 0 || piece.length_bytes % kPageBytes != 0 ||
            piece.offset_bytes > plan.length_bytes ||
            piece.length_bytes > plan.length_bytes - piece.offset_bytes ||
            piece.file >= sizes.size() || piece.file_offset_bytes % kPageBytes != 0 ||
            piece.file_offset_bytes > sizes[piece.file] ||
            piece.length_bytes > sizes[piece.file] - piece.file_offset_bytes) {
            return fail(ErrorCode::kProtocol,
                        fmt::format("the piece at offset {} of what was lent lies outside of its "
                                    "file or of the range",
                                    piece.offset_bytes));
        }
        end = piece.offset_bytes + piece.length_bytes;
    }
    return {};
}

}  // namespace stellarium::share
