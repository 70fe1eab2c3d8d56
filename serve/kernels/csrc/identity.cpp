// What this library is: Python asks before it uses it.
#include "shoal.h"
#include "vec.h"

#ifndef SHOAL_SOURCE_HASH
#error "serve.kernels.build defines SHOAL_SOURCE_HASH"
#endif

extern "C" {

const char* shoal_isa(void) {
#if defined(SHOAL_ISA_AVX2)
  return "avx2";
#elif defined(SHOAL_ISA_AVX512)
  return "avx512";
#elif defined(SHOAL_ISA_AMX)
  return "amx";
#elif defined(SHOAL_ISA_EMULATED_AMX)
  return "emulated_amx";
#else
  return "emulated";
#endif
}

const char* shoal_source_hash(void) { return SHOAL_SOURCE_HASH; }

int shoal_panel_width(void) { return shoal::kPanelWidth; }

}  // extern "C"
