// Products through emulated tile registers, with what AMX's kernel uses in addition: AVX-512.
#define DC_ISA emulated_vnni
#define DC_EMULATED_TILES
#include "cpu/tiles/tiles_amx.inl.h"
