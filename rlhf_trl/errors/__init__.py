"""The step `errors`: what the reward models get wrong on held-out pairs."""
