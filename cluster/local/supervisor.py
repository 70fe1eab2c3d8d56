"""Starts Ray, Serve and the models of one run, watches over them, and ends every one of them.

Not Serve's controller: what fails inside Ray is Ray's to restart. The one decision: the supervisor
is the subreaper of everything it starts, so "all that descends from me" is exactly what must be
gone when it ends, and the environment's run id finds the same processes if it was killed itself.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import CommandError, InterruptedStartError, LostError, StartError

from .addresses import LOOPBACK, contact_host
from .environment import HAS_PROXY, RunPorts, build_environment, write_proxy_launcher
from .folder import RunFolder
from .interrupts import Interrupts
from .loopback_http import ServeApi, call
from .ports import ANOTHER_PORT, port_taken
from .processes import (
    ProcessId,
    become_subreaper,
    descendants,
    end_processes,
    reap_children,
)
from .progress import LoadProgress, Phase, PhaseEvent, StartListener
from .root_cause import failure_of, last_exception, root_cause
from .sweep import end_run

_POLL_S = 0.1
_STATUS_POLL_S = 2.0
_RECORD_PERIOD_S = 5.0
_PUT_TIMEOUT_S = 120.0
_DRAIN_POLL_S = 0.2
_DRAIN_MARGIN_S = 10.0
_NUM_LOGICAL_CPUS = 64
_OBJECT_STORE_BYTES = 100_000_000
_NUM_RAY_STARTS = 3
_CORE_PROCESSES = ("gcs_server", "raylet")


@dataclass(frozen=True, slots=True)
class Deployment:
    """What to run: the body of Serve's REST call, and what the launcher must know of it."""

    body: dict[str, Any]
    host: str
    port: int
    models: tuple[str, ...]
    longest_generation_s: float

    @property
    def contact_host(self) -> str:
        """The address at which this machine reaches the API."""
        return contact_host(self.host)

    def local_body(self) -> dict[str, Any]:
        """`body` for this machine: HAProxy alone faces `host`, what is behind it is on loopback."""
        if not HAS_PROXY:
            return self.body
        options = {**self.body.get("http_options", {}), "host": LOOPBACK}
        return {**self.body, "http_options": options}


class Supervisor:
    """One run, from its folder to its end. Call `start`, `watch`, and always `stop`."""

    def __init__(
        self,
        run: RunFolder,
        deployment: Deployment,
        *,
        listener: StartListener,
        interrupts: Interrupts,
    ) -> None:
        self._run = run
        self._deployment = deployment
        self._body = deployment.local_body()
        self._listener = listener
        self._interrupts = interrupts
        self._choose_ports()
        self._core: dict[str, ProcessId] = {}
        self._has_serve = False

    def start(self) -> None:
        """Bring everything up; returns when every model answers.

        Raises:
            StartError: the root cause of what did not come up.
            InterruptedStartError: a signal came first.
        """
        become_subreaper()
        self._run.update(
            phase="starting",
            host=self._deployment.host,
            port=self._deployment.port,
            models=self._deployment.models,
        )
        started_at = time.monotonic()
        with self._phase("ray"):
            self._start_ray()
        with self._phase("serve"):
            self._deploy()
            self._wait_until(lambda load, is_ready: is_ready or load.num_files > 0)
        if not self._is_ready():
            with self._phase("weights"):
                self._wait_until(lambda load, is_ready: is_ready or load.is_warming_up)
            with self._phase("warm_up"):
                self._wait_until(lambda load, is_ready: is_ready)
        self._record_processes()
        self._run.update(phase="ready")
        self._tell("end", "ready", seconds=time.monotonic() - started_at)

    def watch(self) -> None:
        """Return when a signal asks for the end.

        Raises:
            LostError: a process that Ray cannot do without has ended.
        """
        next_record = 0.0
        while not self._interrupts.wait(1.0):
            reap_children()
            for name, identity in self._core.items():
                if identity.find() is None:
                    raise LostError(
                        f"Ray's {name} has ended (pid {identity.pid})",
                        hint="Start again with: shoal up",
                    )
            if time.monotonic() > next_record:
                self._record_processes()
                next_record = time.monotonic() + _RECORD_PERIOD_S

    def stop(self) -> None:
        """Drain, end every process, remove the folder. A second signal skips the draining.

        Raises:
            CommandError: a process does not end, not even by SIGKILL; names it.
        """
        self._run.update(phase="stopping")
        try:
            if self._has_serve and self._is_core_alive():
                self._drain()
        finally:
            end_run(self._run, core=tuple(self._core.values()))

    def _start_ray(self) -> None:
        """Start it anew where it fails: on a busy machine its parts lose patience with another."""
        write_proxy_launcher(self._run, host=self._deployment.host)
        for _ in range(_NUM_RAY_STARTS):
            failure = self._run_starter()
            if failure is None:
                break
            end_processes(descendants, grace_s=1.0)
            self._choose_ports()
        else:
            raise StartError(f"Ray did not start: {failure}")
        self._record_processes()
        self._core = _find_core(self._run.state.processes)

    def _choose_ports(self) -> None:
        self._ports = RunPorts.choose(self._run.state.name, port=self._deployment.port)
        self._serve_api = ServeApi(self._ports.dashboard, self._run.token_path)
        self._run.update(dashboard_port=self._ports.dashboard)

    def _run_starter(self) -> str | None:
        """Start Ray's processes; returns what went wrong."""
        environment = build_environment(
            self._run, self._ports, longest_generation_s=self._deployment.longest_generation_s
        )
        command = [sys.executable, "-m", "cluster.local.ray_head"]
        command += ["--temp-path", str(self._run.ray_path)]
        command += ["--dashboard-port", str(self._ports.dashboard)]
        command += ["--num-logical-cpus", str(_NUM_LOGICAL_CPUS)]
        command += ["--object-store-bytes", str(_OBJECT_STORE_BYTES)]
        with self._run.log_path.open("ab") as log:
            starter = subprocess.Popen(
                command,
                env=environment,
                cwd=self._run.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while starter.poll() is None:
            self._check_interrupts()
            time.sleep(_POLL_S)
        if starter.returncode == 0:
            return None
        output = self._run.log_path.read_text(encoding="utf-8", errors="replace")
        return last_exception(output) or output.strip()[-2000:]

    def _deploy(self) -> None:
        failures: list[str | None] = []

        def put() -> None:
            try:
                answer = self._serve_api.put_applications(self._body, timeout_s=_PUT_TIMEOUT_S)
                failures.append(None if answer.is_ok else answer.text)
            except OSError as exc:
                failures.append(str(exc))

        self._has_serve = True
        self._run_beside(put, num_interrupts=1)
        self._check_interrupts()
        (failure,) = failures
        if failure is not None:
            cause = root_cause(failure, logs_path=self._run.session_logs_path)
            raise StartError(f"Ray Serve did not take the deployment: {cause}")
        self._record_processes()

    def _wait_until(self, is_over: Callable[[LoadProgress, bool], bool]) -> None:
        """Poll progress and readiness until `is_over(load, is_ready)`; fail when Serve has."""
        next_status = time.monotonic() + _STATUS_POLL_S
        told = LoadProgress()
        while True:
            self._check_interrupts()
            load = LoadProgress.read(self._run.progress_path)
            if load.num_total_bytes and load != told:
                told = load
                self._tell(
                    "progress",
                    "weights",
                    num_bytes=load.num_bytes,
                    num_total_bytes=load.num_total_bytes,
                )
            if load.error:
                raise StartError(load.error)
            if is_over(load, self._is_ready()):
                return
            if time.monotonic() > next_status:
                self._check_serve()
                next_status = time.monotonic() + _STATUS_POLL_S
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        try:
            host, port = self._deployment.contact_host, self._deployment.port
            answer = call("GET", port, "/health/ready", host=host)
        except OSError:
            return False
        return answer.is_ok

    def _check_serve(self) -> None:
        message = failure_of(self._serve_api.applications())
        if message is not None:
            raise StartError(root_cause(message, logs_path=self._run.session_logs_path))
        if not self._is_core_alive():
            cause = root_cause("", logs_path=self._run.session_logs_path)
            raise StartError(f"Ray ended during the start. {cause}".strip())

    def _check_interrupts(self) -> None:
        if self._interrupts.num_received:
            raise InterruptedStartError("stopped before it was ready")

    def _record_processes(self) -> None:
        reap_children()
        self._run.update(processes=tuple(descendants()))

    def _drain(self) -> None:
        """Take away what has a route, so that no request comes and running answers finish.

        Not Serve's own shutdown: that ends the HTTP proxy first and cuts every answer. The models
        stay until their answers are out; then there is nothing left to end gently.
        """
        num_wanted = self._interrupts.num_received + 1
        applications = self._body["applications"]
        inner = [item for item in applications if item.get("route_prefix") is None]
        body = {**self._body, "applications": inner}
        routed = {item["name"] for item in applications} - {item["name"] for item in inner}

        def put() -> None:
            with contextlib.suppress(OSError):
                self._serve_api.put_applications(body, timeout_s=_PUT_TIMEOUT_S)

        self._run_beside(put, num_interrupts=num_wanted)
        ends = time.monotonic() + self._deployment.longest_generation_s + _DRAIN_MARGIN_S
        while time.monotonic() < ends and self._is_core_alive():
            if not routed & set(self._serve_api.applications()):
                return
            if self._interrupts.wait(_DRAIN_POLL_S, num_wanted=num_wanted):
                return

    def _is_core_alive(self) -> bool:
        return all(identity.find() is not None for identity in self._core.values())

    def _run_beside(self, action: Callable[[], None], *, num_interrupts: int) -> None:
        """Run `action` in a thread; give up on it when that many signals came."""
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        while thread.is_alive() and self._interrupts.num_received < num_interrupts:
            thread.join(_POLL_S)

    @contextlib.contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        self._tell("begin", phase)
        began = time.monotonic()
        try:
            yield
        except CommandError as exc:
            found = self._explained(exc)
            self._listener.on_event(
                PhaseEvent("failed", phase, message=found.message, hint=found.hint)
            )
            raise found from exc.__cause__
        self._tell("end", phase, seconds=time.monotonic() - began)

    def _explained(self, exc: CommandError) -> CommandError:
        """The error, or what is behind it: somebody took the port since it was found free."""
        taken = None
        if isinstance(exc, StartError):
            taken = port_taken(self._deployment.host, self._deployment.port)
        return exc if taken is None else StartError(taken, hint=ANOTHER_PORT)

    def _tell(self, kind: Any, phase: Phase, **fields: Any) -> None:
        self._listener.on_event(PhaseEvent(kind, phase, **fields))


def _find_core(processes: tuple[ProcessId, ...]) -> dict[str, ProcessId]:
    found: dict[str, ProcessId] = {}
    for identity in processes:
        process = identity.find()
        if process is not None and process.name() in _CORE_PROCESSES:
            found[process.name()] = identity
    return found
