"""Widths: how much of a packed row is held, in half bits an element.

A row of width w takes w · head_dim/16 bytes. A row of width HALF holds no codes but half-precision numbers.
"""

HALF = 32
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, HALF)
"""Every width there is; a tag's nibble is an index into this tuple."""
