"""Order and batches: which image stands where, and loaders that yield them."""
