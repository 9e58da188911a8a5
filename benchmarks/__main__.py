"""Every benchmark, one after another; the tables and all times are left in `benchmarks/results/`.

python -m benchmarks [--quick]
"""

from __future__ import annotations

import argparse

from benchmarks import halves, host, imports, pipelines, plan, search, stage_code
from benchmarks.sizes import BY_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs; writes nothing")
    if parser.parse_args().quick:
        print(imports.benchmark(repeats=1).markdown())
        print(plan.benchmark(sizes=((4, 32),)).markdown())
        print(
            search.benchmark(seconds=1.0, cases=[(name, given, None) for name, given in search.others()][:1]).markdown()
        )
        print(stage_code.benchmark(BY_NAME["tiny"], repeats=3).markdown())
        print(halves.benchmark((BY_NAME["tiny"],), starts=1, repeats=1, microbatches=1).markdown())
        print(host.benchmark(repeats=1, seconds=0.1).markdown())
        print(pipelines.benchmark(BY_NAME["minimal"], repeats=1, seconds=0.1, compiler="eager").markdown())
        return
    for benchmark in (imports, plan, search, stage_code, halves, host):
        print(f"--- {benchmark.__name__}", flush=True)
        benchmark.benchmark().write()
    here = pipelines.ranks_here()
    for size in pipelines.usual_sizes(here):
        pipelines.benchmark(size, here).write()


if __name__ == "__main__":
    main()
