// vhost-user messages on a unix stream socket, with the descriptors that travel beside them.
//
// Header and payload are read with exact lengths, so that two messages never share a read and a
// descriptor always belongs to the message that it came with. Nothing here blocks.
//
// Thread rule: one thread at a time for each reader; send_message may be called from any thread.
#pragma once

#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"
#include "frontend/vhost/protocol.h"

namespace stellarium::vhost {

struct Message {
    MessageHeader header;
    std::vector<std::byte> payload;
    std::vector<UniqueFd> fds;
};

class MessageReader {
  public:
    enum class Outcome : uint8_t { kMessage, kIncomplete, kClosed };

    /// Reads as far as the socket gives without waiting. kMessage: `out` is filled. kClosed: the
    /// peer is gone, possibly in the middle of a message. Errors: kProtocol (payload too large, too
    /// many descriptors), kIo.
    Result<Outcome> read(int socket, Message& out);
    /// That came with a message which is not complete yet.
    size_t held_descriptors() const { return fds_.size(); }

  private:
    MessageHeader header_;
    size_t have_ = 0;  ///< Bytes of header and payload so far.
    std::vector<std::byte> payload_;
    std::vector<UniqueFd> fds_;
};

/// Sends a whole message or nothing: kWouldBlock when the socket's buffer is full.
Result<void> send_message(int socket, uint32_t type, uint32_t flags, Bytes payload,
                          std::span<const int> fds = {});

}  // namespace stellarium::vhost
