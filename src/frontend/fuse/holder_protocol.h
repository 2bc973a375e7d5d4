// What a daemon and the holder of its mounted directory (holder.h) say to each other, over a unix
// socket of type SOCK_SEQPACKET: one request, one answer, each one packet.
//
//     STELLARIUM_ASSIGN(auto holder, HolderClient::connect(socket_path));
//     STELLARIUM_ASSIGN(HolderStatus status, holder.status());
//     STELLARIUM_ASSIGN(Adoption adopted, holder.adopt(pool.uuid()));
//     STELLARIUM_TRY(holder.unmount());                    // kBusy: files are open
//
// A request is a HolderRequest; an answer is a HolderAnswer, the directory and a message (both
// without a terminator), and with an adoption two descriptors: /dev/fuse and the table of open
// files, in this order. The table alone is for whoever has the store without a daemon.
//
// Thread rule: a client is used by one thread at a time.
// Errors: kUnavailable: nobody holds (any more); kBusy: files are open, or the directory shows
// another store; kProtocol: a holder of another version.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <sys/types.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"

namespace stellarium::fuse {

inline constexpr uint32_t kHolderMagic = 0x444c'4f48;  // "HOLD"
inline constexpr uint32_t kHolderVersion = 1;
inline constexpr size_t kMaxHolderPacketBytes = 16384;
/// Of the directory, and of the message.
inline constexpr size_t kMaxHolderTextBytes = 4096;

using StoreUuid = std::array<uint8_t, 16>;

enum class HolderCommand : uint32_t { kStatus = 1, kAdopt = 2, kUnmount = 3, kTable = 4 };
enum class HolderResult : uint32_t { kDone = 0, kBusy = 1, kOtherStore = 2, kFailed = 3 };

struct HolderRequest {
    U32Le magic = kHolderMagic;
    U32Le version = kHolderVersion;
    U32Le command;
    StoreUuid store{};  ///< To adopt: of whom. Zeros in other requests.
};
static_assert(sizeof(HolderRequest) == 28);

struct HolderAnswer {
    U32Le magic = kHolderMagic;
    U32Le version = kHolderVersion;
    U32Le result;
    U32Le pid;
    StoreUuid store{};  ///< Who adopted; zeros: nobody has.
    U32Le directory_bytes;
    U32Le message_bytes;
};
static_assert(sizeof(HolderAnswer) == 40);

struct HolderStatus {
    int64_t pid = 0;
    StoreUuid store{};  ///< Zeros: no daemon has adopted the directory yet.
    std::string directory;
};

struct Adoption {
    UniqueFd fuse;
    UniqueFd table;
    HolderStatus holder;
};

/// kProtocol when it is none, or one of another version.
Result<HolderRequest> decode_request(Bytes packet);
std::string encode_answer(HolderResult result, const HolderStatus& status,
                          std::string_view message);
struct DecodedAnswer {
    HolderResult result = HolderResult::kFailed;
    HolderStatus status;
    std::string message;
};
Result<DecodedAnswer> decode_answer(Bytes packet);

/// One packet with some descriptors.
Result<void> send_packet(int socket, Bytes packet, std::span<const int> descriptors);
struct Packet {
    std::string bytes;  ///< Empty: the other side has gone.
    std::array<UniqueFd, 2> descriptors;
};
Result<Packet> receive_packet(int socket);

class HolderClient {
  public:
    /// kUnavailable when nobody listens there; kPermissionDenied when it is neither root, nor we,
    /// nor `trusted` who does.
    static Result<HolderClient> connect(const std::string& socket_path,
                                        std::optional<uid_t> trusted = std::nullopt);

    Result<HolderStatus> status();
    Result<Adoption> adopt(const StoreUuid& store);
    /// The table of open files, to look at while no daemon has the store.
    Result<UniqueFd> table();
    /// On return the holder has gone.
    Result<void> unmount();

  private:
    explicit HolderClient(UniqueFd socket) : socket_(std::move(socket)) {}
    Result<DecodedAnswer> ask(HolderCommand command, const StoreUuid& store,
                              std::array<UniqueFd, 2>* descriptors);

    UniqueFd socket_;
};

}  // namespace stellarium::fuse
