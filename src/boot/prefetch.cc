#include "boot/prefetch.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "boot/limits.h"
#include "nova/limits.h"

namespace stellarium::boot {
namespace {

constexpr uint64_t kMaxReadPages = kStageReadBytes / nova::kPageBytes;

// Of linux/ioprio.h, which not every system has.
constexpr int kIoprioWhoProcess = 1;
constexpr int kIoprioLowest = 2 << 13 | 7;  ///< Best effort, level 7.
constexpr int kNice = 10;

bool is_damage(const Error& error) {
    return error.code() == ErrorCode::kCorrupt || error.code() == ErrorCode::kNotFound ||
           error.code() == ErrorCode::kIo;
}

class Stager {
  public:
    Stager(nova::Reader& reader, const StageOptions& options)
        : reader_(reader), options_(options), buffer_(kStageReadBytes) {}

    /// Stages a plan of the list. False: it stopped for want of memory.
    Result<bool> run(std::span<const PageRange> ranges) {
        std::vector<nova::StoredRun> runs;
        for (const PageRange& range : ranges) {
            report_.wanted_bytes += range.pages * nova::kPageBytes;
            const auto located = reader_.locate(
                range.page, range.pages, [&](const nova::StoredRun& run) { runs.push_back(run); });
            if (!located && !is_damage(located.error())) {
                return std::unexpected(located.error());
            }
        }
        if (options_.available_bytes) {
            const uint64_t available = options_.available_bytes();
            if (available != 0 && available < kMinAvailableBytes) {
                report_.short_of_memory = true;
                return false;
            }
        }
        const std::vector<PlannedRead> reads = plan_reads(runs);
        size_t asked = 0;
        uint64_t asked_bytes = 0;
        for (size_t i = 0; i < reads.size(); ++i) {
            if (options_.cancelled && options_.cancelled()) {
                return fail(ErrorCode::kCancelled, "the prefetch was cancelled");
            }
            yield();
            for (; asked < reads.size() && (asked <= i || asked_bytes < kReadAheadBytes); ++asked) {
                reader_.read_ahead(reads[asked].address, reads[asked].pages);
                asked_bytes += reads[asked].pages * nova::kPageBytes;
            }
            STELLARIUM_TRY(read(reads[i]));
            asked_bytes -= reads[i].pages * nova::kPageBytes;
        }
        if (options_.progress) {
            options_.progress(report_.wanted_bytes);
        }
        return true;
    }

    const StageReport& report() const { return report_; }

  private:
    /// Lets guests' reads that wait go first, for a moment: with many guests, some always do.
    void yield() const {
        if (!options_.waiting_reads) {
            return;
        }
        for (auto waited = std::chrono::microseconds::zero();
             waited < kMaxYield && options_.waiting_reads() > 0; waited += kYieldStep) {
            std::this_thread::sleep_for(kYieldStep);
        }
    }

    Result<void> read(const PlannedRead& planned) {
        const uint64_t bytes = planned.pages * nova::kPageBytes;
        Result<void> done = reader_.stage(planned.address, MutableBytes(buffer_).first(bytes));
        if (done) {
            report_.staged_bytes += bytes;
            ++report_.reads;
            return {};
        }
        if (done.error().code() != ErrorCode::kStale && !is_damage(done.error())) {
            return done;
        }
        // Something has moved, or a part of it is damaged: one by one, looked up anew.
        for (const PageRange& part : planned.parts) {
            STELLARIUM_TRY(read_part(part));
        }
        return {};
    }

    Result<void> read_part(const PageRange& part) {
        const uint64_t offset = part.page * nova::kPageBytes;
        const uint64_t end = std::min(reader_.size_bytes(), offset + part.pages * nova::kPageBytes);
        for (uint64_t at = offset; at < end;) {
            const uint64_t length = std::min(end - at, kStageReadBytes);
            const Result<void> done = reader_.read(at, MutableBytes(buffer_).first(length));
            if (done) {
                report_.staged_bytes += length;
            } else if (is_damage(done.error()) || done.error().code() == ErrorCode::kStale) {
                report_.damaged_bytes += length;
            } else {
                return done;
            }
            ++report_.reads;
            at += length;
        }
        return {};
    }

    nova::Reader& reader_;
    const StageOptions& options_;
    std::vector<std::byte> buffer_;
    StageReport report_;
};

}  // namespace

void StageReport::add(const StageReport& other) {
    wanted_bytes += other.wanted_bytes;
    staged_bytes += other.staged_bytes;
    damaged_bytes += other.damaged_bytes;
    reads += other.reads;
    short_of_memory = short_of_memory || other.short_of_memory;
    duration += other.duration;
}

std::vector<PlannedRead> plan_reads(std::span<const nova::StoredRun> runs) {
    // By place in the store; `order` is that in the list.
    struct Placed {
        nova::StoredRun run;
        size_t order = 0;
    };
    std::vector<Placed> placed;
    placed.reserve(runs.size());
    for (size_t i = 0; i < runs.size(); ++i) {
        // A run that is longer than a read is cut; most are chunks, of 64 KiB at most.
        for (uint64_t done = 0; done < runs[i].pages; done += kMaxReadPages) {
            placed.push_back(
                {.run = {.page = runs[i].page + done,
                         .address = nebula::PageAddress(runs[i].address.value() + done),
                         .pages = static_cast<uint32_t>(
                             std::min<uint64_t>(kMaxReadPages, runs[i].pages - done))},
                 .order = i});
        }
    }
    std::ranges::sort(placed, [](const Placed& a, const Placed& b) {
        return std::tuple(a.run.address.value(), a.order) <
               std::tuple(b.run.address.value(), b.order);
    });
    struct Joined {
        PlannedRead read;
        std::vector<size_t> orders;  ///< Of each part.
        size_t first = 0;
    };
    std::vector<Joined> joined;
    for (const Placed& each : placed) {
        const uint64_t start = each.run.address.value();
        const uint64_t end = start + each.run.pages;
        Joined* const last = joined.empty() ? nullptr : &joined.back();
        const uint64_t last_start = last != nullptr ? last->read.address.value() : 0;
        const uint64_t last_end = last != nullptr ? last_start + last->read.pages : 0;
        const bool same_segment =
            last != nullptr && last->read.address.segment() == each.run.address.segment();
        if (same_segment && start <= last_end &&
            std::max(end, last_end) - last_start <= kMaxReadPages) {
            last->read.pages = static_cast<uint32_t>(std::max(end, last_end) - last_start);
            last->first = std::min(last->first, each.order);
        } else {
            joined.push_back(
                {.read = {.address = each.run.address, .pages = each.run.pages, .parts = {}},
                 .orders = {},
                 .first = each.order});
        }
        joined.back().read.parts.push_back({.page = each.run.page, .pages = each.run.pages});
        joined.back().orders.push_back(each.order);
    }
    std::ranges::stable_sort(joined, {}, &Joined::first);
    std::vector<PlannedRead> reads;
    reads.reserve(joined.size());
    for (Joined& each : joined) {
        reads.push_back(std::move(each.read));
    }
    return reads;
}

Result<StageReport> stage(nova::Reader& reader, std::span<const PageRange> ranges,
                          const StageOptions& options) {
    const auto started = std::chrono::steady_clock::now();
    const uint64_t end_page = (reader.size_bytes() + nova::kPageBytes - 1) / nova::kPageBytes;
    Stager stager(reader, options);
    std::vector<PageRange> plan;
    uint64_t planned = 0;
    bool going = true;
    const auto carry_out = [&]() -> Result<void> {
        STELLARIUM_ASSIGN(going, stager.run(plan));
        plan.clear();
        planned = 0;
        return {};
    };
    for (const PageRange& range : ranges) {
        // What was recorded of a larger volume.
        const uint64_t end = std::min(end_page, range.page + range.pages);
        for (uint64_t page = range.page; page < end && going;) {
            const uint64_t pages = std::min(end - page, kPlanPages - planned);
            plan.push_back({.page = page, .pages = pages});
            planned += pages;
            page += pages;
            if (planned == kPlanPages) {
                STELLARIUM_TRY(carry_out());
            }
        }
    }
    if (going && !plan.empty()) {
        STELLARIUM_TRY(carry_out());
    }
    StageReport report = stager.report();
    report.duration = std::chrono::steady_clock::now() - started;
    return report;
}

Result<StageReport> stage_all(nova::Reader& reader, const StageOptions& options) {
    StageReport total;
    StageOptions inner = options;
    if (options.progress) {
        inner.progress = [&](uint64_t done) { options.progress(total.wanted_bytes + done); };
    }
    for (uint64_t offset = 0; offset < reader.size_bytes() && !total.short_of_memory;) {
        STELLARIUM_ASSIGN(const auto data, reader.next_data(offset));
        if (!data) {
            break;
        }
        offset = data->first + data->second;
        const PageRange range{.page = data->first / nova::kPageBytes,
                              .pages = (data->second + nova::kPageBytes - 1) / nova::kPageBytes};
        STELLARIUM_ASSIGN(const StageReport report, stage(reader, std::span(&range, 1), inner));
        total.add(report);
    }
    return total;
}

uint64_t available_memory_bytes() {
    std::ifstream file("/proc/meminfo");
    for (std::string word; file >> word;) {
        if (word == "MemAvailable:") {
            uint64_t kibibytes = 0;
            file >> kibibytes;
            return kibibytes << 10;
        }
    }
    return 0;
}

void make_lowly() {
    const auto thread = static_cast<id_t>(gettid());
    static_cast<void>(setpriority(PRIO_PROCESS, thread, kNice));
    static_cast<void>(syscall(SYS_ioprio_set, kIoprioWhoProcess, 0, kIoprioLowest));
}

}  // namespace stellarium::boot
