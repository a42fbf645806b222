// sample with the instructions of avx2.
#define DC_ISA avx2
#include "cpu/sample/sample.inl.h"
