#include "cli/output.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include <unistd.h>

#include "base/units.h"

namespace stellarium::cli {

void Table::add(std::vector<std::string> cells) {
    cells.resize(columns_.size());
    rows_.push_back(std::move(cells));
}

std::string Table::text() const {
    std::vector<size_t> widths;
    widths.reserve(columns_.size());
    for (const Column& column : columns_) {
        widths.push_back(column.title.size());
    }
    for (const auto& row : rows_) {
        for (size_t i = 0; i < row.size(); ++i) {
            widths[i] = std::max(widths[i], row[i].size());
        }
    }
    std::string text;
    const auto add_line = [&](auto cell_of) {
        std::string line;
        for (size_t i = 0; i < columns_.size(); ++i) {
            const std::string& cell = cell_of(i);
            const std::string padding(widths[i] - cell.size(), ' ');
            line += i == 0 ? "" : "  ";
            line += columns_[i].align == Align::kRight ? padding + cell : cell + padding;
        }
        line.erase(line.find_last_not_of(' ') + 1);
        text += line + '\n';
    };
    add_line([&](size_t i) -> const std::string& { return columns_[i].title; });
    for (const auto& row : rows_) {
        add_line([&](size_t i) -> const std::string& { return row[i]; });
    }
    return text;
}

std::string Output::size(uint64_t bytes) const {
    return exact_bytes_ ? std::to_string(bytes) : format_size(bytes);
}

void Output::line(std::string_view text) {
    text_ += text;
    text_ += '\n';
}

void Output::value(const control::Json& json) {
    text_ += control::to_pretty_text(json);
    text_ += '\n';
}

void complain(std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stderr);
}

Result<void> Output::flush() {
    std::string_view rest = text_;
    while (!rest.empty()) {
        const ssize_t written = write(STDOUT_FILENO, rest.data(), rest.size());
        if (written < 0) {
            if (errno == EINTR) {
                continue;
            }
            return std::unexpected(Error::from_errno(errno, "write to standard output"));
        }
        rest.remove_prefix(static_cast<size_t>(written));
    }
    text_.clear();
    return {};
}

}  // namespace stellarium::cli
