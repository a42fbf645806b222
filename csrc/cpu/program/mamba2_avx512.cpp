// one head of a Mamba-2 layer with the instructions of avx512.
#define DC_ISA avx512
#include "cpu/program/mamba2.inl.h"
