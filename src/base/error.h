// Errors: one closed set of codes, one table from each code to every outside world.
//
// Every fallible function returns Result<T>. Three kinds of trouble are never mixed: a programmer's
// mistake asserts and stops; bad input (disk, guest, network, command line) is an Error; a failing
// operation is an Error. No exception crosses a component: libraries that throw are wrapped where
// they are called.
//
//     Result<Superblock> sb = decode_superblock(bytes);
//     if (!sb) return std::unexpected(sb.error().with_context("superblock slot 2"));
//
// Thread rule: Error is a value; the table is constant.
#pragma once

#include <cerrno>
#include <expected>
#include <string>
#include <string_view>

namespace stellarium {

enum class ErrorCode : unsigned char {
    kInvalidArgument,   ///< The request itself is wrong. Fix the input.
    kNotFound,          ///< The named thing is not there.
    kAlreadyExists,     ///< The name is taken.
    kBusy,              ///< Something holds it (an attachment, another process). Retry later.
    kCorrupt,           ///< Stored bytes fail their check. Run fsck; never retried blindly.
    kUnsupported,       ///< Newer format, unknown feature, or a file system that cannot do it.
    kIo,                ///< The operating system reported a failed operation.
    kNoSpace,           ///< No room. Free space and try again.
    kReadOnly,          ///< The store, volume or image cannot be written.
    kPermissionDenied,  ///< The operating system or a policy said no.
    kLimitExceeded,     ///< A documented bound was reached.
    kUnavailable,       ///< The other side (a daemon, a tool) is not there. Retry later.
    kWouldBlock,        ///< A no-wait call would have had to wait. Retry on a worker.
    kInterrupted,       ///< Interrupted before anything happened. Retry at once.
    kCancelled,         ///< Given up on request.
    kProtocol,          ///< A peer broke its protocol. Disconnect it.
    kStale,             ///< An address of something that has moved or gone. Look it up again.
};
inline constexpr int kErrorCodeCount = 17;

/// How one code looks to each outside world. `exit_code` is what stellarctl exits with.
struct ErrorMapping {
    ErrorCode code;
    std::string_view name;    ///< Stable, for JSON and logs: "not_found".
    std::string_view advice;  ///< What the reader should do.
    int errno_value;          ///< Positive errno.
    int virtio_blk_status;    ///< VIRTIO_BLK_S_OK/IOERR/UNSUPP = 0/1/2.
    int http_status;
    int exit_code;
    int c_abi_value;  ///< Negative; include/stellarium.h.
};

/// The one table. Never fails: every ErrorCode has a row (checked at compile time in error.cc).
const ErrorMapping& error_mapping(ErrorCode code);

/// A code and a sentence that says what happened, to which file or object, and at which offset.
class [[nodiscard]] Error {
  public:
    Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}

    /// From a positive errno value; `what` names the operation and its object: "pwrite seg/0001".
    static Error from_errno(int errno_value, std::string_view what);

    ErrorCode code() const { return code_; }
    const std::string& message() const { return message_; }

    /// The same error with `context: ` put before the message.
    Error with_context(std::string_view context) const;

  private:
    ErrorCode code_;
    std::string message_;
};

template <typename T>
using Result = std::expected<T, Error>;

/// Shorthand: `return fail(ErrorCode::kNotFound, "no volume named 'x'");`
inline std::unexpected<Error> fail(ErrorCode code, std::string message) {
    return std::unexpected<Error>(Error(code, std::move(message)));
}

}  // namespace stellarium

/// Returns the error of `expr` (a Result<void>-like expression) from the enclosing function.
#define STELLARIUM_TRY(expr)                                                   \
    do {                                                                       \
        if (auto stellarium_try_result_ = (expr); !stellarium_try_result_)     \
            return std::unexpected(std::move(stellarium_try_result_).error()); \
    } while (false)

#define STELLARIUM_CONCAT_INNER(a, b) a##b
#define STELLARIUM_CONCAT(a, b) STELLARIUM_CONCAT_INNER(a, b)
/// `STELLARIUM_ASSIGN(auto x, f());` declares x from the value or returns the error.
#define STELLARIUM_ASSIGN(decl, expr) \
    STELLARIUM_ASSIGN_IMPL(STELLARIUM_CONCAT(stellarium_assign_, __LINE__), decl, expr)
#define STELLARIUM_ASSIGN_IMPL(tmp, decl, expr)         \
    auto tmp = (expr);                                  \
    if (!tmp)                                           \
        return std::unexpected(std::move(tmp).error()); \
    decl = *std::move(tmp)
