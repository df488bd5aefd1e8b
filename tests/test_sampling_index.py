"""Indices of users: the same from every source, in memory and on disk, and no two users made one."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from fastclip.sampling import ExamplePoissonSampler, UserIndex, UserPoissonSampler

IDS = ["b", "a", "b", "c", "a", "a", "d", "b", "c", "a", "e", "b"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for module in ("index", "columns"):
        monkeypatch.setattr(f"fastclip.sampling.{module}._CHUNK", 5)


def content(index):
    return [index.user_of.tolist(), index.by_user.tolist(), index.offsets.tolist()]


def expected(ids):
    """Users by first appearance, each with its examples in order."""
    owned = {}
    for place, user in enumerate(ids):
        owned.setdefault(user, []).append(place)
    number = {user: n for n, user in enumerate(owned)}
    groups = list(owned.values())
    return [
        [number[u] for u in ids],
        [i for group in groups for i in group],
        np.cumsum([0, *map(len, groups)]).tolist(),
    ]


@pytest.mark.parametrize("on_disk", [False, True])
@settings(deadline=None, max_examples=30)
@given(ids=st.lists(st.integers(-3, 6), min_size=1, max_size=40))
def test_every_user_owns_its_examples_in_order(tmp_path_factory, on_disk, ids):
    path = tmp_path_factory.mktemp("indices") / "index" if on_disk else None
    index = UserIndex.build(ids, path)
    assert content(index) == expected(ids)
    assert (index.num_users, index.num_examples) == (len(set(ids)), len(ids))
    assert index.most == max(ids.count(user) for user in ids)
    assert isinstance(index.user_of, np.memmap) == on_disk


def arrow_file(tmp_path, table):
    with ipc.new_file(tmp_path / "f.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return tmp_path / "f.arrow"


def arrow_stream(tmp_path, table):
    with ipc.new_stream(str(tmp_path / "s.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return str(tmp_path / "s.arrow")


def parquet_file(tmp_path, table):
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    return tmp_path / "t.parquet"


class Selected:
    """Stands for a Hugging Face data set whose rows are a selection of its table's."""

    def __init__(self, table, rows, arrow=False):
        self.table, self.rows, self.arrow = table, rows, arrow
        self.column_names = table.column_names

    def __len__(self):
        return len(self.rows)

    def select_columns(self, names):
        return Selected(self.table.select(names), self.rows, self.arrow)

    def with_format(self, kind):
        return Selected(self.table, self.rows, kind == "arrow")

    def __getitem__(self, rows):
        assert self.arrow and self.column_names == ["user"] and len(self.rows[rows]) <= 5
        return self.table.take(self.rows[rows])


def selected(tmp_path, table):
    backwards = table.take(list(range(len(table)))[::-1])
    return Selected(backwards, list(range(len(table)))[::-1])


def hugging_face(tmp_path, table):
    datasets = pytest.importorskip("datasets")
    back = datasets.Dataset.from_dict({"text": ["?"] * len(table), "user": table["user"].to_pylist()[::-1]})
    return back.select(range(len(table) - 1, -1, -1))


TABLES = [parquet_file, arrow_file, arrow_stream, lambda tmp_path, table: table, selected, hugging_face]


@pytest.mark.parametrize("source", TABLES, ids=["parquet", "arrow", "stream", "table", "selected", "hugging face"])
@pytest.mark.parametrize("kind", ["strings", "numbers", "dictionary"])
def test_every_table_gives_the_same_index(tmp_path, source, kind):
    ids = [ord(user) * 10**15 for user in IDS] if kind == "numbers" else IDS
    column = pa.array(ids).dictionary_encode() if kind == "dictionary" else pa.array(ids)
    table = pa.table({"text": ["x"] * len(ids), "user": column})
    index = UserIndex.build(source(tmp_path, table), tmp_path / "index", column="user")
    assert content(index) == expected(IDS)


@pytest.mark.parametrize(
    "listed",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        pa.array(IDS),
        pa.chunked_array([IDS[:5], IDS[5:]]),
        dict.fromkeys(range(12)).keys(),
    ],
    ids=["list", "tuple", "numpy", "arrow", "chunked", "view"],
)
def test_every_list_gives_the_same_index(listed):
    ids = list(range(12)) if not hasattr(listed, "__getitem__") else IDS
    assert content(UserIndex.build(listed)) == expected(ids)


def test_a_column_of_a_hugging_face_data_set_is_a_list():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"user": IDS})
    assert content(UserIndex.build(data["user"])) == expected(IDS)
    assert content(UserIndex.build(torch.tensor([ord(user) for user in IDS]))) == expected(IDS)


class SameHash:
    def __init__(self, name):
        self.name = name

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return self.name == other.name


def test_equal_hashes_merge_nobody():
    assert hash(-1) == hash(-2) and hash(0) == hash(2**61 - 1)
    index = UserIndex.build([-1, -2, 0, 2**61 - 1, -1, 2.5])
    assert index.user_of.tolist() == [0, 1, 2, 3, 0, 4]
    assert UserIndex.build([SameHash(name) for name in "abcab"]).user_of.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([], "empty"),
        (pa.array([], pa.string()), "empty"),
        ([1, 2, 3, 4, 5, 6, float("nan")], r"user_ids\[6\]=nan"),
        (pa.array([1.0, float("nan")]), "=nan"),
        ([1, [2]], r"user_ids\[1\]=\[2\]"),
        ([(1, []), 1], r"user_ids\[0\]"),
        ([torch.tensor(1), torch.tensor(1)], r"user_ids\[0\]=tensor"),
        (pa.array([1, 2, 3, 4, 5, 6, None, 8]), r"user_ids\[6\] is missing"),
    ],
)
def test_ids_that_name_nobody_are_refused(tmp_path, ids, named):
    with pytest.raises(ValueError, match=named):
        UserIndex.build(ids, tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_tables_need_a_column_that_they_have(tmp_path):
    table = pa.table({"user": IDS, "text": IDS})
    for source in (table, parquet_file(tmp_path, table), arrow_file(tmp_path, table), arrow_stream(tmp_path, table)):
        with pytest.raises(ValueError, match=r"column='who' .*\['user', 'text'\]"):
            UserIndex.build(source, column="who")
        with pytest.raises(ValueError, match="column=None"):
            UserIndex.build(source)
    with pytest.raises(ValueError, match=r"column='user', but users \(list\)"):
        UserIndex.build(IDS, column="user")
    with pytest.raises(ValueError, match="is no file"):
        UserIndex.build(tmp_path / "nothing", column="user")
    (tmp_path / "text").write_text("user\na\n")
    with pytest.raises(ValueError, match="neither a Parquet nor an Arrow file"):
        UserIndex.build(tmp_path / "text", column="user")


def test_what_lies_on_disk_is_whole_or_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no user index"):
        UserIndex.open(tmp_path / "index")
    index = UserIndex.build(IDS, tmp_path / "index")
    with pytest.raises(ValueError, match="exists"):
        UserIndex.build(IDS, tmp_path / "index")
    assert content(UserIndex.open(str(tmp_path / "index"))) == content(index)
    for fixed in (index, UserIndex.build(IDS)):
        with pytest.raises(ValueError, match="read-only"):
            fixed.user_of[0] = 1
    np.save(tmp_path / "index" / "offsets.npy", index.offsets[:-1])
    with pytest.raises(ValueError, match="damaged"):
        UserIndex.open(tmp_path / "index")


@pytest.mark.parametrize("kind", [UserPoissonSampler, ExamplePoissonSampler])
def test_samplers_draw_the_same_from_memory_and_disk(tmp_path, kind):
    index = UserIndex.build(IDS, tmp_path / "index")
    draws = [list(kind(users, examples_per_user=2, steps=30, sample_rate=0.5, seed=3)) for users in (IDS, index)]
    assert draws[0] == draws[1]
    sampler = kind(index, examples_per_user=2, steps=30, sample_rate=0.5, seed=3)
    assert list(pickle.loads(pickle.dumps(sampler))) == draws[0]
    again = pickle.loads(pickle.dumps(UserIndex.build(IDS)))
    assert content(again) == content(index) and again.checksum() == index.checksum()
    assert UserIndex.build(IDS[::-1]).checksum() != index.checksum()


def test_an_index_on_disk_travels_as_its_path(tmp_path):
    index = UserIndex.build(list(range(3000)), tmp_path / "index")
    assert len(pickle.dumps(index)) < 500
    assert content(pickle.loads(pickle.dumps(index))) == content(index)
