"""Many runs in one table: comparisons of methods, suites of evaluations, scaling."""
