// One connected front-end: its features, memory and virtqueues, and the requests it has in flight.
//
// Control messages are checked against one table (session.cc) for payload size, descriptors and
// negotiated features before a handler sees them. Some messages (stopping a ring, a reset) are
// answered only when the ring's requests are finished; until then no further message is read.
//
// A request is first tried on the data thread without waiting. When it would have to wait it goes
// to the blocking pool, and a flush to the device; it comes back by on_completed().
//
// A device with limits of rate takes a request only when its throttle admits it (throttle.h). A
// ring whose next request is not admitted is held back: it is not read, and its guest is not asked
// for kicks, until the worker's timer says that there are tokens. Nothing is taken from it
// meanwhile, so it can be stopped, reset or lost as if it were idle. Held rings take turns: one
// that got something waits behind those that got nothing.
//
// After close() nothing of the guest's memory is written by this session's rings any more: the
// front-end may already have handed the rings to someone else. What waits for a thread is given up;
// what the device has begun is finished, its completion is dropped, and only then may the next
// front-end connect. It finds all of these requests by the in-flight region (or by its own base
// index) and submits them again, after everything of this session has taken effect.
//
// Thread rule: the device's data thread.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "base/budget.h"
#include "base/error.h"
#include "frontend/vhost/device.h"
#include "frontend/vhost/guest_memory.h"
#include "frontend/vhost/protocol.h"
#include "frontend/vhost/request.h"
#include "frontend/vhost/virtqueue.h"
#include "frontend/vhost/wire.h"
#include "frontend/vhost/worker.h"

namespace stellarium::vhost {

/// Feature bits offered for a device.
uint64_t offered_features(bool read_only);
uint64_t offered_protocol_features();

/// A kick, call or error descriptor of a ring.
struct EventFd {
    UniqueFd fd;
    bool is_socket = false;

    /// Adds one event. Nothing happens when there is no descriptor. False when the front-end made
    /// the write wait, see watchdog.h.
    [[nodiscard]] bool signal(Worker& worker) const;
};

class Session : public std::enable_shared_from_this<Session> {
  public:
    Session(std::shared_ptr<Device> device, UniqueFd socket);

    /// Starts watching the socket.
    Result<void> open();

    void on_socket();
    void on_kick(uint16_t queue);
    /// Publishes what is staged and takes requests from the rings that have work, in turn, within
    /// the budget.
    void take_turn();
    /// For a ring without kick descriptor; false when it no longer is one.
    bool poll(uint16_t queue);
    /// Looks again at the rings that are held back.
    void on_timer();
    void on_limits();
    void on_completed(std::unique_ptr<Request> request);
    /// Tells the guest that the configuration space has changed.
    void on_resize();
    /// Takes no more requests, gives up those that have not begun, and closes when none is in
    /// flight.
    void drain();

  private:
    friend struct MessageRule;

    struct Queue {
        Virtqueue ring;
        EventFd kick;
        EventFd call;
        EventFd error;
        EventSource source;
        bool enabled = false;
        bool kick_set = false;  ///< By descriptor, or by the flag that asks for polling.
        bool polled = false;
        bool on_poll_list = false;
        bool ready = false;    ///< Among ready_.
        bool stalled = false;  ///< Waits for requests to come back.
        bool held = false;     ///< Among held_.
        size_t was_held = 0;   ///< Of the requests in the ring, those that were held back.
        uint32_t in_flight = 0;
    };

    /// What is done, and answered, when the requests in its way are finished.
    struct Pending {
        MessageType type = MessageType::kGetFeatures;
        uint16_t queue = 0;
        uint64_t status = 0;
        bool active = false;
        bool wants_ack = false;
    };

    // Control messages.
    void handle(Message& message);
    Result<void> get_features(Message& message);
    Result<void> set_features(Message& message);
    Result<void> get_protocol_features(Message& message);
    Result<void> set_protocol_features(Message& message);
    Result<void> set_owner(Message& message);
    Result<void> reset_owner(Message& message);
    Result<void> set_mem_table(Message& message);
    Result<void> add_mem_reg(Message& message);
    Result<void> rem_mem_reg(Message& message);
    Result<void> get_max_mem_slots(Message& message);
    Result<void> set_vring_num(Message& message);
    Result<void> set_vring_addr(Message& message);
    Result<void> set_vring_base(Message& message);
    Result<void> get_vring_base(Message& message);
    Result<void> set_vring_kick(Message& message);
    Result<void> set_vring_call(Message& message);
    Result<void> set_vring_err(Message& message);
    Result<void> set_vring_enable(Message& message);
    Result<void> get_queue_num(Message& message);
    Result<void> set_backend_req_fd(Message& message);
    Result<void> get_config(Message& message);
    Result<void> set_config(Message& message);
    Result<void> get_inflight_fd(Message& message);
    Result<void> set_inflight_fd(Message& message);
    Result<void> reset_device(Message& message);
    Result<void> set_status(Message& message);
    Result<void> get_status(Message& message);

    Result<Queue*> queue_at(uint64_t index);
    Result<Queue*> queue_of_fd_message(Message& message);
    Result<void> reply(const Message& message, Bytes payload, std::span<const int> fds = {});
    Result<void> use_memory(std::shared_ptr<const GuestMemory> memory);
    Result<void> map_region(const RegionDescription& region, int fd,
                            std::shared_ptr<const GuestMemory>& memory);
    Result<void> try_start(Queue& queue);
    void start_pending(const Message& message, uint16_t queue, uint64_t status);
    void finish_pending();
    void clear_kick(Queue& queue);
    BlkConfig config() const;
    bool has(ProtocolFeature feature) const { return (protocol_features_ & bit(feature)) != 0; }

    // Requests.
    bool stopping(const Queue& queue) const;
    bool usable(const Queue& queue) const;
    /// Requests that were in flight before a crash can be, and have not been, taken up again.
    bool has_to_recover(const Queue& queue) const;
    bool running(const Queue& queue) const;
    void schedule(Queue& queue);
    void process(Queue& queue);
    /// The throttle admits a request of this ring.
    bool may_take(const Queue& queue);
    void hold(Queue& queue, bool was_served);
    void release_held();
    void end_holding();
    void start_request(Queue& queue, Chain& chain, const DiskView& disk);
    void submit(Queue& queue, std::unique_ptr<Request> request, Lane lane);
    void submit_flush(Queue& queue, std::unique_ptr<Request> request);
    void go_async(Queue& queue, Request& request);
    void finish(Queue& queue, std::unique_ptr<Request> request);
    void publish(Queue& queue);
    /// Breaks off, and says false, when a shared mapping was lost.
    bool check_memory();
    /// Writes must be durable before they complete.
    bool write_through() const;

    /// Takes for what it holds now from the device's budget. kLimitExceeded.
    Result<void> account_descriptors();
    void break_off(const Error& error);
    void close(std::string_view reason);
    void close_drained();
    uint16_t index_of(const Queue& queue) const {
        return static_cast<uint16_t>(&queue - queues_.data());
    }

    std::shared_ptr<Device> device_;
    Worker& worker_;
    UniqueFd socket_;
    EventSource socket_source_;
    MessageReader reader_;
    UniqueFd backend_channel_;
    BudgetShare descriptors_;

    uint64_t features_ = 0;
    uint64_t protocol_features_ = 0;
    uint64_t status_ = 0;
    std::shared_ptr<const GuestMemory> memory_;
    std::shared_ptr<SharedMapping> inflight_;
    InflightDescription inflight_layout_;
    std::vector<Queue> queues_;
    Pending pending_;
    bool replied_ = false;
    bool refused_ = false;  ///< The message was understood and declined; not fatal.

    std::deque<uint16_t> ready_;  ///< Rings with work, the next one first.
    bool on_ready_list_ = false;  ///< On the worker's list.
    uint64_t turn_budget_ = 0;    ///< What is left of kTurnBudgetBytes in this turn.
    std::deque<uint16_t> held_;   ///< Rings that are held back, the next one first.
    size_t unserved_ = 0;         ///< Those at its front that got nothing when last looked at.
    uint64_t held_since_ns_ = 0;  ///< When held_ is not empty.
    uint64_t timer_at_ns_ = 0;    ///< When held_ is not empty: the worker's timer.
    size_t async_ = 0;            ///< Requests in flight: in the pool, or waiting for a flush.
    bool any_stalled_ = false;
    bool draining_ = false;
    bool closed_ = false;
};

}  // namespace stellarium::vhost
