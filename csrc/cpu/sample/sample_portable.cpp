// sample with the instructions of portable.
#define DC_ISA portable
#include "cpu/sample/sample.inl.h"
