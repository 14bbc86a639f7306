"""What is tuned for a platform: layouts, barriers, hand-written gradients, fused kernels, rematerialisation and scans.

Each file has the plain form first and the tuned one behind it; model files call one function and show the equations.
`python -m tools.ablate_kernels` switches each tuning off and measures a training step or an answer without it.
"""
