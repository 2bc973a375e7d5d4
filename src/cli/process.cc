#include "cli/process.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/interrupt.h"

extern char** environ;

namespace stellarium::cli {
namespace {

constexpr size_t kMaxOutputBytes = size_t{16} << 20;

class Pipe {
  public:
    Pipe() = default;
    ~Pipe() {
        close_end(0);
        close_end(1);
    }
    Pipe(const Pipe&) = delete;
    Pipe& operator=(const Pipe&) = delete;

    Result<void> open() {
        if (pipe2(ends_.data(), O_CLOEXEC) != 0) {
            return std::unexpected(Error::from_errno(errno, "make a pipe"));
        }
        return {};
    }
    int end(size_t which) const { return ends_[which]; }
    void close_end(size_t which) {
        if (ends_[which] >= 0) {
            ::close(ends_[which]);
            ends_[which] = -1;
        }
    }

  private:
    std::array<int, 2> ends_{-1, -1};
};

/// How long an interrupt may go unnoticed that comes just before the wait.
constexpr int kInterruptCheckMs = 100;

/// Reads both pipes to their ends. kCancelled when the user interrupts it.
Result<void> drain(Pipe& out, std::string& out_text, Pipe& err, std::string& err_text) {
    std::array<char, 16384> buffer{};
    while (out.end(0) >= 0 || err.end(0) >= 0) {
        std::array<pollfd, 2> waits{pollfd{out.end(0), POLLIN, 0}, pollfd{err.end(0), POLLIN, 0}};
        STELLARIUM_TRY(check_interrupt());
        if (poll(waits.data(), waits.size(), kInterruptCheckMs) < 0) {
            if (errno == EINTR) {
                continue;
            }
            return std::unexpected(Error::from_errno(errno, "wait for a tool's output"));
        }
        for (size_t i = 0; i < waits.size(); ++i) {
            if (waits[i].revents == 0) {
                continue;
            }
            Pipe& pipe = i == 0 ? out : err;
            std::string& text = i == 0 ? out_text : err_text;
            const ssize_t got = read(pipe.end(0), buffer.data(), buffer.size());
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got <= 0) {
                pipe.close_end(0);
                continue;
            }
            text.append(buffer.data(), static_cast<size_t>(got));
            if (text.size() > kMaxOutputBytes) {
                return fail(ErrorCode::kLimitExceeded, "a tool prints without end");
            }
        }
    }
    return {};
}

}  // namespace

Error missing_tool(const std::string& tool, const std::string& debian_package) {
    return {ErrorCode::kUnavailable,
            fmt::format("{} is needed and is not installed; on Debian: apt install {}", tool,
                        debian_package)};
}

bool tool_exists(const std::string& tool) {
    const char* const path = std::getenv("PATH");
    std::string_view rest = path == nullptr ? "/usr/bin:/bin" : path;
    while (true) {
        const size_t colon = rest.find(':');
        const std::string folder(rest.substr(0, colon));
        if (access(((folder.empty() ? "." : folder) + "/" + tool).c_str(), X_OK) == 0) {
            return true;
        }
        if (colon == std::string_view::npos) {
            return false;
        }
        rest.remove_prefix(colon + 1);
    }
}

std::string one_line(std::string text) {
    while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) {
        text.pop_back();
    }
    constexpr size_t kMostBytes = 2000;
    if (text.size() > kMostBytes) {
        text = "..." + text.substr(text.size() - kMostBytes);
    }
    std::string line;
    for (const char c : text) {
        line += c == '\n' ? std::string("; ") : std::string(1, c);
    }
    return line;
}

Result<std::string> run_tool(const std::vector<std::string>& arguments,
                             const std::string& debian_package,
                             std::initializer_list<int> good_codes) {
    if (!tool_exists(arguments[0])) {
        return std::unexpected(missing_tool(arguments[0], debian_package));
    }
    Pipe out;
    Pipe err;
    STELLARIUM_TRY(out.open());
    STELLARIUM_TRY(err.open());
    std::vector<char*> argv;
    argv.reserve(arguments.size() + 1);
    for (const std::string& argument : arguments) {
        argv.push_back(const_cast<char*>(argument.c_str()));
    }
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, out.end(1), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, err.end(1), STDERR_FILENO);
    pid_t child = 0;
    const int failed = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failed != 0) {
        return std::unexpected(Error::from_errno(failed, "run " + arguments[0]));
    }
    out.close_end(1);
    err.close_end(1);
    std::string out_text;
    std::string err_text;
    const Result<void> drained = drain(out, out_text, err, err_text);
    if (!drained) {
        kill(child, SIGKILL);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR) {
            return std::unexpected(Error::from_errno(errno, "wait for " + arguments[0]));
        }
    }
    STELLARIUM_TRY(drained);
    if (!WIFEXITED(status) ||
        std::find(good_codes.begin(), good_codes.end(), WEXITSTATUS(status)) == good_codes.end()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} failed: {}", arguments[0],
                                err_text.empty() ? "it was killed" : one_line(err_text)));
    }
    return out_text;
}

}  // namespace stellarium::cli
