// AVX2 with FMA: eight lanes; bf16 is widened to float32 and multiplied there. Included by vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace shoal {

using Bf16 = uint16_t;
using Activation = float;
using Vec = __m256;
using Pairs = __m256i;
struct Operand {
  __m256 even, odd;
};

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // x 2 Vecs of sums, 2 of weights and 2 operands fill 16 registers
constexpr int64_t kAheadBytes[] = {4096, 1024};  // of one panel, of each of two

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c

// fma(x, w, acc) in the register of acc: left to itself, the compiler moves long tiles of sums about.
inline Vec add_product(Vec acc, Vec x, Vec w) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
  return acc;
}

inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

inline Vec round(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 2^n for whole n in [-126, 127]
inline Vec power_of_two(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// 0 where x < bound, else value
inline Vec zero_where_less(Vec x, Vec bound, Vec value) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), value);
}

// Of all lanes, in one fixed order
inline float sum(Vec x) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
inline float largest(Vec x) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}

inline Pairs load_pairs(const Bf16* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec even_values(Pairs w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
inline Vec odd_values(Pairs w) {
  return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Two neighbouring activations, for every lane
inline Operand load_operand(const Activation* p) {
  return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1)};
}

// acc + x.even * w.even + x.odd * w.odd, in this order
inline Vec accumulate(Vec acc, Operand x, Pairs w) {
  acc = _mm256_fmadd_ps(x.even, even_values(w), acc);
  return _mm256_fmadd_ps(x.odd, odd_values(w), acc);
}

inline void store_activations(Activation* p, Vec x) { _mm256_storeu_ps(p, x); }

inline float from_f16(uint16_t value) { return _cvtsh_ss(value); }

}  // namespace shoal
