"""A store in forms that other tools open, and the published layout as a store. Committed rows only."""
