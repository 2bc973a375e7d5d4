#include "nova/scrubber.h"

#include <algorithm>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "base/hash.h"
#include "nova/limits.h"

namespace stellarium::nova {
namespace {

using format::ScrubFile;
using format::ScrubPassRecord;

constexpr std::string_view kFileName = "scrub";

uint64_t checksum_of(const ScrubFile& file) {
    return checksum64(bytes_of(file).first(offsetof(ScrubFile, checksum)));
}

bool is_valid(const ScrubFile& file, const nebula::Store& store) {
    return file.magic == format::kScrubMagic && file.version == format::kScrubVersion &&
           file.store == store.uuid() && file.checksum == checksum_of(file) &&
           file.next < nebula::PageAddress::kReserved;
}

ScrubPass pass_of(const ScrubPassRecord& record) {
    return ScrubPass{.started = std::chrono::nanoseconds(record.started_ns),
                     .ended = std::chrono::nanoseconds(record.ended_ns),
                     .bytes = record.bytes,
                     .entries = record.entries,
                     .damaged = record.damaged};
}

std::optional<ScrubPass> pass_if_begun(const ScrubPassRecord& record) {
    return record.started_ns == 0 ? std::nullopt : std::optional(pass_of(record));
}

}  // namespace

void Scrubber::load() {
    const std::string path = fmt::format("{}/{}", store_.directory(), kFileName);
    const std::lock_guard lock(mutex_);
    const auto read = [&]() -> Result<void> {
        STELLARIUM_ASSIGN(const auto file, env_.files->open(path, io::OpenMode::kReadOnly));
        return io::read_exact(*file, std::as_writable_bytes(std::span(&file_, 1)), 0);
    }();
    if (!read || !is_valid(file_, store_)) {
        file_ = {};
        file_.magic = format::kScrubMagic;
        file_.version = format::kScrubVersion;
        file_.store = store_.uuid();
    }
}

Result<void> Scrubber::write_file(const ScrubFile& file) {
    const std::string path = fmt::format("{}/{}", store_.directory(), kFileName);
    STELLARIUM_ASSIGN(const bool there, env_.files->exists(path));
    STELLARIUM_ASSIGN(const auto opened, env_.files->open(path, io::OpenMode::kCreate));
    STELLARIUM_TRY(io::write_all(*opened, bytes_of(file), 0));
    STELLARIUM_TRY(opened->datasync());
    return there ? Result<void>() : env_.files->sync_directory(store_.directory());
}

void Scrubber::save() {
    if (store_.read_only_reason()) {
        return;
    }
    ScrubFile copy;
    {
        const std::lock_guard lock(mutex_);
        file_.checksum = checksum_of(file_);
        copy = file_;
    }
    [[maybe_unused]] const auto best_effort = write_file(copy);
}

void Scrubber::begin_schedule() {
    {
        const std::lock_guard lock(mutex_);
        if (file_.first_ns != 0) {
            return;
        }
        file_.first_ns = static_cast<uint64_t>(env_.clock->wall().count());
    }
    save();
}

std::chrono::nanoseconds Scrubber::due(std::chrono::seconds every) const {
    const std::lock_guard lock(mutex_);
    if (file_.next != 0) {
        return std::chrono::nanoseconds(file_.present.started_ns);
    }
    return std::chrono::nanoseconds(std::max(file_.first_ns.get(), file_.last.started_ns.get())) +
           every;
}

ScrubStats Scrubber::stats() const {
    const std::lock_guard lock(mutex_);
    return {.running = running_,
            .present = file_.next != 0 || running_ ? pass_if_begun(file_.present) : std::nullopt,
            .total_bytes = 0,
            .last = pass_if_begun(file_.last),
            .checked_bytes = checked_bytes_,
            .passes = passes_,
            .damaged_chunks = 0,
            .next_due = {},
            .last_error = last_error_};
}

/// mutex_ is held.
void Scrubber::begin_pass() {
    file_.present = {};
    file_.present.started_ns = static_cast<uint64_t>(env_.clock->wall().count());
    file_.next = nebula::PageAddress::make(1, 0).value();
    file_.end_segment = store_.stats().last_segment;
}

Result<ScrubPass> Scrubber::run(const ScrubOptions& options, double share_of_time,
                                const std::function<void(const nebula::DamagedChunk&)>& found) {
    nebula::PageAddress next;
    uint32_t end_segment = 0;
    {
        const std::lock_guard lock(mutex_);
        if (file_.next == 0 || options.restart) {
            begin_pass();
        }
        next = nebula::PageAddress(file_.next);
        end_segment = file_.end_segment;
        running_ = true;
        last_error_.clear();
    }
    const auto end = [&](Result<void> result) {
        save();
        const std::lock_guard lock(mutex_);
        running_ = false;
        if (!result && result.error().code() != ErrorCode::kCancelled) {
            last_error_ = result.error().message();
        }
        return result;
    };
    const auto cancelled = [&] { return options.cancelled && options.cancelled(); };
    uint64_t unsaved_bytes = 0;
    auto saved_at = env_.clock->monotonic();
    while (next && next.segment() <= end_segment) {
        if (cancelled()) {
            STELLARIUM_TRY(end(
                fail(ErrorCode::kCancelled, "the scrub was stopped; the next one goes on there")));
        }
        const auto begun = env_.clock->monotonic();
        const auto step = store_.scrub(next, kScrubStepBytes, found);
        if (!step) {
            STELLARIUM_TRY(end(std::unexpected(step.error())));
        }
        next = step->next;
        ScrubPass pass;
        {
            const std::lock_guard lock(mutex_);
            ScrubPassRecord& present = file_.present;
            present.bytes = present.bytes + step->bytes;
            present.entries = present.entries + step->entries;
            present.damaged = present.damaged + step->damaged;
            // "Nowhere" would say that there is no pass; it is complete below.
            file_.next = next ? next.value() : file_.next.get();
            checked_bytes_ += step->bytes;
            pass = pass_of(present);
        }
        if (options.progress) {
            options.progress(pass, std::max(pass.bytes, store_.stats().unique_bytes));
        }
        unsaved_bytes += step->bytes;
        const auto now = env_.clock->monotonic();
        if (unsaved_bytes >= kScrubSaveBytes || now - saved_at >= kScrubSaveInterval) {
            save();
            unsaved_bytes = 0;
            saved_at = now;
        }
        if (!next || next.segment() > end_segment) {
            break;
        }
        // So long must the step take, all in all.
        using Nanoseconds = std::chrono::nanoseconds;
        Nanoseconds wanted(0);
        if (options.rate_bytes_per_second != 0) {
            wanted = Nanoseconds(
                static_cast<int64_t>(static_cast<double>(step->bytes) * 1e9 /
                                     static_cast<double>(options.rate_bytes_per_second)));
        }
        const auto took = now - begun;
        wanted = std::max(
            wanted,
            Nanoseconds(static_cast<int64_t>(static_cast<double>(took.count()) / share_of_time)));
        constexpr Nanoseconds kSlice = std::chrono::milliseconds(100);
        for (Nanoseconds left = wanted - took; left.count() > 0 && !cancelled(); left -= kSlice) {
            std::this_thread::sleep_for(std::min(left, kSlice));
        }
    }
    ScrubPass pass;
    {
        const std::lock_guard lock(mutex_);
        file_.next = 0;
        file_.present.ended_ns = static_cast<uint64_t>(env_.clock->wall().count());
        file_.last = file_.present;
        ++passes_;
        pass = pass_of(file_.last);
    }
    STELLARIUM_TRY(end({}));
    return pass;
}

}  // namespace stellarium::nova
