// sample with the instructions of avx512.
#define DC_ISA avx512
#include "cpu/sample/sample.inl.h"
