// A progress line on standard error: how far, how fast, how long still, and what dedup saves.
//
//     importing debian  [##########----------]  50 %  1.20 GiB  612 MiB/s  ETA 0:02  dedup 1.43
//
// It is drawn only when standard error is a terminal, at most ten times a second, and wiped at the
// end. Nothing is ever printed elsewhere.
//
// Thread rule: one thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "control/sparse_stream.h"

namespace stellarium::cli {

/// What the line says; pure, for tests.
struct ProgressState {
    std::string title;
    /// Things done and to be done, instead of bytes: a bar and a time.
    std::optional<std::pair<uint64_t, uint64_t>> items{};
    std::optional<uint64_t> total_bytes;  ///< Of the disk, holes included.
    uint64_t position_bytes = 0;          ///< On the disk.
    uint64_t data_bytes = 0;              ///< Moved so far.
    double seconds = 0;
    std::optional<double> dedup_ratio;
};
std::string progress_line(const ProgressState& state);

class Progress {
  public:
    /// `enabled` false: draws nothing whatever standard error is.
    Progress(std::string title, bool enabled);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    /// Asked for the dedup ratio so far, now and then.
    void set_dedup_source(std::function<std::optional<double>()> source) {
        dedup_source_ = std::move(source);
    }
    void set_total(std::optional<uint64_t> bytes) { state_.total_bytes = bytes; }
    void advance(uint64_t position_bytes, uint64_t moved_bytes);
    /// For work that is counted in things. `of` 0: nobody knows how many.
    void show(std::string title, uint64_t done, uint64_t of);
    /// Wipes the line.
    void finish();

    uint64_t data_bytes() const { return state_.data_bytes; }

  private:
    void draw();

    bool enabled_;
    bool drawn_ = false;
    ProgressState state_;
    std::function<std::optional<double>()> dedup_source_;
    std::chrono::steady_clock::time_point begin_;
    std::chrono::steady_clock::time_point last_drawn_;
    std::chrono::steady_clock::time_point last_asked_;
};

/// Passes a source on and moves the progress line along.
class ProgressSource final : public control::SparseSource {
  public:
    ProgressSource(control::SparseSource& source, Progress& progress)
        : source_(source), progress_(progress) {
        progress_.set_total(source_.size_hint());
    }
    std::optional<uint64_t> size_hint() const override { return source_.size_hint(); }
    uint64_t size_bytes() const override { return source_.size_bytes(); }
    Result<std::optional<control::SparseExtent>> next() override;

  private:
    control::SparseSource& source_;
    Progress& progress_;
};

}  // namespace stellarium::cli
