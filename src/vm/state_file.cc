#include "vm/state_file.h"

#include <fmt/format.h>

#include "base/hash.h"
#include "vm/migration_stream.h"

namespace stellarium::vm {
namespace {

constexpr std::array<char, 8> kStateMagic = {'S', 'T', 'E', 'L', 'V', 'M', 'S', 'T'};
constexpr uint32_t kReadVersion = 1;
constexpr uint32_t kWriteVersion = 1;

struct StateHeader {
    std::array<char, 8> magic{};
    U32Le read_version;
    U32Le write_version;
    U64Le config_bytes;
    U64Le device_bytes;
    U64Le disk_id;
    U64Le ram_id;
    std::array<uint8_t, 32> content_hash{};  ///< BLAKE3 of configuration and devices.
    U64Le header_checksum;                   ///< XXH3-64 of all before it.
};
static_assert(sizeof(StateHeader) == 88);
constexpr size_t kCheckedBytes = offsetof(StateHeader, header_checksum);
static_assert(kCheckedBytes == 80);

constexpr uint64_t padded(uint64_t bytes) {
    return (bytes + kStateHeaderBytes - 1) / kStateHeaderBytes * kStateHeaderBytes;
}

Result<StateHeader> read_state_header(Bytes bytes) {
    StateHeader header;
    if (bytes.size() < kStateHeaderBytes) {
        return fail(ErrorCode::kCorrupt, "a saved state is shorter than its header");
    }
    std::memcpy(&header, bytes.data(), sizeof header);
    if (header.magic != kStateMagic) {
        return fail(ErrorCode::kCorrupt, "this is no saved state of a machine");
    }
    if (header.read_version > kReadVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("the saved state has format {}, and {} is the newest known: use a "
                                "newer stellarctl",
                                header.read_version.get(), kReadVersion));
    }
    if (header.header_checksum != checksum64(bytes.first(kCheckedBytes))) {
        return fail(ErrorCode::kCorrupt, "the header of a saved state fails its check");
    }
    if (header.config_bytes > kMaxConfigBytes || header.device_bytes > kMaxStateBytes) {
        return fail(ErrorCode::kCorrupt, "the header of a saved state names impossible lengths");
    }
    return header;
}

}  // namespace

Json to_json(const MachineConfig& config) {
    return Json{{"memory_bytes", config.memory_bytes},
                {"cpus", config.cpus},
                {"accelerator", config.accelerator},
                {"kernel", config.kernel},
                {"initrd", config.initrd},
                {"append", config.append},
                {"nics", config.nics}};
}

Result<MachineConfig> config_from_json(const Json& json, const std::string& what) {
    control::ObjectReader reader(json, what);
    MachineConfig config;
    config.memory_bytes = reader.required_size("memory_bytes");
    config.cpus = reader.required_size("cpus");
    config.accelerator = reader.required_string("accelerator");
    config.kernel = reader.required_string("kernel");
    config.initrd = reader.required_string("initrd");
    config.append = reader.required_string("append");
    config.nics = reader.required_strings("nics");
    STELLARIUM_TRY(reader.finish());
    if (config.memory_bytes < kMinMemoryBytes || config.memory_bytes > kMaxMemoryBytes ||
        config.memory_bytes % (uint64_t{1} << 20) != 0 || config.cpus == 0 ||
        config.cpus > kMaxCpus) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{}: impossible memory or processors", what));
    }
    return config;
}

Result<std::vector<std::byte>> encode(const SavedState& state) {
    const std::string config = control::to_text(to_json(state.config));
    if (config.size() > kMaxConfigBytes || state.devices.size() > kMaxStateBytes) {
        return fail(ErrorCode::kLimitExceeded, "the machine's state is too large to be saved");
    }
    std::vector<std::byte> bytes(kStateHeaderBytes + padded(config.size()) +
                                 padded(state.devices.size()));
    std::byte* const config_at = bytes.data() + kStateHeaderBytes;
    std::byte* const devices_at = config_at + padded(config.size());
    std::memcpy(config_at, config.data(), config.size());
    std::memcpy(devices_at, state.devices.data(), state.devices.size());
    StateHeader header{.magic = kStateMagic,
                       .read_version = kReadVersion,
                       .write_version = kWriteVersion,
                       .config_bytes = config.size(),
                       .device_bytes = state.devices.size(),
                       .disk_id = state.disk_id,
                       .ram_id = state.ram_id,
                       .content_hash = {},
                       .header_checksum = {}};
    header.content_hash = hash(Bytes(bytes).subspan(kStateHeaderBytes)).bytes;
    std::memcpy(bytes.data(), &header, sizeof header);
    header.header_checksum = checksum64(Bytes(bytes).first(kCheckedBytes));
    std::memcpy(bytes.data(), &header, sizeof header);
    return bytes;
}

Result<uint64_t> state_bytes(Bytes header_bytes) {
    STELLARIUM_ASSIGN(const StateHeader header, read_state_header(header_bytes));
    return kStateHeaderBytes + padded(header.config_bytes) + padded(header.device_bytes);
}

Result<SavedState> decode_state(Bytes bytes) {
    STELLARIUM_ASSIGN(const StateHeader header, read_state_header(bytes));
    STELLARIUM_ASSIGN(const uint64_t needed, state_bytes(bytes));
    if (bytes.size() < needed) {
        return fail(ErrorCode::kCorrupt, "a saved state is shorter than its header says");
    }
    const Bytes content = bytes.first(needed).subspan(kStateHeaderBytes);
    if (hash(content).bytes != header.content_hash) {
        return fail(ErrorCode::kCorrupt, "the content of a saved state fails its check");
    }
    const std::string_view config(reinterpret_cast<const char*>(content.data()),
                                  header.config_bytes);
    SavedState state;
    STELLARIUM_ASSIGN(const Json json, control::parse_json(config, "the saved configuration"));
    STELLARIUM_ASSIGN(state.config, config_from_json(json, "the saved configuration"));
    state.disk_id = header.disk_id;
    state.ram_id = header.ram_id;
    const Bytes devices = content.subspan(padded(header.config_bytes), header.device_bytes);
    state.devices.assign(devices.begin(), devices.end());
    return state;
}

}  // namespace stellarium::vm
