// Writes disks in a guest, and finds out whether every completed operation is there.
//
//     disk-verifier run SEED GUEST JOURNAL DISK...      # in the guest; commands on standard input
//                                                       # a DISK may be a file, also on the host
//     disk-verifier check GUEST JOURNAL FILE...          # on the host: are these the disks?
//
// The unit is the sector. Each holds its own number, a version and a checksum, so a sector that is
// torn, misplaced, or of another disk is known for it. A disk is divided into stripes; each has one
// thread that writes it, one operation at a time, so for each sector at most one version is in
// flight. Before an operation is submitted its version is `issued`, and when it has completed,
// `completed`. Any thread may read any sector: what it finds must lie between what was completed
// before the read began and what was issued when it ended. The depth of the queue is the number of
// threads. Everything is O_DIRECT: nothing is answered by the guest's own cache.
//
// Half of the stripes hold what every guest writes at the same sector and version, so that volumes
// share chunks; the other half is each disk's own.
//
// @@ready says that it listens. Commands, a line each, and their answers:
//     run N       after N more operations:                          @@ran COMPLETED
//     report      when every thread has done an operation that began after the command:
//                                                  @@report COMPLETED MAX-MICROSECONDS
//                 MAX is the longest operation that ended since the last report.
//     verify      everything stops, every sector is read:           @@verified SECTORS
//     finish      the last versions go to JOURNAL, without a flush of the disks: @@finished COUNTS
// Anything that is wrong: @@fault TEXT, and status 1.
//
// JOURNAL: for each sector of each disk a little-endian u32, its version; bit 31: it is all zeros.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

constexpr uint64_t kSectorBytes = 512;
constexpr uint64_t kPageSectors = 8;
constexpr uint64_t kStripeSectors = 256;
constexpr unsigned kThreadsPerDisk = 6;
constexpr uint64_t kMagic = 0x726f746365736c74;
constexpr uint32_t kZeroFlag = uint32_t{1} << 31;
constexpr uint32_t kSharedTag = 0;
constexpr auto kPoll = std::chrono::milliseconds(2);

struct Sector {
    uint64_t magic;
    uint64_t number;
    uint32_t version;
    uint32_t tag;
    uint64_t checksum;
    std::array<uint64_t, 60> words;
};
static_assert(sizeof(Sector) == kSectorBytes);

[[noreturn, gnu::format(printf, 1, 2)]] void fault(const char* format, ...) {
    std::array<char, 512> text{};
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text.data(), text.size(), format, arguments);
    va_end(arguments);
    // One write, so that the lines of two threads do not mix.
    const std::string line = std::string("\n@@fault ") + text.data() + "\n";
    if (write(STDOUT_FILENO, line.data(), line.size()) < 0) {
        std::perror("disk-verifier");
    }
    _exit(1);
}

/// The words of a sector follow from its head; returns their checksum.
uint64_t fill(Sector& sector) {
    uint64_t state = sector.number * 0x9e3779b97f4a7c15 + sector.version;
    state = (state ^ (state >> 29)) * 0xbf58476d1ce4e5b9 + sector.tag;
    uint64_t sum = state;
    for (uint64_t& word : sector.words) {
        state = state * 6364136223846793005U + 1442695040888963407U;
        word = state;
        sum = ((sum << 7) | (sum >> 57)) ^ state;
    }
    return sum;
}

Sector sector_of(uint64_t number, uint32_t version, uint32_t tag) {
    Sector sector{};
    sector.magic = kMagic;
    sector.number = number;
    sector.version = version;
    sector.tag = tag;
    sector.checksum = fill(sector);
    return sector;
}

uint32_t tag_of(uint64_t sector, uint32_t own) {
    return (sector / kStripeSectors) % 2 == 0 ? kSharedTag : own;
}

bool is_zero(const Sector& sector) {
    static const Sector kZero{};
    return std::memcmp(&sector, &kZero, sizeof kZero) == 0;
}

struct alignas(4096) Page {
    std::array<Sector, kPageSectors> sectors;
};

/// Aligned memory for direct I/O, as sectors.
class Buffer {
  public:
    explicit Buffer(uint64_t sectors) : pages_((sectors + kPageSectors - 1) / kPageSectors) {}
    Sector& operator[](uint64_t at) { return pages_[at / kPageSectors].sectors[at % kPageSectors]; }
    void* data() { return pages_.data(); }

  private:
    std::vector<Page> pages_;
};

// --- One disk --------------------------------------------------------------------------------

struct Counts {
    std::atomic<uint64_t> completed = 0;
    std::atomic<uint64_t> writes = 0;
    std::atomic<uint64_t> durable_writes = 0;
    std::atomic<uint64_t> reads = 0;
    std::atomic<uint64_t> flushes = 0;
    std::atomic<uint64_t> discards = 0;
    std::atomic<uint64_t> zeroings = 0;
    std::atomic<uint64_t> written_bytes = 0;
    std::atomic<uint64_t> verified_bytes = 0;
    std::atomic<uint64_t> in_flight_seen = 0;  ///< Sectors read while a version was in flight.
    std::atomic<uint64_t> longest_us = 0;
};

class Disk {
  public:
    Disk(std::string path, uint32_t tag, Counts& counts)
        : path_(std::move(path)), tag_(tag), counts_(counts) {
        fd_ = open(path_.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
        uint64_t bytes = 0;
        struct stat status{};
        if (fd_ >= 0 && fstat(fd_, &status) == 0 && S_ISREG(status.st_mode)) {
            is_file_ = true;
            bytes = static_cast<uint64_t>(status.st_size);
        } else if (fd_ < 0 || ioctl(fd_, BLKGETSIZE64, &bytes) != 0) {
            fault("open %s: %s", path_.c_str(), std::strerror(errno));
        }
        sectors_ = bytes / kSectorBytes;
        states_ = std::vector<State>(sectors_);
    }

    uint64_t sectors() const { return sectors_; }

    void write_sectors(uint64_t first, uint64_t count, Buffer& buffer, bool durable) {
        const std::vector<uint32_t> versions = issue(first, count, false);
        for (uint64_t i = 0; i < count; ++i) {
            buffer[i] = sector_of(first + i, versions[i], tag_of(first + i, tag_));
        }
        const iovec part{.iov_base = buffer.data(), .iov_len = count * kSectorBytes};
        const ssize_t put = pwritev2(fd_, &part, 1, static_cast<off_t>(first * kSectorBytes),
                                     durable ? RWF_DSYNC : 0);
        check(put == static_cast<ssize_t>(part.iov_len), "write", first, count);
        complete(first, versions);
        ++(durable ? counts_.durable_writes : counts_.writes);
        counts_.written_bytes += part.iov_len;
    }

    void zero_sectors(uint64_t first, uint64_t count, bool discard) {
        const std::vector<uint32_t> versions = issue(first, count, true);
        std::array<uint64_t, 2> range = {first * kSectorBytes, count * kSectorBytes};
        const int done = is_file_
                             ? fallocate(fd_,
                                         (discard ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE) |
                                             FALLOC_FL_KEEP_SIZE,
                                         static_cast<off_t>(range[0]), static_cast<off_t>(range[1]))
                             : ioctl(fd_, discard ? BLKDISCARD : BLKZEROOUT, range.data());
        check(done == 0, discard ? "discard" : "write zeroes", first, count);
        complete(first, versions);
        ++(discard ? counts_.discards : counts_.zeroings);
    }

    void flush() {
        check(fdatasync(fd_) == 0, "flush", 0, 0);
        ++counts_.flushes;
    }

    /// Reads and checks; others may be writing there.
    void read_sectors(uint64_t first, uint64_t count, Buffer& buffer) {
        std::vector<uint32_t> before(count);
        for (uint64_t i = 0; i < count; ++i) {
            before[i] = states_[first + i].completed.load();
        }
        const ssize_t got = pread(fd_, buffer.data(), count * kSectorBytes,
                                  static_cast<off_t>(first * kSectorBytes));
        check(got == static_cast<ssize_t>(count * kSectorBytes), "read", first, count);
        for (uint64_t i = 0; i < count; ++i) {
            check_sector(first + i, buffer[i], before[i]);
        }
        ++counts_.reads;
        counts_.verified_bytes += count * kSectorBytes;
    }

    /// As it goes to the journal. Nothing may be in flight.
    void append_journal(std::vector<uint32_t>& journal) const {
        for (const State& state : states_) {
            const uint32_t version = state.completed.load();
            journal.push_back(version | (state.zeroed.load() == version ? kZeroFlag : 0));
        }
    }

  private:
    struct State {
        std::atomic<uint32_t> issued = 0;
        std::atomic<uint32_t> completed = 0;
        std::atomic<uint32_t> zeroed = 0;  ///< The last issued version that is zeros.
    };

    std::vector<uint32_t> issue(uint64_t first, uint64_t count, bool zero) {
        std::vector<uint32_t> versions(count);
        for (uint64_t i = 0; i < count; ++i) {
            State& state = states_[first + i];
            versions[i] = state.issued.load() + 1;
            if (zero) {
                state.zeroed.store(versions[i]);
            }
            state.issued.store(versions[i]);
        }
        return versions;
    }

    void complete(uint64_t first, const std::vector<uint32_t>& versions) {
        for (uint64_t i = 0; i < versions.size(); ++i) {
            states_[first + i].completed.store(versions[i]);
        }
    }

    void check_sector(uint64_t number, const Sector& found, uint32_t completed) {
        const State& state = states_[number];
        const uint32_t zeroed = state.zeroed.load();
        const uint32_t issued = state.issued.load();
        if (issued != completed) {
            ++counts_.in_flight_seen;
        }
        if (is_zero(found)) {
            if (zeroed < completed) {
                fault("%s sector %" PRIu64
                      " is zeros; version %u was completed (issued %u, last "
                      "zeroed %u)",
                      path_.c_str(), number, completed, issued, zeroed);
            }
            return;
        }
        const Sector wanted = sector_of(number, found.version, tag_of(number, tag_));
        if (std::memcmp(&wanted, &found, sizeof found) != 0) {
            fault("%s sector %" PRIu64 " is torn or misplaced: it says sector %" PRIu64
                  " version %u tag %u; completed %u, issued %u",
                  path_.c_str(), number, found.number, found.version, found.tag, completed, issued);
        }
        if (found.version < completed || found.version > issued) {
            fault("%s sector %" PRIu64 " has version %u; completed %u, issued %u", path_.c_str(),
                  number, found.version, completed, issued);
        }
    }

    void check(bool fine, const char* what, uint64_t first, uint64_t count) {
        if (!fine) {
            fault("%s: %s of %" PRIu64 " sectors at %" PRIu64 ": %s", path_.c_str(), what, count,
                  first, std::strerror(errno));
        }
    }

    std::string path_;
    uint32_t tag_;
    Counts& counts_;
    int fd_ = -1;
    bool is_file_ = false;  ///< Not a block device.
    uint64_t sectors_ = 0;
    std::vector<State> states_;
};

// --- Threads ---------------------------------------------------------------------------------

/// All threads go, or all stand still between two operations.
class Gate {
  public:
    void pass() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return open_; });
        ++inside_;
    }
    void leave() {
        const std::scoped_lock lock(mutex_);
        --inside_;
        if (!open_) {
            changed_.notify_all();
        }
    }
    void close() {
        std::unique_lock lock(mutex_);
        open_ = false;
        changed_.wait(lock, [&] { return inside_ == 0; });
    }
    void open() {
        const std::scoped_lock lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool open_ = true;
    unsigned inside_ = 0;
};

struct Worker {
    Disk& disk;
    unsigned index;  ///< On this disk.
    std::mt19937_64 random;
    std::atomic<uint64_t> done = 0;
};

class Program {
  public:
    Program(uint64_t seed, uint32_t guest, const std::vector<std::string>& paths) {
        for (size_t i = 0; i < paths.size(); ++i) {
            disks_.push_back(std::make_unique<Disk>(
                paths[i], guest * 16 + static_cast<uint32_t>(i) + 1, counts_));
            for (unsigned index = 0; index < kThreadsPerDisk; ++index) {
                workers_.push_back(std::make_unique<Worker>(
                    *disks_.back(), index,
                    std::mt19937_64(seed * 1000 + uint64_t{guest} * 100 + i * 10 + index)));
            }
        }
        for (const auto& worker : workers_) {
            std::thread([this, &worker = *worker] { work(worker); }).detach();
        }
    }

    static void ready() { answer("@@ready"); }

    void run(uint64_t operations) {
        const uint64_t goal = counts_.completed + operations;
        while (counts_.completed < goal) {
            std::this_thread::sleep_for(kPoll);
        }
        answer("@@ran %" PRIu64, counts_.completed.load());
    }

    void report() {
        // Two more: the first may have begun before the command.
        std::vector<uint64_t> goals;
        goals.reserve(workers_.size());
        for (const auto& worker : workers_) {
            goals.push_back(worker->done + 2);
        }
        for (size_t i = 0; i < workers_.size(); ++i) {
            while (workers_[i]->done < goals[i]) {
                std::this_thread::sleep_for(kPoll);
            }
        }
        const uint64_t longest_us = counts_.longest_us.exchange(0);
        answer("@@report %" PRIu64 " %" PRIu64, counts_.completed.load(), longest_us);
    }

    void verify() {
        gate_.close();
        Buffer buffer(kStripeSectors);
        uint64_t sectors = 0;
        for (const auto& disk : disks_) {
            for (uint64_t at = 0; at < disk->sectors(); at += kStripeSectors) {
                disk->read_sectors(at, std::min(kStripeSectors, disk->sectors() - at), buffer);
            }
            sectors += disk->sectors();
        }
        gate_.open();
        answer("@@verified %" PRIu64, sectors);
    }

    void finish(const std::string& journal_path) {
        gate_.close();
        std::vector<uint32_t> journal;
        for (const auto& disk : disks_) {
            disk->append_journal(journal);
        }
        const int fd = open(journal_path.c_str(), O_WRONLY | O_CLOEXEC);
        const size_t bytes = journal.size() * sizeof journal[0];
        const auto* from = reinterpret_cast<const char*>(journal.data());
        for (size_t at = 0; at < bytes;) {
            const ssize_t put = write(fd, from + at, bytes - at);
            if (put <= 0) {
                fault("write %s: %s", journal_path.c_str(), std::strerror(errno));
            }
            at += static_cast<size_t>(put);
        }
        if (fsync(fd) != 0 || close(fd) != 0) {
            fault("sync %s: %s", journal_path.c_str(), std::strerror(errno));
        }
        answer("@@finished {\"operations\": %" PRIu64 ", \"writes\": %" PRIu64
               ", \"durable_writes\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"flushes\": %" PRIu64
               ", \"discards\": %" PRIu64 ", \"zeroings\": %" PRIu64 ", \"written_bytes\": %" PRIu64
               ", \"verified_bytes\": %" PRIu64 ", \"in_flight_sectors\": %" PRIu64 "}",
               counts_.completed.load(), counts_.writes.load(), counts_.durable_writes.load(),
               counts_.reads.load(), counts_.flushes.load(), counts_.discards.load(),
               counts_.zeroings.load(), counts_.written_bytes.load(), counts_.verified_bytes.load(),
               counts_.in_flight_seen.load());
    }

  private:
    template <typename... Values>
    static void answer(const char* format, Values... values) {
        std::printf("\n");
        std::printf(format, values...);
        std::printf("\n");
        std::fflush(stdout);
    }

    static uint64_t below(Worker& worker, uint64_t end) { return worker.random() % end; }

    /// A stripe of this disk: of this worker, or of any. Most operations meet in few stripes.
    static uint64_t pick_stripe(Worker& worker, bool own) {
        const uint64_t stripes = worker.disk.sectors() / kStripeSectors;
        const uint64_t hot = std::min<uint64_t>(stripes, uint64_t{kThreadsPerDisk} * 4);
        const uint64_t among = below(worker, 10) < 6 ? hot : stripes;
        if (!own) {
            return below(worker, among);
        }
        return below(worker, among / kThreadsPerDisk) * kThreadsPerDisk + worker.index;
    }

    void one_operation(Worker& worker, Buffer& buffer) {
        const uint64_t kind = below(worker, 100);
        const bool own = kind < 80;
        const uint64_t stripe = pick_stripe(worker, own) * kStripeSectors;
        uint64_t first = 0;
        uint64_t count = 0;
        const uint64_t shape = below(worker, 10);
        if (shape < 5) {  // A page.
            first = below(worker, kStripeSectors / kPageSectors) * kPageSectors;
            count = kPageSectors;
        } else if (shape < 7) {  // Less than a page, anywhere.
            count = 1 + below(worker, kPageSectors - 1);
            first = below(worker, kStripeSectors - count + 1);
        } else if (shape < 9) {  // Some pages.
            const uint64_t pages = 2 + below(worker, 15);
            first = below(worker, kStripeSectors / kPageSectors - pages + 1) * kPageSectors;
            count = pages * kPageSectors;
        } else {
            count = kStripeSectors;
        }
        first += stripe;
        if (kind < 53) {
            worker.disk.write_sectors(first, count, buffer, false);
        } else if (kind < 57) {
            worker.disk.write_sectors(first, count, buffer, true);
        } else if (kind < 60) {
            worker.disk.zero_sectors(first, count, true);
        } else if (kind < 63) {
            worker.disk.zero_sectors(first, count, false);
        } else if (kind < 70) {
            worker.disk.flush();
        } else {
            worker.disk.read_sectors(first, count, buffer);
        }
    }

    void work(Worker& worker) {
        Buffer buffer(kStripeSectors);
        while (true) {
            gate_.pass();
            const auto begin = std::chrono::steady_clock::now();
            one_operation(worker, buffer);
            const auto took = std::chrono::duration_cast<std::chrono::microseconds>(
                std::chrono::steady_clock::now() - begin);
            const auto took_us = static_cast<uint64_t>(took.count());
            uint64_t longest = counts_.longest_us;
            while (longest < took_us &&
                   !counts_.longest_us.compare_exchange_weak(longest, took_us)) {
            }
            ++worker.done;
            ++counts_.completed;
            gate_.leave();
        }
    }

    Counts counts_;
    Gate gate_;
    std::vector<std::unique_ptr<Disk>> disks_;
    std::vector<std::unique_ptr<Worker>> workers_;
};

int run(const std::vector<std::string>& words) {
    Program program(std::strtoull(words[0].c_str(), nullptr, 10),
                    static_cast<uint32_t>(std::strtoul(words[1].c_str(), nullptr, 10)),
                    {words.begin() + 3, words.end()});
    program.ready();
    std::array<char, 128> line{};
    while (std::fgets(line.data(), line.size(), stdin) != nullptr) {
        const std::string command(line.data(), std::strcspn(line.data(), "\r\n"));
        if (command.starts_with("run ")) {
            program.run(std::strtoull(command.c_str() + 4, nullptr, 10));
        } else if (command == "report") {
            program.report();
        } else if (command == "verify") {
            program.verify();
        } else if (command == "finish") {
            program.finish(words[2]);
            _exit(0);  // The threads stand at the gate.
        } else if (!command.empty()) {
            fault("unknown command '%s'", command.c_str());
        }
    }
    fault("standard input has ended");
}

int check(const std::vector<std::string>& words) {
    const uint32_t guest = static_cast<uint32_t>(std::strtoul(words[0].c_str(), nullptr, 10));
    FILE* const journal = std::fopen(words[1].c_str(), "rb");
    if (journal == nullptr) {
        fault("open %s: %s", words[1].c_str(), std::strerror(errno));
    }
    uint64_t written = 0;
    for (size_t i = 2; i < words.size(); ++i) {
        FILE* const disk = std::fopen(words[i].c_str(), "rb");
        if (disk == nullptr) {
            fault("open %s: %s", words[i].c_str(), std::strerror(errno));
        }
        const uint32_t tag = guest * 16 + static_cast<uint32_t>(i - 2) + 1;
        Sector found{};
        for (uint64_t number = 0; std::fread(&found, sizeof found, 1, disk) == 1; ++number) {
            uint32_t entry = 0;
            if (std::fread(&entry, sizeof entry, 1, journal) != 1) {
                fault("%s is too short for %s", words[1].c_str(), words[i].c_str());
            }
            const uint32_t version = entry & ~kZeroFlag;
            const bool zero = (entry & kZeroFlag) != 0;
            const Sector wanted = zero ? Sector{} : sector_of(number, version, tag_of(number, tag));
            if (std::memcmp(&wanted, &found, sizeof found) != 0) {
                fault("%s sector %" PRIu64 " must have version %u%s; it says sector %" PRIu64
                      " version %u tag %u",
                      words[i].c_str(), number, version, zero ? " (zeros)" : "", found.number,
                      found.version, found.tag);
            }
            written += zero ? 0 : 1;
        }
        std::fclose(disk);
    }
    std::fclose(journal);
    std::printf("%" PRIu64 "\n", written);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> words(argv + std::min(argc, 2), argv + argc);
    if (argc >= 6 && std::strcmp(argv[1], "run") == 0) {
        return run(words);
    }
    if (argc >= 5 && std::strcmp(argv[1], "check") == 0) {
        return check(words);
    }
    std::fprintf(stderr,
                 "usage: disk-verifier run SEED GUEST JOURNAL DISK...\n"
                 "       disk-verifier check GUEST JOURNAL FILE...\n");
    return 2;
}
