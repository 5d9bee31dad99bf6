// The kernels of one instruction set, as a table. Each kernel file adds its own.
#pragma once

#include "quire.h"

namespace quire {

struct Kernels {
    int (*pack)(const quire_weight *, const void *, int64_t);
    int (*linear)(const quire_weight *, int, int64_t, const void *, int64_t, const void *, void *, int64_t);
    int (*weight_rows)(const quire_weight *, int, int64_t, const int64_t *, void *);
};

}  // namespace quire

#define QUIRE_DECLARE(isa)                     \
    namespace isa {                            \
    void add_linear(quire::Kernels &kernels);  \
    }
QUIRE_DECLARE(avx512)
QUIRE_DECLARE(avx2)
QUIRE_DECLARE(neon)
QUIRE_DECLARE(generic)
