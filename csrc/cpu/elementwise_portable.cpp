// norm, residual and activation with the instructions of portable.
#define DC_ISA portable
#include "cpu/elementwise.inl.h"
