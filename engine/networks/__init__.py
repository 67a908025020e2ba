"""Networks, each written once against the functions that every op set of `flashdip.kernels` has."""
