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

#define QUIRE_VERSION 1

enum quire_type { QUIRE_F32 = 0, QUIRE_BF16 = 1, QUIRE_F16 = 2, QUIRE_E4M3 = 3, QUIRE_E5M2 = 4, QUIRE_I8 = 5 };

int quire_version(void);

/* The instruction set in use ("avx512", "avx2", "neon", "generic"), and those that this machine can run, by commas. */
const char *quire_isa(void);
const char *quire_isas(void);
/* Use another one of them. Only for tests: weights packed before stay valid. */
int quire_set_isa(const char *name);

/* Threads of the pool, the calling one included. */
int quire_set_threads(int count);
int quire_threads(void);

/* ---- linear.cpp: products with packed weights ------------------------------------------------------------------- */

enum quire_form { QUIRE_DENSE = 0, QUIRE_INT8 = 1, QUIRE_INT4 = 2 };

/* A packed weight [outputs, inputs]. data: quire_packed_bytes() bytes, aligned to 64. The rest depends on the form:
 * DENSE: type F32, BF16, F16 or E4M3; scales NULL, or one float per output (E4M3).
 * INT8:  scales one float per output.
 * INT4:  scales [groups, padded outputs] floats, zeros the same in bytes; padded outputs = outputs rounded up to 32. */
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

/* out[r, :] = w[ids[r], :] as `type`. */
int quire_weight_rows(const quire_weight *weight, int type, int64_t rows, const int64_t *ids, void *out);

#ifdef __cplusplus
}
#endif
#endif
