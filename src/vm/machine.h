// One QEMU: its command line, its start, its end.
//
//     STELLARIUM_ASSIGN(const ProcessId process, start_qemu(folder, launch));
//     STELLARIUM_ASSIGN(auto qmp, connect_qemu(folder, process));
//
// QEMU works in the machine's folder, in a session of its own, and outlives the command.
//
// Thread rule: any thread.
// Errors: kUnavailable without QEMU, or when it ends at once, with its last words.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "vm/qmp.h"
#include "vm/records.h"

namespace stellarium::vm {

inline constexpr const char* kQemu = "qemu-system-x86_64";
/// The RAM's block, in QEMU's words and in migration streams.
inline constexpr const char* kRamBlock = "ram";

struct Launch {
    std::string name{};
    MachineConfig config{};
    std::string disk{};      ///< The file.
    std::string ram_file{};  ///< Mapped privately as RAM; "": RAM of its own.
    int incoming_fd = -1;    ///< A migration stream to start from, paused; -1: boots.
};

/// Without the program's own name. What depends on the folder is named relative to it.
std::vector<std::string> qemu_arguments(const Launch& launch);

/// "kvm" where the processor's own virtualisation is in the kernel and /dev/kvm may be opened,
/// else "tcg".
std::string best_accelerator();

Result<ProcessId> start_qemu(const MachineFolder& folder, const Launch& launch);
/// Waits until its control socket answers.
Result<std::unique_ptr<Qmp>> connect_qemu(const MachineFolder& folder, const ProcessId& process,
                                          std::chrono::milliseconds timeout);
/// True once it has ended, false when it still runs after `timeout`.
bool wait_for_end(const ProcessId& process, std::chrono::milliseconds timeout);
/// Kills it, and waits for its end.
Result<void> kill_qemu(const ProcessId& process);
/// The last lines of qemu.log, as one.
std::string last_words(const MachineFolder& folder);

}  // namespace stellarium::vm
