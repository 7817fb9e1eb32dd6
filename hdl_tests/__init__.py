"""Hardware view of the model: RTL blocks, their simulation against the Python model, and proofs about them."""
