"""From rows of activations to directions: moments, role vectors, the Assistant Axis, principal components."""
