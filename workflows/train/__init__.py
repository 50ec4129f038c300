"""The one training loop, and the tasks it drives."""
