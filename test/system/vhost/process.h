// A program that a test starts, listens to, waits for and kills.
//
// Thread rule: one thread. Ownership: the program is killed with its Process.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/unique_fd.h"

extern char** environ;

namespace stellarium::vhost {

class Process {
  public:
    /// Starts a program, found by its path, whose output (`output_fd`: 1 or 2) can be read here.
    explicit Process(std::vector<std::string> words, int output_fd = STDOUT_FILENO) {
        std::vector<char*> arguments;
        arguments.reserve(words.size() + 1);
        for (std::string& word : words) {
            arguments.push_back(word.data());
        }
        arguments.push_back(nullptr);
        std::array<int, 2> output{};
        EXPECT_EQ(::pipe2(output.data(), O_CLOEXEC), 0);
        output_ = UniqueFd(output[0]);
        UniqueFd writer(output[1]);
        posix_spawn_file_actions_t actions;
        ::posix_spawn_file_actions_init(&actions);
        ::posix_spawn_file_actions_adddup2(&actions, writer.get(), output_fd);
        EXPECT_EQ(
            ::posix_spawn(&pid_, words[0].c_str(), &actions, nullptr, arguments.data(), environ),
            0);
        ::posix_spawn_file_actions_destroy(&actions);
    }
    ~Process() { kill(); }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;

    /// Reads until the output contains `text`. Its end would mean that the program has ended.
    void wait_for(std::string_view text) {
        std::string seen;
        char next = 0;
        while (seen.find(text) == std::string::npos) {
            if (::read(output_.get(), &next, 1) != 1) {
                ADD_FAILURE() << "it said: " << seen;
                return;
            }
            seen += next;
        }
    }
    /// Waits for its end, and returns how it was.
    int wait() {
        int status = -1;
        ::waitpid(std::exchange(pid_, -1), &status, 0);
        return status;
    }
    pid_t pid() const { return pid_; }
    void terminate() const { ::kill(pid_, SIGTERM); }
    /// Reads what it says, so that it can go on, until it closes its output.
    void drain() {
        std::array<char, 4096> ignored{};
        while (::read(output_.get(), ignored.data(), ignored.size()) > 0) {
        }
    }
    void kill() {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            wait();
        }
    }

  private:
    pid_t pid_ = -1;
    UniqueFd output_;
};

}  // namespace stellarium::vhost
