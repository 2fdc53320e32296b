"""Built-in tasks on real data that ships with the dependencies."""
