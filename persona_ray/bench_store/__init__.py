"""How fast a store is written and read, beside the same client that puts and gets the same bytes, as ratios of one run.

Store and bare client take turns, every second one the other way round, with as many requests at once; a ratio is the median over
the pairs. The bare client puts the objects of such units without a condition and without a digest, and gets what the reader asks for.
Everything is written below a folder of its own, and removed in the end. MB are 10^6 encoded bytes, as they lie in the store.
"""
