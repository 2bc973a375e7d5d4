// The catalog: loading it from a checkpoint's bytes, replaying records over it, and saving it. What
// was loaded is saved and loaded again as the same.
//
// Input: levels of pieces; length and bytes of the catalog; then records, each of kind, length and
// payload.
#include <memory>

#include "io/simulated.h"
#include "nova/catalog.h"
#include "nova/format.h"
#include "nova/limits.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace nova;  // NOLINT(google-build-using-namespace)

class NoRecords final : public nebula::ReplaySink {
  public:
    Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
};

/// A store with a tree and a delta in it, always the same ones.
class Storage {
  public:
    Storage() : machine_(1), cache_(1 << 20) {
        must(nebula::Store::create(machine_.env(), "/pool", {}));
        store_ = must(nebula::Store::open(machine_.env(), "/pool", {}));
        NoRecords sink;
        must(store_->replay(sink));
        const Input chunk(2 * nebula::kPageBytes, std::byte{7});
        nebula::WriteBatch batch;
        Extent extent;
        extent.id = hash(chunk);
        extent.pages = 2;
        batch.add_chunk(extent.id, chunk);
        extent.chunk_address = must(store_->append(batch)).locations.at(0).address;
        TreeBuilder builder(*store_);
        must(builder.add_leaf(0, {extent}));
        must(builder.add_leaf(70, {extent}));
        root_ = must(builder.finish());
        must(delta_.set(*store_, 3, {extent}));
        must(delta_.set(*store_, 700, {extent}));
        chunk_ = extent.id;
    }
    nebula::Store& store() { return *store_; }
    NodeCache& cache() { return cache_; }
    const NodeRef& root() const { return root_; }
    const Delta& delta() const { return delta_; }
    const ChunkId& chunk() const { return chunk_; }

  private:
    io::SimulatedMachine machine_;
    NodeCache cache_;
    std::unique_ptr<nebula::Store> store_;
    NodeRef root_;
    Delta delta_;
    ChunkId chunk_;
};

/// A fresh one now and then: each input leaves its objects in the store.
Storage& storage() {
    static std::unique_ptr<Storage> current;
    static unsigned used = 0;
    if (!current || ++used % 500 == 0) {
        current.reset();
        current = std::make_unique<Storage>();
    }
    return *current;
}

format::CatalogRoot root_of(nebula::Store& store, Bytes content, uint32_t levels,
                            uint32_t version) {
    const uint64_t bytes = content.size();
    ChunkId top = hash(content);
    nebula::WriteBatch batch;
    batch.add_object(top, content);
    Input list;
    for (uint32_t level = 0; level < levels; ++level) {
        must(store.append(batch));
        batch.clear();
        list.assign(bytes_of(top).begin(), bytes_of(top).end());
        top = hash(list);
        batch.add_object(top, list);
    }
    must(store.append(batch));
    format::CatalogRoot root{};
    root.magic = format::kCatalogMagic;
    root.read_version = static_cast<uint16_t>(version);
    root.write_version = static_cast<uint16_t>(version);
    root.levels = levels;
    root.catalog_bytes = bytes;
    root.pieces.id = top;
    root.checksum = checksum64(bytes_of(root).first(offsetof(format::CatalogRoot, checksum)));
    return root;
}

bool same(const Catalog::Frozen::Item& a, const Catalog::Frozen::Item& b) {
    const bool same_attachment =
        a.attachment.has_value() == b.attachment.has_value() &&
        (!a.attachment || (a.attachment->label == b.attachment->label &&
                           a.attachment->options == b.attachment->options));
    const bool same_damage = (a.state.damage == nullptr) == (b.state.damage == nullptr) &&
                             (!a.state.damage || *a.state.damage == *b.state.damage);
    return a.id == b.id && a.parent == b.parent && a.created_ns == b.created_ns &&
           a.kind == b.kind && a.name == b.name && a.removed_parent_name == b.removed_parent_name &&
           a.state.root == b.state.root && a.state.size_bytes == b.state.size_bytes &&
           a.state.delta.extents() == b.state.delta.extents() &&
           a.state.delta.leaves() == b.state.delta.leaves() && a.shareable == b.shareable &&
           same_attachment && same_damage;
}

/// Saves and loads: the same catalog, with the same name in the store.
void check_round_trip(Storage& storage, const Catalog& catalog) {
    const Catalog::Frozen before = catalog.freeze();
    const Input payload = must(Catalog::save(storage.store(), before));
    Catalog again(storage.store(), storage.cache());
    must(again.load(payload));
    const Catalog::Frozen after = again.freeze();
    require(after.boots == before.boots, "boot manifests that were saved are loaded as the same");
    require(after.items.size() == before.items.size() && after.next_id == before.next_id &&
                after.imported_bytes == before.imported_bytes &&
                after.written_bytes == before.written_bytes && after.arena.id == before.arena.id &&
                after.arena.path == before.arena.path && after.arena.closed == before.arena.closed,
            "a catalog that was saved is loaded as the same");
    for (size_t i = 0; i < after.items.size(); ++i) {
        require(same(after.items[i], before.items[i]),
                "an entity that was saved is loaded as the same");
    }
    require(equal(must(Catalog::save(storage.store(), after)), payload),
            "a catalog that was loaded is saved as the same bytes");
    must(Catalog::for_each_piece(storage.store(), payload,
                                 [](const NodeRef&) -> Result<void> { return {}; }));
}

void look(Storage& storage, const Catalog& catalog) {
    for (const EntityPtr& entity : catalog.all()) {
        (void)catalog.describe(*entity);
        const VolumeState state = entity->state();
        (void)effective_leaf(storage.store(), storage.cache(), state, 0);
        unsigned leaves = 0;
        (void)for_each_leaf(storage.store(), storage.cache(), state, 0,
                            [&](uint64_t leaf) -> Result<bool> {
                                (void)effective_leaf(storage.store(), storage.cache(), state, leaf);
                                return ++leaves < 20;
                            });
    }
}

template <typename Record>
void add_record(Input& out, const Record& record) {
    const Input payload = encode(record);
    append_byte(out, static_cast<unsigned>(Record::kKind) & 0xFFU);
    append_number(out, static_cast<uint16_t>(payload.size()));
    append(out, payload);
}

template <typename Record>
void apply(Catalog& catalog, const Record& record) {
    must(catalog.apply(static_cast<uint16_t>(Record::kKind), encode(record)));
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    Storage& here = storage();
    Catalog catalog(here.store(), here.cache());
    apply(catalog, CreateRecord{.id = 1,
                                .kind = EntityKind::kImage,
                                .size_bytes = kLeafBytes * 1000,
                                .created_ns = 5,
                                .data_bytes = 8192,
                                .root = here.root(),
                                .name = "image"});
    apply(catalog, CloneRecord{.source = 1,
                               .first_id = 2,
                               .size_bytes = kLeafBytes * 1000,
                               .created_ns = 6,
                               .names = {"a", "b"}});
    const MapRecord map{
        .volume = 2, .entries = {{.page = 5, .pages = 2, .first_in_chunk = 0, .id = here.chunk()}}};
    apply(catalog, map);
    apply(catalog, SnapshotRecord{.id = 4, .volume = 2, .created_ns = 7, .name = "s"});
    apply(catalog, AttachmentChangeRecord{
                       .id = 2, .body = AttachmentRecordBody{.label = "x", .options = Input(4)}});
    apply(catalog, ArenaRecord{.id = {1}, .closed = false, .path = "/run/arena"});
    catalog.mark_damaged("it rotted", {3});
    const auto content_now = [&] {
        const Input payload = must(Catalog::save(here.store(), catalog.freeze()));
        Input content;
        must(Catalog::for_each_piece(here.store(), payload,
                                     [&](const NodeRef& piece) -> Result<void> {
                                         content = must(here.store().get_object(piece.id)).content;
                                         return {};
                                     }));
        return content;
    };
    const BootRecord boot{.root = here.root().id,
                          .manifest = Pieces{.top = here.root(), .levels = 0, .bytes = 100}};
    for (const unsigned shape : {0U, 1U, 6U, 3U}) {
        if (shape == 6) {
            apply(catalog, SharingRecord{.id = 1, .shareable = true});  // Version 3.
        }
        if (shape == 3) {
            // Version 2, with an origin that no parent tells any more.
            apply(catalog, boot);
            apply(catalog, RemoveRecord{.ids = {1}});
        }
        const Input content = content_now();
        Input input;
        append_byte(input, shape);
        append_number(input, static_cast<uint16_t>(content.size()));
        append(input, content);
        add_record(input, HoleRecord{.volume = 2, .ranges = {{.page = 6, .pages = 600}}});
        add_record(input, map);
        add_record(input, RollbackRecord{.volume = 2, .snapshot = 4});
        add_record(input, RenameRecord{.id = 3, .name = "c"});
        add_record(input, FoldRecord{.volume = 2, .root = here.root(), .leaves = {0}});
        add_record(input, ResizeRecord{.volume = 3, .size_bytes = 4096, .root = {}});
        add_record(
            input,
            CloneRecord{
                .source = 2, .first_id = 5, .size_bytes = 8192, .created_ns = 6, .names = {"d"}});
        add_record(input, SharingRecord{.id = 1, .shareable = shape != 0});
        add_record(input, boot);
        add_record(input, BootRecord{.root = boot.root, .manifest = std::nullopt});
        add_record(input, RemoveRecord{.ids = {2, 4}});
        out.push_back(std::move(input));
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    Feed feed(data, size);
    Storage& here = storage();
    const uint32_t shape = feed.below(9);
    const uint32_t levels = shape % 3;
    const uint32_t version = 1 + shape / 3;
    const stellarium::Bytes content =
        feed.bytes(std::min<size_t>(feed.u16(), stellarium::nebula::kMaxObjectBytes));
    Catalog catalog(here.store(), here.cache());
    if (!catalog.load(stellarium::bytes_of(root_of(here.store(), content, levels, version)))) {
        return 0;
    }
    check_round_trip(here, catalog);
    look(here, catalog);
    while (!feed.empty()) {
        const auto kind = static_cast<uint16_t>(0x0100U | feed.u8());
        if (!catalog.replay(kind, feed.bytes(feed.u16()))) {
            return 0;  // The pool is not opened.
        }
    }
    check_round_trip(here, catalog);
    look(here, catalog);
    return 0;
}
