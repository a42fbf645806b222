"""The interface of decode_core's library that this program needs.

The number is made of the library's functions, ops and types (setup.py: `interface`), and compiled into it. If
they change, `pip install .` says the new number, to be written here."""

INTERFACE = 915936245
