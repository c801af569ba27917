"""Fuzz targets: random inputs, and what must hold for each of them. ``python -m fuzz`` runs them.

A target is a module with two functions: ``generate(chance)`` returns a case, which Python can write
as a literal, and ``check(case)`` raises if the invariant at the head of the file does not hold.
"""
