#include "frontend/vhost/request.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>

#include "frontend/vhost/limits.h"

namespace stellarium::vhost {

namespace {

uint64_t total_bytes(std::span<const iovec> segments) {
    uint64_t total = 0;
    for (const iovec& segment : segments) {
        total += segment.iov_len;
    }
    return total;
}

/// Copies from the front of `segments` and removes what was copied; false when they are too short.
bool take_front(std::vector<iovec>& segments, MutableBytes into) {
    if (total_bytes(segments) < into.size()) {
        return false;
    }
    size_t used = 0;
    while (!into.empty()) {
        iovec& segment = segments[used];
        size_t part = std::min(segment.iov_len, into.size());
        std::memcpy(into.data(), segment.iov_base, part);
        into = into.subspan(part);
        segment.iov_base = static_cast<uint8_t*>(segment.iov_base) + part;
        segment.iov_len -= part;
        used += segment.iov_len == 0 ? 1 : 0;
    }
    segments.erase(segments.begin(), segments.begin() + static_cast<ptrdiff_t>(used));
    return true;
}

RequestKind kind_of(uint32_t type) {
    switch (type) {
        case kBlkIn:
            return RequestKind::kRead;
        case kBlkOut:
            return RequestKind::kWrite;
        case kBlkFlush:
            return RequestKind::kFlush;
        case kBlkGetId:
            return RequestKind::kGetId;
        case kBlkDiscard:
            return RequestKind::kDiscard;
        case kBlkWriteZeroes:
            return RequestKind::kWriteZeroes;
        default:
            return RequestKind::kUnknown;
    }
}

/// True when [sector, sector + length) lies within the disk; no sum can overflow.
bool within(uint64_t sector, uint64_t length_bytes, const DiskView& disk) {
    uint64_t sectors = disk.size_bytes >> kSectorShift;
    return sector <= sectors && length_bytes <= ((sectors - sector) << kSectorShift);
}

uint8_t decode_transfer(uint64_t sector, const DiskView& disk, Request& request) {
    request.length_bytes = total_bytes(request.data);
    if (request.length_bytes % kSectorBytes != 0 || request.length_bytes > kMaxRequestBytes ||
        !within(sector, request.length_bytes, disk)) {
        return kBlkStatusIoError;
    }
    request.offset_bytes = sector << kSectorShift;
    return kBlkStatusOk;
}

uint8_t decode_ranges(std::vector<iovec>& readable, const DiskView& disk, Request& request) {
    uint64_t bytes = total_bytes(readable);
    size_t count = bytes / sizeof(BlkRange);
    if (count == 0 || count > kMaxDiscardSegments || bytes % sizeof(BlkRange) != 0) {
        return kBlkStatusIoError;
    }
    std::array<BlkRange, kMaxDiscardSegments> copies;
    take_front(readable, std::as_writable_bytes(std::span(copies).first(count)));
    for (const BlkRange& range : std::span(copies).first(count)) {
        // Discards take no flag; write-zeroes may be asked to free the space (VIRTIO 1.2, 5.2.6.2).
        uint32_t allowed = request.kind == RequestKind::kWriteZeroes ? kBlkRangeUnmap : 0;
        if ((range.flags & ~allowed) != 0) {
            return kBlkStatusUnsupported;
        }
        uint64_t length = uint64_t{range.sectors} << kSectorShift;
        if (range.sectors > kMaxDiscardSectors || !within(range.sector, length, disk)) {
            return kBlkStatusIoError;
        }
        request.ranges.push_back(ByteRange{range.sector << kSectorShift, length});
        request.length_bytes += length;
    }
    return kBlkStatusOk;
}

}  // namespace

void Request::reset() {
    session.reset();
    memory.reset();
    kind = RequestKind::kUnknown;
    status = kBlkStatusOk;
    abandoned = false;
    flushed = false;
    offset_bytes = 0;
    length_bytes = 0;
    data.clear();
    ranges.clear();
    status_byte = nullptr;
}

uint32_t Request::written_bytes() const {
    bool filled = status == kBlkStatusOk && kind == RequestKind::kRead;
    // At most kMaxRequestBytes, so it fits.
    return static_cast<uint32_t>(filled ? length_bytes : 0) + 1;
}

Result<void> decode(Chain& chain, const DiskView& disk, Request& request) {
    request.head = chain.head;
    BlkRequestHeader header;
    if (!take_front(chain.readable, std::as_writable_bytes(std::span(&header, 1)))) {
        return fail(ErrorCode::kProtocol, "request without a whole header");
    }
    if (chain.writable.empty()) {
        return fail(ErrorCode::kProtocol, "request without a status byte");
    }
    iovec& last = chain.writable.back();
    --last.iov_len;
    request.status_byte = static_cast<uint8_t*>(last.iov_base) + last.iov_len;
    if (last.iov_len == 0) {
        chain.writable.pop_back();
    }

    request.kind = kind_of(header.type);
    switch (request.kind) {
        case RequestKind::kRead:
            request.data.swap(chain.writable);
            request.status = decode_transfer(header.sector, disk, request);
            break;
        case RequestKind::kWrite:
            request.data.swap(chain.readable);
            request.status =
                disk.read_only ? kBlkStatusIoError : decode_transfer(header.sector, disk, request);
            break;
        case RequestKind::kDiscard:
        case RequestKind::kWriteZeroes:
            request.status =
                disk.read_only ? kBlkStatusIoError : decode_ranges(chain.readable, disk, request);
            break;
        case RequestKind::kGetId:
            request.data.swap(chain.writable);
            break;
        case RequestKind::kFlush:
            break;
        case RequestKind::kUnknown:
            request.status = kBlkStatusUnsupported;
            break;
    }
    return {};
}

Result<void> perform(BlockDevice& device, const Request& request, IoMode mode,
                     const std::atomic<bool>* stop) {
    if (request.kind == RequestKind::kRead) {
        return request.length_bytes == 0 ? Result<void>()
                                         : device.read(request.offset_bytes, request.data, mode);
    }
    if (request.kind == RequestKind::kWrite) {
        return request.length_bytes == 0 ? Result<void>()
                                         : device.write(request.offset_bytes, request.data, mode);
    }
    for (const ByteRange& range : request.ranges) {
        if (range.length_bytes == 0) {
            continue;
        }
        if (stop != nullptr && stop->load(std::memory_order_relaxed)) {
            return fail(ErrorCode::kCancelled, "the device is being detached");
        }
        STELLARIUM_TRY(request.kind == RequestKind::kDiscard
                           ? device.discard(range.offset_bytes, range.length_bytes, mode)
                           : device.write_zeroes(range.offset_bytes, range.length_bytes, mode));
    }
    return {};
}

void fill_serial(const std::string& serial, const Request& request) {
    std::array<char, kSerialBytes> text{};
    serial.copy(text.data(), text.size());
    std::span<const char> rest(text);
    for (const iovec& segment : request.data) {
        size_t part = std::min(segment.iov_len, rest.size());
        std::memcpy(segment.iov_base, rest.data(), part);
        rest = rest.subspan(part);
    }
}

}  // namespace stellarium::vhost
