"""What Ray runs in place of Python: lives and ends as the worker that the server forks for it.

Nothing is imported that need not be: this runs once for every worker.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    asked = {"argv": sys.argv[1:], "environ": dict(os.environ), "folder": os.getcwd()}
    said = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["DISTRIRAY_TEST_FORKS"])
        socket.send_fds(server, [len(said).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(said)
        status = server.recv(4)  # when the worker has ended; nothing if the server has
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "big")) if status else 1
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
