// The CPU entry points of divergence_api.h: rows over OpenMP threads, with the best row kernels that this machine runs.

#include "divergence.h"

#include <atomic>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "row_kernels.h"

namespace {

struct Isa {
  const char* name;
  const RowKernels* rows;
  bool (*is_supported)();
};

const Isa ISAS[] = {
#if defined(TCOD_HAS_X86_ROWS)
    {"avx512", &avx512_rows,
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2_rows,
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such machine has F16C
     }},
#endif
    {"portable", &portable_rows, [] { return true; }},
};

std::atomic<const Isa*> chosen{nullptr};

const Isa* choose() {
  const Isa* isa = chosen.load(std::memory_order_relaxed);
  if (isa == nullptr) {
    isa = ISAS;
    while (!isa->is_supported()) ++isa;
    chosen.store(isa, std::memory_order_relaxed);
  }
  return isa;
}

// While it lives, results below 2^-126 are zero: they cost a hundred cycles each and change no sum. Roundings and
// exceptions are the usual ones, whatever the caller's thread was set to; the setting of the caller comes back.
class FloatSettings {
#if defined(__SSE2__)
 public:
  FloatSettings() : saved_(_mm_getcsr()) { _mm_setcsr(FLUSH_TO_ZERO | MASK_ALL_EXCEPTIONS); }
  ~FloatSettings() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned FLUSH_TO_ZERO = 0x8000, MASK_ALL_EXCEPTIONS = 0x1f80;
  unsigned saved_;
#else
 public:
  FloatSettings() {}
#endif
};

template <class Args>
void for_each_row(const Args& args, int num_threads, void (*kernel)(const Args&, int64_t)) {
  const int64_t rows = args.logits.rows;
  const int64_t limit = num_threads < 1 ? 1 : num_threads;
  const int threads = (int)(rows < limit ? rows : limit);
  if (threads < 2) {
    const FloatSettings settings;
    for (int64_t row = 0; row < rows; ++row) kernel(args, row);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const FloatSettings settings;
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) kernel(args, row);
  }
}

}  // namespace

std::vector<std::string> tcod_cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : ISAS) {
    if (isa.is_supported()) names.push_back(isa.name);
  }
  return names;
}

std::string tcod_cpu_isa() { return choose()->name; }

bool tcod_cpu_select_isa(const std::string& name) {
  for (const Isa& isa : ISAS) {
    if (name == isa.name && isa.is_supported()) {
      chosen.store(&isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

void tcod_cpu_partial_sums(const TcodPartialSums* args, int num_threads) {
  for_each_row(*args, num_threads, choose()->rows->partial_sums);
}

void tcod_cpu_mixture_sums(const TcodMixtureSums* args, int num_threads) {
  for_each_row(*args, num_threads, choose()->rows->mixture_sums);
}

void tcod_cpu_logits_gradient(const TcodLogitsGradient* args, int num_threads) {
  for_each_row(*args, num_threads, choose()->rows->logits_gradient);
}
