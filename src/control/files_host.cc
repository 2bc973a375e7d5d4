#include "control/files_host.h"

namespace stellarium::control {

Json to_json(const FilesStatus& status) {
    Json body{{"mounted", status.mounted},
              {"holder_socket", status.holder_socket},
              {"uid", status.uid},
              {"gid", status.gid}};
    if (!status.mounted) {
        return body;
    }
    body.update(Json{{"directory", status.directory},
                     {"holder_pid", status.holder_pid},
                     {"open_files", status.open_files},
                     {"open", status.open},
                     {"repeats_requests", status.repeats_requests},
                     {"adopted", status.adopted},
                     {"repeated_requests", status.repeated_requests},
                     {"in_flight", status.in_flight},
                     {"kept", status.kept}});
    Json& requests = body["requests"];
    for (const FilesRequests& each : status.requests) {
        requests[each.kind] =
            Json{{"requests", each.requests}, {"bytes", each.bytes}, {"errors", each.errors}};
    }
    return body;
}

}  // namespace stellarium::control
