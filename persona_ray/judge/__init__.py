"""Who says how far an answer is in its role."""
