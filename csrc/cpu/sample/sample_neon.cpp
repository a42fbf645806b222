// sample with the instructions of neon.
#define DC_ISA neon
#include "cpu/sample/sample.inl.h"
