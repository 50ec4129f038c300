"""Plans: what a recipe costs on given machines, before it runs."""
