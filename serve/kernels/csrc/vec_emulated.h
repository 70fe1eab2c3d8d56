// What AVX-512 with bf16 does, without it: sixteen lanes and bf16 pair products by the compiler's
// own vectors. For tests of that shape on CPUs that lack it; never installed. Included by vec.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace shoal {

using Bf16 = uint16_t;
using Activation = Bf16;
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));
using Operand = Pairs;

constexpr int kLanes = 16;
constexpr int kTileRows = 6;  // fewer than AVX-512 has, so that it compiles in seconds
constexpr int64_t kAheadBytes[] = {4096, 4096};  // of one panel, of each of two

inline Vec set1(float x) { return Vec{} + x; }
inline Vec zero() { return Vec{}; }
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // rounded twice
inline Vec add_product(Vec acc, Vec x, Vec w) { return fma(x, w, acc); }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline Vec round(Vec x) {
  Vec result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = std::nearbyint(x[lane]);
  return result;
}

// 2^n for whole n in [-126, 127]
inline Vec power_of_two(Vec n) {
  const Vec known = n == n ? n : zero();
  const Whole bits = (__builtin_convertvector(known, Whole) + 127) << 23;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// 0 where x < bound, else value
inline Vec zero_where_less(Vec x, Vec bound, Vec value) { return x < bound ? zero() : value; }

// Of all lanes, in one fixed order
inline float sum(Vec x) {
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += x[lane];
  return result;
}
inline float largest(Vec x) {
  float result = x[0];
  for (int lane = 1; lane < kLanes; ++lane) result = result > x[lane] ? result : x[lane];
  return result;
}

inline Pairs load_pairs(const Bf16* p) {
  Pairs w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
inline Vec even_values(Pairs w) {
  const Pairs bits = w << 16;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline Vec odd_values(Pairs w) {
  const Pairs bits = w & 0xffff0000u;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Two neighbouring activations, for every lane
inline Operand load_operand(const Activation* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return Pairs{} + pair;
}

// acc + both products of each pair; a product of two bf16 is exact in float32
inline Vec accumulate(Vec acc, Operand x, Pairs w) {
  acc = acc + odd_values(x) * odd_values(w);
  return acc + even_values(x) * even_values(w);
}

inline void store_activations(Activation* p, Vec x) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t bits;
    const float value = x[lane];
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[lane] = static_cast<Bf16>(is_nan ? (bits >> 16) | 0x40u
                                       : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline float from_f16(uint16_t value) {
  const uint32_t magnitude = value & 0x7fffu;
  const uint32_t mantissa = magnitude & 0x3ffu;
  float result;
  if (magnitude >= 0x7c00u) {
    const uint32_t bits = 0x7f800000u | (mantissa << 13);
    std::memcpy(&result, &bits, sizeof result);
  } else if (magnitude >= 0x400u) {
    result = std::ldexp(static_cast<float>(mantissa | 0x400u), static_cast<int>(magnitude >> 10) - 25);
  } else {
    result = std::ldexp(static_cast<float>(mantissa), -24);
  }
  return value & 0x8000u ? -result : result;
}

}  // namespace shoal
