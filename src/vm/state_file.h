// What a snapshot of a machine keeps beside its disk and its RAM: how it was started, and the
// state of its devices. The content of the volume NAME-state; docs/formats/vm-state.md.
//
//     STELLARIUM_ASSIGN(const auto bytes, encode(SavedState{...}));
//     STELLARIUM_ASSIGN(const SavedState state, decode_state(bytes));
//
// Thread rule: pure functions.
// Errors: kCorrupt for bytes that fail their checks, kUnsupported for a newer format.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "control/json.h"

namespace stellarium::vm {

using control::Json;

/// How a machine is started.
struct MachineConfig {
    uint64_t memory_bytes = 0;  ///< Whole MiB.
    uint64_t cpus = 1;
    std::string accelerator{};  ///< "kvm" or "tcg".
    std::string kernel{};       ///< Absolute path; "": the firmware boots from the disk.
    std::string initrd{};
    std::string append{};
    std::vector<std::string> nics{};  ///< As of QEMU's -nic.

    friend bool operator==(const MachineConfig&, const MachineConfig&) = default;
};

inline constexpr uint64_t kMinMemoryBytes = uint64_t{16} << 20;
inline constexpr uint64_t kMaxMemoryBytes = uint64_t{1} << 40;
inline constexpr uint64_t kMaxCpus = 255;

Json to_json(const MachineConfig& config);
/// kInvalidArgument naming `what`.
Result<MachineConfig> config_from_json(const Json& json, const std::string& what);

struct SavedState {
    MachineConfig config{};
    /// Ids of the snapshots that belong to this state: others under their names are others.
    uint64_t disk_id = 0;
    uint64_t ram_id = 0;
    std::vector<std::byte> devices{};  ///< A migration stream without RAM (migration_stream.h).
};

inline constexpr uint64_t kStateHeaderBytes = 4096;
inline constexpr uint64_t kMaxConfigBytes = uint64_t{64} << 10;

/// The header, the configuration and the devices, padded to whole pages.
Result<std::vector<std::byte>> encode(const SavedState& state);
/// Reads no further than the header says; what follows in the volume is of older states.
Result<SavedState> decode_state(Bytes bytes);
/// How many bytes a reader of the header needs altogether.
Result<uint64_t> state_bytes(Bytes header);

}  // namespace stellarium::vm
