// Declarations for headers that host and device code share. Device code includes no std header.
#pragma once

#if defined(__CUDACC__)
#define MTLFAST_HD __host__ __device__
#else
#define MTLFAST_HD
#endif

namespace mtlfast {
using int64_t = __INT64_TYPE__;
}
