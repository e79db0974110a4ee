"""Preference data: sources, row shapes, the steps `prepare` and `explore`, and the demo."""
