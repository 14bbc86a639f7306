"""Finds faces in clips, follows them over time, and cuts the square that the facial encoder sees.

`detectors` finds the faces of one picture, `search` those of several frames, `tracks` links them to one track per
person, `crops` cuts a square around a track, and `looking` does all of it while a clip is decoded. `sheet` shows the
result. An export for PyTorch carries the code of the first four (`convert/face_code.py`).
"""
