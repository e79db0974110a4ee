"""TRL's PPOTrainer with its known defects repaired, and its four roles on one base."""
