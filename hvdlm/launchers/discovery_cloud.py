"""The machines of a Google Cloud managed instance group, from its API; the token comes from the metadata server."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from hvdlm.errors import ConfigError
from hvdlm.gce import METADATA_HOST, metadata
from hvdlm.launchers.hosts import Host

__all__ = ["GoogleGroup"]

_API = "https://compute.googleapis.com"
_SECONDS = 5.0
_GROUP = re.compile(r"(?:projects/(?P<project>[^/]+)/)?zones/(?P<zone>[^/]+)/instanceGroupManagers/(?P<group>[^/]+)")


class GoogleGroup:
    """The running machines of a managed instance group.

    Args:
        group: ``NAME`` in this machine's zone, or ``zones/ZONE/instanceGroupManagers/NAME``, also with
            ``projects/PROJECT/`` in front.
        slots: Workers per machine.
        environment: ``GCE_METADATA_HOST`` and ``CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE`` (gcloud's own) name other
            servers.

    Raises:
        ConfigError: The group is not of that form.
    """

    interval = 10.0

    def __init__(self, group: str, slots: int, environment: Mapping[str, str]) -> None:
        match = _GROUP.fullmatch(group)
        if match is None and (not group or "/" in group):
            raise ConfigError(
                f"--gcloud-group {group!r}: allowed is a name, or zones/ZONE/instanceGroupManagers/NAME.",
                hint="gcloud compute instance-groups managed list",
            )
        self._project = match["project"] if match else None
        self._zone = match["zone"] if match else None
        self._group = match["group"] if match else group
        self._slots = slots
        self._metadata = environment.get("GCE_METADATA_HOST") or METADATA_HOST
        override = environment.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE", "")
        self._api = override.rstrip("/").removesuffix("/compute/v1") or _API

    def hosts(self) -> tuple[Host, ...]:
        """See :class:`hvdlm.launchers.discovery.Source`. Machines that are being stopped or deleted do not count."""
        try:
            project = self._project or metadata("project/project-id", self._metadata)
            zone = self._zone or metadata("instance/zone", self._metadata).rpartition("/")[2]
            token = json.loads(metadata("instance/service-accounts/default/token", self._metadata))
            found = self._list(project, zone, str(token["access_token"]))
        except urllib.error.HTTPError as error:
            raise ConfigError(f"Google Cloud answered {error.code} ({error.reason}) for group {self._group}.") from None
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"Google Cloud cannot be asked for group {self._group}: {error}.") from None
        return tuple(Host(name, self._slots) for name in sorted(found))

    def _list(self, project: str, zone: str, token: str) -> list[str]:
        path = f"/compute/v1/projects/{project}/zones/{zone}/instanceGroupManagers/{self._group}/listManagedInstances"
        names: list[str] = []
        page = ""
        while True:
            query = f"?pageToken={urllib.parse.quote(page)}" if page else ""
            request = urllib.request.Request(
                self._api + path + query, data=b"", headers={"Authorization": f"Bearer {token}"}
            )
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                content: dict[str, Any] = json.load(answer)
            for machine in content.get("managedInstances", ()):
                if machine.get("instanceStatus") == "RUNNING" and machine.get("currentAction", "NONE") in (
                    "NONE",
                    "VERIFYING",
                    "REFRESHING",
                ):
                    names.append(str(machine["instance"]).rpartition("/")[2])
            page = str(content.get("nextPageToken") or "")
            if not page:
                return names
