// Rows of activations times a packed weight, with bias or SwiGLU behind it.
//
// Rows are split into groups that fill a register tile, groups into blocks, panels into ranges; a task is
// one block times one range. Few rows (one group) read each panel once from memory, straight
// through. Many rows take a chunk of a panel for one group after the other while it lies in the
// first cache, and meanwhile fetch the next chunk. Nothing of this changes a chain of sums, see
// linear_tile.h.
#include <algorithm>
#include <cstring>

#include "linear_tile.h"
#include "pool.h"
#if defined(SHOAL_ISA_AMX) || defined(SHOAL_ISA_EMULATED_AMX)
#include "linear_amx.h"
#endif

namespace shoal {
namespace {

constexpr int64_t kBlockRows = 96;    // their activations lie in the second cache
constexpr int64_t kStripPanels = 8;   // whose sums are kept while inputs are taken chunk by chunk
constexpr int64_t kChunkSteps = 256;  // 16 or 32 KiB of a panel: half of the first cache
constexpr int64_t kTaskBytes = 1 << 17;  // of weights, at least: worth a thread's while
constexpr int64_t kTasksPerThread = 16;  // at most: who is held up leaves the rest to others
constexpr int64_t kInlineValues = 1 << 15;  // of activations, that one thread makes ready

constexpr int64_t kSumsStride = kStripPanels * kPanelWidth;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// num_parts ranges of [0, size), as even as they can be.
struct Split {
  int64_t size, num_parts;
  int64_t first(int64_t part) const { return part * size / num_parts; }
  int64_t length(int64_t part) const { return first(part + 1) - first(part); }
};

struct Call {
  shoal_pool* pool;
  const shoal_matrix* matrix;
  const float* x;
  int64_t x_stride;
  int64_t num_rows;
  float* out;
  int64_t out_stride;
  bool is_swiglu;
};

void convert(const float* from, int64_t num_values, float* to) {
  std::memcpy(to, from, num_values * sizeof(float));
}

// to has room for whole Vecs. A template, because not every Activation is rounded.
template <class Rounded>
void convert(const float* from, int64_t num_values, Rounded* to) {
  const int64_t whole = num_values / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_activations(to + i, load(from + i));
  if (whole < num_values) {
    float rest[kLanes] = {};
    std::memcpy(rest, from + whole, (num_values - whole) * sizeof(float));
    store_activations(to + whole, load(rest));
  }
}

template <class Value>
class Product {
 public:
  using Input = typename Weights<Value>::Input;

  explicit Product(const Call& call)
      : call_(call),
        padded_(Packed<Value>::padded_inputs(call.matrix->num_inputs)),
        num_panels_(call.matrix->num_outputs / kPanelWidth),
        groups_{call.num_rows, ceil_div(call.num_rows, kGroupRows)},
        blocks_{groups_.num_parts, ceil_div(groups_.num_parts, kBlockGroups)},
        ranges_{ceil_div(num_panels_, 2), num_ranges()},
        inputs_(static_cast<Input*>(scratch(call.pool, Scratch::kActivations,
                                            call.num_rows * padded_ * sizeof(Input)))) {}

  void run() {
    const int64_t task_groups = ceil_div(kInlineValues, kGroupRows * padded_);
    parallel(call_.pool, ceil_div(groups_.num_parts, task_groups), [&](int64_t index, int) {
      const int64_t end = std::min(groups_.num_parts, (index + 1) * task_groups);
      for (int64_t group = index * task_groups; group < end; ++group) write_inputs(group);
    });
    parallel(call_.pool, blocks_.num_parts * ranges_.num_parts, [&](int64_t index, int) {
      const int64_t range = index % ranges_.num_parts;
      const int64_t first = 2 * ranges_.first(range);
      const int64_t end = std::min(num_panels_, 2 * ranges_.first(range + 1));
      for (int64_t panel = first; panel < end; panel += kStripPanels) {
        run_strip(index / ranges_.num_parts, panel, std::min(kStripPanels, end - panel));
      }
    });
  }

 private:
  static constexpr int64_t kGroupRows = Tiles<Value>::kRows;
  static constexpr int64_t kBlockGroups = kBlockRows / kGroupRows;
  static constexpr int64_t kStepInputs = Packed<Value>::kStepInputs;
  static constexpr int64_t kStepBytes = kStepInputs * kPanelWidth * sizeof(Value);

  int64_t panel_bytes() const { return padded_ * kPanelWidth * sizeof(Value); }
  int64_t num_steps() const { return padded_ / kStepInputs; }
  const char* panel_at(int64_t panel, int64_t step) const {
    return static_cast<const char*>(call_.matrix->panels) + panel * panel_bytes() +
           step * kStepBytes;
  }

  int64_t num_ranges() const {
    const int64_t num_threads = shoal_pool_size(call_.pool);
    const int64_t by_blocks = std::max<int64_t>(1, kTasksPerThread / blocks_.num_parts);
    const int64_t by_bytes = num_panels_ * panel_bytes() / (kTaskBytes * num_threads);
    const int64_t wanted = num_threads * std::max<int64_t>(1, std::min(by_blocks, by_bytes));
    return num_threads == 1 ? 1 : std::min(wanted, ceil_div(num_panels_, 2));
  }

  // A group's activations as tiles read them.
  void write_inputs(int64_t group) {
    constexpr int64_t kPiece = 256;
    const int64_t num_rows = groups_.length(group);
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* x = call_.x + (groups_.first(group) + row) * call_.x_stride;
      for (int64_t input = 0; input < padded_; input += kPiece) {
        const int64_t num_padded = std::min(kPiece, padded_ - input);
        const int64_t num_values =
            std::min(num_padded, std::max<int64_t>(0, call_.matrix->num_inputs - input));
        Input values[kPiece];
        convert(x + input, num_values, values);
        std::fill(values + num_values, values + num_padded, Input{});
        write_piece(values, num_padded, num_rows, at(group, row, input));
      }
    }
  }

  static void write_piece(const Input* values, int64_t num_values, int64_t num_rows, Input* out) {
    if (Tiles<Value>::kIsInterleaved && num_rows > 1) {
      for (int64_t i = 0; i < num_values; i += kStepInputs) {
        std::memcpy(out + i * num_rows, values + i, kStepInputs * sizeof(Input));
      }
    } else {
      std::memcpy(out, values, num_values * sizeof(Input));
    }
  }

  // Where a row of a group has the input, which starts a step.
  Input* at(int64_t group, int64_t row, int64_t input) const {
    Input* inputs = inputs_ + groups_.first(group) * padded_;
    return Tiles<Value>::kIsInterleaved
               ? inputs + input * groups_.length(group) + row * kStepInputs
               : inputs + row * padded_ + input;
  }

  // The group's part of a tile.
  void set_group(Tile* tile, int64_t group, int64_t first_step) const {
    tile->num_rows = groups_.length(group);
    tile->inputs = at(group, 0, first_step * kStepInputs);
    tile->input_stride = padded_;
  }

  void run_strip(int64_t block, int64_t first_panel, int64_t num_panels) {
    alignas(kCacheLineBytes) float sums[kBlockRows * kSumsStride];
    const int64_t first_group = blocks_.first(block);
    if (groups_.num_parts == 1) {
      read_once(first_panel, num_panels, sums);
    } else {
      read_in_chunks(first_group, blocks_.length(block), first_panel, num_panels, sums);
    }
    const int64_t first_row = groups_.first(first_group);
    const int64_t num_rows = groups_.first(blocks_.first(block + 1)) - first_row;
    for (int64_t row = 0; row < num_rows; ++row) {
      float* out = call_.out + (first_row + row) * call_.out_stride;
      if (call_.is_swiglu) {
        finish_swiglu(sums + row * kSumsStride, first_panel, num_panels, out);
      } else {
        finish(sums + row * kSumsStride, first_panel, num_panels, out);
      }
    }
  }

  // One group of rows: each panel straight through, what is kAheadBytes behind fetched ahead.
  void read_once(int64_t first_panel, int64_t num_panels, float* sums) {
    const int64_t num_rows = groups_.length(0);
    const int64_t end = num_steps();
    const int64_t side_by_side = num_rows <= Tiles<Value>::kRowsOfTwoPanels ? 2 : 1;
    const int64_t ahead_bytes = kAheadBytes[side_by_side - 1];
    const int64_t near_end = std::max<int64_t>(0, end - ahead_bytes / kStepBytes);
    for (int64_t i = 0; i < num_panels; i += side_by_side) {
      const int64_t panel = first_panel + i;
      const int64_t num_taken = std::min(side_by_side, num_panels - i);
      const TileFunction multiply = Tiles<Value>::function(num_rows, num_taken);
      Tile tile{};
      tile.panel_bytes = panel_bytes();
      tile.sums = sums + i * kPanelWidth;
      tile.sums_stride = kSumsStride;
      tile.ahead_step_bytes = kStepBytes;
      tile.is_first = true;
      set_group(&tile, 0, 0);
      tile.panel = panel_at(panel, 0);
      tile.num_steps = near_end;
      tile.ahead = panel_at(panel, 0) + ahead_bytes;
      multiply(tile);
      tile.is_first = false;
      set_group(&tile, 0, near_end);
      tile.panel = panel_at(panel, near_end);
      tile.num_steps = end - near_end;
      tile.ahead = panel_at(panel + num_taken, 0);
      multiply(tile);
    }
  }

  void read_in_chunks(int64_t first_group, int64_t num_groups, int64_t first_panel,
                      int64_t num_panels, float* sums) {
    for (int64_t step = 0; step < num_steps(); step += kChunkSteps) {
      const int64_t chunk_steps = std::min(kChunkSteps, num_steps() - step);
      for (int64_t i = 0; i < num_panels; ++i) {
        const int64_t panel = first_panel + i;
        const bool is_last = i + 1 == num_panels;
        const bool is_end = is_last && step + chunk_steps == num_steps();
        const char* next = is_end    ? panel_at(panel + 1, 0)
                           : is_last ? panel_at(first_panel, step + chunk_steps)
                                     : panel_at(panel + 1, step);
        Tile tile{};
        tile.panel = panel_at(panel, step);
        tile.num_steps = chunk_steps;
        tile.sums_stride = kSumsStride;
        tile.is_first = step == 0;
        tile.ahead_step_bytes = ceil_div(kStepBytes, num_groups);
        for (int64_t group = 0; group < num_groups; ++group) {
          const int64_t row = groups_.first(first_group + group) - groups_.first(first_group);
          set_group(&tile, first_group + group, step);
          tile.sums = sums + row * kSumsStride + i * kPanelWidth;
          tile.ahead = next + group * chunk_steps * kStepBytes / num_groups;
          Tiles<Value>::function(tile.num_rows, 1)(tile);
        }
      }
    }
  }

  Vec with_bias(const float* sums, int64_t output) const {
    const float* bias = call_.matrix->bias;
    return bias == nullptr ? load(sums) : add(load(sums), load(bias + output));
  }

  void finish(const float* sums, int64_t first_panel, int64_t num_panels, float* out) {
    const int64_t first = first_panel * kPanelWidth;
    for (int64_t i = 0; i < num_panels * kPanelWidth; i += kLanes) {
      store(out + first + i, with_bias(sums + i, first + i));
    }
  }

  void finish_swiglu(const float* sums, int64_t first_panel, int64_t num_panels, float* out) {
    for (int64_t panel = 0; panel < num_panels; panel += 2) {
      const int64_t first = (first_panel + panel) * kPanelWidth;
      for (int64_t i = 0; i < kPanelWidth; i += kLanes) {
        const float* gates = sums + panel * kPanelWidth + i;
        const Vec gate = with_bias(gates, first + i);
        const Vec up = with_bias(gates + kPanelWidth, first + kPanelWidth + i);
        store(out + first / 2 + i, mul(silu(gate), up));
      }
    }
  }

  const Call call_;
  const int64_t padded_;
  const int64_t num_panels_;
  const Split groups_;  // of rows
  const Split blocks_;  // of groups
  const Split ranges_;  // of pairs of panels
  Input* const inputs_;
};

void multiply(const Call& call) {
  if (call.num_rows <= 0) return;
  if (call.matrix->dtype == SHOAL_F32) {
    Product<float>(call).run();
  } else {
    Product<Bf16>(call).run();
  }
}

}  // namespace
}  // namespace shoal

extern "C" {

void shoal_linear(shoal_pool* pool, const shoal_matrix* matrix, const float* x, int64_t x_stride,
                  int64_t num_rows, float* out, int64_t out_stride) {
  shoal::multiply({pool, matrix, x, x_stride, num_rows, out, out_stride, false});
}

void shoal_linear_swiglu(shoal_pool* pool, const shoal_matrix* matrix, const float* x,
                         int64_t x_stride, int64_t num_rows, float* out, int64_t out_stride) {
  shoal::multiply({pool, matrix, x, x_stride, num_rows, out, out_stride, true});
}

}  // extern "C"
