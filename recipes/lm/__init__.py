"""Language-model pretraining."""
