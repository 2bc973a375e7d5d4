// stellarium-blkbench: load for any vhost-user-blk back-end, without a VM.
//
// It connects as a VMM would, shares memory and rings, and keeps a number of requests in flight on
// every queue of every socket. As many threads as there are processors share the sockets. Latency
// is from making a request available to seeing it used.
//
//     stellarium-blkbench /run/vm1.sock --seconds 10 --depth 32
//     stellarium-blkbench a.sock b.sock --pattern sequential --block-size 64KiB --read-percent 0
//     stellarium-blkbench vm1.sock --read-percent 50 --flush-every 32 --verify --requests 100000
//
// Every page that is written is unlike any other, unless --content repeated asks for the same few
// again and again, which a store with dedup hardly has to write.
//
// --replay FILE reads what FILE lists, a line "OFFSET LENGTH" in bytes for each request, in this
// order and once, with --depth of them in flight: what a guest read as it booted, say.
//
// --verify keeps in mind what was last written to each block of the span, checks every read against
// it, and reads everything that was written once more at the end.

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <nlohmann/json.hpp>
#include <sys/epoll.h>

#include "base/unique_fd.h"
#include "base/units.h"
#include "frontend/vhost/limits.h"
#include "frontend/vhost_client/client.h"

namespace stellarium::bench {
namespace {

using Clock = std::chrono::steady_clock;
using vhost::BlkSlot;
using vhost::DriverQueue;

struct Options {
    std::vector<std::string> sockets;
    std::string pattern = "random";
    std::string block_size = "4KiB";
    std::string offset = "0";
    std::string span;
    uint64_t block_bytes = 0;
    uint64_t offset_bytes = 0;
    uint64_t span_bytes = 0;
    unsigned read_percent = 100;
    unsigned depth = 32;
    unsigned queues = 1;
    unsigned threads = 0;  ///< 0: one for each processor.
    unsigned flush_every = 0;
    unsigned discard_every = 0;
    double seconds = 5;
    uint64_t requests = 0;
    uint64_t seed = 0;
    bool verify = false;
    bool spin = false;
    bool json = false;
    bool huge_pages = false;
    std::string content = "unique";
    std::string replay;
    /// What --replay lists; empty without.
    struct Piece {
        uint64_t offset_bytes;
        uint32_t length_bytes;
    };
    std::vector<Piece> pieces;
};

/// Counts of durations in buckets 3 % wide: 32 for each power of two.
class Histogram {
  public:
    void add(uint64_t ns) {
        ++buckets_[bucket_of(ns)];
        ++count_;
        sum_ns_ += ns;
        max_ns_ = std::max(max_ns_, ns);
    }
    void add(const Histogram& other) {
        for (size_t i = 0; i < buckets_.size(); ++i) {
            buckets_[i] += other.buckets_[i];
        }
        count_ += other.count_;
        sum_ns_ += other.sum_ns_;
        max_ns_ = std::max(max_ns_, other.max_ns_);
    }
    uint64_t count() const { return count_; }
    uint64_t mean_ns() const { return count_ == 0 ? 0 : sum_ns_ / count_; }
    uint64_t max_ns() const { return max_ns_; }
    /// Upper end of the bucket in which the fraction lies.
    uint64_t percentile_ns(double fraction) const {
        auto wanted = static_cast<uint64_t>(fraction * static_cast<double>(count_));
        uint64_t seen = 0;
        for (size_t i = 0; i < buckets_.size(); ++i) {
            seen += buckets_[i];
            if (seen > wanted) {
                return std::min(upper_end(i), max_ns_);
            }
        }
        return max_ns_;
    }

  private:
    static constexpr unsigned kSubBits = 5;
    static size_t bucket_of(uint64_t ns) {
        if (ns < (1U << kSubBits)) {
            return ns;
        }
        auto exponent = static_cast<unsigned>(std::bit_width(ns)) - 1;
        return (size_t{exponent - kSubBits + 1} << kSubBits) +
               ((ns >> (exponent - kSubBits)) & ((1U << kSubBits) - 1));
    }
    static uint64_t upper_end(size_t bucket) {
        if (bucket < (1U << kSubBits)) {
            return bucket;
        }
        uint64_t shift = (bucket >> kSubBits) - 1;
        return (((bucket & ((1U << kSubBits) - 1)) + (1U << kSubBits) + 1) << shift) - 1;
    }
    std::array<uint64_t, size_t{64 - kSubBits + 1} << kSubBits> buckets_{};
    uint64_t count_ = 0;
    uint64_t sum_ns_ = 0;
    uint64_t max_ns_ = 0;
};

enum Kind : uint8_t { kRead, kWrite, kFlush, kDiscard, kKinds };
constexpr std::array<const char*, kKinds> kKindNames = {"read", "write", "flush", "discard"};
constexpr std::array<uint32_t, kKinds> kKindTypes = {vhost::kBlkIn, vhost::kBlkOut,
                                                     vhost::kBlkFlush, vhost::kBlkDiscard};

struct Totals {
    std::array<Histogram, kKinds> latency;
    std::array<uint64_t, kKinds> bytes{};
    uint64_t errors = 0;
    uint64_t mismatches = 0;
    std::string first_problem;
    double seconds = 0;

    void problem(uint64_t& counter, const std::string& text) {
        ++counter;
        if (first_problem.empty()) {
            first_problem = text;
        }
    }
};

/// One socket, its memory, and what is known of the disk behind it.
class Lane {
  public:
    Lane(const Options& options, std::string socket, uint64_t seed)
        : options_(options), socket_(std::move(socket)), seed_(seed), random_(seed) {}

    Result<void> connect() {
        STELLARIUM_ASSIGN(client_, vhost::Client::connect(socket_));
        STELLARIUM_TRY(client_->negotiate(vhost::kUsualFeatures, vhost::kUsualProtocolFeatures));
        STELLARIUM_ASSIGN(vhost::BlkConfig config, client_->config());
        STELLARIUM_TRY(choose_span(config.capacity_sectors * vhost::kSectorBytes));
        if (options_.queues > 1) {
            STELLARIUM_ASSIGN(uint64_t offered, client_->ask_u64(vhost::MessageType::kGetQueueNum));
            if (options_.queues > offered) {
                return fail(
                    ErrorCode::kInvalidArgument,
                    fmt::format("{} offers {} queues, not {}", socket_, offered, options_.queues));
            }
        }
        uint64_t slots = uint64_t{options_.queues} * options_.depth;
        uint64_t ram =
            slots * (options_.block_bytes + 3 * uint64_t{4096}) + 8 * kMiB * options_.queues;
        ram = (ram + 2 * kMiB - 1) / (2 * kMiB) * (2 * kMiB);
        STELLARIUM_ASSIGN(ram_, vhost::GuestRam::create(ram, options_.huge_pages));
        STELLARIUM_TRY(client_->share(*ram_));
        bool event_index = (client_->features() & vhost::feature_bit(vhost::kFeatureEventIdx)) != 0;
        bool indirect =
            (client_->features() & vhost::feature_bit(vhost::kFeatureIndirectDesc)) != 0;
        uint32_t segments = 3 + static_cast<uint32_t>(options_.block_bytes / vhost::kSizeMaxBytes);
        uint16_t size = std::bit_ceil(static_cast<uint16_t>(
            std::max<uint64_t>(uint64_t{options_.depth} * (indirect ? 1 : segments), 128)));
        for (unsigned q = 0; q < options_.queues; ++q) {
            queues_.push_back(std::make_unique<DriverQueue>(*ram_, size, event_index, indirect));
            STELLARIUM_TRY(client_->start_queue(q, *queues_.back(), 0));
            auto& slots_of_queue = slots_.emplace_back(options_.depth);
            for (Slot& slot : slots_of_queue) {
                slot.memory = std::make_unique<BlkSlot>(
                    *ram_, static_cast<uint32_t>(options_.block_bytes), vhost::kSizeMaxBytes);
                if (!options_.verify) {
                    fill(slot.memory->data(), random_(), 0);
                }
            }
            by_head_.emplace_back(size, nullptr);
        }
        return {};
    }

    /// The load begins now.
    void begin() {
        begun_ = progress_ = Clock::now();
        deadline_ = options_.requests != 0
                        ? Clock::time_point::max()
                        : begun_ + std::chrono::duration_cast<Clock::duration>(
                                       std::chrono::duration<double>(options_.seconds));
        next_ = options_.pieces.empty() ? &Lane::next_of_load : &Lane::next_of_replay;
    }

    /// Fills the free slots and takes what is finished. True when something was, so that there may
    /// be more to do; false when completions must come first, or nothing is left to do.
    bool advance() {
        for (size_t q = 0; q < queues_.size(); ++q) {
            bool added = false;
            for (Slot& slot : slots_[q]) {
                if (slot.busy || !(this->*next_)(slot)) {
                    continue;
                }
                start(q, slot);
                added = true;
            }
            if (added) {
                queues_[q]->kick_if_wanted();
            }
        }
        if (in_flight_ == 0) {
            end_phase();
            return !finished_;
        }
        if (!reap()) {
            return false;
        }
        progress_ = Clock::now();
        return true;
    }
    bool finished() const { return finished_; }

    /// Asks for a call at the next completion; true when there is one already.
    bool ask_for_call() {
        bool any = false;
        for (const auto& queue : queues_) {
            queue->set_used_event(queue->used_taken());
            any |= queue->used_index() != queue->used_taken();
        }
        return any;
    }
    void clear_calls() {
        for (const auto& queue : queues_) {
            queue->calls();
        }
    }
    /// Ends the load if the back-end has been silent for too long.
    void check_timeout() {
        if (!finished_ && Clock::now() - progress_ > vhost::kClientTimeout) {
            totals_.problem(totals_.errors, "the back-end stopped answering");
            finished_ = true;
        }
    }
    std::vector<int> call_fds() const {
        std::vector<int> fds;
        for (const auto& queue : queues_) {
            fds.push_back(queue->call_fd());
        }
        return fds;
    }

    const Totals& totals() const { return totals_; }
    const std::string& socket() const { return socket_; }

  private:
    struct Slot {
        std::unique_ptr<BlkSlot> memory;
        Kind kind = kRead;
        uint64_t block = 0;
        uint64_t sector = 0;
        uint32_t bytes = 0;  ///< Of the disk; 0 for a flush.
        bool busy = false;
        Clock::time_point started;
    };

    /// What a verifying run knows of a block.
    struct BlockState {
        uint32_t generation = 0;  ///< 0: never written by us, nothing is known.
        bool discarded = false;
        bool busy = false;
    };

    Result<void> choose_span(uint64_t capacity_bytes) {
        for (const Options::Piece& piece : options_.pieces) {
            if (piece.offset_bytes > capacity_bytes ||
                piece.length_bytes > capacity_bytes - piece.offset_bytes) {
                return fail(ErrorCode::kInvalidArgument,
                            fmt::format("{}: the disk of {} bytes ends before offset {}, which {} "
                                        "reads",
                                        socket_, capacity_bytes,
                                        piece.offset_bytes + piece.length_bytes, options_.replay));
            }
        }
        if (!options_.pieces.empty()) {
            return {};
        }
        uint64_t room = capacity_bytes - std::min(capacity_bytes, options_.offset_bytes);
        uint64_t span = options_.span_bytes == 0 ? room : options_.span_bytes;
        blocks_ = std::min(span, room) / options_.block_bytes;
        // A block in use is never chosen again, so there must be more than are in flight.
        if (span > room || blocks_ < 2 * uint64_t{options_.queues} * options_.depth) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("{}: {} bytes from offset {} of a disk of {} do not hold "
                                    "twice the blocks in flight",
                                    socket_, span, options_.offset_bytes, capacity_bytes));
        }
        states_.resize(blocks_);
        return {};
    }

    /// Chooses what a free slot does next; false when there is nothing to do any more.
    bool next_of_load(Slot& slot) {
        if (options_.requests != 0 ? issued_ >= options_.requests : Clock::now() >= deadline_) {
            return false;
        }
        ++issued_;
        if (flush_due_) {
            flush_due_ = false;
            slot.kind = kFlush;
            slot.sector = 0;
            slot.bytes = 0;
            return true;
        }
        slot.block = options_.pattern == "random" ? random_() % blocks_ : position_;
        while (states_[slot.block].busy) {
            slot.block = (slot.block + 1) % blocks_;
        }
        position_ = (slot.block + 1) % blocks_;
        place(slot);
        BlockState& state = states_[slot.block];
        state.busy = true;
        slot.kind = random_() % 100 < options_.read_percent ? kRead : kWrite;
        if (slot.kind == kWrite && options_.discard_every != 0 &&
            ++changes_ % options_.discard_every == 0) {
            slot.kind = kDiscard;
            vhost::BlkRange range{sector_of(slot.block),
                                  static_cast<uint32_t>(options_.block_bytes >> 9), 0};
            std::memcpy(slot.memory->data().data(), &range, sizeof(range));
            state.discarded = true;
        } else if (slot.kind == kWrite) {
            flush_due_ = options_.flush_every != 0 && ++writes_ % options_.flush_every == 0;
            state.discarded = false;
            ++state.generation;
            if (options_.verify) {
                fill(slot.memory->data(), seed_ + slot.block, state.generation);
            } else if (options_.content == "unique") {
                stamp(slot.memory->data());
            }
        }
        return true;
    }

    /// Reads every block of which something is known.
    bool next_of_check(Slot& slot) {
        while (check_next_ < blocks_ && states_[check_next_].generation == 0) {
            ++check_next_;
        }
        if (check_next_ == blocks_) {
            return false;
        }
        slot.kind = kRead;
        slot.block = check_next_++;
        place(slot);
        states_[slot.block].busy = true;
        return true;
    }

    bool next_of_replay(Slot& slot) {
        if (issued_ == options_.pieces.size()) {
            return false;
        }
        const Options::Piece& piece = options_.pieces[issued_++];
        slot.kind = kRead;
        slot.sector = piece.offset_bytes >> vhost::kSectorShift;
        slot.bytes = piece.length_bytes;
        return true;
    }

    /// Nothing is in flight, and nothing more is to be started.
    void end_phase() {
        if (next_ == &Lane::next_of_check) {
            finished_ = true;
            return;
        }
        totals_.seconds = std::chrono::duration<double>(Clock::now() - begun_).count();
        if (options_.verify && totals_.errors == 0) {
            next_ = &Lane::next_of_check;
        } else {
            finished_ = true;
        }
    }

    void start(size_t q, Slot& slot) {
        slot.busy = true;
        slot.started = Clock::now();
        bool discards = slot.kind == kDiscard;
        uint32_t bytes = discards ? static_cast<uint32_t>(sizeof(vhost::BlkRange)) : slot.bytes;
        uint64_t sector = discards ? 0 : slot.sector;
        std::optional<uint16_t> head =
            queues_[q]->add(slot.memory->prepare(kKindTypes[slot.kind], sector, bytes));
        assert(head);  // The ring has room for every slot.
        by_head_[q][head.value_or(0)] = &slot;
        ++in_flight_;
    }

    bool reap() {
        bool any = false;
        for (size_t q = 0; q < queues_.size(); ++q) {
            while (std::optional<vhost::UsedElement> used = queues_[q]->take_used()) {
                Slot& slot = *by_head_[q].at(used->id);
                finish(slot);
                any = true;
            }
        }
        return any;
    }

    void finish(Slot& slot) {
        auto took =
            std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - slot.started);
        totals_.latency[slot.kind].add(static_cast<uint64_t>(took.count()));
        totals_.bytes[slot.kind] += slot.bytes;
        slot.busy = false;
        --in_flight_;
        if (slot.memory->status() != vhost::kBlkStatusOk) {
            totals_.problem(totals_.errors,
                            fmt::format("{} at sector {} ended with status {}",
                                        kKindNames[slot.kind], slot.sector, slot.memory->status()));
        }
        if (slot.kind == kFlush || !options_.pieces.empty()) {
            return;
        }
        BlockState& state = states_[slot.block];
        state.busy = false;
        if (slot.kind == kRead && options_.verify && state.generation != 0) {
            check(slot, state);
        }
    }

    void check(const Slot& slot, const BlockState& state) {
        // A discarded block may read as zeros or as before (VIRTIO 1.2, 5.2.6.1).
        if (state.discarded && all_zero(slot.memory->data())) {
            return;
        }
        std::vector<std::byte> expected(options_.block_bytes);
        fill(expected, seed_ + slot.block, state.generation);
        if (std::memcmp(expected.data(), slot.memory->data().data(), expected.size()) != 0) {
            totals_.problem(totals_.mismatches,
                            fmt::format("block {} ({} bytes) does not hold generation {}{}",
                                        slot.block, options_.block_bytes, state.generation,
                                        state.discarded ? ", discarded" : ""));
        }
    }

    void place(Slot& slot) const {
        slot.sector = sector_of(slot.block);
        slot.bytes = static_cast<uint32_t>(options_.block_bytes);
    }

    uint64_t sector_of(uint64_t block) const {
        return (options_.offset_bytes + block * options_.block_bytes) >> vhost::kSectorShift;
    }

    static void fill(MutableBytes into, uint64_t a, uint64_t b) {
        uint64_t word = (a * 0x9E3779B97F4A7C15) ^ (b * 0xBF58476D1CE4E5B9);
        for (size_t at = 0; at + 8 <= into.size(); at += 8) {
            std::memcpy(into.data() + at, &word, 8);
            word += 0x94D049BB133111EB;
        }
    }

    /// Makes each page unlike any that was written before, at the cost of one word a page.
    void stamp(MutableBytes into) {
        for (size_t at = 0; at + 8 <= into.size(); at += kPageBytes) {
            uint64_t word = random_();
            std::memcpy(into.data() + at, &word, 8);
        }
    }

    static constexpr size_t kPageBytes = 4096;

    const Options& options_;
    std::string socket_;
    uint64_t seed_;
    std::mt19937_64 random_;
    std::unique_ptr<vhost::Client> client_;
    std::unique_ptr<vhost::GuestRam> ram_;
    std::vector<std::unique_ptr<DriverQueue>> queues_;
    std::vector<std::vector<Slot>> slots_;
    std::vector<std::vector<Slot*>> by_head_;
    std::vector<BlockState> states_;
    uint64_t blocks_ = 0;
    uint64_t position_ = 0;
    uint64_t issued_ = 0;
    uint64_t writes_ = 0;
    uint64_t changes_ = 0;
    uint64_t check_next_ = 0;
    size_t in_flight_ = 0;
    bool flush_due_ = false;
    bool (Lane::*next_)(Slot&) = nullptr;  ///< What the present phase does with a free slot.
    bool finished_ = false;
    Clock::time_point begun_;
    Clock::time_point progress_;  ///< Of the last completion.
    Clock::time_point deadline_;
    Totals totals_;
};

double micros(uint64_t ns) {
    return static_cast<double>(ns) / 1000.0;
}

void print_text(const Options& options, const Totals& all) {
    fmt::print("{:<8} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10}\n", "", "requests",
               "per second", "MiB/s", "mean us", "p50", "p99", "p99.9", "max");
    for (size_t kind = 0; kind < kKinds; ++kind) {
        const Histogram& h = all.latency[kind];
        if (h.count() == 0) {
            continue;
        }
        fmt::print(
            "{:<8} {:>10} {:>10.0f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>10.1f}\n",
            kKindNames[kind], h.count(), static_cast<double>(h.count()) / all.seconds,
            static_cast<double>(all.bytes[kind]) / static_cast<double>(kMiB) / all.seconds,
            micros(h.mean_ns()), micros(h.percentile_ns(0.5)), micros(h.percentile_ns(0.99)),
            micros(h.percentile_ns(0.999)), micros(h.max_ns()));
    }
    fmt::print("errors {}  mismatches {}  seconds {:.3f}  seed {}\n", all.errors, all.mismatches,
               all.seconds, options.seed);
}

void print_json(const Options& options, const Totals& all) {
    nlohmann::json report = {
        {"sockets", options.sockets.size()},
        {"queues", options.queues},
        {"depth", options.depth},
        {"block_bytes", options.block_bytes},
        {"pattern", options.pieces.empty() ? options.pattern : "replay"},
        {"seed", options.seed},
        {"read_percent", options.read_percent},
        {"seconds", all.seconds},
        {"errors", all.errors},
        {"mismatches", all.mismatches},
    };
    for (size_t kind = 0; kind < kKinds; ++kind) {
        const Histogram& h = all.latency[kind];
        report[kKindNames[kind]] = {
            {"requests", h.count()},
            {"bytes", all.bytes[kind]},
            {"requests_per_second", static_cast<double>(h.count()) / all.seconds},
            {"bytes_per_second", static_cast<double>(all.bytes[kind]) / all.seconds},
            {"latency_us",
             {{"mean", micros(h.mean_ns())},
              {"p50", micros(h.percentile_ns(0.5))},
              {"p90", micros(h.percentile_ns(0.9))},
              {"p99", micros(h.percentile_ns(0.99))},
              {"p99.9", micros(h.percentile_ns(0.999))},
              {"max", micros(h.max_ns())}}},
        };
    }
    fmt::print("{}\n", report.dump(2));
}

/// Drives some lanes to their end, in turn; sleeps only when each waits for a completion.
class Driver {
  public:
    Driver(const Options& options, std::vector<Lane*> lanes)
        : options_(options), lanes_(std::move(lanes)) {}

    Result<void> open() {
        epoll_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
        if (!epoll_) {
            return std::unexpected(Error::from_errno(errno, "epoll_create1"));
        }
        for (size_t i = 0; i < lanes_.size(); ++i) {
            for (const int fd : lanes_[i]->call_fds()) {
                epoll_event event{};
                event.events = EPOLLIN;
                event.data.u64 = i;
                if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
                    return std::unexpected(Error::from_errno(errno, "watch a call descriptor"));
                }
            }
        }
        return {};
    }

    void run() {
        for (Lane* lane : lanes_) {
            lane->begin();
        }
        std::vector<Lane*> ready = lanes_;
        std::vector<Lane*> again;
        for (size_t left = lanes_.size(); left > 0;) {
            again.clear();
            for (Lane* lane : ready) {
                const bool moved = lane->advance();
                if (!moved && options_.spin) {
                    lane->check_timeout();
                }
                if (lane->finished()) {
                    --left;
                } else if (moved || options_.spin || lane->ask_for_call()) {
                    again.push_back(lane);
                }
            }
            ready.swap(again);
            if (ready.empty() && left > 0) {
                left -= wait(ready);
            }
        }
    }

  private:
    static constexpr int kEvents = 256;
    static constexpr int kWaitMs = 1000;

    /// Fills in the lanes that were called. Returns how many have ended, for nobody answers them.
    size_t wait(std::vector<Lane*>& ready) {
        std::array<epoll_event, kEvents> events{};
        const int got = ::epoll_wait(epoll_.get(), events.data(), kEvents, kWaitMs);
        for (int i = 0; i < got; ++i) {
            Lane* const lane = lanes_[events[static_cast<size_t>(i)].data.u64];
            lane->clear_calls();
            // More than one of its queues may have called.
            if (!lane->finished() && std::ranges::find(ready, lane) == ready.end()) {
                ready.push_back(lane);
            }
        }
        if (got > 0) {
            return 0;
        }
        size_t ended = 0;
        for (Lane* lane : lanes_) {
            const bool before = lane->finished();
            lane->check_timeout();
            ended += lane->finished() && !before ? 1 : 0;
        }
        return ended;
    }

    const Options& options_;
    std::vector<Lane*> lanes_;
    UniqueFd epoll_;
};

Result<Totals> run_all(const Options& options) {
    std::vector<std::unique_ptr<Lane>> lanes;
    for (const std::string& socket : options.sockets) {
        lanes.push_back(std::make_unique<Lane>(options, socket, options.seed + lanes.size()));
        STELLARIUM_TRY(lanes.back()->connect());
    }
    const size_t count = std::min<size_t>(
        lanes.size(),
        options.threads != 0 ? options.threads : std::max(std::thread::hardware_concurrency(), 1U));
    std::vector<std::vector<Lane*>> shares(count);
    for (size_t i = 0; i < lanes.size(); ++i) {
        shares[i % count].push_back(lanes[i].get());
    }
    std::vector<std::unique_ptr<Driver>> drivers;
    for (std::vector<Lane*>& share : shares) {
        drivers.push_back(std::make_unique<Driver>(options, std::move(share)));
        STELLARIUM_TRY(drivers.back()->open());
    }
    std::vector<std::thread> threads;
    threads.reserve(count);
    for (const auto& driver : drivers) {
        threads.emplace_back([&driver] { driver->run(); });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    Totals all;
    for (const auto& lane : lanes) {
        const Totals& one = lane->totals();
        for (size_t kind = 0; kind < kKinds; ++kind) {
            all.latency[kind].add(one.latency[kind]);
            all.bytes[kind] += one.bytes[kind];
        }
        all.errors += one.errors;
        all.mismatches += one.mismatches;
        all.seconds = std::max(all.seconds, one.seconds);
        if (!one.first_problem.empty()) {
            fmt::print(stderr, "stellarium-blkbench: {}: {}\n", lane->socket(), one.first_problem);
        }
    }
    return all;
}

/// Also makes the buffers as long as the longest request.
Result<void> read_pieces(Options& options) {
    std::ifstream file(options.replay);
    if (!file) {
        return fail(ErrorCode::kNotFound, fmt::format("{} cannot be opened", options.replay));
    }
    Options::Piece piece{};
    while (file >> piece.offset_bytes >> piece.length_bytes) {
        if (piece.offset_bytes % vhost::kSectorBytes != 0 || piece.length_bytes == 0 ||
            piece.length_bytes % vhost::kSectorBytes != 0 || piece.length_bytes > 64 * kMiB) {
            break;
        }
        options.pieces.push_back(piece);
        options.block_bytes = std::max<uint64_t>(options.block_bytes, piece.length_bytes);
    }
    if (!file.eof() || options.pieces.empty()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{}: request {} is not an offset and a length in bytes, multiples "
                                "of 512, the length at most 64MiB",
                                options.replay, options.pieces.size() + 1));
    }
    return {};
}

Result<void> parse_sizes(Options& options) {
    if (!options.replay.empty()) {
        return read_pieces(options);
    }
    STELLARIUM_ASSIGN(options.block_bytes, parse_size(options.block_size));
    STELLARIUM_ASSIGN(options.offset_bytes, parse_size(options.offset));
    if (!options.span.empty()) {
        STELLARIUM_ASSIGN(options.span_bytes, parse_size(options.span));
    }
    if (options.block_bytes == 0 || options.block_bytes % vhost::kSectorBytes != 0 ||
        options.block_bytes > 64 * kMiB || options.offset_bytes % vhost::kSectorBytes != 0) {
        return fail(ErrorCode::kInvalidArgument,
                    "block size and offset must be multiples of 512, the block size at most 64MiB");
    }
    return {};
}

int run(int argc, char** argv) {
    Options options;
    CLI::App app("Load for vhost-user-blk back-ends, without a VM");
    app.add_option("SOCKET", options.sockets, "Sockets of the back-ends")->required();
    app.add_option("--pattern", options.pattern, "random or sequential")
        ->check(CLI::IsMember({"random", "sequential"}));
    app.add_option("--read-percent", options.read_percent,
                   "Share of reads; below 100 the disk is OVERWRITTEN")
        ->check(CLI::Range(0, 100));
    app.add_option("--block-size", options.block_size, "Bytes a request, such as 4KiB");
    app.add_option("--depth", options.depth, "Requests in flight on each queue")
        ->check(CLI::Range(1, 256));
    app.add_option("--queues", options.queues, "Queues of each socket")
        ->check(CLI::Range(1, static_cast<int>(vhost::kMaxQueues)));
    app.add_option("--threads", options.threads,
                   "Threads that drive the sockets; default: one for each processor")
        ->check(CLI::Range(1, 1024));
    app.add_option("--offset", options.offset, "Where the span begins on the disk");
    app.add_option("--span", options.span, "Bytes of the disk to use; default: all");
    app.add_option("--flush-every", options.flush_every, "A flush after every N writes");
    app.add_option("--discard-every", options.discard_every, "Every Nth write is a discard");
    app.add_option("--seconds", options.seconds, "How long to run");
    app.add_option("--requests", options.requests,
                   "How many requests to each socket, instead of --seconds");
    app.add_option(
        "--seed", options.seed,
        "Of the random choices and contents; 0: another one each time, which is reported");
    app.add_option("--content", options.content,
                   "unique: no page is like another; repeated: the same pages again and again")
        ->check(CLI::IsMember({"unique", "repeated"}));
    CLI::Option* replay =
        app.add_option("--replay", options.replay, "Read what this file lists, in order, once");
    app.add_flag("--verify", options.verify, "Check what is read against what was written")
        ->excludes(replay);
    app.add_flag("--spin", options.spin, "Look for completions all the time, without calls");
    app.add_flag("--huge-pages", options.huge_pages, "Guest memory on 2 MiB pages");
    app.add_flag("--json", options.json, "Report as JSON");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
        return app.exit(error) == 0 ? 0 : error_mapping(ErrorCode::kInvalidArgument).exit_code;
    }

    while (options.seed == 0) {
        std::random_device device;
        options.seed = (uint64_t{device()} << 32) | device();
    }
    Result<Totals> totals = [&]() -> Result<Totals> {
        STELLARIUM_TRY(parse_sizes(options));
        return run_all(options);
    }();
    if (!totals) {
        fmt::print(stderr, "stellarium-blkbench: {}\n", totals.error().message());
        return error_mapping(totals.error().code()).exit_code;
    }
    if (options.json) {
        print_json(options, *totals);
    } else {
        print_text(options, *totals);
    }
    return totals->errors + totals->mismatches == 0 ? 0 : 1;
}

}  // namespace
}  // namespace stellarium::bench

int main(int argc, char** argv) {
    return stellarium::bench::run(argc, argv);
}
