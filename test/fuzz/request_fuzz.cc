// The control API behind HTTP: requests in turn to a service with a small pool. Every answer is
// one that the interface describes, and its body is what it says it is.
//
// Input: lines "METHOD TARGET BODY".
#include <memory>
#include <string>
#include <string_view>

#include "control/attachment.h"
#include "control/json.h"
#include "control/service.h"
#include "test/fuzz/fuzz.h"
#include "test/fuzz/fuzz_pool.h"

namespace stellarium::fuzz {
namespace {

constexpr size_t kMaxRequests = 16;
constexpr size_t kMaxPieces = 64;

/// The content of an upload: the body's bytes at the offset of their number.
class BodySource final : public control::SparseSource {
  public:
    explicit BodySource(std::string_view body) : body_(bytes_of(body)) {}
    std::optional<uint64_t> size_hint() const override { return std::nullopt; }
    uint64_t size_bytes() const override { return body_.size() * 512; }
    Result<std::optional<control::SparseExtent>> next() override {
        if (body_.empty() || std::exchange(done_, true)) {
            return std::nullopt;
        }
        return control::SparseExtent{.offset_bytes = body_.size(), .data = body_};
    }

  private:
    Bytes body_;
    bool done_ = false;
};

void check_download(control::SparseSource& source) {
    uint64_t end = 0;
    for (size_t pieces = 0; pieces < kMaxPieces; ++pieces) {
        const auto extent = source.next();
        if (!extent) {
            return;
        }
        if (!*extent) {
            require(source.size_bytes() >= end, "content ends within its size");
            return;
        }
        require((*extent)->offset_bytes >= end && !(*extent)->data.empty() &&
                    (*extent)->data.size() <= control::kMaxFrameBytes,
                "extents ascend, and are not empty or long");
        end = (*extent)->offset_bytes + (*extent)->data.size();
    }
}

void check_json(std::string_view text) {
    const auto json = control::parse_json(text, "input");
    if (!json) {
        return;
    }
    const std::string again = control::to_text(*json);
    const auto parsed = control::parse_json(again, "input");
    require(parsed && *parsed == *json, "JSON that was parsed and written is parsed as the same");
    if (const auto options = control::attachment_options_from_json(*json, "input"); options) {
        require(control::attachment_options_from_json(*parsed, "input").has_value(),
                "options are options when they are written");
    }
}

void send(control::ControlService& service, std::string_view line) {
    const size_t first = line.find(' ');
    const size_t second = first == std::string_view::npos ? first : line.find(' ', first + 1);
    if (second == std::string_view::npos) {
        return;
    }
    control::Request request{.method = std::string(line.substr(0, first)),
                             .target = std::string(line.substr(first + 1, second - first - 1)),
                             .body = std::string(line.substr(second + 1)),
                             .upload = nullptr};
    check_json(request.body);
    require(service.max_json_bytes(request.method, request.target) <= control::kMaxJsonBytes,
            "no body is longer than the longest");
    BodySource upload(request.body);
    if (service.wants_upload(request.method, request.target)) {
        request.body.clear();
        request.upload = &upload;
    }
    const control::Response response = service.handle(request);
    require(response.status >= 200 && response.status < 600, "a status is one of HTTP");
    require((response.status == 405) == !response.allow.empty(),
            "where a method is not allowed, others are named");
    if (response.download) {
        require(response.status == 200 && response.body.empty(), "content is its own answer");
        check_download(*response.download);
    } else if (response.status == 204) {
        require(response.body.empty(), "an answer without content has none");
    } else {
        const auto body = control::parse_json(response.body, "answer");
        require(body && (body->is_object() || body->is_array()), "an answer is JSON");
        require(response.status < 400 || (body->contains("code") && body->contains("message")),
                "a failure says what it is");
    }
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    std::string all;
    for (const control::RouteInfo& route : control::ControlService::routes()) {
        std::string target(route.path);
        for (const auto& [placeholder, value] :
             {std::pair("{name}", "a"), {"{snapshot}", "s"}, {"{source}", "a"}}) {
            if (const size_t at = target.find(placeholder); at != std::string::npos) {
                target.replace(at, std::string_view(placeholder).size(), value);
            }
        }
        const std::string line = std::string(route.method) + " " + target + " ";
        for (const std::string_view body :
             {"", "{}", R"({"name":"c","size_bytes":"1MiB"})", R"({"name":"c"})",
              R"({"source":"a","names":["x","y"]})", R"({"kind":"volume","names":["a","b"]})",
              R"({"size_bytes":4096,"allow_shrink":true})", R"({"dry_run":true})"}) {
            const Bytes bytes = bytes_of(std::string_view(line));
            Input input(bytes.begin(), bytes.end());
            append(input, bytes_of(body));
            append(input, bytes_of(std::string_view("\nGET /v1/volumes ")));
            out.push_back(std::move(input));
        }
    }
    for (
        const std::string_view line :
        {"GET /v1/diff?a=a&b=a%40s&from=0&limit=3 ", "GET /v1/content?source=a ",
         "PUT /v1/attachments/a "
         R"({"version":1,"frontend":"vhost-user","read_only":false,"queues":4,"block_size":4096})"}) {
        const Bytes bytes = bytes_of(line);
        out.emplace_back(bytes.begin(), bytes.end());
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium;  // NOLINT(google-build-using-namespace)
    fuzz::PoolCopy copy;
    control::ControlService service(
        copy.pool(), {.host = nullptr, .version = "0", .directory = "/pool", .socket = {}});
    std::string_view text(reinterpret_cast<const char*>(data), size);
    for (size_t requests = 0; !text.empty() && requests < fuzz::kMaxRequests; ++requests) {
        const size_t end = std::min(text.find('\n'), text.size());
        fuzz::send(service, text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return 0;
}
