// How a packed weight lies in memory: panels of kPanelWidth outputs, one behind the other, each a
// sequence of steps. A step holds, for every output of the panel in turn, the next kStepInputs
// inputs: two of bf16, one of float32.
#pragma once

#include <cstdint>

#include "vec.h"

namespace shoal {

// Inputs of a bf16 panel are filled up with zeros to a multiple of this.
#if defined(SHOAL_ISA_AMX) || defined(SHOAL_ISA_EMULATED_AMX)
constexpr int64_t kBf16Inputs = 32;  // a tile's depth
#else
constexpr int64_t kBf16Inputs = 2;
#endif

template <class Value>
struct Packed;

template <>
struct Packed<float> {
  static constexpr int64_t kStepInputs = 1;
  static int64_t padded_inputs(int64_t num_inputs) { return num_inputs; }
};

template <>
struct Packed<Bf16> {
  static constexpr int64_t kStepInputs = 2;
  static int64_t padded_inputs(int64_t num_inputs) {
    return (num_inputs + kBf16Inputs - 1) / kBf16Inputs * kBf16Inputs;
  }
};

// Values of one panel.
template <class Value>
int64_t panel_size(int64_t num_inputs) {
  return Packed<Value>::padded_inputs(num_inputs) * kPanelWidth;
}

// Where in its panel an output's input lies.
template <class Value>
int64_t offset_in_panel(int64_t output, int64_t input) {
  constexpr int64_t step = Packed<Value>::kStepInputs;
  return (input / step * kPanelWidth + output) * step + input % step;
}

}  // namespace shoal
