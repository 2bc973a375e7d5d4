#include "share/borrower.h"

#include <array>
#include <cerrno>
#include <optional>
#include <span>
#include <utility>

#include <fmt/format.h>
#include <sys/socket.h>

#include "base/unix_address.h"
#include "share/limits.h"
#include "share/protocol.h"

namespace stellarium::share {
namespace {

/// Leaves the socket at the start of the next answer, or gives an error that is not the daemon's.
struct Answered {
    BorrowAnswer head;
    std::optional<Error> refused;
};

Result<Answered> exchange(int socket, const BorrowRequest& request, std::string_view source) {
    std::vector<std::byte> packet;
    append_bytes(packet, bytes_of(request));
    append_bytes(packet, bytes_of(source));
    STELLARIUM_TRY(send_all(socket, packet));
    std::array<std::byte, sizeof(BorrowAnswer)> bytes{};
    STELLARIUM_TRY(receive_all(socket, bytes));
    Answered answered{.head = load<BorrowAnswer>(bytes), .refused = std::nullopt};
    const BorrowAnswer& head = answered.head;
    if (head.magic != kBorrowMagic || head.version != kBorrowVersion ||
        head.code > kErrorCodeCount || head.message_bytes > kMaxAnswerText ||
        head.piece_count > kMostMappings || head.file_count > kMaxFiles + 1) {
        return fail(ErrorCode::kProtocol, "what listens at the map socket is no daemon of ours");
    }
    if (head.code != 0) {
        std::string text(head.message_bytes, '\0');
        STELLARIUM_TRY(receive_all(socket, std::as_writable_bytes(std::span(text))));
        answered.refused = Error(static_cast<ErrorCode>(head.code - 1), std::move(text));
    }
    return answered;
}

BorrowRequest request_of(BorrowKind kind) {
    BorrowRequest request{};
    request.magic = kBorrowMagic;
    request.version = kBorrowVersion;
    request.kind = static_cast<uint16_t>(kind);
    return request;
}

Result<Plan> receive_plan(int socket, const BorrowAnswer& head) {
    Plan plan;
    plan.length_bytes = head.length_bytes;
    plan.gathered_bytes = head.gathered_bytes;
    std::vector<std::byte> bytes(head.piece_count * sizeof(WirePiece));
    STELLARIUM_TRY(receive_all(socket, bytes));
    plan.pieces.reserve(head.piece_count);
    for (size_t at = 0; at < bytes.size(); at += sizeof(WirePiece)) {
        const auto wire = load<WirePiece>(Bytes(bytes).subspan(at));
        plan.pieces.push_back({.offset_bytes = wire.offset_bytes,
                               .length_bytes = wire.length_bytes,
                               .file_offset_bytes = wire.file_offset_bytes,
                               .file = wire.file});
    }
    STELLARIUM_ASSIGN(plan.files, receive_files(socket, head.file_count));
    STELLARIUM_TRY(check_plan(plan));
    return plan;
}

std::unexpected<Error> hung_up() {
    return fail(ErrorCode::kUnavailable,
                "the connection to the daemon's map socket is lost: "
                "connect again");
}

}  // namespace

Result<std::unique_ptr<Borrower>> Borrower::connect(const std::string& socket_path) {
    STELLARIUM_ASSIGN(const sockaddr_un address, unix_address(socket_path));
    UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket ||
        ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        const int error = errno;
        if (error == ENOENT || error == ECONNREFUSED) {
            return fail(ErrorCode::kUnavailable,
                        fmt::format("map socket {}: no daemon listens there", socket_path));
        }
        return std::unexpected(Error::from_errno(error, "connect to map socket " + socket_path));
    }
    return std::make_unique<Borrower>(std::move(socket));
}

Result<Borrowed> Borrower::borrow(std::string_view source, uint64_t offset_bytes,
                                  uint64_t length_bytes, size_t max_mappings) {
    if (source.size() > kMaxSourceBytes) {
        return fail(ErrorCode::kInvalidArgument, "the name is too long");
    }
    BorrowRequest request = request_of(BorrowKind::kBorrow);
    request.offset_bytes = offset_bytes;
    request.length_bytes = length_bytes;
    request.max_mappings = static_cast<uint32_t>(max_mappings);
    request.source_bytes = static_cast<uint16_t>(source.size());
    const std::lock_guard lock(mutex_);
    if (!socket_) {
        return hung_up();
    }
    auto answered = exchange(socket_.get(), request, source);
    if (!answered) {
        socket_.reset();
        return std::unexpected(std::move(answered).error());
    }
    if (std::optional<Error>& refused = answered->refused) {
        return std::unexpected(*std::move(refused));
    }
    auto plan = receive_plan(socket_.get(), answered->head);
    if (!plan) {
        socket_.reset();
        return std::unexpected(std::move(plan).error());
    }
    return Borrowed{.lease = answered->head.lease, .plan = *std::move(plan)};
}

Result<void> Borrower::give_back(uint64_t lease) {
    BorrowRequest request = request_of(BorrowKind::kGiveBack);
    request.lease = lease;
    const std::lock_guard lock(mutex_);
    if (!socket_) {
        return {};  // Forgotten with the connection.
    }
    auto answered = exchange(socket_.get(), request, {});
    if (!answered) {
        socket_.reset();
        return answered.error().code() == ErrorCode::kUnavailable
                   ? Result<void>()
                   : std::unexpected(std::move(answered).error());
    }
    if (std::optional<Error>& refused = answered->refused) {
        return std::unexpected(*std::move(refused));
    }
    return {};
}

}  // namespace stellarium::share
