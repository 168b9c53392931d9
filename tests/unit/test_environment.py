"""What hvdlm reads from the environment."""

from __future__ import annotations

import pytest

from hvdlm.environment import COMMAND_LINE, CONFIG_FILE, RUN_DIR, read_environment
from hvdlm.errors import ConfigError


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (None, 0, 1)),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}, ("horovodrun", 1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, ("mpirun", 2, 3)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ("mpirun", 0, 2)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, ("srun", 1, 2)),
        # An sbatch script is not a step: python in it is one process, whatever the allocation holds.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (None, 0, 1)),
    ],
)
def test_launchers(environ: dict[str, str], expected: tuple[str | None, int, int]) -> None:
    environment = read_environment(environ)
    assert (environment.launcher, environment.rank, environment.size) == expected


def test_options_and_settings() -> None:
    environment = read_environment(
        {"HVDLM_SEED": "3", COMMAND_LINE: '{"compression": "fp16"}', CONFIG_FILE: "{}", RUN_DIR: "/r", "OTHER": "x"}
    )
    assert environment.options == {"seed": "3"}
    assert environment.command_line == {"compression": "fp16"}
    assert environment.run_dir == "/r"


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"HVDLM_SEEED": "3"}, "HVDLM_SEEED is no option"),
        ({COMMAND_LINE: "{"}, "not JSON"),
        ({COMMAND_LINE: "[]"}, "JSON object"),
    ],
)
def test_wrong_variables_are_named(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_environment(environ)
