"""FaVChat in PyTorch: what an exported folder carries, the oracle of the parity tests, the baseline of benchmarks.

Its files are copied into every export for `trust_remote_code`, so they import PyTorch and transformers, PyAV to read a
video, and nothing of this package. `favchat_jax.convert.exported` writes the folder.
"""
