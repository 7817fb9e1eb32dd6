"""The ``-cpu`` option of a test as changes to a CPU profile.

QEMU names a model and then flags and properties: ``max,+vmx,-pku,phys-bits=36``. Of the models only the one with
everything has its like among the profiles; for the others the flags say what the test depends on. They are applied to
the profile's tables before anything is derived from them, so CPUID, control registers and capability MSRs stay
consistent.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from attrs import frozen

from vmcs.controls import CONTROLS, ControlWord
from vtx.x86.cpuid_features import FEATURES
from vtx.x86.profile import build_profile
from vtx.x86.toml_section import ProfileError
from vtx.x86.vmx_profile import BASIC_FEATURES, CONTROL_FEATURES, CONTROL_NEEDS

Document = dict[str, Any]
"""A profile's tables as TOML has them."""


class UnsupportedError(Exception):
    """The processor cannot be what a test asks for; the message says why in a few words."""


@frozen
class Wish:
    """What a test wants the processor to be: ``on`` and ``off`` are flag names of QEMU, widths are in bits.

    ``profile`` is the profile that is most like QEMU's model, None if any will do.
    """

    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    vendor: str | None = None
    physical_address_width: int | None = None
    profile: str | None = None

    def __str__(self) -> str:
        parts = [f"+{name}" for name in self.on] + [f"-{name}" for name in self.off]
        if self.vendor is not None:
            parts.append(f"vendor={self.vendor}")
        if self.physical_address_width is not None:
            parts.append(f"phys-bits={self.physical_address_width}")
        return " ".join(parts)

    def beyond(self, document: Mapping[str, Any]) -> Wish:
        """The part of the wish that the processor of ``document`` does not fulfil by itself."""
        has = features_of([document])
        width = document["implementation"]["physical_address_width"]
        return Wish(
            tuple(flag for flag in self.on if _name_here(flag) not in has),
            tuple(flag for flag in self.off if _name_here(flag) in has),
            self.vendor if self.vendor != document["identity"]["vendor"] else None,
            self.physical_address_width if self.physical_address_width != width else None,
        )


# Flags whose name is not the feature's name with another spelling.
_FLAG_NAMES: Final = {
    "3dnowprefetch": "PREFETCHW",
    "aes": "AESNI",
    "clflush": "CLFSH",
    "cx16": "CMPXCHG16B",
    "fxsr": "FXSR",
    "invtsc": "INVARIANT-TSC",
    "decodeassists": "DecodeAssists",
    "flushbyasid": "FlushByAsid",
    "lahf-lm": "LAHF64",
    "lbrv": "LbrVirt",
    "mmxext": "MmxExt",
    "npt": "NP",
    "nrip-save": "NRIPS",
    "pdpe1gb": "PAGE1GB",
    "pfthreshold": "PauseFilterThreshold",
    "pni": "SSE3",
    "svm-lock": "SVML",
    "tsc-adjust": "IA32_TSC_ADJUST",
    "tsc-scale": "TscRateMsr",
    "v-vmsave-vmload": "VmsaveVirt",
}

# Flags of QEMU for VMX controls, and the keys and names the control has in a profile.
_CONTROL_KEYS: Final = {
    ControlWord.PIN_BASED: "pin_based",
    ControlWord.PRIMARY: "primary",
    ControlWord.SECONDARY: "secondary",
    ControlWord.TERTIARY: "tertiary",
    ControlWord.EXIT: "exit",
    ControlWord.SECONDARY_EXIT: "secondary_exit",
    ControlWord.ENTRY: "entry",
}
_CONTROL_FLAGS: Final = {
    "vmx-apicv-register": "APIC-register virtualization",
    "vmx-apicv-vid": "virtual-interrupt delivery",
    "vmx-apicv-x2apic": "virtualize x2APIC mode",
    "vmx-apicv-xapic": "virtualize APIC accesses",
    "vmx-desc-exit": "descriptor-table exiting",
    "vmx-ept": "enable EPT",
    "vmx-flexpriority": "use TPR shadow",
    "vmx-invpcid-exit": "enable INVPCID",
    "vmx-mbec": "mode-based execute control for EPT",
    "vmx-mtf": "monitor trap flag",
    "vmx-pml": "enable PML",
    "vmx-posted-intr": "process posted interrupts",
    "vmx-preemption-timer": "activate VMX-preemption timer",
    "vmx-shadow-vmcs": "VMCS shadowing",
    "vmx-tsc-scaling": "use TSC scaling",
    "vmx-unrestricted-guest": "unrestricted guest",
    "vmx-vmfunc": "enable VM functions",
    "vmx-vnmi": "virtual NMIs",
    "vmx-vpid": "enable VPID",
}

# Models that are whatever the host, or QEMU, is able to be.
_MODELS: Final = {"max": "everything", "host": "everything"}

# A whole extension is a part of a profile or it is not: there is more to it than its flag.
_EXTENSIONS: Final = ("VMX", "SVM")

# Properties without a meaning for a machine that is not an accelerator on some host.
_WITHOUT_EFFECT: Final = ("host-phys-bits", "migratable", "check", "enforce", "l3-cache", "pmu")

# Features that a model of QEMU has only if asked for, if at all: it has no flag for the first two, and FRED is nothing
# that an accelerator gives its guests. Tests rely on that, and take bits that came with FRED for reserved.
_NOT_IN_MODELS: Final = ("RDPRU", "APERFMPERF", "FRED")

_STATE_COMPONENTS: Final = {"PKU": ("PKRU",), "MPX": ("BNDREGS", "BNDCSR")}
_NEED_XSAVE: Final = ("XSAVEOPT", "XSAVEC", "XGETBV_1", "XSAVES", "AVX", "PKU", "MPX")


def parse_wish(text: str) -> Wish:
    """The wish that the value of a ``-cpu`` option expresses, or `UnsupportedError`."""
    model, *parts = text.split(",")
    flags: dict[str, bool] = {}
    vendor = width = None
    for part in parts:
        name, equals, value = part.partition("=")
        if part[:1] in ("+", "-"):
            flags[part[1:]] = part[0] == "+"
        elif name == "vendor":
            vendor = value
        elif name == "phys-bits" and re.fullmatch("[1-9][0-9]?", value):
            width = int(value)
        elif name in _WITHOUT_EFFECT:
            continue
        elif value in ("on", "off") or (not equals and _feature(name) is not None):
            flags[name] = value != "off"
        elif name.startswith(("hv_", "hv-")):
            raise UnsupportedError("the interface of Hyper-V to its guests")
        else:
            raise UnsupportedError(f"processor property {part}")
    on = tuple(name for name, wanted in flags.items() if wanted)
    off = tuple(name for name, wanted in flags.items() if not wanted)
    return Wish(on, off, vendor, width, _MODELS.get(model))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_PLAIN_NAME: Final = {_plain(name): name for name in FEATURES}


def _feature(flag: str) -> str | None:
    """The CPUID feature that a flag of QEMU names, as profiles call it; None if nothing here has such a name."""
    return _FLAG_NAMES.get(flag.replace("_", "-")) or _BY_PLAIN_NAME.get(_plain(flag))


def _name_here(flag: str) -> str | None:
    """The control or feature that a flag names."""
    return _CONTROL_FLAGS.get(flag) or _feature(flag)


def unknown_flags(flags: str) -> tuple[str, ...]:
    """Which of ``flags`` are no features or controls of a profile; `UnsupportedError` for what is no flag at all."""
    wish = parse_wish(f",{flags}") if flags else Wish()
    return tuple(flag for flag in (*wish.on, *wish.off) if _name_here(flag) is None)


def features_of(documents: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Features and VMX controls that at least one of these profiles has: what a processor here can be made to have."""
    found: set[str] = set()
    for document in documents:
        found.update(document["cpuid"]["features"])
        for key in _CONTROL_KEYS.values():
            found.update(document.get("vmx", {}).get(key, ()))
    return frozenset(found)


def adapt(document: Mapping[str, Any], wish: Wish, possible: frozenset[str]) -> Document:
    """A copy of a profile's tables with the changes of ``wish``, or `UnsupportedError`.

    ``possible`` are the features and controls that can be switched on.
    """
    changed: Document = copy.deepcopy(dict(document))
    if wish.vendor not in (None, changed["identity"]["vendor"]):
        raise UnsupportedError(f"a processor of {wish.vendor}")
    if wish.physical_address_width is not None:
        changed["implementation"]["physical_address_width"] = wish.physical_address_width
    asked = {_feature(flag) for flag in wish.on}
    for feature in _NOT_IN_MODELS:
        if feature not in asked:
            _drop_feature(changed, feature)
    for flag in wish.off:
        if (control := _CONTROL_FLAGS.get(flag)) is not None:
            _drop_control(changed, control)
        elif (named := _feature(flag)) is not None:
            _drop_feature(changed, named)
        # else: what nothing here has is off already
    for flag in wish.on:
        if (control := _CONTROL_FLAGS.get(flag)) is not None:
            _add_control(changed, control, possible)
        else:
            _add_feature(changed, flag, possible)
    try:
        build_profile(changed["name"], changed)
    except ProfileError as error:
        raise UnsupportedError(f"{wish}: {error}") from None
    return changed


def _drop_feature(document: Document, feature: str) -> None:
    features: list[str] = document["cpuid"]["features"]
    if feature not in features:
        return
    features.remove(feature)
    if feature in _EXTENSIONS:
        document.pop(feature.lower(), None)
    for control, needed in CONTROL_FEATURES.items():
        if needed == feature:
            _drop_control(document, control)
    for bit, needed in BASIC_FEATURES.items():
        if needed == feature:
            document.get("vmx", {}).get("basic", {}).pop(bit, None)
    components = document["cpuid"].get("xsave_components", [])
    if feature == "XSAVE":
        document["cpuid"]["xsave_components"] = []
        for dependent in _NEED_XSAVE:
            _drop_feature(document, dependent)
    elif feature in _STATE_COMPONENTS:
        components[:] = (name for name in components if name not in _STATE_COMPONENTS[feature])


def _drop_control(document: Document, control: str) -> None:
    for key in _CONTROL_KEYS.values():
        controls = document.get("vmx", {}).get(key, [])
        if control in controls:
            controls.remove(control)
            for dependent, needed in CONTROL_NEEDS.items():
                if needed == control:
                    _drop_control(document, dependent)


def _add_feature(document: Document, flag: str, possible: frozenset[str]) -> None:
    feature = _feature(flag)
    features: list[str] = document["cpuid"]["features"]
    if feature in features:
        return
    if feature is None or feature not in possible:
        raise UnsupportedError(f"no processor here has {feature or flag}")
    if feature in _EXTENSIONS:
        raise UnsupportedError(f"the processor has no {feature}")
    features.append(feature)
    components = document["cpuid"].setdefault("xsave_components", [])
    if feature == "XSAVE":
        components += ["x87", "SSE"]
    elif "XSAVE" in features:
        components += _STATE_COMPONENTS.get(feature, ())


def _add_control(document: Document, control: str, possible: frozenset[str]) -> None:
    key = next(_CONTROL_KEYS[each.word] for each in CONTROLS if each.name == control)
    controls: list[str] = document.get("vmx", {}).get(key, [])
    if control in controls:
        return
    if "vmx" not in document:
        raise UnsupportedError("the processor has no VMX")
    if control not in possible:
        raise UnsupportedError(f"no processor here has the VMX control {control!r}")
    controls.append(control)
