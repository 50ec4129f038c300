"""Stage `evaluate`: every score of a trained chain."""
