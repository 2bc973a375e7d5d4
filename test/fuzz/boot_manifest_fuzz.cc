// Boot manifests: what is decoded is encoded as the same bytes, merges, and can be staged anywhere.
//
// Input: the content.
#include "boot/limits.h"
#include "boot/manifest.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {

void add_seeds(std::vector<Input>& out) {
    boot::BootManifest manifest;
    manifest.root = hash(bytes_of(std::string_view("root")));
    manifest.size_bytes = 1 << 20;
    out.push_back(boot::encode(manifest));
    boot::add_trace(manifest,
                    {.recorded_ns = 1,
                     .cut = false,
                     .runs = {{.page = 9, .pages = 3}, {.page = 0, .pages = 1}}},
                    5);
    boot::add_trace(manifest, {.recorded_ns = 2, .cut = true, .runs = {{.page = 10, .pages = 300}}},
                    6);
    manifest.kernel = boot::BootFile{.root = manifest.root, .size_bytes = 77};
    manifest.hints = "console=ttyS0";
    out.push_back(boot::encode(manifest));
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    namespace boot = stellarium::boot;
    const stellarium::Bytes content = std::as_bytes(std::span(data, size));
    auto manifest = boot::decode(content);
    if (!manifest) {
        return 0;
    }
    require(equal(boot::encode(*manifest), content),
            "a manifest that was decoded is encoded as the same bytes");
    uint64_t pages = 0;
    for (const boot::BootTrace& trace : manifest->traces) {
        pages += boot::pages_of(trace.runs);
    }
    if (pages > 100'000) {
        return 0;  // Within the limits, and slow.
    }
    boot::add_trace(*manifest, {.recorded_ns = 3, .cut = false, .runs = {{.page = 1, .pages = 2}}},
                    7);
    require(boot::pages_of(manifest->prefetch) <= pages + 2, "merging makes no pages up");
    const auto again = boot::decode(boot::encode(*manifest));
    require(again.has_value() && *again == *manifest,
            "a manifest with one more trace is a manifest");
    return 0;
}
