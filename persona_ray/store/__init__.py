"""The store: a Zarr v3 group that grows by write-once units. See the design's section on the store."""
