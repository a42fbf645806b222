// the delta rule's rows with the instructions of neon.
#define DC_ISA neon
#include "cpu/program/delta_rule.inl.h"
