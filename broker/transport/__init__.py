"""Sockets and what is under them: libzmq's, the kernel's counters, memory for frames."""
