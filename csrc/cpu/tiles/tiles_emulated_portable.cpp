// Products through emulated tile registers, on any machine.
#define DC_ISA emulated_portable
#define DC_EMULATED_TILES
#if defined(DC_TEST_SETS)
#include "cpu/tiles/tiles_amx.inl.h"
#else
#include "cpu/tiles/tiles.h"
namespace dc { namespace emulated_portable { extern const WideMultiply wide_multiply = nullptr; } }
#endif
