// What a pool ought to hold: names, lineage and content in plain maps.
//
// Content is kept in pages, so that sparse volumes of any size are cheap and copies share pages.
//
// Thread rule: one thread.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/hash.h"
#include "nova/limits.h"

namespace stellarium::nova::model {

using Sector = std::array<std::byte, kSectorBytes>;

class Content {
  public:
    uint64_t size_bytes() const { return size_bytes_; }
    /// What lies beyond a smaller size is gone for good.
    void resize(uint64_t size_bytes);
    void write(uint64_t offset_bytes, Bytes data);
    void zero(uint64_t offset_bytes, uint64_t length_bytes);
    void read(uint64_t offset_bytes, MutableBytes into) const;
    std::vector<std::byte> read(uint64_t offset_bytes, uint64_t length_bytes) const {
        std::vector<std::byte> data(length_bytes);
        read(offset_bytes, data);
        return data;
    }
    Sector sector(uint64_t number) const {
        Sector sector{};
        read(number * kSectorBytes, sector);
        return sector;
    }
    /// Numbers of pages that are not all zero.
    std::set<uint64_t> data_pages() const;
    /// Pages that differ, a page beyond one's size counting as zeros.
    static std::set<uint64_t> differing_pages(const Content& a, const Content& b);

  private:
    using Page = std::array<std::byte, kPageBytes>;
    Page& page_for_writing(uint64_t number);

    uint64_t size_bytes_ = 0;
    std::map<uint64_t, std::shared_ptr<Page>> pages_;
};

struct ShadowVolume {
    Content content;
    std::string parent;  ///< As it must be shown.
    bool parent_removed = false;
    bool is_image = false;
    std::string attachment;  ///< Label of the attachment on record; empty: none.
    /// Of an image, the boot manifest that was set last, and the root that it is bound to; empty:
    /// not known.
    std::vector<std::byte> boot{};
    Hash256 boot_root{};
    std::map<std::string, Content> snapshots;
    /// Older versions of sectors that were overwritten since the last flush: after power loss, a
    /// sector may be any of them.
    std::map<uint64_t, std::vector<Sector>> older;
    /// Versions that a sector may have instead, because an operation failed in the middle. Writing
    /// over it settles it.
    std::map<uint64_t, std::vector<Sector>> uncertain;

    void write(uint64_t offset_bytes, Bytes data);
    void zero(uint64_t offset_bytes, uint64_t length_bytes);
    void flushed() { older.clear(); }
    /// The range may hold what it holds, or `data`.
    void may_have_written(uint64_t offset_bytes, Bytes data);

  private:
    void remember(uint64_t offset_bytes, uint64_t length_bytes);
};

/// All images and volumes by name.
using Shadow = std::map<std::string, ShadowVolume>;

/// `source` is an image, a volume or "VOLUME@SNAPSHOT": whatever was made of it shows the new name,
/// or that it is gone.
void parent_renamed(Shadow& shadow, const std::string& from, const std::string& to);
void parent_removed(Shadow& shadow, const std::string& source);

}  // namespace stellarium::nova::model
