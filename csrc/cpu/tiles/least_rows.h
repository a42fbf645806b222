// From how many rows on a product goes through AMX: measured where it runs, since clocks, caches and memory decide.
#pragma once

#include "cpu/tiles/tiles.h"

namespace dc {

const TileKernels& narrow_kernels();    // the chosen Isa's
WideMultiply wide_kernel(Amx amx);

// From this many rows on, `wide` is not slower than `narrow` at any measured number of rows, in one thread, with weights in the cache; 0: never.
// -1: their results differ. It takes some milliseconds.
int64_t measure_least_rows(Weight type, int64_t columns, WideMultiply wide, const TileKernels& narrow);

// That of AMX, measured at the first call for a type and the next of some numbers of columns; 0 for all types once AMX was wrong.
int64_t measured_rows(Weight type, int64_t columns);

// Measure what products with these tiles will ask for.
void measure_for(const Tiles& tiles);

}  // namespace dc
