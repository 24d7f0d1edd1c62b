"""Speed side by side with peers, and whether the methods do what their papers say. Not part of the package."""
