"""`python -m scripts.control_plane`: an API server to try the chart on by hand, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from . import ApiServer, Nodes, ToolMissingError, find_crds, install_crds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--namespace", default="shoal", help="made with restricted pod security")
    parser.add_argument("--nodes", action="store_true", help="adds a scheduler and fake GPU nodes")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-api-") as folder:
            _serve(Path(folder), options.namespace, with_nodes=options.nodes)
    except ToolMissingError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("ended")


def _serve(folder: Path, namespace: str, *, with_nodes: bool) -> None:
    crds = find_crds()
    with ApiServer(folder) as server:
        install_crds(server.api, crds)
        server.create_namespace(namespace)
        if with_nodes:
            Nodes(server).add_examples()
        print(f"export KUBECONFIG={server.kubeconfig}   # namespace {namespace}; Ctrl-C ends it")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
