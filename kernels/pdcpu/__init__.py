"""The CPU path's own kernels: C++ compiled on the machine that runs it, called through ctypes.

`pdcpu.build` finds a compiler and builds the library into the user's cache; `pdcpu.library` loads it. The C++
needs nothing but a compiler: no torch headers, no Python headers. Importing this package builds nothing.
"""
