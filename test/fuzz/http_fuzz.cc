// The HTTP layer of the control socket: any bytes, in any pieces, to the real server with a real
// service. It answers with responses and ends the connection, and the next client is served.
//
// Input: pieces, each of a length and its bytes.
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/service.h"
#include "daemon/http_server.h"
#include "test/fuzz/fuzz.h"
#include "test/fuzz/fuzz_pool.h"

namespace stellarium::fuzz {
namespace {

constexpr int kPatienceMs = 60'000;
constexpr size_t kMaxAnswerBytes = 8 << 20;

class Bench {
  public:
    Bench()
        : service_(copy_.pool(),
                   {.host = nullptr, .version = "0", .directory = "/pool", .socket = {}}),
          server_({.workers = 1, .max_streams = 2}) {
        std::string name = (std::filesystem::temp_directory_path() / "http-fuzz-XXXXXX").string();
        require(::mkdtemp(name.data()) != nullptr, "a temporary folder");
        folder_ = name;
        must(server_.listen_unix(path(), {}, service_));
    }
    ~Bench() {
        server_.stop();
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    /// Sends the pieces, then says that nothing follows; the answer, to the end of the connection.
    std::string exchange(const std::vector<std::string_view>& pieces) const {
        const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        const std::string at = path();
        std::memcpy(address.sun_path, at.c_str(), at.size() + 1);
        require(fd >= 0 && ::connect(fd, reinterpret_cast<const sockaddr*>(&address),
                                     sizeof(address)) == 0,
                "the server is listening");
        for (const std::string_view piece : pieces) {
            if (::send(fd, piece.data(), piece.size(), MSG_NOSIGNAL) < 0) {
                break;  // It has had enough.
            }
        }
        ::shutdown(fd, SHUT_WR);
        std::string answer;
        std::string buffer(65'536, '\0');
        while (answer.size() < kMaxAnswerBytes) {
            pollfd wait{.fd = fd, .events = POLLIN, .revents = 0};
            require(::poll(&wait, 1, kPatienceMs) == 1,
                    "the server answers a client that has said everything, or ends the connection");
            const ssize_t got = ::recv(fd, buffer.data(), buffer.size(), 0);
            if (got <= 0) {
                break;
            }
            answer.append(buffer, 0, static_cast<size_t>(got));
        }
        ::close(fd);
        return answer;
    }

  private:
    std::string path() const { return (folder_ / "control.sock").string(); }

    PoolCopy copy_;
    control::ControlService service_;
    daemon::HttpServer server_;
    std::filesystem::path folder_;
};

Bench& bench() {
    static std::unique_ptr<Bench> current;
    static unsigned used = 0;
    if (!current || ++used % 200 == 0) {  // What was imported and cloned goes.
        current.reset();
        current = std::make_unique<Bench>();
    }
    return *current;
}

Input seed(std::string_view text) {
    Input input;
    while (!text.empty()) {
        const std::string_view piece = text.substr(0, 200);
        append_byte(input, static_cast<unsigned>(piece.size()));
        append(input, bytes_of(piece));
        text.remove_prefix(piece.size());
    }
    return input;
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    for (const std::string_view text :
         {"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n",
          "GET /v1/volumes HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/stats HTTP/1.1\r\nHost: x\r\n\r\n",
          "HEAD /v1/content?source=a HTTP/1.1\r\nHost: x\r\n\r\n",
          "GET /v1/content?source=image HTTP/1.1\r\nHost: x\r\n\r\n",
          "POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 32\r\n\r\n"
          R"({"name":"c","size_bytes":"1MiB"})",
          "POST /v1/volumes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
          "5\r\n{\"nam\r\n4;x=y\r\ne\":1\r\n0\r\n\r\n",
          "POST /v1/clones HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: "
          "2\r\n\r\n{}",
          "PUT /v1/images/new HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
          "10\r\nSLSPSTRM\x01\0\0\0\0\0\0\0\r\n0\r\n\r\n",
          "PUT /v1/images/new HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\nSLSPSTRM",
          "GET /v1/images/%00 HTTP/1.0\r\n\r\n", "DELETE /v1/volumes/b HTTP/1.1\r\n\r\n",
          "\x16\x03\x01 no HTTP at all"}) {
        out.push_back(seed(text));
    }
    out.push_back(seed("GET /" + std::string(20'000, 'a') + " HTTP/1.1\r\n\r\n"));
    out.push_back(seed("GET / HTTP/1.1\r\nA: " + std::string(20'000, 'a')));
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace stellarium::fuzz;  // NOLINT(google-build-using-namespace)
    static size_t runs = 0;
    Feed feed(data, size);
    std::vector<std::string_view> pieces;
    while (!feed.empty()) {
        const stellarium::Bytes piece = feed.bytes(feed.u8());
        pieces.emplace_back(reinterpret_cast<const char*>(piece.data()), piece.size());
    }
    const std::string answer = bench().exchange(pieces);
    require(answer.empty() || answer.starts_with("HTTP/1.1 "), "an answer is one of HTTP");
    if (++runs % 32 == 0) {
        require(bench()
                    .exchange({"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n"})
                    .starts_with("HTTP/1.1 200 "),
                "a client that keeps the rules is served");
    }
    return 0;
}
