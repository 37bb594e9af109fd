"""One file per transformation, the file named after it."""
