"""The bilevel stage: lower steps of the proxy, one upper step of the score model, and the loop of one round.

One upper step at (theta_p, theta_s), with 𝓑 the global batch over all ranks:

    P = softmax over 𝓑 of s_i(theta_s)                                           (1), (2)
    b = gradient of Phi at theta_p                                               (4)
    one walk over the proxy: gradient of G, C·z, d_i = <grad l_i, z>             (3), (5), (6)
    theta_s <- AdamW with - sum_i P_i (d_i - sum_j P_j d_j) grad s_i             (7)
    z <- z - eta ((C + delta) z - b)                                             (5), warm-started across steps
    theta_p <- AdamW with the gradient of G

All three unknowns move once per pass, as in SOBA (arXiv 2201.13409): the gradient that the walk makes anyway is the lower
step's, so an upper step costs one walk, one validation gradient, and the score model's forward and backward.
"""
