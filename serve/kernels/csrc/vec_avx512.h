// AVX-512 with bf16 pair products: sixteen lanes, activations rounded to bf16. Included by vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace shoal {

using Bf16 = uint16_t;
using Activation = Bf16;
using Vec = __m512;
using Pairs = __m512i;
using Operand = __m512i;

constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // x 2 Vecs of sums and 2 of weights, in 32 registers
constexpr int64_t kAheadBytes[] = {4096, 4096};  // of one panel, of each of two

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c

// fma(x, w, acc) in the register of acc: left to itself, the compiler moves long tiles of sums about.
inline Vec add_product(Vec acc, Vec x, Vec w) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
  return acc;
}

inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

inline Vec round(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 2^n for whole n in [-126, 127]
inline Vec power_of_two(Vec n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

// 0 where x < bound, else value
inline Vec zero_where_less(Vec x, Vec bound, Vec value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), value);
}

// Of all lanes, in one fixed order
inline float sum(Vec x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
inline float largest(Vec x) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}

inline Pairs load_pairs(const Bf16* p) { return _mm512_loadu_si512(p); }
inline Vec even_values(Pairs w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline Vec odd_values(Pairs w) {
  return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Two neighbouring activations, for every lane
inline Operand load_operand(const Activation* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// acc + both products of each pair
inline Vec accumulate(Vec acc, Operand x, Pairs w) {
  __m512bh left, right;
  std::memcpy(&left, &x, sizeof left);
  std::memcpy(&right, &w, sizeof right);
  return _mm512_dpbf16_ps(acc, left, right);
}

inline void store_activations(Activation* p, Vec x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &rounded, sizeof rounded);
}

inline float from_f16(uint16_t value) { return _cvtsh_ss(value); }

}  // namespace shoal
