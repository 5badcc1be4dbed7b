"""Fashion-MNIST, end to end: train a residual network, make it 8-bit in every scheme, measure what each costs."""
