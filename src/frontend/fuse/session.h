// libfuse's session, which goes with its owner. An open descriptor of /dev/fuse goes with it; what
// is mounted stays mounted.
//
// Thread rule: that of libfuse: made and destroyed by one thread, while no other uses it.
#pragma once

#ifndef FUSE_USE_VERSION
#define FUSE_USE_VERSION 314
#endif

#include <memory>

#include <fuse3/fuse_lowlevel.h>

namespace stellarium::fuse {

struct DestroySession {
    void operator()(fuse_session* session) const { fuse_session_destroy(session); }
};
using Session = std::unique_ptr<fuse_session, DestroySession>;

}  // namespace stellarium::fuse
