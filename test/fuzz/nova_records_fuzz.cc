// The records of the log: what is decoded is encoded as the same bytes.
//
// Input: the kind, counted from the first; the rest is the payload.
#include "nova/limits.h"
#include "nova/records.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using namespace nova;  // NOLINT(google-build-using-namespace)

template <typename Record>
void round_trip(Bytes payload) {
    const auto record = decode<Record>(payload);
    // A longer one is no record of ours, and encode() asserts that it makes none.
    if (record && payload.size() <= kMaxRecordBytes) {
        require(equal(encode(*record), payload),
                "a record that was decoded is encoded as the same bytes");
    }
}

template <typename Record>
void add_seed(std::vector<Input>& out, const Record& record) {
    Input input;
    append_byte(input, static_cast<unsigned>(Record::kKind) - unsigned{0x0101});
    append(input, encode(record));
    out.push_back(std::move(input));
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    NodeRef root;
    root.id = hash(bytes_of(std::string_view("root")));
    root.hint = nebula::PageAddress::make(1, 9);
    add_seed(out, CreateRecord{.id = 1,
                               .kind = EntityKind::kImage,
                               .size_bytes = 1 << 20,
                               .created_ns = 1,
                               .data_bytes = 4096,
                               .root = root,
                               .name = "debian"});
    add_seed(out, CloneRecord{.source = 1,
                              .first_id = 2,
                              .size_bytes = 1 << 20,
                              .created_ns = 1,
                              .names = {"a", "vm-2"}});
    add_seed(out, SnapshotRecord{.id = 4, .volume = 2, .created_ns = 1, .name = "s"});
    add_seed(out, RollbackRecord{.volume = 2, .snapshot = 4});
    add_seed(out, ResizeRecord{.volume = 2, .size_bytes = 512, .root = root});
    add_seed(out, RenameRecord{.id = 2, .name = "b"});
    add_seed(out, RemoveRecord{.ids = {2, 4}});
    add_seed(out, AttachmentChangeRecord{.id = 2, .body = std::nullopt});
    add_seed(out,
             AttachmentChangeRecord{
                 .id = 2, .body = AttachmentRecordBody{.label = "socket", .options = Input(3)}});
    add_seed(out,
             MapRecord{.volume = 2,
                       .entries = {{.page = 0, .pages = 16, .first_in_chunk = 0, .id = root.id},
                                   {.page = 512, .pages = 1, .first_in_chunk = 15, .id = {}}}});
    add_seed(out, HoleRecord{.volume = 2,
                             .ranges = {{.page = 0, .pages = 1}, {.page = 7, .pages = 99}}});
    add_seed(out, FoldRecord{.volume = 2, .root = root, .leaves = {0, 5}});
    add_seed(out, ArenaRecord{.id = {1, 2}, .closed = true, .path = "/run/arena"});
    add_seed(out, BootRecord{.root = root.id, .manifest = std::nullopt});
    add_seed(out, SharingRecord{.id = 9, .shareable = true});
    add_seed(out, BootRecord{.root = root.id,
                             .manifest = Pieces{.top = root, .levels = 1, .bytes = 70'000}});
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    Feed feed(data, size);
    const auto kind = static_cast<uint16_t>(0x0101 + feed.below(14));
    const stellarium::Bytes payload = feed.rest();
    switch (static_cast<RecordKind>(kind)) {
        case RecordKind::kCreate:
            round_trip<CreateRecord>(payload);
            break;
        case RecordKind::kClone:
            round_trip<CloneRecord>(payload);
            break;
        case RecordKind::kSnapshot:
            round_trip<SnapshotRecord>(payload);
            break;
        case RecordKind::kRollback:
            round_trip<RollbackRecord>(payload);
            break;
        case RecordKind::kResize:
            round_trip<ResizeRecord>(payload);
            break;
        case RecordKind::kRename:
            round_trip<RenameRecord>(payload);
            break;
        case RecordKind::kRemove:
            round_trip<RemoveRecord>(payload);
            break;
        case RecordKind::kAttachment:
            round_trip<AttachmentChangeRecord>(payload);
            break;
        case RecordKind::kMap:
            round_trip<MapRecord>(payload);
            break;
        case RecordKind::kHole:
            round_trip<HoleRecord>(payload);
            break;
        case RecordKind::kFold:
            round_trip<FoldRecord>(payload);
            break;
        case RecordKind::kArena:
            round_trip<ArenaRecord>(payload);
            break;
        case RecordKind::kSharing:
            round_trip<SharingRecord>(payload);
            break;
        case RecordKind::kBoot:
            round_trip<BootRecord>(payload);
            break;
    }
    return 0;
}
