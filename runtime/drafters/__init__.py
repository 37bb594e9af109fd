"""What proposes tokens. A drafter never changes the output."""
