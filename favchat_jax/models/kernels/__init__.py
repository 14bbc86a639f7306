"""Holds everything that is tuned for a platform: layouts, gradients, fused kernels, rematerialisation and scans.

Each file has the plain form first, then the tuned one; model files call one function and show the equations.
`python -m tools.ablate_kernels` switches each tuning off and measures a training step or an answer without it.
"""
