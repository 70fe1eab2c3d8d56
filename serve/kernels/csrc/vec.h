// Vectors of floats and pairs of bfloat16, one meaning on every instruction set.
//
// Vec is kLanes floats. Pairs is kLanes pairs of bf16 as they lie in a panel: lane i holds inputs
// (2k, 2k + 1) of output i. Operand is what one row's pair of inputs becomes beside them, and
// Activation the type in which a row is kept for that: float32 where bf16 is widened (AVX2), bf16
// where the CPU multiplies pairs of it. The one decision behind it: nothing here looks at a lane's
// place, so a value's bits do not depend on where it lies. max and min give the second operand
// where either is not a number.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SHOAL_ISA_AVX2)
#include "vec_avx2.h"
#elif defined(SHOAL_ISA_AVX512) || defined(SHOAL_ISA_AMX)
#include "vec_avx512.h"
#elif defined(SHOAL_ISA_EMULATED) || defined(SHOAL_ISA_EMULATED_AMX)
#include "vec_emulated.h"
#else
#error "define SHOAL_ISA_AVX2, SHOAL_ISA_AVX512, SHOAL_ISA_AMX, SHOAL_ISA_EMULATED or SHOAL_ISA_EMULATED_AMX"
#endif

namespace shoal {

constexpr int kPanelVecs = 2;  // Vecs side by side in a panel
constexpr int kPanelWidth = kPanelVecs * kLanes;

constexpr int kCacheLineBytes = 64;

// Always inline: the compiler takes a function that does nothing else for one without effect.
__attribute__((always_inline)) inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 3);
}

inline float from_bf16(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To the nearest bf16, ties to even; not a number stays so.
inline Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bf16>((bits >> 16) | 0x40u);
  return static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return from_bf16(value); }

// e^x within 2 units in the last place. 0 below -86.6, where a result would soon be subnormal;
// infinity where it is too large.
inline Vec exp(Vec x) {
  const Vec lowest = set1(-86.6f);
  const Vec bounded = min(set1(89.0f), max(lowest, x));
  const Vec n = round(mul(bounded, set1(1.44269504088896341f)));
  // x - n ln 2, where ln 2 is the sum of a short constant and the rest
  Vec r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  // 2^n may be beyond the largest float where the result is not: twice 2^(n - 1).
  const Vec doubled = add(p, p);
  return zero_where_less(x, lowest, mul(doubled, power_of_two(sub(n, set1(1.0f)))));
}

// x / (1 + e^-x)
inline Vec silu(Vec x) {
  return div(x, add(set1(1.0f), exp(sub(zero(), x))));
}

}  // namespace shoal
