"""Known advisories against the versions that the constraints files pin, and what is pinned as SBOMs.

`python -m audit` checks, without a network. `python -m audit.renew` fetches the advisories. `python -m audit.sbom`
writes the SBOMs beside the wheel.
"""
