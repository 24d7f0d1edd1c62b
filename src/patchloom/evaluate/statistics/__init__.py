"""How sure a score is: scores, intervals, comparisons and what they are drawn from."""
