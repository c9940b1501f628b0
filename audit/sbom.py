"""`python -m audit.sbom [DIR]`: an SBOM of each constraints file, CycloneDX JSON in dist/ beside the wheel, or in DIR.

It is run in an environment with `cyclonedx-bom`. That lists what is pinned; licences and who needs whom are those of
the line's environment, as far as the pinned version is installed there. Same inputs, same bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from audit.files import LINES, ROOT, AuditError

ENVIRONMENTS = {"grpc": ".venv", "http": ".venv-http"}
VERSION = "1.6"
OPTIONS = ("--output-reproducible", "--no-validate", "--short-PURLs", "--mc-type", "library", "--sv", VERSION)


def tool(*arguments: str | Path) -> dict[str, Any]:
    """Runs cyclonedx-py, and returns its SBOM."""
    command = [sys.executable, "-m", "cyclonedx_py", *arguments, *OPTIONS, "--pyproject", ROOT / "pyproject.toml"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AuditError(f"cyclonedx-py failed (pip install cyclonedx-bom): {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def joined(pinned: dict[str, Any], installed: dict[str, Any]) -> dict[str, Any]:
    """The pinned components, with what is known of those of the same name and version that are installed."""
    root = pinned["metadata"]["component"]["bom-ref"]
    kept = {_key(one): one for one in pinned["components"]}
    purls = {one["bom-ref"]: kept[_key(one)]["purl"] for one in installed["components"] if _key(one) in kept}
    known = {purls[one["bom-ref"]]: one for one in installed["components"] if one["bom-ref"] in purls}
    needs = {
        purls.get(one["ref"], root): sorted(purls[of] for of in one.get("dependsOn", ()) if of in purls)
        for one in installed["dependencies"]
        if one["ref"] in {*purls, root}
    }
    components = []
    for one in sorted(kept.values(), key=lambda one: str(one["purl"])):
        own = {key: one[key] for key in ("type", "name", "version", "purl")}
        components.append({**known.get(one["purl"], {}), **own, "bom-ref": one["purl"]})
    refs = [root, *(one["purl"] for one in components)]
    dependencies = [{"ref": ref, "dependsOn": needs[ref]} if needs.get(ref) else {"ref": ref} for ref in refs]
    return {**pinned, "components": components, "dependencies": dependencies}


def _key(component: dict[str, Any]) -> tuple[str, str]:
    """Name and version, without the local part of torch's (+cpu)."""
    return canonicalize_name(component["name"]), component["version"].partition("+")[0]


def check(text: str) -> None:
    """Raises unless it is valid by CycloneDX's schema."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    if wrong := JsonStrictValidator(SchemaVersion.from_version(VERSION)).validate_str(text):
        raise AuditError(f"not valid CycloneDX: {wrong}")


def main(out: Path = ROOT / "dist") -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    try:
        for line, name in LINES.items():
            python = ROOT / ENVIRONMENTS[line] / "bin" / "python"
            installed = tool("environment", python) if python.exists() else {"components": [], "dependencies": []}
            text = json.dumps(joined(tool("requirements", ROOT / name), installed), indent=1, sort_keys=True) + "\n"
            check(text)
            out.mkdir(exist_ok=True)
            file = out / f"{project['name'].replace('-', '_')}-{project['version']}-{line}.cdx.json"
            file.write_text(text, "utf-8")
            print(file, "" if python.exists() else f"(without licences and dependencies: there is no {python})")
    except AuditError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
