// Lets whoever frees something wait for those who may still be reading it.
//
// A reader holds a Pin while it looks at what may be freed. Whoever frees first makes it impossible
// to find (with sequentially consistent stores), then calls wait(), then frees: a reader that took
// its pin before wait() has left when wait() returns, and one that took it later finds nothing.
// (Sleepable RCU with its two epochs; the counters are spread so that readers do not meet.)
//
//     { const ReaderGate::Pin pin = gate.enter(); if (!is_dead(page)) read(page); }
//     set_dead(page); gate.wait(); punch(page);
//
// Thread rule: any thread; wait() is for threads without a pin.
// Cost: a pin is two atomic additions on a cache line that few threads share.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace stellarium::nebula {

class ReaderGate {
  public:
    class Pin {
      public:
        explicit Pin(std::atomic<uint64_t>& inside) : inside_(inside) {
            inside_.fetch_add(1, std::memory_order_seq_cst);
        }
        ~Pin() { inside_.fetch_sub(1, std::memory_order_release); }
        Pin(const Pin&) = delete;
        Pin& operator=(const Pin&) = delete;

      private:
        std::atomic<uint64_t>& inside_;
    };

    Pin enter() {
        return Pin(
            shards_[shard_of_this_thread()].inside[epoch_.load(std::memory_order_seq_cst) % 2]);
    }

    /// Returns when every pin taken before this call is gone.
    void wait() {
        const std::lock_guard guard(mutex_);
        // Twice: a reader may have read the epoch long ago, and count itself in the older one.
        for (int i = 0; i < 2; ++i) {
            const uint64_t old = epoch_.fetch_add(1, std::memory_order_seq_cst) % 2;
            for (Shard& shard : shards_) {
                auto pause = std::chrono::microseconds(1);
                while (shard.inside[old].load(std::memory_order_seq_cst) != 0) {
                    std::this_thread::sleep_for(pause);
                    pause = std::min(2 * pause, std::chrono::microseconds(1000));
                }
            }
        }
    }

  private:
    static constexpr size_t kShards = 32;
    static size_t shard_of_this_thread() {
        thread_local const size_t kShard =
            std::hash<std::thread::id>()(std::this_thread::get_id()) % kShards;
        return kShard;
    }
    struct alignas(64) Shard {
        std::array<std::atomic<uint64_t>, 2> inside{};
    };

    std::array<Shard, kShards> shards_;
    std::atomic<uint64_t> epoch_{0};
    std::mutex mutex_;  ///< One wait at a time.
};

}  // namespace stellarium::nebula
