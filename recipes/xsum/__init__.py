"""Fine-tune and evaluate summarisation models on XSum or on a generated corpus like it."""
