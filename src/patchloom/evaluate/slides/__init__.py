"""Slide level: one label for a gigapixel image, learnt from the features of its tiles."""
