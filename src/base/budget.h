// A bounded amount of something that many holders share, as the descriptors of a process.
//
//     auto budget = std::make_shared<Budget>(1000);
//     BudgetShare share(budget);              // holds nothing yet
//     if (!share.resize(3)) { /* less than that is left; the share is what it was */ }
//
// Thread rule: a Budget from any thread; a share belongs to one thread at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace stellarium {

class Budget {
  public:
    explicit Budget(uint64_t total) : total_(total) {}

    /// All of `amount`, or false and nothing.
    bool take(uint64_t amount) {
        uint64_t taken = taken_.load(std::memory_order_relaxed);
        do {
            if (amount > total_ - taken) {
                return false;
            }
        } while (!taken_.compare_exchange_weak(taken, taken + amount, std::memory_order_relaxed));
        return true;
    }
    void give_back(uint64_t amount) { taken_.fetch_sub(amount, std::memory_order_relaxed); }

    uint64_t total() const { return total_; }
    uint64_t taken() const { return taken_.load(std::memory_order_relaxed); }

  private:
    const uint64_t total_;
    std::atomic<uint64_t> taken_{0};
};

/// What one holder has of a budget; given back when it goes. Without a budget there is no bound.
class BudgetShare {
  public:
    explicit BudgetShare(std::shared_ptr<Budget> budget) : budget_(std::move(budget)) {}
    BudgetShare(BudgetShare&& other) noexcept
        : budget_(std::move(other.budget_)), held_(std::exchange(other.held_, 0)) {}
    BudgetShare& operator=(BudgetShare&&) = delete;
    ~BudgetShare() {
        if (budget_) {
            budget_->give_back(held_);
        }
    }

    /// Holds `amount` from now on, or false and as much as before. Less is always possible.
    [[nodiscard]] bool resize(uint64_t amount) {
        if (budget_ && amount > held_ && !budget_->take(amount - held_)) {
            return false;
        }
        if (budget_ && amount < held_) {
            budget_->give_back(held_ - amount);
        }
        held_ = amount;
        return true;
    }
    uint64_t held() const { return held_; }

  private:
    std::shared_ptr<Budget> budget_;
    uint64_t held_ = 0;
};

}  // namespace stellarium
