// Products with tiles, with the instructions of avx2 and AVX-VNNI's dot product.
#define DC_ISA avxvnni
#define DC_DOT_256 "%{vex%} vpdpbusd"
#include "cpu/tiles/dots.h"
#if defined(DC_KNOWS_AVXVNNI)
#include "cpu/tiles/tiles.inl.h"
#else
#include "cpu/tiles/tiles.h"
namespace dc { namespace avxvnni { extern const TileKernels tile_kernels = {nullptr, nullptr}; } }
#endif
