#include "control/suggest.h"

#include <algorithm>
#include <vector>

#include <fmt/format.h>

namespace stellarium::control {
namespace {

char lower(char c) {
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

/// Longer words are not worth comparing: the cost is the product of the lengths.
constexpr size_t kMaxWord = 128;

}  // namespace

unsigned edit_distance(std::string_view a, std::string_view b, unsigned limit) {
    const size_t gap = a.size() > b.size() ? a.size() - b.size() : b.size() - a.size();
    if (gap > limit || std::max(a.size(), b.size()) > kMaxWord) {
        return limit + 1;
    }
    std::vector<unsigned> before(b.size() + 1);
    std::vector<unsigned> previous(b.size() + 1);
    std::vector<unsigned> current(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) {
        previous[j] = static_cast<unsigned>(j);
    }
    for (size_t i = 1; i <= a.size(); ++i) {
        current[0] = static_cast<unsigned>(i);
        unsigned row_least = current[0];
        for (size_t j = 1; j <= b.size(); ++j) {
            const unsigned replace = lower(a[i - 1]) == lower(b[j - 1]) ? 0 : 1;
            current[j] = std::min({previous[j] + 1, current[j - 1] + 1, previous[j - 1] + replace});
            if (i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) &&
                lower(a[i - 2]) == lower(b[j - 1])) {
                current[j] = std::min(current[j], before[j - 2] + 1);
            }
            row_least = std::min(row_least, current[j]);
        }
        if (row_least > limit) {
            return limit + 1;
        }
        std::swap(before, previous);
        std::swap(previous, current);
    }
    return std::min(previous[b.size()], limit + 1);
}

std::optional<std::string> closest(std::string_view word, std::span<const std::string> candidates) {
    const auto allowed = static_cast<unsigned>(std::max<size_t>(1, word.size() / 3));
    std::optional<std::string> best;
    unsigned best_distance = allowed + 1;
    for (const std::string& candidate : candidates) {
        const unsigned distance = edit_distance(word, candidate, best_distance - 1);
        if (distance < best_distance) {
            best_distance = distance;
            best = candidate;
            if (distance == 0) {
                break;
            }
        }
    }
    return best;
}

std::string did_you_mean(std::string_view word, std::span<const std::string> candidates) {
    const std::optional<std::string> near = closest(word, candidates);
    return near ? fmt::format("; did you mean '{}'?", *near) : std::string();
}

}  // namespace stellarium::control
