"""Memory that a group of ranks shares, how it is laid out, and what becomes of waits in it."""

from megatsp_kernels.peers.layout import Layout
from megatsp_kernels.peers.memory import Memory, ipc, local, on_one_host, shared, symmetric
from megatsp_kernels.peers.status import PeerError, Status

__all__ = ["Layout", "Memory", "PeerError", "Status", "ipc", "local", "on_one_host", "shared", "symmetric"]
