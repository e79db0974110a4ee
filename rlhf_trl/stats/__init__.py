"""Intervals, tests, fronts and accuracies, on plain numbers."""
