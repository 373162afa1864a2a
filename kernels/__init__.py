"""Kernels and their plain-torch references.

Nothing here may import transformers, which probes for a PyPI package that is also called `kernels`.
"""
