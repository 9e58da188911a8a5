"""Running a pipe on real ranks: transports, the executor, the runner."""

from pipework.run.runner import Evaluation, Runner

__all__ = ["Evaluation", "Runner"]
