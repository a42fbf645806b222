// norm, residual and activation with the instructions of avx2.
#define DC_ISA avx2
#include "cpu/elementwise.inl.h"
