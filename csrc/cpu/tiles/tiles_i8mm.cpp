// Products with tiles, with the instructions of neon and its matrix products of bytes.
#define DC_ISA i8mm
#include "cpu/tiles/tiles.inl.h"
