"""How each system makes its tokenizer: one file a system, and what they share."""
