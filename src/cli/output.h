// What a command prints: tables and lines for people, JSON for programs.
//
// Everything goes to standard output at the end, in one piece, so that a command that fails prints
// no half of an answer; a write that fails is an error (a full disk behind a redirection).
//
//     Output out(json, exact_bytes);
//     Table table({{"NAME"}, {"SIZE", Align::kRight}});
//     table.add({"vm-1", out.size(1 << 30)});
//     out.table(table);
//     STELLARIUM_TRY(out.flush());
//
// Thread rule: one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "control/json.h"

namespace stellarium::cli {

enum class Align : uint8_t { kLeft, kRight };

class Table {
  public:
    struct Column {
        std::string title;
        Align align = Align::kLeft;
    };
    explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
    /// As many cells as columns.
    void add(std::vector<std::string> cells);
    /// Aligned, two blanks between columns, none at the ends of lines.
    std::string text() const;

  private:
    std::vector<Column> columns_;
    std::vector<std::vector<std::string>> rows_;
};

class Output {
  public:
    Output(bool json, bool exact_bytes) : json_(json), exact_bytes_(exact_bytes) {}

    bool json() const { return json_; }
    /// "1.50 GiB", or "1610612736" with --bytes.
    std::string size(uint64_t bytes) const;

    void line(std::string_view text);
    void table(const Table& table) { text_ += table.text(); }
    void raw(std::string_view text) { text_ += text; }
    void value(const control::Json& json);

    /// Writes what was gathered. Errors: kIo and others of the system.
    Result<void> flush();

  private:
    bool json_;
    bool exact_bytes_;
    std::string text_;
};

/// Writes to standard error; a standard error that is gone changes nothing.
void complain(std::string_view text);

}  // namespace stellarium::cli
