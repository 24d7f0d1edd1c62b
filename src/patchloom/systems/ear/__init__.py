"""Excision And Recovery (EAR): defects found by a network that repairs what stands out in an image."""
