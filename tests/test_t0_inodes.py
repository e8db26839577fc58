"""Identity: derived numbers do not clash on one device, and what clashes all the same gets a spare one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.inodes import ROOT_INO, DirNode, Node, NodeTable, derive
from unionfs.layer import DirectoryLayer, FdCache
from unionfs.markers import Dialect

host_numbers = st.integers(1, (1 << 62) - 1)
salts = st.integers(1, (1 << 62) - 1)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectoryLayer]:
    """A layer on the main device (salt 0); some tests give it another salt."""
    fd = os.open(tmp_path_factory.mktemp("layer"), os.O_RDONLY | os.O_DIRECTORY)
    made = DirectoryLayer(fd, b"layer", index=0, dialect=Dialect(), cache=FdCache(8))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _main_device(layer: DirectoryLayer) -> Iterator[None]:
    yield
    layer.salt = 0


def upper_file(ino: int, host_ino: int | None = None) -> Node:
    node = Node(ino, stat.S_IFREG, None, b"name", None)
    node.host_ino = ino if host_ino is None else host_ino
    return node


def lower_file(layer: DirectoryLayer, ino: int) -> Node:
    return Node(ino, stat.S_IFREG, None, b"name", layer.root)


# --- derived numbers ---------------------------------------------------------------------------------------------


@given(number=host_numbers)
def test_main_device_shows_the_numbers_of_the_host(layer: DirectoryLayer, number: int):
    layer.salt = 0
    assert derive(layer, number) == number


@given(salt=salts, one=host_numbers, other=host_numbers)
def test_two_files_of_one_device_have_two_numbers(
    layer: DirectoryLayer, salt: int, one: int, other: int
):
    layer.salt = salt
    assert (derive(layer, one) == derive(layer, other)) == (one == other)


@given(salt=salts, start=st.integers(1, 1 << 40))
def test_neighbours_of_one_device_have_different_numbers(
    layer: DirectoryLayer, salt: int, start: int
):
    layer.salt = salt
    assert len({derive(layer, number) for number in range(start, start + 100)}) == 100


@given(one=salts, other=salts, number=host_numbers)
def test_one_host_number_on_two_devices_gives_two_numbers(
    layer: DirectoryLayer, one: int, other: int, number: int
):
    layer.salt = one
    first = derive(layer, number)
    layer.salt = other
    assert (derive(layer, number) == first) == (one == other)


@given(salt=salts, number=st.integers(1, (1 << 64) - 1))
def test_hashed_number_is_above_real_and_spare_ones_and_fits_a_signed_integer(
    layer: DirectoryLayer, salt: int, number: int
):
    layer.salt = salt
    assert 1 << 62 <= derive(layer, number) < 1 << 63


# --- the table ---------------------------------------------------------------------------------------------------


def test_node_is_found_by_its_number_and_host_number(layer: DirectoryLayer):
    table = NodeTable()
    node = upper_file(10)
    table.add(node, layer, upper=True)
    assert table.find(10, layer, 10, upper=True) is node


def test_node_of_another_file_under_the_number_is_not_found(layer: DirectoryLayer):
    table = NodeTable()
    table.add(upper_file(10, host_ino=99), layer, upper=True)
    assert table.find(10, layer, 10, upper=True) is None


def test_upper_file_is_not_taken_for_a_lower_one(layer: DirectoryLayer):
    table = NodeTable()
    table.add(lower_file(layer, 10), layer, upper=False)
    assert table.find(10, layer, 10, upper=True) is None


def test_copied_up_file_is_found_by_the_number_it_goes_on_showing(layer: DirectoryLayer):
    table = NodeTable()
    node = lower_file(layer, 10)
    table.add(node, layer, upper=False)
    node.sheet, node.host_ino = None, 77
    assert table.find(10, layer, 77, upper=True) is node


def test_removed_node_is_not_found(layer: DirectoryLayer):
    table = NodeTable()
    node = upper_file(10)
    table.add(node, layer, upper=True)
    table.remove(node)
    assert table.find(10, layer, 10, upper=True) is None


def test_dead_node_is_not_found_as_its_host_number_may_be_another_files(layer: DirectoryLayer):
    table = NodeTable()
    node = upper_file(10)
    table.add(node, layer, upper=True)
    node.dead = True
    assert table.find(10, layer, 10, upper=True) is None


def test_dead_node_that_is_held_open_is_found(layer: DirectoryLayer):
    table = NodeTable()
    node = upper_file(10)
    table.add(node, layer, upper=True)
    node.dead, node.orphan_fd = True, os.open(os.devnull, os.O_PATH)
    assert table.find(10, layer, 10, upper=True) is node
    table.remove(node)


def test_removing_a_node_closes_what_kept_it_reachable(layer: DirectoryLayer):
    table = NodeTable()
    node = upper_file(10)
    table.add(node, layer, upper=True)
    node.orphan_fd = fd = os.open(os.devnull, os.O_PATH)
    table.remove(node)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert node.orphan_fd == -1


# --- spare numbers -----------------------------------------------------------------------------------------------


def test_second_file_with_a_number_gets_a_spare_one(layer: DirectoryLayer):
    table = NodeTable()
    first, second = upper_file(10, host_ino=1000), upper_file(10)
    table.add(first, layer, upper=True)
    table.add(second, layer, upper=True)
    assert first.ino == 10
    assert 1 << 61 < second.ino < 1 << 62


def test_file_with_a_spare_number_is_found_by_its_own_number(layer: DirectoryLayer):
    table = NodeTable()
    table.add(upper_file(10, host_ino=1000), layer, upper=True)
    second = upper_file(10)
    table.add(second, layer, upper=True)
    assert table.find(10, layer, 10, upper=True) is second


def test_both_files_with_one_number_stay_reachable_by_node_id(layer: DirectoryLayer):
    table = NodeTable()
    first, second = upper_file(10, host_ino=1000), upper_file(10)
    for node in (first, second):
        table.add(node, layer, upper=True)
    assert [table.nodes[first.ino], table.nodes[second.ino]] == [first, second]


def test_file_keeps_its_spare_number_when_the_first_owner_is_forgotten(layer: DirectoryLayer):
    table = NodeTable()
    first, second = upper_file(10, host_ino=1000), upper_file(10)
    for node in (first, second):
        table.add(node, layer, upper=True)
    table.remove(first)
    assert table.find(10, layer, 10, upper=True) is second


def test_forgotten_spare_number_is_not_found(layer: DirectoryLayer):
    table = NodeTable()
    table.add(upper_file(10, host_ino=1000), layer, upper=True)
    second = upper_file(10)
    table.add(second, layer, upper=True)
    table.remove(second)
    assert table.find(10, layer, 10, upper=True) is None


def test_spare_number_is_not_used_twice(layer: DirectoryLayer):
    table = NodeTable()
    table.add(upper_file(10, host_ino=1000), layer, upper=True)
    numbers = set()
    for _ in range(5):
        node = upper_file(10)
        table.add(node, layer, upper=True)
        numbers.add(node.ino)
        table.remove(node)
    assert len(numbers) == 5


def test_spare_numbers_of_two_devices_are_kept_apart(layer: DirectoryLayer):
    table = NodeTable()
    table.add(upper_file(10, host_ino=1000), layer, upper=True)
    mine = lower_file(layer, 10)
    table.add(mine, layer, upper=False)
    layer.salt = 5
    assert table.find(10, layer, 10, upper=False) is None
    layer.salt = 0
    assert table.find(10, layer, 10, upper=False) is mine


def test_number_of_the_root_is_for_the_root_alone(layer: DirectoryLayer):
    table = NodeTable()
    root = DirNode(ROOT_INO, None, b"")
    root.host_ino = 2
    table.add(root, layer, upper=True)
    other = upper_file(ROOT_INO)
    table.add(other, layer, upper=True)
    assert table.nodes[ROOT_INO] is root
    assert other.ino != ROOT_INO
    assert table.find(ROOT_INO, layer, ROOT_INO, upper=True) is other


@given(st.lists(st.tuples(st.booleans(), st.integers(100, 110), st.booleans()), max_size=40))
def test_table_finds_each_live_file_and_no_other(
    layer: DirectoryLayer, steps: list[tuple[bool, int, bool]]
):
    """Numbers collide on purpose; the model is a mapping from (upper, host number)."""
    table = NodeTable()
    live: dict[tuple[bool, int], Node] = {}
    for adds, host_ino, upper in steps:
        number = host_ino % 3 + 2
        assert table.find(number, layer, host_ino, upper=upper) is live.get((upper, host_ino))
        if adds and (upper, host_ino) not in live:
            node = Node(number, stat.S_IFREG, None, b"name", None if upper else layer.root)
            node.host_ino = host_ino
            table.add(node, layer, upper=upper)
            live[upper, host_ino] = node
        elif not adds and (upper, host_ino) in live:
            table.remove(live.pop((upper, host_ino)))
        assert table.nodes == {node.ino: node for node in live.values()}


# --- names of a node ---------------------------------------------------------------------------------------------


def test_second_name_takes_the_place_of_the_first():
    top = DirNode(ROOT_INO, None, b"")
    node = upper_file(10)
    node.add_name(top, b"a")
    node.add_name(top, b"b")
    node.drop_name(top, b"a")
    assert node.names() == [(top, b"b")]


def test_adding_a_name_twice_keeps_it_once():
    top = DirNode(ROOT_INO, None, b"")
    node = upper_file(10)
    for name in (b"a", b"b", b"a", b"b"):
        node.add_name(top, name)
    assert sorted(name for _, name in node.names()) == [b"a", b"b"]


def test_dropping_a_name_that_it_has_not_changes_nothing():
    top, other = DirNode(ROOT_INO, None, b""), DirNode(5, None, b"d")
    node = upper_file(10)
    node.add_name(top, b"a")
    node.drop_name(other, b"a")
    node.drop_name(top, b"b")
    assert node.names() == [(top, b"a")]


def test_dropping_the_last_name_leaves_none():
    top = DirNode(ROOT_INO, None, b"")
    node = upper_file(10)
    node.add_name(top, b"a")
    node.drop_name(top, b"a")
    assert node.names() == []


def test_lower_node_keeps_its_name_in_the_layer_whatever_it_is_called_now(layer: DirectoryLayer):
    top = DirNode(ROOT_INO, None, b"")
    node = Node(10, stat.S_IFREG, top, b"a", layer.root)
    node.drop_name(top, b"a")
    node.add_name(top, b"b")
    assert (node.name, node.lower_name) == (b"b", b"a")


# --- entries of a directory --------------------------------------------------------------------------------------


def test_known_counts_nodes_and_not_places():
    top = DirNode(ROOT_INO, None, b"")
    top.entries = {b"place": 0}
    top.set_entry(b"node", upper_file(10))
    assert top.known == 1


def test_entering_over_a_node_counts_one():
    top = DirNode(ROOT_INO, None, b"")
    top.set_entry(b"a", upper_file(10))
    top.set_entry(b"a", upper_file(11))
    assert top.known == 1


def test_dropping_an_entry_uncounts_it_once():
    top = DirNode(ROOT_INO, None, b"")
    top.set_entry(b"a", upper_file(10))
    top.drop_entry(b"a")
    top.drop_entry(b"a")
    assert (top.known, top.entries) == (0, {})


def test_forgotten_entry_of_a_complete_directory_is_still_a_name():
    top = DirNode(ROOT_INO, None, b"")
    top.complete = True
    top.set_entry(b"a", upper_file(10))
    top.unknow_entry(b"a", 3)
    assert (top.known, top.entries) == (0, {b"a": 3})


def test_forgotten_entry_of_an_incomplete_directory_is_not_known_at_all():
    top = DirNode(ROOT_INO, None, b"")
    top.set_entry(b"a", upper_file(10))
    top.unknow_entry(b"a", 3)
    assert (top.known, top.entries) == (0, {})
