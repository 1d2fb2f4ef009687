#include "dispatch.h"

#include <stdexcept>

// The instruction sets CMakeLists.txt compiles rows.cpp for, best first; each has a namespace of its own, or the linker
// could merge an inline function's AVX-512 copy into code that must run everywhere.
#if defined(FASTLOSS_NO_AVX512)
#define FASTLOSS_FOR_EACH_ISA(X) X(avx2) X(baseline)
#elif defined(__x86_64__)
#define FASTLOSS_FOR_EACH_ISA(X) X(avx512_bf16) X(avx512) X(avx2) X(baseline)
#else
#define FASTLOSS_FOR_EACH_ISA(X) X(baseline)  // aarch64: NEON
#endif

#define FASTLOSS_DECLARE(isa)           \
  namespace fastloss {                  \
  namespace isa {                       \
  extern const Kernels kernels_float32; \
  extern const Kernels kernels_float64; \
  }                                     \
  }
FASTLOSS_FOR_EACH_ISA(FASTLOSS_DECLARE)

namespace fastloss {
namespace {

struct Isa {
  std::string name;
  const Kernels *float32, *float64;
};

bool supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return name == "baseline";
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found;
#define FASTLOSS_ADD(isa) \
  if (supported(#isa)) found.push_back({#isa, &isa::kernels_float32, &isa::kernels_float64});
    FASTLOSS_FOR_EACH_ISA(FASTLOSS_ADD)
    return found;
  }();
  return all;
}

const Isa*& chosen() {
  static const Isa* isa = &isas().front();
  return isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

const std::string& current_isa() { return chosen()->name; }

void use_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (isa.name == name) {
      chosen() = &isa;
      return;
    }
    known += (known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("isa: got '" + name + "', this processor and build have " + known);
}

const Kernels& kernels(DType dtype) { return dtype == DType::kFloat64 ? *chosen()->float64 : *chosen()->float32; }

}  // namespace fastloss
