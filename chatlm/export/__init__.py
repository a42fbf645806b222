"""Writes models to files that other programs, or this one, can read. It uses the worker's readers.

Never in here: aiohttp, torch, anything of the front."""
