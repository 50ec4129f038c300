"""The unified language model in plain PyTorch: vocabulary, sequences, adapters, losses, generation,
export.
"""
