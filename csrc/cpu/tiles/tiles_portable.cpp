// Products with tiles, with the instructions of portable.
#define DC_ISA portable
#include "cpu/tiles/tiles.inl.h"
