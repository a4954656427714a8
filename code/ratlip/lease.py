"""One writer at a time: a lease in a run's folder, renewed by its holder, and taken over when nobody renews it.

It needs nothing of the file system but that a file can be made exclusively and replaced; process numbers count only
where they can be looked up, on the machine and in the container of the holder.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from ratlip.errors import UserError

RENEWED_EVERY = 10.0  # seconds
STALE_AFTER = 60.0  # seconds without renewal
WAITED_AT_MOST = 300.0  # seconds for a holder that goes on renewing
LOOK_EVERY = 0.5


class Lost(UserError):
    """Another program has taken the run over: nothing more may be written."""


class Lease:
    """The right to write into a run's folder, from construction to `release`; only with `wait` may it take a while.

    Raises:
        UserError: another program holds it; says which.
    """

    def __init__(self, folder: Path, wait: bool = False):
        self.folder, self.path = folder, folder / "lease.json"
        self.me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_began": process_start(os.getpid()),
            "machine": _machine(),
            "began": time.time(),
        }
        self.taken_by: dict | None = None
        self._acquire(wait)
        self._renewed = time.time()
        self._released = threading.Event()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another has taken it over. Looks at the file itself where renewing has paused, as in sleep."""
        if time.time() - self._renewed > 2 * RENEWED_EVERY:
            self._renew()
        return self.taken_by is not None

    def confirm(self) -> None:
        """Raises Lost where it is."""
        self._renew()
        if self.taken_by is not None:
            by = f"by {_describe(self.taken_by)}" if self.taken_by else "or its lease.json was deleted"
            raise Lost(
                f"{self.folder} was taken over {by} while this program did not renew its lease (was the machine "
                "asleep?): stopped, and nothing more is written"
            )

    def release(self) -> None:
        """Give it back."""
        self._released.set()
        with suppress(OSError):
            if (_read(self.path) or {}).get("token") == self.me["token"]:
                self.path.unlink()

    def _acquire(self, wait: bool) -> None:
        began, waiting = time.monotonic(), False
        while not self._create(self.path) and not self._take_over():
            holder = _read(self.path)
            if holder is not None and not self._stale(self.path, holder):  # else others are taking it over just now
                if not wait or time.monotonic() - began > WAITED_AT_MOST:
                    raise UserError(
                        f"{self.folder} is being written by {_describe(holder)}; a run has one writer at a time "
                        "(if that program is gone, try again in a minute)"
                    )
                if not waiting:
                    print(
                        f"{self.folder} is still held by {_describe(holder)}: waiting until that has not been "
                        f"renewed for {STALE_AFTER:.0f} seconds",
                        flush=True,
                    )
                waiting = True
            time.sleep(LOOK_EVERY)

    def _take_over(self) -> bool:
        """Replace a stale lease, as the only one of all who try.

        Who makes the claim on a lease's token may replace that lease. A claim whose maker died is claimed itself, by
        its own token. Who comes late and makes a claim that was done with sees that the lease is another by now.
        """
        held = _read(self.path)
        if held is None or not self._stale(self.path, held):
            return False
        claims, token = [], held["token"]
        while True:
            claims.append(self.path.with_name(f"lease.{token}.claim"))
            if self._create(claims[-1]):
                break
            other = _read(claims[-1])
            if other is None or not self._stale(claims[-1], other):
                return False
            token = other["token"]
        try:
            now = _read(self.path)
            if now is None or now["token"] != held["token"] or not self._stale(self.path, now):
                return False
            new = self.path.with_name(f"lease.{self.me['token']}.new")
            self._create(new)
            os.replace(new, self.path)
            return True
        finally:
            for claim in claims:
                claim.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Write this holder to a file that must not be there yet; whether it was not."""
        try:
            file = open(path, "x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(self.me))
        except OSError:
            path.unlink()
            raise
        return True

    def _stale(self, path: Path, holder: dict) -> bool:
        """Whether a lease's or claim's holder is gone, or has not renewed it for long by the file system's clock."""
        if holder.get("machine") and holder["machine"] == self.me["machine"]:
            began = process_start(holder["pid"])
            if began is None or began != holder["process_began"]:
                return True
        probe = path.with_name(f"lease.{self.me['token']}.probe")
        try:
            probe.write_text("now")
            with open(path) as file:  # opened: a network drive then asks for the time anew
                return probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime > STALE_AFTER
        except FileNotFoundError:
            return False  # gone in between
        finally:
            probe.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._released.wait(RENEWED_EVERY) and self.taken_by is None:
            self._renew()

    def _renew(self) -> None:
        with suppress(OSError):  # a network drive that is away: the next time
            holder = _read(self.path)
            if holder is None or holder["token"] != self.me["token"]:
                self.taken_by = holder or {}
            else:
                os.utime(self.path)
                self._renewed = time.time()


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; "" where that cannot be known, None: it is gone."""
    if not Path("/proc/self/stat").is_file():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]  # a zombie only waits for its parent


def _machine() -> str:
    """Where a process number means the same process: this boot of this machine, in this container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return "" if Path("/proc/self/stat").is_file() else socket.gethostname()


def _read(path: Path) -> dict | None:
    """What a lease or claim says; None where there is none. One that was cut short is known by its time alone."""
    for _ in range(3):
        try:
            with open(path) as file:
                text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        with suppress(ValueError, KeyError, TypeError):
            content = json.loads(text)
            return {**content, "token": str(content["token"])}
        time.sleep(0.1)  # it is being written
    return {"token": f"{path.name}-{changed}"}


def _describe(holder: dict) -> str:
    if "pid" not in holder:
        return "another program"
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["began"]))
    return f"process {holder['pid']} on {holder['host']} (since {began})"
