"""The unified language model in plain PyTorch.

Vocabulary, sequences, adapters, losses, generation, export.
"""
