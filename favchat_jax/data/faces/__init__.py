"""Finds faces in clips, follows them over time, and cuts the square that the facial encoder sees.

`detectors` finds the faces of one picture, `tracks` links them to one track per person, `crops` turns a track into
squares of the video's frames, and `looking` does all three while a clip is decoded.
"""
