#include "frontend/nbd_client/client.h"

namespace stellarium::nbd {

std::optional<std::vector<std::byte>> TestClient::receive(size_t count) {
    std::vector<std::byte> out(count);
    size_t got = 0;
    while (got < count) {
        pollfd wait{.fd = fd_.get(), .events = POLLIN, .revents = 0};
        if (::poll(&wait, 1, static_cast<int>(kTestPatience.count())) != 1) {
            return std::nullopt;
        }
        const ssize_t more = ::recv(fd_.get(), out.data() + got, count - got, 0);
        if (more <= 0) {
            return std::nullopt;
        }
        got += static_cast<size_t>(more);
    }
    return out;
}

bool TestClient::is_hung_up_on() {
    while (true) {
        pollfd wait{.fd = fd_.get(), .events = POLLIN, .revents = 0};
        if (::poll(&wait, 1, static_cast<int>(kTestPatience.count())) != 1) {
            return false;
        }
        std::array<std::byte, 65536> ignored;
        if (::recv(fd_.get(), ignored.data(), ignored.size(), 0) <= 0) {
            return true;
        }
    }
}

std::vector<OptionAnswer> TestClient::option_answers() {
    std::vector<OptionAnswer> answers;
    while (auto answer = option_answer()) {
        const uint32_t type = answer->type;
        answers.push_back(*std::move(answer));
        if (type == kRepAck || (type & 0x8000'0000) != 0) {
            break;
        }
    }
    return answers;
}

std::optional<Answer> TestClient::answer() {
    while (true) {
        const auto magic = take<U32Be>();
        if (!magic) {
            return std::nullopt;
        }
        if (*magic == kSimpleReplyMagic) {
            const auto rest = receive(sizeof(SimpleReply) - sizeof(U32Be));
            if (!rest) {
                return std::nullopt;
            }
            Answer simple;
            simple.error = load<U32Be>(*rest);
            simple.cookie = load<U64Be>(Bytes(*rest).subspan(4));
            const auto length = reads_.find(simple.cookie);
            if (length == reads_.end()) {
                return std::nullopt;
            }
            if (simple.error == 0 && length->second > 0 && !structured_) {
                auto data = receive(length->second);
                if (!data) {
                    return std::nullopt;
                }
                simple.data.emplace(0, *std::move(data));
            }
            reads_.erase(length);
            return simple;
        }
        if (*magic != kStructuredReplyMagic || !take_chunk()) {
            return std::nullopt;
        }
        if (done_) {
            return std::exchange(done_, std::nullopt);
        }
    }
}

bool TestClient::take_chunk() {
    const auto rest = receive(sizeof(ChunkHeader) - sizeof(U32Be));
    if (!rest) {
        return false;
    }
    std::vector<std::byte> whole;
    append_bytes(whole, bytes_of(U32Be(kStructuredReplyMagic)));
    append_bytes(whole, *rest);
    const auto header = load<ChunkHeader>(whole);
    auto payload = receive(header.length_bytes);
    if (!payload || !reads_.contains(header.cookie)) {
        return false;
    }
    Answer& answer = partial_[header.cookie];
    answer.cookie = header.cookie;
    ++answer.chunks;
    const Bytes bytes = *payload;
    switch (header.type.get()) {
        case kChunkOffsetData:
            if (bytes.size() < 9 || answer.data.contains(load<U64Be>(bytes))) {
                return false;
            }
            answer.data[load<U64Be>(bytes)].assign(bytes.begin() + 8, bytes.end());
            break;
        case kChunkOffsetHole:
            if (bytes.size() != 12 || answer.holes.contains(load<U64Be>(bytes))) {
                return false;
            }
            answer.holes[load<U64Be>(bytes)] = load<U32Be>(bytes.subspan(8));
            break;
        case kChunkBlockStatus:
            if (bytes.size() < 12 || bytes.size() % 8 != 4 ||
                load<U32Be>(bytes) != kContextAllocationId) {
                return false;
            }
            for (size_t at = 4; at < bytes.size(); at += 8) {
                answer.extents.emplace_back(load<U32Be>(bytes.subspan(at)),
                                            load<U32Be>(bytes.subspan(at + 4)));
            }
            break;
        case kChunkError: {
            if (bytes.size() < 6) {
                return false;
            }
            answer.error = load<U32Be>(bytes);
            const uint16_t length = load<U16Be>(bytes.subspan(4));
            if (answer.error == 0 || length != bytes.size() - 6) {
                return false;
            }
            answer.message.assign(reinterpret_cast<const char*>(bytes.data()) + 6, length);
            break;
        }
        default:
            return false;
    }
    if ((header.flags & kReplyFlagDone) != 0) {
        done_ = std::move(answer);
        partial_.erase(header.cookie);
        reads_.erase(header.cookie);
    }
    return true;
}

}  // namespace stellarium::nbd
