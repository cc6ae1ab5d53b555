"""The model, cut over processes: loading, capture, generation."""
