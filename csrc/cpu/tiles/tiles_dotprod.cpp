// Products with tiles, with the instructions of neon and its dot product of bytes.
#define DC_ISA dotprod
#include "cpu/tiles/tiles.inl.h"
