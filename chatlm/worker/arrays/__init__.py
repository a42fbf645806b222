"""Arrays without torch: types that numpy lacks, the blocks of packed weights, rotary tables, devices by name.

The files of a model become these arrays, whatever computes it: decode_core reads them on a CPU, and a GPU
gets copies as tensors."""
