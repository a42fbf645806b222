// Products through emulated tile registers, on any machine.
#define DC_ISA emulated_portable
#define DC_EMULATED_TILES
#include "cpu/tiles/tiles_amx.inl.h"
