"""What a server would say of an adapter folder: what it is made of, how well it is served, or why it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from lorry.adapters.errors import AdapterError, MalformedAdapter
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.files import AdapterFiles, Place, read_adapter
from lorry.adapters.reading.identity import FINGERPRINT_KEY, doubt_without_fingerprint
from lorry.adapters.reading.probe import Probe, probe
from lorry.adapters.reading.rounding import Rounding, rounding
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.strict_json import parse_object
from lorry.adapters.reading.targets import targets_of
from lorry.kernels.lora import BYTES, END_SITES, SITES


@dataclass
class Report:
    """One folder. Empty where a refusal came before.

    modules: site → changed layers, -1 for the embedding and the head; ranks and scalings: value → linears with factors
    of it; base_named: the config's base_model_name_or_path; fingerprint: that of the adapter's base, base_fingerprint:
    the served one's, where both were compared; probe: None where no reference is known for its methods; rounding: what
    pages in 8 bits cost. error: why it is refused, with the field, tensor or file at fault.
    """

    folder: str
    revision: str = ""
    methods: tuple[str, ...] = ()
    modules: dict[str, list[int]] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    scalings: dict[float, int] = field(default_factory=dict)
    bytes: int = 0
    pages: int = 0
    base_named: str = ""
    fingerprint: str = ""
    base_fingerprint: str = ""
    warnings: list[str] = field(default_factory=list)
    probe: Probe | None = None
    rounding: Rounding | None = None
    error: AdapterError | None = None

    @property
    def refused(self) -> bool:
        return self.error is not None

    def as_json(self) -> dict[str, Any]:
        """Plain values; `error` as its kind, field and message."""
        values = asdict(replace(self, error=None))
        error = self.error
        if error is not None:
            values["error"] = {"kind": type(error).__name__, "field": error.field, "message": error.message}
        return {**values, "refused": self.refused}


def report_on(
    place: Place, layout: ModelLayout, dtype: torch.dtype, base: BaseWeights, fingerprint: Callable[[], str]
) -> Report:
    """Load the folder as a server would and describe what came of it; raises nothing that its content can cause.

    dtype: of the rank pages; where these are of 8 bits the probe is of float32, and beside it stands what 8 bits cost.
    fingerprint: of the base, asked for only where an adapter names one.
    """
    report = Report(str(place.folder))
    try:
        files = read_adapter(place, layout.max_weight_bytes())
        _describe_files(report, files)
        spec = AdapterSpec.from_bytes(bytes(files.config))
        report.base_named, report.methods = spec.base, spec.methods
        if report.fingerprint:
            report.base_fingerprint = fingerprint()
            layout = replace(layout, fingerprint=report.base_fingerprint)
        else:
            report.warnings.append(doubt_without_fingerprint(spec.base, layout.base))
        adapter = load_adapter(place, layout, dtype, base, report.warnings.append)
        order = (*SITES, *END_SITES)
        for layer, site in sorted(adapter.linears, key=lambda linear: (order.index(linear[1]), linear[0])):
            report.modules.setdefault(site, []).append(layer)
        targets = targets_of(spec, layout)
        ranked = {
            key: linear for key, linear in adapter.linears.items() if linear.pages.shape[0] and key in targets.factors
        }
        report.ranks = dict(
            sorted(Counter(spec.rank_of(layout.module_path(*targets.owner(key))) for key in ranked).items())
        )
        report.scalings = dict(sorted(Counter(linear.scaling for linear in ranked.values()).items()))
        report.bytes = adapter.nbytes
        report.pages = sum(linear.pages.shape[0] for linear in adapter.linears.values())
        config = parse_object(bytes(files.config), "", len(files.config))
        exact = adapter
        if dtype in BYTES:
            exact = load_adapter(place, layout, torch.float32, base, lambda warning: None)
            report.rounding = rounding(exact, adapter, layout)
        report.probe = probe(exact, config, [bytes(part.content) for part in files.weights], layout, base)
        if report.probe is not None and not report.probe.within:
            raise AdapterError("the served update differs from the reference by more than rounding explains")
    except AdapterError as error:
        report.error = error
    except OSError as error:
        report.error = MalformedAdapter(f"the adapter's files cannot be read: {error.strerror}")
    return report


def _describe_files(report: Report, files: AdapterFiles) -> None:
    report.revision = files.revision
    report.fingerprint = files.metadata.get(FINGERPRINT_KEY, "")
