"""The numbers by which a GGUF file's header says of which type a value is."""

U32 = 4
I32 = 5
F32 = 6
BOOL = 7
STRING = 8
ARRAY = 9
