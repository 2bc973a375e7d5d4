#include "frontend/fuse/waiting.h"

#include <algorithm>

namespace stellarium::fuse {

void WaitingRequests::wait(uint64_t node, size_t bytes, const Job& here,
                           const std::function<Job()>& keep) {
    {
        const std::lock_guard lock(mutex_);
        Node& at = nodes_[node];
        // With a limit reached, somebody waits, and comes back for what is kept.
        if ((at.waiting >= limits_.of_node || waiting_ >= limits_.in_all) &&
            bytes <= limits_.kept_bytes - std::min(kept_bytes_, limits_.kept_bytes)) {
            at.kept.push_back({.bytes = bytes, .job = keep()});
            ++kept_;
            kept_bytes_ += bytes;
            return;
        }
        ++at.waiting;
        ++waiting_;
    }
    here();
    auto following = next(node);
    while (following) {
        following->second();
        following = next(following->first);
    }
}

std::optional<std::pair<uint64_t, WaitingRequests::Job>> WaitingRequests::next(uint64_t node) {
    const std::lock_guard lock(mutex_);
    const auto own = nodes_.find(node);
    --own->second.waiting;
    --waiting_;
    auto found = own;
    if (own->second.kept.empty()) {
        found = std::ranges::find_if(nodes_, [this](const auto& each) {
            return !each.second.kept.empty() && each.second.waiting < limits_.of_node;
        });
        if (own->second.waiting == 0) {
            nodes_.erase(own);
        }
        if (found == nodes_.end()) {
            return std::nullopt;
        }
    }
    Node& at = found->second;
    Kept kept = std::move(at.kept.front());
    at.kept.pop_front();
    ++at.waiting;
    ++waiting_;
    --kept_;
    kept_bytes_ -= kept.bytes;
    return std::pair(found->first, std::move(kept.job));
}

WaitingRequests::Status WaitingRequests::status() const {
    const std::lock_guard lock(mutex_);
    return {.waiting = waiting_, .kept = kept_, .kept_bytes = kept_bytes_};
}

}  // namespace stellarium::fuse
