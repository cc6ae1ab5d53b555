"""Using the axis: changing the residual stream while a model writes."""
