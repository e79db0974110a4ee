"""The steps `evaluate` and `samples`: answers of every policy, their rewards, KL, front and alarms."""
