#include "base/error.h"

#include <array>
#include <system_error>

namespace stellarium {
namespace {

constexpr std::array<ErrorMapping, kErrorCodeCount> kMappings{{
    {ErrorCode::kInvalidArgument, "invalid_argument", "fix the request", EINVAL, 1, 400, 2, -1},
    {ErrorCode::kNotFound, "not_found", "check the name", ENOENT, 1, 404, 3, -2},
    {ErrorCode::kAlreadyExists, "already_exists", "choose another name", EEXIST, 1, 409, 4, -3},
    {ErrorCode::kBusy, "busy", "release what holds it, then try again", EBUSY, 1, 409, 5, -4},
    {ErrorCode::kCorrupt, "corrupt", "do not retry; check the store", EUCLEAN, 1, 500, 6, -5},
    {ErrorCode::kUnsupported, "unsupported", "use a newer version or another file system",
     EOPNOTSUPP, 2, 501, 7, -6},
    {ErrorCode::kIo, "io_error", "check the disk and the kernel log", EIO, 1, 500, 8, -7},
    {ErrorCode::kNoSpace, "no_space", "free space and try again", ENOSPC, 1, 507, 9, -8},
    {ErrorCode::kReadOnly, "read_only", "write to a clone instead", EROFS, 1, 403, 10, -9},
    {ErrorCode::kPermissionDenied, "permission_denied", "check ownership and modes", EACCES, 1, 403,
     11, -10},
    {ErrorCode::kLimitExceeded, "limit_exceeded", "stay within the documented bound", E2BIG, 1, 413,
     12, -11},
    {ErrorCode::kUnavailable, "unavailable", "start the other side, then try again", ECONNREFUSED,
     1, 503, 13, -12},
    {ErrorCode::kWouldBlock, "would_block", "try again on a thread that may wait", EAGAIN, 1, 503,
     14, -13},
    {ErrorCode::kInterrupted, "interrupted", "try again", EINTR, 1, 503, 15, -14},
    {ErrorCode::kCancelled, "cancelled", "start again when ready", ECANCELED, 1, 499, 16, -15},
    {ErrorCode::kProtocol, "protocol_error", "disconnect the peer", EPROTO, 1, 400, 17, -16},
    {ErrorCode::kStale, "stale", "look it up again", ESTALE, 1, 409, 18, -17},
}};

constexpr bool rows_are_in_order() {
    for (int i = 0; i < kErrorCodeCount; ++i) {
        if (static_cast<int>(kMappings[static_cast<size_t>(i)].code) != i) {
            return false;
        }
    }
    return true;
}
static_assert(rows_are_in_order(), "each ErrorCode needs its row, in order");

ErrorCode code_of_errno(int errno_value) {
    switch (errno_value) {
        case EINVAL:
        case ENAMETOOLONG:
        case ENOTDIR:
        case EISDIR:
            return ErrorCode::kInvalidArgument;
        case ENOENT:
            return ErrorCode::kNotFound;
        case EEXIST:
        case ENOTEMPTY:
            return ErrorCode::kAlreadyExists;
        case EBUSY:
        case EADDRINUSE:
            return ErrorCode::kBusy;
        case ENOSPC:
        case EDQUOT:
            return ErrorCode::kNoSpace;
        case EROFS:
            return ErrorCode::kReadOnly;
        case EACCES:
        case EPERM:
            return ErrorCode::kPermissionDenied;
        case EOPNOTSUPP:
        case ENOSYS:
            return ErrorCode::kUnsupported;
        case EFBIG:
        case EMFILE:
        case ENFILE:
        case ENOMEM:
            return ErrorCode::kLimitExceeded;
        case ECONNREFUSED:
        case ECONNRESET:
        case EPIPE:
            return ErrorCode::kUnavailable;
        case EAGAIN:
            return ErrorCode::kWouldBlock;
        case EINTR:
            return ErrorCode::kInterrupted;
        case EPROTO:
            return ErrorCode::kProtocol;
        default:
            return ErrorCode::kIo;
    }
}

}  // namespace

const ErrorMapping& error_mapping(ErrorCode code) {
    return kMappings[static_cast<size_t>(code)];
}

Error Error::from_errno(int errno_value, std::string_view what) {
    return {code_of_errno(errno_value),
            std::string(what) + ": " + std::generic_category().message(errno_value)};
}

Error Error::with_context(std::string_view context) const {
    return {code_, std::string(context) + ": " + message_};
}

}  // namespace stellarium
