// Products through AMX, together with avx512 and its VNNI. A compiler without AMX leaves it out.
#define DC_ISA amx
#if (defined(__clang__) && __clang_major__ >= 11) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11)
#include "cpu/tiles/tiles_amx.inl.h"
#else
#include "cpu/tiles/tiles.h"
namespace dc { namespace amx { extern const WideMultiply wide_multiply = nullptr; } }
#endif
