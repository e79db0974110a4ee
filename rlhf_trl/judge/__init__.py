"""The step `judge`: win rates by a language model, and what the judge itself is worth."""
