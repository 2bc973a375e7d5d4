// A connection to a vhost-user-blk back-end, as a VMM makes it.
//
// Thread rule: one thread at a time. Every wait ends after kClientTimeout.
//
//     auto client = Client::connect("/run/vm1.sock");
//     (*client)->negotiate(kUsualFeatures, kUsualProtocolFeatures);
//     (*client)->share(*ram);
//     (*client)->start_queue(0, queue, /*base=*/0);
//     Disk disk(ram, queue);
//     disk.write(0, data);
#pragma once

#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "frontend/vhost/protocol.h"
#include "frontend/vhost/wire.h"
#include "frontend/vhost_client/driver_queue.h"

namespace stellarium::vhost {

inline constexpr std::chrono::seconds kClientTimeout{20};

inline constexpr uint64_t kUsualFeatures =
    feature_bit(kBlkFeatureSizeMax) | feature_bit(kBlkFeatureSegMax) |
    feature_bit(kBlkFeatureReadOnly) | feature_bit(kBlkFeatureBlkSize) |
    feature_bit(kBlkFeatureFlush) | feature_bit(kBlkFeatureTopology) |
    feature_bit(kBlkFeatureMultiQueue) | feature_bit(kBlkFeatureDiscard) |
    feature_bit(kBlkFeatureWriteZeroes) | feature_bit(kFeatureIndirectDesc) |
    feature_bit(kFeatureEventIdx) | feature_bit(kFeatureProtocolFeatures) |
    feature_bit(kFeatureVersion1);
inline constexpr uint64_t kUsualProtocolFeatures =
    bit(ProtocolFeature::kMultiQueue) | bit(ProtocolFeature::kReplyAck) |
    bit(ProtocolFeature::kBackendReq) | bit(ProtocolFeature::kConfig) |
    bit(ProtocolFeature::kInflightShmfd);

class Client {
  public:
    static Result<std::unique_ptr<Client>> connect(const std::string& socket_path);

    // ---- Raw messages --------------------------------------------------------------------------
    Result<void> send(MessageType type, Bytes payload, std::span<const int> fds = {},
                      uint32_t flags = 0);
    /// kUnavailable when the back-end closed the connection, kWouldBlock after the timeout.
    Result<Message> receive();
    /// Sends and waits for the reply to this type.
    Result<Message> ask(MessageType type, Bytes payload = {});
    Result<uint64_t> ask_u64(MessageType type);
    /// Sends, and waits for the acknowledgement where REPLY_ACK was negotiated.
    Result<void> tell(MessageType type, Bytes payload, std::span<const int> fds = {});
    /// True when the back-end closes the connection (within the timeout).
    bool wait_closed();
    int socket() const { return socket_.get(); }

    // ---- Set-up --------------------------------------------------------------------------------
    /// Accepts what is both wanted and offered, and says SET_OWNER.
    Result<void> negotiate(uint64_t features, uint64_t protocol_features);
    uint64_t features() const { return features_; }
    uint64_t protocol_features() const { return protocol_features_; }
    bool has(ProtocolFeature feature) const { return (protocol_features_ & bit(feature)) != 0; }
    /// By ADD_MEM_REG when memory slots were negotiated, else by SET_MEM_TABLE.
    Result<void> share(const GuestRam& ram);
    Result<std::vector<std::byte>> get_config(uint32_t offset, uint32_t size);
    Result<BlkConfig> config();
    /// Size, base, addresses, descriptors, and enabled.
    Result<void> start_queue(uint32_t index, const DriverQueue& queue, uint16_t base);
    /// The index to continue from.
    Result<uint16_t> stop_queue(uint32_t index);
    /// A socket pair whose other end the back-end gets; returns ours.
    Result<UniqueFd> open_backend_channel();
    /// A new in-flight region: its descriptor and its layout.
    Result<std::pair<UniqueFd, InflightDescription>> get_inflight(uint16_t queues,
                                                                  uint16_t queue_size);
    Result<void> set_inflight(const UniqueFd& fd, const InflightDescription& layout);

  private:
    Client() = default;
    UniqueFd socket_;
    MessageReader reader_;
    uint64_t features_ = 0;
    uint64_t protocol_features_ = 0;
};

/// One request's memory in guest RAM: header, status, and a data buffer.
class BlkSlot {
  public:
    BlkSlot(GuestRam& ram, uint32_t data_bytes, uint32_t segment_bytes = UINT32_MAX);

    /// The buffers of a request of this type, with its header filled in. For kBlkOut and the range
    /// requests data() goes to the device, for kBlkIn and kBlkGetId it comes from it.
    std::span<const Buffer> prepare(uint32_t type, uint64_t sector, uint32_t data_bytes);
    uint8_t status() const;
    MutableBytes data() const { return MutableBytes(data_, capacity_bytes_); }

  private:
    GuestRam& ram_;
    uint32_t capacity_bytes_;
    uint32_t segment_bytes_;
    std::byte* header_;
    std::byte* status_;
    std::byte* data_;
    std::vector<Buffer> buffers_;
};

/// Requests one at a time, for tests. Each returns the virtio status, or an Error when there was no
/// answer in time.
class BlkDriver {
  public:
    BlkDriver(GuestRam& ram, DriverQueue& queue, uint32_t max_bytes = 1 << 20,
              uint32_t segment_bytes = UINT32_MAX)
        : queue_(queue), slot_(ram, max_bytes, segment_bytes) {}

    Result<uint8_t> read(uint64_t offset_bytes, MutableBytes into);
    Result<uint8_t> write(uint64_t offset_bytes, Bytes from);
    Result<uint8_t> flush();
    Result<uint8_t> ranges(uint32_t type, std::span<const BlkRange> ranges);
    Result<uint8_t> discard(uint64_t offset_bytes, uint64_t length_bytes);
    Result<uint8_t> write_zeroes(uint64_t offset_bytes, uint64_t length_bytes);
    Result<std::string> get_id();
    Result<uint8_t> run(uint32_t type, uint64_t sector, uint32_t data_bytes);
    BlkSlot& slot() { return slot_; }
    /// Length that the last completion reported.
    uint32_t used_length() const { return used_length_; }

  private:
    DriverQueue& queue_;
    BlkSlot slot_;
    uint32_t used_length_ = 0;
};

}  // namespace stellarium::vhost
