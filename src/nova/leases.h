// States that somebody reads beside their volume: of exports, differences and details.
//
// A garbage collection takes every leased state for a root, so that what it names stays, whatever
// becomes of the volume meanwhile. take() copies the state and lists it in one step: a collection
// that does not see the lease has frozen the catalog before the state was copied, and keeps all
// that is newer.
//
//     const StateLease lease = leases.take("export of 'a'", [&] { return entity->state(); });
//     STELLARIUM_TRY(read_state(store, cache, lease.state(), ...));
//
// Thread rule: StateLeases from any thread; a lease belongs to one thread at a time, and its
// state() may be read by many.
// Ownership: the StateLeases outlive their leases.
#pragma once

#include <functional>
#include <iterator>
#include <list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "nova/tree.h"

namespace stellarium::nova {

class StateLeases;

/// Keeps one state listed while it lives.
class StateLease {
  public:
    StateLease(StateLease&& other) noexcept
        : leases_(std::exchange(other.leases_, nullptr)), at_(other.at_) {}
    StateLease& operator=(StateLease&&) = delete;
    ~StateLease();

    const VolumeState& state() const { return at_->second; }

  private:
    friend class StateLeases;
    using Listed = std::list<std::pair<std::string, VolumeState>>;
    StateLease(StateLeases& leases, Listed::iterator at) : leases_(&leases), at_(at) {}

    StateLeases* leases_;
    Listed::iterator at_;
};

class StateLeases {
  public:
    /// `what` is for messages. `state` is called under this object's lock.
    StateLease take(std::string what, const std::function<VolumeState()>& state) {
        const std::lock_guard lock(mutex_);
        listed_.emplace_back(std::move(what), VolumeState{});
        const auto at = std::prev(listed_.end());
        at->second = state();
        return {*this, at};
    }

    /// Copies of all leased states, and what they are for.
    std::vector<std::pair<std::string, VolumeState>> all() const {
        const std::lock_guard lock(mutex_);
        return {listed_.begin(), listed_.end()};
    }

  private:
    friend class StateLease;
    mutable std::mutex mutex_;
    StateLease::Listed listed_;  ///< Guarded by mutex_.
};

inline StateLease::~StateLease() {
    if (leases_ != nullptr) {
        // Declared first, so that the state goes after the lock: that may free many nodes.
        Listed ended;
        const std::lock_guard lock(leases_->mutex_);
        ended.splice(ended.end(), leases_->listed_, at_);
    }
}

}  // namespace stellarium::nova
