"""From a clone to a mask of one's own facts, by the README's own lines: `python benchmarks/newcomer.py`.

Clones this repository's last commit into an empty folder, runs the line under "Try it", then the block under "Use your own" but for
the page it opens. Nothing of this environment is used; the packages come from wherever pip finds them.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent


def block(readme: str, mark: str) -> str:
    """The shell block behind a mark."""
    return readme.split(f"<!-- {mark} -->")[1].split("```sh\n")[1].split("```")[0]


def main() -> None:
    kept = ("HOME", "PATH", "LANG", "PIP_")
    env = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "mechunlearn"
        start = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(HERE), str(clone)], check=True, env=env)
        readme = (clone / "README.md").read_text(encoding="utf-8")
        own = "\n".join(line for line in block(readme, "own facts").splitlines() if " explore " not in line)
        for name, lines in {"installation and demo": block(readme, "demo"), "mask of own facts": own}.items():
            began = time.monotonic()
            subprocess.run(["bash", "-euc", lines], check=True, cwd=clone, env=env, stdout=subprocess.DEVNULL)
            print(f"{name}: {time.monotonic() - began:.0f} s")
        assert (clone / "my.mask.json").is_file()
        print(f"from nothing to the mask: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
