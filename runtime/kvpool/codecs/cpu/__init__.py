"""The codecs on a CPU, compiled from C: see `kernels.c`. Without them, torch does the same."""
