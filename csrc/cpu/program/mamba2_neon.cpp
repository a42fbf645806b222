// one head of a Mamba-2 layer with the instructions of neon.
#define DC_ISA neon
#include "cpu/program/mamba2.inl.h"
