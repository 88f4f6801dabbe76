"""Messages over a socket: JSON and tensors, so that nothing in one is ever run; and a proof of a shared secret.

A message is the length of its header in 4 bytes, the header, which is JSON: [message, [[dtype, shape], ...]], and the
bytes of the tensors, which are not encrypted.
"""

import hmac
import json
import secrets
import socket
from typing import Any

import torch
from torch import Tensor

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8)}
NONCE = 32


def send(link: socket.socket, message: Any, *tensors: Tensor) -> None:
    """Send a message that JSON can hold and tensors of DTYPES from any device; raises OSError."""
    header = json.dumps([message, [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]]).encode()
    link.sendall(len(header).to_bytes(4, "big") + header)
    for tensor in tensors:
        link.sendall(_bytes(tensor.cpu().contiguous()))


def receive(link: socket.socket) -> tuple[Any, list[Tensor]]:
    """The next message and its tensors, on the CPU; raises OSError, also when the other end has closed."""
    message, described = json.loads(_take(link, int.from_bytes(_take(link, 4), "big")))
    tensors = [torch.empty(shape, dtype=DTYPES[dtype]) for dtype, shape in described]
    for tensor in tensors:
        _fill(link, _bytes(tensor))
    return message, tensors


def authenticate(link: socket.socket, secret: bytes, own: bytes, other: bytes) -> None:
    """Prove to each other that both know `secret`, which does not travel; own, other: different names of the two ends.

    Raises PermissionError where the other end doesn't know it, and OSError.
    """
    nonce = secrets.token_bytes(NONCE)
    link.sendall(nonce)
    others = _take(link, NONCE)
    link.sendall(hmac.digest(secret, own + nonce + others, "sha256"))
    expected = hmac.digest(secret, other + others + nonce, "sha256")
    if not hmac.compare_digest(_take(link, len(expected)), expected):
        raise PermissionError("it has another secret")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _take(link: socket.socket, count: int) -> bytes:
    taken = bytearray(count)
    _fill(link, memoryview(taken))
    return bytes(taken)


def _fill(link: socket.socket, left: memoryview) -> None:
    while len(left):
        count = link.recv_into(left)
        if not count:
            raise ConnectionError("it closed the connection")
        left = left[count:]
