// norm, residual and activation with the instructions of avx512.
#define DC_ISA avx512
#include "cpu/elementwise.inl.h"
