#include <array>
#include <condition_variable>
#include <filesystem>
#include <future>
#include <mutex>
#include <thread>

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>

#include "base/bytes.h"
#include "base/rate_limits.h"
#include "control/client.h"
#include "control/locations.h"
#include "control/service.h"
#include "daemon/config.h"
#include "daemon/handlers.h"
#include "daemon/http_server.h"
#include "daemon/limits.h"
#include "daemon/log.h"
#include "daemon/metrics.h"
#include "daemon/vhost_host.h"
#include "frontend/vhost_client/client.h"
#include "frontend/vhost_client/driver_queue.h"
#include "io/posix.h"
#include "nova/testing/test_pool.h"

namespace stellarium::daemon {
namespace {

using control::ControlService;
using control::Json;
using control::SparseExtent;
using nova::testing::must;
using nova::testing::random_bytes;
using nova::testing::TestPool;

class Folder {
  public:
    Folder() {
        // Short: socket paths have little room. In memory where possible: nothing here is kept.
        std::string pattern =
            std::filesystem::is_directory("/dev/shm") ? "/dev/shm/stl-XXXXXX" : "/tmp/stl-XXXXXX";
        path_ = mkdtemp(pattern.data());
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    std::string file(const std::string& name) const { return path_ + "/" + name; }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
};

Json json(const std::string& text) {
    return must(control::parse_json(text, "test"));
}

TEST(Config, TakesEverythingAndTheCommandLineWins) {
    DaemonConfig config;
    EXPECT_EQ(apply_settings(json(R"({
        "store": "/srv/a", "socket": "/run/a.sock", "runtime_dir": "/run/a",
        "metrics_listen": "[::1]:9464", "memory": "1GiB", "writeback_age_ms": 100, "threads": 3,
        "verify": "always", "boot_prefetch": false, "gc": false, "gc_dead_percent": 40, "gc_min_dead": "1GiB",
        "gc_rate": 0, "low_space_percent": 5, "allow_unsafe_file_system": true, "log_level": "debug",
        "log_format": "json", "sandbox": "require", "user": "somebody"})"),
                             config),
              std::vector<std::string>{});
    EXPECT_EQ(apply_settings(json(R"({"memory": 67108864})"), config), std::vector<std::string>{});
    EXPECT_EQ(config.store, "/srv/a");
    EXPECT_EQ(config.metrics_listen, "[::1]:9464");
    EXPECT_EQ(config.memory_bytes, 64 * kMiB);
    EXPECT_EQ(config.dirty_budget_bytes() + config.node_cache_bytes(), 64 * kMiB);
    EXPECT_EQ(config.writeback_age_ms, 100U);
    EXPECT_EQ(config.threads, 3U);
    EXPECT_TRUE(config.verify_always && config.allow_unsafe_file_system);
    EXPECT_FALSE(config.boot_prefetch);
    EXPECT_FALSE(config.gc.automatic);
    EXPECT_EQ(config.gc.dead_share, 0.4);
    EXPECT_EQ(config.gc.min_dead_bytes, kGiB);
    EXPECT_EQ(config.gc.rate_bytes_per_second, 0U);
    EXPECT_EQ(config.gc.low_space_share, 0.05);
    EXPECT_EQ(config.log_level, LogLevel::kDebug);
    EXPECT_EQ(config.log_format, LogFormat::kJson);
    EXPECT_EQ(config.sandbox, SandboxMode::kRequire);
    EXPECT_EQ(config.user, "somebody");
    config.user.clear();
    EXPECT_EQ(finish_config(config), std::vector<std::string>{});
    EXPECT_EQ(config.socket, "/run/a.sock");
}

TEST(Config, ReportsEveryFault) {
    DaemonConfig config;
    const auto complaints = apply_settings(
        json(R"({"memory": 1, "threads": 1000, "verify": "never", "log_format": "xml",
                 "store": "", "metrics_listen": "9464", "nonsense": 1,
                 "gc": 1, "gc_dead_percent": 0, "gc_min_dead": "much", "gc_rate": -1,
                 "low_space_percent": 100, "sandbox": "on"})"),
        config);
    EXPECT_EQ(complaints.size(), 13U);
    config = {};
    config.store = "/srv/a";
    config.runtime_directory = "/run/" + std::string(100, 'x');
    config.socket_group = "no-such-group-here";
    config.user = "no-such-user-here";
    EXPECT_EQ(finish_config(config).size(), 4U);
    for (const char* of_the_system : {"/", "/usr/../etc"}) {
        config = {};
        config.store = "/srv/a";
        config.runtime_directory = of_the_system;
        EXPECT_EQ(finish_config(config).size(), 1U) << of_the_system;
    }
    EXPECT_FALSE(apply_settings(json("[]"), config).empty());
    EXPECT_EQ(apply_settings(json(R"({"gc_rate": "1KiB"})"), config).size(), 1U);
    EXPECT_EQ(apply_settings(json(R"({"gc_rate": "1MiB"})"), config).size(), 0U);
    EXPECT_EQ(apply_settings(json(R"({"metrics_listen": "nosuchhost:1"})"), config).size(), 1U);
}

TEST(HostPort, IsTakenApart) {
    EXPECT_EQ(*parse_host_port("127.0.0.1:80"),
              (std::pair<std::string, uint16_t>("127.0.0.1", 80)));
    EXPECT_EQ(*parse_host_port("[::1]:0"), (std::pair<std::string, uint16_t>("::1", 0)));
    EXPECT_EQ(*parse_host_port("localhost:1"), (std::pair<std::string, uint16_t>("127.0.0.1", 1)));
    for (const char* wrong : {"", "80", ":80", "host:", "host:x", "host:65536", "::1:80", "[]:1",
                              "nosuchhost:1", "300.1.1.1:80"}) {
        EXPECT_FALSE(parse_host_port(wrong)) << wrong;
    }
}

TEST(LogEvent, NoValueCanForgeALine) {
    EXPECT_EQ(
        format_event(LogFormat::kText, "attached",
                     {{"a", "plain"}, {"b", "two words"}, {"c", "x\nlevel=error"}, {"d", ""}}),
        R"(event=attached a=plain b="two words" c="x\nlevel=error" d="")");
    const std::string line =
        "{" +
        format_event(LogFormat::kJson, "x\"", {{"k", "v\",\"level\":\"error"}, {"b", "\xff"}}) +
        "}";
    const Json parsed = json(line);
    EXPECT_EQ(parsed.size(), 3U);
    EXPECT_EQ(parsed.at("k"), "v\",\"level\":\"error");
}

// --- HTTP ----------------------------------------------------------------------------------------

/// A few extents, made when they are asked for.
class Extents final : public control::SparseSource {
  public:
    explicit Extents(uint64_t count) : count_(count) {}
    std::optional<uint64_t> size_hint() const override { return size_bytes(); }
    uint64_t size_bytes() const override { return count_ * kStep; }
    Result<std::optional<SparseExtent>> next() override {
        if (before_next) {
            before_next(at_);
        }
        if (at_ == count_) {
            return std::nullopt;
        }
        data_ = random_bytes(kLength, at_ + 1);
        return SparseExtent{at_++ * kStep, data_};
    }
    std::function<void(uint64_t)> before_next;
    static constexpr uint64_t kStep = 3 << 20;
    static constexpr uint64_t kLength = 700'001;

  private:
    uint64_t count_;
    uint64_t at_ = 0;
    std::vector<std::byte> data_;
};

class HttpTest : public testing::Test {
  protected:
    HttpTest() { must(server_->listen_unix(socket_, {}, service_)); }

    std::unique_ptr<control::ControlClient> connect() {
        return must(control::connect_unix(socket_));
    }

    Folder folder_;
    std::string socket_ = folder_.file("c.sock");
    TestPool pool_;
    ControlService service_{*pool_,
                            {.host = nullptr, .version = "1", .directory = "/pool", .socket = {}}};
    std::unique_ptr<HttpServer> server_ = std::make_unique<HttpServer>(HttpServerOptions{});
};

TEST_F(HttpTest, TheSocketIsPrivateAndGoesWithTheServer) {
    struct stat status{};
    ASSERT_EQ(stat(socket_.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0600U);
    HttpServer second({});
    const auto taken = second.listen_unix(socket_, {}, service_);
    ASSERT_FALSE(taken);
    EXPECT_EQ(taken.error().code(), ErrorCode::kBusy);
    server_->stop();
    EXPECT_NE(stat(socket_.c_str(), &status), 0);
    const auto gone = control::connect_unix(socket_);
    ASSERT_FALSE(gone);
    EXPECT_EQ(gone.error().code(), ErrorCode::kUnavailable);
}

TEST_F(HttpTest, EveryConnectionIsAskedWhoIsThere) {
    const std::array<uid_t, 1> trusted = {geteuid()};
    const auto client = must(control::connect_unix(socket_, trusted));
    must(client->call("GET", "/v1/images"));
    const std::array<uid_t, 1> other = {geteuid() + 1};
    const auto refused = control::connect_unix(socket_, other);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kPermissionDenied);
    if (geteuid() != 0) {
        return;
    }
    // Somebody else takes the place of the server; a socket tells who made it listen.
    server_->stop();
    ASSERT_EQ(chmod(folder_.path().c_str(), 0777), 0);
    ASSERT_EQ(seteuid(65534), 0);
    HttpServer impostor({});
    const auto listening = impostor.listen_unix(socket_, {}, service_);
    ASSERT_EQ(seteuid(0), 0);
    must(listening);
    const auto answer = client->call("GET", "/v1/images");
    ASSERT_FALSE(answer);
    EXPECT_EQ(answer.error().code(), ErrorCode::kPermissionDenied) << answer.error().message();
}

TEST_F(HttpTest, ContentGoesInAndComesOut) {
    const auto client = connect();
    Extents content(9);
    const Json image = must(client->upload("/v1/images/x", content));
    EXPECT_EQ(image.at("import").at("bytes"), 9 * Extents::kLength);
    const auto exported = must(client->download("/v1/content?source=x"));
    std::vector<std::byte> whole(9 * Extents::kStep);
    while (const auto extent = must(exported->next())) {
        std::ranges::copy(extent->data,
                          whole.begin() + static_cast<std::ptrdiff_t>(extent->offset_bytes));
    }
    EXPECT_EQ(exported->size_bytes(), whole.size());
    for (uint64_t i = 0; i < 9; ++i) {
        const auto expected = random_bytes(Extents::kLength, i + 1);
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(),
                               whole.begin() + static_cast<std::ptrdiff_t>(i * Extents::kStep)));
    }
}

TEST_F(HttpTest, ATakenNameIsToldBeforeContentIsAskedFor) {
    const auto client = connect();
    Extents content(1);
    must(client->upload("/v1/images/x", content));
    Extents again(1);
    bool asked = false;
    again.before_next = [&](uint64_t) { asked = true; };
    const auto refused = client->upload("/v1/images/x", again);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kAlreadyExists);
    EXPECT_FALSE(asked);
}

TEST_F(HttpTest, AnErrorInTheMiddleOfAnUploadIsTheAnswer) {
    const auto client = connect();
    Extents content(50);
    content.before_next = [&](uint64_t at) {
        if (at == 10) {
            pool_.machine().files().set_space_limit(1);
        }
    };
    const auto failed = client->upload("/v1/images/x", content);
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().code(), ErrorCode::kNoSpace) << failed.error().message();
    EXPECT_EQ(must(client->call("GET", "/v1/imports")).size(), 0U);
}

TEST_F(HttpTest, AnswersMayBeLarge) {
    const auto client = connect();
    Json names = Json::array();
    for (int i = 0; i < 20'000; ++i) {
        names.push_back("a-rather-long-name-for-a-volume-" + std::to_string(i));
    }
    must(client->call("POST", "/v1/volumes", Json{{"name", "v"}, {"size_bytes", 4096}}));
    must(client->call("POST", "/v1/clones", Json{{"source", "v"}, {"names", names}}));
    EXPECT_EQ(must(client->call("GET", "/v1/volumes")).size(), 20'001U);
}

TEST_F(HttpTest, StoppingEndsUploadsAndDownloads) {
    Extents content(30);
    must(connect()->upload("/v1/images/x", content));
    const auto client = connect();
    const auto exported = must(client->download("/v1/content?source=x"));
    must(exported->next());

    Extents slow(1000);
    std::promise<void> uploading;
    std::promise<void> stopped;
    slow.before_next = [&, told = false](uint64_t at) mutable {
        if (at == 2 && !told) {
            told = true;
            uploading.set_value();
            stopped.get_future().wait();
        }
    };
    auto upload =
        std::async(std::launch::async, [&] { return connect()->upload("/v1/images/slow", slow); });
    uploading.get_future().wait();
    server_->stop();
    stopped.set_value();
    const Result<Json> result = upload.get();
    ASSERT_FALSE(result);
    EXPECT_TRUE(result.error().code() == ErrorCode::kCancelled ||
                result.error().code() == ErrorCode::kUnavailable)
        << result.error().message();
    Result<std::optional<SparseExtent>> rest = exported->next();
    while (rest && *rest) {
        rest = exported->next();
    }
    EXPECT_FALSE(rest) << "a download that was broken off must not look complete";
    EXPECT_FALSE(pool_->find("slow"));
}

/// Holds requests until it is told to go on.
class GateHandler final : public control::RequestHandler {
  public:
    bool wants_upload(const std::string&, const std::string&) const override { return false; }
    control::Response handle(const control::Request&) override {
        entered_.set_value();
        gate_.get_future().wait();
        control::Response response;
        response.body = "{}";
        return response;
    }
    std::promise<void> entered_;
    std::promise<void> gate_;
};

TEST(Http, ARunningRequestIsAnsweredBeforeTheServerStops) {
    const Folder folder;
    GateHandler handler;
    HttpServer server({});
    must(server.listen_unix(folder.file("c.sock"), {}, handler));
    auto answer = std::async(std::launch::async, [&] {
        return must(control::connect_unix(folder.file("c.sock")))->call("GET", "/v1/x");
    });
    handler.entered_.get_future().wait();
    std::thread stopper([&] { server.stop(); });
    handler.gate_.set_value();
    EXPECT_TRUE(answer.get());
    stopper.join();
}

/// Fails as a library may.
class ThrowingHandler final : public control::RequestHandler {
  public:
    bool wants_upload(const std::string&, const std::string&) const override { return false; }
    control::Response handle(const control::Request& request) override {
        if (request.target == "/v1/memory") {
            throw std::bad_alloc();
        }
        throw std::runtime_error("what a library says");
    }
};

TEST(Http, ARequestThatThrowsIsAnsweredWithAnError) {
    const Folder folder;
    ThrowingHandler handler;
    HttpServer server({});
    must(server.listen_unix(folder.file("c.sock"), {}, handler));
    const auto client = must(control::connect_unix(folder.file("c.sock")));
    const auto memory = client->call("GET", "/v1/memory");
    ASSERT_FALSE(memory);
    EXPECT_EQ(memory.error().code(), ErrorCode::kLimitExceeded);
    const auto other = client->call("GET", "/v1/x");
    ASSERT_FALSE(other);
    EXPECT_NE(other.error().message().find("what a library says"), std::string::npos);
}

int connect_tcp(uint16_t port) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    return fd;
}

TEST_F(HttpTest, IdleConnectionsLockOutNobody) {
    const std::string path = folder_.file("few.sock");
    HttpServerOptions options;
    options.max_connections = 3;
    options.max_tcp_connections = 2;
    HttpServer server(options);
    must(server.listen_unix(path, {}, service_));
    const uint16_t port = must(server.listen_tcp("127.0.0.1:0", service_));
    std::vector<int> held;
    for (int i = 0; i < 12; ++i) {
        held.push_back(connect_tcp(port));
    }
    must(must(control::connect_unix(path))->call("GET", "/v1/images"));
    for (int i = 0; i < 12; ++i) {
        held.push_back(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        path.copy(static_cast<char*>(address.sun_path), sizeof address.sun_path - 1);
        ASSERT_EQ(::connect(held.back(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    }
    must(must(control::connect_unix(path))->call("GET", "/v1/images"));
    const int scraper = connect_tcp(port);
    const std::string ask = "GET /v1/images HTTP/1.1\r\nHost: x\r\n\r\n";
    ASSERT_EQ(send(scraper, ask.data(), ask.size(), 0), static_cast<ssize_t>(ask.size()));
    std::array<char, 15> answer{};
    EXPECT_EQ(recv(scraper, answer.data(), answer.size(), MSG_WAITALL), 15);
    EXPECT_EQ(std::string(answer.data(), answer.size()), "HTTP/1.1 200 OK");
    close(scraper);
    for (const int fd : held) {
        close(fd);
    }
}

TEST_F(HttpTest, StalledExportsEndAndNoUserTakesAll) {
    Extents content(30);
    must(connect()->upload("/v1/images/x", content));
    const std::string path = folder_.file("few.sock");
    const auto download = [&path](control::ControlClient& client) {
        return client.download("/v1/content?source=x");
    };
    {
        HttpServerOptions options;
        options.max_streams = 2;
        options.max_streams_per_user = 2;
        options.stall_timeout = std::chrono::milliseconds(50);
        HttpServer server(options);
        must(server.listen_unix(path, {}, service_));
        // Nobody reads these.
        const auto one = must(control::connect_unix(path));
        const auto first = must(download(*one));
        const auto two = must(control::connect_unix(path));
        const auto second = must(download(*two));
        const auto three = must(control::connect_unix(path));
        while (true) {
            const auto third = download(*three);
            if (third) {
                break;
            }
            ASSERT_EQ(third.error().code(), ErrorCode::kBusy) << third.error().message();
        }
        // One of the two was broken off, and does not look complete. The other may still be read.
        const auto ends_well = [](control::SparseSource& stream) {
            Result<std::optional<SparseExtent>> rest = stream.next();
            while (rest && *rest) {
                rest = stream.next();
            }
            return rest.has_value();
        };
        const bool one_ends_well = ends_well(*first);
        const bool two_ends_well = ends_well(*second);
        EXPECT_FALSE(one_ends_well && two_ends_well);
    }
    HttpServerOptions options;
    options.max_streams_per_user = 1;
    HttpServer server(options);
    must(server.listen_unix(path, {}, service_));
    const auto one = must(control::connect_unix(path));
    const auto first = must(download(*one));
    const auto two = must(control::connect_unix(path));
    const auto refused = download(*two);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kBusy);
}

TEST_F(HttpTest, BodiesAreBoundedByWhatTheyAreFor) {
    const auto client = connect();
    const Json long_name{{"name", std::string(2 * kMiB, 'x')}, {"size_bytes", 4096}};
    const auto refused = client->call("POST", "/v1/volumes", long_name);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kLimitExceeded) << refused.error().message();
    // A list may be that long.
    const auto clones = client->call(
        "POST", "/v1/clones",
        Json{{"source", "nothing"},
             {"names", std::vector<std::string>(
                           30'000, long_name.at("name").get<std::string>().substr(0, 100))}});
    ASSERT_FALSE(clones);
    EXPECT_NE(clones.error().code(), ErrorCode::kLimitExceeded) << clones.error().message();
}

/// Says what it would send, and sends nothing of it. The answer's first line, if one comes at once.
int announce_body(const std::string& path, const std::string& size_header) {
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(static_cast<char*>(address.sun_path), sizeof address.sun_path - 1);
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    const std::string header = "POST /v1/clones HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" +
                               size_header + "\r\n\r\n";
    EXPECT_EQ(send(fd, header.data(), header.size(), 0), static_cast<ssize_t>(header.size()));
    return fd;
}
std::string status_of(int fd) {
    std::array<char, 12> answer{};
    const ssize_t got = recv(fd, answer.data(), answer.size(), MSG_WAITALL);
    return {answer.data(), static_cast<size_t>(std::max<ssize_t>(got, 0))};
}

TEST_F(HttpTest, BodiesThatAreHeldAtOnceAreBounded) {
    const std::string path = folder_.file("few.sock");
    HttpServerOptions options;
    options.max_held_bytes = 3 * kMiB;
    HttpServer server(options);
    must(server.listen_unix(path, {}, service_));
    const int first = announce_body(path, "Content-Length: 2000000");
    EXPECT_EQ(status_of(first), "HTTP/1.1 100");
    for (const char* size : {"Content-Length: 2000000", "Transfer-Encoding: chunked"}) {
        const int more = announce_body(path, size);
        EXPECT_EQ(status_of(more), "HTTP/1.1 409") << size;
        close(more);
    }
    // Others are served meanwhile.
    must(must(control::connect_unix(path))->call("GET", "/v1/images"));
    const int fits = announce_body(path, "Content-Length: 500000");
    EXPECT_EQ(status_of(fits), "HTTP/1.1 100");
    close(fits);
    close(first);
    // What was held is given back, some time after the connections are gone; and one alone may be
    // longer than the bound.
    while (true) {
        const int alone = announce_body(path, "Content-Length: 10000000");
        const std::string status = status_of(alone);
        close(alone);
        if (status == "HTTP/1.1 100") {
            break;
        }
        ASSERT_EQ(status, "HTTP/1.1 409");
    }
}

TEST(Http, AFileThatIsNoSocketStays) {
    const Folder folder;
    TestPool pool;
    ControlService service(*pool, {.host = nullptr, .version = {}, .directory = {}, .socket = {}});
    HttpServer server({});
    {
        must(io::real_env().files->open(folder.file("c.sock"), io::OpenMode::kCreateNew));
    }
    const auto refused = server.listen_unix(folder.file("c.sock"), {}, service);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kAlreadyExists);
}

// --- Attachments ---------------------------------------------------------------------------------

/// A pool on the real system and a host that serves it.
class HostTest : public testing::Test {
  protected:
    HostTest() {
        options_.runtime_directory = folder_.path();
        options_.dirty_budget_bytes = 16 * kMiB;
        must(nova::Pool::create(env_, store_, options_));
        open();
    }

    void open() {
        pool_ = must(nova::Pool::open(env_, store_, options_));
        host_ = std::make_unique<VhostHost>(
            *pool_,
            VhostHostOptions{
                .runtime_directory = folder_.path(), .socket_gid = {}, .data_threads = 1},
            log_);
        must(host_->start());
    }
    void close() {
        host_->stop();
        host_.reset();
        must(pool_->close());
        pool_.reset();
    }

    Folder folder_;
    std::string store_ = folder_.file("store");
    Log log_{LogLevel::kError, LogFormat::kText};
    io::Env env_ = io::real_env();
    nova::PoolOptions options_;
    std::unique_ptr<nova::Pool> pool_;
    std::unique_ptr<VhostHost> host_;
};

control::AttachmentOptions serial(std::string text) {
    control::AttachmentOptions options;
    options.serial = std::move(text);
    return options;
}

/// A guest with one queue.
class Guest {
  public:
    explicit Guest(const std::string& socket)
        : client_(must(vhost::Client::connect(socket))),
          ram_(must(vhost::GuestRam::create(8 * kMiB))),
          queue_(*ram_, 64, /*event_index=*/true, /*indirect=*/true),
          driver_(*ram_, queue_) {
        must(client_->negotiate(vhost::kUsualFeatures, vhost::kUsualProtocolFeatures));
        must(client_->share(*ram_));
        must(client_->start_queue(0, queue_, 0));
    }
    void write(uint64_t offset, Bytes data) { EXPECT_EQ(must(driver_.write(offset, data)), 0); }
    std::vector<std::byte> read(uint64_t offset, size_t size) {
        std::vector<std::byte> data(size);
        EXPECT_EQ(must(driver_.read(offset, data)), 0);
        return data;
    }
    void flush() { EXPECT_EQ(must(driver_.flush()), 0); }
    std::string id() { return must(driver_.get_id()); }
    bool closed() { return client_->wait_closed(); }

  private:
    std::unique_ptr<vhost::Client> client_;
    std::unique_ptr<vhost::GuestRam> ram_;
    vhost::DriverQueue queue_;
    vhost::BlkDriver driver_;
};

TEST_F(HostTest, AVolumeOf64TiBIsWrittenAndReadAtBothEnds) {
    constexpr uint64_t kSize = 64 * kTiB;
    must(pool_->create_volume("huge", kSize));
    const auto status = must(host_->attach("huge", serial("S-1")));
    EXPECT_EQ(status.state, control::AttachmentState::kListening);
    const auto first = random_bytes(64 * kKiB, 1);
    const auto last = random_bytes(64 * kKiB, 2);
    {
        Guest guest(status.socket);
        EXPECT_EQ(guest.id().substr(0, 3), "S-1");
        guest.write(0, first);
        guest.write(kSize - last.size(), last);
        guest.flush();
        EXPECT_EQ(guest.read(0, first.size()), first);
        EXPECT_EQ(guest.read(kSize - last.size(), last.size()), last);
        EXPECT_EQ(guest.read(kSize / 2, 4096), std::vector<std::byte>(4096));
        EXPECT_EQ(host_->attachments().at(0).state, control::AttachmentState::kConnected);
    }
    must(host_->detach("huge"));
    close();
    open();
    const auto reader = must(pool_->open_reader("huge"));
    EXPECT_EQ(reader->size_bytes(), kSize);
    std::vector<std::byte> data(last.size());
    must(reader->read(kSize - last.size(), data));
    EXPECT_EQ(data, last);
    must(reader->read(0, data));
    EXPECT_EQ(data, first);
}

TEST_F(HostTest, AttachmentsComeBackAndSocketsKeepTheirNames) {
    must(pool_->create_volume("a", kMiB));
    must(pool_->create_volume("b", kMiB));
    control::AttachmentOptions two_queues;
    two_queues.queues = 2;
    two_queues.link = "/somewhere/a.sock";
    control::AttachmentOptions read_only;
    read_only.read_only = true;
    const auto a = must(host_->attach("a", two_queues));
    must(host_->attach("b", read_only));
    const auto data = random_bytes(4096, 3);
    {
        Guest guest(a.socket);
        guest.write(8192, data);
        // Not flushed: a clean stop makes it durable.
        std::thread stopper([&] { close(); });
        EXPECT_TRUE(guest.closed());
        stopper.join();
    }
    open();
    const auto back = host_->attachments();
    ASSERT_EQ(back.size(), 2U);
    EXPECT_EQ(back[0].source, "a");
    EXPECT_EQ(back[0].socket, a.socket);
    EXPECT_EQ(back[0].options.queues, 2U);
    EXPECT_EQ(back[0].options.link, "/somewhere/a.sock");
    EXPECT_TRUE(back[1].options.read_only);
    EXPECT_EQ(Guest(a.socket).read(8192, 4096), data);
}

TEST_F(HostTest, LimitsAreChangedUnderAGuestAndOutliveTheDaemon) {
    must(pool_->create_volume("a", kMiB));
    control::AttachmentOptions options;
    options.queues = 2;
    options.limits = must(completed({.iops = 1'000'000, .bandwidth_bytes = kTiB}));
    const auto attached = must(host_->attach("a", options));
    const auto served = [&] { return host_->device_status().at(0).limits; };
    EXPECT_EQ(served(), options.limits);
    const RateLimits changed = must(completed({.iops = 2, .iops_burst = 7200}));
    {
        Guest guest(attached.socket);
        guest.write(0, random_bytes(4096, 1));
        const auto status = must(host_->set_limits("a", changed));
        EXPECT_EQ(status.state, control::AttachmentState::kConnected);
        EXPECT_EQ(status.options.limits, changed);
        EXPECT_EQ(status.options.queues, 2U);
        EXPECT_EQ(served(), changed);
        EXPECT_EQ(host_->attachments().at(0).options.limits, changed);
        guest.write(0, random_bytes(4096, 2));
    }
    close();
    open();
    EXPECT_EQ(host_->attachments().at(0).options.limits, changed);
    EXPECT_EQ(host_->attachments().at(0).options.queues, 2U);
    EXPECT_EQ(served(), changed);
    EXPECT_EQ(must(host_->set_limits("a", {})).options.limits, RateLimits{});
    EXPECT_FALSE(served().any());
    close();
    open();
    EXPECT_FALSE(served().any());
    must(pool_->create_volume("b", kMiB));
    EXPECT_EQ(host_->set_limits("b", changed).error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(host_->set_limits("c", changed).error().code(), ErrorCode::kNotFound);
    must(host_->detach("a"));
    EXPECT_EQ(host_->set_limits("a", changed).error().code(), ErrorCode::kNotFound);
}

TEST_F(HostTest, ARecordThatCannotBeReadIsNotOverwrittenByLimits) {
    must(pool_->create_volume("a", kMiB));
    must(host_->attach("a", {}));
    close();
    const Bytes newer = bytes_of(std::string_view(R"({"version":2,"queues":4})"));
    const nova::Pool::AttachmentRecord record{
        .source = "a", .label = "of a newer program", .options = {newer.begin(), newer.end()}};
    pool_ = must(nova::Pool::open(env_, store_, options_));
    must(pool_->set_attachment("a", record));
    must(pool_->close());
    testing::internal::CaptureStderr();
    open();
    EXPECT_NE(testing::internal::GetCapturedStderr().find("not restored"), std::string::npos);
    EXPECT_EQ(host_->set_limits("a", must(completed({.iops = 5}))).error().code(),
              ErrorCode::kUnsupported);
    EXPECT_EQ(pool_->attachments().at(0).options, record.options);
}

TEST_F(HostTest, ASecondAttachAndAnUnknownDetachAreRefused) {
    must(pool_->create_volume("a", kMiB));
    must(host_->attach("a", {}));
    EXPECT_EQ(host_->attach("a", {}).error().code(), ErrorCode::kBusy);
    EXPECT_EQ(host_->detach("b").error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(host_->attach("b", {}).error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(pool_->remove({"a"}).error().code(), ErrorCode::kBusy);
    must(host_->detach("a"));
    EXPECT_EQ(host_->detach("a").error().code(), ErrorCode::kNotFound);
    must(pool_->remove({"a"}));
    EXPECT_TRUE(host_->attachments().empty());
}

TEST_F(HostTest, AttachmentsAndGuestsBeyondTheDescriptorsAreRefused) {
    for (const char* name : {"a", "b", "c", "d"}) {
        must(pool_->create_volume(name, kMiB));
    }
    host_->stop();
    host_ =
        std::make_unique<VhostHost>(*pool_,
                                    VhostHostOptions{.runtime_directory = folder_.path(),
                                                     .socket_gid = {},
                                                     .data_threads = 1,
                                                     .descriptors = std::make_shared<Budget>(3)},
                                    log_);
    must(host_->start());
    const std::string socket = must(host_->attach("a", {})).socket;
    must(host_->attach("b", {}));
    const auto status_of_a = [&] { return host_->device_status()[0]; };
    {
        // The third one is the connection's; there is none for a queue.
        const auto client = must(vhost::Client::connect(socket));
        const auto ram = must(vhost::GuestRam::create(8 * kMiB));
        vhost::DriverQueue queue(*ram, 128, false, false);
        must(client->negotiate(vhost::kUsualFeatures, vhost::kUsualProtocolFeatures));
        must(client->share(*ram));
        EXPECT_EQ(host_->attach("c", {}).error().code(), ErrorCode::kLimitExceeded);
        std::ignore = client->start_queue(0, queue, 0);  // Need not wait for the answer.
        while (status_of_a().forced_disconnects == 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    EXPECT_NE(status_of_a().last_fault.find("LimitNOFILE"), std::string::npos)
        << status_of_a().last_fault;
    // What the guest held is free again.
    must(host_->attach("c", {}));
    const auto refused = host_->attach("d", {});
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kLimitExceeded);
    EXPECT_NE(refused.error().message().find("LimitNOFILE"), std::string::npos);
    must(host_->detach("a"));
    must(host_->attach("d", {}));
}

TEST_F(HostTest, AnAttachmentThatCannotBeRestoredIsKeptAndReported) {
    must(pool_->create_volume("a", kMiB));
    const auto attached = must(host_->attach("a", {}));
    close();
    // Somebody put a folder where the socket was.
    std::filesystem::create_directory(attached.socket);
    testing::internal::CaptureStderr();
    open();
    EXPECT_NE(testing::internal::GetCapturedStderr().find("attachment not restored"),
              std::string::npos);
    const auto failed = host_->attachments();
    ASSERT_EQ(failed.size(), 1U);
    EXPECT_EQ(failed[0].state, control::AttachmentState::kFailed);
    EXPECT_NE(failed[0].detail, "");
    must(host_->detach("a"));
    EXPECT_TRUE(pool_->attachments().empty());
    std::filesystem::remove(attached.socket);
    must(host_->attach("a", {}));
}

TEST_F(HostTest, AttachmentsOfManyThreadsDoNotMix) {
    constexpr int kVolumes = 8;
    for (int i = 0; i < kVolumes; ++i) {
        must(pool_->create_volume("v-" + std::to_string(i), kMiB));
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < kVolumes; ++i) {
        threads.emplace_back([this, i] {
            const std::string name = "v-" + std::to_string(i);
            for (int round = 0; round < 5; ++round) {
                const auto status = must(host_->attach(name, {}));
                const auto data = random_bytes(4096, static_cast<uint64_t>(i * 100 + round));
                Guest guest(status.socket);
                guest.write(0, data);
                EXPECT_EQ(guest.read(0, 4096), data);
                must(host_->detach(name));
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_TRUE(host_->attachments().empty());
}

TEST_F(HostTest, MetricsNameEachDevice) {
    must(pool_->create_volume("web", kMiB));
    const auto attached = must(host_->attach("web", {}));
    Guest guest(attached.socket);
    guest.write(0, random_bytes(8192, 5));
    guest.flush();
    boot::Boot boot(*pool_, *io::real_env().clock, {});
    Log log(LogLevel::kError, LogFormat::kText);
    const MountHost files(*pool_, {}, log);
    Metrics metrics(*pool_, *host_, boot, files, nullptr, "1.2.3");
    metrics.observe_request("GET", 200, 0.01);
    metrics.observe_request("BREW\"\n", 400, 0.01);
    const std::string page = metrics.text();
    for (const char* line :
         {"stellarium_build_info{version=\"1.2.3\"} 1\n", "stellarium_volumes 1\n",
          "stellarium_device_connected{volume=\"web\"} 1\n",
          "stellarium_device_throttled_requests_total{volume=\"web\"} 0\n",
          "stellarium_prefetches_total 0\n", "stellarium_boot_recordings 0\n",
          "stellarium_files_mounted 0\n",
          "stellarium_device_throttled_seconds_total{volume=\"web\"} 0\n",
          "stellarium_device_bytes_total{volume=\"web\",request=\"write\"} 8192\n",
          "stellarium_device_request_seconds_count{volume=\"web\",request=\"flush\"} 1\n",
          "stellarium_control_request_seconds_count{method=\"other\",status=\"400\"} 1\n"}) {
        EXPECT_NE(page.find(line), std::string::npos) << line << page;
    }
    MetricsHandler handler(metrics);
    EXPECT_EQ(handler.handle({"GET", "/metrics", "", nullptr}).status, 200);
    EXPECT_EQ(handler.handle({"GET", "/v1/volumes", "", nullptr}).status, 404);
    EXPECT_EQ(handler.handle({"POST", "/metrics", "", nullptr}).status, 405);
}

}  // namespace
}  // namespace stellarium::daemon
