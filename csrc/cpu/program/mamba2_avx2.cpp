// one head of a Mamba-2 layer with the instructions of avx2.
#define DC_ISA avx2
#include "cpu/program/mamba2.inl.h"
