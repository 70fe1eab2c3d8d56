// Weights into panels, and rows out of them again.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "packed.h"
#include "pool.h"

namespace shoal {
namespace {

constexpr int64_t kChunk = 256;  // values of a row that are converted, checked and spread at a time

struct Source {
  const char* values;
  int32_t dtype;
  int64_t num_rows;
  int64_t row_stride;

  const char* at(int64_t row, int64_t input) const {
    return values + (row * row_stride + input) * (dtype == SHOAL_F32 ? 4 : 2);
  }
};

// A mapped file may place values anywhere.
template <class Value>
Value value_at(const char* from, int64_t i) {
  Value value;
  std::memcpy(&value, from + i * static_cast<int64_t>(sizeof value), sizeof value);
  return value;
}

void convert(const Source& source, const char* from, int64_t num_values, float* to) {
  if (source.dtype == SHOAL_F32) {
    std::memcpy(to, from, num_values * sizeof(float));
  } else if (source.dtype == SHOAL_BF16) {
    for (int64_t i = 0; i < num_values; ++i) to[i] = from_bf16(value_at<Bf16>(from, i));
  } else {
    for (int64_t i = 0; i < num_values; ++i) to[i] = from_f16(value_at<uint16_t>(from, i));
  }
}

void convert(const Source& source, const char* from, int64_t num_values, Bf16* to) {
  if (source.dtype == SHOAL_BF16) {
    std::memcpy(to, from, num_values * sizeof(Bf16));
  } else if (source.dtype == SHOAL_F32) {
    for (int64_t i = 0; i < num_values; ++i) to[i] = to_bf16(value_at<float>(from, i));
  } else {
    for (int64_t i = 0; i < num_values; ++i) to[i] = to_bf16(from_f16(value_at<uint16_t>(from, i)));
  }
}

bool is_finite(const float* values, int64_t num_values) {
  uint32_t num_bad = 0;
  for (int64_t i = 0; i < num_values; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    num_bad += (bits & 0x7f800000u) == 0x7f800000u;
  }
  return num_bad == 0;
}

bool is_finite(const Bf16* values, int64_t num_values) {
  uint16_t num_bad = 0;  // of at most kChunk
  for (int64_t i = 0; i < num_values; ++i) num_bad += (values[i] & 0x7f80u) == 0x7f80u;
  return num_bad == 0;
}

// Rows [first_row, + num_rows) into one panel; false where a value is not finite.
template <class Value>
bool pack_panel(const Source& source, int64_t first_row, int64_t num_inputs, Value* panel) {
  constexpr int64_t step = Packed<Value>::kStepInputs;
  const int64_t num_rows = std::min<int64_t>(kPanelWidth, source.num_rows - first_row);
  const int64_t padded = Packed<Value>::padded_inputs(num_inputs);
  if (num_rows < kPanelWidth) std::memset(panel, 0, panel_size<Value>(num_inputs) * sizeof(Value));
  bool finite = true;
  for (int64_t input = 0; input < padded; input += kChunk) {
    const int64_t num_padded = std::min(kChunk, padded - input);
    const int64_t num_values = std::min(kChunk, std::max<int64_t>(0, num_inputs - input));
    for (int64_t row = 0; row < num_rows; ++row) {
      Value values[kChunk];
      convert(source, source.at(first_row + row, input), num_values, values);
      finite &= is_finite(values, num_values);
      std::fill(values + num_values, values + num_padded, Value{});
      Value* out = panel + offset_in_panel<Value>(row, input);
      for (int64_t i = 0; i < num_padded; i += step) {
        std::memcpy(out + i * kPanelWidth, values + i, step * sizeof(Value));
      }
    }
  }
  return finite;
}

template <class Value>
bool pack(shoal_pool* pool, const Source& source, int64_t num_inputs, int64_t first_panel,
          int64_t panel_step, Value* panels) {
  const int64_t num_panels = (source.num_rows + kPanelWidth - 1) / kPanelWidth;
  std::atomic<bool> finite{true};
  parallel(pool, num_panels, [&](int64_t index, int) {
    Value* panel = panels + (first_panel + index * panel_step) * panel_size<Value>(num_inputs);
    if (!pack_panel(source, index * kPanelWidth, num_inputs, panel)) finite.store(false);
  });
  return finite.load();
}

template <class Value>
void unpack_row(const shoal_matrix* matrix, int64_t row, float* out) {
  constexpr int64_t step = Packed<Value>::kStepInputs;
  const Value* panel = static_cast<const Value*>(matrix->panels) +
                       row / kPanelWidth * panel_size<Value>(matrix->num_inputs);
  const Value* first = panel + offset_in_panel<Value>(row % kPanelWidth, 0);
  for (int64_t input = 0; input < matrix->num_inputs; ++input) {
    out[input] = to_float(first[input / step * step * kPanelWidth + input % step]);
  }
}

}  // namespace
}  // namespace shoal

extern "C" {

int64_t shoal_packed_bytes(int32_t dtype, int64_t num_outputs, int64_t num_inputs) {
  const int64_t num_panels = (num_outputs + shoal::kPanelWidth - 1) / shoal::kPanelWidth;
  return dtype == SHOAL_F32 ? num_panels * shoal::panel_size<float>(num_inputs) * 4
                            : num_panels * shoal::panel_size<shoal::Bf16>(num_inputs) * 2;
}

int shoal_pack(shoal_pool* pool, void* panels, int32_t dtype, int64_t num_inputs,
               int64_t first_panel, int64_t panel_step, const void* src, int32_t src_dtype,
               int64_t num_rows, int64_t row_stride) {
  const shoal::Source source{static_cast<const char*>(src), src_dtype, num_rows, row_stride};
  if (dtype == SHOAL_F32) {
    return shoal::pack(pool, source, num_inputs, first_panel, panel_step,
                       static_cast<float*>(panels));
  }
  return shoal::pack(pool, source, num_inputs, first_panel, panel_step,
                     static_cast<shoal::Bf16*>(panels));
}

void shoal_unpack_rows(shoal_pool* pool, const shoal_matrix* matrix, const int64_t* rows,
                       int64_t num_rows, float* out) {
  constexpr int64_t task_rows = 8;
  shoal::parallel(pool, (num_rows + task_rows - 1) / task_rows, [&](int64_t index, int) {
    const int64_t end = std::min(num_rows, (index + 1) * task_rows);
    for (int64_t i = index * task_rows; i < end; ++i) {
      float* to = out + i * matrix->num_inputs;
      if (rows[i] < 0) {
        std::fill(to, to + matrix->num_inputs, 0.0f);
      } else if (matrix->dtype == SHOAL_F32) {
        shoal::unpack_row<float>(matrix, rows[i], to);
      } else {
        shoal::unpack_row<shoal::Bf16>(matrix, rows[i], to);
      }
    }
  });
}

}  // extern "C"
