// Requests that wait have some of the threads, and nobody is forgotten.
#include "frontend/fuse/waiting.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace stellarium::fuse {
namespace {

constexpr std::chrono::seconds kTimeout{120};

/// Stands for a buffer without room, one for each node: jobs wait until it opens.
class Gate {
  public:
    void pass() {
        std::unique_lock lock(mutex_);
        ++waiting_;
        changed_.notify_all();
        EXPECT_TRUE(changed_.wait_for(lock, kTimeout, [&] { return open_; }));
        --waiting_;
        ++passed_;
        changed_.notify_all();
    }
    void open() {
        const std::lock_guard lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }
    bool wait_for_waiting(unsigned count) {
        std::unique_lock lock(mutex_);
        return changed_.wait_for(lock, kTimeout, [&] { return waiting_ == count; });
    }
    unsigned passed() {
        const std::lock_guard lock(mutex_);
        return passed_;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    unsigned waiting_ = 0;
    unsigned passed_ = 0;
    bool open_ = false;
};

/// Threads that each bring requests, as those that read from the kernel do.
class WaitingRequestsTest : public testing::Test {
  protected:
    void bring(uint64_t node, Gate& gate, size_t bytes = 1) {
        threads_.emplace_back([this, node, bytes, &gate] {
            waiting_.wait(
                node, bytes, [&gate] { gate.pass(); },
                [&gate] { return WaitingRequests::Job([&gate] { gate.pass(); }); });
            returned_.fetch_add(1);
        });
    }
    void until_returned(unsigned count) {
        const auto end = std::chrono::steady_clock::now() + kTimeout;
        while (returned_.load() < count && std::chrono::steady_clock::now() < end) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        ASSERT_EQ(returned_.load(), count);
    }
    void join() {
        for (std::thread& thread : threads_) {
            thread.join();
        }
        threads_.clear();
    }

    WaitingRequests waiting_{{.of_node = 2, .in_all = 3, .kept_bytes = 10}};
    std::vector<std::thread> threads_;
    std::atomic<unsigned> returned_{0};
};

TEST_F(WaitingRequestsTest, ANodeHasItsShareOfTheThreads) {
    Gate full;
    bring(1, full);
    bring(1, full);
    ASSERT_TRUE(full.wait_for_waiting(2));
    for (int i = 0; i < 5; ++i) {
        bring(1, full);
    }
    // Those go back to read other requests.
    until_returned(5);
    EXPECT_EQ(waiting_.status().waiting, 2U);
    EXPECT_EQ(waiting_.status().kept, 5U);
    EXPECT_EQ(waiting_.status().kept_bytes, 5U);
    full.open();
    join();
    EXPECT_EQ(full.passed(), 7U);
    EXPECT_EQ(waiting_.status().kept, 0U);
    EXPECT_EQ(waiting_.status().kept_bytes, 0U);
    EXPECT_EQ(waiting_.status().waiting, 0U);
}

TEST_F(WaitingRequestsTest, AllNodesTogetherLeaveThreadsToOthers) {
    Gate first;
    Gate second;
    bring(1, first);
    bring(1, first);
    ASSERT_TRUE(first.wait_for_waiting(2));
    bring(2, second);
    ASSERT_TRUE(second.wait_for_waiting(1));
    bring(2, second);
    bring(3, second);
    until_returned(2);
    EXPECT_EQ(waiting_.status().kept, 2U);
    // Whoever has waited goes on with what another node has kept.
    first.open();
    ASSERT_TRUE(second.wait_for_waiting(3));
    second.open();
    join();
    EXPECT_EQ(first.passed(), 2U);
    EXPECT_EQ(second.passed(), 3U);
    EXPECT_EQ(waiting_.status().kept, 0U);
}

TEST_F(WaitingRequestsTest, WhatIsKeptIsBounded) {
    Gate full;
    bring(1, full);
    bring(1, full);
    ASSERT_TRUE(full.wait_for_waiting(2));
    bring(1, full, 8);
    until_returned(1);
    // No room for a copy: it waits with its thread.
    bring(1, full, 8);
    ASSERT_TRUE(full.wait_for_waiting(3));
    EXPECT_EQ(waiting_.status().kept_bytes, 8U);
    full.open();
    join();
    EXPECT_EQ(full.passed(), 4U);
    EXPECT_EQ(waiting_.status().kept_bytes, 0U);
}

}  // namespace
}  // namespace stellarium::fuse
