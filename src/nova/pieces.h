// Byte strings of any length as objects of the store: the catalog, boot manifests.
//
// The content is cut into objects of at most 64 KiB. More than one are listed by an object of their
// ids, which is cut in the same way until one object is left: the top.
//
//     STELLARIUM_ASSIGN(Pieces pieces, store_pieces(store, std::move(content), "catalog"));
//     STELLARIUM_ASSIGN(auto content, load_pieces(store, pieces, "catalog"));
//
// Thread rule: pure functions, but for the store.
// Errors: kCorrupt, naming `what`; those of the store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "nebula/store.h"
#include "nova/tree.h"

namespace stellarium::nova {

inline constexpr uint32_t kMaxPieceLevels = 4;

/// Where stored content begins.
struct Pieces {
    NodeRef top;
    uint32_t levels = 0;  ///< How often ids have to be followed from `top` to the content.
    uint64_t bytes = 0;   ///< Of the content.
    friend bool operator==(const Pieces&, const Pieces&) = default;
};

/// Appends without sync.
Result<Pieces> store_pieces(nebula::Store& store, std::vector<std::byte> content,
                            std::string_view what);

/// `visit`, when given, is called for every object on the way, before it is read.
Result<std::vector<std::byte>> load_pieces(
    nebula::Store& store, const Pieces& pieces, std::string_view what,
    const std::function<Result<void>(const NodeRef&)>& visit = {});

}  // namespace stellarium::nova
