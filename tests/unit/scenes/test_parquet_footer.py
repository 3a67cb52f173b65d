import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale_ray.scenes.parquet_footer import Footer, parse_footer


def _footer(path) -> bytes:
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    return content[-8 - length : -8]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    table = pa.table({
        "number": np.arange(1000),
        "flag": np.arange(1000) % 3 == 0,
        "text": [None if row % 5 == 0 else f"row {row % 40}" for row in range(1000)],
        "lists": [list(range(row % 4)) for row in range(1000)],
        "maps": pa.array([[("a", row)] for row in range(1000)], type=pa.map_(pa.string(), pa.int64())),
    }).replace_schema_metadata({"key": "v" * 300})  # fmt: skip
    path = tmp_path_factory.mktemp("footer") / "f.parquet"
    pq.write_table(
        table,
        path,
        row_group_size=300,
        compression="zstd",
        write_page_index=True,
        sorting_columns=[pq.SortingColumn(0)],
    )
    return path


def test_it_says_what_arrow_says(written):
    metadata, footer = pq.ParquetFile(written).metadata, parse_footer(_footer(written))
    assert footer.num_rows == metadata.num_rows == 1000
    assert len(footer.groups) == metadata.num_row_groups == 4
    for number, group in enumerate(footer.groups):
        theirs = metadata.row_group(number)
        columns = [theirs.column(column) for column in range(theirs.num_columns)]
        assert group.num_rows == theirs.num_rows
        assert [tuple(chunk) for chunk in group.chunks] == [
            (column.num_values, column.total_uncompressed_size) for column in columns
        ]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(place=st.floats(0.0, 1.0, exclude_max=True), value=st.integers(0, 255), keep=st.floats(0.0, 1.0))
def test_a_damaged_footer_is_read_or_refused(written, place, value, keep):
    content = bytearray(_footer(written))
    content[int(place * len(content))] = value
    try:
        footer = parse_footer(bytes(content[: int(keep * len(content)) if value % 2 else None]))
    except ValueError:
        return
    assert isinstance(footer, Footer)
    assert all(isinstance(chunk.num_values, int) for group in footer.groups for chunk in group.chunks)


@pytest.mark.parametrize(
    "content", [b"", b"\x19", b"\x19\xfc\xff\xff\xff\x7f", b"\x1c" * 40, b"\x16" + b"\xff" * 20]
)
def test_hostile_bytes_are_refused_at_once(content):
    with pytest.raises(ValueError, match=r"too early|too deep|too many bytes|elements of type|has type"):
        parse_footer(content)
