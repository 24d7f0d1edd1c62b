"""Slide level: one label for a gigapixel image, learnt from the features of its tiles.

`patchloom slides tile` and `slides embed` make a store of tile features, `patchloom evaluate slides` learns from it.
"""
