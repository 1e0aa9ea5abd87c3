"""What is trained in place of the weights: the seam of all adapters, and SVF, which is the product."""
