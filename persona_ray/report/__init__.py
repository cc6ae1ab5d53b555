"""What was found, for people: one self-contained page, and tables for the terminal."""
