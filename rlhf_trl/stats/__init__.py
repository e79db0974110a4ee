"""Intervals, tests, fronts and logistic fits, on plain numbers."""
