// "Did you mean ...?": the closest of a list of words to a mistyped one.
//
//     if (auto near = closest("volme", {"volume", "image"})) ...   // "volume"
//
// Thread rule: pure.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace stellarium::control {

/// Edits (insert, remove, replace, swap of neighbours) between two words, ASCII case ignored; stops
/// counting past `limit` and returns limit + 1. Optimal string alignment distance.
unsigned edit_distance(std::string_view a, std::string_view b, unsigned limit);

/// The candidate with the fewest edits, the first of equals; nullopt when none is within a third of
/// the word's length (at least one edit is allowed).
std::optional<std::string> closest(std::string_view word, std::span<const std::string> candidates);

/// "; did you mean 'x'?" or "".
std::string did_you_mean(std::string_view word, std::span<const std::string> candidates);

}  // namespace stellarium::control
