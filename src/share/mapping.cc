#include "share/mapping.h"

#include <algorithm>
#include <cerrno>
#include <fstream>

#include <fmt/format.h>
#include <sys/mman.h>

#include "base/budget.h"

namespace stellarium::share {
namespace {

constexpr uint64_t kUsualMapCount = 65530;

Budget& mapping_budget() {
    static Budget budget([] {
        std::ifstream file("/proc/sys/vm/max_map_count");
        uint64_t allowed = 0;
        file >> allowed;
        return (file && allowed > 0 ? allowed : kUsualMapCount) / 2;
    }());
    return budget;
}

std::unexpected<Error> too_many(uint64_t needed) {
    const Budget& budget = mapping_budget();
    return fail(ErrorCode::kLimitExceeded,
                fmt::format("{} more mappings are needed, and this process has {} of {} already: "
                            "unmap some ranges, or raise vm.max_map_count",
                            needed, budget.taken(), budget.total()));
}

}  // namespace

Result<size_t> mappings_left(size_t wanted) {
    const Budget& budget = mapping_budget();
    const uint64_t left = budget.total() - std::min(budget.taken(), budget.total());
    if (left < kLeastMappings) {
        return too_many(kLeastMappings);
    }
    return static_cast<size_t>(std::min<uint64_t>(wanted, left));
}

Result<Mapping> Mapping::make(const Plan& plan, const MapOptions& options) {
    const size_t count = plan.mappings();
    if (!mapping_budget().take(count)) {
        return too_many(count);
    }
    const int fixed = options.address != nullptr ? MAP_FIXED : 0;
    void* const base = mmap(options.address, plan.length_bytes, PROT_READ,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
    if (base == MAP_FAILED) {
        const int error = errno;
        mapping_budget().give_back(count);
        return std::unexpected(Error::from_errno(
            error, fmt::format("reserve {} bytes of address space", plan.length_bytes)));
    }
    // From here on it unmaps itself.
    Mapping mapping(static_cast<std::byte*>(base), plan.length_bytes, count);
    const int populate = options.populate ? MAP_POPULATE : 0;
    for (const Piece& piece : plan.pieces) {
        if (mmap(mapping.data_ + piece.offset_bytes, piece.length_bytes, PROT_READ,
                 MAP_PRIVATE | MAP_FIXED | populate, plan.files[piece.file].get(),
                 static_cast<off_t>(piece.file_offset_bytes)) == MAP_FAILED) {
            return std::unexpected(Error::from_errno(
                errno,
                fmt::format("map {} bytes at offset {}", piece.length_bytes, piece.offset_bytes)));
        }
    }
    return mapping;
}

Mapping::~Mapping() {
    // It fails only where the kernel would have to split a mapping and may not: then it stays.
    if (data_ != nullptr && munmap(data_, size_bytes_) == 0) {
        mapping_budget().give_back(mappings_);
    }
}

}  // namespace stellarium::share
