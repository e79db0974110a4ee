"""The step `compare`: training runs and policies beside each other, and the verdict."""
