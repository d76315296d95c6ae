// The distribution's gRPC is built without ThreadSanitizer, which therefore does not see how its
// threads hand memory to each other: what only its code (and protobuf's, called by it) touches is
// not judged. Our handlers' frames lie above these, so that races of ours are still reported.
#include "tests/server/tsan_options.h"

#ifdef __SANITIZE_THREAD__

extern "C" const char* __tsan_default_options() { return lockstep::server::kTsanOptions; }

#endif
