// QMP, the language in which QEMU is asked and told things: JSON lines on a unix socket.
//
//     STELLARIUM_ASSIGN(auto qmp, Qmp::connect("/run/x/qmp.sock", std::chrono::seconds(10)));
//     STELLARIUM_ASSIGN(Json status, qmp->execute("query-status"));
//     STELLARIUM_ASSIGN(std::optional<Json> event, qmp->next_event(std::chrono::milliseconds(50)));
//
// QEMU speaks with one client at a time; a second one gets no greeting (kBusy).
//
// Thread rule: one thread.
// Errors: kUnavailable when nobody listens or QEMU goes away, kBusy without a greeting, kProtocol
// for what is no QMP, kUnsupported for a command that this QEMU lacks, kIo with QEMU's own words
// when it refuses one.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "control/json.h"

namespace stellarium::vm {

using control::Json;

/// QEMU answers from its main loop, which a slow disk may hold up.
inline constexpr std::chrono::seconds kQmpTimeout{60};

class Qmp {
  public:
    /// Waits for the greeting and agrees on no capabilities. At most `timeout` altogether.
    static Result<std::unique_ptr<Qmp>> connect(const std::string& path,
                                                std::chrono::milliseconds timeout);
    ~Qmp();
    Qmp(const Qmp&) = delete;
    Qmp& operator=(const Qmp&) = delete;

    /// What the command returns. Events that come before it are kept for next_event().
    Result<Json> execute(std::string_view command, const Json& arguments = Json::object(),
                         std::chrono::milliseconds timeout = kQmpTimeout);
    /// The oldest event that was not asked for yet; nullopt when none came within `timeout`.
    Result<std::optional<Json>> next_event(std::chrono::milliseconds timeout);

  private:
    struct Impl;
    explicit Qmp(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

/// Of a call whose answer says nothing.
inline Result<void> without_answer(const Result<Json>& answer) {
    return answer ? Result<void>() : std::unexpected(answer.error());
}

/// "running", "paused", "postmigrate": QEMU's run state.
Result<std::string> run_state(Qmp& qmp);

}  // namespace stellarium::vm
