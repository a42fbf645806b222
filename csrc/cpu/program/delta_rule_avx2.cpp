// rows between two products with the instructions of avx2.
#define DC_ISA avx2
#include "cpu/program/delta_rule.inl.h"
