#include "cli/progress.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <unistd.h>

#include "base/units.h"
#include "cli/output.h"

namespace stellarium::cli {
namespace {

constexpr size_t kBarColumns = 20;
constexpr std::chrono::milliseconds kDrawEvery{100};
constexpr std::chrono::milliseconds kAskEvery{500};

std::string clock_text(double seconds) {
    const auto whole = static_cast<uint64_t>(std::llround(seconds));
    if (whole >= 3600) {
        return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
    }
    return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

}  // namespace

std::string progress_line(const ProgressState& state) {
    std::string line = state.title;
    double share = 0;
    if (state.items) {
        const auto [done, total] = *state.items;
        if (total > 0) {
            share = std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
            const auto full = static_cast<size_t>(share * kBarColumns);
            line += fmt::format("  [{}{}] {:3.0f} %", std::string(full, '#'),
                                std::string(kBarColumns - full, '-'), share * 100);
        }
        return line + "  " + clock_text(state.seconds);
    }
    if (state.total_bytes && *state.total_bytes > 0) {
        share = std::min(1.0, static_cast<double>(state.position_bytes) /
                                  static_cast<double>(*state.total_bytes));
        const auto full = static_cast<size_t>(share * kBarColumns);
        line += fmt::format("  [{}{}] {:3.0f} %", std::string(full, '#'),
                            std::string(kBarColumns - full, '-'), share * 100);
    }
    line += "  " + format_size(state.data_bytes);
    if (state.seconds > 0) {
        line += fmt::format("  {}/s", format_size(static_cast<uint64_t>(
                                          static_cast<double>(state.data_bytes) / state.seconds)));
        if (share > 0 && share < 1) {
            line += "  ETA " + clock_text(state.seconds / share * (1 - share));
        }
    }
    if (state.dedup_ratio) {
        line += fmt::format("  dedup {:.2f}", *state.dedup_ratio);
    }
    return line;
}

Progress::Progress(std::string title, bool enabled)
    : enabled_(enabled && isatty(STDERR_FILENO) == 1), begin_(std::chrono::steady_clock::now()) {
    state_.title = std::move(title);
}

Progress::~Progress() {
    finish();
}

void Progress::advance(uint64_t position_bytes, uint64_t moved_bytes) {
    state_.position_bytes = position_bytes;
    state_.data_bytes += moved_bytes;
    draw();
}

void Progress::show(std::string title, uint64_t done, uint64_t of) {
    state_.title = std::move(title);
    state_.items.emplace(done, of);
    draw();
}

void Progress::draw() {
    if (!enabled_) {
        return;
    }
    const auto now = std::chrono::steady_clock::now();
    if (now - last_drawn_ < kDrawEvery) {
        return;
    }
    last_drawn_ = now;
    if (dedup_source_ && now - last_asked_ >= kAskEvery) {
        last_asked_ = now;
        state_.dedup_ratio = dedup_source_();
    }
    state_.seconds = std::chrono::duration<double>(now - begin_).count();
    // "Erase to the end of the line" is understood by every terminal of the last forty years.
    complain(fmt::format("\r{}\x1b[K", progress_line(state_)));
    drawn_ = true;
}

void Progress::finish() {
    if (drawn_) {
        complain("\r\x1b[K");
        drawn_ = false;
    }
}

Result<std::optional<control::SparseExtent>> ProgressSource::next() {
    Result<std::optional<control::SparseExtent>> extent = source_.next();
    if (extent && *extent) {
        const uint64_t length = (*extent)->data.size();
        progress_.advance((*extent)->offset_bytes + length, length);
    }
    return extent;
}

}  // namespace stellarium::cli
