"""A smaller copy of the demo runs and learns, as a user runs it; DEMO=whole takes the recipe as it ships."""
