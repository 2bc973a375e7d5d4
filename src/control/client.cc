#include "control/client.h"

#include <optional>

namespace stellarium::control {
namespace {

/// Remembers the error that a source gave: that is the cause, whatever the other side made of it.
class RecordingSource final : public SparseSource {
  public:
    explicit RecordingSource(SparseSource& source) : source_(source) {}

    std::optional<uint64_t> size_hint() const override { return source_.size_hint(); }
    uint64_t size_bytes() const override { return source_.size_bytes(); }
    Result<std::optional<SparseExtent>> next() override {
        Result<std::optional<SparseExtent>> extent = source_.next();
        if (!extent) {
            error_ = extent.error();
        }
        return extent;
    }
    const std::optional<Error>& error() const { return error_; }

  private:
    SparseSource& source_;
    std::optional<Error> error_;
};

class InProcessClient final : public ControlClient {
  public:
    explicit InProcessClient(RequestHandler& handler) : handler_(handler) {}

  protected:
    Result<Response> exchange(const Request& request) override { return handler_.handle(request); }

  private:
    RequestHandler& handler_;
};

Result<Json> json_of(const Result<Response>& response) {
    if (!response) {
        return std::unexpected(response.error());
    }
    if (response->status < 200 || response->status > 299) {
        return std::unexpected(error_from_json(response->body, response->status));
    }
    if (response->body.empty()) {
        return Json();
    }
    Result<Json> parsed = parse_json(response->body, "answer");
    if (!parsed) {
        return fail(ErrorCode::kProtocol, parsed.error().message());
    }
    return parsed;
}

}  // namespace

Result<Json> ControlClient::call(std::string_view method, std::string target) {
    return json_of(exchange(
        {.method = std::string(method), .target = std::move(target), .body = {}, .upload = {}}));
}

Result<Json> ControlClient::call(std::string_view method, std::string target, const Json& body) {
    return json_of(exchange({.method = std::string(method),
                             .target = std::move(target),
                             .body = to_text(body),
                             .upload = {}}));
}

Result<Json> ControlClient::upload(std::string target, SparseSource& source) {
    RecordingSource recorded(source);
    Result<Json> answer = json_of(
        exchange({.method = "PUT", .target = std::move(target), .body = {}, .upload = &recorded}));
    if (const std::optional<Error>& error = recorded.error()) {
        return std::unexpected(*error);
    }
    return answer;
}

Result<std::unique_ptr<SparseSource>> ControlClient::download(std::string target) {
    STELLARIUM_ASSIGN(
        Response response,
        exchange({.method = "GET", .target = std::move(target), .body = {}, .upload = {}}));
    if (response.status != 200) {
        return std::unexpected(error_from_json(response.body, response.status));
    }
    if (!response.download) {
        return fail(ErrorCode::kProtocol, "the answer carries no content");
    }
    return std::move(response.download);
}

std::unique_ptr<ControlClient> connect_in_process(RequestHandler& handler) {
    return std::make_unique<InProcessClient>(handler);
}

}  // namespace stellarium::control
