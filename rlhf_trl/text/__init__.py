"""Words of answers, refusals, display of foreign text, number formats."""
