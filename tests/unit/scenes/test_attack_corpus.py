"""Files made to harm their reader, by format; `test_trust` holds the rest of the corpus."""

import importlib.util
import io
import os
import pickle
import sqlite3
import struct
import sys
import tarfile
import zipfile
from typing import Never

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InputRejectedError, InvalidInputError
from autoscale_ray.evaluation.score_file import read_trajectories
from autoscale_ray.scenes import parquet
from autoscale_ray.scenes.arrow_messages import unpacked_bytes
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.parquet import open_parquet, read_feather, read_groups, read_parquet
from autoscale_ray.scenes.pool import open_pool
from autoscale_ray.scenes.safe_pickle import PickleReader
from autoscale_ray.scenes.trust import member_names, read_member


class _Runs:
    """Unpickling this calls os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class _Builds:
    """Unpickling this calls __setstate__ of a class that is named in the pickle."""

    def __reduce__(self):
        return io.BytesIO, (b"",), {"harm": 1}


def _torch_zip(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def _torch_tar(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return buffer.getvalue()


def _pickles(marker) -> dict[str, bytes]:
    runs = pickle.dumps(_Runs(marker))
    return {
        "reduce": runs,
        "nested in a scenario": pickle.dumps({"metadata": {}, "tracks": {"a": [{"b": _Runs(marker)}]}}),
        "in an array": pickle.dumps(np.array([_Runs(marker)], dtype=object)),
        "pickle in a pickle": pickle.dumps({"inner": runs, "x": _Runs(marker)}),
        "build": pickle.dumps(_Builds()),
        "global": b"cos\nsystem\n(S'true'\ntR.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "instance": b"(S'true'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'true'\no.",
        "builtin": b"cbuiltins\neval\n(S'1'\ntR.",
        "numpy function": b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
        "encoding of code": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"Px\n.",
        "shared tuples": b"\x80\x02N" + b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(40)) + b".",
        "bytearray of 2^33": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
        "empty": b"",
        "build on an allowed class": b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR}X\x01\x00\x00\x00aK\x01sb.",
        "long extension": b"\x80\x02\x84\x01\x00\x00\x00.",
        "binary persistent id": b"\x80\x02X\x01\x00\x00\x00xQ.",
        "next buffer": b"\x80\x05\x97.",
        "read-only buffer": b"\x80\x05\x97\x98.",
        "put bomb": b"\x80\x02Np2147483600\n.",
        "nine bytes, two gigabytes": b"\x80\x02Nr\xff\xff\xff\x07.",
        "bytes of 2^33": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b".",
        "frame of 2^40": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
        "tuples 28 deep": b"\x80\x02)" + b"2\x86" * 28 + b".",
        "lists 100000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "array of 2^40 zeros": b"\x80\x02cnumpy\nndarray\n((J\x00\x00\x00\x40M\x00\x04ltR.",
        "cut behind its effect": runs[:-1],
        "a second one behind": pickle.dumps(1) + runs,
        "torch zip": _torch_zip(runs),
        "torch tar": _torch_tar(runs),
    }


@pytest.mark.parametrize("name", sorted(_pickles("x")))
def test_no_pickle_runs_anything_and_each_is_refused(tmp_path, name, pickle_reader):
    marker = tmp_path / "was-run"
    with pytest.raises(InputRejectedError, match=r"f\.pkl: pickle must"):
        pickle_reader.read(_pickles(marker)[name], "f.pkl")
    assert not marker.exists()


@pytest.fixture(scope="module")
def pickle_reader():
    with PickleReader() as reader:
        yield reader


def test_hostile_pickles_cost_an_ingest_their_own_files_only(tmp_path):
    marker = tmp_path / "was-run"
    (tmp_path / "source").mkdir()
    chosen = ("reduce", "nine bytes, two gigabytes", "torch zip")
    for number, name in enumerate(chosen):
        (tmp_path / "source" / f"{number}.pkl").write_bytes(_pickles(marker)[name])
    manifest = ingest("scenarionet", tmp_path / "source", tmp_path / "pool", "real")
    rows = open_pool(tmp_path / "pool", allow_empty=True).side_table("quarantine").to_pylist()
    assert manifest.num_scenes == 0
    assert [row["file"] for row in rows] == ["0.pkl", "1.pkl", "2.pkl"]
    assert all(row["rule"].startswith("pickle must") for row in rows)
    assert not marker.exists()


def _npz(path, **arrays) -> None:
    np.savez_compressed(path, **arrays)


POSES = np.zeros((1, 1, 8, 3))


def _npz_files(folder) -> dict[str, str]:
    _npz(
        folder / "objects.npz",
        scene_id=np.array(["a"]),
        trajectories=np.array([_Runs(folder / "run")], dtype=object),
    )
    _npz(folder / "bomb.npz", scene_id=np.array(["a"]), trajectories=np.zeros((1, 800_000, 8, 3)))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    with zipfile.ZipFile(folder / "liar.npz", "w") as archive:
        archive.writestr("scene_id.npy", header.ljust(127) + b"\n")
        archive.writestr("trajectories.npy", header.ljust(127) + b"\n")
    with zipfile.ZipFile(folder / "code.npz", "w") as archive:
        archive.writestr(
            "scene_id.npy", b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').abort()".ljust(117) + b"\n"
        )
        archive.writestr("trajectories.npy", b"")
    with zipfile.ZipFile(folder / "outside.npz", "w") as archive:
        archive.writestr("../scene_id.npy", b"")
    (folder / "no-zip.npz").write_bytes(b"\x93NUMPY")
    return {"objects": "array of numbers", "bomb": "compressed more", "liar": "array of numbers", "code": "array of",
            "outside": "stay inside", "no-zip": "readable zip"}  # fmt: skip


@pytest.mark.parametrize("name", ["objects", "bomb", "liar", "code", "outside", "no-zip"])
def test_hostile_npz_files_are_refused(tmp_path, name):
    message = _npz_files(tmp_path)[name]
    with pytest.raises(InvalidInputError, match=message):
        read_trajectories(tmp_path / f"{name}.npz")
    assert not (tmp_path / "run").exists()


def test_archives_in_archives_are_never_opened(tmp_path):
    content = b"0" * 1_000_000
    for depth in range(6):  # 16 copies on each level: 16^5 megabytes if anything looked inside
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for copy in range(16 if depth else 1):
                archive.writestr(f"{copy}.{'zip' if depth else 'xml'}", content)
        content = buffer.getvalue()
    (tmp_path / "42.zip").write_bytes(content)
    with pytest.raises(InvalidInputError, match="holds nothing"):
        ingest("commonroad", tmp_path / "42.zip", tmp_path / "pool", "real")
    (tmp_path / "named.zip").write_bytes(_zip_named(content))
    assert member_names(tmp_path / "named.zip", ".xml") == ["inner.zip.xml"]
    assert read_member(tmp_path / "named.zip", "inner.zip.xml")[:2] == b"PK"
    manifest = ingest("commonroad", tmp_path / "named.zip", tmp_path / "pool", "real")
    assert (manifest.num_scenes, manifest.num_quarantined) == (0, 1)


def _zip_named(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inner.zip.xml", content)
    return buffer.getvalue()


RAY_TYPES = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor",
             "ray.data.arrow_pickled_object")  # fmt: skip
NESTS = {
    "flat": lambda field: field,
    "list": lambda field: pa.field("c", pa.list_(field)),
    "struct": lambda field: pa.field("c", pa.struct([field])),
    "map": lambda field: pa.field("c", pa.map_(pa.field("key", pa.string(), nullable=False), field)),
    "deep": lambda field: pa.field("c", pa.list_(pa.struct([pa.field("x", pa.list_(field))]))),
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("name", RAY_TYPES)
def test_ray_s_extension_types_are_refused_before_a_row_is_read(tmp_path, name, nest):
    _check_refused(tmp_path, name, nest)


class _Known(pa.ExtensionType):
    """A type that this process knows, as one that has imported Ray knows Ray's."""

    NAME = "tests.known"

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Never:
        raise AssertionError("Arrow gives the metadata to a type as soon as it decodes a schema")


@pytest.mark.parametrize("nest", NESTS)
def test_extension_types_that_are_known_never_see_what_a_file_says(tmp_path, nest):
    pa.register_extension_type(_Known(pa.large_binary(), _Known.NAME))
    try:
        _check_refused(tmp_path, _Known.NAME, nest)
    finally:
        pa.unregister_extension_type(_Known.NAME)


def _check_refused(tmp_path, name, nest):
    mark = {
        "ARROW:extension:name": name,
        "ARROW:extension:metadata": pickle.dumps(_Runs(tmp_path / "run")).hex(),
    }
    field = NESTS[nest](pa.field("inner", pa.large_binary(), metadata=mark))
    table = pa.table({"a": [1]}).append_column(field, pa.nulls(1, field.type))
    pq.write_table(table, tmp_path / "f.parquet")
    with pa.OSFile(str(tmp_path / "f.feather"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for read, path in ((open_parquet, "f.parquet"), (read_parquet, "f.parquet"), (read_feather, "f.feather")):
        with pytest.raises(InputRejectedError, match="extension type"):
            read(tmp_path / path)
    with pytest.raises(InputRejectedError, match="extension type"):
        next(read_groups(tmp_path / "f.parquet"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_feather_is_measured_before_it_is_unpacked(compression, tmp_path):
    numbers = np.arange(5000, dtype=np.int64)
    table = pa.table({"number": numbers, "text": [f"row {row % 7}" for row in numbers]})
    file = tmp_path / "f.feather"
    pa.feather.write_feather(table, str(file), compression=compression, chunksize=1000)
    content = file.read_bytes()
    messages = list(pa.ipc.MessageReader.open_stream(pa.py_buffer(content)[8:]))
    sizes = [buffer.size for batch in table.to_batches(1000) for column in batch.columns for buffer in
             pa.concat_arrays([column]).buffers() if buffer is not None]  # fmt: skip
    assert sum(map(unpacked_bytes, messages)) == pytest.approx(sum(sizes), rel=0.02)
    assert read_feather(file).equals(table)
    assert content.count(struct.pack("<q", 8000)) >= 5
    file.write_bytes(content.replace(struct.pack("<q", 8000), struct.pack("<q", 1 << 40)))
    with pytest.raises(InputRejectedError, match="must unpack to at most"):
        read_feather(file)


def test_feather_whose_offsets_point_outside_is_refused_and_ends_no_process(tmp_path):
    table = pa.table({"t": ["one", "two", "three"], "x": [1.0, 2.0, 3.0]})
    with pa.OSFile(str(tmp_path / "f.feather"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "f.feather").read_bytes()
    offsets = struct.pack("<4i", 0, 3, 6, 11)
    assert content.count(offsets) == 1
    (tmp_path / "f.feather").write_bytes(content.replace(offsets, struct.pack("<4i", 0, 3, 1 << 30, 11)))
    with pytest.raises(InputRejectedError, match="readable Feather"):
        read_feather(tmp_path / "f.feather")


def test_parquet_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path, monkeypatch):
    long_text = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(50_000, np.int32)), pa.array(["x" * 1_000_000])
    )
    pq.write_table(pa.table({"text": long_text}), tmp_path / "text.parquet", store_schema=False)
    assert (tmp_path / "text.parquet").stat().st_size < 2_000_000
    with pytest.raises(InputRejectedError, match="unpack to at most"):
        read_parquet(tmp_path / "text.parquet")
    zeros = pa.table({"x": pa.array(np.zeros(3_000_000))})
    pq.write_table(zeros, tmp_path / "zeros.parquet", row_group_size=10_000_000)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 20_000_000)
    assert (tmp_path / "zeros.parquet").stat().st_size < 20_000
    with pytest.raises(InputRejectedError, match="row groups must unpack"):
        open_parquet(tmp_path / "zeros.parquet")


def test_parquet_with_a_million_columns_is_refused_by_its_footer(tmp_path):
    wide = pa.table({f"column number {number:06d}": pa.array([1.0]) for number in range(12_000)})
    pq.write_table(wide, tmp_path / "wide.parquet")
    with pytest.raises(InputRejectedError, match="at most 10000 columns"):
        open_parquet(tmp_path / "wide.parquet")
    with (tmp_path / "wider.parquet").open("wb") as file:
        file.write(b"PAR1" + bytes(20 << 20) + struct.pack("<I", 20 << 20) + b"PAR1")
    with pytest.raises(InputRejectedError, match="footer must be at most"):
        open_parquet(tmp_path / "wider.parquet")


@settings(max_examples=120, derandomize=True, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_parquet_whose_footer_lies_gives_its_rows_or_a_refusal(place, bit, tmp_path_factory):
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array(np.arange(100.0)), "t": ["a"] * 100}), sink, row_group_size=40)
    content = bytearray(sink.getvalue())
    length = int.from_bytes(content[-8:-4], "little")
    content[len(content) - 8 - length + place % length] ^= 1 << bit
    path = tmp_path_factory.mktemp("lie") / "f.parquet"
    path.write_bytes(content)
    try:
        table = read_parquet(path)
    except InputRejectedError:
        return
    assert len(table) <= 100


DATABASES = {
    "view that loads a program": "CREATE VIEW v AS SELECT load_extension('/tmp/harm')",
    "view that never ends": "CREATE VIEW v AS WITH RECURSIVE c AS (SELECT 1 UNION ALL SELECT 2 FROM c) SELECT * FROM c",
    "trigger": "CREATE TRIGGER t AFTER INSERT ON gpkg_contents BEGIN SELECT load_extension('/tmp/harm'); END",
    "virtual table": "CREATE VIRTUAL TABLE v USING fts5(x)",
    "expression index": "CREATE TABLE t (x); CREATE INDEX i ON t (abs(x))",
    "huge blob": "CREATE TABLE t (x BLOB); INSERT INTO t VALUES (zeroblob(200000000))",
}


@pytest.mark.skipif(
    importlib.util.find_spec("pyogrio") is None, reason="pyogrio is not installed (extra navsim)"
)
@pytest.mark.parametrize("name", DATABASES)
def test_hostile_geopackages_are_refused_in_bounded_time_and_memory(tmp_path, name):
    from autoscale_ray.scenes.geopackage import read_geopackage

    path = tmp_path / "map.gpkg"
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE gpkg_contents (table_name TEXT, data_type TEXT, identifier TEXT, srs_id INTEGER)"
        )
        database.executescript(DATABASES[name])
    database.close()
    with pytest.raises(InputRejectedError) as caught:
        read_geopackage(path, {"lanes_polygons": ()})
    assert "\n" not in str(caught.value)


def test_readers_start_no_program_and_open_no_socket(tmp_path):
    """Everything refused above, read again in a process whose audit hook ends it at the first forbidden event."""
    for number, content in enumerate(_pickles(tmp_path / "run").values()):
        (tmp_path / f"{number:02d}.pkl").write_bytes(content)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from autoscale_ray.scenes.pickle_child import answer\n"
        "contents = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob('*.pkl'))]\n"
        "answer(contents[0])\n"
        "forbidden = ('os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen', 'socket.connect', 'os.remove')\n"
        "def hook(event, arguments):\n"
        "    if event in forbidden or event == 'open' and any(c in str(arguments[1]) for c in 'wax+'):\n"
        "        import os; os._exit(9)\n"
        "sys.addaudithook(hook)\n"
        "assert all(answer(content)[:1] == b'-' for content in contents if len(content) > 20)\n"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]
