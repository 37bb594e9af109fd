"""The generate loop and everything it is made of."""
