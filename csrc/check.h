// Whether an instruction set may be used here: the system's permission, and products that are known.
#pragma once

#include "kernels.h"

namespace quire {

// Asks the processor and the system for AMX's tiles, for the whole process. nullptr: granted; "": this processor has none;
// otherwise why not.
const char *amx_refused();

// Whether two instruction sets agree on products whose sums are exact in every order. They are chosen so that a wrong layout,
// a wrong number of rows or a lost rest of the inputs shows. About a millisecond.
bool same_products(const Kernels &one, const Kernels &other);

}  // namespace quire
