// one head of a Mamba-2 layer with the instructions of portable.
#define DC_ISA portable
#include "cpu/program/mamba2.inl.h"
