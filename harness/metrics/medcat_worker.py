"""Finds the concepts in captions. Another Python runs it, which has MedCAT 1 but not this program.

Usage: python -I medcat_worker.py PACK TEXTS.json CONCEPTS.json
"""

import json
import sys
from pathlib import Path


def main(pack: str, texts: str, concepts: str) -> None:
    """Read a list of captions, write a list of lists of CUIs, each once."""
    from medcat.cat import CAT

    cat = CAT.load_model_pack(pack)
    # the organisers list all 127 semantic types of UMLS; this replaces the pack's own filter
    typed = set().union(*cat.cdb.addl_info["type_id2cuis"].values())
    cat.cdb.config.linking["filters"]["cuis"] = typed
    captions = json.loads(Path(texts).read_text(encoding="utf-8"))
    found = [sorted({entity["cui"] for entity in _entities(cat, caption)}) for caption in captions]
    Path(concepts).write_text(json.dumps(found), encoding="utf-8")


def _entities(cat, caption: str) -> list:
    return list(cat.get_entities(caption)["entities"].values()) if caption.strip() else []


if __name__ == "__main__":
    main(*sys.argv[1:])
