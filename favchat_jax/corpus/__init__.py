"""Building the training text from raw videos (paper, Section 3): one module a step, a folder between them.

`sources` lists the videos of a data set's folder, `scan` reads what each is, `clips` filters and trims by `faces`,
`annotate` and `review` make the text, and the data set `corpus` packs it. `manifest` says what lies in the folder.
"""
