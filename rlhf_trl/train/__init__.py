"""The step `train`: one stage, trained with the library's trainer."""
