"""Write the register and spill snapshot of the compile gate: tests/kernel_snapshot.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from test_kernels_compile import SNAPSHOT, TARGETS, gate, nvrtc_version

from nybble.ops import OPERATIONS


def main() -> None:
    kernels = {name: {card.arch: gate(name, card) for card in TARGETS} for name in OPERATIONS}
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
