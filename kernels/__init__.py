"""Numerical kernels: pure functions from arrays to arrays that import nothing but JAX.

The folder `kernels/` imports as `jaxid.kernels`. Import the modules themselves, for example
`from jaxid.kernels.rope import rotate`; this package re-exports nothing, so that a kernel is loaded only when used.
"""
