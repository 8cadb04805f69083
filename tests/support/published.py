"""Small models in the layouts of the published AlignScore and MedCAT packs, and Pythons for MedCAT."""

import json
import venv
from pathlib import Path

NAMES = {"nodule": ["C1", "T1"], "lung": ["C2", "T2"], "mass": ["C3", "T1"]}
MEDCAT = '''
import json, os, zipfile


class CAT:
    """The parts of MedCAT 1.16 that are used; as there, a folder beside a zip is read instead of it."""

    def __init__(self, names):
        self.names = names
        types = {}
        for cui, type_id in names.values():
            types.setdefault(type_id, set()).add(cui)
        self.cdb = Box(addl_info={"type_id2cuis": types}, config=Box(linking={"filters": {"cuis": {"C0"}}}))

    @classmethod
    def load_model_pack(cls, path):
        if path.endswith(".zip"):
            unpacked = path.replace(".zip", "")
            if not os.path.exists(unpacked):
                zipfile.ZipFile(path).extractall(unpacked)
            path = unpacked
        return cls(json.load(open(os.path.join(path, "cdb.dat"))))

    def get_entities(self, text):
        found = [self.names[word][0] for word in text.lower().split() if word in self.names]
        allowed = self.cdb.config.linking["filters"]["cuis"]
        return {"entities": {n: {"cui": cui} for n, cui in enumerate(found) if cui in allowed}}


class Box:
    def __init__(self, **values):
        vars(self).update(values)
'''


def python_with_medcat(root: Path, version: str = "1.16.12") -> Path:
    """A Python whose package `medcat` looks words up in `cdb.dat`."""
    venv.create(root, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "medcat").mkdir()
    (site / "medcat" / "__init__.py").touch()
    (site / "medcat" / "cat.py").write_text(MEDCAT)
    install(root, "medcat", version)
    return root / "bin" / "python"


def install(root: Path, name: str, version: str) -> Path:
    """What pip leaves of a package beside its code."""
    (site,) = root.glob("lib/python*/site-packages")
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def pack(folder: Path, names: dict = NAMES) -> Path:
    """A folder that is a model pack to `python_with_medcat`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cdb.dat").write_text(json.dumps(names))
    return folder


def hub_cache(root: Path, name: str, source: Path) -> Path:
    """A checkpoint folder as the hub's client leaves it: files named by their hashes, and links to them."""
    import hashlib

    place = root / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    snapshot = place / "snapshots" / commit
    for folder in (place / "blobs", place / "refs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for file in (file for file in source.iterdir() if file.is_file()):
        content = file.read_bytes()
        large = file.suffix in (".safetensors", ".bin")
        head = b"" if large else b"blob %d\0" % len(content)
        blob = hashlib.new("sha256" if large else "sha1", head + content).hexdigest()
        (place / "blobs" / blob).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot
