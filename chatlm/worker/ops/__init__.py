"""The reference of each op: slow, obviously right, in torch or numpy. The ops that decode_core compiles must
agree with it."""
