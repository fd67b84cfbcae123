// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mtlfast {

namespace baseline {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Unit {
  const CpuKernels* kernels;
  bool runs_here;
};

struct Choice {
  const CpuKernels* kernels;
  const char* why;
};

#if defined(__x86_64__)
// Older compilers, such as clang 14, do not take "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const Unit units[] = {{&avx512::kernels, has_avx512}, {&avx2::kernels, has_avx2}, {&baseline::kernels, true}};
#else
  const Unit units[] = {{&baseline::kernels, true}};
#endif
  const char* wanted = std::getenv("MTLFAST_CPU_CAPABILITY");
  for (const Unit& unit : units) {
    if (!wanted || !*wanted) {
      if (unit.runs_here) return {unit.kernels, nullptr};
    } else if (std::strcmp(unit.kernels->isa, wanted) == 0) {
      if (unit.runs_here) return {unit.kernels, nullptr};
      return {nullptr, "MTLFAST_CPU_CAPABILITY asks for an instruction set that this processor lacks"};
    }
  }
  return {nullptr, "MTLFAST_CPU_CAPABILITY must be one of baseline, avx2, avx512 that this build holds"};
}

}  // namespace

const CpuKernels* cpu_kernels(const char** why) {
  static const Choice choice = choose();
  *why = choice.why;
  return choice.kernels;
}

}  // namespace mtlfast
