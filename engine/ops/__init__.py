"""What the model computes, op by op. The reference in each folder is the definition; see registry.py.

Numerics of the references: operands are taken to float64, every sum runs in float64, and the result is rounded once to the
declared dtype. Float64 noise does not survive that rounding, so a reference's result for a row does not depend on the
other rows of a batch, on how a prompt was cut into chunks, or on the number of threads.

Shape suffixes: T tokens, S sequences or cached rows (said where), d hidden size, H heads, D head_dim, K selected rows,
E experts, N and K of a weight as in y[N] = W[N, K] x[K].
"""
