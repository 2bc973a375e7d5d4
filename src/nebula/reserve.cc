#include "nebula/reserve.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "base/units.h"
#include "nebula/types.h"

namespace stellarium::nebula {

thread_local unsigned ReserveScope::depth = 0;

Reserve::Reserve(io::FileSystem& files, std::string directory, uint64_t wanted_bytes)
    : files_(files), directory_(std::move(directory)), wanted_bytes_(wanted_bytes) {}

std::string Reserve::path() const {
    return fmt::format("{}/{}", directory_, kReserveName);
}

namespace {

/// In whole pages.
uint64_t size_on(const io::FileSystemSpace& space, uint64_t wanted_bytes) {
    const uint64_t bytes = std::min(wanted_bytes, space.total_bytes / kReserveShare);
    return bytes / kPageBytes * kPageBytes;
}

}  // namespace

Result<std::optional<uint64_t>> Reserve::size_there() {
    STELLARIUM_ASSIGN(const bool there, files_.exists(path()));
    if (!there) {
        return std::nullopt;
    }
    STELLARIUM_ASSIGN(const auto file, files_.open(path(), io::OpenMode::kReadOnly));
    STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
    return size / kPageBytes * kPageBytes;
}

Result<void> Reserve::allocate(uint64_t bytes) {
    STELLARIUM_ASSIGN(const auto file, files_.open(path(), io::OpenMode::kCreate));
    STELLARIUM_TRY(file->allocate(0, bytes));
    // So that it says itself how much room it has.
    return file->truncate(bytes);
}

void Reserve::hold() {
    if (wanted_bytes_ == 0 || held_bytes_.load() != 0) {
        return;
    }
    const std::lock_guard lock(mutex_);
    const auto space = files_.space(directory_);
    const auto there = size_there();
    if (held_bytes_.load() != 0 || !space || !there) {
        return;
    }
    uint64_t bytes = size_on(*space, wanted_bytes_);
    const std::optional<uint64_t> present = *there;
    if (present && *present > 0 && *present < bytes && space->free_bytes < 2 * (bytes - *present)) {
        // The file system has grown since, and is nearly full all the same.
        bytes = *present;
    }
    // One that is there takes no more room than it does already.
    if (bytes == 0 || (!present && space->free_bytes < 2 * bytes)) {
        return;
    }
    if (allocate(bytes)) {
        held_bytes_ = bytes;
    } else {
        // Less than all of it is worth nothing: it would look as if there were some.
        [[maybe_unused]] const auto best_effort = files_.remove(path());
    }
}

bool Reserve::release() {
    if (wanted_bytes_ == 0) {
        return false;
    }
    const std::lock_guard lock(mutex_);
    if (held_bytes_.exchange(0) == 0) {
        return false;
    }
    return files_.remove(path()).has_value();
}

Result<void> Reserve::admit(uint64_t bytes) {
    if (wanted_bytes_ == 0 || held_bytes_.load() != 0) {
        return {};
    }
    hold();
    if (held_bytes_.load() != 0) {
        return {};
    }
    const auto space = files_.space(directory_);
    if (!space) {
        return {};  // The write itself will say what is wrong.
    }
    const uint64_t kept = size_on(*space, wanted_bytes_);
    if (space->free_bytes >= kept + bytes) {
        return {};
    }
    return fail(ErrorCode::kNoSpace,
                fmt::format("the file system of {} is full: the {} that are free are kept for "
                            "removing and collecting garbage; remove volumes or make room",
                            directory_, format_size(space->free_bytes)));
}

}  // namespace stellarium::nebula
