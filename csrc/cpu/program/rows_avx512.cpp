// rows between two products with the instructions of avx512.
#define DC_ISA avx512
#include "cpu/program/rows.inl.h"
