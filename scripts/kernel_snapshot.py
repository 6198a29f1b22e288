"""Write the register and spill snapshot of the compile gate, tests/kernel_snapshot.json: of all operations, or of those
named as arguments, the others staying as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from test_kernels_compile import SNAPSHOT, TARGETS, gate, nvrtc_version

from nybble.ops import OPERATIONS


def main() -> None:
    wanted = sys.argv[1:] or list(OPERATIONS)
    if unknown := set(wanted) - set(OPERATIONS):
        sys.exit(f"no operations: {sorted(unknown)}; there are {list(OPERATIONS)}")
    kept = json.loads(SNAPSHOT.read_text()) if len(wanted) < len(OPERATIONS) else {"nvrtc": nvrtc_version()}
    if kept["nvrtc"] != nvrtc_version():
        sys.exit(f"the snapshot is of NVRTC {kept['nvrtc']}, here is {nvrtc_version()}: write all of it")
    kernels = {
        name: {card.arch: gate(name, card) for card in TARGETS} if name in wanted else kept["kernels"][name]
        for name in OPERATIONS
    }
    lines = [
        "{",
        f'"nvrtc": "{nvrtc_version()}",',
        '"columns": ["registers", "spill", "stack", "shared"],',
        '"kernels": {',
    ]
    for i, (name, targets) in enumerate(kernels.items()):
        lines.append(f'"{name}": {{')
        for j, (arch, built) in enumerate(targets.items()):
            rows = ",\n".join(f"{json.dumps(label)}: {json.dumps(row)}" for label, row in built.items())
            lines.append(f'"{arch}": {{\n{rows}\n}}{"," if j + 1 < len(targets) else ""}')
        lines.append("}" + ("," if i + 1 < len(kernels) else ""))
    lines += ["}", "}"]
    SNAPSHOT.write_text("\n".join(lines) + "\n")
    print(f"{SNAPSHOT}: {sum(len(built) for targets in kernels.values() for built in targets.values())} kernels")


if __name__ == "__main__":
    main()
