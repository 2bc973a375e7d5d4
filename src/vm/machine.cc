#include "vm/machine.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <sstream>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

extern char** environ;

namespace stellarium::vm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kStartPoll{2};
constexpr std::chrono::milliseconds kEndPoll{5};
constexpr std::chrono::seconds kKillTimeout{60};
constexpr int kIncomingDescriptor = 3;
constexpr size_t kMaxLastWords = 600;

/// In an option of QEMU a comma is written twice.
std::string quoted(const std::string& text) {
    std::string result;
    for (const char c : text) {
        result += c == ',' ? std::string(",,") : std::string(1, c);
    }
    return result;
}

/// A child of ours that has ended stays a zombie until it is asked for.
void reap(int64_t pid) {
    int status = 0;
    [[maybe_unused]] const pid_t reaped = waitpid(static_cast<pid_t>(pid), &status, WNOHANG);
}

class SpawnActions {
  public:
    SpawnActions() { posix_spawn_file_actions_init(&actions_); }
    ~SpawnActions() { posix_spawn_file_actions_destroy(&actions_); }
    SpawnActions(const SpawnActions&) = delete;
    SpawnActions& operator=(const SpawnActions&) = delete;
    posix_spawn_file_actions_t* get() { return &actions_; }

  private:
    posix_spawn_file_actions_t actions_{};
};

class SpawnAttributes {
  public:
    SpawnAttributes() { posix_spawnattr_init(&attributes_); }
    ~SpawnAttributes() { posix_spawnattr_destroy(&attributes_); }
    SpawnAttributes(const SpawnAttributes&) = delete;
    SpawnAttributes& operator=(const SpawnAttributes&) = delete;
    posix_spawnattr_t* get() { return &attributes_; }

  private:
    posix_spawnattr_t attributes_{};
};

}  // namespace

std::vector<std::string> qemu_arguments(const Launch& launch) {
    const MachineConfig& config = launch.config;
    const bool kvm = config.accelerator == "kvm";
    std::vector<std::string> words = {
        "-name",
        quoted(launch.name),
        "-machine",
        std::string("q35,memory-backend=") + kRamBlock,
        "-accel",
        kvm ? "kvm" : "tcg,thread=multi",
        "-cpu",
        kvm ? "host" : "max",
        "-smp",
        std::to_string(config.cpus),
        "-m",
        fmt::format("{}M", config.memory_bytes >> 20),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-object",
        launch.ram_file.empty()
            ? fmt::format("memory-backend-ram,id={},size={}", kRamBlock, config.memory_bytes)
            : fmt::format("memory-backend-file,id={},size={},share=off,mem-path={}", kRamBlock,
                          config.memory_bytes, quoted(launch.ram_file)),
        "-drive",
        fmt::format("if=none,id=disk,format=raw,cache=none,discard=unmap,file={}",
                    quoted(launch.disk)),
        "-device",
        "virtio-blk-pci,drive=disk,bootindex=1",
        "-device",
        "vmgenid,guid=auto",
        "-chardev",
        "socket,id=console,path=console.sock,server=on,wait=off,logfile=console.log,logappend=off",
        "-serial",
        "chardev:console",
        "-chardev",
        "socket,id=qmp,path=qmp.sock,server=on,wait=off",
        "-mon",
        "chardev=qmp,mode=control"};
    const auto add = [&](const char* option, const std::string& value) {
        if (!value.empty()) {
            words.emplace_back(option);
            words.push_back(value);
        }
    };
    add("-kernel", config.kernel);
    add("-initrd", config.initrd);
    add("-append", config.append);
    for (const std::string& nic : config.nics) {
        add("-nic", nic);
    }
    if (launch.incoming_fd >= 0) {
        // Nothing runs before all of it, and the RAM, is known to be right.
        words.emplace_back("-S");
        add("-incoming", fmt::format("fd:{}", kIncomingDescriptor));
    }
    return words;
}

std::string best_accelerator() {
    // /dev/kvm alone says little: without the processor's part it does not run a kernel.
    const bool has_processor_part =
        access("/sys/module/kvm_intel", F_OK) == 0 || access("/sys/module/kvm_amd", F_OK) == 0;
    return has_processor_part && access("/dev/kvm", R_OK | W_OK) == 0 ? "kvm" : "tcg";
}

Result<ProcessId> start_qemu(const MachineFolder& folder, const Launch& launch) {
    for (const char* stale : {"qmp.sock", "console.sock", "qemu.log", "console.log"}) {
        if (unlink(folder.short_path(stale).c_str()) != 0 && errno != ENOENT) {
            return std::unexpected(
                Error::from_errno(errno, fmt::format("remove {}/{}", folder.path(), stale)));
        }
    }
    std::vector<std::string> words = qemu_arguments(launch);
    words.insert(words.begin(), kQemu);
    std::vector<char*> argv;
    argv.reserve(words.size() + 1);
    for (std::string& word : words) {
        argv.push_back(word.data());
    }
    argv.push_back(nullptr);
    SpawnActions actions;
    posix_spawn_file_actions_addchdir_np(actions.get(), folder.path().c_str());
    posix_spawn_file_actions_addopen(actions.get(), STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(actions.get(), STDOUT_FILENO, "qemu.log",
                                     O_WRONLY | O_CREAT | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(actions.get(), STDOUT_FILENO, STDERR_FILENO);
    if (launch.incoming_fd >= 0) {
        posix_spawn_file_actions_adddup2(actions.get(), launch.incoming_fd, kIncomingDescriptor);
    }
    // Ctrl-C of the command is not the machine's, and neither is what the command ignores.
    SpawnAttributes attributes;
    sigset_t all;
    sigfillset(&all);
    sigset_t none;
    sigemptyset(&none);
    posix_spawnattr_setsigdefault(attributes.get(), &all);
    posix_spawnattr_setsigmask(attributes.get(), &none);
    posix_spawnattr_setflags(
        attributes.get(),
        static_cast<short>(POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK));
    pid_t child = 0;
    const int failed =
        posix_spawnp(&child, kQemu, actions.get(), attributes.get(), argv.data(), environ);
    if (failed == ENOENT) {
        return fail(ErrorCode::kUnavailable,
                    fmt::format("{} is needed and is not installed; on Debian: apt install "
                                "qemu-system-x86",
                                kQemu));
    }
    if (failed != 0) {
        return std::unexpected(Error::from_errno(failed, fmt::format("run {}", kQemu)));
    }
    Result<ProcessId> process = identify(child);
    if (!process) {
        reap(child);
        return fail(ErrorCode::kUnavailable,
                    fmt::format("QEMU ended at once: {}", last_words(folder)));
    }
    return process;
}

Result<std::unique_ptr<Qmp>> connect_qemu(const MachineFolder& folder, const ProcessId& process,
                                          std::chrono::milliseconds timeout) {
    const Clock::time_point deadline = Clock::now() + timeout;
    while (true) {
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
        Result<std::unique_ptr<Qmp>> qmp =
            Qmp::connect(folder.short_path("qmp.sock"), std::max(left, kStartPoll));
        if (qmp) {
            return qmp;
        }
        reap(process.pid);
        if (!is_alive(process)) {
            return fail(ErrorCode::kUnavailable,
                        fmt::format("QEMU has ended: {}", last_words(folder)));
        }
        if (qmp.error().code() != ErrorCode::kUnavailable || Clock::now() >= deadline) {
            return qmp;
        }
        std::this_thread::sleep_for(kStartPoll);
    }
}

bool wait_for_end(const ProcessId& process, std::chrono::milliseconds timeout) {
    const Clock::time_point deadline = Clock::now() + timeout;
    while (true) {
        reap(process.pid);
        if (!is_alive(process)) {
            return true;
        }
        if (Clock::now() >= deadline) {
            return false;
        }
        std::this_thread::sleep_for(kEndPoll);
    }
}

Result<void> kill_qemu(const ProcessId& process) {
    if (!is_alive(process)) {
        return {};
    }
    if (kill(static_cast<pid_t>(process.pid), SIGKILL) != 0 && errno != ESRCH) {
        return std::unexpected(
            Error::from_errno(errno, fmt::format("end QEMU, process {}", process.pid)));
    }
    if (!wait_for_end(process, kKillTimeout)) {
        return fail(ErrorCode::kBusy, fmt::format("QEMU, process {}, does not end", process.pid));
    }
    return {};
}

std::string last_words(const MachineFolder& folder) {
    std::ifstream file(folder.path() + "/qemu.log");
    std::ostringstream text;
    text << file.rdbuf();
    std::string words = std::move(text).str();
    while (!words.empty() && words.back() == '\n') {
        words.pop_back();
    }
    if (words.size() > kMaxLastWords) {
        words = "..." + words.substr(words.size() - kMaxLastWords);
    }
    for (char& c : words) {
        c = c == '\n' ? ';' : c;
    }
    return words.empty() ? "it says nothing" : words;
}

}  // namespace stellarium::vm
