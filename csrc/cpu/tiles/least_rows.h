// From how many rows on a product uses AMX. It is measured where the product runs, because clocks, caches and memory decide.
#pragma once

#include "cpu/tiles/tiles.h"

namespace dc {

const TileKernels& narrow_kernels();    // those of the chosen Isa
WideMultiply wide_kernel(Amx amx);

// From this many rows on, `wide` was not slower than `narrow` at any number of rows that was measured, in one thread, with weights in the
// cache. 0: it always was. -1: their results differ. Measuring takes some milliseconds.
int64_t measure_least_rows(Weight type, int64_t columns, WideMultiply wide, const TileKernels& narrow);

// The same for AMX. It is measured at the first call for a type, at the nearest of some numbers of columns. 0 for all types once AMX was
// wrong.
int64_t measured_rows(Weight type, int64_t columns);

// Measures what products with these tiles will need.
void measure_for(const Tiles& tiles);

}  // namespace dc
