// Fuzzes what strangers send to the control socket: sparse streams, JSON, and whole requests to a
// service whose pool is on a simulated disk. The first byte chooses.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "control/json.h"
#include "control/service.h"
#include "control/sparse_stream.h"
#include "io/simulated.h"
#include "nova/pool.h"

namespace stellarium::control {
namespace {

class BufferBytes final : public ByteSource {
  public:
    explicit BufferBytes(Bytes bytes) : bytes_(bytes) {}
    Result<size_t> read_some(MutableBytes into) override {
        const size_t count = std::min(into.size(), bytes_.size());
        std::ranges::copy(bytes_.first(count), into.begin());
        bytes_ = bytes_.subspan(count);
        return count;
    }

  private:
    Bytes bytes_;
};

void decode(Bytes bytes) {
    SparseDecoder decoder(std::make_unique<BufferBytes>(bytes));
    uint64_t end = 0;
    while (true) {
        const auto extent = decoder.next();
        if (!extent || !*extent) {
            break;
        }
        // What was promised to whoever reads from a decoder.
        if ((*extent)->offset_bytes < end || (*extent)->data.empty() ||
            (*extent)->data.size() > kMaxFrameBytes) {
            __builtin_trap();
        }
        end = (*extent)->offset_bytes + (*extent)->data.size();
    }
}

/// Lines: "METHOD TARGET BODY".
void request(const std::string& text) {
    static io::SimulatedMachine machine(1);
    static const std::unique_ptr<nova::Pool> pool = [] {
        nova::PoolOptions options;
        options.background = false;
        options.dirty_budget_bytes = 1 << 20;
        if (!nova::Pool::create(machine.env(), "/pool", options)) {
            __builtin_trap();
        }
        return *nova::Pool::open(machine.env(), "/pool", options);
    }();
    static ControlService service(
        *pool, {.host = nullptr, .version = "0", .directory = "/pool", .socket = {}});
    const size_t first = text.find(' ');
    const size_t second = first == std::string::npos ? first : text.find(' ', first + 1);
    if (second == std::string::npos) {
        return;
    }
    const Response response =
        service.handle({text.substr(0, first), text.substr(first + 1, second - first - 1),
                        text.substr(second + 1), nullptr});
    if (response.status < 200 || response.status > 599) {
        __builtin_trap();
    }
}

}  // namespace
}  // namespace stellarium::control

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium;  // NOLINT(google-build-using-namespace)
    if (size == 0) {
        return 0;
    }
    const Bytes bytes = std::as_bytes(std::span(data + 1, size - 1));
    const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    switch (data[0] % 3) {
        case 0:
            control::decode(bytes);
            break;
        case 1:
            if (const auto json = control::parse_json(text, "input"); json) {
                (void)control::attachment_options_from_json(*json, "input");
                (void)control::to_text(*json);
            }
            break;
        default:
            control::request(text);
    }
    return 0;
}
