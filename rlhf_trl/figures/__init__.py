"""Figures that more than one step or page draws."""
