// Who shares what is in memory: against a model, and what many clones cost.
#include "nova/sharing.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "nova/limits.h"
#include "nova/testing/test_store.h"

namespace stellarium::nova {
namespace {

using testing::must;
using testing::placed;
using testing::TestStore;

constexpr uint32_t kPagesOfAll = 1 << 14;

bool is_resident(uint64_t address) {
    return address % 3 != 0;
}

Result<ResidentPages> resident_of_model(uint32_t segment) {
    ResidentPages pages(kPagesOfAll);
    for (uint32_t page = 0; page < kPagesOfAll; ++page) {
        pages[page] = is_resident(nebula::PageAddress::make(segment, page).value());
    }
    return pages;
}

/// A state, and every address that its tree and its delta refer to.
struct Modelled {
    VolumeState state;
    std::vector<uint64_t> tree;       ///< Of the tree alone.
    std::vector<uint64_t> addresses;  ///< Of both.
};

void add_addresses(const Extents& extents, std::vector<uint64_t>& out) {
    for (const Extent& extent : extents) {
        for (uint32_t page = extent.first_page; !extent.hole && page < extent.end_page(); ++page) {
            out.push_back(extent.address_of(page).value());
        }
    }
}

class Model {
  public:
    explicit Model(uint64_t seed) : random_(seed) {
        for (uint32_t tag = 0; tag < 40; ++tag) {
            chunks_.push_back(test_.add_chunk(tag, 1 + tag % 16));
        }
    }
    TestStore& test() { return test_; }

    Extents random_leaf() {
        Extents extents;
        for (uint32_t page = below(30); page + 16 <= kPagesPerLeaf; page += 16 + below(200)) {
            append_merged(extents, placed(chunks_[below(chunks_.size())], page));
        }
        return extents;
    }
    /// A new tree.
    Modelled make() {
        std::map<uint64_t, Extents> leaves;
        for (uint32_t i = 0; i < 1 + below(6); ++i) {
            leaves[below(200)] = random_leaf();
        }
        TreeBuilder builder(test_.store());
        Modelled made;
        for (const auto& [leaf, extents] : leaves) {
            must(builder.add_leaf(leaf, extents));
            add_addresses(extents, made.tree);
        }
        made.addresses = made.tree;
        made.state.root = must(builder.finish());
        made.state.size_bytes = 200 * kLeafBytes;
        return made;
    }
    /// The same tree, with other leaves over it.
    Modelled with_delta(const Modelled& base) {
        Modelled made = base;
        made.state.delta = {};
        made.addresses = made.tree;
        std::map<uint64_t, Extents> delta;
        for (uint32_t i = 0; i < 1 + below(3); ++i) {
            delta[below(200)] = random_leaf();
        }
        for (const auto& [leaf, extents] : delta) {
            must(made.state.delta.set(test_.store(), leaf, extents));
            add_addresses(extents, made.addresses);
        }
        return made;
    }
    uint32_t below(size_t bound) { return static_cast<uint32_t>(random_() % bound); }

  private:
    std::mt19937_64 random_;
    TestStore test_;
    std::vector<Extent> chunks_;
};

TEST(SharingTest, CountsAgreeWithAModel) {
    for (uint64_t seed = first_seed(); seed < first_seed() + scaled(20, 5); ++seed) {
        SCOPED_TRACE(seed);
        Model model(seed);
        std::vector<Modelled> states;
        for (int i = 0; i < 8; ++i) {
            if (states.empty() || model.below(3) == 0) {
                states.push_back(model.make());
            } else if (model.below(3) == 0) {
                states.push_back(states[model.below(states.size())]);  // A clone.
            } else {
                states.push_back(model.with_delta(states[model.below(states.size())]));
            }
        }
        std::map<uint64_t, std::set<size_t>> users;
        for (size_t i = 0; i < states.size(); ++i) {
            for (const uint64_t address : states[i].addresses) {
                users[address].insert(i);
            }
        }
        SharingFinder finder(model.test().store(), resident_of_model);
        for (const Modelled& each : states) {
            must(finder.add(each.state));
        }
        for (size_t i = 0; i < states.size(); ++i) {
            SharingFinder::Counts expected;
            for (const uint64_t address : states[i].addresses) {
                expected.stored += 1;
                expected.resident += is_resident(address) ? 1 : 0;
                expected.own += is_resident(address) && users[address].size() == 1 ? 1 : 0;
            }
            const SharingFinder::Counts counts = must(finder.count(states[i].state));
            EXPECT_EQ(counts.stored, expected.stored) << i;
            EXPECT_EQ(counts.resident, expected.resident) << i;
            EXPECT_EQ(counts.own, expected.own) << i;
        }
        const auto distinct = std::ranges::count_if(
            users, [](const auto& entry) { return is_resident(entry.first); });
        EXPECT_EQ(finder.resident_pages_in_all(), static_cast<uint64_t>(distinct));
        EXPECT_TRUE(finder.complete());
    }
}

TEST(SharingTest, ThousandClonesCostAsMuchAsOne) {
    Model model(1);
    const Modelled base = model.make();
    const auto nodes_read = [&](int clones) {
        SharingFinder finder(model.test().store(), resident_of_model);
        for (int i = 0; i < clones; ++i) {
            must(finder.add(base.state));
        }
        for (int i = 0; i < clones; ++i) {
            EXPECT_EQ(must(finder.count(base.state)).stored, base.addresses.size());
        }
        return finder.nodes_read();
    };
    const uint64_t alone = nodes_read(1);
    EXPECT_GT(alone, 0U);
    EXPECT_EQ(nodes_read(1000), alone / 2 * 3);
}

TEST(SharingTest, WhatCannotBeReadIsLeftOutAndSaid) {
    Model model(2);
    const Modelled base = model.make();
    SharingFinder finder(model.test().store(), resident_of_model);
    VolumeState missing;
    missing.root.id = hash(bytes_of(std::string_view("nowhere")));
    missing.size_bytes = kLeafBytes;
    must(finder.add(base.state));
    must(finder.add(missing));
    EXPECT_EQ(must(finder.count(base.state)).stored, base.addresses.size());
    EXPECT_EQ(must(finder.count(missing)).stored, 0U);
    EXPECT_FALSE(finder.complete());
}

}  // namespace
}  // namespace stellarium::nova
