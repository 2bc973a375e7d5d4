#include "daemon/limits.h"

#include <algorithm>
#include <cerrno>
#include <fstream>

#include <fmt/format.h>
#include <sys/resource.h>

#include "boot/limits.h"
#include "frontend/fuse/limits.h"
#include "frontend/vhost/limits.h"
#include "nebula/segment.h"
#include "share/limits.h"

namespace stellarium::daemon {

uint64_t descriptors_without_attachments(uint64_t data_threads) {
    return kFixedDescriptors + nebula::kMaxOpenSegmentFiles + kMaxConnections + kMaxTcpConnections +
           data_threads * vhost::kMaxFdsPerMessage + fuse::kDescriptorsOfMount +
           share::kLenderDescriptors;
}

uint64_t mappings_needed() {
    return nebula::kMaxMappedFooters + vhost::kMaxGuestMappings + kOtherMappings;
}

uint64_t memory_besides(uint64_t memory_bytes, uint64_t hash_threads) {
    return kProgramBytes + kCommitMemoryBytes + kLongRequestBytes + held_bytes_of(memory_bytes) +
           uint64_t{kMaxConnections + kMaxTcpConnections} * kConnectionBytes +
           uint64_t{kMaxStreams} * (kStreamBytes + import_bytes(hash_threads)) +
           boot::kMaxRecordings * boot::kRecordingBytes + boot::kMergeBytes +
           boot::kStageReadBytes + fuse::kFileWorkers * fuse::kWorkerBytes + fuse::kMaxKeptBytes;
}

uint64_t memory_that_fits(uint64_t wanted_bytes, uint64_t room_bytes) {
    // The slots of the buffer, their headers (a 64th) and what others may put there meanwhile.
    const uint64_t usable = room_bytes / 8 * 7;
    const uint64_t needed = wanted_bytes / 5 * 4 / 64 * 65 + kMiB;
    if (needed <= usable) {
        return wanted_bytes;
    }
    const uint64_t buffer = (usable - std::min<uint64_t>(usable, kMiB)) / 65 * 64;
    return std::max(kMinMemoryBytes, buffer / 4 * 5 / kMiB * kMiB);
}

uint64_t read_max_map_count() {
    std::ifstream file("/proc/sys/vm/max_map_count");
    uint64_t count = 0;
    file >> count;
    return file ? count : 0;
}

Result<uint64_t> check_process_limits(uint64_t max_map_count, uint64_t data_threads) {
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) {
        return std::unexpected(Error::from_errno(errno, "find the limit of descriptors"));
    }
    if (limit.rlim_cur < limit.rlim_max) {
        // The usual soft limit is 1024, for programs that select(2).
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
            return std::unexpected(Error::from_errno(errno, "raise the limit of descriptors"));
        }
    }
    if (const uint64_t needed = descriptors_without_attachments(data_threads);
        limit.rlim_cur < needed) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("this process may have {} descriptors, and needs {} before any "
                                "guest: raise the hard limit (LimitNOFILE= in the systemd unit, or "
                                "ulimit -Hn as root)",
                                limit.rlim_cur, needed));
    }
    if (max_map_count != 0 && max_map_count < mappings_needed()) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("this system allows {} mappings in a process, and this one may "
                                "need {}: sysctl vm.max_map_count=65530, its usual value, or more",
                                max_map_count, mappings_needed()));
    }
    return limit.rlim_cur;
}

}  // namespace stellarium::daemon
