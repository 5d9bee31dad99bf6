/* Quire's native kernels: one plain C interface, no torch, no Python.
 *
 * All kernels keep one contract: row r of a result depends on row r of the input (and, in attention, on that row's own
 * sequence) only - never on the number of rows, on how a caller cuts them into calls, or on the number of threads. Sums run
 * over the inputs in ascending order in one float32 chain per output, so the bits are the same on every instruction set that
 * fuses multiply and add (AVX2, AVX-512, NEON).
 *
 * Every function returns 0, or -1 for arguments it does not support. Pointers need no alignment unless it is said.
 */
#ifndef QUIRE_H
#define QUIRE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QUIRE_VERSION 2

enum quire_type { QUIRE_F32 = 0, QUIRE_BF16 = 1, QUIRE_F16 = 2, QUIRE_E4M3 = 3, QUIRE_E5M2 = 4, QUIRE_I8 = 5 };

int quire_version(void);

/* The instruction set in use ("amx", "avx512_bf16", "avx512", "avx2", "neon", "generic"), and those that this machine can run,
 * by commas, the best first. "amx-emulated" comes last and is for tests: AMX's way in plain C++. */
const char *quire_isa(void);
const char *quire_isas(void);
/* Use another one of them. Weights packed before stay valid. */
int quire_set_isa(const char *name);
/* Why a set that the processor has is not among them; empty where there is nothing to say. */
const char *quire_isa_note(void);
/* 0 if the set's products agree with the best one's (the best one's with the next one's) where every order of the sums gives
 * the same. */
int quire_check_isa(const char *name);

/* Threads of the pool, the calling one included. */
int quire_set_threads(int count);
int quire_threads(void);

/* ---- linear.cpp: products with packed weights ------------------------------------------------------------------- */

enum quire_form { QUIRE_DENSE = 0, QUIRE_INT8 = 1, QUIRE_INT4 = 2 };

/* A packed weight [outputs, inputs]. data: quire_packed_bytes() bytes, aligned to 64. The rest depends on the form:
 * DENSE: type F32, BF16, F16 or E4M3; scales NULL, or one float per output (E4M3).
 * INT8:  scales one float per output.
 * INT4:  groups of group_size inputs, a multiple of 32 that divides inputs; scales [panels, groups, 32] floats, zeros the same
 *        in bytes, for panels of 32 outputs, the last one filled up. */
typedef struct quire_weight {
    int32_t form, type;
    int64_t outputs, inputs, group_size;
    void *data;
    const float *scales;
    const uint8_t *zeros;
} quire_weight;

int64_t quire_packed_bytes(int form, int type, int64_t outputs, int64_t inputs);

/* Fill weight->data from `source` [outputs, inputs], rows source_stride elements apart: `type` values for DENSE, int8 for
 * INT8, and for INT4 bytes that hold inputs 2i (low half) and 2i+1, rows source_stride bytes apart. */
int quire_pack(const quire_weight *weight, const void *source, int64_t source_stride);

/* y[r, o] = sum_i x[r, i] w[o, i] + bias[o]; x and y of `type` (F32, BF16, F16), row strides in elements; bias of `type` or
 * NULL. INT8 and INT4 take x as int8 with one scale per row (and group). */
int quire_linear(const quire_weight *weight, int type, int64_t rows, const void *x, int64_t x_stride, const void *bias,
                 void *y, int64_t y_stride);

/* The same x times several weights of one form, type, number of inputs and group size: x is prepared once. */
int quire_linears(int count, const quire_weight *const *weights, int type, int64_t rows, const void *x, int64_t x_stride,
                  const void *const *biases, void *const *ys, const int64_t *y_strides);

/* out[r, :] = w[ids[r], :] as `type`. */
int quire_weight_rows(const quire_weight *weight, int type, int64_t rows, const int64_t *ids, void *out);

/* ---- rows.cpp: what acts on each row by itself ------------------------------------------------------------------ */

/* Types F32, BF16 or F16, weights of any of them. Strides are in elements; results lie end to end unless it is said. */

/* out = x / sqrt(mean(x^2) + eps) * (weight + offset) over rows of `size`. */
int quire_rms_norm(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride, const void *weight,
                   float eps, float offset, void *out);
/* weight and bias may be NULL. */
int quire_layer_norm(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride,
                     const void *weight, const void *bias, float eps, void *out);

enum quire_activations { QUIRE_SILU = 0, QUIRE_GELU = 1, QUIRE_GELU_TANH = 2, QUIRE_RELU = 3 };
/* out = kind(x), times `up` where that is not NULL. */
int quire_activation(int type, int kind, int64_t rows, int64_t size, const void *x, int64_t stride, const void *up,
                     int64_t up_stride, void *out);

/* out = x + y, `count` numbers each. */
int quire_add(int type, int64_t count, const void *x, const void *y, void *out);

/* out[r] = table[ids[r]], rows of row_bytes, stride_bytes apart in the table. */
int quire_gather_rows(int64_t rows, const int64_t *ids, const void *table, int64_t table_rows, int64_t row_bytes,
                      int64_t stride_bytes, void *out);

/* x [tokens, heads, size] turned by cos, sin [tokens, half], pairs (i, i + half); what is past 2 * half is copied. */
int quire_rope(int type, int64_t tokens, int64_t heads, int64_t size, int64_t half, const void *x, int64_t token_stride,
               int64_t head_stride, const float *cos, const float *sin, void *out);

/* Rows of heads: element i of head h of token t lies at data[t * token + h * head + i]. */
typedef struct quire_heads {
    void *data;
    int64_t token, head;
} quire_heads;

/* Keys and values of one layer, of any type: slot s, head h begin at s * token + h * head. With scales [2, kv_heads] (keys,
 * values) a number x is stored as x / scale and read as stored * scale; eight-bit floats saturate, int8 is held in +-127. */
typedef struct quire_kv {
    int32_t type;
    int64_t kv_heads, size, slots;
    void *keys, *values;
    int64_t k_token, k_head, v_token, v_head;
    const float *scales;
} quire_kv;

/* k, v [tokens, kv_heads, size] of `type` into slots [tokens]. */
int quire_write_kv(const quire_kv *kv, int type, int64_t tokens, const quire_heads *k, const quire_heads *v,
                   const int64_t *slots);
/* The same after turning: q [tokens, heads, size] in place, and k on its way into the cache (k itself stays). */
int quire_rope_and_write(const quire_kv *kv, int type, int64_t tokens, int64_t heads, int64_t half, const quire_heads *q,
                         const quire_heads *k, const quire_heads *v, const float *cos, const float *sin,
                         const int64_t *slots);

/* ---- attention.cpp: causal attention over a cache, or over rows ------------------------------------------------- */

/* q [T, heads, size] and out of `type`, out end to end. Rows starts[s]:starts[s + 1] are the last ones of a sequence of
 * lengths[s] tokens. With tables [sequences, table_stride] token p of sequence s lies in slot
 * tables[s][p / block_size] * block_size + p % block_size of kv; without (NULL) in slot starts[s] + p.
 * softcap 0: none; window 0: none. */
typedef struct quire_attention {
    int32_t type;
    int64_t heads;
    quire_heads q;
    void *out;
    quire_kv kv;
    int64_t sequences;
    const int64_t *starts, *lengths, *tables;
    int64_t table_stride, block_size;
    float scale, softcap;
    int64_t window;
} quire_attention;

int quire_attend(const quire_attention *call);

/* ---- lora.cpp: what the adapter of each row's slot adds ---------------------------------------------------------- */

/* An adapter's matrices for one linear, floats end to end: a [rank, inputs], b [rank, outputs]. a NULL: it has none. */
typedef struct quire_lora_part {
    const float *a, *b;
    int64_t rank;
    float scale;
} quire_lora_part;

/* Those of all slots. */
typedef struct quire_lora_table {
    int64_t inputs, outputs, slots;
    const quire_lora_part *parts;
} quire_lora_table;

/* y[r] += scale * (x[r] a^T) b by the adapter of slots[r]; rows whose slot has none, or is not in the table, stay. */
int quire_lora(const quire_lora_table *table, int type, int64_t rows, const void *x, int64_t x_stride, void *y,
               int64_t y_stride, const int32_t *slots);
/* The same x and slots with several tables. */
int quire_loras(int count, const quire_lora_table *const *tables, int type, int64_t rows, const void *x, int64_t x_stride,
                void *const *ys, const int64_t *y_strides, const int32_t *slots);
/* Given dy: dx [rows, inputs], end to end, 0 where a row has no adapter; das[slot] [rank, inputs] and dbs[slot]
 * [rank, outputs] floats. dx, das, dbs and each of their pointers may be NULL: not wanted. */
int quire_lora_backward(const quire_lora_table *table, int type, int64_t rows, const void *x, int64_t x_stride,
                        const void *dy, int64_t dy_stride, const int32_t *slots, void *dx, float *const *das,
                        float *const *dbs);

/* ---- transposed.cpp: gradients of products with packed weights --------------------------------------------------- */

/* dx[r] = the sum over `count` weights of dys[w][r] w, of all forms and types but of the same inputs. dy_type and type: F32,
 * BF16 or F16. Strides in elements. */
int quire_linears_backward(int count, const quire_weight *const *weights, int dy_type, int type, int64_t rows,
                           const void *const *dys, const int64_t *dy_strides, void *dx, int64_t dx_stride);

/* ---- gradients.cpp: gradients of what acts on each row by itself -------------------------------------------------- */

/* dy and results of the rows' type; results end to end. weight NULL (layer_norm): none. */
int quire_rms_norm_backward(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride,
                            const void *dy, int64_t dy_stride, const void *weight, float eps, float offset, void *dx);
int quire_layer_norm_backward(int type, int weight_type, int64_t rows, int64_t size, const void *x, int64_t stride,
                              const void *dy, int64_t dy_stride, const void *weight, float eps, void *dx);
/* dx and dup may be NULL: not wanted. */
int quire_activation_backward(int type, int kind, int64_t rows, int64_t size, const void *x, int64_t stride, const void *up,
                              int64_t up_stride, const void *dy, int64_t dy_stride, void *dx, void *dup);

/* ---- attention_backward.cpp ----------------------------------------------------------------------------------------- */

/* Of a call without tables and scales, all of one type, whose `out` is not looked at: dy lies as q does; dq [T, heads, size],
 * dk and dv [T, kv_heads, size] end to end. */
int quire_attend_backward(const quire_attention *call, const quire_heads *dy, void *dq, void *dk, void *dv);

/* ---- loss.cpp: sums over a vocabulary of up to 2^22 tokens ---------------------------------------------------------- */

/* x [rows, size] of F32, BF16 or F16, strides in elements. peaks: each row's largest, NaN where there is a NaN; ids: the first
 * place that has it (0 with NaN). */
int quire_peaks(int type, int64_t rows, int64_t size, const void *x, int64_t stride, float *peaks, int64_t *ids);
/* masses: the sum of 2^40 * exp(x - peak), each term rounded to an integer; 0 where the peak is not finite. */
int quire_masses(int type, int64_t rows, int64_t size, const void *x, int64_t stride, float *peaks, int64_t *masses);
/* The same, and slope = softmax(x), less 1 at the row's target: the gradient of minus its log-probability. Of type; may lie
 * where x does. NaN where the peak is not finite. */
int quire_cross_entropy(int type, int64_t rows, int64_t size, const void *x, int64_t stride, const int64_t *targets,
                        float *peaks, int64_t *masses, void *slope, int64_t slope_stride);

/* ---- sampling.cpp ------------------------------------------------------------------------------------------------------ */

/* One token for each row, by that row's numbers: temperature 0 the largest, else a draw by uniform in [0, 1) after min_p
 * (0: off), top_k (0: off) and top_p (1: off). -1 where the largest is not finite. */
int quire_draw(int64_t rows, int64_t size, const float *logits, int64_t stride, const double *temperatures,
               const double *min_ps, const int64_t *top_ks, const double *top_ps, const double *uniforms, int64_t *tokens);

/* ---- replay.cpp: calls that were written down -------------------------------------------------------------------- */

#define QUIRE_MOST_ARGUMENTS 12

/* A call of one of the functions above. Arguments as 64-bit words, a float's bits in the lower half. */
typedef struct quire_call {
    int64_t function;
    int64_t arguments[QUIRE_MOST_ARGUMENTS];
} quire_call;

/* The number of the function quire_<name>; -1: it cannot be written down. */
int quire_function(const char *name);
/* Make the calls in order, until one does not return 0. */
int quire_replay(const quire_call *calls, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
