"""Going back to any image of RAM, in any order, gives what a full copy would."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.addresses import PAGE_SIZE
from vtx.x86.memory import HIGH_RAM_START, LOW_RAM_END, PhysicalMemory
from vtx.x86.memory_image import RamHistory

PAGES = 8
SMALL = PAGES * PAGE_SIZE

STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SMALL - 16), st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("write_u64"), st.integers(0, SMALL // 8 - 1), st.integers(0, 3)),
    st.tuples(st.just("clear"), st.integers(0, PAGES - 1), st.just(0)),
    st.tuples(st.just("save"), st.just(0), st.just(0)),
    st.tuples(st.just("restore"), st.integers(0, 20), st.just(0)),
)


@settings(deadline=None, max_examples=300)
@given(steps=st.lists(STEP, max_size=30))
def test_equals_full_copies(steps: list[tuple[str, int, object]]) -> None:
    memory = PhysicalMemory(SMALL)
    told: list[int] = []
    history = RamHistory(memory, lambda: told.append(1))
    images = [(history.save(), memory.read(0, SMALL))]
    for kind, where, what in steps:
        match kind:
            case "write":
                assert isinstance(what, bytes)
                memory.write(where, what)
            case "write_u64":
                assert isinstance(what, int)
                memory.write_u64(8 * where, what)
            case "clear":
                memory.write(where * PAGE_SIZE, bytes(PAGE_SIZE))
            case "save":
                images.append((history.save(), memory.read(0, SMALL)))
            case _:
                image, copy = images[where % len(images)]
                history.restore(image)
                assert memory.read(0, SMALL) == copy
        for image, copy in images:
            pages = range(PAGES)
            assert b"".join(image.pages.get(page, bytes(PAGE_SIZE)) for page in pages) == copy
            assert not any(data == bytes(PAGE_SIZE) for data in image.pages.values())
    assert told


def test_ram_beyond_the_hole_is_part_of_it() -> None:
    memory = PhysicalMemory(LOW_RAM_END + SMALL)
    history = RamHistory(memory, lambda: None)
    for address in (LOW_RAM_END - 8, HIGH_RAM_START, HIGH_RAM_START + SMALL - 8):
        memory.write_u64(address, address)
    image = history.save()
    for address in (LOW_RAM_END - 8, HIGH_RAM_START, HIGH_RAM_START + SMALL - 8, HIGH_RAM_START + PAGE_SIZE):
        memory.write_u64(address, 1)
    history.restore(image)
    for address in (LOW_RAM_END - 8, HIGH_RAM_START, HIGH_RAM_START + SMALL - 8):
        assert memory.read_u64(address) == address
    assert memory.read_u64(HIGH_RAM_START + PAGE_SIZE) == 0


def test_restored_code_is_translated_anew() -> None:
    memory, written = PhysicalMemory(SMALL), []
    history = RamHistory(memory, lambda: None)
    image = history.save()
    memory.write(0x1000, b"code")
    memory.write(0x2000, b"data")
    memory.code_pages, memory.code_written = {1, 3}, written.append
    history.restore(image)
    assert written == [1]
