"""The ssh command that starts an agent on another host, and what to do when it fails. Pure functions."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import ConfigError, LaunchError

__all__ = ["Ssh", "agent_command", "explain_ssh", "python_command"]

_SECONDS_TO_CONNECT = 15


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """How other hosts are reached."""

    port: int | None = None
    identity_file: str | None = None
    options: tuple[str, ...] = ()
    """Options as in ``ssh -o``: ``StrictHostKeyChecking=yes``. They come first, and ssh takes the first of each."""

    def __post_init__(self) -> None:
        for option in self.options:
            if not re.fullmatch(r"[A-Za-z]+[ =].+", option):
                raise ConfigError(
                    f"--ssh-option {option!r}: an option is of the form Name=value.",
                    hint="--ssh-option StrictHostKeyChecking=yes",
                )

    def arguments(self) -> list[str]:
        """The arguments before the host."""
        # BatchMode: a question for a password or a passphrase fails, where nobody would see it. accept-new: a host seen
        # for the first time is believed, one whose key has changed is not.
        ours = [
            "BatchMode=yes",
            "StrictHostKeyChecking=accept-new",
            f"ConnectTimeout={_SECONDS_TO_CONNECT}",
            # A host that is cut off is noticed after 9 seconds.
            "ServerAliveInterval=3",
            "ServerAliveCountMax=3",
            "LogLevel=ERROR",
        ]
        # ssh takes the first value it is given for an option.
        argv = [word for option in (*self.options, *ours) for word in ("-o", option)]
        if self.port is not None:
            argv += ["-p", str(self.port)]
        if self.identity_file is not None:
            argv += ["-i", self.identity_file]
        return argv


def python_command(module: str, *, python: str = sys.executable) -> list[str]:
    """The command that runs ``main()`` of a module of hvdlm with nothing but the standard library.

    Args:
        module: ``hvdlm.worker``, ``hvdlm.agent``.
        python: The interpreter.
    """
    root = str(Path(__file__).resolve().parents[2])
    # -I -S: neither the working directory nor site-packages can shadow a module, and it starts in 20 ms.
    return [python, "-I", "-S", "-c", f"import sys; sys.path.append({root!r}); from {module} import main; main()"]


def agent_command(host: str, ssh: Ssh, *, program: str = "ssh") -> list[str]:
    """The command that starts an agent on a host: nothing of the job is in it.

    Args:
        host: Its name.
        ssh: How it is reached.
        program: The ssh client.
    """
    # "--": whatever the name is, it is no option. exec: no shell is left between sshd and the agent.
    return [program, "-T", *ssh.arguments(), "--", host, f"exec {shlex.join(python_command('hvdlm.agent'))}"]


def explain_ssh(host: str, said: str, code: int | None, seconds: float) -> LaunchError:
    """Why a host could not be reached.

    Args:
        host: The host.
        said: What ssh wrote to its stderr (and what came in place of the agent).
        code: ssh's exit code; None if it had not ended.
        seconds: How long it was waited for.
    """
    lines = [line for line in said.strip().splitlines() if line.strip()][-8:]
    shown = ("; it said:\n  " + "\n  ".join(lines)) if lines else "."
    by_hand = f"ssh -o BatchMode=yes {shlex.quote(host)} true"
    if code is None:
        return LaunchError(
            f"host {host}: no answer over ssh within {seconds:.0f} s{shown}",
            hint=f"try: {by_hand} ; --start-timeout SECONDS waits longer",
        )
    text = "\n".join(lines)
    if "Permission denied" in text:
        hint = f"log in without a password first: ssh-copy-id {shlex.quote(host)} ; then: {by_hand}"
    elif "Host key verification failed" in text or "IDENTIFICATION HAS CHANGED" in text:
        hint = f"its key is not the one known here; if that is right: ssh-keygen -R {shlex.quote(host)}"
    elif code == 127 or "No such file" in text or "No module named" in text or "not found" in text:
        hint = f"the same Python and hvdlm must be at {sys.executable} on every host; hvdlm doctor -H {host} checks it"
    else:
        hint = f"try: {by_hand} ; hvdlm doctor -H {host} checks it"
    return LaunchError(f"host {host}: ssh ended with code {code}{shown}", hint=hint)
