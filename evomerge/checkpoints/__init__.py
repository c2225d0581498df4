"""Hugging Face checkpoint directories: read, place, compare, write, describe.

Only `writer` and `tensors` load torch; everything else is safe to import in the driver.
"""
