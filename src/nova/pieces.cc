#include "nova/pieces.h"

#include <algorithm>

#include <fmt/format.h>

namespace stellarium::nova {
namespace {

constexpr size_t kPieceBytes = nebula::kMaxObjectBytes;

}  // namespace

Result<Pieces> store_pieces(nebula::Store& store, std::vector<std::byte> content,
                            std::string_view what) {
    Pieces result{.top = {}, .levels = 0, .bytes = content.size()};
    while (true) {
        std::vector<std::byte> ids;
        nebula::WriteBatch batch;
        ChunkId id;
        for (size_t offset = 0; offset == 0 || offset < content.size(); offset += kPieceBytes) {
            const Bytes piece =
                Bytes(content).subspan(offset, std::min(kPieceBytes, content.size() - offset));
            id = hash(piece);
            batch.add_object(id, piece);
            append_bytes(ids, bytes_of(id));
        }
        STELLARIUM_TRY(store.append(batch));
        if (ids.size() == sizeof(ChunkId)) {
            result.top = NodeRef{.id = id, .hint = store.object_address(id)};
            return result;
        }
        if (++result.levels > kMaxPieceLevels) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("the {} is too large to be stored", what));
        }
        content = std::move(ids);
    }
}

Result<std::vector<std::byte>> load_pieces(
    nebula::Store& store, const Pieces& pieces, std::string_view what,
    const std::function<Result<void>(const NodeRef&)>& visit) {
    if (visit) {
        STELLARIUM_TRY(visit(pieces.top));
    }
    STELLARIUM_ASSIGN(nebula::ObjectBytes top, store.get_object(pieces.top.id, pieces.top.hint));
    std::vector<std::byte> content = std::move(top.content);
    for (uint32_t level = 0; level < pieces.levels; ++level) {
        if (content.size() % sizeof(ChunkId) != 0) {
            return fail(ErrorCode::kCorrupt,
                        fmt::format("{}: a list of pieces has an odd length", what));
        }
        std::vector<std::byte> next;
        for (size_t offset = 0; offset < content.size(); offset += sizeof(ChunkId)) {
            const NodeRef ref{.id = load<ChunkId>(Bytes(content).subspan(offset)),
                              .hint = std::nullopt};
            if (visit) {
                STELLARIUM_TRY(visit(ref));
            }
            STELLARIUM_ASSIGN(const nebula::ObjectBytes piece, store.get_object(ref.id));
            append_bytes(next, piece.content);
        }
        content = std::move(next);
    }
    if (content.size() != pieces.bytes) {
        return fail(ErrorCode::kCorrupt,
                    fmt::format("{}: {} bytes, {} expected", what, content.size(), pieces.bytes));
    }
    return content;
}

}  // namespace stellarium::nova
