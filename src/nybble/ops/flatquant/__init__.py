"""FlatQuant: two small transforms around each row, then int4 with a scale a row, in one launch."""
