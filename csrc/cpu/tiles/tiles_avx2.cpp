// Products with tiles, with the instructions of avx2.
#define DC_ISA avx2
#include "cpu/tiles/tiles.inl.h"
