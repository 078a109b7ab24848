"""Names and checkpoints → modules that are ready to predict.

Knows nothing of where images come from or rows go.
"""
