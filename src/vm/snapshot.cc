// A snapshot of a running machine: its RAM while it runs, round after round, then disk, rest of the
// RAM and devices while it stands.
//
//   1. The intention goes into the machine's record, so that whoever finds this command dead knows.
//   2. QEMU migrates to a socket of ours. The guest runs; its RAM comes, then what it changed
//   since,
//      and so on, and what differs from the last snapshot is written (ram_writer.h).
//   3. When little is left, QEMU stops the guest, sends that and the devices' state, and flushes
//      the disk. The disk's snapshot is made now: it belongs to exactly that state.
//   4. The guest goes on. How long it stood depends on what it changes in a short time.
//   5. The RAM is made durable, its snapshot is made, then the state's: from here on it exists.
//
// When this command dies before 3 is over, QEMU sees a broken connection, and the guest goes on by
// itself; between 3 and 4 it stands until the next command on the machine (Machines::recover).
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/unix_address.h"
#include "control/service.h"
#include "vm/files.h"
#include "vm/machines.h"
#include "vm/migration_stream.h"

namespace stellarium::vm {
namespace {

using control::number_field;
using control::text_field;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kAcceptTimeout{60};
constexpr std::chrono::seconds kFirstAnswerTimeout{60};
/// QEMU stops the guest when it can send the rest in this time; twice as long with each round above
/// kEasyRounds, and the guest is stopped all the same after kMaxRounds.
constexpr uint64_t kPauseGoalMs = 20;
constexpr uint64_t kMaxPauseGoalMs = 2000;
constexpr uint64_t kEasyRounds = 4;
constexpr uint64_t kMaxRounds = 30;
constexpr uint64_t kNoBandwidthLimit = uint64_t{1} << 40;
constexpr std::chrono::milliseconds kEventWait{20};
/// What has come and is not written yet; takes in the last round at once, which ends the pause.
constexpr size_t kMaxQueuedBytes = size_t{64} << 20;
constexpr size_t kPieceBytes = size_t{1} << 20;
constexpr uint64_t kStateUnitBytes = uint64_t{1} << 20;

double ms_between(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::milli>(to - from).count();
}

/// When QEMU says that an event was, in milliseconds.
double event_ms(const Json& event) {
    const Json time = event.value("timestamp", Json::object());
    return static_cast<double>(number_field(time, "seconds")) * 1e3 +
           static_cast<double>(number_field(time, "microseconds")) / 1e3;
}

class MigrationListener {
  public:
    static Result<MigrationListener> listen(const MachineFolder& folder) {
        const std::string path = folder.short_path("migrate.sock");
        if (unlink(path.c_str()) != 0 && errno != ENOENT) {
            return std::unexpected(
                Error::from_errno(errno, fmt::format("remove {}/migrate.sock", folder.path())));
        }
        STELLARIUM_ASSIGN(const sockaddr_un address, unix_address(path));
        MigrationListener listener;
        listener.socket_ = UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (!listener.socket_ ||
            bind(listener.socket_.get(), reinterpret_cast<const sockaddr*>(&address),
                 sizeof address) != 0 ||
            ::listen(listener.socket_.get(), 1) != 0) {
            return std::unexpected(
                Error::from_errno(errno, fmt::format("listen at {}/migrate.sock", folder.path())));
        }
        return listener;
    }

    Result<UniqueFd> accept() const {
        pollfd wait{.fd = socket_.get(), .events = POLLIN, .revents = 0};
        const int ready =
            poll(&wait, 1, static_cast<int>(kAcceptTimeout / std::chrono::milliseconds(1)));
        if (ready <= 0) {
            return fail(ErrorCode::kBusy, "QEMU does not begin to send its memory");
        }
        UniqueFd connection(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        if (!connection) {
            return std::unexpected(Error::from_errno(errno, "accept QEMU's memory"));
        }
        return connection;
    }

  private:
    UniqueFd socket_;
};

/// Two threads: one takes from the socket what QEMU sends, the other takes it apart and writes it.
class StreamReceiver {
  public:
    StreamReceiver(UniqueFd connection, MigrationStream& stream)
        : connection_(std::move(connection)),
          stream_(stream),
          reader_([this] { receive(); }),
          writer_([this] { consume(); }) {}
    ~StreamReceiver() { abort(); }
    StreamReceiver(const StreamReceiver&) = delete;
    StreamReceiver& operator=(const StreamReceiver&) = delete;

    /// QEMU's next write fails, and its migration with it.
    void abort() {
        const std::lock_guard lock(mutex_);
        stopped_ = true;
        shutdown(connection_.get(), SHUT_RDWR);
        changed_.notify_all();
    }
    /// After the stream's end, or an error.
    Result<void> wait() {
        if (reader_.joinable()) {
            reader_.join();
        }
        if (writer_.joinable()) {
            writer_.join();
        }
        return outcome();
    }
    Result<void> outcome() {
        const std::lock_guard lock(mutex_);
        return outcome_;
    }

  private:
    void finish(Result<void> outcome) {
        const std::lock_guard lock(mutex_);
        if (outcome_ && !outcome) {
            outcome_ = std::move(outcome);
        }
        if (!outcome_) {
            stopped_ = true;
            shutdown(connection_.get(), SHUT_RDWR);
        }
        changed_.notify_all();
    }

    /// Fills a piece, shorter at the end of the stream.
    Result<std::vector<std::byte>> next_piece() const {
        std::vector<std::byte> piece(kPieceBytes);
        size_t filled = 0;
        while (filled < piece.size()) {
            const ssize_t got =
                recv(connection_.get(), piece.data() + filled, piece.size() - filled, 0);
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got < 0) {
                return std::unexpected(Error::from_errno(errno, "receive QEMU's memory"));
            }
            if (got == 0) {
                break;
            }
            filled += static_cast<size_t>(got);
        }
        piece.resize(filled);
        return piece;
    }

    /// False when no more is wanted.
    bool enqueue(std::vector<std::byte> piece) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return queued_bytes_ < kMaxQueuedBytes || stopped_; });
        ended_ = piece.size() < kPieceBytes || stopped_;
        queued_bytes_ += piece.size();
        if (!piece.empty()) {
            queue_.push_back(std::move(piece));
        }
        changed_.notify_all();
        return !ended_;
    }

    void receive() {
        bool more = true;
        while (more) {
            Result<std::vector<std::byte>> piece = next_piece();
            if (!piece) {
                finish(std::unexpected(piece.error()));
                return;
            }
            more = enqueue(*std::move(piece));
        }
    }

    void consume() {
        while (true) {
            std::vector<std::byte> piece;
            {
                std::unique_lock lock(mutex_);
                changed_.wait(lock, [&] { return !queue_.empty() || ended_ || stopped_; });
                if (stopped_ || queue_.empty()) {
                    return;
                }
                piece = std::move(queue_.front());
                queue_.pop_front();
            }
            if (Result<void> fed = stream_.feed(piece); !fed) {
                finish(std::move(fed));
                return;
            }
            const std::lock_guard lock(mutex_);
            queued_bytes_ -= piece.size();
            changed_.notify_all();
        }
    }

    const UniqueFd connection_;
    MigrationStream& stream_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::vector<std::byte>> queue_;  ///< Guarded by mutex_, as all below.
    size_t queued_bytes_ = 0;                   ///< Of the queue and of what is being written.
    bool ended_ = false;
    bool stopped_ = false;
    Result<void> outcome_;
    std::jthread reader_;
    std::jthread writer_;
};

/// Follows a migration to its end.
class MigrationWatch {
  public:
    MigrationWatch(Qmp& qmp, StreamReceiver& receiver, const MachinesOptions& options)
        : qmp_(qmp), receiver_(receiver), options_(options) {}

    Result<void> wait() {
        auto next_look = Clock::now();
        while (true) {
            STELLARIUM_ASSIGN(const std::optional<Json> event, qmp_.next_event(kEventWait));
            if (event) {
                STELLARIUM_ASSIGN(const bool complete, take(*event));
                if (complete) {
                    return {};
                }
            }
            if (options_.cancelled()) {
                return fail(ErrorCode::kCancelled, "interrupted");
            }
            STELLARIUM_TRY(receiver_.outcome());
            if (stopped_ms_ == 0 && Clock::now() >= next_look) {
                STELLARIUM_TRY(look());
                next_look = Clock::now() + 2 * kEventWait;
            }
        }
    }

    /// Notes what comes after the end.
    void note(const Json& event) {
        if (text_field(event, "event") == "RESUME") {
            resumed_ms_ = event_ms(event);
        }
    }
    uint64_t rounds() const { return rounds_; }
    bool resumed() const { return resumed_ms_ > 0; }
    double pause_ms() const {
        return stopped_ms_ > 0 && resumed_ms_ > 0 ? resumed_ms_ - stopped_ms_ : 0;
    }

  private:
    Result<bool> take(const Json& event) {
        const std::string name = text_field(event, "event");
        if (name == "STOP" && stopped_ms_ == 0) {
            stopped_ms_ = event_ms(event);
        }
        if (name == "SHUTDOWN") {
            return fail(ErrorCode::kUnavailable, "the guest shut down meanwhile");
        }
        if (name != "MIGRATION") {
            return false;
        }
        const std::string status = text_field(event.value("data", Json::object()), "status");
        if (status == "failed" || status == "cancelled") {
            STELLARIUM_TRY(receiver_.outcome());
            const Result<Json> said = qmp_.execute("query-migrate");
            return fail(ErrorCode::kIo,
                        fmt::format("QEMU does not give its state: {}",
                                    said ? text_field(*said, "error-desc") : status));
        }
        return status == "completed";
    }

    /// Lets the guest stand longer when it changes its memory faster than that can be sent.
    Result<void> look() {
        STELLARIUM_ASSIGN(const Json migration, qmp_.execute("query-migrate"));
        const Json ram = migration.value("ram", Json::object());
        rounds_ = std::max(rounds_, number_field(ram, "dirty-sync-count"));
        options_.progress(number_field(ram, "total") -
                              std::min(number_field(ram, "total"), number_field(ram, "remaining")),
                          number_field(ram, "total"));
        if (rounds_ > kMaxRounds && !stopped_by_us_) {
            stopped_by_us_ = true;
            return without_answer(qmp_.execute("stop"));
        }
        uint64_t goal_ms = kPauseGoalMs;
        for (uint64_t round = kEasyRounds; round < rounds_ && goal_ms < kMaxPauseGoalMs; ++round) {
            goal_ms *= 2;
        }
        goal_ms = std::min(goal_ms, kMaxPauseGoalMs);
        if (goal_ms == goal_ms_) {
            return {};
        }
        goal_ms_ = goal_ms;
        return without_answer(
            qmp_.execute("migrate-set-parameters", Json{{"downtime-limit", goal_ms}}));
    }

    Qmp& qmp_;
    StreamReceiver& receiver_;
    const MachinesOptions& options_;
    uint64_t rounds_ = 0;
    uint64_t goal_ms_ = kPauseGoalMs;
    bool stopped_by_us_ = false;
    double stopped_ms_ = 0;
    double resumed_ms_ = 0;
};

/// The guest goes on. QEMU refuses as long as it still tidies up after a migration.
Result<void> resume_guest(Qmp& qmp) {
    while (true) {
        STELLARIUM_ASSIGN(const std::string state, run_state(qmp));
        if (state == "running") {
            return {};
        }
        if (state == "finish-migrate") {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            continue;
        }
        return without_answer(qmp.execute("cont"));
    }
}

Result<void> begin_migration(Qmp& qmp) {
    Json capabilities = Json::array();
    capabilities.push_back(Json{{"capability", "events"}, {"state", true}});
    STELLARIUM_TRY(
        qmp.execute("migrate-set-capabilities", Json{{"capabilities", std::move(capabilities)}}));
    STELLARIUM_TRY(qmp.execute("migrate-set-parameters", Json{{"max-bandwidth", kNoBandwidthLimit},
                                                              {"downtime-limit", kPauseGoalMs}}));
    // Relative to the folder, in which QEMU works.
    return without_answer(qmp.execute("migrate", Json{{"uri", "unix:migrate.sock"}}));
}

}  // namespace

/// Whether the volume is there, and made if not: of the right size, with whatever it holds.
Result<bool> Machines::prepare_snapshot(const Open& machine, const std::string& snapshot) {
    const MachineRecord& record = machine.record;
    const std::string ram = ram_volume(record.name);
    for (const std::string& volume : {state_volume(record.name), ram, disk_volume(record.name)}) {
        STELLARIUM_ASSIGN(const bool taken, exists(snapshot_target(volume, snapshot)));
        if (taken) {
            return fail(ErrorCode::kAlreadyExists,
                        fmt::format("there is a snapshot '{}@{}' already", volume, snapshot));
        }
    }
    const std::string target = volume_target(ram);
    const Result<Json> present = get(target);
    if (present) {
        if (number_field(*present, "size_bytes") != record.config.memory_bytes) {
            STELLARIUM_TRY(
                client_.call("POST", target + "/resize",
                             Json{{"size_bytes", record.config.memory_bytes}, {"shrink", true}}));
        }
        return false;
    }
    if (present.error().code() != ErrorCode::kNotFound) {
        return std::unexpected(present.error());
    }
    if (!record.base.empty()) {
        STELLARIUM_TRY(
            client_.call("POST", "/v1/clones",
                         Json{{"source", record.base}, {"names", std::vector<std::string>{ram}}}));
        return false;
    }
    STELLARIUM_TRY(client_.call("POST", "/v1/volumes",
                                Json{{"name", ram}, {"size_bytes", record.config.memory_bytes}}));
    return true;
}

Result<SnapshotFigures> Machines::snapshot(const std::string& name, const std::string& snapshot) {
    STELLARIUM_TRY(check_snapshot_name(snapshot));
    STELLARIUM_ASSIGN(Open machine, open(name));
    if (!is_alive(machine.record.process)) {
        return fail(ErrorCode::kUnavailable,
                    fmt::format("machine '{}' does not run: stellarctl vm run {}", name, name));
    }
    STELLARIUM_ASSIGN(const bool empty, prepare_snapshot(machine, snapshot));
    STELLARIUM_ASSIGN(const auto qmp,
                      connect_qemu(machine.folder, machine.record.process, kFirstAnswerTimeout));
    STELLARIUM_ASSIGN(const std::string state, run_state(*qmp));
    machine.record.pending = snapshot;
    machine.record.resume = state == "running";
    STELLARIUM_TRY(machine.folder.write(machine.record));
    Result<SnapshotFigures> figures = take(machine, *qmp, snapshot, empty);
    if (!figures) {
        // The guest first: it must not stand any longer.
        [[maybe_unused]] const Result<Json> asked = qmp->execute("migrate_cancel");
        if (machine.record.resume) {
            [[maybe_unused]] const Result<void> resumed = resume_guest(*qmp);
        }
        STELLARIUM_TRY(drop_partial(name, snapshot));
    }
    machine.record.pending.clear();
    machine.record.resume = false;
    STELLARIUM_TRY(machine.folder.write(machine.record));
    return figures;
}

Result<SnapshotFigures> Machines::take(Open& machine, Qmp& qmp, const std::string& snapshot,
                                       bool empty) {
    const Clock::time_point started = Clock::now();
    const MachineRecord& record = machine.record;
    SnapshotFigures figures{.memory_bytes = record.config.memory_bytes};
    const std::string ram_path = volume_file(ram_volume(record.name));
    STELLARIUM_ASSIGN(UniqueFd ram_file, open_file(ram_path, O_RDWR | O_DIRECT));
    RamWriter writer(ram_file.get(), ram_path, record.config.memory_bytes, {.empty = empty});
    MigrationStream stream(kRamBlock, writer);
    STELLARIUM_ASSIGN(const MigrationListener listener, MigrationListener::listen(machine.folder));
    STELLARIUM_TRY(begin_migration(qmp));
    STELLARIUM_ASSIGN(UniqueFd connection, listener.accept());
    StreamReceiver receiver(std::move(connection), stream);
    MigrationWatch watch(qmp, receiver, options_);
    STELLARIUM_TRY(watch.wait());

    // The guest stands, and the disk is flushed: what the disk's file holds now belongs to it.
    STELLARIUM_ASSIGN(const Json disk, snapshot_volume(disk_volume(record.name), snapshot));
    if (record.resume) {
        STELLARIUM_TRY(resume_guest(qmp));
        while (!watch.resumed()) {
            STELLARIUM_ASSIGN(const std::optional<Json> event, qmp.next_event(kFirstAnswerTimeout));
            if (!event) {
                return fail(ErrorCode::kBusy, "QEMU does not say that the guest goes on");
            }
            watch.note(*event);
        }
    }

    STELLARIUM_TRY(receiver.wait());
    STELLARIUM_ASSIGN(std::vector<std::byte> devices, stream.finish());
    if (stream.block_bytes() != record.config.memory_bytes) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("QEMU's RAM has {} bytes, and {} were asked for",
                                stream.block_bytes(), record.config.memory_bytes));
    }
    STELLARIUM_TRY(writer.finish());
    ram_file.reset();
    STELLARIUM_ASSIGN(const Json ram, snapshot_volume(ram_volume(record.name), snapshot));
    figures.ram = writer.figures();
    figures.rounds = watch.rounds();
    figures.pause_ms = watch.pause_ms();
    STELLARIUM_ASSIGN(const std::vector<std::byte> saved,
                      encode(SavedState{.config = record.config,
                                        .disk_id = number_field(disk, "id"),
                                        .ram_id = number_field(ram, "id"),
                                        .devices = std::move(devices)}));
    figures.state_bytes = saved.size();
    STELLARIUM_TRY(save_state(record.name, snapshot, saved));
    figures.total_ms = ms_between(started, Clock::now());
    return figures;
}

Result<Json> Machines::snapshot_volume(const std::string& volume, const std::string& snapshot) {
    return client_.call("POST", volume_target(volume) + "/snapshots", Json{{"name", snapshot}});
}

/// With the snapshot of the state, the machine's snapshot comes to be.
Result<void> Machines::save_state(const std::string& name, const std::string& snapshot,
                                  Bytes saved) {
    const std::string volume = state_volume(name);
    const std::string target = volume_target(volume);
    const uint64_t size = (saved.size() + kStateUnitBytes - 1) / kStateUnitBytes * kStateUnitBytes;
    const Result<Json> present = get(target);
    if (!present) {
        if (present.error().code() != ErrorCode::kNotFound) {
            return std::unexpected(present.error());
        }
        STELLARIUM_TRY(
            client_.call("POST", "/v1/volumes", Json{{"name", volume}, {"size_bytes", size}}));
    } else if (number_field(*present, "size_bytes") < size) {
        STELLARIUM_TRY(client_.call("POST", target + "/resize",
                                    Json{{"size_bytes", size}, {"shrink", false}}));
    }
    {
        const std::string path = volume_file(volume);
        STELLARIUM_ASSIGN(const UniqueFd file, open_file(path, O_RDWR));
        STELLARIUM_TRY(write_at(file.get(), path, 0, saved));
        if (fsync(file.get()) != 0) {
            return std::unexpected(Error::from_errno(errno, "sync " + path));
        }
    }
    return without_answer(snapshot_volume(volume, snapshot));
}

}  // namespace stellarium::vm
