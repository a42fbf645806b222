// Products with tiles, with the instructions of avx2 and AVX-512's dot product in registers of 256 bits: AVX-VNNI's source, for tests on CPUs without it.
#define DC_ISA evex
#define DC_DOT_256 "%{evex%} vpdpbusd"
#include "cpu/tiles/dots.h"
#if defined(DC_KNOWS_AVXVNNI) && defined(DC_TEST_SETS)
#include "cpu/tiles/tiles.inl.h"
#else
#include "cpu/tiles/tiles.h"
namespace dc { namespace evex { extern const TileKernels tile_kernels = {nullptr, nullptr}; } }
#endif
