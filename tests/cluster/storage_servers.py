"""Servers of objects as clusters have them, on this machine: nginx, and moto's S3.

nginx is Debian's package, unpacked and not installed: that needs no rights and changes nothing
outside the folder. Both end with the context, and the folder is the test's own.
"""

from __future__ import annotations

import getpass
import importlib.util
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_port

NGINX_CONF = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class ServerMissingError(RuntimeError):
    """A server cannot be had on this machine."""


def find_nginx(folder: Path) -> Path:
    """nginx's program. Raises ServerMissingError where neither the system nor Debian has one."""
    for place in ("/usr/sbin", None):
        if found := shutil.which("nginx", path=place):
            return Path(found)
    folder.mkdir()
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ServerMissingError("no nginx here, and no apt-get to fetch it with")
    fetched = subprocess.run(
        ["apt-get", "download", "nginx"], cwd=folder, capture_output=True, text=True
    )
    archives = list(folder.glob("nginx_*.deb"))
    if not archives:
        raise ServerMissingError(f"nginx cannot be fetched: {fetched.stderr.strip()[-300:]}")
    subprocess.run(["dpkg-deb", "-x", archives[0], folder], check=True)
    return folder / "usr" / "sbin" / "nginx"


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """The URL of a folder that nginx serves. Raises ServerMissingError."""
    program, port = find_nginx(folder / "package"), free_port()
    # As root it would read files as nobody, who may not enter the test's folder.
    user = "user root;" if getpass.getuser() == "root" else ""
    conf = folder / "nginx.conf"
    conf.write_text(NGINX_CONF.format(folder=folder, port=port, root=root, user=user))
    command = [program, "-c", conf, "-e", folder / "error.log", "-p", folder]
    with _running(command, f"http://127.0.0.1:{port}/", folder / "nginx.out"):
        yield f"http://127.0.0.1:{port}/"


@contextmanager
def s3(root: Path, folder: Path) -> Iterator[str]:
    """The endpoint of an S3 server that has a folder's files below s3://shards/train/.

    Raises ServerMissingError.
    """
    missing = [name for name in ("moto", "flask", "boto3") if not importlib.util.find_spec(name)]
    if missing:
        raise ServerMissingError(f"no {', '.join(missing)} here: requirements-dev.txt")
    import boto3

    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/"
    # Its own program, by its module: scripts of an environment name Python by a path that moves.
    start = "import sys; from moto.server import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, endpoint, folder / "moto.out"):
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="shards")
        for path in root.iterdir():
            client.upload_file(str(path), "shards", f"train/{path.name}")
        yield endpoint


@contextmanager
def _running(command: list[object], url: str, output: Path) -> Iterator[None]:
    """A server's process from when it answers until the context ends."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 60
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise ServerMissingError(
                    f"{command[0]} does not serve: {output.read_text()[-500:]}"
                )
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer, if a refusal
    except OSError:
        return False
    return True
