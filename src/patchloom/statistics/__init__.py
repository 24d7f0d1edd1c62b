"""How sure a score is: scores of many draws at once, intervals, and comparisons of pairs."""
