// The C ABI of the CPU kernels: what Python calls, and what the kernels call of each other.
//
// One library is built per instruction set (avx2, avx512, amx) from the same sources; each holds all
// of it. No torch, no allocation in a step but scratch that the pool keeps. Matrices are row-major,
// sizes count values, not bytes, unless a name says bytes. The one decision behind it: a row's bits
// depend on that row alone. Every sum runs over its inputs in one fixed order, whatever the number of
// rows, the chunking of a prompt or the number of threads.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SHOAL_API __attribute__((visibility("default")))

enum { SHOAL_F32 = 0, SHOAL_BF16 = 1, SHOAL_F16 = 2 };  // F16 is only ever packed from

// --- what this library is ------------------------------------------------------------------------

SHOAL_API const char* shoal_isa(void);          // "avx2", "avx512", "amx", "emulated", "emulated_amx"
SHOAL_API const char* shoal_source_hash(void);  // of the sources it was built from
SHOAL_API int shoal_panel_width(void);          // outputs of a panel
SHOAL_API int shoal_prepare(void);  // once a process, first: 0 where the system refuses (AMX tiles)

// --- threads (threads.cpp) -----------------------------------------------------------------------

// Threads that share a step's work: the caller and num_threads - 1 others, which spin briefly between
// kernels, then park. One caller at a time.
typedef struct shoal_pool shoal_pool;
SHOAL_API shoal_pool* shoal_pool_new(int num_threads);
SHOAL_API void shoal_pool_delete(shoal_pool* pool);
SHOAL_API int shoal_pool_size(const shoal_pool* pool);

// --- packed weights (packing.cpp, linear.cpp) ----------------------------------------------------

// A weight [num_outputs, num_inputs] packed once into panels of shoal_panel_width() outputs, each one
// sequential stream of pairs of inputs; the only copy there is, for decode, prefill and embedding.
typedef struct {
  const void* panels;
  const float* bias;    // [num_outputs], or null
  int64_t num_outputs;  // as computed: a multiple of the panel width, padding is zero
  int64_t num_inputs;   // as given; packing pads it
  int32_t dtype;        // SHOAL_F32 or SHOAL_BF16
} shoal_matrix;

SHOAL_API int64_t shoal_packed_bytes(int32_t dtype, int64_t num_outputs, int64_t num_inputs);

// Packs num_rows rows (outputs) of src, row_stride values apart, into panels first_panel,
// first_panel + panel_step, ... The last panel is filled up with zeros. panels is 64-byte aligned.
// Returns 1, or 0 where a value is not finite.
SHOAL_API int shoal_pack(shoal_pool* pool, void* panels, int32_t dtype, int64_t num_inputs,
                         int64_t first_panel, int64_t panel_step, const void* src,
                         int32_t src_dtype, int64_t num_rows, int64_t row_stride);

// Rows (outputs) of a packed weight as float32: out[i] = row rows[i]; a row < 0 gives zeros.
SHOAL_API void shoal_unpack_rows(shoal_pool* pool, const shoal_matrix* matrix, const int64_t* rows,
                                 int64_t num_rows, float* out);

// out[num_rows, num_outputs] = x[num_rows, num_inputs] @ weight.T + bias, rows x_stride and
// out_stride values apart.
SHOAL_API void shoal_linear(shoal_pool* pool, const shoal_matrix* matrix, const float* x,
                            int64_t x_stride, int64_t num_rows, float* out, int64_t out_stride);

// The gate-up product with SwiGLU behind it. Panels alternate: gate 0, up 0, gate 1, up 1, ...
// out[num_rows, num_outputs / 2] = silu(x @ gate.T) * (x @ up.T).
SHOAL_API void shoal_linear_swiglu(shoal_pool* pool, const shoal_matrix* matrix, const float* x,
                                   int64_t x_stride, int64_t num_rows, float* out,
                                   int64_t out_stride);

// --- elementwise (elementwise.cpp) ---------------------------------------------------------------

// residual += delta (where delta is not null), then out = rms_norm(residual) * weight, row by row.
SHOAL_API void shoal_add_rms_norm(shoal_pool* pool, float* residual, const float* delta,
                                  const float* weight, float eps, int64_t num_rows, int64_t hidden,
                                  float* out);

// --- paged attention (attention.cpp) -------------------------------------------------------------

typedef struct {
  int32_t num_heads;     // of this rank
  int32_t num_kv_heads;  // of this rank; num_heads is a multiple
  int32_t head_dim;      // 32, 64 or 128
  int32_t block_size;    // slots of a block: 16 or 32
  int32_t dtype;         // of the cache: SHOAL_F32 or SHOAL_BF16
} shoal_heads;

// One sequence's rows of a step: rows [first_row, + num_tokens) stand at positions [first_position,
// + num_tokens) and see every position up to their own.
typedef struct {
  int64_t first_row;
  int64_t num_tokens;
  int64_t first_position;
  const int32_t* block_table;  // block of position p: block_table[p / block_size], counted in
                               // blocks of shoal_cache_bytes(heads, 1) from a layer's keys on
} shoal_span;

// Bytes of one layer's keys, and as many of its values, 64-byte aligned, for num_blocks blocks.
SHOAL_API int64_t shoal_cache_bytes(const shoal_heads* heads, int64_t num_blocks);

// Rotates query and key (halves layout), writes key and value to the cache, attends.
//   qkv        [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]; left rotated
//   cos, sin   [num_positions, head_dim / 2], indexed by a row's position
//   out        [num_rows, num_heads * head_dim]
// The spans cover every row once. All rows' keys are written before any row attends.
SHOAL_API void shoal_attend(shoal_pool* pool, const shoal_heads* heads, void* keys, void* values,
                            const shoal_span* spans, int64_t num_spans, float* qkv,
                            const float* cos, const float* sin, float* out);

// --- collectives (all_reduce.cpp) ----------------------------------------------------------------

// How the ranks of a model meet. Both return 0, or 1 when the group is broken. Called by one thread.
typedef struct {
  void* context;
  int32_t rank;
  int32_t size;
  // x [num_values] becomes the sum over ranks, in rank order.
  int (*all_reduce)(void* context, float* x, int64_t num_values);
  // On rank 0, out [size, num_values] gets every rank's x; elsewhere out is null.
  int (*gather)(void* context, const float* x, int64_t num_values, float* out);
} shoal_collectives;

// A group in shared memory: size slots of num_slot_values floats, twice, behind a header. The memory
// is shared, 64-byte aligned, and zero before the first rank joins.
typedef struct shoal_group shoal_group;
SHOAL_API int64_t shoal_group_bytes(int32_t size, int64_t num_slot_values);
// A rank that waits longer than timeout_ms for another one breaks the group.
SHOAL_API shoal_group* shoal_group_join(void* memory, int32_t rank, int32_t size,
                                        int64_t num_slot_values, int64_t timeout_ms);
// From this rank's next wait on it breaks the group after timeout_ms. From any thread.
SHOAL_API void shoal_group_limit_silence(shoal_group* group, int64_t timeout_ms);
SHOAL_API void shoal_group_leave(shoal_group* group);  // frees the handle, not the memory
// Says that a rank is gone: every rank's waits end, now and for ever. From any thread.
SHOAL_API void shoal_group_break(shoal_group* group, int32_t gone_rank);
enum { SHOAL_WHOLE = 0, SHOAL_GONE = 1, SHOAL_SILENT = 2, SHOAL_OUT_OF_STEP = 3 };
// Why the group is broken and, in *rank, through whom: as the first one that noticed has it.
SHOAL_API int shoal_group_failure(const shoal_group* group, int32_t* rank);
SHOAL_API int shoal_group_all_reduce(void* group, float* x, int64_t num_values);
SHOAL_API int shoal_group_gather(void* group, const float* x, int64_t num_values, float* out);

// --- the whole pass (decoder.cpp) ----------------------------------------------------------------

typedef struct {
  const float* input_norm;  // [hidden]
  shoal_matrix qkv;         // query, key, value heads of this rank
  shoal_matrix output;
  const float* ffn_norm;    // [hidden]
  shoal_matrix gate_up;     // panels alternate, see shoal_linear_swiglu
  shoal_matrix down;
  void* keys;
  void* values;
} shoal_layer;

typedef struct {
  int64_t hidden;
  int64_t ffn;  // of this rank, padded to whole panels
  int64_t num_layers;
  float eps;
  shoal_heads heads;
  const shoal_layer* layers;
  shoal_matrix embedding;   // this rank's rows of the vocabulary
  int64_t first_token_id;   // of the embedding's first row
  int64_t num_token_ids;    // rows of the embedding that are tokens
  const float* final_norm;  // [hidden]
  shoal_matrix head;        // may be the embedding
  const float* cos;         // [num_positions, head_dim / 2]
  const float* sin;
} shoal_decoder;

typedef struct {
  int64_t num_rows;
  const int64_t* token_ids;  // [num_rows]
  const shoal_span* spans;
  int64_t num_spans;
  const int64_t* sampled_rows;  // [num_sampled]
  int64_t num_sampled;
  float* logits;  // rank 0: [num_sampled, size * head.num_outputs]
} shoal_step;

// One rank's pass over a step; 0, or 1 when the group is broken. Ranks in a group pass together.
SHOAL_API int shoal_forward(shoal_pool* pool, const shoal_decoder* decoder,
                            const shoal_collectives* collectives, const shoal_step* step);

// --- sampling (sampling.cpp) ---------------------------------------------------------------------

// How one row is sampled; the order of steps and their meaning are serve.runner.sampler's.
typedef struct {
  float temperature;  // 0: the best
  float top_p;
  float min_p;
  float repetition_penalty;
  float presence_penalty;
  float frequency_penalty;
  int32_t top_k;        // 0: all
  int32_t num_logprobs; // alternatives wanted; -1: no logprobs
  double number;        // in [0, 1): the draw
  const uint32_t* mask; // allowed ids, bit i % 32 of word i / 32; or null
  const int32_t* prompt_ids;  // distinct
  int64_t num_prompt_ids;
  const int32_t* output_ids;  // distinct, with their counts
  const int32_t* output_counts;
  int64_t num_output_ids;
  const int32_t* bias_ids;
  const float* biases;
  int64_t num_biases;
  const int32_t* held_back_ids;  // not allowed here
  int64_t num_held_back_ids;
} shoal_sampling;

// Samples row i of logits [num_rows, stride], of which ids [0, num_ids) exist, into token_ids[i].
// errors[i]: 0, 1 (logits are not finite) or 2 (no token is allowed). Where logprobs are wanted,
// logprobs[i] and the first num_logprobs of top_ids[i], top_logprobs[i] [num_rows, max_logprobs].
SHOAL_API void shoal_sample(shoal_pool* pool, const float* logits, int64_t stride, int64_t num_ids,
                            const shoal_sampling* rows, int64_t num_rows, int32_t* token_ids,
                            int32_t* errors, float* logprobs, int32_t* top_ids,
                            float* top_logprobs, int64_t max_logprobs);

#ifdef __cplusplus
}
#endif
