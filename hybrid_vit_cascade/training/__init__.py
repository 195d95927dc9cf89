"""Training of the cascade: ``train_progressive.py``."""
