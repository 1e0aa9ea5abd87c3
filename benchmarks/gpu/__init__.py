"""One GPU, a model of 8 B parameters with random weights: both engines, and a training step."""
