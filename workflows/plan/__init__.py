"""What a recipe would cost at another size and on other machines, before it runs; its formulas
printed.
"""
