#include "io/io.h"

#include <algorithm>

#include <fmt/format.h>
#include <limits.h>

namespace stellarium::io {
namespace {

// A signal storm ends; an endless one is a fault that the caller must hear of.
constexpr int kMaxInterruptionsInARow = 1024;

/// Counts interruptions without progress; says whether to try again.
class InterruptionBudget {
  public:
    bool may_retry(const Error& error) {
        return error.code() == ErrorCode::kInterrupted && ++in_a_row_ < kMaxInterruptionsInARow;
    }
    void progressed() { in_a_row_ = 0; }

  private:
    int in_a_row_ = 0;
};

std::unexpected<Error> no_progress(const File& file, uint64_t offset_bytes) {
    return fail(ErrorCode::kIo, fmt::format("write {} at offset {}: the system accepted no bytes",
                                            file.path(), offset_bytes));
}

}  // namespace

Result<size_t> read_up_to(File& file, MutableBytes into, uint64_t offset_bytes) {
    InterruptionBudget budget;
    size_t done = 0;
    while (done < into.size()) {
        auto got = file.pread(into.subspan(done), offset_bytes + done);
        if (!got) {
            if (budget.may_retry(got.error())) {
                continue;
            }
            return std::unexpected(std::move(got).error());
        }
        if (*got == 0) {
            break;
        }
        budget.progressed();
        done += *got;
    }
    return done;
}

Result<void> read_exact(File& file, MutableBytes into, uint64_t offset_bytes) {
    STELLARIUM_ASSIGN(const size_t done, read_up_to(file, into, offset_bytes));
    if (done < into.size()) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("{} ends at offset {}, but {} bytes were expected at offset {}: "
                                "the file is truncated",
                                file.path(), offset_bytes + done, into.size(), offset_bytes));
    }
    return {};
}

Result<void> write_all(File& file, Bytes from, uint64_t offset_bytes) {
    InterruptionBudget budget;
    size_t done = 0;
    while (done < from.size()) {
        auto put = file.pwrite(from.subspan(done), offset_bytes + done);
        if (!put) {
            if (budget.may_retry(put.error())) {
                continue;
            }
            return std::unexpected(std::move(put).error());
        }
        if (*put == 0) {
            return no_progress(file, offset_bytes + done);
        }
        budget.progressed();
        done += *put;
    }
    return {};
}

Result<void> write_all(File& file, std::vector<iovec> from, uint64_t offset_bytes,
                       Caching caching) {
    InterruptionBudget budget;
    std::span<iovec> rest(from);
    while (true) {
        while (!rest.empty() && rest.front().iov_len == 0) {
            rest = rest.subspan(1);
        }
        if (rest.empty()) {
            return {};
        }
        auto put =
            file.pwritev(rest.first(std::min<size_t>(rest.size(), IOV_MAX)), offset_bytes, caching);
        if (!put) {
            if (budget.may_retry(put.error())) {
                continue;
            }
            return std::unexpected(std::move(put).error());
        }
        if (*put == 0) {
            return no_progress(file, offset_bytes);
        }
        budget.progressed();
        offset_bytes += *put;
        for (size_t left = *put; left > 0;) {
            iovec& front = rest.front();
            const size_t step = std::min(left, front.iov_len);
            front.iov_base = static_cast<std::byte*>(front.iov_base) + step;
            front.iov_len -= step;
            left -= step;
            if (front.iov_len == 0) {
                rest = rest.subspan(1);
            }
        }
    }
}

}  // namespace stellarium::io
