#include "control/service.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/units.h"
#include "control/client.h"
#include "control/locations.h"
#include "io/posix.h"
#include "nova/testing/test_pool.h"

namespace stellarium::control {
namespace {

using nova::testing::export_all;
using nova::testing::must;
using nova::testing::random_bytes;
using nova::testing::TestPool;

/// One extent at an offset, and a size.
class OneExtent final : public SparseSource {
  public:
    OneExtent(uint64_t offset, std::vector<std::byte> data, uint64_t size)
        : offset_(offset), data_(std::move(data)), size_(size) {}
    std::optional<uint64_t> size_hint() const override { return size_; }
    uint64_t size_bytes() const override { return size_; }
    Result<std::optional<SparseExtent>> next() override {
        if (error_) {
            return std::unexpected(*error_);
        }
        if (given_ || data_.empty()) {
            return std::nullopt;
        }
        given_ = true;
        return SparseExtent{offset_, data_};
    }
    void fail_with(Error error) { error_ = std::move(error); }

  private:
    uint64_t offset_;
    std::vector<std::byte> data_;
    uint64_t size_;
    bool given_ = false;
    std::optional<Error> error_;
};

/// Remembers what it was asked, in place of a daemon.
class FakeHost final : public AttachmentHost {
  public:
    explicit FakeHost(nova::Pool& pool) : pool_(pool) {}
    Result<AttachmentStatus> attach(std::string_view source,
                                    const AttachmentOptions& options) override {
        AttachmentStatus status;
        status.source = source;
        status.socket = "/run/vhost/1.sock";
        status.options = options;
        status.state = AttachmentState::kListening;
        STELLARIUM_TRY(pool_.set_attachment(
            source, nova::Pool::AttachmentRecord{.source = std::string(source),
                                                 .label = "vhost-user",
                                                 .options = encode_attachment(options)}));
        return attached_.emplace_back(status);
    }
    Result<AttachmentStatus> detach(std::string_view source) override {
        for (size_t i = 0; i < attached_.size(); ++i) {
            if (attached_[i].source == source) {
                const AttachmentStatus status = attached_[i];
                attached_.erase(attached_.begin() + static_cast<std::ptrdiff_t>(i));
                STELLARIUM_TRY(pool_.set_attachment(source, std::nullopt));
                return status;
            }
        }
        return fail(ErrorCode::kNotFound, "not attached");
    }
    Result<AttachmentStatus> set_limits(std::string_view source,
                                        const RateLimits& limits) override {
        for (AttachmentStatus& status : attached_) {
            if (status.source == source) {
                status.options.limits = limits;
                STELLARIUM_TRY(pool_.set_attachment(
                    source,
                    nova::Pool::AttachmentRecord{.source = std::string(source),
                                                 .label = "vhost-user",
                                                 .options = encode_attachment(status.options)}));
                return status;
            }
        }
        return fail(ErrorCode::kNotFound, "it is not attached");
    }
    std::vector<AttachmentStatus> attachments() const override { return attached_; }

  private:
    nova::Pool& pool_;
    std::vector<AttachmentStatus> attached_;
};

/// A daemon for which one directory can be mounted, and unmounted while `open` is empty.
class FakeFiles final : public FilesHost {
  public:
    FilesStatus files() const override { return status; }
    Result<FilesStatus> take_directory(std::string_view directory) override {
        if (status.mounted) {
            return fail(ErrorCode::kAlreadyExists, "mounted already");
        }
        status.mounted = true;
        status.directory = directory;
        status.holder_pid = 17;
        for (const char* kind : {"open", "read", "write", "flush", "discard", "other"}) {
            status.requests.push_back({.kind = kind, .requests = 3, .bytes = 4096, .errors = 1});
        }
        return status;
    }
    Result<void> unmount() override {
        if (!status.mounted) {
            return fail(ErrorCode::kNotFound, "no directory is mounted");
        }
        if (!status.open.empty()) {
            return fail(ErrorCode::kBusy, status.open.front() + " is open");
        }
        status = {};
        return {};
    }

    FilesStatus status;
};

class ServiceTest : public testing::Test {
  protected:
    explicit ServiceTest(AttachmentHost* host = nullptr) { make(host); }

    void make(AttachmentHost* host, FilesHost* files = nullptr) {
        service_ = std::make_unique<ControlService>(*pool_, ServiceOptions{.host = host,
                                                                           .files = files,
                                                                           .version = "1.2.3",
                                                                           .directory = "/pool",
                                                                           .socket = {}});
        client_ = connect_in_process(*service_);
    }
    Response ask(const std::string& method, const std::string& target,
                 const std::string& body = {}) {
        return service_->handle({method, target, body, nullptr});
    }
    Json get(const std::string& target) { return must(client_->call("GET", target)); }
    Json import(const std::string& name, uint64_t offset, std::vector<std::byte> data,
                uint64_t size) {
        OneExtent source(offset, std::move(data), size);
        return must(client_->upload("/v1/images/" + name, source));
    }
    Error error_of(const std::string& method, const std::string& target,
                   const std::string& body = {}) {
        const Response response = ask(method, target, body);
        const Error error = error_from_json(response.body, response.status);
        EXPECT_EQ(response.status, error_mapping(error.code()).http_status) << target;
        return error;
    }

    TestPool pool_;
    std::unique_ptr<ControlService> service_;
    std::unique_ptr<ControlClient> client_;
};

TEST_F(ServiceTest, ImportsAndExportsWithHoles) {
    const std::vector<std::byte> data = random_bytes(300'001, 1);
    const Json image = import("debian", 1'000'000, data, 5'000'003);
    EXPECT_EQ(image.at("size_bytes"), 5'000'003);
    EXPECT_EQ(image.at("import").at("bytes"), data.size());

    const auto content = must(client_->download("/v1/content?source=debian"));
    EXPECT_EQ(content->size_hint(), 5'000'003U);
    std::vector<std::byte> exported(5'000'003);
    uint64_t moved = 0;
    while (const auto extent = must(content->next())) {
        std::ranges::copy(extent->data,
                          exported.begin() + static_cast<std::ptrdiff_t>(extent->offset_bytes));
        moved += extent->data.size();
    }
    EXPECT_LE(moved, data.size() + 2 * 4096);
    EXPECT_EQ(exported, export_all(*pool_, "debian"));
    EXPECT_TRUE(std::equal(data.begin(), data.end(), exported.begin() + 1'000'000));
}

TEST_F(ServiceTest, AFailedImportLeavesNothing) {
    OneExtent source(0, random_bytes(5000, 2), 5000);
    source.fail_with(Error(ErrorCode::kBusy, "the file changed"));
    const auto failed = client_->upload("/v1/images/x", source);
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().message(), "the file changed");
    EXPECT_EQ(get("/v1/images"), Json::array());
    EXPECT_EQ(get("/v1/imports"), Json::array());
    import("x", 0, random_bytes(5000, 2), 5000);
}

TEST_F(ServiceTest, ATakenNameIsToldBeforeContentIsRead) {
    import("x", 0, random_bytes(5000, 2), 5000);
    OneExtent source(0, random_bytes(5000, 2), 5000);
    source.fail_with(Error(ErrorCode::kIo, "nobody should have read this"));
    const auto failed = client_->upload("/v1/images/x", source);
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().code(), ErrorCode::kAlreadyExists);
}

TEST_F(ServiceTest, VolumesLiveThroughAllOperations) {
    import("base", 0, random_bytes(100'000, 3), 1 << 20);
    must(client_->call("POST", "/v1/volumes", Json{{"name", "v"}, {"size_bytes", "1MiB"}}));
    must(client_->call("POST", "/v1/clones",
                       Json{{"source", "base"}, {"names", Json::array({"c-1", "c-2"})}}));
    EXPECT_EQ(get("/v1/volumes").size(), 3U);
    EXPECT_EQ(get("/v1/volumes/c-1").at("parent"), "base");
    must(client_->call("POST", "/v1/volumes/c-1/snapshots", Json{{"name", "s"}}));
    must(client_->call("POST", "/v1/volumes/c-1/resize", Json{{"size_bytes", 2 << 20}}));
    EXPECT_EQ(get("/v1/volumes/c-1").at("size_bytes"), 2 << 20);
    EXPECT_EQ(get("/v1/volumes/c-1/snapshots/s").at("name"), "c-1@s");
    must(client_->call("POST", "/v1/volumes/c-1/snapshots/s/rollback", Json::object()));
    EXPECT_EQ(get("/v1/snapshots").size(), 1U);
    EXPECT_EQ(get("/v1/snapshots?volume=c-2").size(), 0U);
    EXPECT_EQ(get("/v1/diff?a=c-1%40s&b=c-2").at("ranges").size(), 0U);
    EXPECT_EQ(get("/v1/diff?a=v&b=c-2").at("ranges").size(), 1U);
    must(client_->call("POST", "/v1/volumes/c-2/rename", Json{{"name", "d"}}));
    must(client_->call("DELETE", "/v1/volumes/c-1/snapshots/s"));
    must(client_->call("POST", "/v1/removals",
                       Json{{"kind", "volume"}, {"names", Json::array({"c-1", "d"})}}));
    must(client_->call("POST", "/v1/images/base/rename", Json{{"name", "old"}}));
    must(client_->call("DELETE", "/v1/images/old"));
    must(client_->call("POST", "/v1/checkpoint"));
    EXPECT_EQ(get("/v1/stats").at("volumes"), 1);
}

TEST_F(ServiceTest, ShrinkingDiscardsOnlyWhenItIsSaid) {
    must(client_->call("POST", "/v1/volumes", Json{{"name", "v"}, {"size_bytes", "2MiB"}}));
    const Error refused =
        error_of("POST", "/v1/volumes/v/resize", R"({"size_bytes": 1048576, "shrink": false})");
    EXPECT_EQ(refused.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(refused.message().find("shrink"), std::string::npos);
    EXPECT_EQ(get("/v1/volumes/v").at("size_bytes"), 2 << 20);
    const Json shrunk = must(client_->call("POST", "/v1/volumes/v/resize",
                                           Json{{"size_bytes", "1MiB"}, {"shrink", true}}));
    EXPECT_EQ(shrunk.at("size_bytes"), 1 << 20);
    must(client_->call("POST", "/v1/volumes/v/resize", Json{{"size_bytes", "1MiB"}}));
}

TEST_F(ServiceTest, ADifferenceNamesBothSizes) {
    must(client_->call("POST", "/v1/volumes", Json{{"name", "a"}, {"size_bytes", "1MiB"}}));
    must(client_->call("POST", "/v1/volumes", Json{{"name", "b"}, {"size_bytes", "2MiB"}}));
    const Json diff = get("/v1/diff?a=a&b=b");
    EXPECT_EQ(diff.at("a_size_bytes"), 1 << 20);
    EXPECT_EQ(diff.at("b_size_bytes"), 2 << 20);
    EXPECT_EQ(diff.at("ranges").size(), 0U);
}

TEST_F(ServiceTest, ARenameToTheSameNameIsDone) {
    must(client_->call("POST", "/v1/volumes", Json{{"name", "a"}, {"size_bytes", "1MiB"}}));
    EXPECT_EQ(must(client_->call("POST", "/v1/volumes/a/rename", Json{{"name", "a"}})).at("name"),
              "a");
    EXPECT_EQ(error_of("POST", "/v1/volumes/b/rename", R"({"name": "b"})").code(),
              ErrorCode::kNotFound);
}

TEST_F(ServiceTest, MethodsThatAreNotPossibleAreNamed) {
    const Response wrong = ask("PATCH", "/v1/volumes");
    EXPECT_EQ(wrong.status, 405);
    EXPECT_EQ(wrong.allow, "GET, POST, HEAD");
    EXPECT_EQ(ask("HEAD", "/v1/checkpoint").allow, "POST");
    EXPECT_EQ(ask("HEAD", "/v1/volumes").body, ask("GET", "/v1/volumes").body);
    EXPECT_EQ(ask("GET", "/v1/nothing").status, 404);
}

TEST_F(ServiceTest, UnknownParametersAreRefused) {
    const Error mistyped = error_of("GET", "/v1/snapshots?volme=v");
    EXPECT_EQ(mistyped.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(mistyped.message().find("did you mean 'volume'?"), std::string::npos);
    EXPECT_NE(error_of("GET", "/v1/stats?verbose=1").message().find("takes none"),
              std::string::npos);
    EXPECT_EQ(error_of("DELETE", "/v1/volumes/v?force=1").code(), ErrorCode::kInvalidArgument);
}

TEST_F(ServiceTest, KeysThatAreThereTwiceAreRefused) {
    const Error twice =
        error_of("POST", "/v1/volumes", R"({"name":"a","name":"b","size_bytes":4096})");
    EXPECT_EQ(twice.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(twice.message().find("'name'"), std::string::npos) << twice.message();
    EXPECT_EQ(get("/v1/volumes").size(), 0U);
}

TEST_F(ServiceTest, ADifferenceComesInPages) {
    must(client_->call("POST", "/v1/volumes", Json{{"name", "a"}, {"size_bytes", 1 << 20}}));
    must(client_->call("POST", "/v1/volumes", Json{{"name", "b"}, {"size_bytes", 1 << 20}}));
    {
        const auto device = must(pool_->attach("b", {}));
        for (uint64_t page = 0; page < 10; ++page) {
            must(nova::testing::write(*device, page * 8192, random_bytes(4096, page + 1)));
        }
        must(nova::testing::flush(*device));
    }
    Json ranges = Json::array();
    uint64_t from = 0;
    for (int pages = 0; pages < 4; ++pages) {
        const Json page = get("/v1/diff?a=a&b=b&limit=3&from=" + std::to_string(from));
        for (const Json& range : page.at("ranges")) {
            ranges.push_back(range);
        }
        if (page.at("next_offset_bytes").is_null()) {
            break;
        }
        from = page.at("next_offset_bytes").get<uint64_t>();
    }
    EXPECT_EQ(ranges, get("/v1/diff?a=a&b=b").at("ranges"));
    EXPECT_EQ(ranges.size(), 10U);
}

TEST_F(ServiceTest, NamesImagesAndVolumesApart) {
    import("debian", 0, random_bytes(5000, 2), 8192);
    must(client_->call("POST", "/v1/volumes", Json{{"name", "vm-1"}, {"size_bytes", 4096}}));
    EXPECT_EQ(error_of("DELETE", "/v1/volumes/debian").message(),
              "there is no volume named 'debian'; 'debian' is an image");
    EXPECT_EQ(error_of("GET", "/v1/images/vm-1").message(),
              "there is no image named 'vm-1'; 'vm-1' is a volume");
    EXPECT_EQ(error_of("GET", "/v1/volumes/vm1").message(),
              "there is no volume named 'vm1'; did you mean 'vm-1'?");
    EXPECT_EQ(error_of("GET", "/v1/images/debain").message(),
              "there is no image named 'debain'; did you mean 'debian'?");
}

TEST_F(ServiceTest, RefusesWhatIsWrong) {
    must(client_->call("POST", "/v1/volumes", Json{{"name", "v"}, {"size_bytes", 4096}}));
    struct Case {
        const char* method;
        const char* target;
        const char* body;
        ErrorCode code;
    };
    const std::vector<Case> cases{
        {"GET", "/v1/nothing", "", ErrorCode::kNotFound},
        {"GET", "/", "", ErrorCode::kNotFound},
        {"GET", "", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/volumes/..", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/volumes/a%2Fb", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/volumes/%zz", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/volumes/nope", "", ErrorCode::kNotFound},
        {"PUT", "/v1/images/x", "", ErrorCode::kInvalidArgument},
        {"POST", "/v1/volumes", "", ErrorCode::kInvalidArgument},
        {"POST", "/v1/volumes", "{}", ErrorCode::kInvalidArgument},
        {"POST", "/v1/volumes", R"({"name":"v","size_bytes":4096})", ErrorCode::kAlreadyExists},
        {"POST", "/v1/volumes", R"({"name":"w","size_bytes":1})", ErrorCode::kInvalidArgument},
        {"POST", "/v1/volumes", R"({"name":"w","size_bytes":4096,"x":1})",
         ErrorCode::kInvalidArgument},
        {"POST", "/v1/clones", R"({"source":"v","names":[]})", ErrorCode::kInvalidArgument},
        {"POST", "/v1/clones", R"({"source":"v","names":["a",7]})", ErrorCode::kInvalidArgument},
        {"POST", "/v1/clones", R"({"source":"nope","names":["a"]})", ErrorCode::kNotFound},
        {"POST", "/v1/clones", R"({"source":"v","names":["a","v"]})", ErrorCode::kAlreadyExists},
        {"POST", "/v1/removals", R"({"kind":"disk","names":["v"]})", ErrorCode::kInvalidArgument},
        {"POST", "/v1/removals", R"({"kind":"volume","names":["v","v"]})",
         ErrorCode::kInvalidArgument},
        {"POST", "/v1/removals", R"({"kind":"volume","names":["v","x"]})", ErrorCode::kNotFound},
        {"GET", "/v1/diff?a=v", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/diff?a=v&b=v&limit=0", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/diff?a=v&b=v&from=x", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/diff?a=v&a=v&b=v", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/content", "", ErrorCode::kInvalidArgument},
        {"GET", "/v1/content?source=nope", "", ErrorCode::kNotFound},
        {"POST", "/v1/volumes/v/snapshots", R"({"name":"a b"})", ErrorCode::kInvalidArgument},
        {"DELETE", "/v1/volumes/v/snapshots/s", "", ErrorCode::kNotFound},
        {"PUT", "/v1/attachments/v", R"({"queues":65})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"block_size":1024})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"serial":"123456789012345678901"})",
         ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":{"iops":0}})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":{"iops":-1}})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":{"iops":100000001}})",
         ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":{"iops_burst":5}})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":{"bandwidth_bytes":"2TiB"}})",
         ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":{"iopps":5}})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v", R"({"limits":5})", ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v/limits", R"({"bandwidth_bytes":0})",
         ErrorCode::kInvalidArgument},
        {"PUT", "/v1/attachments/v/limits", R"({"iops":5})", ErrorCode::kNotFound},
        {"PUT", "/v1/attachments/nope/limits", R"({})", ErrorCode::kNotFound},
        {"PUT", "/v1/attachments/v", R"({})", ErrorCode::kUnavailable},
        {"PUT", "/v1/attachments/nope", R"({})", ErrorCode::kNotFound},
        {"DELETE", "/v1/attachments/v", "", ErrorCode::kNotFound}};
    for (const Case& each : cases) {
        const Error error = error_of(each.method, each.target, each.body);
        EXPECT_EQ(error.code(), each.code)
            << each.method << ' ' << each.target << ' ' << each.body << ": " << error.message();
    }
    EXPECT_EQ(get("/v1/volumes").size(), 1U);
}

TEST_F(ServiceTest, AttachmentsAreSeenAndRemovedWithoutADaemon) {
    must(client_->call("POST", "/v1/volumes", Json{{"name", "v"}, {"size_bytes", 4096}}));
    import("i", 0, random_bytes(5000, 2), 8192);
    FakeHost host(*pool_);
    make(&host);
    EXPECT_EQ(error_of("PUT", "/v1/attachments/i", "{}").code(), ErrorCode::kReadOnly);
    const Json attached = must(client_->call(
        "PUT", "/v1/attachments/v",
        Json{{"queues", 4}, {"serial", "S1"}, {"block_size", 4096}, {"link", "/tmp/v.sock"}}));
    EXPECT_EQ(attached.at("state"), "listening");
    EXPECT_EQ(error_of("DELETE", "/v1/volumes/v").code(), ErrorCode::kBusy);

    make(nullptr);
    const Json offline = get("/v1/attachments");
    ASSERT_EQ(offline.size(), 1U);
    EXPECT_EQ(offline.at(0).at("state"), "offline");
    EXPECT_EQ(offline.at(0).at("queues"), 4);
    EXPECT_EQ(offline.at(0).at("limits"), Json::object());
    // Limits are changed without a daemon, and nothing else is.
    const Json limited = must(client_->call(
        "PUT", "/v1/attachments/v/limits",
        Json{{"iops", 500}, {"bandwidth_bytes", "10MiB"}, {"bandwidth_burst_bytes", "1MiB"}}));
    EXPECT_EQ(limited.at("limits"), (Json{{"iops", 500},
                                          {"iops_burst", 500},
                                          {"bandwidth_bytes", 10 * kMiB},
                                          {"bandwidth_burst_bytes", kMiB}}));
    EXPECT_EQ(get("/v1/attachments").at(0), limited);
    EXPECT_EQ(limited.at("serial"), "S1");
    EXPECT_EQ(limited.at("link"), "/tmp/v.sock");
    must(client_->call("PUT", "/v1/attachments/v/limits", Json::object()));
    EXPECT_EQ(get("/v1/attachments"), offline);
    EXPECT_EQ(offline.at(0).at("serial"), "S1");
    EXPECT_EQ(offline.at(0).at("block_size"), 4096);
    EXPECT_EQ(offline.at(0).at("link"), "/tmp/v.sock");
    must(client_->call("DELETE", "/v1/attachments/v"));
    EXPECT_EQ(get("/v1/attachments").size(), 0U);
    must(client_->call("DELETE", "/v1/volumes/v"));
}

// --- The OpenAPI file and the code ---------------------------------------------------------------

/// As much of JSON Schema as the file uses. Gives the first thing that is wrong, or "".
class SchemaChecker {
  public:
    explicit SchemaChecker(const Json& document) : document_(document) {}

    std::string check(const Json& given_schema, const Json& value, const std::string& where) const {
        const Json& schema = resolve(given_schema);
        if (value.is_null() && schema.value("nullable", false)) {
            return {};
        }
        const std::string type = schema.value("type", std::string());
        const std::map<std::string, bool> is_type{
            {"object", value.is_object()},          {"array", value.is_array()},
            {"string", value.is_string()},          {"boolean", value.is_boolean()},
            {"integer", value.is_number_integer()}, {"number", value.is_number()}};
        const auto known = is_type.find(type);
        if (known == is_type.end()) {
            return where + ": the schema has no type";
        }
        if (!known->second) {
            return where + " should be " + type + " and is " + value.type_name();
        }
        if (schema.contains("enum")) {
            bool found = false;
            for (const Json& allowed : schema.at("enum")) {
                found = found || allowed == value;
            }
            if (!found) {
                return where + " is none of the allowed values";
            }
        }
        if (type == "array") {
            for (const Json& item : value) {
                if (auto wrong = check(schema.at("items"), item, where + "[]"); !wrong.empty()) {
                    return wrong;
                }
            }
        }
        return type == "object" ? check_object(schema, value, where) : std::string();
    }

  private:
    std::string check_object(const Json& schema, const Json& value,
                             const std::string& where) const {
        for (const Json& key : schema.at("required")) {
            if (!value.contains(key.get<std::string>())) {
                return where + " lacks " + key.get<std::string>();
            }
        }
        for (const auto& [key, item] : value.items()) {
            if (!schema.at("properties").contains(key)) {
                return where + " has a field that the file does not know: " + key;
            }
            if (auto wrong = check(schema.at("properties").at(key), item, where + "." + key);
                !wrong.empty()) {
                return wrong;
            }
        }
        return {};
    }
    const Json& resolve(const Json& schema) const {
        if (!schema.contains("$ref")) {
            return schema;
        }
        const auto reference = schema.at("$ref").get<std::string>();
        return document_.at(Json::json_pointer(reference.substr(1)));
    }

    const Json& document_;
};

class OpenApiTest : public ServiceTest {
  protected:
    OpenApiTest() {
        std::ifstream file(std::string(STELLARIUM_SOURCE_DIR) + "/docs/api/openapi.json");
        std::ostringstream text;
        text << file.rdbuf();
        document_ = must(parse_json(text.str(), "OpenAPI file"));
    }

    /// Asks, and holds status and body to what the file says of this operation.
    void check(const std::string& method, const std::string& path, const std::string& target,
               const std::string& body, int status) {
        const Response response = ask(method, target, body);
        EXPECT_EQ(response.status, status) << method << ' ' << target << ": " << response.body;
        std::string lower = method;
        std::ranges::transform(lower, lower.begin(),
                               [](char c) { return static_cast<char>(std::tolower(c)); });
        const Json& operation = document_.at("paths").at(path).at(lower);
        const Json& responses = operation.at("responses");
        ASSERT_TRUE(responses.contains(std::to_string(response.status)))
            << method << ' ' << path << " answers " << response.status
            << ", which the file does not say";
        Json answer = responses.at(std::to_string(response.status));
        if (answer.contains("$ref")) {
            answer =
                document_.at(Json::json_pointer(answer.at("$ref").get<std::string>().substr(1)));
        }
        checked_.insert(operation.at("operationId").get<std::string>());
        if (!answer.contains("content")) {
            EXPECT_EQ(response.body, "");
            return;
        }
        ASSERT_TRUE(answer.at("content").contains(response.content_type)) << method << ' ' << path;
        if (response.content_type != "application/json") {
            return;
        }
        const Json& schema = answer.at("content").at("application/json").at("schema");
        EXPECT_EQ(SchemaChecker(document_).check(schema, must(parse_json(response.body, "answer")),
                                                 method + ' ' + path),
                  "");
    }

    Json document_;
    std::set<std::string> checked_;
};

TEST_F(OpenApiTest, NamesTheSameOperationsAsTheCode) {
    std::set<std::string> in_file;
    for (const auto& [path, methods] : document_.at("paths").items()) {
        for (const auto& [method, operation] : methods.items()) {
            if (path == "/metrics") {
                continue;  // The daemon's own; its tests ask for it.
            }
            std::string upper = method;
            std::ranges::transform(upper, upper.begin(),
                                   [](char c) { return static_cast<char>(std::toupper(c)); });
            std::string success;
            for (const auto& [status, response] : operation.at("responses").items()) {
                if (status.starts_with('2')) {
                    success += status;
                }
            }
            const bool upload =
                operation.contains("requestBody") &&
                operation.at("requestBody").at("content").contains(kSparseContentType);
            in_file.insert(upper + ' ' + path + ' ' +
                           operation.at("operationId").get<std::string>() + ' ' + success +
                           (upload ? " upload" : ""));
            // Placeholders are declared, each.
            size_t declared = 0;
            for (const Json& parameter : operation.value("parameters", Json::array())) {
                declared += parameter.at("in") == "path" ? 1 : 0;
            }
            EXPECT_EQ(declared, static_cast<size_t>(std::ranges::count(path, '{'))) << path;
        }
    }
    std::set<std::string> in_code;
    for (const RouteInfo& route : ControlService::routes()) {
        in_code.insert(std::string(route.method) + ' ' + std::string(route.path) + ' ' +
                       std::string(route.operation) + ' ' + std::to_string(route.success_status) +
                       (route.upload ? " upload" : ""));
    }
    EXPECT_EQ(in_file, in_code);
}

TEST_F(OpenApiTest, NamesAllErrorCodes) {
    std::set<std::string> in_file;
    for (const Json& code : document_.at("components")
                                .at("schemas")
                                .at("Error")
                                .at("properties")
                                .at("code")
                                .at("enum")) {
        in_file.insert(code.get<std::string>());
    }
    std::set<std::string> in_code;
    for (int i = 0; i < kErrorCodeCount; ++i) {
        in_code.emplace(error_mapping(static_cast<ErrorCode>(i)).name);
    }
    EXPECT_EQ(in_file, in_code);
}

TEST_F(OpenApiTest, RealAnswersMatchTheirSchemas) {
    FakeHost host(*pool_);
    FakeFiles files;
    make(&host, &files);
    import("i", 0, random_bytes(5000, 2), 8192);
    OneExtent again(0, random_bytes(5000, 2), 8192);
    const Response imported = service_->handle({"PUT", "/v1/images/i2", "", &again});
    EXPECT_EQ(imported.status, 201);
    EXPECT_EQ(SchemaChecker(document_).check(Json{{"$ref", "#/components/schemas/Imported"}},
                                             must(parse_json(imported.body, "answer")), "import"),
              "");
    checked_.insert("importImage");
    const std::string volume = "/v1/volumes/{name}";
    const std::string snapshot = "/v1/volumes/{name}/snapshots/{snapshot}";
    check("POST", "/v1/volumes", "/v1/volumes", R"({"name":"v","size_bytes":4096})", 201);
    check("POST", "/v1/volumes", "/v1/volumes", R"({"name":"v","size_bytes":4096})", 409);
    check("POST", "/v1/volumes", "/v1/volumes", "{}", 400);
    check("POST", "/v1/clones", "/v1/clones", R"({"source":"i","names":["c","d"]})", 201);
    check("POST", volume + "/resize", "/v1/volumes/c/resize", R"({"size_bytes":16384})", 200);
    check("POST", volume + "/rename", "/v1/volumes/d/rename", R"({"name":"e"})", 200);
    check("POST", volume + "/snapshots", "/v1/volumes/c/snapshots", R"({"name":"s"})", 201);
    check("GET", snapshot, "/v1/volumes/c/snapshots/s", "", 200);
    check("POST", snapshot + "/rollback", "/v1/volumes/c/snapshots/s/rollback", "", 200);
    check("GET", "/v1/snapshots", "/v1/snapshots?volume=c", "", 200);
    check("DELETE", snapshot, "/v1/volumes/c/snapshots/s", "", 204);
    check("DELETE", snapshot, "/v1/volumes/c/snapshots/s", "", 404);
    check("PUT", "/v1/attachments/{source}", "/v1/attachments/c", R"({"limits":{"iops":5}})", 201);
    const std::string limits = "/v1/attachments/{source}/limits";
    check("PUT", limits, "/v1/attachments/c/limits", R"({"iops":7,"bandwidth_bytes":"1MiB"})", 200);
    check("PUT", limits, "/v1/attachments/c/limits", R"({"iops":0})", 400);
    check("PUT", limits, "/v1/attachments/v/limits", "{}", 404);
    check("GET", "/v1/attachments", "/v1/attachments", "", 200);
    check("DELETE", volume, "/v1/volumes/c", "", 409);
    check("PUT", "/v1/attachments/{source}", "/v1/attachments/i", "{}", 403);
    check("DELETE", "/v1/attachments/{source}", "/v1/attachments/c", "", 200);
    const std::string boot = "/v1/boots/{source}";
    const std::string recording = "/v1/boots/{source}/recording";
    check("GET", boot, "/v1/boots/c", "", 404);
    check("DELETE", boot, "/v1/boots/c", "", 404);
    check("POST", recording, "/v1/boots/c/recording", "", 400);
    check("DELETE", recording, "/v1/boots/c/recording", "", 404);
    {
        const auto device = must(pool_->attach("c", {}));
        check("POST", recording, "/v1/boots/c/recording", "", 201);
        check("POST", recording, "/v1/boots/c/recording", "", 409);
        check("GET", "/v1/recordings", "/v1/recordings", "", 200);
        check("DELETE", recording, "/v1/boots/c/recording?discard=perhaps", "", 400);
        std::vector<std::byte> page(4096);
        const iovec part{.iov_base = page.data(), .iov_len = page.size()};
        must(device->read(0, std::span(&part, 1), IoMode::kMayBlock));
        check("DELETE", recording, "/v1/boots/c/recording", "", 200);
    }
    check("PUT", boot, "/v1/boots/i", R"({"kernel":"i2","hints":"quiet"})", 200);
    check("PUT", boot, "/v1/boots/i", R"({"initrd":"c"})", 400);
    check("GET", boot, "/v1/boots/c", "", 200);
    check("GET", "/v1/boots", "/v1/boots", "", 200);
    check("POST", "/v1/prefetch", "/v1/prefetch", R"({"source":"c"})", 200);
    check("POST", "/v1/prefetch", "/v1/prefetch", R"({"source":"v"})", 404);
    check("POST", "/v1/prefetch", "/v1/prefetch", R"({"source":"v","all":true})", 200);
    check("GET", "/v1/prefetch", "/v1/prefetch", "", 200);
    check("DELETE", "/v1/prefetch", "/v1/prefetch", "", 204);
    check("DELETE", boot, "/v1/boots/i", "", 204);
    check("GET", "/v1/files", "/v1/files", "", 200);
    check("DELETE", "/v1/files", "/v1/files", "", 404);
    check("PUT", "/v1/files", "/v1/files", R"({"directory":7})", 400);
    check("PUT", "/v1/files", "/v1/files", R"({"directory":"/srv/disks"})", 201);
    check("PUT", "/v1/files", "/v1/files", R"({"directory":"/srv/disks"})", 409);
    files.status.open = {"volumes/c"};
    check("GET", "/v1/files", "/v1/files", "", 200);
    check("DELETE", "/v1/files", "/v1/files", "", 409);
    files.status.open.clear();
    check("DELETE", "/v1/files", "/v1/files", "", 204);
    check("GET", "/v1/version", "/v1/version", "", 200);
    check("GET", "/v1/store", "/v1/store", "", 200);
    check("GET", "/v1/stats", "/v1/stats", "", 200);
    check("GET", "/v1/images", "/v1/images", "", 200);
    check("GET", "/v1/images/{name}", "/v1/images/i", "", 200);
    const std::string sharing = "/v1/images/{name}/sharing";
    check("PUT", sharing, "/v1/images/i/sharing", R"({"shareable":true})", 200);
    check("PUT", sharing, "/v1/images/i/sharing", R"({"shareable":1})", 400);
    check("PUT", sharing, "/v1/images/nope/sharing", R"({"shareable":true})", 404);
    check("GET", "/v1/images/{name}", "/v1/images/i", "", 200);
    check("GET", "/v1/sharing", "/v1/sharing", "", 200);
    check("GET", "/v1/imports", "/v1/imports", "", 200);
    check("GET", "/v1/volumes", "/v1/volumes", "", 200);
    check("GET", volume, "/v1/volumes/c", "", 200);
    check("GET", volume, "/v1/volumes/nope", "", 404);
    check("GET", "/v1/diff", "/v1/diff?a=v&b=c", "", 200);
    check("GET", "/v1/content", "/v1/content?source=c", "", 200);
    check("POST", "/v1/images/{name}/rename", "/v1/images/i2/rename", R"({"name":"i3"})", 200);
    check("DELETE", "/v1/images/{name}", "/v1/images/i3", "", 204);
    check("DELETE", volume, "/v1/volumes/v", "", 204);
    check("POST", "/v1/removals", "/v1/removals", R"({"kind":"volume","names":["c","e"]})", 204);
    check("POST", "/v1/checkpoint", "/v1/checkpoint", "", 204);
    check("GET", "/v1/gc", "/v1/gc", "", 200);
    check("POST", "/v1/gc", "/v1/gc", R"({"dry_run":true,"rate_bytes_per_second":"1GiB"})", 200);
    check("POST", "/v1/gc", "/v1/gc", "", 200);
    check("POST", "/v1/gc", "/v1/gc", R"({"rate":1})", 400);
    check("POST", "/v1/gc", "/v1/gc", R"({"rate_bytes_per_second":"1KiB"})", 400);
    check("GET", "/v1/gc", "/v1/gc", "", 200);
    check("DELETE", "/v1/gc", "/v1/gc", "", 204);
    check("GET", "/v1/scrub", "/v1/scrub", "", 200);
    check("POST", "/v1/scrub", "/v1/scrub", R"({"restart":true,"rate_bytes_per_second":"1GiB"})",
          200);
    check("POST", "/v1/scrub", "/v1/scrub", "", 200);
    check("POST", "/v1/scrub", "/v1/scrub", R"({"rate":1})", 400);
    check("POST", "/v1/scrub", "/v1/scrub", R"({"rate_bytes_per_second":1048575})", 400);
    check("GET", "/v1/scrub", "/v1/scrub", "", 200);
    check("DELETE", "/v1/scrub", "/v1/scrub", "", 204);
    check("GET", "/v1/damage", "/v1/damage", "", 200);
    for (const RouteInfo& route : ControlService::routes()) {
        EXPECT_TRUE(checked_.contains(std::string(route.operation)))
            << route.operation << " was never asked";
    }
}

TEST_F(ServiceTest, GarbageIsCollectedAndNotWhenTheProgramStops) {
    import("i", 0, random_bytes(500'000, 1), 500'000);
    import("j", 0, random_bytes(500'000, 2), 500'000);
    EXPECT_EQ(ask("DELETE", "/v1/images/j").status, 204);
    const auto report = must(parse_json(ask("POST", "/v1/gc").body, "answer"));
    EXPECT_GE(report.at("dead_bytes").get<uint64_t>(), 490'000U);
    const auto state = must(parse_json(ask("GET", "/v1/gc").body, "answer"));
    EXPECT_FALSE(state.at("running").get<bool>());
    EXPECT_EQ(state.at("collections").get<uint64_t>(), 1U);
    EXPECT_EQ(state.at("last").at("dead_bytes"), report.at("dead_bytes"));
    service_->stop_long_work();
    EXPECT_EQ(ask("POST", "/v1/gc").status, error_mapping(ErrorCode::kCancelled).http_status);
}

// --- Where things are ----------------------------------------------------------------------------

TEST(Locations, ARecordComesBackAndNonsenseIsNone) {
    io::SimulatedMachine machine(1);
    io::FileSystem& files = machine.files();
    must(files.make_directory("/store"));
    EXPECT_FALSE(read_daemon_record(files, "/store"));
    must(write_daemon_record(files, "/store",
                             {.pid = 7, .socket = "/run/a.sock", .runtime_directory = "/run/a"}));
    const auto record = read_daemon_record(files, "/store");
    ASSERT_TRUE(record);
    EXPECT_EQ(record->pid, 7);
    EXPECT_EQ(record->socket, "/run/a.sock");
    EXPECT_EQ(control_socket_candidates(files, "/store").front(), "/run/a.sock");
    must(remove_daemon_record(files, "/store"));
    must(remove_daemon_record(files, "/store"));
    EXPECT_FALSE(read_daemon_record(files, "/store"));
    const auto file = must(files.open("/store/daemon.json", io::OpenMode::kCreate));
    must(io::write_all(*file, bytes_of(std::string_view("{\"pid\":")), 0));
    EXPECT_FALSE(read_daemon_record(files, "/store"));
}

/// Writes down every path that is asked for.
class WatchedFiles final : public io::FileSystem {
  public:
    explicit WatchedFiles(io::FileSystem& files) : files_(files) {}

    Result<std::unique_ptr<io::File>> open(const std::string& path, io::OpenMode mode) override {
        return files_.open(seen(path), mode);
    }
    Result<void> make_directory(const std::string& path) override {
        return files_.make_directory(seen(path));
    }
    Result<void> rename(const std::string& from, const std::string& to) override {
        return files_.rename(seen(from), seen(to));
    }
    Result<void> remove(const std::string& path) override { return files_.remove(seen(path)); }
    Result<std::vector<io::DirectoryEntry>> list(const std::string& directory) override {
        return files_.list(seen(directory));
    }
    Result<bool> exists(const std::string& path) override { return files_.exists(seen(path)); }
    Result<void> sync_directory(const std::string& directory) override {
        return files_.sync_directory(seen(directory));
    }
    Result<io::FileSystemSpace> space(const std::string& path) override {
        return files_.space(seen(path));
    }
    Result<io::FileSystemType> type(const std::string& path) override {
        return files_.type(seen(path));
    }
    Result<std::unique_ptr<io::FileLock>> lock(const std::string& path) override {
        return files_.lock(seen(path));
    }

    std::set<std::string> paths;

  private:
    const std::string& seen(const std::string& path) {
        paths.insert(path);
        return path;
    }
    io::FileSystem& files_;
};

TEST(Service, NoPathThatAClientNamesIsOpened) {
    io::SimulatedMachine machine(1);
    machine.files().mount(TestPool::kRuntime,
                          {.kind = io::FileSystemKind::kMemory, .name = "tmpfs"});
    WatchedFiles files(*machine.env().files);
    const io::Env env{
        .files = &files, .clock = machine.env().clock, .random = machine.env().random};
    const nova::PoolOptions options = TestPool::small_options();
    must(nova::Pool::create(env, TestPool::kDirectory, options));
    const auto pool = must(nova::Pool::open(env, TestPool::kDirectory, options));
    FakeHost host(*pool);
    ControlService service(
        *pool, {.host = &host, .version = "1", .directory = TestPool::kDirectory, .socket = {}});
    must(pool->create_volume("volume", 1 << 20));
    EXPECT_FALSE(files.paths.empty());

    // Every operation, with a path in every place where a client says something.
    unsigned answered = 0;
    for (const std::string path :
         {"/secret/file", "../../secret/file", "volume/../../secret", "/secret", "..", "volume"}) {
        const Json bodies[] = {
            Json{{"name", path}, {"size_bytes", 4096}},
            Json{{"name", path}},
            Json{{"source", path}, {"names", Json::array({"copy"})}},
            Json{{"source", "volume"}, {"names", Json::array({path})}},
            Json{{"kind", "volume"}, {"names", Json::array({path})}},
            Json{{"link", path}, {"serial", path}},
            Json{{"frontend", path}},
            Json{{"read_only", true}, {"link", path}},
            Json{{"path", path}, {"file", path}, {"socket", path}},
            Json(path),
        };
        for (const RouteInfo& route : ControlService::routes()) {
            std::string target(route.path);
            for (size_t at = target.find('{'); at != std::string::npos; at = target.find('{')) {
                target.replace(at, target.find('}') - at + 1, percent_encode(path));
            }
            for (const std::string& query :
                 {std::string(), "?source=" + percent_encode(path),
                  "?from=" + percent_encode(path) + "&to=" + percent_encode(path)}) {
                for (const Json& body : bodies) {
                    OneExtent content(0, random_bytes(5000, 1), 5000);
                    const Response response =
                        service.handle({std::string(route.method), target + query,
                                        route.upload ? std::string() : to_text(body),
                                        route.upload ? &content : nullptr});
                    answered += response.status < 300 ? 1 : 0;
                }
            }
        }
        if (!pool->find("volume")) {
            must(pool->create_volume("volume", 1 << 20));
        }
    }
    EXPECT_GT(answered, 100U);
    must(pool->close());
    for (const std::string& path : files.paths) {
        EXPECT_TRUE(path == TestPool::kDirectory || path.starts_with("/pool/") || path == "/run" ||
                    path.starts_with("/run/") || path == "/" ||
                    path == "/proc/sys/kernel/random/boot_id")
            << path;
        EXPECT_EQ(path.find("secret"), std::string::npos) << path;
        EXPECT_EQ(path.find(".."), std::string::npos) << path;
    }
}

/// A folder that goes with its contents.
class LocationsTest : public ::testing::Test {
  protected:
    void SetUp() override {
        std::string pattern = "/tmp/stl-loc-XXXXXX";
        ASSERT_NE(mkdtemp(pattern.data()), nullptr);
        base_ = pattern;
    }
    void TearDown() override { std::filesystem::remove_all(base_); }
    static mode_t mode_of(const std::string& path) {
        struct stat status{};
        EXPECT_EQ(stat(path.c_str(), &status), 0) << path;
        return status.st_mode & 07777;
    }
    static ErrorCode refusal(const std::string& path, std::optional<gid_t> group = std::nullopt) {
        const Result<void> checked = check_private_directory(path, group);
        const Result<void> made = make_private_directory(path, group);
        EXPECT_FALSE(checked.has_value()) << path;
        EXPECT_FALSE(made.has_value()) << path;
        EXPECT_EQ(checked ? ErrorCode::kIo : checked.error().code(),
                  made ? ErrorCode::kIo : made.error().code());
        return made ? ErrorCode::kIo : made.error().code();
    }
    std::string base_;
};

TEST_F(LocationsTest, PrivateDirectoriesAreMadeAndWhatIsThereIsLeftAlone) {
    must(check_private_directory(base_ + "/a/b"));
    EXPECT_FALSE(std::filesystem::exists(base_ + "/a"));
    must(make_private_directory(base_ + "/a/b"));
    EXPECT_EQ(mode_of(base_ + "/a"), 0700U);
    EXPECT_EQ(mode_of(base_ + "/a/b"), 0700U);
    must(make_private_directory(base_ + "/g/b", getegid()));
    EXPECT_EQ(mode_of(base_ + "/g"), 0710U);
    EXPECT_EQ(mode_of(base_ + "/g/b"), 0710U);
    must(make_private_directory(base_ + "/g/b", getegid()));
    // Its mode is not for us to change.
    EXPECT_EQ(refusal(base_ + "/a/b", getegid()), ErrorCode::kPermissionDenied);
    EXPECT_EQ(mode_of(base_ + "/a/b"), 0700U);
    ASSERT_EQ(chmod((base_ + "/a/b").c_str(), 0755), 0);
    must(make_private_directory(base_ + "/a/b"));
    EXPECT_EQ(mode_of(base_ + "/a/b"), 0755U);
    for (const char* of_the_system : {"/", "/tmp", "/run/", "/usr/../etc"}) {
        const mode_t before = mode_of(of_the_system);
        EXPECT_EQ(refusal(of_the_system), ErrorCode::kInvalidArgument) << of_the_system;
        EXPECT_EQ(mode_of(of_the_system), before);
    }
}

TEST_F(LocationsTest, DirectoriesThatOthersCouldReplaceAreRefused) {
    // Another user may have made it: anyone may write to it.
    ASSERT_EQ(mkdir((base_ + "/open").c_str(), 0777), 0);
    ASSERT_EQ(chmod((base_ + "/open").c_str(), 0777), 0);
    EXPECT_EQ(refusal(base_ + "/open"), ErrorCode::kPermissionDenied);
    EXPECT_EQ(refusal(base_ + "/open/tag"), ErrorCode::kPermissionDenied);
    EXPECT_EQ(refusal(base_ + "/open/tag/vhost"), ErrorCode::kPermissionDenied);
    EXPECT_FALSE(std::filesystem::exists(base_ + "/open/tag"));
    // Through a link of ours the same, and what is sticky is safe, like /tmp.
    std::filesystem::create_symlink("open", base_ + "/link");
    EXPECT_EQ(refusal(base_ + "/link/tag"), ErrorCode::kPermissionDenied);
    std::filesystem::create_symlink("nobody/../loop", base_ + "/loop");
    must(make_directories(base_ + "/nobody"));
    EXPECT_EQ(refusal(base_ + "/loop/tag"), ErrorCode::kPermissionDenied);
    ASSERT_EQ(chmod((base_ + "/open").c_str(), 01777), 0);
    must(make_private_directory(base_ + "/link/tag"));
    EXPECT_EQ(mode_of(base_ + "/open/tag"), 0700U);
    std::ofstream(base_ + "/file").close();
    EXPECT_EQ(refusal(base_ + "/file"), ErrorCode::kInvalidArgument);
    if (geteuid() == 0) {
        ASSERT_EQ(chown((base_ + "/nobody").c_str(), 65534, 65534), 0);
        EXPECT_EQ(refusal(base_ + "/nobody/tag"), ErrorCode::kPermissionDenied);
        ASSERT_EQ(lchown((base_ + "/link").c_str(), 65534, 65534), 0);
        EXPECT_EQ(refusal(base_ + "/link/tag"), ErrorCode::kPermissionDenied);
    }
}

TEST_F(LocationsTest, RootMakesADirectoryForTheUserThatItWillBe) {
    if (geteuid() != 0) {
        GTEST_SKIP() << "only root can give a directory to somebody";
    }
    constexpr uid_t kUser = 65534;
    const std::string path = base_ + "/on/the/way";
    must(check_private_directory(path, std::nullopt, kUser));
    must(make_private_directory(path, std::nullopt, kUser));
    EXPECT_EQ(mode_of(base_ + "/on"), 0711U);
    EXPECT_EQ(mode_of(path), 0700U);
    struct stat status{};
    ASSERT_EQ(stat((base_ + "/on/the").c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, 0U);
    ASSERT_EQ(stat(path.c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, kUser);
    // Again, and where it is root's.
    must(make_private_directory(path, std::nullopt, kUser));
    EXPECT_EQ(check_private_directory(base_ + "/on/the", std::nullopt, kUser).error().code(),
              ErrorCode::kPermissionDenied);
    // Root makes nothing where that user could have laid a link.
    must(make_private_directory(path + "/deeper", std::nullopt, kUser));
    EXPECT_FALSE(std::filesystem::exists(path + "/deeper"));
    // With a group, which may pass.
    must(make_private_directory(base_ + "/g", gid_t{65534}, kUser));
    ASSERT_EQ(stat((base_ + "/g").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777, 0710U);
    EXPECT_EQ(status.st_gid, 65534U);
    EXPECT_EQ(status.st_uid, kUser);
}

TEST(Locations, APathMeansTheSameHoweverItIsWritten) {
    EXPECT_EQ(real_path("/usr/"), real_path("/usr"));
    EXPECT_EQ(real_path("/usr/./bin/../nothing-here/x"), "/usr/nothing-here/x");
    EXPECT_EQ(real_path("/"), "/");
    EXPECT_EQ(default_runtime_directory("/usr/"), default_runtime_directory("/usr"));
    EXPECT_NE(default_runtime_directory("/usr"), default_runtime_directory("/etc"));
}

}  // namespace
}  // namespace stellarium::control
