#include "cli/file_handle.h"

#include "cli/interrupt.h"

namespace stellarium::cli {

Result<size_t> read_fully(int descriptor, MutableBytes into, int64_t offset,
                          const std::string& what) {
    size_t done = 0;
    while (done < into.size()) {
        STELLARIUM_TRY(check_interrupt());
        const ssize_t got = offset < 0
                                ? ::read(descriptor, into.data() + done, into.size() - done)
                                : ::pread(descriptor, into.data() + done, into.size() - done,
                                          static_cast<off_t>(offset + static_cast<int64_t>(done)));
        if (got == 0) {
            // The end may have come because both sides of a pipe were interrupted.
            STELLARIUM_TRY(check_interrupt());
            break;
        }
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            return std::unexpected(Error::from_errno(errno, "read " + what));
        }
        done += static_cast<size_t>(got);
    }
    return done;
}

Result<void> write_fully(int descriptor, Bytes from, int64_t offset, const std::string& what) {
    size_t done = 0;
    while (done < from.size()) {
        STELLARIUM_TRY(check_interrupt());
        const ssize_t put = offset < 0
                                ? ::write(descriptor, from.data() + done, from.size() - done)
                                : ::pwrite(descriptor, from.data() + done, from.size() - done,
                                           static_cast<off_t>(offset + static_cast<int64_t>(done)));
        if (put < 0) {
            if (errno == EINTR) {
                continue;
            }
            return std::unexpected(Error::from_errno(errno, "write " + what));
        }
        done += static_cast<size_t>(put);
    }
    return {};
}

}  // namespace stellarium::cli
