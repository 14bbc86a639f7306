"""FaVChat in PyTorch: the code in exported folders, the reference of the parity tests, the baseline of benchmarks.

Its files are copied into every export for `trust_remote_code`. So they import PyTorch, transformers and, to read a
video, PyAV, but nothing of this package. `favchat_jax.convert.exported` writes the folder.
"""
