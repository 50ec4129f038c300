"""What is measured on the held-out split: one file a measure, each a function from a `HeldOut` to a
`MeasureResult`.
"""
