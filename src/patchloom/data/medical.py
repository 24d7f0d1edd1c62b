"""Chest X-ray sets in the layouts they are published in: ChestX-ray14, CheXpert, MIMIC-CXR, COVIDx.

    open_source("chestxray14:/data/nih:train")          # 14 labels, an image may have several
    open_source("chexpert:/data/chexpert:train:ignore")  # 5 labels; what is uncertain counts as unknown
    open_source("covidx:/data/covidx:test")             # 3 classes

Labels, splits and the treatment of uncertain ones are those of "Delving into Masked Autoencoders for Multi-Label
Thorax Disease Classification", arXiv 2210.12843, and of its published code.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from patchloom.data.dicom import Monochrome1
from patchloom.data.listed import SHOWN, ListedSource
from patchloom.errors import UsageError, unknown_name
from patchloom.io import existing

Split = Literal["train", "val", "test"]
Uncertain = Literal["paper", "ones", "zeros", "ignore"]

CHESTXRAY14 = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural Thickening", "Hernia"),
)
CHEXPERT = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
UNCERTAIN_IS_POSITIVE = ("Edema", "Atelectasis")
"""Labels whose uncertain cases the paper counts as present; in the other three they count as absent."""
COVIDX = ("normal", "pneumonia", "COVID-19")


class ChestXray14Source(ListedSource):
    """NIH ChestX-ray14: 14 findings, an image may have several, none of them is "no finding".

    Lists `train_official.txt`, `train_list.txt` or `train.txt` (likewise val and test), in the folder or in its
    `labels` or `data_splits` folder, hold lines `file.png l1 … l14` of 0 and 1. Where there are none, the set's own
    `train_val_list.txt` and `test_list.txt` name the images and `Data_Entry_2017*.csv` their findings.

    Args:
        root: Folder of the set; images may lie in sub-folders such as `images_001/images`.
        split: `train`, `val` or `test`. The set's own lists have no `val`: it is part of `train`.
        list_file: Another list of images and labels to read instead.
        in_chans: 3 or 1.
        monochrome1: What becomes of DICOM images whose zero is white.
        include: Globs of the files to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.

    Raises:
        UsageError: No list, a line with another number of columns or a label other than 0 and 1, missing images.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        list_file: str | Path | None = None,
        in_chans: int = 3,
        monochrome1: Monochrome1 = "invert",
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        folder = _folder(f"chestxray14:{root}", root)
        path = Path(list_file) if list_file is not None else self._list(folder, split)
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if rows and all(len(row) == 1 for row in rows):
            files = [row[0] for row in rows]
            labels = self._entries(folder, files)
        else:
            files = [row[0] for row in rows]
            labels = np.array([_zeros_and_ones(path, number, row) for number, row in enumerate(rows, 1)], np.float32)
        super().__init__(
            f"chestxray14:{root}:{split}",
            folder,
            _some(path, files),
            labels,
            CHESTXRAY14,
            in_chans,
            monochrome1,
            include,
            exclude,
        )

    @staticmethod
    def _list(folder: Path, split: Split) -> Path:
        names = [f"{split}_official.txt", f"{split}_list.txt", f"{split}.txt"]
        names += ["train_val_list.txt"] if split == "train" else []
        hint = "; the set's own lists have no val, it is part of train" if split == "val" else ""
        return _first_of(folder, names, ("", "labels", "data_splits", "data_splits/chestxray"), hint)

    @staticmethod
    def _entries(folder: Path, files: Sequence[str]) -> np.ndarray:
        """Return the labels of files that a list only names, from the table that came with the images."""
        table = next(iter(sorted(folder.glob("Data_Entry_2017*.csv"))), None)
        if table is None:
            raise UsageError(f"the list names images only, and {folder} has no Data_Entry_2017*.csv to tell findings")
        known = {}
        for row in _table(table, ("Image Index", "Finding Labels")):
            findings = {finding.strip().replace("_", " ") for finding in row["Finding Labels"].split("|")}
            if strange := sorted(findings - {*CHESTXRAY14, "No Finding"}):
                raise unknown_name(f"finding of {row['Image Index']} in {table}", strange[0], CHESTXRAY14)
            known[row["Image Index"]] = [float(name in findings) for name in CHESTXRAY14]
        _refuse_missing(str(table), [file for file in files if file not in known])
        return np.array([known[file] for file in files], dtype=np.float32)

    def patients(self) -> set[str]:
        """Return the patients' numbers, which file names begin with."""
        return {file.rpartition("/")[2].split("_")[0] for file in self.files}


class CheXpertSource(ListedSource):
    """CheXpert (also its small version): frontal images and the five findings of its competition.

    `train.csv` and `valid.csv` in the folder list the images; `test` is `test.csv`, or `valid.csv` where there is
    none: published figures are measured there.

    Args:
        root: Folder that holds the tables and the folders `train` and `valid`.
        split: `train`, `val` or `test`.
        uncertain: What an uncertain finding (-1) counts as: `paper` (present for edema and atelectasis, absent
            otherwise), `ones`, `zeros`, or `ignore` (unknown: neither loss nor figures see it).
        in_chans: 3 or 1.
        monochrome1: What becomes of DICOM images whose zero is white.
        include: Globs of the files to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.

    Raises:
        UsageError: No table or column, a label other than 1, 0, -1 and blank, missing images.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        uncertain: Uncertain = "paper",
        in_chans: int = 3,
        monochrome1: Monochrome1 = "invert",
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        folder = _folder(f"chexpert:{root}", root)
        names = {"train": ["train.csv"], "val": ["valid.csv"], "test": ["test.csv", "valid.csv"]}[split]
        path = _first_of(folder, names)
        rows = [row for row in _table(path, ("Path", *CHEXPERT)) if row.get("Frontal/Lateral", "Frontal") == "Frontal"]
        files = [_below_root(row["Path"]) for row in rows]
        policy = [_uncertain_as(name, uncertain) for name in CHEXPERT]
        labels = [
            [_finding(row[name], value, path, row["Path"]) for name, value in zip(CHEXPERT, policy, strict=True)]
            for row in rows
        ]
        super().__init__(
            f"chexpert:{root}:{split}:{uncertain}",
            folder,
            _some(path, files),
            np.array(labels, dtype=np.float32),
            CHEXPERT,
            in_chans,
            monochrome1,
            include,
            exclude,
        )


class MIMICSource(ListedSource):
    """MIMIC-CXR: images taken from the front or the back (AP, PA) with CheXpert's five findings.

    The three tables `mimic-cxr-2.0.0-{split,metadata,chexpert}.csv.gz` lie in the folder, images as
    `files/p10/p10000032/s50414267/NAME.jpg` (or `.dcm`).

    Args:
        root: Folder of the set.
        split: `train`, `val` (its `validate`) or `test`.
        in_chans: 3 or 1.
        monochrome1: What becomes of DICOM images whose zero is white.
        include: Globs of the files to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.

    Raises:
        UsageError: No table or column, a label other than 1, 0, -1 and blank, missing images.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        in_chans: int = 3,
        monochrome1: Monochrome1 = "invert",
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        folder = _folder(f"mimic-cxr:{root}", root)
        tables = {
            kind: _first_of(folder, [f"mimic-cxr-2.0.0-{kind}.csv.gz", f"mimic-cxr-2.0.0-{kind}.csv"])
            for kind in ("split", "metadata", "chexpert")
        }
        split_name = "validate" if split == "val" else split
        frontal = {
            row["dicom_id"]
            for row in _table(tables["metadata"], ("dicom_id", "ViewPosition"))
            if row["ViewPosition"] in ("AP", "PA")
        }
        studies = {row["study_id"]: row for row in _table(tables["chexpert"], ("study_id", *CHEXPERT))}
        files, labels = [], []
        suffix = ".dcm" if next((folder / "files").rglob("*.dcm"), None) is not None else ".jpg"
        for row in _table(tables["split"], ("dicom_id", "study_id", "subject_id", "split")):
            if row["split"] != split_name or row["dicom_id"] not in frontal or row["study_id"] not in studies:
                continue
            patient, study = row["subject_id"], row["study_id"]
            files.append(f"files/p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}{suffix}")
            findings = studies[study]
            labels.append([_finding(findings[name], np.nan, tables["chexpert"], f"study {study}") for name in CHEXPERT])
        super().__init__(
            f"mimic-cxr:{root}:{split}",
            folder,
            _some(tables["split"], files),
            np.array(labels, dtype=np.float32),
            CHEXPERT,
            in_chans,
            monochrome1,
            include,
            exclude,
        )


class COVIDxSource(ListedSource):
    """COVIDx: normal, pneumonia or COVID-19, one class per image.

    Lists `train*.txt` and `test*.txt` in the folder (or its `labels` folder) hold lines `patient file class source`;
    images lie in the folders `train` and `test`. A class `positive` is COVID-19; `negative` is refused, as it does
    not tell healthy people from those with another pneumonia.

    Args:
        root: Folder of the set.
        split: `train`, `val` or `test`.
        in_chans: 3 or 1.
        monochrome1: What becomes of DICOM images whose zero is white.
        include: Globs of the files to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.

    Raises:
        UsageError: No list or several, a line with too few columns or another class, missing images.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        in_chans: int = 3,
        monochrome1: Monochrome1 = "invert",
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        folder = _folder(f"covidx:{root}", root)
        lists = sorted({*folder.glob(f"{split}*.txt"), *folder.glob(f"labels/{split}*.txt")})
        if len(lists) != 1:
            list_names = ", ".join(path.name for path in lists) or "none"
            raise UsageError(f"{folder} has to hold one list {split}*.txt; found: {list_names}")
        numbers = {name: number for number, name in enumerate(COVIDX)} | {"positive": COVIDX.index("COVID-19")}
        files, labels = [], []
        for number, line in enumerate(lists[0].read_text(encoding="utf-8").splitlines(), 1):
            if not (words := line.split()):
                continue
            if len(words) < 4:
                raise UsageError(f"{lists[0]}, line {number}: 4 columns (patient file class source), not {len(words)}")
            if words[-2] not in numbers:
                raise unknown_name(f"class in {lists[0]}, line {number},", words[-2], numbers)
            files.append(f"{split}/{' '.join(words[1:-2])}")
            labels.append(numbers[words[-2]])
        super().__init__(
            f"covidx:{root}:{split}",
            folder,
            _some(lists[0], files),
            np.array(labels, dtype=np.int64),
            COVIDX,
            in_chans,
            monochrome1,
            include,
            exclude,
        )


MEDICAL: dict[str, Callable[..., ListedSource]] = {
    "chestxray14": ChestXray14Source,
    "chexpert": CheXpertSource,
    "covidx": COVIDxSource,
    "mimic-cxr": MIMICSource,
}


def open_medical(word: str, rest: str, **options: Any) -> ListedSource:
    """Open a set by its name: `WORD:FOLDER[:train|:val|:test][:paper|:ones|:zeros|:ignore]`.

    Raises:
        UsageError: No folder, or a word after it that is neither a split nor, for chexpert, what uncertain means.
    """
    splits = {"train": "train", "val": "val", "valid": "val", "test": "test"}
    while ":" in rest and (last := rest.rpartition(":")[2]) and "/" not in last and "\\" not in last:
        if last in splits:
            options["split"] = splits[last]
        elif word == "chexpert" and last in get_args(Uncertain):
            options["uncertain"] = last
        else:
            policies = get_args(Uncertain) if word == "chexpert" else ()
            raise unknown_name(f"word after the folder of {word}", last, (*splits, *policies))
        rest = rest.rpartition(":")[0]
    return MEDICAL[word](rest, **options)


def shared_patients(first: ChestXray14Source, second: ChestXray14Source) -> list[str]:
    """Return the patients that two splits share, in order; there should be none."""
    return sorted(first.patients() & second.patients())


def _folder(name: str, root: str | Path) -> Path:
    folder = existing(Path(root).expanduser())
    if not str(root) or not folder.is_dir():
        raise UsageError(f"{name}: there is no folder {str(root)!r}; give the one that holds lists and images")
    return folder


def _first_of(folder: Path, names: Sequence[str], below: Sequence[str] = ("",), hint: str = "") -> Path:
    for part in below:
        for name in names:
            if (path := folder / part / name).is_file():
                return path
    raise UsageError(f"{folder} holds no {' or '.join(names)}{hint}")


def _table(path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV table, which may be compressed.

    Raises:
        UsageError: Columns missing.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            raise UsageError(f"{path} has no column {missing[0]!r} (its columns: {', '.join(reader.fieldnames or ())})")
        for number, row in enumerate(reader, 2):
            if None in row or None in row.values():
                raise UsageError(f"{path}, line {number}: its number of columns is not that of the first line")
            yield row


def _zeros_and_ones(path: Path, number: int, row: list[str]) -> list[float]:
    if len(row) != 1 + len(CHESTXRAY14):
        raise UsageError(f"{path}, line {number}: 1 file and {len(CHESTXRAY14)} labels, not {len(row)} columns")
    if strange := [word for word in row[1:] if word not in ("0", "1")]:
        raise UsageError(f"{path}, line {number}: a label is {strange[0]!r}; it must be 0 or 1")
    return [float(word) for word in row[1:]]


def _finding(text: str, uncertain: float, path: Path, where: str) -> float:
    """Return one finding of a CheXpert table: blank is absent."""
    if not text.strip():
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if value not in (1.0, 0.0, -1.0):
        raise UsageError(f"{path}, {where}: a label is {text!r}; it must be 1, 0, -1 (uncertain) or blank")
    return uncertain if value == -1.0 else value


def _uncertain_as(name: str, policy: str) -> float:
    if policy not in get_args(Uncertain):
        raise unknown_name("meaning of uncertain", policy, get_args(Uncertain))
    values = {"ones": 1.0, "zeros": 0.0, "ignore": np.nan, "paper": float(name in UNCERTAIN_IS_POSITIVE)}
    return values[policy]


def _below_root(path: str) -> str:
    """Return a path of CheXpert's tables without the name of the release in front."""
    first, _, rest = path.partition("/")
    return rest if first.startswith("CheXpert-v1.0") else path


def _some(path: Path, files: list[str]) -> list[str]:
    if not files:
        raise UsageError(f"{path} lists no image of this split")
    return files


def _refuse_missing(where: str, missing: Iterable[str]) -> None:
    names = list(missing)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UsageError(f"{where} says nothing of {len(names)} images listed: {', '.join(names[:SHOWN])}{more}")
