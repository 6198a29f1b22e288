"""A norm and the query, key and value projections in one: the 4-bit linear with three results."""
