// Products with tiles, with the instructions of neon.
#define DC_ISA neon
#include "cpu/tiles/tiles.inl.h"
