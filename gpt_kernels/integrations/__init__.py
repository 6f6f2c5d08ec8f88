"""Families of modules that patch() swaps, a file each, found by the module path of their classes: patch.py says how."""
