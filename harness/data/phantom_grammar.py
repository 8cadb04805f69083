"""The contents of the made-up set: modalities, anatomy, findings, and the grammar of the captions.

Concepts are real UMLS CUIs. The image determines the words of its caption, except random synonyms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Choice = Sequence[tuple[float, str]]
"""(probability, text), the most likely first."""


@dataclass(frozen=True)
class Modality:
    """How a modality shades tissue (grey levels 0-255), what it can show, and openings of its captions."""

    name: str
    concept: str
    """Its name in UMLS."""
    cui: str
    weight: float
    anatomies: tuple[str, ...]
    findings: tuple[str, ...]
    shades: Mapping[str, int]
    blur: float
    """Radius in pixels."""
    noise: float
    """Standard deviation in grey levels."""
    openings: Choice


@dataclass(frozen=True)
class Lesion:
    """The names of a finding (`concept` in UMLS), and the sentences that a large one adds."""

    name: str
    concept: str
    cui: str
    phrases: Choice
    detail: str
    """Follows in captions of large findings."""
    course: str | None = None
    """If given, follows the detail; this makes the long captions."""
    seat: str = "organ"
    """Where it sits, a key of `PLACES`."""


MODALITIES = (
    Modality(
        "X-ray",
        "Plain x-ray",
        "C1306645",
        0.25,
        ("chest", "pelvis", "spine", "legs", "head"),
        ("mass", "fracture", "nodules"),
        {"air": 62, "out": 48, "body": 96, "organ": 112, "bone": 158, "rim": 96, "dark": 12, "bright": 255},
        1.6,
        5,
        (
            (0.6, "Plain radiograph of the {anatomy} showing"),
            (0.25, "{Anatomy} X-ray showing"),
            (0.15, "Frontal radiograph of the {anatomy} with"),
        ),
    ),
    Modality(
        "CT",
        "X-Ray Computed Tomography",
        "C0040405",
        0.25,
        ("chest", "abdomen", "head", "pelvis", "spine"),
        ("mass", "cyst", "hematoma", "abscess", "nodules"),
        {"air": 14, "out": 0, "body": 70, "organ": 92, "bone": 176, "rim": 50, "dark": 8, "bright": 255},
        0.7,
        9,
        (
            (0.6, "Axial contrast-enhanced CT of the {anatomy} reveals"),
            (0.25, "Axial computed tomography of the {anatomy} reveals"),
            (0.15, "{Anatomy} CT scan reveals"),
        ),
    ),
    Modality(
        "MRI",
        "Magnetic Resonance Imaging",
        "C0024485",
        0.18,
        ("head", "abdomen", "pelvis", "spine", "legs"),
        ("mass", "cyst", "hematoma", "abscess"),
        {"air": 6, "out": 4, "body": 56, "organ": 100, "bone": 22, "rim": 200, "dark": 8, "bright": 255},
        1.0,
        13,
        (
            (0.6, "T2-weighted magnetic resonance image of the {anatomy} demonstrates"),
            (0.25, "Coronal T2-weighted MRI of the {anatomy} demonstrates"),
            (0.15, "Magnetic resonance imaging, {anatomy}, demonstrates"),
        ),
    ),
    Modality(
        "ultrasound",
        "Ultrasonography",
        "C0041618",
        0.14,
        ("abdomen", "pelvis", "legs"),
        ("mass", "cyst", "hematoma", "abscess"),
        {"air": 20, "out": 40, "body": 52, "organ": 72, "bone": 96, "rim": 84, "dark": 2, "bright": 255},
        1.2,
        6,
        (
            (0.6, "Grayscale ultrasound, {anatomy}:"),
            (0.25, "Sonogram of the {anatomy}:"),
            (0.15, "Transverse ultrasound, {anatomy}:"),
        ),
    ),
    Modality(
        "angiography",
        "angiogram",
        "C0002978",
        0.10,
        ("head", "abdomen", "legs"),
        ("aneurysm", "stenosis"),
        {
            "air": 200,
            "out": 216,
            "body": 186,
            "organ": 176,
            "bone": 150,
            "rim": 186,
            "dark": 22,
            "bright": 216,
        },
        1.0,
        6,
        (
            (0.6, "Digital subtraction angiography, {anatomy} arteries, confirms"),
            (0.4, "Catheter angiogram, {anatomy} arteries, confirms"),
        ),
    ),
    Modality(
        "PET",
        "Positron-Emission Tomography",
        "C0032743",
        0.08,
        ("chest", "abdomen", "head", "pelvis"),
        ("mass", "nodes"),
        {
            "air": 226,
            "out": 250,
            "body": 196,
            "organ": 158,
            "bone": 184,
            "rim": 176,
            "dark": 236,
            "bright": 4,
        },
        4.0,
        5,
        (
            (0.6, "FDG positron emission tomography: intense {anatomy} uptake by"),
            (0.4, "FDG-PET: intense {anatomy} uptake by"),
        ),
    ),
)

ANATOMIES = {
    "head": "C0018670",
    "chest": "C0817096",
    "abdomen": "C0000726",
    "pelvis": "C0030797",
    "spine": "C0037949",
    "legs": "C0023216",
}
ANATOMY_NAMES = {name: name for name in ANATOMIES} | {"spine": "lumbar spine", "legs": "lower extremities"}
PLACES = {
    "organ": {
        "head": "cerebral hemisphere",
        "chest": "lung",
        "abdomen": "kidney",
        "pelvis": "adnexa",
        "spine": "psoas muscle",
        "legs": "calf",
    },
    "bone": {
        "head": "parietal bone",
        "chest": "ribs",
        "pelvis": "iliac wing",
        "spine": "transverse process",
        "legs": "tibia",
    },
    "artery": {
        "head": "middle cerebral artery",
        "abdomen": "renal artery",
        "legs": "popliteal artery",
    },
}

LESIONS = {
    "mass": Lesion(
        "mass",
        "Mass of body structure",
        "C0577559",
        ((0.6, "a {size} lobulated solid mass"), (0.4, "a {size} irregular tumour")),
        "Its spiculated margins invade neighbouring tissue.",
        "Malignancy was suspected, and biopsy with histological examination was recommended before surgery.",
    ),
    "cyst": Lesion(
        "cyst",
        "Cyst",
        "C0010709",
        ((0.6, "one {size} thin-walled simple cyst"), (0.4, "one {size} round fluid-filled cyst")),
        "No septation or enhancement is present.",
    ),
    "hematoma": Lesion(
        "hematoma",
        "Hematoma",
        "C0018944",
        ((0.6, "acute {size} crescent-shaped hematoma"), (0.4, "acute {size} crescentic blood collection")),
        "There is mass effect upon adjacent structures.",
        "Emergency evacuation took place within hours, and repeat imaging two days later was normal again.",
    ),
    "abscess": Lesion(
        "abscess",
        "Abscess",
        "C0000833",
        (
            (0.6, "{size} rim-enhancing abscess, thick wall,"),
            (0.4, "{size} ring-like abscess, thick wall,"),
        ),
        "Necrotic debris fills its centre.",
        "Percutaneous catheter drainage under imaging guidance yielded pus, and antibiotics were given.",
    ),
    "fracture": Lesion(
        "fracture",
        "Fracture",
        "C0016658",
        ((0.6, "displaced {size} comminuted fracture line"), (0.4, "displaced {size} oblique fracture")),
        "Surgical fixation followed.",
        seat="bone",
    ),
    "nodules": Lesion(
        "nodules",
        "Nodule",
        "C0028259",
        ((0.6, "multiple {size} discrete nodules"), (0.4, "several {size} scattered nodules")),
        "They resemble metastases from an unknown primary.",
    ),
    "aneurysm": Lesion(
        "aneurysm",
        "Aneurysm",
        "C0002940",
        ((0.6, "{size} saccular aneurysm"), (0.4, "{size} berry aneurysm")),
        "Endovascular coiling was performed successfully.",
        "Follow-up after six months showed complete occlusion without recurrence, and flow stayed normal.",
        seat="artery",
    ),
    "stenosis": Lesion(
        "stenosis",
        "Stenosis",
        "C1261287",
        ((0.6, "{size} segmental stenosis"), (0.4, "{size} focal narrowing")),
        "Balloon angioplasty restored distal flow.",
        seat="artery",
    ),
    "nodes": Lesion(
        "nodes",
        "Lymphadenopathy",
        "C0497156",
        ((0.6, "{size} hypermetabolic lymph nodes"), (0.4, "{size} avid lymphadenopathy")),
        "Lymphoma was proven histologically.",
    ),
}

QUALIFIERS = {"right": "C0205090", "left": "C0205091", "small": "C0700321", "large": "C0549177"}
_NORMAL = 0.08  # share of images without a finding
_AGED = 0.08  # share of captions with the age, which the image does not show


@dataclass(frozen=True)
class Case:
    """One image's contents; `lesion`, `side` and `size` are None together."""

    modality: Modality
    anatomy: str
    lesion: Lesion | None
    side: str | None
    size: str | None


def make_up(rng: np.random.Generator) -> Case:
    """A case drawn from the modalities' weights and from what each can show."""
    modality = MODALITIES[rng.choice(len(MODALITIES), p=[m.weight for m in MODALITIES])]
    anatomy = str(rng.choice(modality.anatomies))
    lesion = LESIONS[str(rng.choice(modality.findings))]
    side, size = str(rng.choice(["right", "left"])), str(rng.choice(["small", "large"]))
    if rng.random() < _NORMAL:
        return Case(modality, anatomy, None, None, None)
    return Case(modality, anatomy, lesion, side, size)


def caption(case: Case, rng: np.random.Generator | None) -> str:
    """The caption of a case, synonyms by chance; without `rng`, always the likeliest."""
    name = ANATOMY_NAMES[case.anatomy]
    words = {"anatomy": name, "Anatomy": name.capitalize(), "size": case.size}
    opening = _pick(case.modality.openings, rng).format(**words)
    if case.lesion is None:
        return f"{opening} no focal abnormality."
    phrase = _pick(case.lesion.phrases, rng).format(**words)
    sentences = [f"{opening} {phrase} in the {case.side} {PLACES[case.lesion.seat][case.anatomy]} (arrow)."]
    if rng is not None and rng.random() < _AGED:
        sentences.append(f"The patient is {rng.integers(18, 90)} years old.")
    if case.size == "large":
        sentences += [text for text in (case.lesion.detail, case.lesion.course) if text]
    return " ".join(sentences)


def _pick(choice: Choice, rng: np.random.Generator | None) -> str:
    if rng is None:
        return choice[0][1]
    return choice[rng.choice(len(choice), p=[probability for probability, _ in choice])][1]


def cuis(case: Case) -> tuple[str, ...]:
    """The concepts of a case: modality, anatomy, finding, side, size."""
    found = [case.modality.cui, ANATOMIES[case.anatomy]]
    if case.lesion:
        found += [case.lesion.cui, QUALIFIERS[case.side], QUALIFIERS[case.size]]
    return tuple(found)


def concept_names() -> dict[str, str]:
    """CUI -> name of every concept that the set can hold."""
    names = {modality.cui: modality.concept for modality in MODALITIES}
    names |= {cui: ANATOMY_NAMES[anatomy].capitalize() for anatomy, cui in ANATOMIES.items()}
    names |= {lesion.cui: lesion.concept for lesion in LESIONS.values()}
    return dict(sorted((names | {cui: word.capitalize() for word, cui in QUALIFIERS.items()}).items()))
