// vhost_memdisk: serves a file, or zeros in memory, on a vhost-user-blk socket until it is told to
// stop (SIGTERM, SIGINT). For booting guests against the frontend without the engine, and for tests
// that kill the server.
//
//     vhost_memdisk --socket /tmp/d.sock --file root.img --queues 2
#include <cstdio>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <signal.h>

#include "base/units.h"
#include "frontend/vhost/server.h"
#include "frontend/vhost_client/memory_disk.h"

namespace stellarium {
namespace {

struct Arguments {
    std::string socket;
    std::string file;
    std::string size = "64MiB";
    std::string serial;
    uint16_t queues = 1;
    uint32_t block_size = 512;
    unsigned threads = 0;
    bool read_only = false;
    bool verbose = false;
    bool hold = false;
    bool would_block = false;
};

Result<std::shared_ptr<vhost::MemoryDisk>> make_disk(const Arguments& arguments) {
    if (!arguments.file.empty()) {
        return vhost::MemoryDisk::open(arguments.file);
    }
    STELLARIUM_ASSIGN(uint64_t size, parse_size(arguments.size));
    return vhost::MemoryDisk::create(size);
}

Result<void> serve(const Arguments& arguments) {
    sigset_t stop;
    ::sigemptyset(&stop);
    ::sigaddset(&stop, SIGTERM);
    ::sigaddset(&stop, SIGINT);
    ::pthread_sigmask(SIG_BLOCK, &stop, nullptr);

    STELLARIUM_ASSIGN(std::shared_ptr<vhost::MemoryDisk> disk, make_disk(arguments));
    disk->set_would_block(arguments.would_block);
    if (arguments.hold) {
        disk->hold();
    }
    vhost::ServerOptions options;
    options.data_threads = arguments.threads;
    if (arguments.verbose) {
        options.logger = [](vhost::LogLevel, std::string_view device, std::string_view message) {
            fmt::print(stderr, "{}: {}\n", device, message);
        };
    }
    STELLARIUM_ASSIGN(auto server, vhost::VhostServer::create(std::move(options)));
    vhost::AttachOptions attach;
    attach.socket_path = arguments.socket;
    attach.queues = arguments.queues;
    attach.block_size_bytes = arguments.block_size;
    attach.read_only = arguments.read_only;
    attach.serial = arguments.serial;
    STELLARIUM_TRY(server->attach("memdisk", disk, std::move(attach)));
    fmt::print("ready\n");
    std::fflush(stdout);

    int signal = 0;
    ::sigwait(&stop, &signal);
    if (arguments.hold) {
        disk->release();
    }
    if (arguments.verbose) {
        for (const vhost::AttachmentStatus& status : server->status()) {
            for (size_t i = 0; i < vhost::kRequestKinds; ++i) {
                const vhost::RequestTotals& totals = status.totals[i];
                fmt::print(stderr, "{}: {} requests, {} bytes, {} errors\n",
                           vhost::request_kind_name(static_cast<vhost::RequestKind>(i)),
                           totals.requests, totals.bytes, totals.errors);
            }
        }
    }
    server->shutdown();
    return {};
}

int run(int argc, char** argv) {
    Arguments arguments;
    CLI::App app("Serves a file or memory as a vhost-user-blk disk");
    app.add_option("--socket", arguments.socket, "Path of the socket")->required();
    app.add_option("--file", arguments.file, "File to serve; default: zeros in memory");
    app.add_option("--size", arguments.size, "Size of the memory disk, such as 64MiB");
    app.add_option("--serial", arguments.serial, "Serial that the guest sees");
    app.add_option("--queues", arguments.queues, "Virtqueues");
    app.add_option("--block-size", arguments.block_size, "512 or 4096");
    app.add_option("--threads", arguments.threads, "Data threads; default: one a processor");
    app.add_flag("--read-only", arguments.read_only, "Refuse writes");
    app.add_flag("--verbose", arguments.verbose, "Log connections and totals to stderr");
    app.add_flag("--hold", arguments.hold, "Finish no request (for tests that kill this program)");
    app.add_flag("--would-block", arguments.would_block, "Send every request through the pool");
    CLI11_PARSE(app, argc, argv);
    if (Result<void> served = serve(arguments); !served) {
        fmt::print(stderr, "vhost_memdisk: {}\n", served.error().message());
        return error_mapping(served.error().code()).exit_code;
    }
    return 0;
}

}  // namespace
}  // namespace stellarium

int main(int argc, char** argv) {
    return stellarium::run(argc, argv);
}
