"""The reference of each op: slow, obviously right, in torch or numpy; what decode_core compiles must agree
with it."""
