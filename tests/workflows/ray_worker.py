"""Starts a Ray worker by a fork of a process that has imported the libraries: seconds less.

Ray runs it in place of its own script; `ray_address` in conftest.py serves it. Arguments: the path
of Ray's worker, its own arguments, and the runtime environment as JSON.
"""

import json
import os
import socket
import sys


def main() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["SMALTI_WORKER_SERVER"])
        request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}
        socket.send_fds(server, [b"x"], [1, 2])
        server.sendall(json.dumps(request).encode())
        server.shutdown(socket.SHUT_WR)
        if not server.recv(1):
            sys.exit("the process that forks Ray's workers is gone")


if __name__ == "__main__":
    main()
