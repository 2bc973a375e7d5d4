// A small pool for targets that send requests: each input gets a copy that others have not changed.
#pragma once

#include <memory>
#include <string>

#include "io/simulated.h"
#include "nova/pool.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {

inline nova::PoolOptions small_pool_options() {
    nova::PoolOptions options;
    options.store.segment_bytes = nebula::kMinSegmentBytes;
    options.dirty_budget_bytes = nova::kMinDirtyBudgetBytes;
    options.node_cache_bytes = 1 << 20;
    options.hash_threads = 1;
    options.background = false;
    return options;
}

/// An image "image", its clones "a" and "b", and a snapshot "a@s".
class PoolCopy {
  public:
    PoolCopy() : machine_(original().files().fork(), 2) {
        pool_ = must(nova::Pool::open(machine_.process_env(), "/pool", small_pool_options()));
    }
    nova::Pool& pool() { return *pool_; }

  private:
    static io::SimulatedMachine& original() {
        static const std::unique_ptr<io::SimulatedMachine> machine = [] {
            auto fresh = std::make_unique<io::SimulatedMachine>(1);
            must(nova::Pool::create(fresh->env(), "/pool", small_pool_options()));
            const auto pool =
                must(nova::Pool::open(fresh->process_env(), "/pool", small_pool_options()));
            {
                const auto import = must(pool->begin_import("image"));
                must(import->append(4096, Input(10'000, std::byte{7})));
                must(import->finish(1 << 20));
            }
            must(pool->clone("image", {"a", "b"}));
            must(pool->create_snapshot("a", "s"));
            must(pool->close());
            return fresh;
        }();
        return *machine;
    }

    io::SimulatedMachine machine_;
    std::unique_ptr<nova::Pool> pool_;
};

}  // namespace stellarium::fuzz
