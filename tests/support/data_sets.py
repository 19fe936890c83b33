"""Folders that hold what data sets of the hub hold: Parquet with features, and a card that names configurations."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures


def write(folder, columns, features, config=None, split="train"):
    """A file of a data set; with `config` the card says so."""
    place = folder / config if config else folder
    place.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(place / f"{split}-00000-of-00001.parquet")
    if config:
        entry = f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}/*.parquet\n"
        card = folder / "README.md"
        card.write_text(card.read_text().replace("\n---\n", f"\n{entry}---\n") if card.exists() else
                        f"---\nconfigs:\n{entry}---\n")  # fmt: skip
    return str(folder)


def pictures(count, size=(9, 7)):
    """Random images, (width, height) pixels."""
    chance = np.random.default_rng(0)
    return [Pictures.fromarray(chance.integers(0, 256, (size[1], size[0], 3), np.uint8)) for _ in range(count)]


def write_pictures(folder, numbers, names, size=(9, 7)):
    """As ethz/food101: `image` and `label`."""
    columns = {"image": pictures(len(numbers), size), "label": numbers}
    return write(folder, columns, {"image": Image(), "label": ClassLabel(names=names)})


def write_opinions(folder, texts, numbers, names):
    """As the configuration scotus of coastalcph/lex_glue: `text` and `label`."""
    columns, features = {"text": texts, "label": numbers}, {"text": Value("string"), "label": ClassLabel(names=names)}
    return write(folder, columns, features, config="scotus")
