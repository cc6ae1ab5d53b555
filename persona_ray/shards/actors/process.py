"""What an actor's process tells of itself: metrics and log lines that say whose they are."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from persona_ray.logs import log_to_stderr
from persona_ray.metrics import record_to
from persona_ray.shards.actors.exporter import RayExporter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Owner:
    """The replica that a process belongs to."""

    run: str
    replica: int

    def sign(self, *, stage: int = 0, rank: int = 0) -> None:
        """From now on this process, which holds that shard, is known as such."""
        record_to(RayExporter(run=self.run, replica=str(self.replica), stage=str(stage), rank=str(rank)))
        log_to_stderr(self.run, replica=self.replica, stage=stage, rank=rank)
        log.info("process %d begins", os.getpid())  # whoever sees a process only can find out whose it is
