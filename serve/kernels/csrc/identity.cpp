// What this library is: Python asks before it uses it.
#include <sys/syscall.h>
#include <unistd.h>

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

int shoal_prepare(void) {
#if defined(SHOAL_ISA_AMX)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 1;
#endif
}

}  // extern "C"
