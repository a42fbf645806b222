// rows between two products with the instructions of neon.
#define DC_ISA neon
#include "cpu/program/rows.inl.h"
