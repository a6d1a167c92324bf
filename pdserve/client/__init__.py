"""A small typed client of the gRPC endpoint: `Client` blocks, `AsyncClient` is for asyncio."""

from pdserve.client.aio import AsyncClient
from pdserve.client.answers import Choice, Completion, Delta, Model, Timings, Usage
from pdserve.client.channel import Access
from pdserve.client.requests import Messages, RequestOptions
from pdserve.client.sync import Client

__all__ = [
    "Access",
    "AsyncClient",
    "Choice",
    "Client",
    "Completion",
    "Delta",
    "Messages",
    "Model",
    "RequestOptions",
    "Timings",
    "Usage",
]
