#include <algorithm>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/flush_device.h"
#include "capi/backend.h"
#include "control/locations.h"
#include "control/service.h"
#include "io/io.h"
#include "nebula/reserve.h"
#include "nova/pool.h"
#include "share/plan.h"

namespace stellarium::capi {
namespace {

/// Read at once to bring content into memory.
constexpr uint64_t kPrefetchBytes = uint64_t{1} << 20;

class OwnDisk final : public Disk {
  public:
    OwnDisk(nova::Pool& pool, std::string source, std::shared_ptr<BlockDevice> device)
        : pool_(pool), source_(std::move(source)), device_(std::move(device)) {}

    uint64_t size_bytes() const override { return device_->size_bytes(); }
    bool read_only() const override { return device_->read_only(); }
    Result<void> read(uint64_t offset_bytes, MutableBytes into) override {
        const iovec part{.iov_base = into.data(), .iov_len = into.size()};
        return device_->read(offset_bytes, std::span(&part, 1), IoMode::kMayBlock);
    }
    Result<void> write(uint64_t offset_bytes, Bytes from) override {
        // Written from, never to; an iovec has no other kind of pointer.
        const iovec part{.iov_base = const_cast<std::byte*>(from.data()), .iov_len = from.size()};
        return device_->write(offset_bytes, std::span(&part, 1), IoMode::kMayBlock);
    }
    Result<void> flush() override { return flush_device(*device_); }
    Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes) override {
        return device_->discard(offset_bytes, length_bytes, IoMode::kMayBlock);
    }
    Result<void> prefetch(uint64_t offset_bytes, uint64_t length_bytes) override {
        STELLARIUM_ASSIGN(const auto reader, pool_.open_reader(source_));
        const uint64_t end = std::min(offset_bytes + length_bytes, reader->size_bytes());
        std::vector<std::byte> scratch(kPrefetchBytes);
        for (uint64_t at = offset_bytes; at < end;) {
            STELLARIUM_ASSIGN(const auto data, reader->next_data(at));
            if (!data || data->first >= end) {
                break;
            }
            const uint64_t stop = std::min(end, data->first + data->second);
            for (at = data->first; at < stop;) {
                const uint64_t step = std::min(kPrefetchBytes, stop - at);
                STELLARIUM_TRY(reader->read(at, MutableBytes(scratch).first(step)));
                at += step;
            }
        }
        return {};
    }

  private:
    nova::Pool& pool_;
    const std::string source_;
    const std::shared_ptr<BlockDevice> device_;
};

class OwnStore final : public Backend {
  public:
    OwnStore(std::unique_ptr<nova::Pool> pool, const std::string& directory)
        : pool_(std::move(pool)),
          service_(*pool_, {.host = nullptr,
                            .version = STELLARIUM_VERSION,
                            .directory = directory,
                            .socket = {}}) {}

    bool through_daemon() const override { return false; }
    Result<std::unique_ptr<control::ControlClient>> client() override {
        return control::connect_in_process(service_);
    }
    Result<std::unique_ptr<Disk>> open_disk(const std::string& source, bool read_only) override {
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_->find(source));
        STELLARIUM_ASSIGN(
            auto device,
            pool_->attach(source, {.read_only = read_only || info.kind != nova::EntityKind::kVolume,
                                   .label = fmt::format("process {}", getpid()),
                                   .id = info.id}));
        return std::make_unique<OwnDisk>(*pool_, source, std::move(device));
    }
    Result<std::unique_ptr<MappedRange>> map(const std::string& source,
                                             const RangeOptions& options) override {
        STELLARIUM_ASSIGN(const auto reader, pool_->open_reader(source));
        STELLARIUM_ASSIGN(const size_t mappings, share::mappings_left(options.max_mappings));
        STELLARIUM_ASSIGN(const share::Plan plan,
                          share::make_plan(*reader, options.offset_bytes, options.length_bytes,
                                           {.max_mappings = mappings}));
        STELLARIUM_ASSIGN(share::Mapping mapping, share::Mapping::make(plan, options.map));
        return std::make_unique<MappedRange>(std::move(mapping), mapped_bytes_of(plan),
                                             plan.gathered_bytes);
    }
    Result<void> close() override {
        service_.stop_long_work();
        return pool_->close();
    }

  private:
    const std::unique_ptr<nova::Pool> pool_;
    control::ControlService service_;
};

/// Adds what to do when a daemon has the store.
Error explain(const Error& error, const std::string& directory) {
    if (error.code() != ErrorCode::kBusy) {
        return error;
    }
    const auto sockets = control::control_socket_candidates(*io::real_env().files, directory);
    const bool served = std::ranges::any_of(sockets, [](const std::string& socket) {
        return control::connect_unix(socket).has_value();
    });
    return served ? Error(ErrorCode::kBusy,
                          error.message() + "; it is held by a daemon: use stellarium_connect()")
                  : error;
}

}  // namespace

uint64_t mapped_bytes_of(const share::Plan& plan) {
    const size_t memory_file = plan.gathered_bytes > 0 ? plan.files.size() - 1 : plan.files.size();
    uint64_t bytes = 0;
    for (const share::Piece& piece : plan.pieces) {
        bytes += piece.file == memory_file ? 0 : piece.length_bytes;
    }
    return bytes;
}

Result<void> create_own_store(const std::string& directory) {
    nova::PoolOptions options;
    options.store.reserve_bytes = nebula::kReserveBytes;
    return nova::Pool::create(io::real_env(), directory, options);
}

Result<std::unique_ptr<Backend>> open_own_store(const std::string& directory,
                                                const OwnStoreOptions& given) {
    nova::PoolOptions options;
    options.store.read_only = given.read_only;
    options.store.reserve_bytes = nebula::kReserveBytes;
    options.gc.automatic = given.collect_garbage;
    if (given.dirty_bytes != 0) {
        options.dirty_budget_bytes = given.dirty_bytes;
    }
    auto pool = nova::Pool::open(io::real_env(), directory, options);
    if (!pool) {
        return std::unexpected(explain(pool.error(), control::real_path(directory)));
    }
    return std::make_unique<OwnStore>(*std::move(pool), control::real_path(directory));
}

}  // namespace stellarium::capi
