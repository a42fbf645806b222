// rows between two products with the instructions of portable.
#define DC_ISA portable
#include "cpu/program/delta_rule.inl.h"
