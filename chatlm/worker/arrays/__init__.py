"""Arrays without torch: types that numpy lacks, blocks of packed weights, rotary tables, devices by name.

The files of a model become these arrays, whatever computes the model. On a CPU decode_core reads them; a GPU
gets copies as tensors."""
