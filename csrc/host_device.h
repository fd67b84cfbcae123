// What the headers that host and device share need; no std header reaches device code.
#pragma once

#if defined(__CUDACC__)
#define MTLFAST_HD __host__ __device__
#else
#define MTLFAST_HD
#endif

namespace mtlfast {
using int64_t = __INT64_TYPE__;
}
