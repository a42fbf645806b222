// rows between two products with the instructions of avx512.
#define DC_ISA avx512
#include "cpu/program/delta_rule.inl.h"
