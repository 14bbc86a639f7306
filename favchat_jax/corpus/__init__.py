"""Builds the training corpus from raw videos (paper, Section 3), one module per step.

`sources` lists the videos of a data set's folder, `scan` reads their properties, `clips` filters and trims by `faces`,
`annotate` and `review` make the text, and `pack` packs it. `manifest` describes the folder that the steps share.
"""
