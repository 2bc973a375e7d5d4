#define FUSE_USE_VERSION 314
#include "frontend/fuse/holder.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <fuse3/fuse_lowlevel.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/unique_fd.h"
#include "base/unix_address.h"
#include "frontend/fuse/holder_protocol.h"
#include "frontend/fuse/open_table.h"
#include "frontend/fuse/session.h"

namespace stellarium::fuse {
namespace {

constexpr int kMaxClients = 8;
constexpr int kLookIntervalMs = 1000;
/// What start_holder() passes the descriptor by that it waits at.
constexpr int kReportDescriptor = 3;

volatile std::sig_atomic_t stop_asked = 0;

void on_stop(int /*signal*/) {
    stop_asked = 1;
}

/// Runs a program of the system and waits for it; its exit status, -1 when it could not be run.
int run_program(const std::vector<std::string>& words) {
    std::vector<char*> arguments;
    arguments.reserve(words.size() + 1);
    for (const std::string& word : words) {
        arguments.push_back(const_cast<char*>(word.c_str()));
    }
    arguments.push_back(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        execvp(arguments[0], arguments.data());
        _exit(127);
    }
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return child > 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// libfuse says what goes wrong on stderr only; here it goes where the caller can say it.
std::string last_complaint;

void keep_complaint(enum fuse_log_level /*level*/, const char* format, va_list arguments) {
    std::array<char, 512> text{};
    std::vsnprintf(text.data(), text.size(), format, arguments);
    last_complaint += text.data();
}

/// A file system that nobody serves any more, from a holder that was killed, is taken away; any
/// other is an error.
Result<void> check_directory(const std::string& directory) {
    struct stat status{};
    if (stat(directory.c_str(), &status) != 0) {
        if (errno != ENOTCONN) {
            return std::unexpected(Error::from_errno(errno, "use the directory " + directory));
        }
        if (umount2(directory.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) != 0 &&
            run_program({"fusermount3", "-u", "-z", "-q", "--", directory}) != 0) {
            return fail(ErrorCode::kBusy,
                        fmt::format("what was mounted on {} has lost its holder, and cannot be "
                                    "taken away: umount -l {}",
                                    directory, directory));
        }
        return check_directory(directory);
    }
    if (!S_ISDIR(status.st_mode)) {
        return fail(ErrorCode::kInvalidArgument, directory + " is not a directory");
    }
    return {};
}

class Holder {
  public:
    explicit Holder(const HolderOptions& options) : options_(options) {}
    ~Holder() { stop_listening(); }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;

    Result<void> mount();
    Result<void> listen();
    void serve();

  private:
    void answer(int client);
    void stop_listening() {
        if (std::exchange(listening_, false)) {
            unlink(options_.socket.c_str());
        }
    }
    std::pair<HolderResult, std::string> unmount();
    bool connected() const;

    const HolderOptions& options_;
    Session session_;
    int fuse_ = -1;  ///< The session's.
    UniqueFd table_;
    UniqueFd socket_;
    bool listening_ = false;
    bool mounted_ = false;
    StoreUuid store_{};
};

Result<void> Holder::mount() {
    STELLARIUM_TRY(check_directory(options_.directory));
    STELLARIUM_ASSIGN(table_, OpenTable::create());
    // The kernel checks modes and owners; users other than the one who mounts may come in where
    // root mounts. (fusermount3 asks for user_allow_other in /etc/fuse.conf.)
    std::string mount_options = "default_permissions,nosuid,nodev,subtype=stellarium,fsname=";
    for (const char c : options_.store) {
        mount_options += c == ',' || c == '\\' ? std::string("\\") + c : std::string(1, c);
    }
    if (geteuid() == 0 || options_.allow_other) {
        mount_options += ",allow_other";
    }
    std::string name = "stellarium";
    std::string flag = "-o";
    std::array<char*, 4> words = {name.data(), flag.data(), mount_options.data(), nullptr};
    fuse_args arguments = FUSE_ARGS_INIT(3, words.data());
    const fuse_lowlevel_ops operations{};
    fuse_set_log_func(keep_complaint);
    session_.reset(fuse_session_new(&arguments, &operations, sizeof operations, nullptr));
    fuse_opt_free_args(&arguments);
    if (!session_ || fuse_session_mount(session_.get(), options_.directory.c_str()) != 0) {
        while (last_complaint.ends_with('\n')) {
            last_complaint.pop_back();
        }
        return fail(ErrorCode::kPermissionDenied,
                    fmt::format("cannot mount on {}: {}. Only root can by itself; others need "
                                "fusermount3 (package fuse3) and /dev/fuse",
                                options_.directory, last_complaint));
    }
    fuse_ = fuse_session_fd(session_.get());
    mounted_ = true;
    return {};
}

Result<void> Holder::listen() {
    STELLARIUM_ASSIGN(const sockaddr_un address, unix_address(options_.socket));
    socket_ = UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    // What a holder that was killed has left; a living one would have been asked.
    unlink(options_.socket.c_str());
    const mode_t mask = umask(0177);
    const bool bound = socket_ && bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address),
                                       sizeof address) == 0;
    const int failed = errno;
    umask(mask);
    if (!bound || ::listen(socket_.get(), kMaxClients) != 0) {
        return std::unexpected(
            Error::from_errno(bound ? errno : failed, "listen on " + options_.socket));
    }
    listening_ = true;
    if (options_.owner && lchown(options_.socket.c_str(), *options_.owner,
                                 options_.group.value_or(static_cast<gid_t>(-1))) != 0) {
        return std::unexpected(
            Error::from_errno(errno, "give " + options_.socket + " to the daemon's user"));
    }
    return {};
}

bool Holder::connected() const {
    pollfd look{.fd = fuse_, .events = 0, .revents = 0};
    return poll(&look, 1, 0) <= 0 || (look.revents & (POLLERR | POLLHUP)) == 0;
}

/// Not lazily: a file that is open stays usable. The daemon serves meanwhile, for the kernel writes
/// back what was changed through mappings.
std::pair<HolderResult, std::string> Holder::unmount() {
    const char* const directory = options_.directory.c_str();
    if (umount2(directory, UMOUNT_NOFOLLOW) != 0) {
        if (errno == EPERM &&
            run_program({"fusermount3", "-u", "-q", "--", options_.directory}) == 0) {
            mounted_ = false;
            return {HolderResult::kDone, ""};
        }
        if (errno == EINVAL || !connected()) {  // Somebody else was faster.
            mounted_ = false;
            return {HolderResult::kDone, ""};
        }
        return {HolderResult::kBusy,
                fmt::format("{} cannot be unmounted: {}", directory,
                            errno == EPERM ? "fusermount3 says that it is in use"
                                           : Error::from_errno(errno, "umount").message())};
    }
    mounted_ = false;
    return {HolderResult::kDone, ""};
}

void Holder::answer(int client) {
    const auto packet = receive_packet(client);
    if (!packet || packet->bytes.empty()) {
        return;
    }
    HolderStatus status{.pid = getpid(), .store = store_, .directory = options_.directory};
    HolderResult result = HolderResult::kDone;
    std::string message;
    std::vector<int> descriptors;
    const auto request = decode_request(bytes_of(std::string_view(packet->bytes)));
    const auto command =
        request ? static_cast<HolderCommand>(request->command.get()) : HolderCommand::kStatus;
    if (!request) {
        result = HolderResult::kFailed;
        message = request.error().message();
    } else if (command == HolderCommand::kAdopt) {
        // One directory shows one store for as long as it is mounted: its files' numbers, and the
        // pages that the kernel has of them, are that store's.
        if (store_ != StoreUuid{} && store_ != request->store) {
            result = HolderResult::kOtherStore;
            message =
                fmt::format("{} shows another store, until it is unmounted", options_.directory);
        } else {
            store_ = request->store;
            status.store = store_;
            descriptors = {fuse_, table_.get()};
        }
    } else if (command == HolderCommand::kTable) {
        descriptors = {table_.get()};
    } else if (command == HolderCommand::kUnmount && options_.stay) {
        result = HolderResult::kBusy;
        message = fmt::format("{} stays mounted until its holder is stopped", options_.directory);
    } else if (command == HolderCommand::kUnmount) {
        std::tie(result, message) = unmount();
    } else if (command != HolderCommand::kStatus) {
        result = HolderResult::kFailed;
        message = fmt::format("there is no command {}", request->command.get());
    }
    const std::string text = encode_answer(result, status, message);
    // Whoever asked and did not wait for the answer has none.
    [[maybe_unused]] const Result<void> sent =
        send_packet(client, bytes_of(std::string_view(text)), descriptors);
}

void Holder::serve() {
    std::vector<UniqueFd> clients;
    while (mounted_ && stop_asked == 0) {
        std::vector<pollfd> polled{{.fd = socket_.get(), .events = POLLIN, .revents = 0}};
        for (const UniqueFd& client : clients) {
            polled.push_back({.fd = client.get(), .events = POLLIN, .revents = 0});
        }
        // /dev/fuse is looked at now and then and not waited at: whoever waits there is woken by
        // every request that the kernel queues.
        const int ready = poll(polled.data(), polled.size(), kLookIntervalMs);
        if (!connected()) {
            break;
        }
        if (ready <= 0) {
            continue;
        }
        for (size_t i = clients.size(); i-- > 0;) {
            const short events = polled[i + 1].revents;
            if ((events & POLLIN) != 0) {
                answer(clients[i].get());
            }
            if ((events & (POLLHUP | POLLERR)) != 0) {
                clients.erase(clients.begin() + static_cast<std::ptrdiff_t>(i));
            }
        }
        if ((polled[0].revents & POLLIN) != 0) {
            UniqueFd client(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
            ucred peer{};
            socklen_t length = sizeof peer;
            const bool known =
                client && getsockopt(client.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 &&
                (peer.uid == 0 || peer.uid == options_.owner.value_or(geteuid()));
            if (known && clients.size() < kMaxClients) {
                clients.push_back(std::move(client));
            }
        }
    }
    // Before clients hear that we go: the next holder makes its socket at the same place.
    stop_listening();
    if (mounted_ && connected()) {
        // Told to end. Files that are open stay usable while a daemon has the descriptor.
        if (umount2(options_.directory.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) != 0 &&
            errno == EPERM) {
            run_program({"fusermount3", "-u", "-z", "-q", "--", options_.directory});
        }
    }
}

/// The program beside this one or beside the daemon, in the build folder, or where it is installed.
Result<std::string> holder_program() {
    std::error_code error;
    const std::filesystem::path own = std::filesystem::read_symlink("/proc/self/exe", error);
    const std::filesystem::path folder = own.parent_path();
    for (const auto& path :
         {folder / "stellarium-mount-holder",
          folder.parent_path() / "libexec" / "stellarium" / "stellarium-mount-holder",
          folder.parent_path() / "daemon" / "stellarium-mount-holder"}) {
        if (access(path.c_str(), X_OK) == 0) {
            return path.string();
        }
    }
    return fail(ErrorCode::kNotFound,
                fmt::format("stellarium-mount-holder is neither beside {} nor in {}", own.string(),
                            (folder.parent_path() / "libexec" / "stellarium").string()));
}

/// In a child: becomes the holder, with nothing of ours but the pipe.
[[noreturn]] void become_holder(const std::vector<char*>& arguments, int report) {
    // A second fork, so that whoever adopts orphans waits for it and not we.
    setsid();
    if (fork() != 0) {
        _exit(0);
    }
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (const int standard : {0, 1, 2}) {
        dup2(null, standard);
    }
    const int kept = fcntl(report, F_DUPFD, kReportDescriptor + 1);
    dup2(kept, kReportDescriptor);
    close_range(kReportDescriptor + 1, ~0U, 0);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    signal(SIGPIPE, SIG_DFL);
    if (chdir("/") == 0) {
        execv(arguments[0], arguments.data());
    }
    const std::string text =
        Error::from_errno(errno, std::string("start ") + arguments[0]).message();
    [[maybe_unused]] const ssize_t told = write(kReportDescriptor, text.data(), text.size());
    _exit(127);
}

}  // namespace

int run_holder(const HolderOptions& options,
               const std::function<void(const std::string&)>& report) {
    struct sigaction stop{};
    stop.sa_handler = on_stop;  // No SA_RESTART: poll() returns.
    sigaction(SIGTERM, &stop, nullptr);
    sigaction(SIGINT, &stop, nullptr);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    Holder holder(options);
    Result<void> ready = holder.mount();
    if (ready) {
        ready = holder.listen();
        if (!ready) {
            umount2(options.directory.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW);
        }
    }
    if (!ready) {
        report(ready.error().message());
        return error_mapping(ready.error().code()).exit_code;
    }
    report("");
    holder.serve();
    return 0;
}

Result<void> start_holder(const HolderOptions& options) {
    STELLARIUM_ASSIGN(const std::string program, holder_program());
    std::vector<std::string> words = {program,
                                      "--report-descriptor=" + std::to_string(kReportDescriptor),
                                      "--directory=" + options.directory,
                                      "--socket=" + options.socket, "--store=" + options.store};
    if (options.owner) {
        words.push_back("--owner=" + std::to_string(*options.owner));
    }
    if (options.group) {
        words.push_back("--group=" + std::to_string(*options.group));
    }
    std::vector<char*> arguments;
    arguments.reserve(words.size() + 1);
    for (std::string& word : words) {
        arguments.push_back(word.data());
    }
    arguments.push_back(nullptr);
    std::array<int, 2> ends{};
    if (pipe2(ends.data(), O_CLOEXEC) != 0) {
        return std::unexpected(Error::from_errno(errno, "make a pipe"));
    }
    const UniqueFd reading(ends[0]);
    UniqueFd writing(ends[1]);
    const pid_t child = fork();
    if (child < 0) {
        return std::unexpected(
            Error::from_errno(errno, "start the holder of " + options.directory));
    }
    if (child == 0) {
        become_holder(arguments, writing.get());
    }
    writing.reset();
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    // Its report ends with its end of the pipe, whatever becomes of it.
    std::string text;
    std::array<char, 1024> buffer{};
    ssize_t got = 0;
    while ((got = read(reading.get(), buffer.data(), buffer.size())) > 0 ||
           (got < 0 && errno == EINTR)) {
        text.append(buffer.data(), static_cast<size_t>(std::max<ssize_t>(got, 0)));
    }
    if (text == "mounted\n") {
        return {};
    }
    return fail(ErrorCode::kUnavailable,
                text.empty() ? fmt::format("{} ended without a word", program) : text);
}

}  // namespace stellarium::fuse
