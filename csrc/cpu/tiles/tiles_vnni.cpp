// Products with tiles, with the instructions of avx512 and its VNNI (tiles.cpp asks for both).
#define DC_ISA avx512
#include "cpu/tiles/tiles.inl.h"
