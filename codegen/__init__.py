"""What executes a function."""
