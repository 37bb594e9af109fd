"""Capture, the program, the contract of passes, checking, and looking at it. Imports none of the other stages."""
